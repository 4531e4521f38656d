"""Read files of questions, one example at a time, so that a file may be larger than memory.

The file's suffix selects the format:

    .json            SQuAD's nested layout {"data": [{"paragraphs": [{"context", "qas": [{"id",
                     "question", "answers"}]}]}]}, or a list of flat examples {"id", "context",
                     "question", "answers"}, or {"data": [flat examples]}
    .jsonl, .ndjson  JSON Lines with one flat example per line (also accepted in a .json file)
    .csv             with a header; `answers` as JSON, or as Python or pandas print a dictionary
    .parquet         with the columns id, context, question, answers

Bytes that are not UTF-8 are decoded to lone surrogates (PEP 383). The check of an example detects
them, so that invalid bytes make one example malformed instead of the whole file unreadable.
"""
from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Iterator, Sequence, Union

from runtime.errors import UsageError

COLUMNS = ("id", "context", "question", "answers")
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd"}


class BadRow(ValueError):
    """What is wrong with one example. The message is the predicate of `row 3 (id x) ...`."""


def columns(need_answers: bool) -> Sequence[str]:
    """Return the names of the columns that examples must have, with or without answers."""
    return COLUMNS if need_answers else COLUMNS[:3]


def read_rows(path, need_answers: bool = True) -> Iterator[Union[dict, BadRow]]:
    """Yield the examples of a file in order.

    Each is a dictionary with any of COLUMNS, whose values are not checked, or a BadRow if it cannot
    be read. need_answers: whether a table (.csv, .parquet) must have the column `answers`.

    Raises UsageError, with the file's name, if the file as a whole cannot be read: it is missing,
    empty, compressed or corrupt, its suffix is unknown, or a table lacks a column.
    """
    path = Path(path)
    readers = {
        ".json": _read_json, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines,
        ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise UsageError(
            f"{path}: unknown kind of file; name one that ends in {', '.join(readers)}")
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise UsageError(f"{path}: the file is empty")
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise UsageError(f"{path}: is compressed ({name}); unpack it first")
    try:
        yield from readers[path.suffix.lower()](path, columns(need_answers))
    except RecursionError:
        raise UsageError(f"{path}: values are nested too deep") from None


def _open(path):
    """Open a text file; bytes that are not UTF-8 become lone surrogates."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_json(path, columns):
    """Yield the examples of all JSON values in the file; JSON Lines are several such values."""
    with _open(path) as file:
        text = _JsonText(path, file)
        while text.peek():
            for value in text.elements() if text.peek() == "[" else text.data_or_self():
                yield from _flatten(value)


def _flatten(value):
    """Yield the examples of `value`, an article of the nested layout or one flat example."""
    if not isinstance(value, dict) or "paragraphs" not in value:
        yield (value if isinstance(value, dict)
               else BadRow(f"is not an object with {', '.join(COLUMNS)}"))
        return
    paragraphs = value["paragraphs"] if isinstance(value["paragraphs"], list) else [None]
    for paragraph in paragraphs:
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
            yield BadRow("is a paragraph without a list of questions, `qas`")
            continue
        for question in paragraph["qas"]:
            if isinstance(question, dict):
                yield {**question, "context": paragraph.get("context")}
            else:
                yield BadRow("is a question that is not an object")


class _JsonText:
    """A long JSON text, decoded value by value, so that only the current value is in memory."""

    def __init__(self, path, file):
        self._path, self._file = path, file
        self._buffer, self._place, self._line = "", 0, 1
        self._decode = json.JSONDecoder().raw_decode

    def _read(self, characters):
        """Drop what has been decoded and read on; return whether anything was left to read."""
        self._line += self._buffer.count("\n", 0, self._place)
        more = self._file.read(characters)
        self._buffer, self._place = self._buffer[self._place:] + more, 0
        return bool(more)

    def _fail(self, what, place):
        """Raise UsageError with the line number of index `place` of the buffer."""
        line = self._line + self._buffer.count("\n", 0, place)
        raise UsageError(f"{self._path}: is not valid JSON in line {line}: {what}")

    def peek(self):
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            while self._place < len(self._buffer):
                if not self._buffer[self._place].isspace():
                    return self._buffer[self._place]
                self._place += 1
            if not self._read(1 << 16):
                return ""

    def take(self, characters):
        """Consume and return the next character. Raises UsageError if not one of `characters`."""
        found = self.peek()
        if not found or found not in characters:
            self._fail(
                f"expected {' or '.join(characters)}, found {found or 'the end of the file'}",
                self._place)
        self._place += 1
        return found

    def value(self):
        """Decode and return the next value, reading more of the file until the value is complete.

        The amount that is read doubles each time, so that the total work stays linear. Raises
        UsageError if the text is not valid JSON.
        """
        self.peek()
        while True:
            begin = self._place
            try:
                value, end = self._decode(self._buffer, begin)
                if end == len(self._buffer) and self._read(1 << 16):
                    continue  # a number may continue in the text that was just read
                self._place += end - begin
                return value
            except json.JSONDecodeError as error:
                # If the buffer ends within the value, the decoder reports an error near the end of
                # the buffer, or at the start of the unterminated string.
                cut_off = (error.pos + 16 > len(self._buffer)
                           or error.msg.startswith("Unterminated string"))
                if not cut_off or not self._read(max(1 << 16, len(self._buffer) - self._place)):
                    self._fail(error.msg, self._place + error.pos - begin)
            except ValueError:  # Python refuses integers of more than 4,300 digits
                self._fail("a number of too many digits", begin)

    def elements(self):
        """Yield the elements of the next value, an array."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def data_or_self(self):
        """Yield the elements of the array `data` in the next object, or else the object itself."""
        self.take("{")
        found, has_data = {}, False
        if self.peek() == "}":
            self.take("}")
            yield found
            return
        while True:
            key = self.value()
            self.take(":")
            if key == "data" and self.peek() == "[":
                has_data = True
                yield from self.elements()
            else:
                found[key] = self.value()
            if self.take(",}") == "}":
                break
        if not has_data:
            yield found


def _read_json_lines(path, columns):
    with _open(path) as file:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    row = BadRow(f"is not valid JSON: {error.msg}")
                except ValueError:
                    row = BadRow("is not valid JSON: a number of too many digits")
                yield (row if isinstance(row, (dict, BadRow))
                       else BadRow(f"is not an object with {', '.join(COLUMNS)}"))


def _read_csv(path, columns):
    # A context may be longer than the csv module's default limit of 131,072 characters.
    csv.field_size_limit((1 << 31) - 1)
    with _open(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_columns(path, reader.fieldnames or (), columns)
            for row in reader:
                yield BadRow("has more fields than the header") if None in row else row
        except csv.Error as error:
            raise UsageError(
                f"{path}: is not valid CSV in line {reader.line_num}: {error}") from error


def _read_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(str(path)) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(batch_size=1000, columns=list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: cannot be read as Parquet: {error}") from error


def _check_columns(path, names, columns):
    """Raise UsageError if the table's column `names` lack any of `columns`."""
    missing = [name for name in columns if name not in names]
    if missing:
        raise UsageError(
            f"{path}: has no column {', '.join(missing)}; "
            f"it has {', '.join(map(str, names)) or 'none'}")
