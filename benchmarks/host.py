"""poptorch_host: its overhead, two processes, and neighbours on the same processors."""
from __future__ import annotations

import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Dict

import torch

import poptorch_host as poptorch
from benchmarks.measure import python, run
from benchmarks.training import trainer_on_demo
from planner.flags import MODELS
from runtime.processes import gather_rows, join, place

# name: (width, layers, heads, vocabulary, row length, micro-batch, accumulation, precision)
SHAPES = {
    "demo": (128, 4, 4, 2000, 64, 8, 4, torch.float32),
    "roberta-base, 2 layers, float32": (768, 2, 12, 8000, 384, 2, 4, torch.float32),
    "roberta-base, 2 layers, half": (768, 2, 12, 8000, 384, 2, 4, torch.float16),
}
BASE = (768, 2, 12, 50265, 384)  # two layers of roberta-base with its whole vocabulary


def make(width, layers, heads, vocabulary, length, *unused):
    """Return a model on one IPU, with roberta-base's dropout."""
    from transformers import RobertaConfig

    from qa.model.roberta import RobertaForSpans

    torch.manual_seed(0)
    return RobertaForSpans(RobertaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, vocab_size=vocabulary, max_position_embeddings=length + 2,
        type_vocab_size=1)).train()


def batch(rows, length, vocabulary):
    """Return rows of one window each, where the last tenth of each row is padding."""
    ids = torch.randint(3, vocabulary, (rows, length), dtype=torch.int32)
    positions = torch.arange(2, length + 2, dtype=torch.int32).repeat(rows, 1)
    windows = torch.ones(rows, length, dtype=torch.int32)
    windows[:, length - length // 10:] = 0
    labels = torch.randint(0, length // 2, (2, rows, 1), dtype=torch.int32)
    return ids, positions, windows, labels[0], labels[1], torch.ones(rows, 1)


def host_overhead(seconds=20.0) -> None:
    """A training step of poptorch_host, against a hand-written loop over the same micro-batches.

    Processor time of one thread, of models of the demo's size and of two layers of roberta-base;
    half precision of the plain loop is autocast to bfloat16. A second plain loop shows the noise.
    """
    torch.set_num_threads(1)  # with more, waiting for another thread counts as processor time
    for name, shape in SHAPES.items():
        vocabulary, length, micro_batch, accumulation, precision = shape[3:]
        model, half = make(*shape), precision == torch.float16
        tensors = batch(micro_batch * accumulation, length, vocabulary)
        sides = {side: plain_step(copy.deepcopy(model), micro_batch, accumulation, half)
                 for side in ("plain again", "plain")}
        sides["poptorch_host"] = host_step(model, accumulation, half)
        rounds = time_of(partial(sides["plain"], tensors)) + time_of(
            partial(sides["poptorch_host"], tensors))
        print(f" {name}")
        run({side: partial(time_of, partial(step, tensors)) for side, step in sides.items()},
            {"plain": 1 / 1.03}, runs=max(3, round(seconds / rounds / 1.5)), unit="steps")


def deberta_attention(rows=4, length=384, runs=9) -> None:
    """Attention of a layer of deberta-v3-base, forward and backward, against transformers' own."""
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    from qa.model import deberta, roberta

    config = AutoConfig.for_model(**{**MODELS["deberta-v3-base"], "num_hidden_layers": 1})
    ours = roberta.model_class(config)(config).train()
    encoder = AutoModelForQuestionAnswering.from_config(config).train().deberta.encoder
    hidden = torch.randn(rows, length, config.hidden_size, requires_grad=True)
    ids = torch.ones(rows, length, dtype=torch.int32)

    def transformers() -> None:
        mixed = encoder.layer[0].attention.self(
            hidden, encoder.get_attention_mask(ids), relative_pos=encoder.get_rel_pos(hidden),
            rel_embeddings=encoder.get_rel_embedding())
        (mixed[0] if isinstance(mixed, tuple) else mixed).sum().backward()

    def own() -> None:
        ours.layers[0].self_attention(
            hidden, ours.kernels.window_mask(ids, hidden.dtype),
            deberta.embeddings_of_distances(ours.base_model.encoder, config, ids).flip(0)
        ).sum().backward()

    run({"transformers": transformers, "this program": own}, {"transformers": 1}, runs=runs,
        amount=rows, unit="rows")


def time_of(step) -> float:
    """Return the processor time of a call, in seconds."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def plain_step(model, micro_batch, accumulation, half):
    """Return a hand-written training step: tensors of a whole update -> None."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=torch.__version__ >= "2.4")

    def step(tensors):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            for parts in zip(*(t.split(micro_batch) for t in tensors)):
                (model(*parts) / accumulation).backward()
        optimizer.step()
    return step


def host_step(model, accumulation, half, replicas=1, process=(0, 1)):
    """Return the same training step through poptorch_host, which returns the losses."""
    options = poptorch.Options()
    options.Training.gradientAccumulation(accumulation)
    options.replicationFactor(replicas)
    options.Distributed.configureProcessId(*process)
    options.outputMode(poptorch.OutputMode.All)
    options.randomSeed(0)
    model = model.half() if half else model
    executor = poptorch.trainingModel(
        model, options, poptorch.optim.AdamW(model.parameters(), lr=1e-4, loss_scaling=64.0))
    return lambda tensors: executor(*tensors)


def processes(steps=3, accumulation=16, runs=1) -> None:
    """Two replicas in two processes of torchrun, against both in one process, one thread each.

    Two layers of roberta-base with all of its vocabulary and rows of 384 tokens. accumulation:
    micro-batches of an update on each replica. Both have to return the same losses.
    """
    losses = {}

    def job(count: int) -> float:
        printed = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
                         "-m", "benchmarks", "process", "--steps", steps, "--accumulation",
                         accumulation, environment={"OMP_NUM_THREADS": "1"})
        seconds, losses[count] = json.loads(printed.splitlines()[-1])
        return seconds

    run({"one process": partial(job, 1), "two processes": partial(job, 2)}, {"one process": 1.7},
        runs=runs, amount=2 * accumulation, unit="windows", warm_up=False)
    print(f"  losses equal: {losses[1] == losses[2]}")


def process(steps=3, accumulation=16) -> None:
    """Run the job of `processes` in this process, one of RANK .. WORLD_SIZE."""
    join()
    index, count, *_ = place()
    torch.set_num_threads(1)
    step = host_step(make(*BASE), accumulation, half=True, replicas=2 // count,
                     process=(index, count))
    torch.manual_seed(1)
    rows = [each.view(accumulation, 2, *each.shape[1:]).chunk(count, dim=1)[index].flatten(0, 1)
            for each in batch(2 * accumulation, BASE[4], BASE[3])]
    seconds = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        losses = step(rows)
        seconds.append(time.perf_counter() - begin)
    losses = gather_rows(losses, 1)
    print(json.dumps([statistics.median(seconds[1:]), losses.tolist()]))


# The default of libgomp where OMP_WAIT_POLICY is not set (its manual); ipu_options sets less.
SPINNING = {"OMP_NUM_THREADS": str(os.cpu_count()), "GOMP_SPINCOUNT": "300000"}


def busy(steps=60, runs=3) -> None:
    """The demo's training with a busy neighbour on each processor, against a quiet machine.

    By train.py, whose threads poptorch_host chooses; by the same with OpenMP's default threads,
    which spin while they wait; and by Trainer.
    """
    from qa.data.demo import write_demo

    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder, seed=0)
        ours = ["train.py", "--config", "demo", "--do_train"]
        for side, least, command, updates, environment in (
                ("train.py", 1 / 2.5, ours, steps, {}),
                # With neighbours it can take a hundred times as long.
                ("train.py, OpenMP's default", None, ours, max(1, steps // 10), SPINNING),
                ("Trainer", None, trainer_on_demo(folder), steps, {})):
            window = partial(seconds_per_window, folder, command, updates, environment)
            run({f"{side}, quiet": window,
                 f"{side}, busy": partial(window, neighbours=os.cpu_count())},
                {f"{side}, quiet": least}, runs=runs, unit="windows", warm_up=False)


def seconds_per_window(folder: Path, command, updates: int, environment: Dict[str, str],
                       neighbours: int = 0) -> float:
    """Train for some weight updates; return the seconds that a window takes in the loop."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
              for _ in range(neighbours)]
    try:
        printed = python(*command, "--max_steps", updates, "--output_dir", folder / "out",
                         environment=environment)
    finally:
        for other in others:
            other.kill()
            other.wait()
    if command[0] == "train.py":
        results = json.loads((folder / "out" / "train_results.json").read_text(encoding="utf-8"))
        return 1 / results["windows_per_second"]
    return 1 / float(re.search(r"(\S+) windows/s", printed).group(1))
