"""Find the answers from the logits: the best spans over all windows of a question.

The answers are found while the logits arrive. They are those of run_qa's postprocess_qa_predictions
(transformers, examples/pytorch/question-answering/utils_qa.py), with its ambiguities resolved:

- In each window, the `n_best_size` tokens with the highest start logits are paired with the
  `n_best_size` tokens with the highest end logits, over the window's own tokens. Of tokens with
  equal logits the earlier one comes first.
- A pair is a candidate if both tokens are in the context, the end is not before the start, and the
  span has at most `max_answer_length` tokens. Its score is the sum of the two logits in float32.
- A question's n-best list consists of the `n_best_size` candidates with the highest scores in all
  its windows. Of candidates with equal scores, the one from the earlier window comes first, then
  the one with the better start, then the one with the better end.
- For version 2 data "no answer" is an additional candidate, ranked after all others with an equal
  score. Its logits are those of the CLS token in the window where their sum, the null score, is
  smallest (the first such window). It is in the list even if it is not among the best.
- The probability of an entry is the softmax, in float32, over the scores of the list.
- The answer is the first entry. For version 2 data it is the first entry with a text, unless the
  null score exceeds the sum of that entry's logits by more than `null_score_diff_threshold`; then
  the answer is the empty text.
- If there is no candidate at all, the answer is the empty text with logits 0, as in Hugging Face's
  question-answering notebook (run_qa writes the word "empty").

All work except for the final Python objects is done in numpy, for hundreds of windows at once.
"""
from __future__ import annotations

from typing import Iterator, List, Optional, Tuple

import numpy
import torch

# This many windows are searched at once: enough to make numpy's overhead per call negligible, few
# enough for the arrays to fit into the processor's cache.
_CHUNK = 256

# A span from `start` to `end`, end not included, in tokens of a window or in characters of the
# context. A score of -inf marks an unused entry.
_SPAN = numpy.dtype([("score", "f4"), ("start_logit", "f4"), ("end_logit", "f4"), ("start", "i4"),
                     ("end", "i4")])


def _rank_keys(values: numpy.ndarray) -> numpy.ndarray:
    """Return int64 keys [R, C] that rank the float32 values [R, C] of each row without ties.

    A greater value has the greater key; of equal values, the one in the earlier column.
    """
    # Read as integers, the bits of positive floats sort like the floats, and those of negative
    # floats do so once all bits but the sign are inverted. Adding 0.0 turns -0.0 into 0.0. The low
    # half of a key is the column, counted from the last one.
    bits = (values + numpy.float32(0.0)).view(numpy.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits.astype(numpy.int64) << 32) + numpy.arange(values.shape[1] - 1, -1, -1)


def _best_columns(keys: numpy.ndarray, count: int) -> numpy.ndarray:
    """Return the columns of the `count` greatest keys of each row, greatest first.

    keys: int64 [R, C] of `_rank_keys`. The result is int [R, min(count, C)].
    """
    columns = keys.shape[1]
    if count < columns:
        keys = numpy.partition(keys, columns - count, axis=1)[:, columns - count:]
    return columns - 1 - (numpy.sort(keys, axis=1)[:, ::-1] & 0xFFFFFFFF)


def best_spans(start_logits: numpy.ndarray, end_logits: numpy.ndarray, context_start: numpy.ndarray,
               context_end: numpy.ndarray, n_best_size: int,
               max_answer_length: int) -> numpy.ndarray:
    """Return the best spans of each window, best first, as defined at the top of this file.

    start_logits, end_logits: float32 [W, S], -inf after the end of a window. context_start,
    context_end: int [W], the first token of the context and the one after its last.

    Returns _SPAN [W, n_best_size], in tokens of the window.
    """
    starts = _best_columns(_rank_keys(start_logits), n_best_size)
    ends = _best_columns(_rank_keys(end_logits), n_best_size)
    windows = numpy.arange(len(starts))[:, None]
    best_starts, best_ends = start_logits[windows, starts], end_logits[windows, ends]

    # Starts and ends outside the context are moved far apart. A single unsigned comparison of
    # end - start then checks that both are in the context, that they are in order and that the
    # span is not too long.
    far = 1 << 30
    inner_starts = numpy.where((starts >= context_start[:, None]) & (starts < context_end[:, None]),
                               starts, far).astype(numpy.int32)
    inner_ends = numpy.where((ends >= context_start[:, None]) & (ends < context_end[:, None]), ends,
                             -far).astype(numpy.int32)
    valid = (inner_ends[:, None, :]
             - inner_starts[:, :, None]).view(numpy.uint32) < max_answer_length
    scores = numpy.where(valid, best_starts[:, :, None] + best_ends[:, None, :],
                         -numpy.inf).reshape(len(starts), -1)
    pairs = _best_columns(_rank_keys(scores), n_best_size)

    spans = numpy.zeros((len(starts), n_best_size), _SPAN)
    spans["score"] = -numpy.inf
    found, start_rank, end_rank = spans[:, :pairs.shape[1]], *numpy.divmod(pairs, ends.shape[1])
    found["score"] = scores[windows, pairs]
    found["start_logit"], found["end_logit"] = (
        best_starts[windows, start_rank], best_ends[windows, end_rank])
    found["start"], found["end"] = starts[windows, start_rank], ends[windows, end_rank] + 1
    return spans


class AnswerFinder:
    """Takes the logits of rows and gives the answers in the order of the examples.

    Windows may come in any order. A question is answered as soon as the logits of all windows up to
    and including its own have arrived. Until then the best spans of its windows are kept in memory,
    but logits only of the last few hundred windows.

    windows: qa.data.windows.Windows with offsets, made from `examples`. examples: a
    datasets.Dataset with the columns id and context, or an object with its len(), slices and
    select_columns(). For the other arguments see the top of this file.
    """

    def __init__(self, windows, examples, *, n_best_size: int = 20, max_answer_length: int = 30,
                 version_2_with_negative: bool = False, null_score_diff_threshold: float = 0.0):
        self._windows, self._examples = windows, examples.select_columns(["id", "context"])
        self._n_best_size, self._max_answer_length = n_best_size, max_answer_length
        self._threshold = null_score_diff_threshold if version_2_with_negative else None
        # The start and the end logits of the windows in _collected.
        self._logits = numpy.empty((2, _CHUNK, int(windows.lengths.max())), numpy.float32)
        self._collected: List[int] = []
        # Example e has the windows _first_window[e] to _first_window[e + 1] - 1.
        self._first_window = numpy.searchsorted(windows.example, numpy.arange(len(examples) + 1))
        self._next_example = 0
        # A ring buffer for the results of windows whose example is not complete: window w has the
        # index w modulo the buffer's size. An entry holds the best spans of the window, in
        # characters of the context, followed by its null span.
        self._spans = numpy.empty((4 * _CHUNK, n_best_size + 1), _SPAN)
        self._filled = numpy.zeros(4 * _CHUNK, bool)

    def add(self, row_slices: list, start_logits, end_logits) -> Iterator[dict]:
        """Take the logits of a batch of rows, and yield the answers that they complete.

        row_slices: for each row the result of `InferenceRows.slices`, [(window, its first token in
        the row, number of tokens), ...]. start_logits, end_logits: tensors [rows, tokens] of any
        floating-point type; no reference to them is kept.

        An answer is a dictionary with the keys
            id           of the example
            text         the answer; empty if there is none
            score        its probability in the n-best list
            start, end   the characters of the context that it spans, end not included; both 0 if
                         there is no answer
            nbest        a list of {text, start_logit, end_logit, probability, start, end}, best
                         first
            null_odds    the null score minus the sum of the two logits of the best span with a
                         text, or the null score if there is no such span
        """
        logits = torch.stack((start_logits, end_logits)).float().numpy()
        for row, slices in enumerate(row_slices):
            for window, first, length in slices:
                place = len(self._collected)
                self._logits[:, place, :length] = logits[:, row, first:first + length]
                self._logits[:, place, length:] = -numpy.inf
                self._collected.append(window)
                if len(self._collected) == _CHUNK:
                    self._search()
                    yield from self._complete()

    def finish(self) -> Iterator[dict]:
        """Yield the answers that are left after the last `add`.

        Raises ValueError if the logits of a window are missing.
        """
        if self._collected:
            self._search()
        yield from self._complete()
        if self._next_example < len(self._examples):
            raise ValueError(
                f"question {self._next_example} of {len(self._examples)} still lacks the logits "
                "of a window")

    def _search(self) -> None:
        """Find the spans of the collected windows and store them in the ring buffer."""
        chosen = numpy.array(self._collected)
        offsets = [self._windows.offsets(window) for window in self._collected]
        sizes = numpy.array([len(characters) for characters in offsets])
        context_start = self._windows.context_start[chosen]
        start_logits, end_logits = self._logits[:, :len(chosen)]
        spans = best_spans(start_logits, end_logits, context_start, context_start + sizes,
                           self._n_best_size, self._max_answer_length)
        # The additional entry at the end is for unused spans, which get start 0 and end 0.
        characters = numpy.concatenate([*offsets, numpy.zeros((1, 2), numpy.int32)])
        first = (numpy.cumsum(sizes) - sizes - context_start)[:, None]
        exists = spans["score"] > -numpy.inf
        spans["start"] = characters[numpy.where(exists, first + spans["start"], -1), 0]
        spans["end"] = characters[numpy.where(exists, first + spans["end"] - 1, -1), 1]

        index, cls = numpy.arange(len(chosen)), self._windows.cls_position[chosen]
        null = numpy.zeros(len(chosen), _SPAN)
        null["start_logit"], null["end_logit"] = start_logits[index, cls], end_logits[index, cls]
        null["score"] = null["start_logit"] + null["end_logit"]
        self._make_room(int(chosen.max()))
        places = chosen % len(self._filled)
        self._spans[places, :-1], self._spans[places, -1], self._filled[places] = spans, null, True
        self._collected.clear()

    def _make_room(self, window: int) -> None:
        """Enlarge the ring buffer until it holds all windows from the first waiting to `window`."""
        first, old = self._first_window[self._next_example], len(self._filled)
        if window - first < old:
            return
        size = old
        while window - first >= size:
            size *= 2
        spans, filled = numpy.empty((size, self._spans.shape[1]), _SPAN), numpy.zeros(size, bool)
        waiting = numpy.arange(first, first + old)
        spans[waiting % size], filled[waiting % size] = (
            self._spans[waiting % old], self._filled[waiting % old])
        self._spans, self._filled = spans, filled

    def _complete(self) -> Iterator[dict]:
        """Yield the answers of the next examples that have all their windows in the ring buffer.

        The entries of these windows are freed.
        """
        begin = self._next_example
        first = self._first_window[begin]
        waiting = numpy.arange(first, first + len(self._filled)) % len(self._filled)
        filled = self._filled[waiting]
        together = len(filled) if filled.all() else int(filled.argmin())
        end = int(numpy.searchsorted(self._first_window, first + together, side="right")) - 1
        if end == begin:
            return
        bounds = self._first_window[begin:end + 1] - first
        spans = self._spans[waiting[:bounds[-1]]]
        self._filled[waiting[:bounds[-1]]] = False
        self._next_example = end
        examples = self._examples[begin:end]
        yield from question_answers(examples["id"], examples["context"], spans, bounds,
                                    self._threshold)


def question_answers(names: List[str], contexts: List[str], spans: numpy.ndarray,
                     bounds: numpy.ndarray, threshold: Optional[float]) -> Iterator[dict]:
    """Yield the answers to Q questions, with the keys that `AnswerFinder.add` lists.

    names, contexts: ids and contexts of the Q examples. spans: _SPAN [windows, n_best_size + 1] in
    characters of the context, the null span last. bounds: int [Q + 1]; question q has the windows
    bounds[q] to bounds[q + 1] - 1. threshold: null_score_diff_threshold for version 2 data, else
    None.
    """
    spans = _merge_windows(spans, bounds)
    null_scores = spans["score"][:, -1]
    if threshold is None:
        spans = spans[:, :-1]
        counts = (spans["score"] > -numpy.inf).sum(axis=1)
        spans[counts == 0, 0] = numpy.zeros((), _SPAN)
        counts, null_places = numpy.maximum(counts, 1), counts
    else:
        spans, counts, null_places = _rank_null(spans)
    columns = (spans["start"], spans["end"], spans["start_logit"], spans["end_logit"],
               _probabilities(spans["score"], counts))
    for name, context, count, null_place, null_score, *lists in zip(
            names, contexts, counts.tolist(), null_places.tolist(), null_scores,
            *(column.tolist() for column in columns)):
        nbest = [
            {
                "text": context[start:end], "start_logit": start_logit, "end_logit": end_logit,
                "probability": probability, "start": start, "end": end}
            for _, start, end, start_logit, end_logit, probability in zip(range(count), *lists)]
        chosen, null_odds = nbest[0], null_score
        best = next((entry for entry in nbest if entry["text"]), None)
        if best:
            null_odds = null_score - numpy.float32(best["start_logit"]) - numpy.float32(
                best["end_logit"])
        if threshold is not None:
            chosen = best if best and null_odds <= threshold else nbest[null_place]
        yield {
            "id": name, "text": chosen["text"], "score": chosen["probability"],
            "start": chosen["start"], "end": chosen["end"], "nbest": nbest,
            "null_odds": float(null_odds)}


def _merge_windows(spans: numpy.ndarray, bounds: numpy.ndarray) -> numpy.ndarray:
    """Return the best spans of each question, and its null span with the smallest score.

    spans, bounds: as in `question_answers`. The result is _SPAN [Q, n_best_size + 1].
    """
    merged = spans[bounds[:-1]]
    for question in numpy.flatnonzero(numpy.diff(bounds) > 1):
        windows = spans[bounds[question]:bounds[question + 1]]
        found, nulls = windows[:, :-1].reshape(-1), windows[:, -1]
        merged[question, :-1] = found[numpy.argsort(-found["score"],
                                                    kind="stable")[:spans.shape[1] - 1]]
        merged[question, -1] = nulls[nulls["score"].argmin()]
    return merged


def _rank_null(spans: numpy.ndarray) -> Tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Move the null span of each question from the last column to its rank among the spans.

    spans: _SPAN [Q, n_best_size + 1]. Returns the spans in their new order, and two int [Q]: how
    many spans each question has, and the column of its null span.
    """
    n_best_size = spans.shape[1] - 1
    found, null = spans[:, :-1], spans[:, -1]
    exists = found["score"] > -numpy.inf
    places = (exists & (found["score"] >= null["score"][:, None])).sum(axis=1)
    columns = numpy.arange(n_best_size + 1)
    source = numpy.where(columns < places[:, None], columns, columns - 1)
    source[numpy.arange(len(spans)), places] = n_best_size
    counts = numpy.where(places < n_best_size, numpy.minimum(exists.sum(axis=1) + 1, n_best_size),
                         n_best_size + 1)
    return numpy.take_along_axis(spans, source, axis=1), counts, places


def _probabilities(scores: numpy.ndarray, counts: numpy.ndarray) -> numpy.ndarray:
    """Return the softmax over the first `counts` scores of each question, float32 [Q, n].

    scores: float32 [Q, n]. counts: int [Q], at least 1.
    """
    # Questions with equal counts are handled together. If all were padded to a common width, numpy
    # would add the numbers in a different order, and the last bit of the sum could differ.
    probabilities = numpy.zeros(scores.shape, numpy.float32)
    for count in numpy.unique(counts):
        chosen = counts == count
        exponentials = numpy.ascontiguousarray(scores[chosen, :count])
        exponentials = numpy.exp(exponentials - exponentials.max(axis=1, keepdims=True))
        probabilities[chosen, :count] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities
