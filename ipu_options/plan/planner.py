"""Makes the plan of one job: memory, schedule and throughput."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional

from ipu_options.plan.job import Job
from ipu_options.plan.machine import Efficiencies
from ipu_options.plan.memory import ipu_memory
from ipu_options.plan.schedule import KINDS, Schedule, StageWork, bubble_fraction, simulate
from ipu_options.plan.throughput import copy_seconds, host_seconds, stage_work, update_seconds


@dataclass(frozen=True)
class Plan:
    """The predicted memory and time of a job, in bytes and seconds.

    memory: {IPU of a replica: {category: bytes}}. work: of each forward stage, in order.
    copy_seconds: of the copies between IPUs that end a step. reduction_seconds: of the gradients'
    reduction over the replicas. host_seconds: time that the host adds to each weight update.
    """

    job: Job
    efficiencies: Efficiencies
    memory: Dict[int, Dict[str, int]]
    work: List[StageWork]
    copy_seconds: float
    schedule: Schedule
    reduction_seconds: float
    weight_update_seconds: float
    host_seconds: float

    @property
    def fits(self) -> bool:
        """Whether every IPU stays within its memory."""
        limit = self.job.machine.memory_bytes
        return all(sum(parts.values()) <= limit for parts in self.memory.values())

    @property
    def update_seconds(self) -> float:
        """Time from one weight update to the next, including the host."""
        return (self.schedule.seconds + self.reduction_seconds + self.weight_update_seconds +
                self.host_seconds)

    @property
    def rows_per_second(self) -> float:
        """Rows of all replicas per second."""
        return self.job.rows_per_update / self.update_seconds

    @property
    def windows_per_second(self) -> float:
        """Real windows of all replicas per second: rows times the windows in each."""
        return self.rows_per_second * self.job.windows_per_row

    @property
    def bubble_fraction(self) -> float:
        """Share of the steps in which a stage is idle because of ramp-up and ramp-down."""
        return bubble_fraction(len(self.work), self.job.config.gradient_accumulation_steps)

    @property
    def training_seconds(self) -> Optional[float]:
        """Time of all epochs without compilation and evaluation; None if train_windows is."""
        if self.job.train_windows is None:
            return None
        return self.job.epochs * self.job.train_windows / self.windows_per_second

    def load(self) -> Dict[int, float]:
        """Return {IPU: seconds of work that one micro-batch means for it}."""
        return {
            ipu: sum(work.seconds for work in self.work if work.ipu == ipu) for ipu in self.memory}

    def parts(self) -> Dict[str, float]:
        """Return {part: seconds} of the time of a weight update; the sum is update_seconds.

        Work is the mean over the IPUs of a replica. "waiting for the slowest IPU" is the time that
        an average IPU is idle within the steps because the slowest one takes longer.
        """
        steps, batches = self.schedule.steps, self.job.config.gradient_accumulation_steps
        ipus = len(self.memory)
        mean = {
            kind: batches * sum(getattr(work, kind) for work in self.work) / ipus for kind in KINDS}
        slowest = self.schedule.step_seconds - self.copy_seconds
        return {
            **mean, "waiting for the slowest IPU": batches * slowest - sum(mean.values()),
            "pipeline ramp": (steps - batches) * slowest,
            "copies between IPUs": steps * self.copy_seconds,
            "gradient reduction": self.reduction_seconds,
            "weight update": self.weight_update_seconds, "host": self.host_seconds}


def make_plan(job: Job, efficiencies: Efficiencies = Efficiencies()) -> Plan:
    """Return the Plan of `job`; efficiencies: by default those fitted to published runs."""
    work = stage_work(job, efficiencies)
    copies = copy_seconds(job)
    schedule = simulate(work, job.micro_batches, copies, job.training)
    return Plan(job, efficiencies, ipu_memory(job, efficiencies.code_bytes), work, copies, schedule,
                *update_seconds(job), host_seconds(job, efficiencies))


def with_config(job: Job, **changes: Any) -> Job:
    """Return a copy of the job with `changes` to the fields of its IPU configuration."""
    return replace(job, config=replace(job.config, **changes))
