"""Questions and contexts -> windows of tokens, and back from a window's tokens to characters of the
context.

A window is [special tokens, question, special tokens, slice of the context, special tokens],
without padding; tokenizers that pad on the left take the context first. Slices of one context
overlap by `doc_stride` tokens. That is what the Rust tokenizer makes of a pair with truncation to
`max_seq_length` and a stride. Here each text is tokenized once, whole and by itself, and the
windows are put together in numpy: the questions of SQuAD share their contexts by fives, and copying
is cheaper than tokenizing. That is exact because the tokenizer treats the two texts of a pair apart
until its post-processor joins them.

Labels follow the definition of transformers' run_qa (prepare_train_features), for the first answer
of an example:
    start   the last context token of the window that begins at or before the answer's first character
    end     the first context token of the window that ends at or after the answer's last character
    CLS     for both where the answer is not wholly inside the window, or there is none
with one difference, where run_qa's two labels come out in the wrong order and no decoder could give
them back: its start runs on to the last padding token if the answer begins in the window's last
context token, and a character that takes several tokens (an emoji in byte-level BPE) has its last
token for start and its first for end. Here the start stays inside the context, and the two labels
are put in order.
"""
from __future__ import annotations

import logging
import os
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from ipu_options.errors import UsageError
from qa.settings import InferSettings, TrainSettings

if TYPE_CHECKING:
    import datasets  # it takes a second to import, which one question need not wait for

_log = logging.getLogger(__name__)

_VERSION = 1  # part of the cache's key: count up when the windows of the same settings change


class _Recipe(NamedTuple):
    """All that windows depend on besides the examples. The special tokens stand before, between and
    after the two texts.
    """

    tokenizer: Tokenizer
    before: list
    between: list
    after: list
    cls_token_id: int
    context_first: bool
    max_seq_length: int
    doc_stride: int
    labels: bool
    offsets: bool
    cut_long_questions: bool

    @property
    def room(self):
        """Tokens of a window that are left for the two texts."""
        return self.max_seq_length - len(self.before) - len(self.between) - len(self.after)

    @property
    def token_type(self):
        return numpy.dtype(numpy.uint16 if self.tokenizer.get_vocab_size(
            with_added_tokens=True) <= 1 << 16 else numpy.int32)

    def schema(self):
        columns = {
            "input_ids": pa.list_(pa.from_numpy_dtype(self.token_type)), "example": pa.int32(),
            "cls_position": pa.int16(), "context_start": pa.int16()}
        if self.labels:
            columns.update(start_position=pa.int16(), end_position=pa.int16())
        if self.offsets:
            columns["offsets"] = pa.list_(pa.int32())
        return pa.schema(list(columns.items()))


class Questions(NamedTuple):
    """A data set of questions (columns id, question, context, answers) and the windows made from
    it.
    """

    examples: datasets.Dataset
    windows: Windows


def load_questions(settings: TrainSettings, tokenizer) -> Tuple[Questions, Questions]:
    """The training questions with labels in their windows, and the validation questions with
    character offsets.

    Prints some of the training questions if --show_examples asks for it. Raises as `load_examples`
    and `make_windows` do.
    """
    from qa.data.dataset import load_examples, random_examples

    source = dict(dataset_name=settings.dataset_name,
                  dataset_config_name=settings.dataset_config_name, on_bad_row=settings.on_bad_row,
                  version_2_with_negative=settings.version_2_with_negative)
    examples = load_examples(split="train", file=settings.train_file,
                             max_samples=settings.max_train_samples, **source)
    eval_examples = load_examples(split="validation", file=settings.validation_file,
                                  max_samples=settings.max_eval_samples, **source)
    if settings.show_examples:
        print(random_examples(examples, settings.show_examples, settings.seed))
    shape = dict(max_seq_length=settings.max_seq_length, doc_stride=settings.doc_stride,
                 on_bad_row=settings.on_bad_row, num_proc=settings.preprocessing_num_workers,
                 overwrite_cache=settings.overwrite_cache)
    windows = Windows(make_windows(examples, tokenizer, labels=True, offsets=False, **shape))
    eval_windows = Windows(
        make_windows(eval_examples, tokenizer, labels=False, offsets=True, **shape))
    stop_tokenizer_threads()
    return Questions(examples, windows), Questions(eval_examples, eval_windows)


def stop_tokenizer_threads() -> None:
    """Let the tokenizer work without threads from now on; with them it would warn of every process
    that is started later.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def make_windows(examples: datasets.Dataset, tokenizer, *, max_seq_length: int, doc_stride: int,
                 labels: bool, offsets: bool, num_proc: Optional[int] = None,
                 on_bad_row: str = "refuse", overwrite_cache: bool = False) -> datasets.Dataset:
    """Cut every example (columns id, question, context, with labels also answers) into windows of
    at most `max_seq_length` tokens.

    Columns of the result, one row a window, the windows of one example together and in order:
        input_ids (list, no padding), example (row in `examples`), cls_position and context_start (index in input_ids);
        with `labels`  start_position, end_position (index in input_ids, see above);
        with `offsets` offsets, flattened [context tokens, 2]: each context token's first character and the one after its last.
    Cached by `datasets` and reused when examples, tokenizer and settings are the same;
    `overwrite_cache` makes them anew.

    A question so long that its context cannot be cut into windows overlapping by `doc_stride` is
    refused with its id; with on_bad_row="skip" its end is cut off, and a question without windows
    does not occur. Raises UsageError for settings that leave no room, and for a tokenizer without a
    Rust backend or a CLS token.
    """
    import datasets

    recipe = _recipe(tokenizer, max_seq_length=max_seq_length, doc_stride=doc_stride, labels=labels,
                     offsets=offsets, on_bad_row=on_bad_row)
    key = (_VERSION, examples._fingerprint, recipe.tokenizer.to_str(), recipe[1:])
    make = partial(_windows_of_batch, recipe=recipe)
    windows = examples.with_format("arrow").map(
        make, with_indices=True, batched=True, remove_columns=examples.column_names,
        num_proc=num_proc, features=datasets.Features.from_arrow_schema(
            recipe.schema()), load_from_cache_file=not overwrite_cache,
        new_fingerprint=datasets.fingerprint.Hasher.hash(key), desc="Windows")
    return windows.with_format(None)


class FewQuestions:
    """A few questions in memory, with as much of a data set's interface as answering needs.

    columns: id, question and context, a list each. (`datasets` itself takes longer to import than
    one answer takes.)
    """

    def __init__(self, columns: Dict[str, List[str]]):
        self.columns = columns

    def __len__(self):
        return len(self.columns["id"])

    def __getitem__(self, key):
        """A column by its name; with a slice that part of every column."""
        return self.columns[key] if isinstance(key, str) else {
            name: column[key] for name, column in self.columns.items()}

    def select_columns(self, names):
        """The same questions: it is no loss that the other columns stay."""
        return self


def windows_for_answers(settings: InferSettings, tokenizer,
                        examples: Union[datasets.Dataset, FewQuestions]) -> Windows:
    """The windows, with offsets, of the questions that infer.py answers; those of FewQuestions are
    made in memory, uncached.

    Raises UsageError as `make_windows` does.
    """
    shape = dict(max_seq_length=settings.max_seq_length, doc_stride=settings.doc_stride,
                 on_bad_row=settings.on_bad_row)
    if isinstance(examples, FewQuestions):
        recipe = _recipe(tokenizer, labels=False, offsets=True, **shape)
        windows = _windows_of_batch(pa.table(examples.columns), list(range(len(examples))), recipe)
    else:
        windows = make_windows(examples, tokenizer, labels=False, offsets=True,
                               num_proc=settings.preprocessing_num_workers, **shape)
    stop_tokenizer_threads()
    return Windows(windows)


def _recipe(tokenizer, *, max_seq_length, doc_stride, labels, offsets, on_bad_row):
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{type(tokenizer).__name__} has no Rust tokenizer behind it, which characters of tokens come from; "
            "name a model with a tokenizer.json")
    if tokenizer.cls_token_id is None:
        raise UsageError(
            f"{type(tokenizer).__name__} has no CLS token, which stands for `no answer`; "
            "name a model of RoBERTa's family")
    backend = tokenizer.backend_tokenizer
    # then a copy without them, for they stay set on the original
    if backend.truncation or backend.padding:
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    pair = backend.encode("a", "b")
    texts, ids = pair.sequence_ids, pair.ids
    first, second = [
        [place for place, text in enumerate(texts) if text == number] for number in (0, 1)]
    recipe = _Recipe(backend, ids[:first[0]], ids[first[-1] + 1:second[0]], ids[second[-1] + 1:],
                     tokenizer.cls_token_id, tokenizer.padding_side == "left", max_seq_length,
                     doc_stride, labels, offsets, on_bad_row == "skip")
    if max_seq_length > numpy.iinfo(numpy.int16).max:
        raise UsageError(
            f"--max_seq_length {max_seq_length} is too long: at most {numpy.iinfo(numpy.int16).max} tokens"
        )
    if not 0 <= doc_stride < recipe.room - 1:
        special = max_seq_length - recipe.room
        raise UsageError(
            f"--doc_stride {doc_stride} does not go with --max_seq_length {max_seq_length}: it must be 0 to "
            f"{recipe.room - 2}, for a window has {special} special tokens and must move on from one to the next"
        )
    return recipe


def _windows_of_batch(examples: pa.Table, rows: list, recipe: _Recipe) -> pa.Table:
    """The windows of some examples; `rows` are their rows in the data set."""
    questions = [question.lstrip() for question in examples["question"].to_pylist()]
    contexts = examples["context"].combine_chunks().dictionary_encode(
    )  # texts that are equal are tokenized once
    which = contexts.indices.to_numpy().astype(numpy.int64)
    encodings = recipe.tokenizer.encode_batch(questions + contexts.dictionary.to_pylist(),
                                              add_special_tokens=False)
    length = numpy.array([len(encoding) for encoding in encodings])
    first = numpy.cumsum(length) - length  # of each text in ids
    ids = numpy.fromiter(chain.from_iterable(encoding.ids for encoding in encodings),
                         recipe.token_type, length.sum())
    context_length, context_first = length[len(questions) + which], first[len(questions) + which]
    question_length = _question_lengths(length[:len(questions)], context_length, examples["id"],
                                        recipe)

    # Windows start every `capacity - doc_stride` context tokens, up to the first one that reaches
    # the context's end.
    capacity = recipe.room - question_length
    step = numpy.maximum(capacity - recipe.doc_stride, 1)
    count = 1 - numpy.maximum(context_length - capacity, 0) // -step
    example = numpy.repeat(numpy.arange(len(questions)), count)
    begin = (numpy.arange(len(example)) -
             numpy.repeat(numpy.cumsum(count) - count, count)) * step[example]
    end = numpy.minimum(begin + capacity[example], context_length[example])
    begin, end = begin + context_first[example], end + context_first[example]

    texts = (first[example], question_length[example]), (begin, end - begin)
    input_ids, lists, context_start = _assemble(ids, texts, recipe)
    cls_position = _first_of_each_list(input_ids == recipe.cls_token_id, lists)
    columns = {
        "input_ids": pa.ListArray.from_arrays(
            lists, input_ids), "example": numpy.array(rows)[example], "cls_position": cls_position,
        "context_start": context_start}
    if recipe.labels or recipe.offsets:
        characters = _context_characters(encodings[len(questions):])
        context_tokens = begin - length[:len(questions)].sum(), end - length[:len(questions)].sum()
    if recipe.labels:
        start, last = _labels(characters, length[len(questions):], which, context_tokens, example,
                              examples["answers"])
        for name, token in (("start_position", start), ("end_position", last)):
            columns[name] = numpy.where(token < 0, cls_position, context_start + token)
    if recipe.offsets:
        taken, lists = _ranges(context_tokens[0], end - begin)
        columns["offsets"] = pa.ListArray.from_arrays(2 * lists, characters[taken].ravel())
    schema = recipe.schema()
    return pa.table(
        [pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names],
        schema=schema)


def _question_lengths(question, context, names, recipe):
    """Tokens of each question [N] that go into its windows: all, or what is left of one that is too
    long and cut.

    The Rust tokenizer fails on the same examples: those whose context is to be cut where the
    question leaves it no more than `doc_stride` tokens.
    """
    longest = recipe.room - recipe.doc_stride - 1
    bad = numpy.flatnonzero((question + context > recipe.room) & (question > longest))
    if not len(bad):
        return question
    if not recipe.cut_long_questions:
        raise UsageError(
            f"the question with id {names[int(bad[0])].as_py()!r} has {question[bad[0]]} tokens; with --max_seq_length "
            f"{recipe.max_seq_length} and --doc_stride {recipe.doc_stride} it can have {longest}: raise the one, lower the other, "
            "or cut such questions with --on_bad_row skip")
    _log.warning("cut %d questions to their first %d tokens, first the one with id %r", len(bad),
                 longest, names[int(bad[0])].as_py())
    question = question.copy()
    question[bad] = longest
    return question


def _ranges(first, length):
    """Indices first[i] ... first[i] + length[i] - 1 for each i in turn, and where each i begins
    among them [N + 1].
    """
    begins = numpy.concatenate([[0], numpy.cumsum(length)])
    return numpy.repeat(first - begins[:-1], length) + numpy.arange(begins[-1]), begins.astype(
        numpy.int32)


def _assemble(ids, texts, recipe):
    """Join special tokens and texts -> (all windows' tokens, where each begins [windows + 1], first
    context token in each).

    ids: the tokens of all texts; texts: (first token in ids [windows], length [windows]) of the
    question and of the context.
    """
    pool = numpy.concatenate([
        ids, numpy.array(recipe.before + recipe.between + recipe.after, ids.dtype)])
    windows = len(texts[0][0])
    segments, place = [], len(ids)
    for special, text in zip((recipe.before, recipe.between, recipe.after),
                             (*texts[::-1 if recipe.context_first else 1], None)):
        segments.append((numpy.full(windows, place), numpy.full(windows, len(special))))
        place += len(special)
        if text is not None:
            segments.append(text)
    first, length = (numpy.stack(parts, axis=1) for parts in zip(*segments))
    taken, begins = _ranges(first.ravel(), length.ravel())
    context_start = length[:, :1 if recipe.context_first else 3].sum(axis=1)
    return pool[taken], begins[::len(segments)], context_start


def _first_of_each_list(mask, lists):
    """Index in its list of the first true element of `mask` [elements], lists beginning at `lists`
    [N + 1]; each has one.
    """
    places = numpy.flatnonzero(mask)
    return places[numpy.searchsorted(places, lists[:-1])] - lists[:-1]


def _context_characters(encodings):
    """int32 [tokens + 1, 2]: the first character of each token of all contexts, and the one after
    its last; one row of zeros.
    """
    tokens = sum(len(encoding) for encoding in encodings)
    characters = numpy.zeros(
        (tokens + 1, 2),
        numpy.int32)  # the last row stands for tokens of an empty context at the very end
    spans = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    characters[:-1] = numpy.fromiter(spans, numpy.int32, 2 * tokens).reshape(tokens, 2)
    return characters


def _labels(characters, length, which, context_tokens, example, answers):
    """First and last answer token of each window, counted from its first context token; -1 for both
    without one.

    characters: of the tokens of all contexts; length [contexts]; which [examples]: each example's
    context; context_tokens: the first and the one after the last row of `characters` in each
    window; example [windows].
    """
    answered, first_character, after = _first_answers(answers)
    # One search finds the tokens of all answers: a context's number in the high half of a key keeps
    # the contexts apart.
    number = numpy.append(numpy.repeat(numpy.arange(len(length)), length), len(length)) << 32
    begins = numpy.maximum.accumulate(number + characters[:, 0])
    ends = numpy.minimum.accumulate((number + characters[:, 1])[::-1])[::-1]
    start = numpy.searchsorted(begins, (which << 32) + first_character, side="right") - 1
    last = numpy.searchsorted(ends, (which << 32) + after, side="left")

    begin, end = context_tokens
    inside = (answered[example] & (begin < end) & (characters[begin, 0] <= first_character[example])
              & (characters[end - 1, 1] >= after[example]))
    start, last = (numpy.clip(token[example], begin, end - 1) - begin for token in (start, last))
    return numpy.where(inside, numpy.minimum(start, last), -1), numpy.where(
        inside, numpy.maximum(start, last), -1)


def _first_answers(answers):
    """(has an answer [N], its first character [N], the character after its last [N]) of each
    example's first answer.
    """
    texts, starts = (pc.struct_field(answers, name).combine_chunks()
                     for name in ("text", "answer_start"))
    lists = texts.offsets.to_numpy()
    answered = lists[1:] > lists[:-1]
    first_character, after = numpy.zeros((2, len(answered)), numpy.int64)
    first_character[answered] = starts.values.to_numpy()[starts.offsets.to_numpy()[:-1][answered]]
    after[answered] = pc.utf8_length(texts.values).to_numpy()[lists[:-1][answered]]
    return answered, first_character, after + first_character


class Windows:
    """Windows as numpy arrays, which are views of the memory-mapped Arrow file that `make_windows`
    gave, or of a table in memory.

    lengths, example, cls_position, context_start, and with labels start_position, end_position
    (else None): int32 [windows]. Pickles as the name of the file: a loader's worker opens it again,
    and nothing is copied.
    """

    def __init__(self, source: Union[datasets.Dataset, pa.Table]):
        self._source = source
        self.fingerprint = getattr(source, "_fingerprint",
                                   None)  # that of the data set, which its cache goes by
        table = source if isinstance(source, pa.Table) else source.data.table
        self._tokens = _Lists(table["input_ids"])
        self._characters = _Lists(table["offsets"]) if "offsets" in table.column_names else None
        self.lengths = self._tokens.lengths
        for name in ("example", "cls_position", "context_start", "start_position", "end_position"):
            setattr(
                self, name,
                table[name].to_numpy().astype(numpy.int32) if name in table.column_names else None)

    def __len__(self):
        return len(self.lengths)

    def __getstate__(self):
        return self._source

    def __setstate__(self, source):
        self.__init__(source)

    def input_ids(self, window: int) -> numpy.ndarray:
        """The window's tokens [lengths[window]]."""
        return self._tokens[window]

    def offsets(self, window: int) -> numpy.ndarray:
        """int32 [context tokens, 2]: first character of each context token in the context, and the
        one after its last.
        """
        return self._characters[window].reshape(-1, 2)


class _Lists:
    """A column of lists: [i] is a view of list i. An Arrow file holds a column in chunks, each with
    its own values.
    """

    def __init__(self, column: pa.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        begins = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._chunk = numpy.repeat(numpy.arange(len(chunks), dtype=numpy.int32),
                                   [len(chunk) for chunk in chunks])
        self._begin = numpy.concatenate([lists[:-1] for lists in begins] or
                                        [numpy.zeros(0, numpy.int32)])
        self.lengths = numpy.concatenate([numpy.diff(lists) for lists in begins] or
                                         [numpy.zeros(0, numpy.int32)])

    def __getitem__(self, index):
        begin = self._begin[index]
        return self._values[self._chunk[index]][begin:begin + self.lengths[index]]
