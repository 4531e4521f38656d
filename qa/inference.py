"""The inference pipeline that train.py evaluates with and infer.py answers with: one model, one layout, one way to answers."""
from __future__ import annotations

from typing import Iterator

from ipu_options import poptorch
from ipu_options.config import Pipeline
from ipu_options.options import inference_options
from qa.answers import AnswerFinder
from qa.model import RobertaForSpans, annotate
from qa.predict import predict
from qa.rows import InferenceRows


class InferencePipeline:
    """A model compiled once for inference, which answers the questions of any number of data sets.

    model: becomes this pipeline's own (annotated, in the precision that the settings name, in evaluation mode).
    settings: any object with the fields of qa.settings.ModelSettings and RunSettings, and eval_micro_batch_size.
    """

    def __init__(self, model: RobertaForSpans, pipeline: Pipeline, settings):
        self.model, self.settings = model, settings
        config = pipeline.config
        annotate(model, pipeline.layout, recompute_checkpoint_every_layer=False,
                 embedding_serialization_factor=config.embedding_serialization_factor)
        model.eval()
        if settings.precision == "float16":
            model.half()
        self.options = inference_options(config, compile_only=settings.compile_only, synthetic_data=settings.synthetic_data,
                                         ipu_model=settings.ipu_model, profile_dir=settings.profile_dir)
        self.rows_per_step = settings.eval_micro_batch_size * config.device_iterations * config.replication_factor
        self.inference_model = poptorch.inferenceModel(model, self.options)

    def compile(self, windows) -> None:
        """Compile for the shapes that every call has, without running. windows: qa.windows.Windows, any."""
        self.inference_model.compile(**self._rows(windows).__getitems__(range(self.rows_per_step)))

    def answers(self, windows, examples, progress: bool = True) -> Iterator[dict]:
        """The answer to each question in order (see AnswerFinder.add for its keys).

        windows: qa.windows.Windows with offsets, made from `examples`.  progress: show a bar.
        """
        s = self.settings
        finder = AnswerFinder(windows, examples, n_best_size=s.n_best_size, max_answer_length=s.max_answer_length,
                              version_2_with_negative=s.version_2_with_negative, null_score_diff_threshold=s.null_score_diff_threshold)
        return predict(self.inference_model, self.options, self._rows(windows), finder, s.eval_micro_batch_size, progress)

    def detach(self) -> None:
        """Give the IPUs back; the weights are uploaded anew when the pipeline is next used."""
        if self.inference_model.isAttachedToDevice():
            self.inference_model.detachFromDevice()

    def _rows(self, windows) -> InferenceRows:
        s = self.settings
        return InferenceRows(windows, row_length=s.max_seq_length, max_windows_per_row=s.max_windows_per_row if s.pack else 1,
                             pad_token_id=self.model.config.pad_token_id, rows_per_step=self.rows_per_step)
