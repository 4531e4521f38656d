"""Evaluate a model: answer the validation questions, write the answers and compute the metrics."""
from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List

from tqdm import tqdm

from ipu_options.config import Pipeline
from ipu_options.files import write_json, written_whole
from qa.answers.inference import InferencePipeline
from qa.answers.metrics import squad_metrics
from qa.data.windows import Questions
from qa.model.parallelize import set_weights, weights_of
from qa.model.roberta import RobertaForSpans
from qa.run.checkpoint import Training
from qa.settings import TrainSettings


class Evaluation:
    """The validation questions of a training run, and the inference pipeline that answers them.

    model_config: the configuration of the model, as of transformers. pipeline: the mapping of the
    inference model to IPUs. questions: the validation questions, whose windows have offsets.
    """

    def __init__(self, settings: TrainSettings, model_config: Any, pipeline: Pipeline,
                 questions: Questions):
        self.settings, self.questions = settings, questions
        self.pipeline = InferencePipeline(RobertaForSpans(model_config), pipeline, settings)

    def compile(self) -> None:
        """Compile the inference pipeline without running it."""
        self.pipeline.compile(self.questions.windows)

    def run(self, training: Training, step: int, epoch: float) -> List[dict]:
        """Answer all questions with the current weights of the training.

        Detaches the training model from the IPUs, and frees them again at the end. Writes the
        prediction files and metrics.json to the output folder, and prints the metrics.

        step, epoch: where the training is, for metrics.json and the log. Returns the predictions in
        the order of the questions, as `write_answers` does. Raises OSError if a file cannot be
        written.
        """
        version_2, folder = self.settings.version_2_with_negative, Path(self.settings.output_dir)
        if training.training_model.isAttachedToDevice():
            # Frees the IPUs and copies the weights to the host.
            training.training_model.detachFromDevice()
        set_weights(self.pipeline.model, weights_of(training.model))
        examples, windows = self.questions
        predictions = write_answers(self.pipeline.answers(windows, examples), folder, version_2)
        self.pipeline.detach()
        references = [{"id": name, "answers": answers}
                      for name, answers in zip(examples["id"], examples["answers"])]
        metrics = squad_metrics(references, predictions, version_2)
        write_json(folder / "metrics.json", {**metrics, "step": step, "epoch": epoch})
        tqdm.write(f"evaluation at step {step}: " + ", ".join(f"{name} {value:.2f}"
                                                              for name, value in metrics.items()))
        return predictions

    def samples(self, predictions: List[dict], count: int, seed: int) -> str:
        """Return `count` random questions with their predicted and true answers, as text.

        predictions: those of `run`. seed: determines which questions are chosen.
        """
        examples, lines = self.questions.examples, []
        for index in sorted(
                random.Random(seed).sample(range(len(examples)), min(count, len(examples)))):
            example = examples[index]
            true = " / ".join(sorted(set(example["answers"]["text"]))) or "(no answer)"
            predicted = predictions[index]["prediction_text"] or "(no answer)"
            lines.append(
                f"  {example['question']}\n      predicted: {predicted}\n      true:      {true}")
        return "\n".join(lines)


def write_answers(answers: Iterable[dict], folder, version_2_with_negative: bool) -> List[dict]:
    """Write the answers to `folder`, in the file formats of transformers' run_qa.

    predictions.json, nbest_predictions.json and, for version 2 data, null_odds.json map the id of a
    question to its text, its n-best list and its null odds. Each file appears complete or not at
    all.

    answers: those of `InferencePipeline.answers`. Returns the predictions as
    `qa.answers.metrics.squad_metrics` takes them: [{id, prediction_text, and for version 2 data
    no_answer_probability, which are the null odds}, ...]. Raises OSError.
    """
    folder = Path(folder)
    predictions = []
    with contextlib.ExitStack() as files:
        put_text = files.enter_context(_json_object(folder / "predictions.json"))
        put_nbest = files.enter_context(_json_object(folder / "nbest_predictions.json"))
        put_odds = (files.enter_context(_json_object(folder / "null_odds.json"))
                    if version_2_with_negative else None)
        for found in answers:
            prediction = {"id": found["id"], "prediction_text": found["text"]}
            put_text(found["id"], found["text"])
            put_nbest(
                found["id"],
                [{key: entry[key] for key in ("start_logit", "end_logit", "text", "probability")}
                 for entry in found["nbest"]])
            if put_odds:
                put_odds(found["id"], found["null_odds"])
                prediction["no_answer_probability"] = found["null_odds"]
            predictions.append(prediction)
    return predictions


@contextlib.contextmanager
def _json_object(path: Path) -> Iterator[Callable]:
    """Give a function that writes one entry, (key, value), of a JSON object to the file `path`.

    The file appears when the block ends, so that it is complete or absent.
    """
    separator = ""
    with written_whole(path) as file:
        def put(key: str, value) -> None:
            nonlocal separator
            file.write(f"{separator}\n    {json.dumps(key)}: {json.dumps(value)}")
            separator = ","

        file.write("{")
        yield put
        file.write("\n}\n")
