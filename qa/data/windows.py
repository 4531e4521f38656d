"""Make windows of tokens from questions and contexts, with their labels and character offsets.

A window is [special tokens, question, special tokens, slice of the context, special tokens],
without padding. For tokenizers that pad on the left, the context comes before the question.
Consecutive slices of one context overlap by `doc_stride` tokens. The windows are those of the Rust
tokenizer for a pair of texts with truncation to `max_seq_length` and a stride, which handles the
two texts separately until its post-processor joins them. Here each text is tokenized once, and
numpy assembles the windows: in SQuAD about five questions share a context.

The labels follow the definition of transformers' run_qa (prepare_train_features), for the first
answer of an example:
    start   the last context token in the window that begins at or before the answer's first
            character
    end     the first context token in the window that ends at or after the answer's last character
Both are the CLS token if the example has no answer, or if the window does not hold all of it.

There is one difference. In two cases run_qa's start label is behind its end label, a span that no
decoder can predict: if the answer begins in the window's last context token, its start moves on to
the last padding token; and of a character of several tokens (an emoji in byte-level BPE) the last
becomes the start. Here the start remains inside the context, and the two labels are put in order.
"""
from __future__ import annotations

import logging
import os
import socket
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy
import pyarrow as pa
import pyarrow.compute as pc

from qa.data.tokenizer import QATokenizer
from qa.settings import ModelSettings, TrainSettings
from runtime import files, processes
from runtime.errors import UsageError, counted
from runtime.signals import forked_workers

if TYPE_CHECKING:
    import datasets  # takes a second to import: too long for answering a single question

_log = logging.getLogger(__name__)

# Part of the cache key. Increase it when the same settings would give different windows.
_VERSION = 1
_LONGEST = numpy.iinfo(numpy.int16).max  # tokens of a window, whose columns are int16


class _Recipe(NamedTuple):
    """Everything that the windows of given examples depend on."""

    tokenizer: QATokenizer
    max_seq_length: int
    doc_stride: int
    labels: bool  # whether the windows get these columns
    offsets: bool
    cut_long_questions: bool  # or refuse them

    @property
    def key(self):
        """What the windows depend on besides the tokenizer's definition and the examples."""
        tokenizer = self.tokenizer
        return (tokenizer.before, tokenizer.between, tokenizer.after, tokenizer.cls_token_id,
                tokenizer.context_first, *self[1:],
                *([True] if tokenizer.token_types else [False, True] if tokenizer.trims else []))

    @property
    def room(self):
        """The number of tokens in a window that are available for the two texts."""
        special = self.tokenizer.before + self.tokenizer.between + self.tokenizer.after
        return self.max_seq_length - len(special)

    @property
    def token_type(self):
        """The smallest of uint16 and int32 that holds every token id."""
        return numpy.dtype(numpy.uint16 if self.tokenizer.backend.get_vocab_size(
            with_added_tokens=True) <= 1 << 16 else numpy.int32)

    def schema(self):
        """Return the Arrow schema of the windows."""
        columns = {
            "input_ids": pa.list_(pa.from_numpy_dtype(self.token_type)), "example": pa.int32(),
            "cls_position": pa.int16(), "context_start": pa.int16()}
        if self.tokenizer.token_types:
            columns["second_text"] = pa.int16()
        if self.labels:
            columns.update(start_position=pa.int16(), end_position=pa.int16())
        if self.offsets:
            columns["offsets"] = pa.list_(pa.int32())
        return pa.schema(list(columns.items()))


class Questions(NamedTuple):
    """A data set and its windows."""

    examples: datasets.Dataset  # columns id, question, context, answers
    windows: Windows
    prefix: str = ""  # of the names of files and metrics that answers to them get


def load_questions(settings: TrainSettings, tokenizer: QATokenizer,
                   ) -> Tuple[Optional[Questions], Optional[Questions], Optional[Questions]]:
    """Collective: load the questions that `settings` name: (training, validation, test).

    The windows of the training questions have labels, the others character offsets. What a run does
    not need is None. Raises what `load_examples` and `make_windows` raise, and UsageError if a
    process has other questions.
    """
    loaded = processes.first_of_host_first(_load_questions, settings, tokenizer)
    processes.agree({f"the fingerprint of the {name} questions": each and each.windows.fingerprint
                     for name, each in zip(("training", "validation", "test"), loaded)})
    return loaded


def _load_questions(settings: TrainSettings, tokenizer: QATokenizer):
    from qa.data.dataset import load_examples, random_examples

    def load(split, file, max_samples=None, need_answers=True):
        examples = load_examples(
            split=split, file=file, max_samples=max_samples, need_answers=need_answers,
            dataset_name=settings.dataset_name, dataset_config_name=settings.dataset_config_name,
            on_bad_row=settings.on_bad_row, cache_dir=settings.cache_dir,
            version_2_with_negative=settings.version_2_with_negative)
        training = split == "train"
        if training and settings.show_examples:
            print(random_examples(examples, settings.show_examples, settings.seed))
        print(f"{split}: {counted(len(examples), 'question')} to windows", flush=True)
        windows = make_windows(examples, tokenizer, settings, labels=training, offsets=not training)
        return Questions(examples, windows, "test_" if split == "test" else "")

    train = validation = test = None
    if settings.trains:
        train = load("train", settings.train_file, settings.max_train_samples)
    if settings.evaluates:
        validation = load("validation", settings.validation_file, settings.max_eval_samples)
    if settings.test_file:
        test = load("test", settings.test_file, need_answers=None)
    _stop_tokenizer_threads()
    return train, validation, test


def windows_for_answers(settings: ModelSettings, tokenizer: QATokenizer,
                        examples: Union[datasets.Dataset, FewQuestions]) -> Windows:
    """Collective: return the windows, with character offsets, of the questions to answer."""
    windows = processes.first_of_host_first(partial(
        make_windows, examples, tokenizer, settings, labels=False, offsets=True))
    _stop_tokenizer_threads()
    return windows


def _stop_tokenizer_threads() -> None:
    # If the tokenizers library had used threads, it would print a warning for every later fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class FewQuestions:
    """A few examples in memory: importing `datasets` takes longer than answering one question.

    columns: lists of equal length named id, question and context.
    """

    def __init__(self, columns: Dict[str, List[str]]):
        self.columns = columns

    def __len__(self):
        return len(self.columns["id"])

    def __getitem__(self, key):
        """Return a column by its name, or for a slice {name: that part of the column}."""
        return self.columns[key] if isinstance(key, str) else {
            name: column[key] for name, column in self.columns.items()}

    def select_columns(self, names):
        return self


def make_windows(examples: Union[datasets.Dataset, FewQuestions], tokenizer: QATokenizer,
                 settings: ModelSettings, *, labels: bool, offsets: bool) -> Windows:
    """Cut every example into windows of at most settings.max_seq_length tokens.

    examples: with the columns id, question, context and, for labels, answers. labels, offsets:
    whether the windows have these. Those of a data set with a file are cached beside it, and found
    again there if nothing differs, unless settings.overwrite_cache is set.

    Raises UsageError if doc_stride is out of range, and for a question so long that its context
    cannot be cut into windows that overlap by doc_stride; with on_bad_row="skip" its end is cut off
    instead.
    """
    length, stride = settings.max_seq_length, settings.doc_stride
    recipe = _Recipe(tokenizer, length, stride, labels, offsets, settings.on_bad_row == "skip")
    if not 0 <= stride < recipe.room - 1:
        raise UsageError(
            f"--doc_stride {stride} does not go with --max_seq_length {length}: it must be 0 to "
            f"{recipe.room - 2}, for a window has {length - recipe.room} special tokens and must "
            "move on from one to the next")
    if isinstance(examples, FewQuestions):
        table = pa.Table.from_arrays([_arrow_texts(texts) for texts in examples.columns.values()],
                                     list(examples.columns))
        return Windows(_windows_of_batch(table, list(range(len(examples))), recipe))
    import datasets

    if processes.is_first():
        _check_read_back(examples, recipe)
    fingerprint = datasets.fingerprint.Hasher.hash(
        (_VERSION, examples._fingerprint, tokenizer.backend.to_str(), recipe.key))
    make = partial(
        examples.with_format("arrow").map, partial(_windows_of_batch, recipe=recipe),
        with_indices=True, batched=True, remove_columns=examples.column_names,
        num_proc=settings.preprocessing_num_workers, load_from_cache_file=False,
        features=datasets.Features.from_arrow_schema(recipe.schema()),
        new_fingerprint=fingerprint, desc="Windows")
    if not examples.cache_files:
        return Windows(make().with_format(None))
    folder = Path(examples.cache_files[0]["filename"]).parent / f"windows-{fingerprint}"
    overwrite = settings.overwrite_cache and processes.place().local_index == 0
    if overwrite or not folder.is_dir():
        _fill_cache(folder, make)
    shards = [datasets.table.MemoryMappedTable.from_file(str(file))
              for file in sorted(folder.iterdir())]
    return Windows(datasets.Dataset(datasets.table.concat_tables(shards), fingerprint=fingerprint))


def _check_read_back(examples: datasets.Dataset, recipe: _Recipe) -> None:
    """Warn if labels, read back as text, are often not the answers: see `QATokenizer`.

    Some difference is usual: an answer may be a part of a word, and so of a token.
    """
    rows = numpy.linspace(0, len(examples) - 1, min(len(examples), 200)).astype(int).tolist()
    sample = examples.with_format("arrow")[rows]
    if "answers" not in sample.column_names:
        return
    answers, contexts = sample["answers"].to_pylist(), sample["context"].to_pylist()
    windows = Windows(_windows_of_batch(sample, list(range(len(rows))), recipe._replace(
        max_seq_length=_LONGEST, doc_stride=0, labels=True, offsets=True)))
    others, count = [], 0
    for window, row in enumerate(windows.example):
        labels = numpy.array([windows.start_position[window], windows.end_position[window]])
        if labels[0] != windows.cls_position[window]:
            begin, after = windows.offsets(window)[labels - windows.context_start[window], [0, 1]]
            read, answer = contexts[row][begin:after], answers[row]["text"][0]
            count += 1
            if read.strip() != answer.strip():
                others.append((read, answer))
    if len(others) > 0.1 * count:
        _log.warning(
            "warning: the labels of %d of %s read back as other text, for example %.60r "
            "for %.60r: the character offsets of %s are not those of its tokens", len(others),
            counted(count, "answer"), *others[0], recipe.tokenizer.name)


def _fill_cache(folder: Path, make: Callable) -> None:
    """Write the windows' files to `folder`, by make(cache_file_name=...), whole or not at all.

    What killed processes of this machine have left half-written is removed. Raises RunError.
    """
    host = socket.gethostname().replace(".", "-")
    for left in folder.parent.glob(f".windows-*.{host}.*.tmp"):
        if not os.path.exists(f"/proc/{left.name.split('.')[-2]}"):
            files.delete(left)
    with files.writing(str(folder.parent), "the cache of windows",
                       "; set HF_DATASETS_CACHE to a folder with room"), \
            files.folder_written_aside(folder, f".{host}.{os.getpid()}") as aside, forked_workers():
        make(cache_file_name=str(aside / "windows.arrow"))
        files.rename_folder(aside, folder)


def _windows_of_batch(examples: pa.Table, indices: list, recipe: _Recipe) -> pa.Table:
    """Return the windows of a batch of examples, with the columns of `recipe.schema()`.

    indices: the indices [N] of the examples in the data set.
    """
    questions = [question.lstrip() for question in examples["question"].to_pylist()]
    # Contexts that occur several times are tokenized once.
    contexts = examples["context"].combine_chunks().dictionary_encode()
    which = _numbers(contexts.indices).astype(numpy.int64)
    encodings = recipe.tokenizer.backend.encode_batch(questions + contexts.dictionary.to_pylist(),
                                              add_special_tokens=False)
    length = numpy.array([len(encoding) for encoding in encodings])
    first = numpy.cumsum(length) - length  # the index in ids of each text's first token
    ids = numpy.fromiter(chain.from_iterable(encoding.ids for encoding in encodings),
                         recipe.token_type, length.sum())
    context_length, context_first = length[len(questions) + which], first[len(questions) + which]
    question_length = _question_lengths(length[:len(questions)], context_length, examples["id"],
                                        recipe)

    # A window starts every `capacity - doc_stride` context tokens. The first window that reaches
    # the end of the context is the last one.
    capacity = recipe.room - question_length
    advance = numpy.maximum(capacity - recipe.doc_stride, 1)
    count = 1 - numpy.maximum(context_length - capacity, 0) // -advance
    example = numpy.repeat(numpy.arange(len(questions)), count)
    begin = (numpy.arange(len(example)) -
             numpy.repeat(numpy.cumsum(count) - count, count)) * advance[example]
    end = numpy.minimum(begin + capacity[example], context_length[example])
    begin, end = begin + context_first[example], end + context_first[example]

    texts = (first[example], question_length[example]), (begin, end - begin)
    input_ids, lists, context_start, second_text = _assemble(ids, texts, recipe)
    # The first one in each window.
    cls_places = numpy.flatnonzero(input_ids == recipe.tokenizer.cls_token_id)
    cls_position = cls_places[numpy.searchsorted(cls_places, lists[:-1])] - lists[:-1]
    columns = {
        "input_ids": pa.ListArray.from_arrays(_arrow(lists), _arrow(input_ids)),
        "example": numpy.array(indices)[example],
        "cls_position": cls_position,
        "context_start": context_start, "second_text": second_text}
    if recipe.labels or recipe.offsets:
        characters = _context_characters(encodings[len(questions):])
        if recipe.tokenizer.trims:
            _trim(characters, length[len(questions):], contexts.dictionary)
        context_tokens = begin - length[:len(questions)].sum(), end - length[:len(questions)].sum()
    if recipe.labels:
        start, last = _labels(characters, length[len(questions):], which, context_tokens, example,
                              examples["answers"])
        for name, token in (("start_position", start), ("end_position", last)):
            columns[name] = numpy.where(token < 0, cls_position, context_start + token)
    if recipe.offsets:
        taken, lists = _ranges(context_tokens[0], end - begin)
        columns["offsets"] = pa.ListArray.from_arrays(_arrow(2 * lists),
                                                      _arrow(characters[taken].ravel()))
    schema = recipe.schema()
    return pa.table(
        [_arrow(columns[name]).cast(schema.field(name).type) for name in schema.names],
        schema=schema)


def _arrow(values: Union[numpy.ndarray, pa.Array]) -> pa.Array:
    """Return numbers as an Arrow array, which shares their memory.

    pa.array would import pandas, which takes longer than making the windows of one question.
    """
    return values if isinstance(values, pa.Array) else pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values),
        [None, pa.py_buffer(numpy.ascontiguousarray(values))])


def _arrow_texts(texts: List[str]) -> pa.Array:
    """Return texts as an Arrow array, without pandas as `_arrow` does."""
    encoded = [text.encode() for text in texts]
    ends = numpy.cumsum([0, *map(len, encoded)], dtype=numpy.int32)
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends),
                                       pa.py_buffer(b"".join(encoded)))


def _numbers(array: pa.Array) -> numpy.ndarray:
    """Return a view of an Arrow array of integers, none of which is missing; see `_arrow`."""
    dtype = numpy.dtype(str(array.type))
    return numpy.frombuffer(array.buffers()[1], dtype, array.offset + len(array))[array.offset:] \
        if len(array) else numpy.zeros(0, dtype)


def _question_lengths(question, context, names, recipe):
    """Return how many tokens of each question go into its windows, int [N].

    question, context: the lengths [N] of the texts in tokens. A question is too long if its context
    does not fit into one window and the question leaves `doc_stride` tokens or fewer for it; the
    Rust tokenizer fails on exactly these examples.
    """
    longest = recipe.room - recipe.doc_stride - 1
    bad = numpy.flatnonzero((question + context > recipe.room) & (question > longest))
    if not len(bad):
        return question
    if not recipe.cut_long_questions:
        raise UsageError(
            f"the question with id {names[int(bad[0])].as_py()!r} has {question[bad[0]]} tokens; "
            f"with --max_seq_length {recipe.max_seq_length} and --doc_stride {recipe.doc_stride} "
            f"it can have {longest}: raise the one, lower the other, "
            "or cut such questions with --on_bad_row skip")
    _log.warning("cut %s to the first %d tokens, first the one with id %r",
                 counted(len(bad), "question"), longest, names[int(bad[0])].as_py())
    question = question.copy()
    question[bad] = longest
    return question


def _ranges(first, length):
    """Concatenate the ranges first[n], ..., first[n] + length[n] - 1 of all n.

    first, length: int [N]. Returns the indices, and where each range begins in them, int32 [N + 1].
    """
    begins = numpy.concatenate([[0], numpy.cumsum(length)])
    return (numpy.repeat(first - begins[:-1], length) + numpy.arange(begins[-1]),
            begins.astype(numpy.int32))


def _assemble(ids, texts, recipe):
    """Assemble the windows from special tokens, questions and slices of contexts.

    ids: the tokens of all texts. texts: of question and slice, (first token in ids, length)
    [windows]. Returns the tokens of all windows, where each window begins in them [windows + 1],
    and the first token in each window of the context and of the second text [windows].
    """
    tokenizer = recipe.tokenizer
    specials = tokenizer.before, tokenizer.between, tokenizer.after
    pool = numpy.concatenate([ids, numpy.array(sum(specials, []), ids.dtype)])
    windows = len(texts[0][0])
    segments, place = [], len(ids)
    for special, text in zip(specials, (*texts[::-1 if tokenizer.context_first else 1], None)):
        segments.append((numpy.full(windows, place), numpy.full(windows, len(special))))
        place += len(special)
        if text is not None:
            segments.append(text)
    first, length = (numpy.stack(parts, axis=1) for parts in zip(*segments))
    taken, begins = _ranges(first.ravel(), length.ravel())
    first_text, second_text = length[:, :1].sum(axis=1), length[:, :3].sum(axis=1)
    context_start = first_text if tokenizer.context_first else second_text
    return pool[taken], begins[::len(segments)], context_start, second_text


def _context_characters(encodings):
    """Return the first character of each context token, and the one after its last [tokens + 1, 2].

    The additional entry at the end is zero: an empty context at the very end refers to it.
    """
    tokens = sum(len(encoding) for encoding in encodings)
    characters = numpy.zeros((tokens + 1, 2), numpy.int32)
    spans = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    characters[:-1] = numpy.fromiter(spans, numpy.int32, 2 * tokens).reshape(tokens, 2)
    return characters


def _trim(characters, length, contexts):
    """Leave out the spaces at both ends of the tokens' `characters`, in place."""
    texts = contexts.to_pylist()
    is_space = numpy.frombuffer("".join(texts).encode("utf-32-le"), numpy.uint32) == ord(" ")
    sizes = numpy.array([len(text) for text in texts])
    origin = numpy.repeat(numpy.cumsum(sizes) - sizes, length)
    begin, end = characters[:-1].T
    for edge, step, shift in ((begin, 1, 0), (end, -1, -1)):
        more = numpy.flatnonzero(begin < end)
        while len(more):
            more = more[is_space[origin[more] + edge[more] + shift]]
            edge[more] += step
            more = more[begin[more] < end[more]]


def _labels(characters, length, which, context_tokens, example, answers):
    """Return the first and the last answer token of each window, int [windows] both.

    They are counted from the window's first context token; both are -1 if the window does not
    contain the whole first answer, or there is none.

    length: [contexts], in tokens. which: [examples], each one's context. context_tokens: in
    `characters`, the first context token of a window and the one after its last. example: [windows]
    """
    answered, first_character, after = _first_answers(answers)
    # A single search finds the tokens of all answers: the number of the context in the high half of
    # each key keeps the contexts apart.
    number = numpy.append(numpy.repeat(numpy.arange(len(length)), length), len(length)) << 32
    begins = numpy.maximum.accumulate(number + characters[:, 0])
    ends = numpy.minimum.accumulate((number + characters[:, 1])[::-1])[::-1]
    start = numpy.searchsorted(begins, (which << 32) + first_character, side="right") - 1
    last = numpy.searchsorted(ends, (which << 32) + after, side="left")

    begin, end = context_tokens
    inside = (answered[example] & (begin < end) & (characters[begin, 0] <= first_character[example])
              & (characters[end - 1, 1] >= after[example]))
    start, last = (numpy.clip(token[example], begin, end - 1) - begin for token in (start, last))
    return (numpy.where(inside, numpy.minimum(start, last), -1),
            numpy.where(inside, numpy.maximum(start, last), -1))


def _first_answers(answers):
    """Return [N]: whether there is an answer, its first character, and the one after its last."""
    texts, starts = (pc.struct_field(answers, name).combine_chunks()
                     for name in ("text", "answer_start"))
    lists = texts.offsets.to_numpy()
    answered = lists[1:] > lists[:-1]
    first_character, after = numpy.zeros((2, len(answered)), numpy.int64)
    first_character[answered] = starts.values.to_numpy()[starts.offsets.to_numpy()[:-1][answered]]
    after[answered] = pc.utf8_length(texts.values).to_numpy()[lists[:-1][answered]]
    return answered, first_character, after + first_character


class Windows:
    """Windows as numpy arrays.

    source: a memory-mapped Arrow file or a table in memory, with the columns of `_Recipe.schema`.
    Token ids and character offsets are views of it; a loader's workers open its file again.

    Attributes, int32 [windows] each: lengths (in tokens), example (its index), and indices in
    input_ids: cls_position, context_start, second_text (None without token types), start_position
    and end_position (None without labels).
    """

    def __init__(self, source: Union[datasets.Dataset, pa.Table]):
        self._source = source
        # The key of the data set in the cache of `datasets`; None for a table in memory.
        self.fingerprint = getattr(source, "_fingerprint", None)
        table = source if isinstance(source, pa.Table) else source.data.table
        self._tokens = _Lists(table["input_ids"])
        self._characters = _Lists(table["offsets"]) if "offsets" in table.column_names else None
        self.lengths = self._tokens.lengths
        for name in ("example", "cls_position", "context_start", "second_text", "start_position",
                     "end_position"):
            setattr(self, name, _numbers(table[name].combine_chunks()).astype(numpy.int32)
                    if name in table.column_names else None)

    def __len__(self):
        return len(self.lengths)

    def __reduce__(self):
        return Windows, (self._source,)

    def input_ids(self, window: int) -> numpy.ndarray:
        """Return the token ids of a window, uint16 or int32 [lengths[window]]."""
        return self._tokens[window]

    def offsets(self, window: int) -> numpy.ndarray:
        """Return the first character of each context token, and the one after its last, [N, 2]."""
        return self._characters[window].reshape(-1, 2)


class _Lists:
    """A column of lists in one or several chunks. Indexing returns a list as a view."""

    def __init__(self, column: pa.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        begins = [_numbers(chunk.offsets) for chunk in chunks]
        self._values = [_numbers(chunk.values) for chunk in chunks]
        self._chunk = numpy.repeat(numpy.arange(len(chunks), dtype=numpy.int32),
                                   [len(chunk) for chunk in chunks])
        self._begin = numpy.concatenate([lists[:-1] for lists in begins])
        self.lengths = numpy.concatenate([numpy.diff(lists) for lists in begins])

    def __getitem__(self, index):
        begin = self._begin[index]
        return self._values[self._chunk[index]][begin:begin + self.lengths[index]]
