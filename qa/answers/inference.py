"""The inference pipeline, with which train.py evaluates and infer.py answers questions."""
from __future__ import annotations

from contextlib import nullcontext
from typing import Iterator

from ipu_options import poptorch
from ipu_options.config import Pipeline
from ipu_options.options import attach, compile_model, inference_options
from qa.answers.spans import AnswerFinder
from qa.data.loader import first_batch, open_loader
from qa.data.rows import InferenceRows
from qa.families import row_kind
from qa.model.parallelize import parallelize
from qa.model.roberta import ForSpans
from qa.run.progress import progress_bar
from runtime import processes
from runtime.signals import raise_stopped

# Fewer rows are made sooner in this process than a worker starts, which has to import torch.
_ROWS_WORTH_A_WORKER = 10_000


class InferencePipeline:
    """A model that is compiled once for inference and answers the questions of any data sets.

    Rows are always packed, which changes no logits: a token sees its own window alone.

    model: is modified (annotated, converted to settings.precision) and must not be used elsewhere.
    settings: with the fields of ModelSettings and RunSettings, and eval_micro_batch_size.
    """

    def __init__(self, model: ForSpans, pipeline: Pipeline, settings):
        self.model, self.settings = model, settings
        config = pipeline.config
        parallelize(model, pipeline.layout, recompute_checkpoint_every_layer=False,
                    embedding_serialization_factor=config.embedding_serialization_factor)
        model.eval()
        if settings.precision == "float16":
            model.half()
        self.options = inference_options(pipeline, settings)
        self.micro_batch_size = 1 if pipeline.sharded else settings.eval_micro_batch_size
        self.rows_per_step = (self.micro_batch_size * config.device_iterations
                              * config.replication_factor)
        self.inference_model = poptorch.inferenceModel(model, self.options)

    def compile(self, windows) -> None:
        """Compile the model, and take IPUs for it. windows: any, since all rows have one shape."""
        batch = first_batch(self.options, self._rows(windows), self.micro_batch_size)
        compile_model(self.inference_model, batch)

    def answers(self, windows, examples, progress: bool = True) -> Iterator[dict]:
        """Yield the answer to each question in the order of `examples`: `AnswerFinder.add`.

        Collective: every process has to exhaust the iterator, which yields in the first one only.
        windows: qa.data.windows.Windows with offsets, made from `examples`.
        """
        if not self.inference_model.isCompiled():
            self.compile(windows)
        attach(self.inference_model)
        settings, rows = self.settings, self._rows(windows)
        finder = AnswerFinder(windows, examples, n_best_size=settings.n_best_size,
                              max_answer_length=settings.max_answer_length,
                              version_2_with_negative=settings.version_2_with_negative,
                              null_score_diff_threshold=settings.null_score_diff_threshold)
        return self._answers(rows, finder, progress)

    def _answers(self, rows: InferenceRows, finder: AnswerFinder, progress: bool) -> Iterator[dict]:
        loader = open_loader(self.options, rows, self.micro_batch_size,
                             asynchronous=len(rows) > _ROWS_WORTH_A_WORKER)
        rows_of_process = self.options.replication_factor * self.micro_batch_size
        bar = progress_bar(len(rows.windows), "Answers", "window") if progress else nullcontext()
        first = 0
        with loader as batches, bar:
            for batch in batches:
                raise_stopped()
                logits = [processes.gather_rows(part, rows_of_process)
                          for part in self.inference_model(**batch)]
                slices = [rows.slices(first + row) for row in range(len(logits[0]))]
                first += len(slices)
                if processes.is_first():
                    yield from finder.add(slices, *logits)
                if progress:
                    bar.update(sum(map(len, slices)))
        if processes.is_first():
            yield from finder.finish()

    def detach(self) -> None:
        """Free the IPUs. The weights are uploaded again when the pipeline is used next."""
        if self.inference_model.isAttachedToDevice():
            self.inference_model.detachFromDevice()

    def _rows(self, windows) -> InferenceRows:
        return InferenceRows(windows, row_length=self.settings.max_seq_length,
                             max_windows_per_row=self.settings.max_windows_per_row,
                             rows_per_step=self.rows_per_step, **row_kind(self.model.config))
