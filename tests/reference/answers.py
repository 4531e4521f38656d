"""A plain implementation of run_qa's answers.

qa.answers must equal it bit for bit, and the benchmarks compare their speed.
"""
import collections

import numpy


def plain_answers(windows, examples, logits, n_best_size, max_answer_length, version_2, threshold):
    """Yield the answers of all questions as run_qa's postprocess_qa_predictions finds them.

    `logits` has a (start logits, end logits) pair of float32 arrays for each window.
    """
    windows_of = collections.defaultdict(list)
    for window, number in enumerate(windows.example.tolist()):
        windows_of[number].append(window)
    for number, example in enumerate(examples):
        candidates, null = [], None
        for window in windows_of[number]:
            starts, ends = logits[window]
            cls, first, offsets = (windows.cls_position[window], int(windows.context_start[window]),
                                   windows.offsets(window).tolist())
            after = first + len(offsets)
            score = starts[cls] + ends[cls]
            if null is None or score < null["score"]:
                null = {
                    "score": score, "start_logit": starts[cls], "end_logit": ends[cls], "start": 0,
                    "end": 0}
            best_ends = numpy.argsort(-ends, kind="stable")[:n_best_size].tolist()
            for start in numpy.argsort(-starts, kind="stable")[:n_best_size].tolist():
                for end in best_ends:
                    if not (first <= start < after and first <= end < after):
                        continue
                    if end < start or end - start + 1 > max_answer_length:
                        continue
                    candidates.append({
                        "score": starts[start] + ends[end], "start_logit": starts[start],
                        "end_logit": ends[end], "start": offsets[start - first][0],
                        "end": offsets[end - first][1]})
        if version_2:
            candidates.append(null)
        best = sorted(candidates, key=lambda candidate: candidate["score"],
                      reverse=True)[:n_best_size]
        if version_2 and not any(candidate is null for candidate in best):
            best.append(null)
        if not best:
            best = [{"score": 0.0, "start_logit": 0.0, "end_logit": 0.0, "start": 0, "end": 0}]
        scores = numpy.array([candidate["score"] for candidate in best], numpy.float32)
        probabilities = numpy.exp(scores - numpy.max(scores))
        probabilities = probabilities / probabilities.sum()
        nbest = [
            {"text": example["context"][candidate["start"]:candidate["end"]],
             "start_logit": float(candidate["start_logit"]),
             "end_logit": float(candidate["end_logit"]), "probability": float(probability),
             "start": candidate["start"], "end": candidate["end"]}
            for candidate, probability in zip(best, probabilities)]
        chosen = nbest[0]
        with_text = [place for place, entry in enumerate(nbest) if entry["text"]]
        logits_of_best = [best[with_text[0]][name]
                          for name in ("start_logit", "end_logit")] if with_text else [0, 0]
        difference = (null["score"] - numpy.float32(logits_of_best[0])
                      - numpy.float32(logits_of_best[1]))
        if version_2:
            no_answer = next(entry for entry, candidate in zip(nbest, best) if candidate is null)
            chosen = no_answer if not with_text or difference > threshold else nbest[with_text[0]]
        yield {
            "id": example["id"], "text": chosen["text"], "score": chosen["probability"],
            "start": chosen["start"], "end": chosen["end"], "nbest": nbest,
            "null_odds": float(difference)}
