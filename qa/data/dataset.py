"""Questions from the hub or from a file -> a checked data set with SQuAD's columns.

Every row is checked before it counts. With on_bad_row="refuse" the first malformed row ends the
run, naming file, row and id; with "skip" such rows are left out and the log says how many and why.
Malformed is: a missing column, null, a number or NaN where text belongs, an empty context or
question, bytes that are not UTF-8 or lone surrogates, an answer that is empty or does not stand at
its answer_start, an id seen before, and without --version_2_with_negative a question with no
answer. Control characters and contexts of any length are kept as they are.

Rows are read, checked and written to an Arrow file one after the other, so memory does not grow
with the file (but for 100 bytes an id, to find ids that occur twice). The Arrow file is named after
the content of the source and found again by the next run.
"""
from __future__ import annotations

import ast
import hashlib
import json
import logging
import math
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Optional

import datasets
import pyarrow as pa

from ipu_options.errors import RunError, UsageError, first_line
from ipu_options.files import written_whole
from qa.data.readers import COLUMNS, BadRow, read_rows

_log = logging.getLogger(__name__)

_VERSION = 1  # part of the cache's key: count up when the same source gives other rows
_SCHEMA = pa.schema(
    [("id", pa.string()), ("context", pa.string()), ("question", pa.string()),
     ("answers", pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(
         pa.int32()))]))])


def load_examples(*, split: str, file: Optional[str] = None, dataset_name: Optional[str] = None,
                  dataset_config_name: Optional[str] = None, max_samples: Optional[int] = None,
                  need_answers: bool = True, version_2_with_negative: bool = False,
                  on_bad_row: str = "refuse", cache_dir: Optional[str] = None) -> datasets.Dataset:
    """The first `max_samples` good rows (default: all) of `file` (formats: qa.readers), else of a
    hub data set's `split`.

    Columns: id (unique), context, question, answers {text: list of strings, answer_start: list of
    int32, in code points}; lists are empty for a question without answer, and for all if
    `need_answers` is false. Memory-mapped, cached in `cache_dir` (default: the `datasets` cache).
    Raises UsageError for a source that is wrong, RunError if the hub cannot be reached or the cache
    not written.
    """
    if file:
        source, rows, identity = str(file), read_rows(file, need_answers), _content(file)
    else:
        hub = _load_from_hub(dataset_name, dataset_config_name, split)
        missing = [
            name for name in (COLUMNS if need_answers else COLUMNS[:3])
            if name not in hub.column_names]
        if missing:
            raise UsageError(f"--dataset_name {dataset_name} has no column {', '.join(missing)}; "
                             f"it has {', '.join(hub.column_names)}")
        source, rows, identity = f"{dataset_name} ({split})", iter(hub), hub._fingerprint
    settings = (_VERSION, identity, max_samples, need_answers, version_2_with_negative, on_bad_row)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]
    # A folder for each release of `datasets`, which write their own kinds of columns beside this
    # file (the cached windows).
    folder = Path(cache_dir or
                  datasets.config.HF_DATASETS_CACHE) / f"squad_rows-{datasets.__version__}"
    arrow_file = folder / f"{key}.arrow"
    # Rows are only skipped where they are read, so then read them again: the log is to have the
    # count in every run.
    if on_bad_row == "skip" or not arrow_file.exists():
        checked = _checked(rows, source, need_answers, version_2_with_negative, on_bad_row)
        try:
            _write_arrow(islice(checked, max_samples), arrow_file, source)
        except OSError as error:
            raise RunError(
                f"{arrow_file.parent}: cannot write the cache of {source} ({error.strerror or error}); "
                "set HF_DATASETS_CACHE to a folder with room") from error
    return datasets.Dataset(datasets.table.MemoryMappedTable.from_file(str(arrow_file)),
                            fingerprint=key)


def random_examples(examples: datasets.Dataset, n: int, seed: int) -> str:
    """`n` examples picked at random, as text to print: question, true answers and context of each.
    """
    picked = random.Random(seed).sample(range(len(examples)), min(n, len(examples)))
    return "\n\n".join(
        f"{row['id']}\n  question: {row['question']}\n  answers:  {' | '.join(row['answers']['text']) or '(none)'}\n"
        f"  context:  {row['context']}" for row in (examples[i] for i in picked))


def _content(file):
    """A hash of the file's content and kind; none for what is no file, which its reader refuses."""
    digest = hashlib.sha256(Path(file).suffix.lower().encode())
    if Path(file).is_file():
        with open(file, "rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def _load_from_hub(name, config_name, split):
    try:
        # No code from the hub is run; releases from 4 on have no such option, and no such code.
        trust = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
        splits = datasets.load_dataset(name, config_name, **trust)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"cannot fetch the data set {name!r} from the hub ({first_line(error)}); give local files with --train_file and "
            "--validation_file, or run the demo, which needs no network, with --config demo"
        ) from error
    if split not in splits:
        raise UsageError(
            f"--dataset_name {name} has no split {split!r}, it has {', '.join(splits)}")
    return splits[split]


def _write_arrow(rows, arrow_file, source):
    """Write rows to `arrow_file`, which appears whole or not at all."""
    arrow_file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(arrow_file, "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        count = 0
        for block in iter(lambda: list(islice(rows, 1000)), []):
            count += len(block)
            writer.write_batch(pa.RecordBatch.from_pylist(block, schema=_SCHEMA))
        if not count:
            raise UsageError(f"{source}: there is no question in it that can be used")


def _checked(rows, source, need_answers, version_2_with_negative, on_bad_row):
    """The good rows in order, as dictionaries of _SCHEMA; refuses or counts the others."""
    seen, skipped, first, number = set(), Counter(), "", 0
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, BadRow):
                raise row
            checked = _check(row, need_answers, version_2_with_negative)
            if hash(
                    checked["id"]
            ) in seen:  # 64 bits: two ids of a million share them by chance once in 10^7 runs
                raise BadRow("has an id that another row has")
        except BadRow as problem:
            name = row.get("id") if isinstance(row, dict) else None
            where = f"{source}: row {number} (id {str(name)[:80]!a})" if name is not None else f"{source}: row {number}"
            if on_bad_row == "refuse":
                raise UsageError(
                    f"{where} {problem}; correct it, or leave such rows out with --on_bad_row skip"
                ) from None
            skipped[str(problem)] += 1
            first = first or where
            continue
        seen.add(hash(checked["id"]))
        yield checked
    if skipped:
        reasons = ", ".join(f"{count} x {problem}" for problem, count in skipped.most_common(8))
        _log.warning("%s: skipped %d of %d rows, first %s: %s", source, sum(skipped.values()),
                     number, first, reasons)


def _check(row, need_answers, version_2_with_negative):
    missing = [name for name in (COLUMNS if need_answers else COLUMNS[:3]) if name not in row]
    if missing:
        raise BadRow(f"has no {', '.join(missing)}")
    name = row["id"]
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    context, question = _text(row["context"], "context"), _text(row["question"], "question")
    texts, starts = _answers(row["answers"]) if need_answers else ([], [])
    if need_answers and not texts and not version_2_with_negative:
        raise BadRow("has no answer; give --version_2_with_negative if some questions have none")
    for text, start in zip(texts, starts):
        if start + len(text) > len(context):
            raise BadRow(
                f"has an answer_start beyond the context's end: {start} and {len(text)} characters of {len(context)}"
            )
        if context[start:start + len(text)] != text:
            raise BadRow("has an answer that does not stand at its answer_start in the context")
    return {"id": _text(name, "id"), "context": context, "question": question,
            "answers": {"text": texts, "answer_start": starts}}


def _text(value, name):
    if not isinstance(value, str):
        null = value is None or (isinstance(value, float) and math.isnan(value))
        raise BadRow(f"has a null {name}"
                     if null else f"has {_a(name)} that is no text but {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"has an empty {name}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"has {_a(name)} that is not valid UTF-8 or holds a lone surrogate") from None
    return value


def _a(name):
    return ("an " if name[0] in "ai" else "a ") + name


def _answers(value):
    """(texts, starts) from {"text": [...], "answer_start": [...]}, a list of {"text",
    "answer_start"}, or either as a string.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        value = {name: [answer.get(name) for answer in value] for name in ("text", "answer_start")}
    if not isinstance(value, dict) or not all(
            isinstance(value.get(name), list) for name in ("text", "answer_start")):
        raise BadRow('has answers that are not {"text": [...], "answer_start": [...]}')
    texts, starts = value["text"], value["answer_start"]
    if len(texts) != len(starts):
        raise BadRow(f"has {len(texts)} answer texts and {len(starts)} answer_starts")
    starts = [
        int(start) if isinstance(start, float) and start.is_integer() else start
        for start in starts]
    if any(not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < 1 << 31
           for start in starts):
        raise BadRow("has an answer_start that is not a whole number from 0 on, of 31 bits")
    return [_text(text, "answer text") for text in texts], starts


def _parsed(text):
    """The value of a string of JSON, or of Python or pandas output such as {'text': array(['x'],
    dtype=object)}; nothing is run.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return ast.literal_eval(_ArraysAsLists().visit(tree))
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise BadRow("has answers that are neither JSON nor a printed dictionary") from None


class _ArraysAsLists(ast.NodeTransformer):
    """Puts the list in the place of array([...], ...), as numpy prints it."""

    def visit_Call(self, node):
        return node.args[0] if isinstance(
            node.func, ast.Name) and node.func.id == "array" and node.args else node
