"""Answers equal run_qa's, bit for bit.

The reference is a plain implementation that goes through windows and pairs of tokens one by one.
"""
import json

import numpy
import pytest
import torch
from datasets import Dataset

from qa.answers.evaluation import write_answers
from qa.answers.spans import AnswerFinder
from tests.reference.answers import plain_answers
from tests.reference.synthetic_windows import SyntheticWindows


def rows_of(windows, logits, seed, batch):
    """Yield batches of (slices, start logits, end logits).

    The windows come in a slightly shuffled order, two to a row, with noise around them.
    """
    random = numpy.random.default_rng(seed)
    order = numpy.argsort(numpy.arange(len(windows)) + random.uniform(0, 60, len(windows))).tolist()
    longest = int(windows.lengths.max())
    for first in range(0, len(order), 2 * batch):
        values = random.normal(50, 1, (2, batch, 2 * longest + 3)).astype(numpy.float32)
        slices = [[] for _ in range(batch)]
        for place, window in enumerate(order[first:first + 2 * batch]):
            row, start, length = (
                place // 2, (place % 2) * (longest + 3), int(windows.lengths[window]))
            slices[row].append((window, start, length))
            values[:, row, start:start + length] = logits[window]
        yield slices, torch.from_numpy(values[0]), torch.from_numpy(values[1])


def problem(lengths, seed=0, coarse=False):
    """Windows (several for each question), questions and logits.

    Coarse logits contain many equal values, and both 0.0 and -0.0.
    """
    windows = SyntheticWindows(lengths, seed, windows_per_example=3)
    count = int(windows.example[-1]) + 1
    examples = Dataset.from_dict({
        "id": [f"q{i}" for i in range(count)], "context": ["0123456789" * 40] * count})
    random = numpy.random.default_rng(seed)
    logits = [random.normal(0, 3, (2, length)).astype(numpy.float32) for length in windows.lengths]
    if coarse:
        logits = [numpy.trunc(values / 2) for values in logits]
    return windows, examples, logits


@pytest.mark.parametrize("version_2", [False, True])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("n_best_size, max_answer_length", [(20, 30), (1, 1), (3, 100), (200, 5)])
def test_answers_are_those_of_the_plain_definition(version_2, coarse, n_best_size,
                                                   max_answer_length):
    windows, examples, logits = problem(
        numpy.random.default_rng(5).integers(3, 100, 300), coarse=coarse)
    finder = AnswerFinder(windows, examples, n_best_size=n_best_size,
                          max_answer_length=max_answer_length, version_2_with_negative=version_2,
                          null_score_diff_threshold=-1.0)
    answers = [
        answer for batch in rows_of(windows, logits, 1, batch=8) for answer in finder.add(*batch)]
    assert len(answers) > len(examples) / 2  # most come before the last window is known
    answers += finder.finish()
    assert answers == list(
        plain_answers(windows, examples, logits, n_best_size, max_answer_length, version_2,
                      threshold=-1.0))


def test_a_missing_window_is_an_error_and_not_a_missing_answer():
    windows, examples, logits = problem([20] * 30)
    finder = AnswerFinder(windows, examples)
    for batch in list(rows_of(windows, logits, 1, batch=8))[1:]:
        list(finder.add(*batch))
    with pytest.raises(ValueError, match="question 0 of"):
        list(finder.finish())


@pytest.mark.parametrize("version_2", [False, True])
def test_files_have_the_layouts_of_run_qa(tmp_path, version_2):
    windows, examples, logits = problem([30] * 40)
    finder = AnswerFinder(windows, examples, version_2_with_negative=version_2)
    batches = list(rows_of(windows, logits, 1, batch=20))
    answers = [answer for batch in batches for answer in finder.add(*batch)] + list(finder.finish())
    kept = write_answers(answers, tmp_path, version_2)
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(files) == {"predictions.json", "nbest_predictions.json"
                          } | ({"null_odds.json"} if version_2 else set())
    assert files["predictions.json"] == {answer["id"]: answer["text"] for answer in answers}
    assert list(files["predictions.json"]) == examples["id"][:]
    assert all(set(entry) == {"text", "probability", "start_logit", "end_logit"}
               for nbest in files["nbest_predictions.json"].values() for entry in nbest)
    assert [answer["text"] for answer in kept] == list(files["predictions.json"].values())
    if version_2:
        assert [answer["null_odds"] for answer in kept] == list(files["null_odds.json"].values())


def test_a_run_that_breaks_off_leaves_the_files_as_they_were(tmp_path):
    (tmp_path / "predictions.json").write_text("{}")

    def breaking():
        yield {"id": "a", "text": "", "nbest": []}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_answers(breaking(), tmp_path, False)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]
    assert (tmp_path / "predictions.json").read_text() == "{}"
