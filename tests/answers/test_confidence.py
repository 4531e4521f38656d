"""Confidence is the share of right answers, counted again for each answer of a random set."""
import numpy
import pytest

from qa.answers.confidence import calibrate, confidence, judgement, read_table, write_table
from runtime.errors import UsageError


def answers_with(informative, count=2000):
    """Return answers that are right the more often, the surer `informative` is, and the truth."""
    random = numpy.random.default_rng(0)
    sure, noise = random.normal(size=(2, count))
    right = random.random(count) < 1 / (1 + numpy.exp(-2 * sure))
    names = ("score", "null_odds") if informative == "score" else ("null_odds", "score")
    sign = {"score": 1, "null_odds": -1}
    answers = [{"text": "geese", **{name: sign[name] * value for name, value in zip(names, pair)}}
               for pair in zip(sure.tolist(), noise.tolist())]
    return answers, [["the geese"] if is_right else ["eels"] for is_right in right], right


@pytest.mark.parametrize("informative", ["score", "null_odds"])
def test_of_the_answers_that_are_as_sure_as_many_are_right(informative):
    answers, references, right = answers_with(informative)
    table = calibrate(answers, references)
    assert table["measure"] == informative
    values = numpy.array([confidence(table, answer) for answer in answers])
    shares = sorted(set(values.tolist()))
    assert len(shares) > 5 and shares[0] < 0.2 and shares[-1] > 0.9
    for share in shares:
        assert right[values == share].mean() == pytest.approx(share, abs=0.02)
        assert right[values >= share].mean() > share - 0.01


def test_little_is_known_from_few_answers_and_nothing_of_no_answer(tmp_path):
    answers, references, _ = answers_with("score", 30)
    table = calibrate(answers, [["geese"]] * 30)
    assert [row["answers"] for row in table["rows"]] == [30]  # all are right
    assert table["measure"] == "null_odds"
    assert confidence(table, answers[0]) == pytest.approx(31 / 32)
    assert confidence(table, {**answers[0], "text": ""}) is None
    assert confidence(table, {"text": "eels", "score": -9, "null_odds": 9}) == 0.5
    assert calibrate(answers[:19], references) is None
    write_table(tmp_path, answers, references)
    assert read_table(tmp_path) == calibrate(answers, references)
    (tmp_path / "confidence.json").write_text('{"temperature": 1.5}')  # another program's
    with pytest.raises(UsageError, match="confidence.json: not as train.py writes it"):
        read_table(tmp_path)
    assert judgement({"confidence": 0.25}) == "confidence 0.250: doubtful, perhaps not in the text"
    assert judgement({"confidence": None}) == ""
