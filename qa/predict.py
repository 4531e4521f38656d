"""The inference loop: windows through an inference model to answers, for evaluation in train.py and for infer.py."""
from __future__ import annotations

from typing import Iterator

from tqdm import tqdm

from ipu_options import poptorch
from qa.answers import AnswerFinder
from qa.rows import InferenceRows, collate


def predict(inference_model, options, rows: InferenceRows, finder: AnswerFinder, micro_batch_size: int,
            progress: bool = True) -> Iterator[dict]:
    """Run `rows` through the model and give the answers of `finder` in example order (for their keys see qa.answers.answer).

    inference_model: a poptorch.inferenceModel made with `options`, whose output mode is All (the default), so that each call
    returns start and end logits [rows of the combined batch, tokens] in the order of the rows.
    """
    loader = poptorch.DataLoader(options, rows, batch_size=micro_batch_size, collate_fn=collate,
                                 mode=poptorch.DataLoaderMode.Async)
    row = 0
    with tqdm(total=len(rows.windows), desc="answers", unit="window", disable=not progress) as bar:
        for batch in loader:
            slices = [rows.slices(index) for index in range(row, row + len(batch["input_ids"]))]
            row += len(slices)
            start_logits, end_logits = inference_model(**batch)
            yield from finder.add(slices, start_logits, end_logits)
            bar.update(sum(map(len, slices)))
    loader.terminate()
    yield from finder.finish()
