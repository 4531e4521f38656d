"""Three steps of a training run that train.py names and does not spell out: its questions, its model, its evaluation."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

from tqdm import tqdm

from ipu_options.config import Pipeline
from qa.answers import write_answers
from qa.checkpoint import Checkpoint
from qa.data import load_examples, random_examples
from qa.files import write_json
from qa.inference import InferencePipeline
from qa.metrics import squad_metrics
from qa.model import RobertaForSpans, annotate, load_model
from qa.optimizer import make_optimizer
from qa.settings import TrainSettings
from qa.windows import Windows, make_windows


def questions_and_windows(s: TrainSettings, tokenizer) -> Tuple[Any, Any, Windows, Windows]:
    """(training questions, validation questions, training windows with labels, validation windows with character offsets)."""
    source = dict(dataset_name=s.dataset_name, dataset_config_name=s.dataset_config_name, on_bad_row=s.on_bad_row,
                  version_2_with_negative=s.version_2_with_negative)
    examples = load_examples(split="train", file=s.train_file, max_samples=s.max_train_samples, **source)
    eval_examples = load_examples(split="validation", file=s.validation_file, max_samples=s.max_eval_samples, **source)
    if s.show_examples:
        print(random_examples(examples, s.show_examples, s.seed))
    shape = dict(max_seq_length=s.max_seq_length, doc_stride=s.doc_stride, num_proc=s.preprocessing_num_workers,
                 on_bad_row=s.on_bad_row, overwrite_cache=s.overwrite_cache)
    windows = Windows(make_windows(examples, tokenizer, labels=True, offsets=False, **shape))
    eval_windows = Windows(make_windows(eval_examples, tokenizer, labels=False, offsets=True, **shape))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are done; without this it warns of every process started later
    return examples, eval_examples, windows, eval_windows


def model_and_optimizer(s: TrainSettings, config, pipeline: Pipeline, saved: Optional[Checkpoint]) -> Tuple[RobertaForSpans, Any]:
    """The model of `s` or of the checkpoint, annotated for `pipeline` and in the precision of `s`, and its PopTorch optimizer."""
    ipu = pipeline.config
    model = load_model(str(saved.folder) if saved else s.model_name_or_path, config, s.hub_token).train()
    annotate(model, pipeline.layout, recompute_checkpoint_every_layer=ipu.recompute_checkpoint_every_layer,
             embedding_serialization_factor=ipu.embedding_serialization_factor)
    if s.precision == "float16":
        model.half()
    return model, make_optimizer(model, name=s.optimizer, learning_rate=s.learning_rate, weight_decay=s.weight_decay,
                                 betas=(s.adam_beta1, s.adam_beta2), epsilon=s.adam_epsilon, loss_scaling=s.loss_scaling,
                                 half_first_moment=ipu.enable_half_first_order_momentum)


def evaluate_answers(pipeline: InferencePipeline, windows: Windows, examples, folder: Union[str, Path], step: int, epoch: float) -> List[dict]:
    """Answer all questions, write the prediction files and metrics.json to `folder`, print the metrics, give the IPUs back.

    Returns the predictions in order: [{id, prediction_text, ...}].
    """
    version_2 = pipeline.settings.version_2_with_negative
    predictions = write_answers(pipeline.answers(windows, examples), folder, version_2)
    pipeline.detach()
    references = [{"id": name, "answers": answers} for name, answers in zip(examples["id"], examples["answers"])]
    metrics = squad_metrics(references, predictions, version_2)
    write_json(Path(folder) / "metrics.json", {**metrics, "step": step, "epoch": epoch})
    tqdm.write(f"evaluation at step {step}: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    return predictions
