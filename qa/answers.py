"""From logits to answers: the best spans over all windows of a question, found while the logits stream in.

The definition is that of run_qa's postprocess_qa_predictions (transformers, examples/pytorch/question-answering/utils_qa.py), made
exact where it leaves something open:
- In each window the `n_best_size` tokens with the highest start logits are paired with the `n_best_size` tokens with the highest end
  logits, over the window's own tokens. Of equal logits the earlier token comes first.
- A pair is a candidate if both tokens lie in the context, the end is not before the start, and the span has at most
  `max_answer_length` tokens. Its score is the sum of the two logits, in float32.
- A question's n-best list holds the `n_best_size` best-scored candidates of all its windows. Of equal scores the earlier window, then
  the better start, then the better end comes first.
- With version 2 data "no answer" is one more candidate, behind all of equal score: the CLS token's start and end logit in the window
  where their sum, the null score, is smallest (the first such window). It stays in the list even if it is not among the best.
- The probability of an entry is the softmax, in float32, over the scores of the list.
- The answer is the first entry; with version 2 the first entry with a text, unless the null score exceeds its two logits by more than
  `null_score_diff_threshold`: then there is no answer, the empty text.
- Where there is no candidate at all, the answer is the empty text with logits 0, as in Hugging Face's question-answering notebook
  (run_qa writes the word "empty").
"""
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import numpy

_CHUNK = 256  # windows searched at once: enough to make numpy's overhead small, few enough to stay in the processor's cache

# A span of tokens, later of characters, from `start` up to, not including, `end`.
_SPAN = numpy.dtype([("score", "f4"), ("start_logit", "f4"), ("end_logit", "f4"), ("start", "i4"), ("end", "i4")])
_NO_SPAN = numpy.zeros(1, _SPAN)


class _Found(NamedTuple):
    """What is kept of a window: its best spans in characters of the context and, with version 2, its null span [1]."""

    spans: numpy.ndarray
    null: Optional[numpy.ndarray]


def _rank_keys(values: numpy.ndarray) -> numpy.ndarray:
    """int64 keys of float32 values [R, C], all different in a row: a greater value, then an earlier column, has the greater key.

    The bits of a positive float32 sort as integers; those of a negative one do with all but the sign inverted. Adding 0.0
    makes -0.0 equal to 0.0. The low half holds the column, counted from the end.
    """
    bits = (values + numpy.float32(0.0)).view(numpy.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits.astype(numpy.int64) << 32) + numpy.arange(values.shape[1] - 1, -1, -1)


def _best_columns(keys: numpy.ndarray, count: int) -> numpy.ndarray:
    """The columns of the `count` greatest of `_rank_keys`' keys of each row, greatest first: int [R, min(count, C)]."""
    columns = keys.shape[1]
    if count < columns:
        keys = numpy.partition(keys, columns - count, axis=1)[:, columns - count:]
    return columns - 1 - (numpy.sort(keys, axis=1)[:, ::-1] & 0xFFFFFFFF)


def best_spans(start_logits: numpy.ndarray, end_logits: numpy.ndarray, context_start: numpy.ndarray, context_end: numpy.ndarray,
               n_best_size: int, max_answer_length: int) -> Tuple[numpy.ndarray, numpy.ndarray]:
    """The best spans of each window by the definition at the top of this file.

    start_logits, end_logits: float32 [W, S], -inf behind a window's end; the context is the tokens context_start up to, not
    including, context_end (int [W]). Returns the spans in tokens ([W, up to n_best_size], best first) and how many there are
    of each window (int [W]; what follows them in a row is meaningless).
    """
    starts = _best_columns(_rank_keys(start_logits), n_best_size)
    ends = _best_columns(_rank_keys(end_logits), n_best_size)
    rows = numpy.arange(len(starts))[:, None]
    best_starts, best_ends = start_logits[rows, starts], end_logits[rows, ends]
    scores = (best_starts[:, :, None] + best_ends[:, None, :]).reshape(len(starts), -1)

    # Tokens outside the context are moved far apart, so that one unsigned comparison checks the context, the order and the length.
    far = numpy.int32(1 << 30)
    inner_starts = numpy.where((starts >= context_start[:, None]) & (starts < context_end[:, None]), starts, far)
    inner_ends = numpy.where((ends >= context_start[:, None]) & (ends < context_end[:, None]), ends, -far)
    lengths = inner_ends.astype(numpy.int32)[:, None, :] - inner_starts.astype(numpy.int32)[:, :, None]
    valid = (lengths.view(numpy.uint32) < max_answer_length).reshape(scores.shape)
    # What is not valid ranks behind all that is. Its keys differ too: numpy partitions equal numbers ten times slower.
    last = numpy.iinfo(numpy.int64).min + numpy.arange(scores.shape[1])
    pairs = _best_columns(numpy.where(valid, _rank_keys(scores), last), n_best_size)

    spans = numpy.empty(pairs.shape, _SPAN)
    start_rank, end_rank = numpy.divmod(pairs, ends.shape[1])
    spans["score"] = scores[rows, pairs]
    spans["start_logit"], spans["end_logit"] = best_starts[rows, start_rank], best_ends[rows, end_rank]
    spans["start"], spans["end"] = starts[rows, start_rank], ends[rows, end_rank] + 1
    return spans, numpy.minimum(valid.sum(axis=1), pairs.shape[1])


class AnswerFinder:
    """Takes the logits of rows in any order, and gives each question's answer as soon as all windows up to and of it are in.

    Holds the spans of the windows that wait for that, and no logits but those of the last few hundred windows.

    windows: qa.windows.Windows with offsets, made from `examples`, a data set with the columns id and context.
    """

    def __init__(self, windows, examples, *, n_best_size: int = 20, max_answer_length: int = 30,
                 version_2_with_negative: bool = False, null_score_diff_threshold: float = 0.0):
        self._windows, self._examples = windows, examples
        self._n_best_size, self._max_answer_length = n_best_size, max_answer_length
        self._threshold = null_score_diff_threshold if version_2_with_negative else None
        shape = (_CHUNK, int(windows.lengths.max()))
        self._start_logits, self._end_logits = numpy.empty(shape, numpy.float32), numpy.empty(shape, numpy.float32)
        self._collected: List[int] = []  # the windows in the two arrays above
        self._found: Dict[int, _Found] = {}
        # Example e has the windows first_window[e] up to, not including, first_window[e + 1].
        self._first_window = numpy.searchsorted(windows.example, numpy.arange(len(examples) + 1)).tolist()
        self._next_example = 0

    def add(self, row_slices: list, start_logits, end_logits) -> Iterator[dict]:
        """Take the logits of a batch of rows; give the answers which that completes, in example order (`answer` has their keys).

        row_slices: for each row [(window, its first token in the row, number of tokens), ...] (InferenceRows.slices).
        start_logits, end_logits: tensors [rows, tokens], of any floating type; not kept.
        """
        start_logits, end_logits = start_logits.float().numpy(), end_logits.float().numpy()
        for slices, starts, ends in zip(row_slices, start_logits, end_logits):
            for window, first, length in slices:
                place = len(self._collected)
                for kept, logits in ((self._start_logits[place], starts), (self._end_logits[place], ends)):
                    kept[:length] = logits[first:first + length]
                    kept[length:] = -numpy.inf
                self._collected.append(window)
                if len(self._collected) == _CHUNK:
                    self._search()
                    yield from self._complete()

    def finish(self) -> Iterator[dict]:
        """Give the answers still open after the last `add`. Raises ValueError if the logits of a window never came."""
        if self._collected:
            self._search()
        yield from self._complete()
        if self._next_example < len(self._examples):
            raise ValueError(f"question {self._next_example} of {len(self._examples)} still lacks the logits of a window")

    def _search(self) -> None:
        """Turn the collected logits into spans of characters."""
        chosen = numpy.array(self._collected)
        offsets = [self._windows.offsets(window) for window in self._collected]
        first = self._windows.context_start[chosen]
        after = first + numpy.array([len(characters) for characters in offsets])
        start_logits, end_logits = self._start_logits[:len(chosen)], self._end_logits[:len(chosen)]
        spans, counts = best_spans(start_logits, end_logits, first, after, self._n_best_size, self._max_answer_length)
        spans["start"] -= first[:, None]
        spans["end"] -= first[:, None] + 1
        nulls = None
        if self._threshold is not None:
            rows, cls = numpy.arange(len(chosen)), self._windows.cls_position[chosen]
            nulls = _null_spans(start_logits[rows, cls], end_logits[rows, cls])
        for place, (window, count, characters) in enumerate(zip(self._collected, counts.tolist(), offsets)):
            found = spans[place, :count]
            found["start"], found["end"] = characters[found["start"], 0], characters[found["end"], 1]
            self._found[window] = _Found(found, None if nulls is None else nulls[place:place + 1])
        self._collected.clear()

    def _complete(self) -> Iterator[dict]:
        """Give the answers of the examples in turn whose windows are all in, and forget their spans."""
        first, begin = self._first_window, self._next_example
        while (self._next_example < len(self._examples)
               and all(window in self._found for window in range(*first[self._next_example:self._next_example + 2]))):
            self._next_example += 1
        if begin == self._next_example:
            return
        examples = self._examples[begin:self._next_example]
        for example, (name, context) in enumerate(zip(examples["id"], examples["context"]), begin):
            found = [self._found.pop(window) for window in range(first[example], first[example + 1])]
            yield answer(name, context, found, self._n_best_size, self._threshold)


def _null_spans(start_logits: numpy.ndarray, end_logits: numpy.ndarray) -> numpy.ndarray:
    spans = numpy.zeros(len(start_logits), _SPAN)
    spans["score"], spans["start_logit"], spans["end_logit"] = start_logits + end_logits, start_logits, end_logits
    return spans


def answer(name: str, context: str, found: List[_Found], n_best_size: int, threshold: Optional[float]) -> dict:
    """The answer to question `name` from the spans of all its windows; threshold is None unless the data are version 2.

    Returns id; text; score, the probability of the answer among the n-best; start and end, the characters of the context that it
    spans (end not included; both 0 where there is no answer); nbest, a list of {text, start_logit, end_logit, probability,
    start, end}, best first; and with version 2 null_odds, the null score minus the two logits of the best span.
    """
    spans = found[0].spans
    if len(found) > 1:
        spans = numpy.concatenate([window.spans for window in found])
        spans = spans[numpy.argsort(-spans["score"], kind="stable")[:n_best_size]]
    if threshold is not None:
        null = min((window.null for window in found), key=lambda span: span["score"][0])
        place = int((spans["score"] >= null["score"]).sum())
        spans = numpy.concatenate([spans[:place], null, spans[place:n_best_size - 1]])
    elif not len(spans):
        spans = _NO_SPAN
    probabilities = numpy.exp(spans["score"] - spans["score"].max())
    probabilities /= probabilities.sum()
    nbest = [{"text": context[start:end], "start_logit": start_logit, "end_logit": end_logit, "probability": probability,
              "start": start, "end": end}
             for (_, start_logit, end_logit, start, end), probability in zip(spans.tolist(), probabilities.tolist())]
    chosen, odds = nbest[0], {}
    if threshold is not None:
        best = next((entry for entry in nbest if entry["text"]), None)
        logits = (best["start_logit"], best["end_logit"]) if best else (0.0, 0.0)
        null_odds = float(null["score"][0] - numpy.float32(logits[0]) - numpy.float32(logits[1]))
        chosen, odds = (best if best and null_odds <= threshold else nbest[place]), {"null_odds": null_odds}
    return {"id": name, "text": chosen["text"], "score": chosen["probability"], "start": chosen["start"], "end": chosen["end"],
            "nbest": nbest, **odds}


def write_answers(answers: Iterable[dict], folder, version_2_with_negative: bool) -> List[dict]:
    """Write predictions.json, nbest_predictions.json and, with version 2, null_odds.json in run_qa's layouts, as the answers come.

    Each file maps a question's id to its text, its n-best list or its null odds, and appears whole or not at all. Returns what
    `qa.metrics.squad_metrics` takes: [{id, prediction_text, no_answer_probability (with version 2: the null odds)}, ...].
    """
    folder = Path(folder)
    predictions = []
    with contextlib.ExitStack() as files:
        put_text = files.enter_context(_json_object(folder / "predictions.json"))
        put_nbest = files.enter_context(_json_object(folder / "nbest_predictions.json"))
        put_odds = files.enter_context(_json_object(folder / "null_odds.json")) if version_2_with_negative else None
        for found in answers:
            prediction = {"id": found["id"], "prediction_text": found["text"]}
            put_text(found["id"], found["text"])
            put_nbest(found["id"], [{key: entry[key] for key in ("start_logit", "end_logit", "text", "probability")}
                                    for entry in found["nbest"]])
            if put_odds:
                put_odds(found["id"], found["null_odds"])
                prediction["no_answer_probability"] = found["null_odds"]
            predictions.append(prediction)
    return predictions


@contextlib.contextmanager
def _json_object(path: Path) -> Iterator[Callable]:
    """Write a JSON object entry by entry with the function given, a line each; the file takes its place when it is complete."""
    partial = path.with_name(path.name + ".partial")
    separator = ""
    try:
        with open(partial, "w", encoding="utf-8") as file:
            def put(key: str, value) -> None:
                nonlocal separator
                file.write(f"{separator}\n    {json.dumps(key)}: {json.dumps(value)}")
                separator = ","

            file.write("{")
            yield put
            file.write("\n}\n")
        os.replace(partial, path)
    except BaseException:
        partial.unlink()
        raise
