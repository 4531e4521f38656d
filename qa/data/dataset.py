"""Load question data sets from the hub or from files, and check every example.

The result has SQuAD's columns: id, context, question, answers. A row without an id gets its number,
an answer without a position is looked for in the context. An example is malformed if
- a column is missing, null, empty, or holds a number or NaN where text belongs (but for the id);
- a text contains bytes that are not UTF-8, or lone surrogates;
- an answer is empty, does not match the context at its answer_start, or has none and stands in the
  context not once;
- an earlier example has the same id;
- it has no answer and --version_2_with_negative is not set.
The first malformed example ends the run with its source, position and id. With on_bad_row="skip"
they are left out, and the log reports how many and why.

Examples are read, checked and written to an Arrow file one at a time; memory grows by 100 bytes per
id, to detect duplicates. The file's name is a hash of source and settings, which finds it again.
"""
from __future__ import annotations

import ast
import hashlib
import json
import logging
import math
import random
import re
import sys
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Optional

import datasets
import pyarrow as pa

from qa.data import readers
from qa.data.readers import BadRow
from runtime.errors import RunError, UsageError, counted, one_line
from runtime.files import writing, written_whole

_log = logging.getLogger(__name__)

# Part of the cache key. Increase it when the same source would give different examples.
_VERSION = 1
_SCHEMA = pa.schema(
    [("id", pa.string()), ("context", pa.string()), ("question", pa.string()),
     ("answers", pa.struct([("text", pa.list_(pa.string())),
                            ("answer_start", pa.list_(pa.int32()))]))])


def load_examples(*, split: str, file: Optional[str] = None, dataset_name: Optional[str] = None,
                  dataset_config_name: Optional[str] = None, max_samples: Optional[int] = None,
                  need_answers: Optional[bool] = True, version_2_with_negative: bool = False,
                  on_bad_row: str = "refuse", cache_dir: Optional[str] = None) -> datasets.Dataset:
    """Return the checked examples of `file`, or of a hub data set's `split` if no file is given.

    dataset_name: on the hub, or a folder, whose file of the split's name is read like `file`.
    max_samples: how many well-formed examples (default: all). need_answers: if false, `answers` is
    neither required nor read; if None, it is read where an example has it. on_bad_row: "refuse" or
    "skip". cache_dir: of the Arrow file (default: the cache folder of `datasets`).

    Returns a memory-mapped data set with the columns id (unique), context, question and answers
    {text: list of strings, answer_start: list of int32 in code points}, empty lists without any.
    Raises UsageError if the source is malformed or contains no usable example, RunError if the hub
    cannot be reached or the cache cannot be written.
    """
    if not sys.stderr.isatty():  # bars would fill a file, here and where windows are made
        datasets.disable_progress_bars()
    checks = dict(need_answers=need_answers, version_2_with_negative=version_2_with_negative,
                  on_bad_row=on_bad_row)
    if not file and not dataset_config_name and Path(dataset_name).is_dir():
        file = _file_of(dataset_name, split)
    if file:
        with readers.open_rows(file) as opened:
            return _cached(str(file), _hash(file, opened),
                           readers.read_rows(file, opened, need_answers), max_samples, cache_dir,
                           checks)
    hub = _load_from_hub(dataset_name, dataset_config_name, split)
    readers.check_columns(f"--dataset_name {dataset_name}", hub.column_names, need_answers)
    return _cached(f"{dataset_name} ({split})", hub._fingerprint, iter(hub), max_samples, cache_dir,
                   checks)


def _cached(source, identity, rows, max_samples, cache_dir, checks):
    """Return the data set of `rows`, from its Arrow file if there is one.

    source: what messages call the rows. identity: a hash of them. checks: arguments of `_checked`.
    """
    key = hashlib.sha256(repr((_VERSION, identity, max_samples, *checks.values())).encode())
    key = key.hexdigest()[:32]
    # Each release of `datasets`, which caches the windows beside, stores column types in its way.
    folder = (Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
              / f"squad_rows-{datasets.__version__}")
    arrow_file = folder / f"{key}.arrow"
    # Every run has to report how many it skips, which is only known after reading the source.
    if checks["on_bad_row"] == "skip" or not arrow_file.exists():
        checked = _checked(rows, source, **checks)
        with closing(checked), writing(str(folder), f"the cache of {source}",
                                       "; set HF_DATASETS_CACHE to a folder with room"):
            _write_arrow(islice(checked, max_samples), arrow_file, source)
    return datasets.Dataset(datasets.table.MemoryMappedTable.from_file(str(arrow_file)),
                            fingerprint=key)


def random_examples(examples: datasets.Dataset, n: int, seed: int) -> str:
    """Return `n` random examples as text: the id, question, true answers and context of each."""
    picked = random.Random(seed).sample(range(len(examples)), min(n, len(examples)))
    return "\n\n".join(
        f"{example['id']}\n  question: {example['question']}\n"
        f"  answers:  {' | '.join(example['answers']['text']) or '(none)'}\n"
        f"  context:  {example['context']}" for example in (examples[i] for i in picked))


def _hash(path, opened):
    """Return a hash of the file's suffix and content, and go back to its beginning."""
    digest = hashlib.sha256(Path(path).suffix.lower().encode())
    for block in iter(lambda: opened.read(1 << 20), b""):
        digest.update(block)
    opened.seek(0)
    return digest.hexdigest()


def _file_of(folder, split):
    """Return the file of a data set's local folder that holds `split`, if there is one such."""
    files = [path for place in (Path(folder), Path(folder, "data"))
             for path in place.glob(f"{split}.*") if path.suffix in readers.FORMATS]
    return files[0] if len(files) == 1 else None


def _load_from_hub(name, config_name, split):
    """Return one split of a hub data set.

    Raises RunError if it cannot be fetched, UsageError if it cannot be read or has no such split.
    """
    remedy = "give local files with --train_file and --validation_file"
    try:
        # Never run code from the hub. `datasets` 4 removed both the option and that feature.
        trust = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
        splits = datasets.load_dataset(name, config_name, **trust)
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and (
                cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__
        why = one_line(cause)
        if isinstance(cause, datasets.table.CastError):
            odd = set(cause.table_column_names) ^ set(cause.requested_column_names)
            why = f"not all have the columns {', '.join(sorted(odd))}" if odd else why
        raise UsageError(f"--dataset_name {name}: its files cannot be read ({why[:300]}); correct "
                         f"them, or {remedy}, whose rows are checked one by one") from error
    # Offline, no such name, no access: errors of several libraries.
    except Exception as error:
        raise RunError(f"cannot fetch the data set {name!r} from the hub ({one_line(error)}); "
                       f"{remedy}, or run the demo, which needs no network, with --config demo"
                       ) from error
    if split not in splits:
        raise UsageError(
            f"--dataset_name {name} has no split {split!r}, it has {', '.join(splits)}")
    return splits[split]


def _write_arrow(rows, arrow_file, source):
    """Write the examples to `arrow_file`. Raises UsageError if there are none, or OSError."""
    arrow_file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(arrow_file, "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        count = 0
        for block in iter(lambda: list(islice(rows, 1000)), []):
            count += len(block)
            writer.write_batch(pa.RecordBatch.from_pylist(block, schema=_SCHEMA))
        if not count:
            raise UsageError(f"{source}: there is no question in it that can be used")


def _checked(rows, source, need_answers, version_2_with_negative, on_bad_row):
    """Yield the well-formed examples in order, as dictionaries with the columns of _SCHEMA.

    Skipped ones are logged when the source has been read to its end, or as far as was asked for.
    """
    seen, skipped, first, number = set(), Counter(), "", 0
    try:
        for number, row in enumerate(rows, 1):
            try:
                if isinstance(row, BadRow):
                    raise row
                checked = _check({"id": number, **row}, need_answers, version_2_with_negative)
                # Of 64 bits: a million ids collide less than once in 10^7 runs.
                if hash(checked["id"]) in seen:
                    raise BadRow("has an id that another row has")
            except BadRow as problem:
                name = row.get("id") if isinstance(row, dict) else None
                where = (f"{source}: row {number} (id {str(name)[:80]!a})"
                         if name is not None else f"{source}: row {number}")
                if on_bad_row == "refuse":
                    advice = "" if isinstance(problem, NoAnswer) else (
                        "; correct it, or leave such rows out with --on_bad_row skip")
                    raise UsageError(f"{where} {problem}{advice}") from None
                skipped[str(problem)] += 1
                first = first or where
                continue
            seen.add(hash(checked["id"]))
            yield checked
    finally:
        if skipped:
            reasons = ", ".join(f"{count} x {why}" for why, count in skipped.most_common(8))
            _log.warning("%s: skipped %d of %s, first %s: %s", source, sum(skipped.values()),
                         counted(number, "row"), first, reasons)


class NoAnswer(BadRow):
    """An example without an answer; to skip it would drop exactly the unanswerable questions."""


def _check(row, need_answers, version_2_with_negative):
    """Return `row` with the columns and types of _SCHEMA. Raises BadRow if it is malformed."""
    missing = [name for name in ("context", "question") if name not in row]
    if missing:
        raise BadRow(f"has no {', '.join(missing)}")
    name = row["id"]
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    context, question = _text(row["context"], "context"), _text(row["question"], "question")
    texts, starts = ([], []) if need_answers is False else _answers(
        row, context, need_answers, version_2_with_negative)
    for text, start in zip(texts, starts):
        if start + len(text) > len(context):
            raise BadRow(
                f"has an answer_start beyond the context's end: {start} and {len(text)} characters "
                f"of {len(context)}")
        if context[start:start + len(text)] != text:
            raise BadRow("has an answer that does not stand at its answer_start in the context")
    return {"id": _text(name, "id"), "context": context, "question": question,
            "answers": {"text": texts, "answer_start": starts}}


def _text(value, name):
    """Return `value` if it is a text that is not blank and can be encoded; else raise BadRow."""
    one = f"an {name}" if name[0] in "ai" else f"a {name}"
    if not isinstance(value, str):
        null = value is None or (isinstance(value, float) and math.isnan(value))
        raise BadRow(f"has a null {name}"
                     if null else f"has {one} that is no text but {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"has an empty {name}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"has {one} that is not valid UTF-8 or holds a lone surrogate") from None
    return value


def _answers(row, context, need_answers, version_2_with_negative):
    """Return (texts, starts) of a row's answers, both empty if it has none.

    Exporters write an unanswerable question with null, empty or no answers, or as is_impossible
    with answers that are empty or begin at -1. Raises BadRow for anything else that is no list.
    """
    names = next((names for names in readers.ANSWER_COLUMNS if names[0] in row), None)
    impossible = str(row.get("is_impossible")).lower() in ("true", "1", "1.0")
    answers = _pairs(row, *names) if names else []
    lenient = impossible or version_2_with_negative
    if all(_is_nothing(text) and (lenient or start in (None, -1)) or impossible and start == -1
           for text, start in answers):
        answers = []
    if answers and impossible:
        raise BadRow("is_impossible, and has an answer: one of the two is wrong")
    if need_answers and not answers and not (names or impossible):
        raise BadRow("has no answers")
    if need_answers and not answers and not version_2_with_negative:
        raise NoAnswer("has no answer; give --version_2_with_negative if some questions have none")
    texts = [_text(text, "answer text") for text, _ in answers]
    return texts, [_start(start, text, context) for text, (_, start) in zip(texts, answers)]


def _pairs(row, texts_name, starts_name):
    """Return the list of (text, start) in the columns of these names, a list or one of each.

    starts_name: None if both are in one column, as {"text": [...], "answer_start": [...]}, a list
    of {"text", "answer_start"}, or a string of either.
    """
    value = row[texts_name]
    if _is_nothing(value):
        return []
    if not starts_name:
        value = _parsed(value) if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
            return [(answer.get("text"), answer.get("answer_start")) for answer in value]
        if not isinstance(value, dict) or "text" not in value:
            raise BadRow('has answers that are not {"text": [...], "answer_start": [...]}')
        return _pairs(value, "text", "answer_start")
    texts, starts = (_as_list(row.get(name), name) for name in (texts_name, starts_name))
    starts = starts or [None] * len(texts)
    if len(texts) != len(starts):
        raise BadRow(f"has {counted(len(texts), 'answer text')} and "
                     f"{counted(len(starts), 'answer_start')}")
    return list(zip(texts, starts))


def _as_list(value, name):
    """Return the list in a column, which tables may hold as text, or a list of its one value."""
    if isinstance(value, str) and value.startswith(("[", "array")) and name != "answer":
        value = _parsed(value)
    return [] if _is_nothing(value) else value if isinstance(value, list) else [value]


def _start(start, text, context):
    """Return an answer's first character, found in the context if `start` is None."""
    if start is None:
        places = len(re.findall(f"(?={re.escape(text)})", context))
        if places != 1:
            raise BadRow("has an answer that " + (
                f"stands {places} times in the context: give its answer_start" if places else
                "does not stand in the context"))
        return context.index(text)
    if isinstance(start, str) and re.fullmatch(r"-?\d{1,10}(\.0)?", start.strip()):
        start = float(start)
    if isinstance(start, float) and start.is_integer():
        start = int(start)
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < 1 << 31:
        raise BadRow("has an answer_start that is not a whole number from 0 on, of 31 bits")
    return start


def _is_nothing(value):
    return value is None or value != value or isinstance(value, str) and not value.strip()


def _parsed(text):
    """Parse JSON, or what Python, numpy or pandas print; no code in the text is executed.

    For example {'text': array(['x'], dtype=object), 'answer_start': [np.int64(5)]}. Raises BadRow.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return ast.literal_eval(_NumpyAsPython().visit(tree))
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise BadRow("has answers that are neither JSON nor a printed dictionary") from None


class _NumpyAsPython(ast.NodeTransformer):
    """Replaces array([...], ...) and np.int64(5), as numpy prints them, by the first argument."""

    def visit_Call(self, node):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        numpy_type = re.fullmatch(r"array|u?int\d+|float\d+|str_", name)
        return self.visit(node.args[0]) if numpy_type and node.args else node
