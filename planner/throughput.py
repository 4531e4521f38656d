"""Predicts the seconds of each stage, of the copies between IPUs, of the update and of the host."""
from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

from planner.job import Job
from planner.machine import INFERENCE_CALL_SECONDS, LINK_SHARE, Efficiencies
from planner.schedule import StageWork
from planner.totals import Totals, stage_totals


def stage_work(job: Job, efficiencies: Efficiencies) -> List[StageWork]:
    """Return the StageWork of each forward stage, in order: its seconds for one micro-batch."""
    stages = job.stages()
    return [
        StageWork(ipu, *stage_seconds(job, efficiencies, stage_totals(blocks), index, len(stages)))
        for index, (ipu, blocks) in enumerate(stages)]


def stage_seconds(job: Job, efficiencies: Efficiencies, totals: Totals, index: int,
                  stages: int) -> Tuple[Any, Any, Any]:
    """Return (forward, recompute, backward) seconds of a stage for one micro-batch.

    totals: of the stage, or of all possible stages; in that case the results are arrays, too.
    index: of the stage among the `stages` of the pipeline. See machine.Efficiencies for the
    formula; float32 elements take twice as long, since they are twice as wide.

    The backward pass ends with adding the gradient of each parameter to its accumulator.

    Recomputation repeats the forward pass, except for the operations between the last checkpoint
    and the loss, which PopART does not recompute (popart, transforms/pipeline.cpp,
    setFinalFwdStageRecomputation). These are the last encoder layer and the QA head, because the
    output of the last layer is no checkpoint, or without checkpoints the whole last stage. Without
    a pipeline, on one IPU, PopTorch does not turn on recomputation (poptorch,
    popart_compiler/source/Compiler.cpp).
    """
    machine = job.machine
    width = job.element_bytes / 2

    def seconds(flops: Any, matmuls: Any, elements: Any) -> Any:
        cycles = (matmuls * efficiencies.matmul_cycles +
                  elements * width * efficiencies.element_cycles / machine.tiles)
        return (flops / (machine.flops(job.precision) * efficiencies.peak_utilisation) +
                cycles / machine.clock_hz)

    forward = seconds(totals.forward_flops, totals.forward_matmuls, totals.forward_elements)
    if not job.training:
        return forward, 0 * forward, 0 * forward
    again = forward
    if index == stages - 1:
        if stages > 1 and job.config.recompute_checkpoint_every_layer:
            again = forward - seconds(totals.tail_forward_flops, totals.tail_forward_matmuls,
                                      totals.tail_forward_elements)
        else:
            again = 0 * forward
    return forward, again, seconds(totals.backward_flops, totals.backward_matmuls,
                                   totals.backward_elements + totals.parameters)


def copy_seconds(job: Job) -> float:
    """Return the seconds of the copies between IPUs that end a step.

    The IPU that sends most determines the time.
    """
    return max(sent_bytes(job).values()) / (job.machine.link_bytes_per_second * LINK_SHARE)


def sent_bytes(job: Job) -> Dict[int, int]:
    """Return {IPU: bytes that it sends to other IPUs in a step}.

    Each IPU sends what the next stage takes and, in training, the gradients of what it has taken
    back to the previous one.
    """
    stages = job.stages()
    sent: Dict[int, int] = dict.fromkeys((ipu for ipu, _ in stages), 0)
    for (ipu, _), (following, blocks) in zip(stages, stages[1:]):
        sent[ipu] += blocks[0].input_bytes
        sent[following] += blocks[0].input_bytes if job.training else 0
    return sent


def update_seconds(job: Job) -> Tuple[float, float]:
    """Return the seconds of (gradient reduction over the replicas, weight update).

    Both are those of the slowest IPU, the one with most parameters.
    """
    return update_seconds_of(job, _most_parameters(job))


def between_hosts_seconds(job: Job, parameters: Optional[int] = None) -> float:
    """Return the part of the gradient reduction that travels between the racks of several hosts.

    parameters: of an IPU; by default of the one with most. Assumed is a reduction in phases: a
    reduce-scatter within each rack over its IPU-Links, a ring all-reduce of each IPU's share over
    the GW-Links, and an all-gather within each rack. No published run tells how good this is.
    """
    racks = min(job.hosts, job.config.replication_factor)
    if not job.training or racks == 1:
        return 0.0
    parameters = _most_parameters(job) if parameters is None else parameters
    share = parameters * job.element_bytes * racks / job.config.replication_factor
    return 2 * (racks - 1) / racks * share / job.machine.gateway_bytes_per_second


def _most_parameters(job: Job) -> int:
    parameters: Dict[int, int] = {}
    for ipu, blocks in job.stages():
        parameters[ipu] = parameters.get(ipu, 0) + sum(block.parameters for block in blocks)
    return max(parameters.values())


def update_seconds_of(job: Job, parameters: int) -> Tuple[float, float]:
    """Return what `update_seconds` does, for an IPU with the given number of parameters.

    A ring all-reduce over R replicas moves 2 (R - 1) / R of the gradients over each IPU's links
    (Patarasuk and Yuan 2009). Over several hosts, R are those of one of them, and what travels
    between hosts is added (`between_hosts_seconds`). Optimizer state off chip is read from and
    written back to streaming memory. State on chip passes through the exchange, as weights and
    gradients do.
    """
    if not job.training:
        return 0.0, 0.0
    machine = job.machine
    replicas = max(1, job.config.replication_factor // job.hosts)
    reduction = between_hosts_seconds(job, parameters) + (
        2 * (replicas - 1) / replicas * parameters * job.element_bytes /
        (machine.link_bytes_per_second * LINK_SHARE))
    state = 2 * parameters * job.state_bytes_per_parameter()
    rate = (machine.streaming_bytes_per_second if job.config.optimizer_state_offchip else
            machine.exchange_bytes_per_second)
    return (reduction, state / rate +
            2 * parameters * job.element_bytes / machine.exchange_bytes_per_second)


def host_seconds(job: Job, efficiencies: Efficiencies) -> float:
    """Return the seconds that the host adds to one weight update, or to one inference call.

    Of several hosts each has an instance, and feeds its own replicas at the same time.
    """
    tokens = job.rows_per_update * job.max_seq_length / job.hosts
    call = (efficiencies.call_seconds / job.config.device_iterations if job.training else
            INFERENCE_CALL_SECONDS)
    return call + efficiencies.token_seconds * tokens
