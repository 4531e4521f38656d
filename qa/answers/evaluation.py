"""Evaluate a model: answer the validation questions, write the answers and compute the metrics."""
from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from tqdm import tqdm

from ipu_options.config import Pipeline
from ipu_options.popvision import Spans
from qa.answers.inference import InferencePipeline
from qa.answers.metrics import squad_metrics
from qa.data.windows import Questions, Windows
from qa.model.parallelize import set_weights
from qa.model.roberta import model_class
from qa.run.log import RunLog
from qa.settings import TrainSettings
from runtime import processes
from runtime.files import write_json, writing, written_whole


class Evaluation:
    """The inference pipeline of a training run, which answers its validation and test questions.

    It has a model of its own, into which weights are loaded. model_config: the configuration of the
    model, as of transformers. pipeline: its layout on the IPUs. questions: the validation and the
    test questions, None where there are none. spans: names the phase for PopVision. log: gets the
    metrics.
    """

    def __init__(self, settings: TrainSettings, model_config: Any, pipeline: Pipeline,
                 questions: Sequence[Optional[Questions]], spans: Spans, log: RunLog):
        self.settings, self.questions, self.spans, self.log = settings, questions, spans, log
        model = model_class(model_config)(model_config)
        self.answerer = InferencePipeline(model, pipeline, settings)

    def compile(self, windows: Windows) -> None:
        """Compile the inference pipeline without running it. windows: any, for their shapes."""
        self.answerer.compile(windows)

    def report(self, weights: Dict[str, torch.Tensor], step: int = 0, epoch: float = 0.0) -> None:
        """Evaluate the validation and the test questions, and print some with their answers.

        The arguments are those of `run`.
        """
        for each in filter(None, self.questions):
            self._evaluate(weights, each, step, epoch)
            print(self.samples())

    def run(self, weights: Dict[str, torch.Tensor], step: int, epoch: float) -> Dict[str, float]:
        """Answer the validation questions with a model's weights, and return the metrics.

        weights: as `weights_of` gives them. The IPUs must be free, and are free again at the end.
        Prints the metrics, and writes them and the answers to files of the output folder. Without
        true answers there are no metrics. step, epoch: where the training is. Raises RunError if a
        file cannot be written.
        """
        return self._evaluate(weights, self.questions[0], step, epoch)

    def _evaluate(self, weights: Dict[str, torch.Tensor], questions: Questions, step: int,
                  epoch: float) -> Dict[str, float]:
        folder, prefix = Path(self.settings.output_dir), questions.prefix
        begin = time.perf_counter()
        with self.spans("evaluate"):
            set_weights(self.answerer.model, weights)
            examples, windows, _ = questions
            version_2 = self.settings.version_2_with_negative
            found = self.answerer.answers(windows, examples)
            if processes.is_first():
                with writing(f"--output_dir {folder}"):
                    predictions = write_answers(found, folder, version_2, prefix)
            else:
                predictions = list(found)  # computes its share
            self.answerer.detach()
            metrics = processes.on_first(metrics_of, examples, predictions, version_2)
        if metrics:
            tqdm.write(f"{prefix.replace('_', ' ')}evaluation at step {step}: " + as_text(metrics))
            with writing(f"--output_dir {folder}"):
                processes.on_first(write_json, folder / f"{prefix}metrics.json",
                                   {**metrics, "step": step, "epoch": epoch})
            self.log.add("evaluation", step, epoch, questions="test" if prefix else "validation",
                         seconds=time.perf_counter() - begin, **metrics)
        self._last = questions, predictions
        return metrics

    def samples(self) -> str:
        """Return some of the questions of the last `run` with predicted and true answers, as text.

        --show_predictions says how many, --seed determines which. Only the first process has them.
        """
        if not processes.is_first():
            return ""
        count, (questions, predictions) = self.settings.show_predictions, self._last
        examples, lines = questions.examples, []
        chosen = random.Random(self.settings.seed).sample(range(len(examples)),
                                                          min(count, len(examples)))
        for index in sorted(chosen):
            example = examples[index]
            true = " / ".join(sorted(set(example["answers"]["text"]))) or "(no answer)"
            predicted = predictions[index]["prediction_text"] or "(no answer)"
            lines.append(
                f"  {example['question']}\n      predicted: {predicted}\n      true:      {true}")
        return "\n".join(lines)


def metrics_of(examples: Any, predictions: List[dict], version_2_with_negative: bool,
               ) -> Dict[str, float]:
    """Return the SQuAD metrics of `write_answers`' predictions; {} where true answers are missing.

    examples: a data set with the columns id and answers, in the order of the predictions.
    """
    references = [{"id": name, "answers": answers}
                  for name, answers in zip(examples["id"], examples["answers"])]
    answered = [bool(reference["answers"]["text"]) for reference in references]
    if not (any if version_2_with_negative else all)(answered):
        return {}
    return squad_metrics(references, predictions, version_2_with_negative)


def as_text(metrics: Dict[str, float]) -> str:
    """Return metrics as one line of text."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def write_answers(answers: Iterable[dict], folder, version_2_with_negative: bool,
                  prefix: str = "") -> List[dict]:
    """Write the answers to `folder`, in the file formats of transformers' run_qa.

    predictions.json, nbest_predictions.json and, for version 2 data, null_odds.json map the id of a
    question to its text, its n-best list and its null odds. Each file appears complete or not at
    all. prefix: of the files' names.

    answers: those of `InferencePipeline.answers`. Returns the predictions as
    `qa.answers.metrics.squad_metrics` takes them: [{id, prediction_text, and for version 2 data
    no_answer_probability, which are the null odds}, ...]. Raises OSError.
    """
    folder = Path(folder)
    predictions = []
    with contextlib.ExitStack() as files:
        put_text = files.enter_context(_json_object(folder / f"{prefix}predictions.json"))
        put_nbest = files.enter_context(_json_object(folder / f"{prefix}nbest_predictions.json"))
        put_odds = (files.enter_context(_json_object(folder / f"{prefix}null_odds.json"))
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
