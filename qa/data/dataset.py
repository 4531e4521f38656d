"""Load question data sets from the hub or from files, and check every example.

The result has SQuAD's columns: id, context, question, answers. An example is malformed if
- a column is missing or null, or holds a number or NaN where text belongs (only an id may be an
  integer);
- its id, context or question is empty;
- a text contains bytes that are not UTF-8, or lone surrogates;
- an answer is empty or does not match the context at its answer_start;
- an earlier example has the same id;
- it has no answer and --version_2_with_negative is not set.
Control characters and contexts of any length are allowed and kept unchanged.

With on_bad_row="refuse" the first malformed example ends the run, and the error message gives the
source, the position and the id. With "skip" malformed examples are left out, and the log reports
how many and why.

Examples are read, checked and written to an Arrow file one at a time, so that memory does not grow
with the source, except for about 100 bytes per id to detect duplicates. The file name is a hash of
the source's content and the settings, so that the next run finds and reuses the file.
"""
from __future__ import annotations

import ast
import hashlib
import json
import logging
import math
import random
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Optional

import datasets
import pyarrow as pa

from qa.data.readers import BadRow, columns, read_rows
from runtime.bars import in_terminal
from runtime.errors import RunError, UsageError, first_line
from runtime.files import written_whole

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

    file: a path; qa.data.readers lists the formats. max_samples: return only this many well-formed
    examples, the first ones (default: all). need_answers: if false, `answers` is neither required
    nor read; if None, it is read where an example has it. on_bad_row: "refuse" or "skip", see
    the top of this file. cache_dir: where the Arrow file is written (default: the cache folder of
    `datasets`).

    Returns a memory-mapped data set with the columns id (unique), context, question and answers
    {text: list of strings, answer_start: list of int32 in code points}. Both lists are empty for a
    question without an answer, and for every question if `need_answers` is false.

    Raises UsageError if the source is malformed or contains no usable example, RunError if the hub
    cannot be reached or the cache cannot be written.
    """
    if not in_terminal():  # a bar would fill a file with lines, here and where windows are made
        datasets.disable_progress_bars()
    if file:
        source, rows, identity = str(file), read_rows(file, need_answers), _content(file)
    else:
        hub = _load_from_hub(dataset_name, dataset_config_name, split)
        missing = [name for name in columns(need_answers) if name not in hub.column_names]
        if missing:
            raise UsageError(f"--dataset_name {dataset_name} has no column {', '.join(missing)}; "
                             f"it has {', '.join(hub.column_names)}")
        source, rows, identity = f"{dataset_name} ({split})", iter(hub), hub._fingerprint
    settings = (_VERSION, identity, max_samples, need_answers, version_2_with_negative, on_bad_row)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]
    # `datasets` caches the windows beside this file, and each of its releases stores column types
    # in its own way. Each release therefore gets a folder of its own.
    folder = (Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
              / f"squad_rows-{datasets.__version__}")
    arrow_file = folder / f"{key}.arrow"
    # The number of skipped examples is only known after reading the source, and the log of every
    # run has to report it. With "skip" the source is therefore read even if the cache exists.
    if on_bad_row == "skip" or not arrow_file.exists():
        checked = _checked(rows, source, need_answers, version_2_with_negative, on_bad_row)
        try:
            with closing(checked):
                _write_arrow(islice(checked, max_samples), arrow_file, source)
        except OSError as error:
            raise RunError(
                f"{arrow_file.parent}: cannot write the cache of {source} "
                f"({error.strerror or error}); set HF_DATASETS_CACHE to a folder with room"
            ) from error
    return datasets.Dataset(datasets.table.MemoryMappedTable.from_file(str(arrow_file)),
                            fingerprint=key)


def random_examples(examples: datasets.Dataset, n: int, seed: int) -> str:
    """Return `n` random examples as text: the id, question, true answers and context of each.

    seed: determines which examples are chosen.
    """
    picked = random.Random(seed).sample(range(len(examples)), min(n, len(examples)))
    return "\n\n".join(
        f"{example['id']}\n  question: {example['question']}\n"
        f"  answers:  {' | '.join(example['answers']['text']) or '(none)'}\n"
        f"  context:  {example['context']}" for example in (examples[i] for i in picked))


def _content(file):
    """Return a hash of the file's suffix and content.

    A path that is not a file gives a hash of the suffix alone; the reader refuses it later.
    """
    digest = hashlib.sha256(Path(file).suffix.lower().encode())
    if Path(file).is_file():
        with open(file, "rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def _load_from_hub(name, config_name, split):
    """Return one split of a hub data set.

    Raises RunError if the data set cannot be fetched, UsageError if it has no such split.
    """
    try:
        # Never run code from the hub. `datasets` 4 removed both the option and that feature.
        trust = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
        splits = datasets.load_dataset(name, config_name, **trust)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"cannot fetch the data set {name!r} from the hub ({first_line(error)}); "
            "give local files with --train_file and --validation_file, or run the demo, "
            "which needs no network, with --config demo"
        ) from error
    if split not in splits:
        raise UsageError(
            f"--dataset_name {name} has no split {split!r}, it has {', '.join(splits)}")
    return splits[split]


def _write_arrow(rows, arrow_file, source):
    """Write the examples to `arrow_file`, which appears complete or not at all.

    Raises UsageError if there are none, OSError if the file cannot be written.
    """
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

    Malformed ones raise UsageError (on_bad_row="refuse"), or are counted and logged ("skip") when
    the source has been read to its end or as far as `max_samples` asks for.
    """
    seen, skipped, first, number = set(), Counter(), "", 0
    try:
        for number, row in enumerate(rows, 1):
            try:
                if isinstance(row, BadRow):
                    raise row
                checked = _check(row, need_answers, version_2_with_negative)
                # Hashes have 64 bits: a collision among a million ids occurs less than once in
                # 10^7 runs.
                if hash(checked["id"]) in seen:
                    raise BadRow("has an id that another row has")
            except BadRow as problem:
                name = row.get("id") if isinstance(row, dict) else None
                where = (f"{source}: row {number} (id {str(name)[:80]!a})"
                         if name is not None else f"{source}: row {number}")
                if on_bad_row == "refuse":
                    raise UsageError(f"{where} {problem}; correct it, or leave such rows out with "
                                     "--on_bad_row skip") from None
                skipped[str(problem)] += 1
                first = first or where
                continue
            seen.add(hash(checked["id"]))
            yield checked
    finally:
        if skipped:
            reasons = ", ".join(f"{count} x {why}" for why, count in skipped.most_common(8))
            _log.warning("%s: skipped %d of %d rows, first %s: %s", source, sum(skipped.values()),
                         number, first, reasons)


def _check(row, need_answers, version_2_with_negative):
    """Return `row` with the columns and types of _SCHEMA. Raises BadRow if it is malformed."""
    missing = [name for name in columns(need_answers) if name not in row]
    if missing:
        raise BadRow(f"has no {', '.join(missing)}")
    name = row["id"]
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    context, question = _text(row["context"], "context"), _text(row["question"], "question")
    given = need_answers or (need_answers is None and row.get("answers") not in (None, ""))
    texts, starts = _answers(row["answers"]) if given else ([], [])
    if need_answers and not texts and not version_2_with_negative:
        raise BadRow("has no answer; give --version_2_with_negative if some questions have none")
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
    """Return `name` with its indefinite article."""
    return ("an " if name[0] in "ai" else "a ") + name


def _answers(value):
    """Return (texts, starts) from an `answers` field.

    value: {"text": [...], "answer_start": [...]}, a list of {"text", "answer_start"}, or a string
    of either. Raises BadRow for anything else.
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
    """Parse a string of JSON, or a dictionary as Python or pandas print it.

    An example of the latter is {'text': array(['x'], dtype=object)}. No code in the string is
    executed. Raises BadRow if the string is neither.
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
    """Replaces array([...], ...), as numpy prints an array, by its first argument, the list."""

    def visit_Call(self, node):
        return (node.args[0] if isinstance(node.func, ast.Name) and node.func.id == "array"
                and node.args else node)
