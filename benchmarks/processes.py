"""Measure two processes against one, on a training job of two layers of roberta-base.

    python -m benchmarks.processes [--steps 3] [--accumulation 16]

Two replicas train with all of roberta-base's vocabulary, rows of 384 tokens, and one thread a
process: in one process one after the other, in two at the same time (started by torchrun). Both do
the same arithmetic and must return the same loss. Prints the time of a step, the share of it that
the exchange of gradients takes, and the ratio of the speeds.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

import poptorch_host as poptorch
from benchmarks.host_overhead import batch, make
from benchmarks.measure import compare, machine
from poptorch_host import _device

SHAPE = (768, 2, 12, 50265, 384)  # width, layers, heads, vocabulary, row length
LEAST = 1.7


def work(steps: int, accumulation: int) -> None:
    """Run the job in this process, one of RANK .. WORLD_SIZE; the first prints its times."""
    index, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group("gloo")
    exchange, reduce = [], _device.sum_over_processes

    def timed(gradients, processes):
        torch.distributed.barrier() if processes > 1 else None  # waiting is no communication
        begin = time.perf_counter()
        total = reduce(gradients, processes)
        exchange.append(time.perf_counter() - begin)
        return total

    _device.sum_over_processes = timed
    options = poptorch.Options()
    options.Training.gradientAccumulation(accumulation)
    options.replicationFactor(2 // count)
    options.Distributed.configureProcessId(index, count)
    options.outputMode(poptorch.OutputMode.All)
    options.randomSeed(0)
    model = make(*SHAPE).half()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=1e-4, loss_scaling=64.0)
    executor = poptorch.trainingModel(model, options, optimizer)
    torch.manual_seed(1)
    everything = [each.view(accumulation, 2, *each.shape[1:])
                  for each in batch(2 * accumulation, SHAPE[4], SHAPE[3])]
    mine = [each.chunk(count, dim=1)[index].flatten(0, 1) for each in everything]
    seconds = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        losses = executor(*mine)
        seconds.append(time.perf_counter() - begin)
    if count > 1:
        parts = [torch.empty_like(losses) for _ in range(count)]
        torch.distributed.all_gather(parts, losses)
        losses = torch.stack(parts, dim=1).flatten()
    if index == 0:
        print(json.dumps({"step": statistics.median(seconds[1:]), "loss": losses.tolist(),
                          "exchange": statistics.median(exchange[1:])}))


def measured(processes: int, arguments: list) -> dict:
    """Return what `work` prints in a job of that many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(processes), "-m", "benchmarks.processes", "--work", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure both jobs and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured, after one")
    parser.add_argument("--accumulation", type=int, default=16,
                        help="micro-batches of a weight update on each of the two replicas")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.steps, arguments.accumulation)
        return
    print(f"two processes against one, one thread each; {machine()}")
    one, two = (measured(count, ["--steps", str(arguments.steps), "--accumulation",
                                 str(arguments.accumulation)]) for count in (1, 2))
    rows = 2 * arguments.accumulation
    for name, job in (("one process", one), ("two processes", two)):
        print(f"  {name}: {job['step']:.2f} s a step, {rows / job['step']:.1f} windows/s, "
              f"exchange of gradients {job['exchange'] / job['step']:.1%}")
    print(f"  losses of the last step equal: {one['loss'] == two['loss']}")
    compare(one["step"] / two["step"], LEAST, "speed of two processes over one")


if __name__ == "__main__":
    main()
