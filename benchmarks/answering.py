"""From a question to its answer: start-up, logits to answers, and a file of questions."""
from __future__ import annotations

import collections
import operator
import tempfile
from functools import partial
from pathlib import Path
from typing import Iterator

import datasets
import numpy
import torch

from benchmarks.measure import ONE_IPU, python, run
from benchmarks.questions import ROBERTA_BASE, made_up, train_tokenizer, write_model
from tests.reference.answers import plain_answers
from tests.reference.synthetic_windows import SyntheticWindows

LENGTH, N_BEST, MAX_ANSWER, BATCH = 384, 20, 30, 16
LOAD = """
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
AutoTokenizer.from_pretrained({folder!r})
AutoModelForQuestionAnswering.from_pretrained({folder!r})
"""


def startup(runs=5, layers=12) -> None:
    """`train.py --help`, and infer.py until it has answered one question.

    The first against importing transformers' argument parser, the second against importing torch
    and transformers and loading the same model (roberta-base's size, untrained).
    """
    with tempfile.TemporaryDirectory() as folder:
        question = next(made_up(1))
        write_model(Path(folder), train_tokenizer(each["context"] for each in made_up(2000, 1)),
                    layers, **ROBERTA_BASE)
        parser, load = "import HfArgumentParser", "import and load the model"
        run({parser: partial(python, "-c", "from transformers import HfArgumentParser"),
             "train.py --help": partial(python, "train.py", "--help")}, {parser: 1 / 1.3},
            runs=runs)
        run({load: partial(python, "-c", LOAD.format(folder=folder)),
             "infer.py, one question": partial(
                 python, "infer.py", "--checkpoint", folder, "--question", question["question"],
                 "--context", question["context"], *ONE_IPU)}, {load: 1 / 1.15}, runs=runs)


def trained_logits(random: numpy.random.Generator, windows: SyntheticWindows) -> numpy.ndarray:
    """Return logits as a trained model gives them, float32 [windows, 2, tokens].

    They are low everywhere except around a few places, where a high end follows a high start.
    """
    logits = random.normal(-6, 1.5, (len(windows), 2, LENGTH)).astype(numpy.float32)
    for window, first in enumerate(windows.context_start.tolist()):
        for height in (9, 6, 4):
            start = random.integers(first, LENGTH - 8)
            logits[window, 0, start - 1:start + 2] += height
            logits[window, 1, start + 1:start + 6] += height
    return logits


def find_answers(windows, examples, logits: torch.Tensor, version_2: bool) -> Iterator[dict]:
    from qa.answers.spans import AnswerFinder

    finder = AnswerFinder(windows, examples, n_best_size=N_BEST, max_answer_length=MAX_ANSWER,
                          version_2_with_negative=version_2)
    for first in range(0, len(windows), BATCH):
        batch = logits[first:first + BATCH]
        slices = [[(window, 0, LENGTH)] for window in range(first, first + len(batch))]
        yield from finder.add(slices, batch[:, 0], batch[:, 1])
    yield from finder.finish()


def answers(windows=10_800, runs=3) -> None:
    """Logits to answers, against run_qa's loops over pairs of tokens.

    As many windows as in SQuAD v1's validation set. Both give the same answers, scores and n-best
    lists bit for bit.
    """
    torch.set_num_threads(1)
    random = numpy.random.default_rng(0)
    synthetic = SyntheticWindows(numpy.full(windows, LENGTH))
    synthetic.example = numpy.arange(windows, dtype=numpy.int32) * 100 // 102  # as in SQuAD
    synthetic.context_start = random.integers(8, 30, windows).astype(numpy.int32)
    count = int(synthetic.example[-1]) + 1
    examples = datasets.Dataset.from_dict({
        "id": [str(i) for i in range(count)], "context": ["0123456789" * 120] * count})
    logits = trained_logits(random, synthetic)
    for version_2 in (False, True):
        sides = {"run_qa's loops": lambda: plain_answers(
                     synthetic, examples, logits, N_BEST, MAX_ANSWER, version_2, 0.0),
                 "qa.answers": lambda: find_answers(synthetic, examples, torch.from_numpy(logits),
                                                    version_2)}
        assert all(map(operator.eq, *(side() for side in sides.values()))), "answers differ"
        print(f" version {2 if version_2 else 1}: equal bit for bit")
        run({name: lambda side=side: collections.deque(side(), maxlen=0)
             for name, side in sides.items()}, {"run_qa's loops": 5}, runs=runs, amount=windows,
            unit="windows", warm_up=False)


def inference(file=None, model=None, questions=1000, width=256, layers=4, runs=3) -> None:
    """Questions to answers, against transformers' model in loops over batches.

    The loops have 16 windows in a batch, padded to the longest, and run_qa's postprocessing. One
    has the windows in the order of the questions, the other by length. All in float32 and in half,
    which transformers computes in bfloat16 and a host here in float32. Windows are made beforehand.
    file, model: whose first `questions` are answered, and a checkpoint; by default made-up
    questions as long as SQuAD's, and an untrained model.
    """
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    from ipu_options.config import inference_pipeline
    from qa.answers.inference import InferencePipeline
    from qa.data.dataset import load_examples
    from qa.data.windows import make_windows
    from qa.model.pretrained import load_config, load_model, load_tokenizer
    from qa.settings import ModelSettings, parse_infer

    with tempfile.TemporaryDirectory() as folder:
        if not model:
            write_model(Path(folder), train_tokenizer(q["context"] for q in made_up(400, 1)),
                        layers, hidden_size=width, num_attention_heads=width // 64,
                        intermediate_size=4 * width)
        examples = (load_examples(split="validation", file=file, max_samples=questions) if file
                    else datasets.Dataset.from_list(list(made_up(questions))))
        for precision in ("float32", "float16"):
            settings, config = parse_infer([
                "--checkpoint", model or folder, "--precision",
                precision, *map(str, ONE_IPU), "--eval_micro_batch_size", "4"])
            model_config = load_config(settings)
            tokenizer = AutoTokenizer.from_pretrained(model or folder)
            windows = make_windows(
                examples, load_tokenizer(settings, model_config),
                ModelSettings(max_seq_length=LENGTH), labels=False, offsets=True)
            theirs = AutoModelForQuestionAnswering.from_pretrained(model or folder).eval()
            if precision == "float16":
                theirs.to(torch.bfloat16)
            ours = InferencePipeline(
                load_model(settings, model_config),
                inference_pipeline(config, model_config.num_hidden_layers, settings.pod_type),
                settings)
            loop = partial(padded_loop, theirs, tokenizer, windows, examples)
            run({"transformers, in order": lambda: list(loop()),
                 "transformers, by length": lambda: list(loop(by_length=True)),
                 f"InferencePipeline, {precision}": lambda: list(
                     ours.answers(windows, examples, progress=False))},
                {"transformers, in order": 1.2} if precision == "float32" else {}, runs=runs,
                amount=len(examples), unit="questions")


@torch.inference_mode()
def padded_loop(model, tokenizer, windows, examples, by_length=False) -> Iterator[dict]:
    """Return the answers of transformers' model, from batches of windows padded to the longest."""
    logits = numpy.full((len(windows), 2, LENGTH), -1e4, numpy.float32)
    order = numpy.argsort(windows.lengths if by_length else numpy.zeros(len(windows)),
                          kind="stable")
    for first in range(0, len(order), BATCH):
        batch = order[first:first + BATCH].tolist()
        inputs = tokenizer.pad({"input_ids": [windows.input_ids(i).tolist() for i in batch]},
                               return_tensors="pt")
        output = model(**inputs)
        width = inputs["input_ids"].shape[1]
        logits[batch, 0, :width] = output.start_logits.float()
        logits[batch, 1, :width] = output.end_logits.float()
    return plain_answers(windows, examples, logits, N_BEST, MAX_ANSWER, False, 0.0)
