"""Measure what poptorch_host adds to a training step, compared with a hand-written PyTorch loop.

    python -m benchmarks.host_overhead [--seconds 20]

The models have the demo's size and the size of two layers of roberta-base. Both loops run the same
micro-batches at the same precision. They take turns step by step in random order, so that whatever
else the machine does affects both. Prints the median time of a step in each loop and their ratio,
and the ratio of two plain loops as a measure of the noise.
"""
from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from typing import Dict, List

import torch
from transformers import RobertaConfig

import poptorch_host as poptorch
from benchmarks.measure import compare, machine
from qa.model.roberta import RobertaForSpans

# name: (width, layers, heads, vocabulary, row length, micro-batch, accumulation, precision)
SHAPES = {
    "demo": (128, 4, 4, 2000, 64, 8, 4, torch.float32),
    "roberta-base, 2 layers, float32": (768, 2, 12, 8000, 384, 2, 4, torch.float32),
    "roberta-base, 2 layers, half": (768, 2, 12, 8000, 384, 2, 4, torch.float16),
}


def make(width, layers, heads, vocabulary, length, *unused):
    """A model on one IPU, with roberta-base's dropout."""
    torch.manual_seed(0)
    config = RobertaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                           intermediate_size=4 * width, vocab_size=vocabulary,
                           max_position_embeddings=length + 2, type_vocab_size=1)
    return RobertaForSpans(config).train()


def batch(rows, length, vocabulary):
    """Rows of one window each, where the last tenth of each row is padding."""
    ids = torch.randint(3, vocabulary, (rows, length), dtype=torch.int32)
    positions = torch.arange(2, length + 2, dtype=torch.int32).repeat(rows, 1)
    windows = torch.ones(rows, length, dtype=torch.int32)
    windows[:, length - length // 10:] = 0
    answers = torch.randint(0, length // 2, (2, rows, 1), dtype=torch.int32)
    return ids, positions, windows, answers[0], answers[1], torch.ones(rows, 1)


def plain_step(model, micro_batch, accumulation, half):
    """A hand-written training step; half precision is autocast to bfloat16, as is customary."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4,
        fused=hasattr(torch, "_fused_adamw_") and torch.__version__ >= "2.4")

    def step(tensors):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            for parts in zip(*(t.split(micro_batch) for t in tensors)):
                (model(*parts) / accumulation).backward()
        optimizer.step()
    return step


def host_step(model, accumulation, half):
    """The same training step through poptorch_host."""
    options = poptorch.Options()
    options.Training.gradientAccumulation(accumulation)
    model = model.half() if half else model
    executor = poptorch.trainingModel(
        model, options, poptorch.optim.AdamW(model.parameters(), lr=1e-4, loss_scaling=64.0))
    return lambda tensors: executor(*tensors)


def main() -> None:
    """Measure every shape and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="how long to measure each shape")
    seconds = parser.parse_args().seconds
    random.seed(0)
    torch.set_num_threads(1)  # with more, waiting for another thread counts as processor time
    print(f"poptorch_host against a plain PyTorch loop, one thread; {machine()}")
    for name, shape in SHAPES.items():
        _, _, _, vocabulary, length, micro_batch, accumulation, precision = shape
        model, half = make(*shape), precision == torch.float16
        steps = {
            name: plain_step(copy.deepcopy(model), micro_batch, accumulation, half)
            for name in ("plain", "plain again")}
        steps["host"] = host_step(model, accumulation, half)
        tensors = batch(micro_batch * accumulation, length, vocabulary)
        times: Dict[str, List[float]] = {kind: [] for kind in steps}
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(times["host"]) < 3:
            for kind in random.sample(list(steps), len(steps)):
                began = time.process_time()
                steps[kind](tensors)
                times[kind].append(time.process_time() - began)
        plain, again, host = (statistics.median(times[kind][1:]) for kind in steps)
        print(f"{name}: plain {1e3 * plain:.1f} ms, poptorch_host {1e3 * host:.1f} ms "
              f"of processor time a step ({len(times['host'])} steps each)")
        compare(1.03 * (plain + again) / 2 / host, 1,
                f"ratio {2 * host / (plain + again):.3f} "
                f"(two plain loops: {again / plain:.3f}), 1.03 over it")


if __name__ == "__main__":
    main()
