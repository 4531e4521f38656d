"""Data files: every format gives the same questions, and malformed files are refused.

A malformed row is refused in one line as well, or skipped and counted.
"""
import csv
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from qa.data.dataset import load_examples
from runtime.errors import RunError, UsageError

CONTEXT = "Zoë 😀 flew to Oslo,\nin 1921. \x07"
ROWS = [{"id": str(number), "context": CONTEXT, "question": f'Who, "{number}"?',
         "answers": {"text": ["Zoë", "Oslo"], "answer_start": [0, 14]}} for number in range(3)]
NESTED = {
    "version": "1.1", "data": [{
        "title": "Zoë", "paragraphs": [{
            "context": CONTEXT, "qas": [{
                "id": row["id"], "question": row["question"], "answers": [{
                    "text": text,
                    "answer_start": start} for text, start in zip(*row["answers"].values())]}
                                        for row in ROWS]}]}]}


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows)


def write_csv(path, answers):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows({**row, "answers": answers(row["answers"])} for row in ROWS)


def test_formats_give_the_same_questions(tmp_path):
    (tmp_path / "nested.json").write_text(json.dumps(NESTED, indent=1))
    (tmp_path / "list.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8-sig")
    (tmp_path / "data.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "lines.json").write_text(lines(ROWS))
    (tmp_path / "lines.jsonl").write_text(lines(ROWS) + "\n\n")
    write_csv(tmp_path / "json.csv", json.dumps)
    write_csv(tmp_path / "python.csv", repr)
    write_csv(
        tmp_path / "pandas.csv",
        lambda answers: f"{{'text': array({answers['text']!r}, dtype=object), "
        f"'answer_start': array({answers['answer_start']!r}, dtype=int32)}}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    files = [path for path in sorted(tmp_path.iterdir()) if path.is_file()]
    assert len(files) == 9
    for file in files:
        assert list(load_examples(split="train", file=file,
                                  cache_dir=tmp_path / "cache")) == ROWS, file
    assert list(
        load_examples(split="train", file=files[0], max_samples=2,
                      cache_dir=tmp_path / "cache")) == ROWS[:2]


BAD = {
    "has no context": {"context": ...},
    "null context": {"context": None},
    "no text but float": {"context": 1.5},
    "null question": {"question": float("nan")},
    "empty question": {"question": " \t"},
    "empty context": {"context": ""},
    "lone surrogate": {"context": "Zo\ud800"},
    "empty id": {"id": ""},
    "null id": {"id": None},
    "id that another row has": {"id": "0"},
    "no answer": {"answers": {"text": [], "answer_start": []}},
    "beyond the context's end": {"answers": {"text": ["Zoë"], "answer_start": [99]}},
    "does not stand": {"answers": {"text": ["Zoë"], "answer_start": [1]}},
    "whole number": {"answers": {"text": ["Zoë"], "answer_start": [-1]}},
    "whole number from": {"answers": {"text": ["Zoë"], "answer_start": [True]}},
    "of 31 bits": {"answers": "{'text': ['Zoë'], 'answer_start': [0x" + "f" * 5000 + "]}"},
    "an id that is no text": {"id": 1.5},
    "2 answer texts and 1": {"answers": {"text": ["Zoë", "Oslo"], "answer_start": [0]}},
    "empty answer text": {"answers": {"text": [""], "answer_start": [0]}},
    "answers that are not": {"answers": ["Zoë"]},
    "neither JSON nor": {"answers": "__import__('os').abort()"},
}


@pytest.mark.parametrize("what", BAD)
def test_malformed_rows(tmp_path, caplog, what):
    row = {key: value for key, value in {**ROWS[1], **BAD[what]}.items() if value is not ...}
    file = tmp_path / "rows.jsonl"
    file.write_text(lines([ROWS[0], row, ROWS[2]]))
    with pytest.raises(UsageError, match="rows.jsonl: row 2.*" + what) as refusal:
        load_examples(split="train", file=file, cache_dir=tmp_path)
    assert "\n" not in str(refusal.value)
    for _ in range(2):  # the second reading, of a file that is already cached, says the same
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert list(
                load_examples(split="train", file=file, on_bad_row="skip", cache_dir=tmp_path)) == [
                    ROWS[0], ROWS[2]]
        assert "skipped 1 of 3 rows" in caplog.text and what in caplog.text


def test_rows_that_cannot_be_decoded(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = lines(ROWS).encode().split(b"\n")
    file.write_bytes(b"\n".join([
        good[0], good[1].replace(b"Who", b"Wh\xff"), b'{"id": "7", ', b"[1]",
        b'{"id": ' + b"7" * 5000 + b"}", good[2]]))
    assert list(load_examples(split="train", file=file, on_bad_row="skip", cache_dir=tmp_path)) == [
        ROWS[0], ROWS[2]]


@pytest.mark.parametrize("name, content", [("empty.json", b""), ("blank.json", b" \n"),
                                           ("none.json", b"[]"),
                                           ("cut.json", json.dumps(NESTED).encode()[:-40]),
                                           ("broken.json", b'[{"id": 1,}' + b" " * 99),
                                           ("digits.json", b'[{"id": ' + b"7" * 5000 + b"}]"),
                                           ("deep.json", b"[" * 100_000),
                                           ("zipped.json", b"\x1f\x8b\x08abcdef"),
                                           ("rows.xlsx", b"PK\x03\x04"),
                                           ("quote.csv", b'id,context,question,answers\n1,"a'),
                                           ("columns.csv", b"id,context\n1,a\n"),
                                           ("broken.parquet", b"PAR1abcdefPAR1"),
                                           ("text.jsonl", b"hello")])
def test_broken_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name) as refusal:
        load_examples(split="train", file=tmp_path / name, cache_dir=tmp_path)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("squad_rows*/*"))


def test_folders_and_missing_files(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for name in ("folder.json", "absent.json"):
        with pytest.raises(UsageError, match=name):
            load_examples(split="train", file=tmp_path / name, cache_dir=tmp_path)


def load(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(load_examples(split="train", file=path, cache_dir=path.parent, **options))


TABLES = {  # what a program's export begins with, and the answer in it
    "id,question,context,answers": "\"{'text': ['Oslo'], 'answer_start': [np.int64(14)]}\"",
    "question,context,answer": "Oslo", "question,context,answer_text,answer_start": "Oslo,14",
    "Question,Context,Answer": "Oslo", "question,context,answer,answer_start": "Oslo,14.0",
    "question,context,answers.text,answers.answer_start": "['Oslo'],[14]",
    "id,question,context,answers.text,answers.answer_start,title":
        "\"array(['Oslo'], dtype=object)\",\"array([14])\",x"}


ENCODINGS = {",": "utf-8", ";": "utf-16-le", "\t": "utf-16"}


@pytest.mark.parametrize("separator", ENCODINGS)
@pytest.mark.parametrize("header", TABLES)
def test_tables_as_programs_write_them(tmp_path, header, separator):
    """Answers in columns of their own, or without a place; no ids; other separators."""
    cells = [*(["7"] if header.startswith("id") else []), "Where?", CONTEXT]
    rows = [header.split(","), [*cells, *next(csv.reader([TABLES[header]]))]]
    file = tmp_path / "rows.csv"
    with open(file, "w", newline="", encoding=ENCODINGS[separator]) as opened:
        csv.writer(opened, delimiter=separator).writerows(rows)
    (row,) = load_examples(split="train", file=file, cache_dir=tmp_path)
    assert row["id"] == ("7" if header.startswith("id") else "1")
    start = row["answers"]["answer_start"][0]
    assert row["answers"]["text"] == ["Oslo"] and row["context"][start:start + 4] == "Oslo"


def test_answers_without_a_place_must_stand_in_the_context_once(tmp_path):
    for text, what in (("Oslo", "stands 2 times in the context: give its answer_start"),
                       ("Rome", "does not stand in the context")):
        with pytest.raises(UsageError, match=f"row 1 .*has an answer that {what}"):
            load(tmp_path / "rows.csv", f"question,context,answer\nWho?,Oslo and Oslo,{text}\n")


def test_other_layouts_of_json_are_read(tmp_path):
    """Columns as pandas and datasets write them, paragraphs without articles, no ids."""
    by_column = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    by_index = {name: dict(enumerate(column)) for name, column in by_column.items()}
    paragraph = {**NESTED["data"][0]["paragraphs"][0]}
    paragraph["qas"] = [{key: value for key, value in qa.items() if key != "id"}
                        for qa in paragraph["qas"]]
    for content in (by_column, by_index):
        assert load(tmp_path / "rows.json", json.dumps(content)) == ROWS
    numbered = [{**row, "id": str(number)} for number, row in enumerate(ROWS, 1)]
    assert load(tmp_path / "rows.json", json.dumps({"data": [paragraph]})) == numbered
    one = {"id": "1", "question": "Where?", "context": "Ada lived in Oslo.",
           "answers": {"text": ["Oslo"], "answer_start": [13]}}
    for answers in ({"text": "Oslo", "answer_start": 13}, {"text": ["Oslo"]}, {"text": "Oslo"}):
        assert load(tmp_path / "rows.json", json.dumps({**one, "answers": answers})) == [one]


NO_ANSWERS = [
    {"is_impossible": True}, {"is_impossible": True, "answers": []}, {"answers": None},
    {"answers": ""}, {"answers": {"text": [], "answer_start": []}},
    {"is_impossible": True, "answers": [{"text": "", "answer_start": -1}]},
    {"is_impossible": True, "answers": [{"text": "Who", "answer_start": -1}]},
    {"is_impossible": "True", "answers": "[{'text': '', 'answer_start': 0}]"},
    {"answers": {"text": [""], "answer_start": [-1]}}, {"answer": ""}, {"answer": None}]


@pytest.mark.parametrize("no_answer", NO_ANSWERS, ids=str)
def test_unanswerable_questions_as_exporters_write_them(tmp_path, no_answer):
    """Skipping them would drop exactly the unanswerable ones: a refusal does not advise it."""
    row = {"id": "9", "question": "Who?", "context": CONTEXT, **no_answer}
    file = tmp_path / "rows.jsonl"
    unanswerable = {"id": "9", "question": "Who?", "context": CONTEXT,
                    "answers": {"text": [], "answer_start": []}}
    assert load(file, lines([ROWS[0], row]), version_2_with_negative=True) == [
        ROWS[0], unanswerable]
    with pytest.raises(UsageError, match="row 2 .*--version_2_with_negative") as refusal:
        load(file, lines([ROWS[0], row]))
    assert "skip" not in str(refusal.value)


def test_a_question_that_is_impossible_and_has_an_answer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="row 1 .*is_impossible, and has an answer"):
        load(tmp_path / "rows.jsonl", lines([{**ROWS[0], "is_impossible": True}]),
             version_2_with_negative=True)


def test_questions_without_answers(tmp_path):
    file = tmp_path / "rows.jsonl"
    bare = [{key: row[key] for key in ("id", "context", "question")} for row in ROWS]
    file.write_text(lines(bare))
    examples = load_examples(split="validation", file=file, need_answers=False, cache_dir=tmp_path)
    assert [row["answers"] for row in examples] == [{"text": [], "answer_start": []}] * 3
    file.write_text(lines({**row, "answers": {"text": [], "answer_start": []}} for row in bare))
    assert len(
        load_examples(split="train", file=file, version_2_with_negative=True,
                      cache_dir=tmp_path)) == 3


def test_long_values_are_read_in_pieces(tmp_path):
    row = {**ROWS[0], "context": CONTEXT + "é\\\"" * 400_000}
    (tmp_path / "long.json").write_text(
        json.dumps({"version": {"a": [1, 2]}, "data": [row]}, indent=2))
    assert list(load_examples(split="train", file=tmp_path / "long.json", cache_dir=tmp_path)) == [
        row]


def test_a_data_sets_folder_is_read_row_by_row_and_what_is_wrong_in_it_is_named(tmp_path):
    """A bad row, a column that not all files have, and more than one file of a split."""
    folder = tmp_path / "data"
    folder.mkdir()
    options = dict(dataset_name=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    (folder / "train.jsonl").write_text(lines(ROWS))
    (folder / "validation.jsonl").write_text(lines({**row, "title": "x"} for row in ROWS))
    for split in ("train", "validation"):
        assert list(load_examples(split=split, **options)) == ROWS
    (folder / "train.jsonl").write_text(lines(ROWS) + "\n{broken\n")
    with pytest.raises(UsageError, match="data/train.jsonl: row 4 is not valid JSON"):
        load_examples(split="train", **options)
    (folder / "train.jsonl").rename(folder / "train-1.jsonl")
    with pytest.raises(UsageError, match=f"--dataset_name {tmp_path}: its files cannot be read "
                                         r"\(.*JSON parse error.*\); .*--train_file"):
        load_examples(split="train", **options)
    (folder / "train-1.jsonl").write_text(lines(ROWS))
    with pytest.raises(UsageError, match=r"not all have the columns title\)") as refusal:
        load_examples(split="train", **options)
    assert "\n" not in str(refusal.value)


def test_hub_out_of_reach():
    with pytest.raises(RunError, match="--config demo") as failure:
        load_examples(split="train", dataset_name="squad")
    assert "--train_file" in str(failure.value)
