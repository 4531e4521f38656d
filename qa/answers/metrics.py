"""Exact match and F1 of SQuAD v1.1 and v2.0, as metrics of the `evaluate` library.

The definitions are those of the official scripts, evaluate-v1.1.py (Rajpurkar et al. 2016) and
evaluate-v2.0.py (Rajpurkar et al. 2018). Texts are compared in lower case and without punctuation,
articles and superfluous white space; F1 counts common tokens; the score of a question is the best
over its reference answers. `evaluate.load` would need the network.
"""
from __future__ import annotations

import collections
import re
import string
from typing import Dict, List, Tuple

import datasets
import evaluate

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_metrics(references: List[dict], predictions: List[dict],
                  version_2_with_negative: bool) -> Dict[str, float]:
    """Return the metrics of SQuAD v1.1 or v2.0 by name, scores in percent.

    references: [{id, answers: {text: [...], answer_start: [...]}}, ...]. predictions: [{id,
    prediction_text}, ...] in the same order. For version 2 data each prediction also has
    no_answer_probability: any number that grows with the confidence that there is no answer, such
    as the null odds. Only the best_* depend on it, as with `evaluate-v2.0.py --na-prob-file`.
    """
    metric = Squad(config_name="v2" if version_2_with_negative else "v1", keep_in_memory=True)
    return metric.compute(references=references, predictions=predictions)


class Squad(evaluate.Metric):
    """The metric of SQuAD v1.1 ("v1") or v2.0 ("v2").

    Both have exact_match and f1. v2.0 also has total, the number of questions; HasAns_* and
    NoAns_*, the same for the questions with and without an answer; best_*, the scores with the best
    thresholds on no_answer_probability.
    """

    def _info(self):
        odds = {"no_answer_probability": datasets.Value("float32")}
        answers = {"text": datasets.Sequence(datasets.Value("string")),
                   "answer_start": datasets.Sequence(datasets.Value("int32"))}
        return evaluate.MetricInfo(
            description=__doc__, citation="",
            inputs_description="predictions and references in the same order",
            features=datasets.Features({
                "predictions": {
                    "id": datasets.Value("string"), "prediction_text": datasets.Value("string"),
                    **(odds if self.config_name == "v2" else {})},
                "references": {"id": datasets.Value("string"), "answers": answers}}))

    def _compute(self, predictions, references):
        version_2, exact, f1, has_answer = self.config_name == "v2", [], [], []
        for prediction, reference in zip(predictions, references):
            tokens = normalized(prediction["prediction_text"]).split()
            golds = [normalized(text).split() for text in reference["answers"]["text"]]
            has_answer.append(bool(golds))
            if version_2:  # the correct answer to an unanswerable question is the empty text
                golds = [gold for gold in golds if gold] or [[]]
            exact.append(max((float(tokens == gold) for gold in golds), default=0.0))
            f1.append(max((float(tokens == gold) if version_2 and not (tokens and gold)
                           else _f1(tokens, gold) for gold in golds), default=0.0))
        result = {"exact_match": _percent(exact), "f1": _percent(f1)}
        if not version_2:
            return result
        result["total"] = len(exact)
        for name, answerable in (("HasAns", True), ("NoAns", False)):
            chosen = [place for place, has in enumerate(has_answer) if has == answerable]
            if chosen:
                result[f"{name}_exact"] = _percent([exact[place] for place in chosen])
                result[f"{name}_f1"] = _percent([f1[place] for place in chosen])
                result[f"{name}_total"] = len(chosen)
        for name, scores in (("exact", exact), ("f1", f1)):
            result[f"best_{name}"], result[f"best_{name}_thresh"] = _best_threshold(
                predictions, scores, has_answer)
        return result


def normalized(text: str) -> str:
    """Return the text as SQuAD compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def best_f1(text: str, references: List[str]) -> float:
    """Return the F1 of a text, 0 to 1: the best over its reference answers, 0 without any."""
    tokens = normalized(text).split()
    return max((_f1(tokens, normalized(reference).split()) for reference in references),
               default=0.0)


def _f1(tokens: List[str], gold: List[str]) -> float:
    common = sum((collections.Counter(tokens) & collections.Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(tokens), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def _percent(scores: List[float]) -> float:
    return 100.0 * sum(scores) / len(scores)


def _best_threshold(predictions: List[dict], scores: List[float],
                    has_answer: List[bool]) -> Tuple[float, float]:
    """Return the best mean score in percent, and the threshold on no_answer_probability for it.

    A prediction above the threshold counts as "no answer". It is raised from a value below all
    predictions (no question is answered), by one question at a time.
    """
    total = best = sum(not has for has in has_answer)
    threshold = 0.0
    for place in sorted(range(len(scores)),
                        key=lambda place: predictions[place]["no_answer_probability"]):
        if has_answer[place]:
            total += scores[place]
        elif predictions[place]["prediction_text"]:
            total -= 1
        if total > best:
            best, threshold = total, predictions[place]["no_answer_probability"]
    return 100.0 * best / len(scores), threshold
