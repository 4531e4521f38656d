"""From logits to answers: the best spans over all windows of a question, found while the logits
stream in.

The definition is that of run_qa's postprocess_qa_predictions (transformers,
examples/pytorch/question-answering/utils_qa.py), made exact where it leaves something open: - In
each window the `n_best_size` tokens with the highest start logits are paired with the `n_best_size`
tokens with
  the highest end logits, over the window's own tokens. Of equal logits the earlier token comes
  first.
- A pair is a candidate if both tokens lie in the context, the end is not before the start, and the
span has at most
  `max_answer_length` tokens. Its score is the sum of the two logits, in float32.
- A question's n-best list holds the `n_best_size` best-scored candidates of all its windows. Of
equal scores the
  earlier window, then the better start, then the better end comes first.
- With version 2 data "no answer" is one more candidate, behind all of equal score: the CLS token's
start and end logit
  in the window where their sum, the null score, is smallest (the first such window). It stays in
  the list even if not among the best.
- The probability of an entry is the softmax, in float32, over the scores of the list. - The answer
is the first entry; with version 2 the first entry with a text, unless the null score exceeds its
two
  logits by more than `null_score_diff_threshold`: then there is no answer, the empty text.
- Where there is no candidate at all, the answer is the empty text with logits 0, as in Hugging
Face's
  question-answering notebook (run_qa writes the word "empty").

Everything up to the lists of Python objects is done for hundreds of windows at once in numpy.
"""
from __future__ import annotations

from typing import Iterator, List, Optional, Tuple

import numpy
import torch

# windows searched at once: enough to make numpy's overhead small, few enough to stay in the
# processor's cache
_CHUNK = 256

# A span from `start` up to, not including, `end`: of tokens in a window, later of characters in the
# context. A score of -inf says that there is no span.
_SPAN = numpy.dtype([("score", "f4"), ("start_logit", "f4"), ("end_logit", "f4"), ("start", "i4"),
                     ("end", "i4")])


def _rank_keys(values: numpy.ndarray) -> numpy.ndarray:
    """int64 keys of float32 values [R, C]: the greater value, of equal values the earlier column
    has the greater key.

    The bits of a positive float32 sort as integers; those of a negative one do with all but the
    sign inverted. Adding 0.0 makes -0.0 equal to 0.0. The low half holds the column, counted from
    the end.
    """
    bits = (values + numpy.float32(0.0)).view(numpy.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits.astype(numpy.int64) << 32) + numpy.arange(values.shape[1] - 1, -1, -1)


def _best_columns(keys: numpy.ndarray, count: int) -> numpy.ndarray:
    """The columns of the `count` greatest of `_rank_keys`' keys of each row, greatest first: int
    [R, min(count, C)].
    """
    columns = keys.shape[1]
    if count < columns:
        keys = numpy.partition(keys, columns - count, axis=1)[:, columns - count:]
    return columns - 1 - (numpy.sort(keys, axis=1)[:, ::-1] & 0xFFFFFFFF)


def best_spans(start_logits: numpy.ndarray, end_logits: numpy.ndarray, context_start: numpy.ndarray,
               context_end: numpy.ndarray, n_best_size: int,
               max_answer_length: int) -> numpy.ndarray:
    """The best spans of each window by the definition at the top of this file, best first: _SPAN
    [W, n_best_size].

    start_logits, end_logits: float32 [W, S], -inf behind a window's end; the context is the tokens
    context_start up to, not including, context_end (int [W]).
    """
    starts = _best_columns(_rank_keys(start_logits), n_best_size)
    ends = _best_columns(_rank_keys(end_logits), n_best_size)
    rows = numpy.arange(len(starts))[:, None]
    best_starts, best_ends = start_logits[rows, starts], end_logits[rows, ends]

    # Tokens outside the context are moved far apart, so that one unsigned comparison checks the
    # context, the order and the length.
    far = 1 << 30
    inner_starts = numpy.where((starts >= context_start[:, None]) & (starts < context_end[:, None]),
                               starts, far).astype(numpy.int32)
    inner_ends = numpy.where((ends >= context_start[:, None]) & (ends < context_end[:, None]), ends,
                             -far).astype(numpy.int32)
    valid = (inner_ends[:, None, :] - inner_starts[:, :, None]).view(
        numpy.uint32) < max_answer_length
    scores = numpy.where(valid, best_starts[:, :, None] + best_ends[:, None, :],
                         -numpy.inf).reshape(len(starts), -1)
    pairs = _best_columns(_rank_keys(scores), n_best_size)

    spans = numpy.zeros((len(starts), n_best_size), _SPAN)
    spans["score"] = -numpy.inf
    found, start_rank, end_rank = spans[:, :pairs.shape[1]], *numpy.divmod(pairs, ends.shape[1])
    found["score"] = scores[rows, pairs]
    found["start_logit"], found["end_logit"] = best_starts[rows, start_rank], best_ends[rows,
                                                                                        end_rank]
    found["start"], found["end"] = starts[rows, start_rank], ends[rows, end_rank] + 1
    return spans


class AnswerFinder:
    """Takes the logits of rows in any order; gives a question's answer once all windows up to and
    of it are in.

    Holds the spans of the windows that wait for that, and no logits but those of the last few
    hundred windows.

    windows: qa.windows.Windows with offsets, made from `examples`: a datasets.Dataset with the
    columns id and context, or what has its len(), slices and select_columns().
    """

    def __init__(self, windows, examples, *, n_best_size: int = 20, max_answer_length: int = 30,
                 version_2_with_negative: bool = False, null_score_diff_threshold: float = 0.0):
        self._windows, self._examples = windows, examples.select_columns(["id", "context"])
        self._n_best_size, self._max_answer_length = n_best_size, max_answer_length
        self._threshold = null_score_diff_threshold if version_2_with_negative else None
        self._logits = numpy.empty((2, _CHUNK, int(windows.lengths.max())),
                                   numpy.float32)  # start, end
        self._collected: List[int] = []  # the windows they are of
        # Example e has the windows first_window[e] up to, not including, first_window[e + 1].
        self._first_window = numpy.searchsorted(windows.example, numpy.arange(len(examples) + 1))
        self._next_example = 0
        # A ring: window w is at w modulo its size. Its best spans in characters of the context, and
        # behind them its null span.
        self._spans = numpy.empty((4 * _CHUNK, n_best_size + 1), _SPAN)
        self._filled = numpy.zeros(4 * _CHUNK, bool)

    def add(self, row_slices: list, start_logits, end_logits) -> Iterator[dict]:
        """Take the logits of a batch of rows; give the answers which that completes, in example
        order.

        row_slices: for each row [(window, its first token in the row, number of tokens), ...]
        (InferenceRows.slices). start_logits, end_logits: tensors [rows, tokens], of any floating
        type; not kept.

        An answer is a dictionary: id; text; score, its probability among the n-best; start and end,
        the characters of the context that it spans (end not included; both 0 where there is no
        answer); nbest, a list of {text, start_logit, end_logit, probability, start, end}, best
        first; with version 2 null_odds, the null score minus the two logits of the best span.
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
        """Give the answers still open after the last `add`. Raises ValueError if the logits of a
        window never came.
        """
        if self._collected:
            self._search()
        yield from self._complete()
        if self._next_example < len(self._examples):
            raise ValueError(
                f"question {self._next_example} of {len(self._examples)} still lacks the logits of a window"
            )

    def _search(self) -> None:
        """Turn the collected logits into spans of characters, in the ring."""
        chosen = numpy.array(self._collected)
        offsets = [self._windows.offsets(window) for window in self._collected]
        sizes = numpy.array([len(characters) for characters in offsets])
        context_start = self._windows.context_start[chosen]
        start_logits, end_logits = self._logits[:, :len(chosen)]
        spans = best_spans(start_logits, end_logits, context_start, context_start + sizes,
                           self._n_best_size, self._max_answer_length)
        characters = numpy.concatenate([*offsets, numpy.zeros(
            (1, 2), numpy.int32)])  # the last entry is for "no span"
        first = (numpy.cumsum(sizes) - sizes - context_start)[:, None]
        exists = spans["score"] > -numpy.inf
        spans["start"] = characters[numpy.where(exists, first + spans["start"], -1), 0]
        spans["end"] = characters[numpy.where(exists, first + spans["end"] - 1, -1), 1]

        rows, cls = numpy.arange(len(chosen)), self._windows.cls_position[chosen]
        null = numpy.zeros(len(chosen), _SPAN)
        null["start_logit"], null["end_logit"] = start_logits[rows, cls], end_logits[rows, cls]
        null["score"] = null["start_logit"] + null["end_logit"]
        self._make_room(int(chosen.max()))
        places = chosen % len(self._filled)
        self._spans[places, :-1], self._spans[places, -1], self._filled[places] = spans, null, True
        self._collected.clear()

    def _make_room(self, window: int) -> None:
        """Enlarge the ring so that it reaches from the first window that still waits up to
        `window`.
        """
        first, old = self._first_window[self._next_example], len(self._filled)
        if window - first < old:
            return
        size = old
        while window - first >= size:
            size *= 2
        spans, filled = numpy.empty((size, self._spans.shape[1]), _SPAN), numpy.zeros(size, bool)
        waiting = numpy.arange(first, first + old)
        spans[waiting % size], filled[waiting % size] = self._spans[waiting %
                                                                    old], self._filled[waiting %
                                                                                       old]
        self._spans, self._filled = spans, filled

    def _complete(self) -> Iterator[dict]:
        """Give the answers of the examples in turn whose windows are all in, and free their places
        in the ring.
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
    """The answers (see AnswerFinder.add) to Q questions.

    spans: _SPAN [windows, n_best_size + 1] in characters, the null span last; question q has the
    windows bounds[q] up to, not including, bounds[q + 1] (int [Q + 1]). threshold: None unless the
    data are version 2.
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
        chosen, odds = nbest[0], {}
        if threshold is not None:
            best = next((entry for entry in nbest if entry["text"]), None)
            null_odds = null_score
            if best:
                null_odds = null_score - numpy.float32(best["start_logit"]) - numpy.float32(
                    best["end_logit"])
            chosen = best if best and null_odds <= threshold else nbest[null_place]
            odds = {"null_odds": float(null_odds)}
        yield {
            "id": name, "text": chosen["text"], "score": chosen["probability"],
            "start": chosen["start"], "end": chosen["end"], "nbest": nbest, **odds}


def _merge_windows(spans: numpy.ndarray, bounds: numpy.ndarray) -> numpy.ndarray:
    """The spans of questions from those of their windows: the best of all, and the null span of the
    smallest score.
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
    """Move the null span from the last column to its rank among the spans.

    Returns the spans, how many there are of each question, and the column of the null span (int [Q]
    both).
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
    """float32 [Q, n]: the softmax over each question's first `counts` scores.

    Questions of equal count are done together: padded to a common width, numpy would add the
    numbers up in another order, and the last bit could differ.
    """
    probabilities = numpy.zeros(scores.shape, numpy.float32)
    for count in numpy.unique(counts):
        rows = counts == count
        exponentials = numpy.ascontiguousarray(scores[rows, :count])
        exponentials = numpy.exp(exponentials - exponentials.max(axis=1, keepdims=True))
        probabilities[rows, :count] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities
