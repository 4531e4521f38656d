"""Exact match and F1 as SQuAD v1.1 and v2.0 define them: metrics of the `evaluate` library that
need no network.

The definitions are those of the official scripts, evaluate-v1.1.py (Rajpurkar et al. 2016) and
evaluate-v2.0.py (Rajpurkar et al. 2018): texts are compared in lower case without punctuation,
articles and superfluous white space; F1 counts common tokens; each question takes its best
reference. (`evaluate.load` would fetch such metrics from the hub.)
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
    """The metrics of SQuAD v1.1 or v2.0, in percent: exact_match, f1 and, with version 2, the
    others of v2.0.

    references: [{id, answers: {text: [...], answer_start: [...]}}, ...]; predictions: [{id,
    prediction_text}, ...] in the same order, with version 2 also no_answer_probability: any number
    that grows with the belief that there is no answer, such as null_odds. The texts decide the
    figures; the numbers only serve to find best_exact and best_f1, what the best threshold on them
    (best_exact_thresh, best_f1_thresh) would have given, as `evaluate-v2.0.py --na-prob-file
    null_odds.json` does.
    """
    metric = (SquadV2 if version_2_with_negative else Squad)(keep_in_memory=True)
    return metric.compute(references=references, predictions=predictions)


class Squad(evaluate.Metric):
    """SQuAD v1.1: exact_match and f1. A question's score is the best over its references."""

    def _info(self):
        return _metric_info({
            "id": datasets.Value("string"), "prediction_text": datasets.Value("string")})

    def _compute(self, predictions, references):
        exact, f1 = [], []
        for prediction, reference in zip(predictions, references):
            tokens = normalized(prediction["prediction_text"]).split()
            golds = [normalized(text).split() for text in reference["answers"]["text"]]
            exact.append(max((float(tokens == gold) for gold in golds), default=0.0))
            f1.append(max((_f1(tokens, gold) for gold in golds), default=0.0))
        return {"exact_match": _percent(exact), "f1": _percent(f1)}


class SquadV2(evaluate.Metric):
    """SQuAD v2.0: as v1.1; HasAns_*, NoAns_* for questions with and without answer; best_* over
    thresholds.
    """

    def _info(self):
        return _metric_info({
            "id": datasets.Value("string"), "prediction_text": datasets.Value("string"),
            "no_answer_probability": datasets.Value("float32")})

    def _compute(self, predictions, references):
        exact, f1, has_answer = [], [], []
        for prediction, reference in zip(predictions, references):
            tokens = normalized(prediction["prediction_text"]).split()
            golds = [normalized(text).split() for text in reference["answers"]["text"]]
            has_answer.append(bool(golds))
            golds = [gold for gold in golds if gold
                     ] or [[]]  # the right answer to an unanswerable question is the empty text
            exact.append(max(float(tokens == gold) for gold in golds))
            f1.append(
                max(
                    _f1(tokens, gold) if tokens and gold else float(tokens == gold)
                    for gold in golds))
        result = {"exact_match": _percent(exact), "f1": _percent(f1), "total": len(exact)}
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
    """The text as SQuAD compares it: lower case, without punctuation, articles and superfluous
    white space.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def _f1(tokens: List[str], gold: List[str]) -> float:
    """Harmonic mean of the precision and the recall of the tokens, counted with multiplicity."""
    common = sum((collections.Counter(tokens) & collections.Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(tokens), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def _percent(scores: List[float]) -> float:
    return 100.0 * sum(scores) / len(scores)


def _best_threshold(predictions: List[dict], scores: List[float],
                    has_answer: List[bool]) -> Tuple[float, float]:
    """The best mean score (percent) over thresholds on no_answer_probability, and the first
    threshold that reaches it.

    Above the threshold a text counts as "no answer". It rises from one that answers nothing, a
    question at a time.
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


def _metric_info(prediction: dict) -> evaluate.MetricInfo:
    answers = {
        "text": datasets.Sequence(datasets.Value("string")), "answer_start": datasets.Sequence(
            datasets.Value("int32"))}
    return evaluate.MetricInfo(
        description=__doc__, citation="",
        inputs_description="predictions and references in the same order",
        features=datasets.Features({
            "predictions": prediction, "references": {
                "id": datasets.Value("string"), "answers": answers}}))
