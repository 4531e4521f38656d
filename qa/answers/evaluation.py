"""Evaluate a model: answer the validation questions, write the answers and compute the metrics."""
from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

from ipu_options.config import Pipeline
from ipu_options.popvision import PhaseTimer
from qa.answers.confidence import write_table
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
    """The inference pipeline of a training run, which answers its validation and test questions."""

    def __init__(self, settings: TrainSettings, model_config: Any, pipeline: Pipeline,
                 questions: Sequence[Optional[Questions]], timer: PhaseTimer, log: RunLog):
        self.settings, self.questions, self.timer, self.log = settings, questions, timer, log
        model = model_class(model_config)(model_config)  # a second one, which weights are put into
        self.answerer = InferencePipeline(model, pipeline, settings)

    def compile(self, windows: Windows) -> None:
        """Compile the inference pipeline without running it. windows: any, for their shapes."""
        self.answerer.compile(windows)
        self.answerer.detach()

    def finish(self, weights: Dict[str, torch.Tensor], step: Optional[int] = None,
               epoch: Optional[float] = None) -> None:
        """Evaluate validation and test questions like `validate`, and print some with answers."""
        for questions in filter(None, self.questions):
            _, answers = self._evaluate(weights, questions, step, epoch)
            print(self._samples(questions.examples, answers))

    def validate(self, weights: Dict[str, torch.Tensor], step: int, epoch: float,
                 ) -> Dict[str, float]:
        """Answer the validation questions with a model's weights, and return the metrics.

        weights: of `weights_of`. The IPUs must be free, and are free again at the end. Prints the
        metrics, and writes them and the answers to files of the output folder. Without true answers
        there are no metrics. Raises RunError if a file cannot be written.
        """
        metrics, _ = self._evaluate(weights, self.questions[0], step, epoch)
        return metrics

    def _evaluate(self, weights: Dict[str, torch.Tensor], questions: Questions, step: Optional[int],
                  epoch: Optional[float]) -> Tuple[Dict[str, float], List[dict]]:
        """Return the metrics, and in the first process the answers without their n-best lists."""
        folder, prefix = Path(self.settings.output_dir), questions.prefix
        begin = time.perf_counter()
        with self.timer("evaluate"):
            set_weights(self.answerer.model, weights)
            examples, windows, _ = questions
            version_2 = self.settings.version_2_with_negative
            answers = self.answerer.answers(windows, examples)
            if processes.is_first():
                with writing(f"--output_dir {folder}"):
                    answers = write_answers(answers, folder, version_2, prefix)
            else:
                answers = list(answers)  # computes its share
            self.answerer.detach()
            metrics = processes.on_first(metrics_of, examples, answers, version_2)
        if metrics:
            where = {} if step is None else {"step": step, "epoch": epoch}
            at = "" if step is None else f" at step {step}"
            tqdm.write(f"{prefix.replace('_', ' ')}evaluation{at}: {as_text(metrics)}")
            with writing(f"--output_dir {folder}"):
                processes.on_first(write_json, folder / f"{prefix}metrics.json",
                                   {**metrics, **where})
                if not prefix:
                    processes.on_first(write_table, folder, answers,
                                       [true["text"] for true in examples["answers"]])
            self.log.add("evaluation", step or 0, epoch, seconds=time.perf_counter() - begin,
                         questions="test" if prefix else "validation", **metrics)
        return metrics, answers

    def _samples(self, examples: Any, answers: List[dict]) -> str:
        """Return --show_predictions of the questions with predicted and true answers, as text."""
        if not processes.is_first():
            return ""
        lines, count = [], min(self.settings.show_predictions, len(examples))
        sample = random.Random(self.settings.seed).sample(range(len(examples)), count)
        for index in sorted(sample):
            example = examples[index]
            true = " / ".join(sorted(set(example["answers"]["text"]))) or "(no answer)"
            predicted = answers[index]["text"] or "(no answer)"
            lines.append(
                f"  {example['question']}\n      predicted: {predicted}\n      true:      {true}")
        return "\n".join(lines)


def metrics_of(examples: Any, answers: List[dict], version_2_with_negative: bool,
               ) -> Dict[str, float]:
    """Return the SQuAD metrics of answers; {} where true answers are missing.

    examples: a data set with the columns id and answers, in the order of the answers, which have
    the keys id, text and null_odds.
    """
    references = [{"id": name, "answers": true}
                  for name, true in zip(examples["id"], examples["answers"])]
    answered = [bool(reference["answers"]["text"]) for reference in references]
    if not (any if version_2_with_negative else all)(answered):
        return {}
    predictions = [
        {"id": answer["id"], "prediction_text": answer["text"],
         **({"no_answer_probability": answer["null_odds"]} if version_2_with_negative else {})}
        for answer in answers]
    return squad_metrics(references, predictions, version_2_with_negative)


def as_text(metrics: Dict[str, float]) -> str:
    """Return metrics as one line of text."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def write_answers(answers: Iterable[dict], folder: Path, version_2_with_negative: bool,
                  prefix: str = "") -> List[dict]:
    """Write answers to `folder`, in the file formats of transformers' run_qa.

    predictions.json, nbest_predictions.json and, for version 2 data, null_odds.json map the id of a
    question to its text, its n-best list and its null odds. prefix: of the files' names. answers:
    of `InferencePipeline.answers`. Returns them without nbest. Raises OSError.
    """
    keys, kept = ("start_logit", "end_logit", "text", "probability"), []
    names = ["predictions", "nbest_predictions", *["null_odds"] * version_2_with_negative]
    with contextlib.ExitStack() as files:
        write = {name: files.enter_context(_json_object(folder / f"{prefix}{name}.json"))
                 for name in names}
        for answer in answers:
            nbest = [{key: entry[key] for key in keys} for entry in answer["nbest"]]
            write["predictions"](answer["id"], answer["text"])
            write["nbest_predictions"](answer["id"], nbest)
            if version_2_with_negative:
                write["null_odds"](answer["id"], answer["null_odds"])
            kept.append({key: value for key, value in answer.items() if key != "nbest"})
    return kept


@contextlib.contextmanager
def _json_object(path: Path) -> Iterator[Callable]:
    """Give a function that writes one entry, (key, value), of a JSON object to the file `path`."""
    separator = ""
    with written_whole(path) as file:
        def write(key: str, value: Any) -> None:
            nonlocal separator
            file.write(f"{separator}\n    {json.dumps(key)}: {json.dumps(value)}")
            separator = ","

        file.write("{")
        yield write
        file.write("\n}\n")
