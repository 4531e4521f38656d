"""Read files of questions; see FORMATS for what each suffix holds.

A pipe has no suffix: its first characters tell the format. A .json file is held in memory as a
whole, with five times its size (36 MB: 180 MiB and half a second); the others are read row by row.
Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. Other bytes are decoded to lone
surrogates (PEP 383), which make one example malformed instead of the whole file unreadable.
"""
from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, Sequence, Union

from runtime.errors import UsageError

FORMATS = {
    ".json": "SQuAD's nested layout, a list of examples, {\"data\": examples}, or JSON Lines",
    ".jsonl": "JSON Lines, one example per line", ".ndjson": "the same",
    ".csv": "with a header, separated by commas, semicolons or tabs", ".tsv": "the same",
    ".parquet": "a column for each name"}
# The columns of an example; other programs spread the answers over columns of these names.
COLUMNS = ("id", "context", "question", "answers")
ANSWER_COLUMNS = (("answers", None), ("answers.text", "answers.answer_start"),
                  ("answer_text", "answer_start"), ("answer", "answer_start"))
_KNOWN = {*COLUMNS, "is_impossible"}.union(*ANSWER_COLUMNS) - {None}
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd"}
_NO_OBJECT = f"is not an object with {', '.join(COLUMNS)}"
_DECODE, _SPACE = json.JSONDecoder().raw_decode, re.compile(r"\s*")
Row = Dict[str, Any]


class BadRow(ValueError):
    """What is wrong with one example. The message is the predicate of `row 3 (id x) ...`."""


def open_rows(path: Union[str, Path]) -> BinaryIO:
    """Open a file for `read_rows`; a pipe is read into memory. Raises UsageError."""
    try:
        if Path(path).is_file():
            return open(path, "rb")
        with open(path, "rb") as pipe:
            return io.BytesIO(pipe.read())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def read_rows(path: Union[str, Path], file: BinaryIO,
              need_answers: bool = True) -> Iterator[Union[Row, BadRow]]:
    """Yield the examples of a file: dictionaries of unchecked values, or BadRow.

    path: names the format and the file in messages. need_answers: whether a table must have a
    column of answers. Raises UsageError if the file as a whole cannot be read.
    """
    head = file.read(4096)
    encoding = json.detect_encoding(head)
    file.seek(0)
    kind = Path(path).suffix.lower() if Path(path).is_file() else _kind_of(head)
    if kind not in FORMATS:
        raise UsageError(f"{path}: unknown kind of file; name one that ends in "
                         f"{', '.join(FORMATS)}")
    if not head:
        raise UsageError(f"{path}: the file is empty")
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise UsageError(f"{path}: is compressed ({name}); unpack it first")
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, file, need_answers)
            return
        text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
        if kind in (".csv", ".tsv"):
            yield from _read_csv(path, text, need_answers)
        elif kind == ".json":
            yield from _read_json(path, text)
        else:
            yield from _read_json_lines(text)
    except RecursionError:
        raise UsageError(f"{path}: values are nested too deep") from None
    except UnicodeError as error:
        raise UsageError(f"{path}: is not text in {encoding} ({error}); save it as "
                         "UTF-8") from error


def check_columns(source: str, names: Sequence[str], need_answers: bool) -> None:
    """Raise UsageError if a table with these columns lacks one; rows without an id are numbered."""
    missing = [name for name in ("context", "question") if name not in names]
    if need_answers and not any(text in names for text, _ in ANSWER_COLUMNS):
        missing.append("answers")
    if missing:
        raise UsageError(f"{source} has no column {', '.join(missing)}; "
                         f"it has {', '.join(map(str, names)) or 'none'}")


def _kind_of(head: bytes) -> str:
    """Return the suffix of the format that a pipe's first bytes are of."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    text = head.decode(json.detect_encoding(head), "replace").lstrip()
    return ".json" if text[:1] in ("{", "[", "") else ".csv"


def _read_json(path, text):
    """Yield the examples of all JSON values in the file; JSON Lines are several such values."""
    content, place = text.read().rstrip(), 0
    while place < len(content):
        try:
            value, place = _DECODE(content, _SPACE.match(content, place).end())
        except ValueError as error:
            where = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UsageError(f"{path}: is not valid JSON{where}: {_cause(error)}") from None
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            value = value["data"]
        if isinstance(value, dict) and isinstance(value.get("context"), (dict, list)):
            value = _rows_of_columns(value)
        for entry in value if isinstance(value, list) else [value]:
            yield from _examples(entry)


def _cause(error):
    # Python refuses integers of more than 4,300 digits.
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number of too many digits"


def _rows_of_columns(columns):
    """Return rows of {name: column}, as pandas' to_json and datasets' to_dict write them."""
    lists = [list(column.values()) if isinstance(column, dict) else column
             for column in columns.values() if isinstance(column, (dict, list))]
    return [dict(zip(columns, values)) for values in zip(*lists)]


def _examples(value):
    """Yield the examples of `value`, an article of the nested layout or one flat example."""
    if not isinstance(value, dict):
        yield BadRow(_NO_OBJECT)
        return
    if "paragraphs" not in value and "qas" not in value:
        yield value
        return
    paragraphs = value.get("paragraphs", [value])
    for paragraph in paragraphs if isinstance(paragraphs, list) else [None]:
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
            yield BadRow("is a paragraph without a list of questions, `qas`")
            continue
        for question in paragraph["qas"]:
            if isinstance(question, dict):
                yield {**question, "context": paragraph.get("context")}
            else:
                yield BadRow("is a question that is not an object")


def _read_json_lines(text):
    for line in text:
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = BadRow(f"is not valid JSON: {_cause(error)}")
            yield row if isinstance(row, (dict, BadRow)) else BadRow(_NO_OBJECT)


def _read_csv(path, text, need_answers):
    # A context may be longer than the csv module's default limit of 131,072 characters.
    csv.field_size_limit((1 << 31) - 1)
    header = text.readline()
    separator = max(",;\t|", key=lambda mark: len(_KNOWN & set(_names(header, mark))))
    reader = csv.DictReader(text, _names(header, separator), delimiter=separator, strict=True)
    check_columns(f"{path}:", reader.fieldnames, need_answers)
    try:
        for row in reader:
            yield BadRow("has more fields than the header") if None in row else row
    except csv.Error as error:
        raise UsageError(
            f"{path}: is not valid CSV in line {reader.line_num + 1}: {error}") from error


def _names(header, separator):
    return [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]


def _read_parquet(path, file, need_answers):
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            check_columns(f"{path}:", names, need_answers)
            for batch in table.iter_batches(batch_size=1000, columns=[
                    name for name in names if name in _KNOWN]):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: cannot be read as Parquet: {error}") from error
