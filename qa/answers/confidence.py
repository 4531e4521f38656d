"""How often a model's answers are right, as measured on its validation questions.

`score` compares the spans of one text: where all are wrong, the best of them may still have 0.99.
`null_odds` compares the best span with no answer. Of the two, the one that tells right answers from
wrong ones more often is sorted into a table, from sure to unsure, with the share of right answers
in each row. Rows in the wrong order are joined (isotonic regression, Zadrozny and Elkan 2002).
Of the answers with a confidence of at least p, as many as p or more were right.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy

from runtime.errors import UsageError
from runtime.files import read_json_object, write_json

CONFIDENCE = "confidence.json"
RIGHT = 0.5  # F1 from which on an answer counts as right
_ROWS, _ANSWERS = 20, 10  # most rows of a table, least answers in each


def measures(answer: Dict[str, Any]) -> Dict[str, float]:
    """Return what confidence may be read from; more is surer. Of equal ones, the first is used."""
    return {"null_odds": -answer["null_odds"], "score": answer["score"]}


def calibrate(answers: Sequence[dict], references: Sequence[List[str]]) -> Optional[Dict[str, Any]]:
    """Return the table of a model's answers to questions; None with too few.

    answers: of `InferencePipeline.answers`; those without a text do not count. references: the true
    texts of each question. The rows have `from`, the least value of the measure; `answers`, how
    many there are; `right`, their share of right answers, with one right and one wrong answer
    added, because few say little.
    """
    from qa.answers.metrics import best_f1  # imports datasets, which takes a second

    pairs = [(measures(answer), best_f1(answer["text"], texts) >= RIGHT)
             for answer, texts in zip(answers, references) if answer["text"]]
    if len(pairs) < 2 * _ANSWERS:
        return None
    right = numpy.array([is_right for _, is_right in pairs])
    columns = {name: numpy.array([values[name] for values, _ in pairs]) for name in pairs[0][0]}
    separated = {name: numpy.searchsorted(numpy.sort(column[~right]), column[right]).sum()
                 for name, column in columns.items()}  # pairs in which the right one is surer
    measure = max(separated, key=separated.get)
    values, rows = columns[measure], []
    order = numpy.argsort(-values, kind="stable")
    for part in numpy.array_split(order, min(_ROWS, len(order) // _ANSWERS)):
        least, hits, count = values[part[-1]], right[part].sum(), len(part)
        while rows and any((hits + more) / (count + 2 * more)
                           >= (rows[-1][1] + more) / (rows[-1][2] + 2 * more) for more in (0, 1)):
            _, surer_hits, surer = rows.pop()
            hits, count = hits + surer_hits, count + surer
        rows.append((least, hits, count))
    return {"measure": measure, "right_from_f1": RIGHT, "rows": [
        {"from": float(least), "answers": int(count), "right": float((hits + 1) / (count + 2))}
        for least, hits, count in rows]}


def confidence(table: Optional[Dict[str, Any]], answer: Dict[str, Any]) -> Optional[float]:
    """Return the share of right answers among those as sure as this one; None if not known.

    Of no answers, one right and one wrong added are a half: for what is less sure than all were.
    """
    if not table or not answer["text"]:
        return None
    value = measures(answer)[table["measure"]]
    return next((row["right"] for row in table["rows"] if value >= row["from"]),
                min(0.5, table["rows"][-1]["right"]))


def write_table(folder: Path, answers: Sequence[dict], references: Sequence[List[str]]) -> None:
    """Write the table of `answers` to `folder`, if there are enough. Raises OSError."""
    table = calibrate(answers, references)
    if table:
        write_json(folder / CONFIDENCE, table)


def read_table(folder: Path) -> Optional[Dict[str, Any]]:
    """Return the table in a model's folder, if it has one. Raises UsageError for another file."""
    path = folder / CONFIDENCE
    if not path.is_file():
        return None
    table = read_json_object(path, str(path))
    if set(table) != {"measure", "right_from_f1", "rows"}:
        raise UsageError(f"{path}: not as train.py writes it; evaluate again, or delete it")
    return table


def judgement(answer: Dict[str, Any]) -> str:
    """Return an answer's confidence in words; empty if it is not known."""
    if answer["confidence"] is None:
        return ""
    doubt = ": doubtful, perhaps not in the text" if answer["confidence"] <= 0.5 else ""
    return f"confidence {answer['confidence']:.3f}{doubt}"
