"""Predicts the seconds of each stage, of the copies between IPUs, of the update and of the host."""
from __future__ import annotations

from typing import Any, Dict, List, Tuple

import numpy as np

from planner.job import Job
from planner.machine import INFERENCE_CALL_SECONDS, LINK_SHARE, Efficiencies
from planner.matmul import serial_bytes
from planner.schedule import StageWork
from planner.totals import Totals, stage_totals


def stage_work(job: Job, efficiencies: Efficiencies) -> List[StageWork]:
    """Return the StageWork of each forward stage, in order: its seconds for one micro-batch."""
    stages = job.stages()
    return [
        StageWork(ipu, *map(float, stage_seconds(
            job, efficiencies, stage_totals(blocks), job.config.matmul_shares()[ipu], index,
            len(stages))))
        for index, (ipu, blocks) in enumerate(stages)]


def stage_seconds(job: Job, efficiencies: Efficiencies, totals: Totals, matmul_proportion: float,
                  index: int, stages: int) -> Tuple[Any, Any, Any]:
    """Return (forward, recompute, backward) seconds of stage `index` of `stages` for a micro-batch.

    totals: of the stage, or arrays of all possible stages, as the results then are. The formula is
    that of machine.Efficiencies; float32 elements are twice as wide and take twice as long. The
    backward pass ends with adding the gradient of each parameter to its accumulator.

    Recomputation repeats the forward pass but for what lies between the last checkpoint and the
    loss (popart, transforms/pipeline.cpp, setFinalFwdStageRecomputation): the last encoder layer
    and the QA head, without checkpoints the whole last stage. On one IPU, without a pipeline,
    PopTorch does not turn on recomputation (poptorch, popart_compiler/source/Compiler.cpp).
    """
    machine = job.machine
    large = totals.large_flops / np.maximum(1.0 * totals.forward_flops + totals.backward_flops, 1)

    def seconds(part: str, more_elements: Any = 0) -> Any:
        flops, matmuls, elements = (
            getattr(totals, f"{part}_{count}") for count in ("flops", "matmuls", "elements"))
        exchanged = serial_bytes(job, large * flops, totals.matmul_flops, matmul_proportion)
        cycles = (matmuls * efficiencies.matmul_cycles + (
            (elements + more_elements) * job.element_bytes / 2 * efficiencies.element_cycles +
            exchanged * efficiencies.exchange_cycles) / machine.tiles)
        return (flops / (machine.flops(job.precision) * efficiencies.peak_utilisation) +
                cycles / machine.clock_hz)

    forward = seconds("forward")
    if not job.training:
        return forward, 0 * forward, 0 * forward
    again = forward
    if index == stages - 1:
        by_layer = stages > 1 and job.config.recompute_checkpoint_every_layer
        again = forward - seconds("tail_forward") if by_layer else 0 * forward
    return forward, again, seconds("backward", totals.parameters)


def copy_seconds(job: Job) -> float:
    """Return the seconds of the copies that end a step: those of the IPU that sends most."""
    return max(sent_bytes(job).values()) / (job.machine.link_bytes_per_second * LINK_SHARE)


def sent_bytes(job: Job) -> Dict[int, int]:
    """Return {IPU: bytes that it sends in a step}: stages' inputs, and their gradients back."""
    stages = job.stages()
    sent: Dict[int, int] = dict.fromkeys((ipu for ipu, _ in stages), 0)
    for (ipu, _), (following, blocks) in zip(stages, stages[1:]):
        sent[ipu] += blocks[0].input_bytes
        sent[following] += blocks[0].input_bytes if job.training else 0
    return sent


def most_parameters(job: Job) -> int:
    """Return the parameters of the IPU that has most."""
    parameters: Dict[int, int] = {}
    for ipu, blocks in job.stages():
        parameters[ipu] = parameters.get(ipu, 0) + sum(block.parameters for block in blocks)
    return max(parameters.values())


def update_seconds(job: Job, parameters: int) -> Tuple[float, float, float]:
    """Return what an IPU with so many parameters takes at the end of a weight update, in seconds.

    They are those of (gradient reduction, gradient reduction between hosts, weight update). A ring
    all-reduce over R replicas, those of one host, moves 2 (R - 1) / R of the gradients over each
    IPU's links (Patarasuk and Yuan 2009). Assumed are a reduce-scatter within each rack over its
    IPU-Links, a ring all-reduce of each IPU's share over the GW-Links, and an all-gather within
    each rack: no published run tells how good this is. Optimizer state off chip is read from and
    written to streaming memory. State on chip passes through the exchange, as weights and gradients
    do.
    """
    if not job.training:
        return 0.0, 0.0, 0.0
    machine, replicas = job.machine, job.config.replication_factor
    racks, of_rack = min(job.hosts, replicas), max(1, replicas // job.hosts)
    share = parameters * job.element_bytes * racks / replicas
    state = 2 * parameters * job.state_bytes_per_parameter()
    rate = (machine.streaming_bytes_per_second if job.config.optimizer_state_offchip else
            machine.exchange_bytes_per_second)
    return (2 * (of_rack - 1) / of_rack * parameters * job.element_bytes /
            (machine.link_bytes_per_second * LINK_SHARE),
            2 * (racks - 1) / racks * share / machine.gateway_bytes_per_second,
            state / rate + 2 * parameters * job.element_bytes / machine.exchange_bytes_per_second)


def host_parts(job: Job, efficiencies: Efficiencies) -> Tuple[float, float]:
    """Return the seconds that a host adds to a weight update or call: (its call, its tokens)."""
    tokens = job.rows_per_update * job.max_seq_length / job.hosts
    call = (efficiencies.call_seconds / job.config.device_iterations if job.training else
            INFERENCE_CALL_SECONDS)
    return call, efficiencies.token_seconds * tokens
