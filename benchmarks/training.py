"""Whole fine-tunings, by train.py and by Hugging Face's Trainer. They need `accelerate`."""
from __future__ import annotations

import tempfile
import time
from functools import partial
from inspect import signature
from pathlib import Path
from typing import List

from benchmarks.measure import ONE_IPU, python, run
from benchmarks.questions import (
    ROBERTA_BASE,
    made_up,
    train_tokenizer,
    write_model,
    write_questions,
)
from tests.reference.windows import plain_windows

PADDED = "Trainer, padded"
BY_LENGTH = {f"Trainer, {kind}, by length": ["--padding", "longest", "--by_length", "--precision",
                                             kind, "--max_grad_norm", 0]
             for kind in ("float32", "bfloat16")}


def training(runs=1, layers=2, questions=1_000) -> None:
    """Whole fine-tunings, from the command to the saved model; 8 minutes a run on 2 cores.

    Layers of roberta-base, one epoch of made-up questions as long as SQuAD's. All sides have the
    same windows in an update and schedule. Trainer pads to max_seq_length in float32, as is usual,
    or is at its best on a processor: batches of windows of similar length, padded to the longest,
    without clipping.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = list(made_up(questions))
        write_questions(folder / "train.jsonl", train)
        write_model(folder / "model",
                    train_tokenizer(question["context"] for question in train[::5]), layers,
                    **ROBERTA_BASE)
        trainer = ["-m", "benchmarks", "trainer", "--model", folder / "model", "--train_file",
                   folder / "train.jsonl"]
        ours = ["train.py", "--do_train", "--model_name_or_path", folder / "model",
                "--train_file", folder / "train.jsonl", "--num_train_epochs", 1, "--warmup_ratio",
                0.1, "--micro_batch_size", 8, "--gradient_accumulation_steps", 4, *ONE_IPU]
        sides = {PADDED: trainer, **{side: trainer + flags for side, flags in BY_LENGTH.items()},
                 "train.py, a window a row": ours, "train.py, packed": [*ours, "--pack"]}
        run({side: partial(fine_tune, command, folder / f"out{number}")
             for number, (side, command) in enumerate(sides.items())},
            {PADDED: 3, **dict.fromkeys(BY_LENGTH, 1.5)}, runs=runs, amount=questions,
            unit="windows", warm_up=False)


def fine_tune(command: List, output: Path) -> float:
    """Run a fine-tuning without what comes after saving; return its seconds until then."""
    begin = time.time()
    python(*command, "--output_dir", output)
    return (output / "model.safetensors").stat().st_mtime - begin


def trainer_on_demo(folder: Path) -> List:
    """Return Trainer's command on what write_demo has written, whose windows fit in 64 tokens."""
    return ["-m", "benchmarks", "trainer", "--model", folder / "model", "--train_file",
            folder / "train.json", "--batch_size", 32, "--max_seq_length", 64, "--doc_stride", 16,
            "--learning_rate", 2e-3, "--num_train_epochs", 3]


def trainer(model, train_file, output_dir, padding="max_length", by_length=False,
            precision="float32", max_seq_length=384, doc_stride=128, batch_size=8,
            windows_per_update=32, num_train_epochs=1.0, max_steps=-1, learning_rate=2e-5,
            warmup=0.1, max_grad_norm=1.0, logging_steps=500, seed=42) -> None:
    """Fine-tune with Trainer and run_qa's preprocessing.

    padding: to max_length, or to the longest in the batch. by_length: windows of similar length
    are in a batch. precision: float32, or bfloat16 by autocast.
    """
    from transformers import (
        AutoModelForQuestionAnswering,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from qa.data.dataset import load_examples

    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = load_examples(split="train", file=train_file, version_2_with_negative=True)
    names = {"input_ids": "input_ids", "token_type_ids": "token_type_ids",
             "start_position": "start_positions", "end_position": "end_positions"}
    windows = [{names[key]: window[key] for key in names if window[key] is not None}
               for window in plain_windows(examples, tokenizer, max_seq_length, doc_stride)]
    if "train_sampling_strategy" in signature(TrainingArguments).parameters:  # transformers 5
        order, warmup = {"train_sampling_strategy": "group_by_length"}, {"warmup_steps": warmup}
    else:
        order, warmup = {"group_by_length": True}, {"warmup_ratio": warmup}
    arguments = TrainingArguments(
        output_dir, use_cpu=True, bf16=precision == "bfloat16",
        **(order if by_length else {}), **warmup, logging_steps=logging_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=windows_per_update // batch_size,
        num_train_epochs=num_train_epochs, max_steps=max_steps, learning_rate=learning_rate,
        weight_decay=0.01, max_grad_norm=max_grad_norm, save_strategy="no", report_to=[], seed=seed)
    job = Trainer(
        AutoModelForQuestionAnswering.from_pretrained(model), arguments, train_dataset=windows,
        processing_class=tokenizer, data_collator=DataCollatorWithPadding(
            tokenizer, padding, max_length=max_seq_length))
    print(f"{job.train().metrics['train_samples_per_second']} windows/s")
    job.save_model()
    job.save_state()
