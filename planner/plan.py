"""Makes the plan of one job: memory, schedule and throughput."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Dict, Optional

from planner import throughput
from planner.job import Job
from planner.machine import Efficiencies
from planner.memory import ipu_memory
from planner.phase import TRAINING
from planner.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """The predicted memory and time of a job, in bytes and seconds."""

    job: Job
    efficiencies: Efficiencies
    memory: Dict[int, Dict[str, int]]   # {IPU of a replica: {category: bytes}}
    schedule: Schedule
    reduction_seconds: float            # of the gradients, over the replicas of a host
    between_hosts_seconds: float        # of the gradients, over the hosts
    weight_update_seconds: float
    host_seconds: float                 # that the host adds to each weight update or call

    @property
    def fullest_ipu(self) -> int:
        """The IPU that needs most memory."""
        return max(self.memory, key=lambda ipu: sum(self.memory[ipu].values()))

    @property
    def free_bytes(self) -> int:
        """Memory that is left on the fullest IPU; below 0 if it needs more than it has."""
        return self.job.machine.memory_bytes - sum(self.memory[self.fullest_ipu].values())

    @property
    def fits(self) -> bool:
        """Whether every IPU stays within its memory."""
        return self.free_bytes >= 0

    @property
    def update_seconds(self) -> float:
        """Time from one weight update, or inference call, to the next, including the host."""
        return (self.schedule.seconds + self.reduction_seconds + self.between_hosts_seconds +
                self.weight_update_seconds + self.host_seconds)

    @property
    def rows_per_second(self) -> float:
        """Rows of all replicas per second."""
        return self.job.rows_per_update / self.update_seconds

    @property
    def windows_per_second(self) -> float:
        """Real windows of all replicas per second: rows times the windows in each."""
        return self.rows_per_second * self.job.windows_per_row

    @property
    def run_seconds(self) -> Optional[float]:
        """Time of the run without compilation and evaluation; None if its windows are not known."""
        job = self.job
        if job.updates is not None:
            return job.updates * self.update_seconds
        if job.windows is None:
            return None
        updates = math.ceil(job.windows / job.windows_per_update)  # of an epoch; or calls
        if job.training:  # in whole calls, as TrainingRows counts them
            calls = math.ceil(math.ceil(job.epochs * updates) / job.config.device_iterations)
            updates = calls * job.config.device_iterations
        return updates * self.update_seconds

    def parts(self) -> Dict[str, float]:
        """Return {part: seconds} of a weight update; work and waiting are means over the IPUs."""
        schedule, batches, ipus = self.schedule, self.job.micro_batches, len(self.memory)
        mean = {kind: batches * sum(getattr(work, kind) for work in schedule.stages) / ipus
                for kind in TRAINING.kinds}
        slowest = schedule.step_seconds - schedule.copy_seconds
        return {
            **mean, "waiting for the slowest IPU": batches * slowest - sum(mean.values()),
            "pipeline ramp": (schedule.steps - batches) * slowest,
            "copies between IPUs": schedule.steps * schedule.copy_seconds,
            "gradient reduction": self.reduction_seconds,
            "gradient reduction between hosts": self.between_hosts_seconds,
            "weight update": self.weight_update_seconds, "host": self.host_seconds}


def make_plan(job: Job, efficiencies: Efficiencies = Efficiencies()) -> Plan:
    """Return the Plan of `job`; efficiencies: by default those fitted to published runs."""
    schedule = Schedule(throughput.stage_work(job, efficiencies), job.micro_batches,
                        throughput.copy_seconds(job), job.phase)
    return Plan(job, efficiencies, ipu_memory(job, efficiencies.code_bytes), schedule,
                *throughput.update_seconds(job, throughput.most_parameters(job)),
                sum(throughput.host_parts(job, efficiencies)))


def latency_seconds(plan: Plan) -> float:
    """Return the seconds of one row through one stage after the other (ShardedExecution)."""
    one = make_plan(plan.job.changed(micro_batch_size=1, device_iterations=1, replication_factor=1),
                    plan.efficiencies)
    stages = one.schedule.stages
    return (sum(work.forward for work in stages) +
            (len(stages) - 1) * one.schedule.copy_seconds + one.host_seconds)
