"""The metrics are compared with the official scoring scripts, which are transcribed here.

That of v2.0 is itself compared with transformers' squad_evaluate where there is one (4.x).
"""
import collections
import math
import random
import re
import string
from contextlib import suppress
from types import SimpleNamespace

import pytest

from qa.answers.metrics import squad_metrics

WORDS = [
    "a", "An", "the", "The", "cat", "Cat.", "cat's", "(dog)", "dog,", "42", "4-2", "é", "naïve",
    "theatre", "\u2014", "...", "\u00a0"]


def normalize(text):
    text = "".join(
        character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_of(gold, prediction):
    prediction_tokens, gold_tokens = normalize(prediction).split(), normalize(gold).split()
    same = sum((collections.Counter(prediction_tokens) & collections.Counter(gold_tokens)).values())
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(prediction_tokens), 1.0 * same / len(gold_tokens)
    return (2 * precision * recall) / (precision + recall)


def official_v1(golds, prediction):
    """(exact match, F1) of one question, as evaluate-v1.1.py computes them."""
    return max(normalize(prediction) == normalize(gold) for gold in golds), max(
        f1_of(gold, prediction) for gold in golds)


def official_v2(golds_of, texts, no_answer):
    """The result of evaluate-v2.0.py with an infinite threshold.

    golds_of: {id: true answers}. texts, no_answer: {id: predicted text, and its odds of no answer}.
    """
    exact, f1 = {}, {}
    for key, all_golds in golds_of.items():
        golds, text = [gold for gold in all_golds if normalize(gold)] or [""], texts[key]
        exact[key] = max(int(normalize(gold) == normalize(text)) for gold in golds)
        f1[key] = max(f1_of(gold, text) if normalize(gold) and normalize(text)
                      else int(normalize(gold) == normalize(text)) for gold in golds)
    result = {}
    for prefix, keys in (("", list(golds_of)), ("HasAns_", [k for k in golds_of if golds_of[k]]),
                         ("NoAns_", [k for k in golds_of if not golds_of[k]])):
        if keys:
            result[prefix + "exact"] = 100.0 * sum(exact[key] for key in keys) / len(keys)
            result[prefix + "f1"] = 100.0 * sum(f1[key] for key in keys) / len(keys)
            result[prefix + "total"] = len(keys)
    for name, scores in (("exact", exact), ("f1", f1)):
        current = best = sum(not golds for golds in golds_of.values())
        threshold = 0.0
        for key in sorted(no_answer, key=lambda key: no_answer[key]):
            current += scores[key] if golds_of[key] else -1 if texts[key] else 0
            if current > best:
                best, threshold = current, no_answer[key]
        result[f"best_{name}"] = 100.0 * best / len(scores)
        result[f"best_{name}_thresh"] = threshold
    return result


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
    golds_of = {reference["id"]: reference["answers"]["text"] for reference in references}
    texts, odds = ({prediction["id"]: prediction[key] for prediction in predictions}
                   for key in ("prediction_text", "no_answer_probability"))
    official = official_v2(golds_of, texts, odds)
    with suppress(ModuleNotFoundError):
        from transformers.data.metrics.squad_metrics import squad_evaluate
        examples = [SimpleNamespace(qas_id=key, answers=[{"text": text} for text in golds])
                    for key, golds in golds_of.items()]
        assert official == squad_evaluate(examples, texts, odds, math.inf)
    official["exact_match"] = official.pop("exact")
    assert squad_metrics(references, predictions, True) == pytest.approx(official, rel=1e-12)
