"""The metrics are compared with the official scoring scripts.

That of SQuAD v1.1 is transcribed here; that of v2.0 is transformers' squad_evaluate.
"""
import collections
import math
import random
import re
import string
from types import SimpleNamespace

import pytest
from transformers.data.metrics.squad_metrics import squad_evaluate

from qa.answers.metrics import squad_metrics

WORDS = [
    "a", "An", "the", "The", "cat", "Cat.", "cat's", "(dog)", "dog,", "42", "4-2", "é", "naïve",
    "theatre", "\u2014", "...", "\u00a0"]


def official_v1(golds, prediction):
    """(exact match, F1) of one question, as evaluate-v1.1.py computes them."""
    def normalize(text):
        text = "".join(
            character for character in text.lower() if character not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(gold):
        prediction_tokens, gold_tokens = normalize(prediction).split(), normalize(gold).split()
        same = sum(
            (collections.Counter(prediction_tokens) & collections.Counter(gold_tokens)).values())
        if same == 0:
            return 0
        precision, recall = 1.0 * same / len(prediction_tokens), 1.0 * same / len(gold_tokens)
        return (2 * precision * recall) / (precision + recall)

    return max(normalize(prediction) == normalize(gold) for gold in golds), max(
        f1(gold) for gold in golds)


def made_up(count, seed, unanswerable):
    """References and predictions of a few words, full of difficult cases.

    These are articles, punctuation, upper and lower case, Unicode and empty texts.
    """
    chance = random.Random(seed)

    def text(least):
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(least, 4)))

    references, predictions = [], []
    for number in range(count):
        golds = [] if unanswerable and chance.random() < 0.4 else [
            text(1) for _ in range(chance.randint(1, 3))]
        answer = chance.choice(golds) if golds and chance.random() < 0.5 else text(0)
        references.append({
            "id": str(number), "answers": {"text": golds, "answer_start": [0] * len(golds)}})
        predictions.append({"id": str(number), "prediction_text": answer})
    return references, predictions


def test_version_1_is_the_official_definition():
    references, predictions = made_up(500, 0, unanswerable=False)
    official = [official_v1(reference["answers"]["text"], prediction["prediction_text"])
                for reference, prediction in zip(references, predictions)]
    metrics = squad_metrics(references, predictions, False)
    assert metrics == pytest.approx({"exact_match": 100 * sum(exact for exact, _ in official) / 500,
                                     "f1": 100 * sum(f1 for _, f1 in official) / 500}, rel=1e-12)
    assert all(20 < value < 90 for value in metrics.values())


@pytest.mark.parametrize("unanswerable", [True, False])
def test_version_2_is_the_official_definition(unanswerable):
    references, predictions = made_up(500, 1, unanswerable)
    chance = random.Random(2)
    for prediction in predictions:
        # Some of these are equal, and all are exact in float32.
        prediction["no_answer_probability"] = float(chance.randint(-8, 8)) / 4
    examples = [
        SimpleNamespace(qas_id=reference["id"],
                        answers=[{"text": text} for text in reference["answers"]["text"]])
        for reference in references]
    official = squad_evaluate(
        examples, {prediction["id"]: prediction["prediction_text"] for prediction in predictions},
        {prediction["id"]: prediction["no_answer_probability"] for prediction in predictions},
        math.inf)
    official["exact_match"] = official.pop("exact")
    assert squad_metrics(references, predictions, True) == pytest.approx(official, rel=1e-12)
