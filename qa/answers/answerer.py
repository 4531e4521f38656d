"""A fine-tuned checkpoint that answers questions: what infer.py asks, and other programs can.

    from qa.answers.answerer import Answerer

    answerer = Answerer.load("output/demo")
    answer = answerer.ask("What frightened Ada?", "Ada was born in Oslo. She was afraid of geese.")
    print(answer["answer"], answer["start"], answer["end"], answer["confidence"])
"""
from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Union

from ipu_options.config import IPUConfig, inference_pipeline
from ipu_options.popvision import PhaseTimer
from qa.answers.confidence import confidence, read_table
from qa.answers.inference import InferencePipeline
from qa.data.windows import FewQuestions, windows_for_answers
from qa.families import folder_and_name
from qa.model.pretrained import load_config, load_model, load_tokenizer
from qa.settings import InferSettings, infer_settings
from runtime.errors import UsageError
from runtime.flags import check_value, did_you_mean

_KINDS = {int: "a number", float: "a number", bool: "true or false", list: "a list",
          dict: "an object"}


class Answerer:
    """A checkpoint on the IPUs, or on this host."""

    def __init__(self, settings: InferSettings, ipu_config: IPUConfig,
                 timer: Optional[PhaseTimer] = None):
        self.settings = settings
        self._timer = timer or PhaseTimer("infer", settings)
        model_config = load_config(settings)
        pipeline = inference_pipeline(ipu_config, model_config.num_hidden_layers,
                                      settings.pod_type, single_rows=not settings.input_file)
        self._tokenizer = load_tokenizer(settings, model_config)
        self._table = read_table(folder_and_name(settings, "model_name_or_path", True)[0])
        self._pipeline = InferencePipeline(load_model(settings, model_config), pipeline, settings)

    @classmethod
    def load(cls, checkpoint: Union[str, Path], **settings: Any) -> "Answerer":
        """Return the answerer for a folder of train.py or save_pretrained, or a name on the hub.

        settings: of infer.py, by the names of its flags. Raises UsageError or RunError.
        """
        known = [f.name for group in (InferSettings, IPUConfig) for f in fields(group)]
        for name in settings:
            if name not in known:
                raise UsageError(f"{name}: infer.py has no such setting{did_you_mean(name, known)}")
        return cls(*infer_settings({"checkpoint": str(checkpoint), **settings}))

    def ask(self, question: Union[str, List[str]], context: str, n_best: Optional[int] = None,
            ) -> Union[Dict[str, Any], List[Dict[str, Any]]]:
        """Return the answer to a question about a text; of a list of questions, a list.

        n_best: the length of the n-best list (default: the setting). `answers` says what an answer
        is. Raises UsageError for a question or a text that is none.
        """
        answers = list(self.answers(questions_about(question, context), n_best))
        return answers if isinstance(question, list) else answers[0]

    def answers(self, examples: Any, n_best: Optional[int] = None,
                progress: bool = False) -> Iterator[Dict[str, Any]]:
        """Collective: yield the answer to each question of a data set, in order, in one process.

        examples: with the columns id, question and context. progress: whether to show a bar. Keys:

            id, question
            answer       its text; empty if there is none
            confidence   how many answers as sure as this one were right, of 1, on the validation
                         questions; None without a text or if nothing was measured
            score        its share among the n_best_size best spans of this text, right or wrong
            start, end   the characters of the context that it spans, end not included
            nbest        the best answers, best first: text, probability, start, end
            null_odds    less is surer: see qa.answers.spans.AnswerFinder.add
        """
        n_best = self.settings.n_best if n_best is None else n_best
        check_value(InferSettings.__dataclass_fields__["n_best"], n_best, "n_best")
        with self._timer("windows"):
            windows = windows_for_answers(self.settings, self._tokenizer, examples)
        with self._timer("answer"):  # and what the caller does between two answers
            answers = self._pipeline.answers(windows, examples, progress)
            for question, answer in zip(examples["question"], answers):
                keys = ("text", "probability", "start", "end")
                nbest = [{key: entry[key] for key in keys} for entry in answer["nbest"][:n_best]]
                yield {"id": answer["id"], "question": question, "answer": answer["text"],
                       "confidence": confidence(self._table, answer), "score": answer["score"],
                       "start": answer["start"], "end": answer["end"], "nbest": nbest,
                       "null_odds": answer["null_odds"]}


def questions_about(question: Any, context: Any) -> FewQuestions:
    """Return a question, or a list of them, about one text as a data set.

    Raises UsageError for values that are no texts or are empty.
    """
    questions = question if isinstance(question, list) else [question]
    if not questions:
        raise UsageError("question is an empty list: give at least one")
    texts = []
    for name, value in [*(("question", value) for value in questions), ("context", context)]:
        if value is None:
            raise UsageError(f"{name} is missing: give its text")
        if not isinstance(value, str):
            raise UsageError(f"{name} is {_KINDS.get(type(value), 'no text')}: give one text")
        if not value.strip():
            raise UsageError(f"{name} is empty: give its text")
        # What a browser sends may hold half a character (a surrogate), which no tokenizer takes.
        texts.append(value.encode("utf-8", "replace").decode("utf-8"))
    *questions, context = texts
    return FewQuestions({"id": [str(number) for number in range(len(questions))],
                         "question": questions, "context": [context] * len(questions)})
