"""One job's plan: memory, schedule, throughput, and the change that would help most."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional

from ipu_options.plan.job import Job
from ipu_options.plan.machine import Efficiencies
from ipu_options.plan.memory import ipu_memory, reasons
from ipu_options.plan.schedule import KINDS, Schedule, StageWork, bubble_fraction, simulate
from ipu_options.plan.throughput import copy_seconds, stage_work, update_seconds


@dataclass(frozen=True)
class Plan:
    """What a job will take. Seconds and bytes throughout; memory is by IPU of a replica and category."""

    job: Job
    efficiencies: Efficiencies
    memory: Dict[int, Dict[str, int]]
    work: List[StageWork]
    copy_seconds: float
    schedule: Schedule
    reduction_seconds: float
    weight_update_seconds: float
    host_seconds: float  # of the host, for each weight update

    @property
    def fits(self) -> bool:
        limit = self.job.machine.memory_bytes
        return all(sum(parts.values()) <= limit for parts in self.memory.values())

    @property
    def update_seconds(self) -> float:
        """From one weight update to the next, all in."""
        return self.schedule.seconds + self.reduction_seconds + self.weight_update_seconds + self.host_seconds

    @property
    def rows_per_second(self) -> float:
        return self.job.rows_per_update / self.update_seconds

    @property
    def windows_per_second(self) -> float:
        """Real windows: rows times the windows in each."""
        return self.rows_per_second * self.job.windows_per_row

    @property
    def bubble_fraction(self) -> float:
        return bubble_fraction(len(self.work), self.job.config.gradient_accumulation_steps)

    @property
    def training_seconds(self) -> Optional[float]:
        """Of all epochs, without compilation and evaluation; None if the number of windows is not known."""
        if self.job.train_windows is None:
            return None
        return self.job.epochs * self.job.train_windows / self.windows_per_second

    def parts(self) -> Dict[str, float]:
        """Where the time of a weight update goes, in seconds: they add up to update_seconds. Idle is what the slowest IPU
        of a step makes the average one wait."""
        steps, batches = self.schedule.steps, self.job.config.gradient_accumulation_steps
        ipus = len(self.memory)
        mean = {kind: batches * sum(getattr(work, kind) for work in self.work) / ipus for kind in KINDS}
        slowest = self.schedule.step_seconds - self.copy_seconds
        return {**mean, "waiting for the slowest IPU": batches * slowest - sum(mean.values()),
                "pipeline ramp": (steps - batches) * slowest, "copies between IPUs": steps * self.copy_seconds,
                "gradient reduction": self.reduction_seconds, "weight update": self.weight_update_seconds,
                "host": self.host_seconds}

    def to_dict(self) -> Dict[str, Any]:
        """All of it for machines, units in the names."""
        from ipu_options.plan.advice import suggestion
        job, config = self.job, self.job.config
        limit = job.machine.memory_bytes
        names = {ipu: [name for name, at in job.layout.blocks() if at == ipu] for ipu in self.memory}
        return {
            "fits": self.fits, "windows_per_second": self.windows_per_second, "bubble_fraction": self.bubble_fraction,
            "rows_per_second": self.rows_per_second, "windows_per_row": job.windows_per_row,
            "training_seconds": self.training_seconds, "update_seconds": self.update_seconds,
            "pipeline_steps": self.schedule.steps, "step_seconds": self.schedule.step_seconds,
            "update_parts_seconds": self.parts(), "suggestion": suggestion(self), "why_not": reasons(job, self.memory),
            "ipus": [{"ipu": ipu, "blocks": names[ipu], "total_bytes": sum(parts.values()), "limit_bytes": limit,
                      "fits": sum(parts.values()) <= limit, **{f"{name}_bytes": parts[name] for name in parts},
                      "busy_seconds": busy} for (ipu, parts), busy in zip(self.memory.items(), self.schedule.busy_seconds)],
            "stages": [{"stage": i, "ipu": work.ipu, "blocks": [block.name for block in blocks], "forward_seconds": work.forward,
                        "recompute_seconds": work.recompute, "backward_seconds": work.backward}
                       for i, (work, (_, blocks)) in enumerate(zip(self.work, job.stages()))],
            "blocks": [{"name": block.name, "ipu": ipu, "parameters": block.parameters, "forward_flops": block.forward_flops,
                        "backward_flops": block.backward_flops, "saved_bytes": block.saved_bytes,
                        "output_bytes": block.output_bytes}
                       for block, (_, ipu) in zip(job.blocks, job.layout.blocks())],
            "machine": job.machine.name, "precision": job.precision, "max_seq_length": job.max_seq_length,
            "micro_batch_size": job.micro_batch_size, "rows_per_update": job.rows_per_update,
            "gradient_accumulation_steps": config.gradient_accumulation_steps, "replication_factor": config.replication_factor,
            "ipus_per_replica": config.num_ipus(), "layers_per_ipu": _layers(job),
            "efficiencies": dict(vars(self.efficiencies)),
        }


def make_plan(job: Job, efficiencies: Efficiencies = Efficiencies()) -> Plan:
    """Plan `job` with these efficiencies."""
    work = stage_work(job, efficiencies)
    copies = copy_seconds(job)
    schedule = simulate(work, job.config.gradient_accumulation_steps, copies)
    reduction, update = update_seconds(job)
    host = efficiencies.call_seconds / job.config.device_iterations
    return Plan(job, efficiencies, ipu_memory(job, efficiencies.code_bytes), work, copies, schedule, reduction, update, host)


def with_config(job: Job, **changes: Any) -> Job:
    """The same job with other values in its IPU configuration."""
    return replace(job, config=replace(job.config, **changes))


def _layers(job: Job) -> List[int]:
    return [job.layout.layer_ipus.count(ipu) for ipu in range(job.config.num_ipus())]
