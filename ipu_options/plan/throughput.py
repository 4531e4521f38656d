"""Predicts the seconds of each stage, of the copies between IPUs and of the weight update."""
from __future__ import annotations

from typing import Any, Dict, List, Tuple

from ipu_options.plan.job import Job
from ipu_options.plan.machine import LINK_SHARE, Efficiencies
from ipu_options.plan.schedule import StageWork
from ipu_options.plan.totals import Totals, stage_totals


def stage_work(job: Job, efficiencies: Efficiencies) -> List[StageWork]:
    """Return the StageWork of each forward stage, in order: its seconds for one micro-batch."""
    stages = job.stages()
    return [
        StageWork(ipu, *stage_seconds(job, efficiencies, stage_totals(blocks),
                                      last=index == len(stages) - 1))
        for index, (ipu, blocks) in enumerate(stages)]


def stage_seconds(job: Job, efficiencies: Efficiencies, totals: Totals,
                  last: bool) -> Tuple[Any, Any, Any]:
    """Return (forward, recompute, backward) seconds of a stage for one micro-batch.

    totals: of the stage, or of all possible stages; in that case the results are arrays, too. last:
    whether it is the last forward stage.

    Recomputation repeats the forward pass, except for the operations between the last checkpoint
    and the loss, which PopART does not recompute (popart, transforms/pipeline.cpp,
    setFinalFwdStageRecomputation). Without a checkpoint in every layer, these are all operations of
    the last stage.
    """
    def seconds(flops: Any, matmuls: Any) -> Any:
        rate = job.machine.flops(job.precision) * efficiencies.peak_utilisation
        return flops / rate + matmuls * (efficiencies.matmul_cycles / job.machine.clock_hz)

    forward = seconds(totals.forward_flops, totals.forward_matmuls)
    again = forward
    if last and job.config.recompute_checkpoint_every_layer:
        again = forward - seconds(totals.head_flops, totals.head_matmuls)
    elif last:
        again = 0 * forward
    return forward, again, seconds(totals.backward_flops, totals.backward_matmuls)


def copy_seconds(job: Job) -> float:
    """Return the seconds of the copies between IPUs that end a step.

    Each IPU sends the outputs of its stages on to the next stage, and the gradients of their inputs
    back to the previous one. The IPU that sends most determines the time.
    """
    stages = job.stages()
    sent: Dict[int, int] = dict.fromkeys((ipu for ipu, _ in stages), 0)
    for (ipu, blocks), (following, _) in zip(stages, stages[1:]):
        sent[ipu] += blocks[-1].output_bytes
        sent[following] += blocks[-1].output_bytes
    return max(sent.values()) / (job.machine.link_bytes_per_second * LINK_SHARE)


def update_seconds(job: Job) -> Tuple[float, float]:
    """Return the seconds of (gradient reduction over the replicas, weight update).

    Both are those of the slowest IPU, the one with most parameters.
    """
    parameters: Dict[int, int] = {}
    for ipu, blocks in job.stages():
        parameters[ipu] = parameters.get(ipu, 0) + sum(block.parameters for block in blocks)
    return update_seconds_of(job, max(parameters.values()))


def update_seconds_of(job: Job, parameters: int) -> Tuple[float, float]:
    """Return what `update_seconds` does, for an IPU with the given number of parameters.

    A ring all-reduce over R replicas moves 2 (R - 1) / R of the gradients over each IPU's links
    (Patarasuk and Yuan 2009). Optimizer state off chip is read from and written back to streaming
    memory. State on chip passes through the exchange, as weights and gradients do.
    """
    replicas, machine = job.config.replication_factor, job.machine
    reduction = 2 * (replicas - 1) / replicas * parameters * job.element_bytes / (
        machine.link_bytes_per_second * LINK_SHARE)
    state = 2 * parameters * job.state_bytes_per_parameter()
    rate = (machine.streaming_bytes_per_second if job.config.optimizer_state_offchip else
            machine.exchange_bytes_per_second)
    return (reduction, state / rate +
            2 * parameters * job.element_bytes / machine.exchange_bytes_per_second)
