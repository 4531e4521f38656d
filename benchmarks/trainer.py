"""Fine-tune with Hugging Face's Trainer and run_qa's preprocessing.

    python -m benchmarks.trainer --model FOLDER --train_file FILE --output_dir FOLDER
        [--best float32 | bfloat16]

benchmarks/training.py compares train.py with this command. By default every window is padded to
max_seq_length and computed in float32, as is usual. --best selects what is fastest for Trainer on a
processor: batches padded to their longest window, windows of similar length together, no gradient
clipping; which of the two types is faster depends on the processor. Needs `accelerate`.
"""
from __future__ import annotations

import argparse
from inspect import signature

from benchmarks.run_qa import features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--train_file", "--output_dir"):
        parser.add_argument(name, required=True)
    parser.add_argument("--best", choices=("float32", "bfloat16"))
    parser.add_argument("--max_seq_length", type=int, default=384)
    parser.add_argument("--doc_stride", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8, help="windows computed at once")
    parser.add_argument("--num_train_epochs", type=float, default=1.0)
    parser.add_argument("--max_steps", type=int, default=-1, help="end after N weight updates")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    given = parser.parse_args()

    from transformers import (
        AutoModelForQuestionAnswering,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        default_data_collator,
    )

    from qa.data.dataset import load_examples

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    examples = load_examples(split="train", file=given.train_file, version_2_with_negative=True)
    windows = examples.map(
        features, batched=True, remove_columns=examples.column_names, load_from_cache_file=False,
        fn_kwargs=dict(
            tokenizer=tokenizer, max_seq_length=given.max_seq_length, doc_stride=given.doc_stride,
            padding=False if given.best else "max_length"))
    if "train_sampling_strategy" in signature(TrainingArguments).parameters:  # transformers 5
        by_length, warmup = {"train_sampling_strategy": "group_by_length"}, {"warmup_steps": 0.1}
    else:
        by_length, warmup = {"group_by_length": True}, {"warmup_ratio": 0.1}
    arguments = TrainingArguments(
        given.output_dir, use_cpu=True, bf16=given.best == "bfloat16",
        **(by_length if given.best else {}), **warmup,
        per_device_train_batch_size=given.batch_size,
        gradient_accumulation_steps=32 // given.batch_size, num_train_epochs=given.num_train_epochs,
        max_steps=given.max_steps, learning_rate=given.learning_rate, weight_decay=0.01,
        max_grad_norm=0.0 if given.best else 1.0, save_strategy="no", report_to=[], seed=42)
    trainer = Trainer(
        AutoModelForQuestionAnswering.from_pretrained(given.model), arguments,
        train_dataset=windows, processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer) if given.best else default_data_collator)
    print(f"{len(windows)} windows")
    speed = trainer.train().metrics["train_samples_per_second"]
    print(f"{speed} windows/s")
    trainer.save_model()


if __name__ == "__main__":
    main()
