"""The inference loop: windows through an inference model to answers, for evaluation in train.py and for infer.py."""
from __future__ import annotations

from typing import Iterator

from tqdm import tqdm

from ipu_options import poptorch
from qa.answers import AnswerFinder
from qa.rows import InferenceRows, collate
from qa.run import workers_ignore_interrupt

_ROWS_WORTH_A_WORKER = 10_000  # fewer are made in less time than it takes to start a process that imports torch


def predict(inference_model, options, rows: InferenceRows, finder: AnswerFinder, micro_batch_size: int,
            progress: bool = True) -> Iterator[dict]:
    """Run `rows` through the model and give the answers of `finder` in example order (keys: AnswerFinder.add).

    inference_model: a poptorch.inferenceModel made with `options`, whose output mode is All (the default), so that each
    call returns start and end logits [rows of the combined batch, tokens] in the order of the rows.
    progress: show a bar.
    """
    mode = poptorch.DataLoaderMode.Async if len(rows) > _ROWS_WORTH_A_WORKER else poptorch.DataLoaderMode.Sync
    with workers_ignore_interrupt():
        loader = poptorch.DataLoader(options, rows, batch_size=micro_batch_size, collate_fn=collate, mode=mode)
    try:
        first = 0
        with tqdm(total=len(rows.windows), desc="Answers", unit="window", dynamic_ncols=True, disable=not progress) as bar:
            for batch in loader:
                slices = [rows.slices(first + place) for place in range(len(batch["input_ids"]))]
                first += len(slices)
                yield from finder.add(slices, *inference_model(**batch))
                bar.update(sum(map(len, slices)))
        yield from finder.finish()
    finally:
        loader.terminate()
