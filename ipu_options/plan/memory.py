"""In-Processor-Memory of each IPU, category by category, in bytes.

What is always there: weights, gradient accumulators, optimizer state on chip, the stash of waiting
micro-batches, code. What comes and goes, counted at its largest: the activations of what is
recomputed, temporaries of matrix multiplications, the slice of the embedding's gradient; and, at
another time, optimizer state streamed in for the weight update.
"""
from __future__ import annotations

from typing import Any, Dict, List

import numpy as np

from ipu_options.plan.job import Job
from ipu_options.plan.schedule import stash_depth
from ipu_options.plan.totals import Totals, stage_totals

ALWAYS = ("weights", "gradients", "optimizer_state", "stash", "code")
IN_STEP = ("activations", "matmul_temporaries", "embedding_gradient")
CATEGORIES = ALWAYS + IN_STEP + ("update_temporaries",)
# Rearranged operands and partial sums of a matrix multiplication, in multiples of its operands and
# result. An estimate: the memory proportion is the limit that Poplar keeps, and it plans within it.
MATMUL_COPIES = 8


def ipu_memory(job: Job, code_bytes: int) -> Dict[int, Dict[str, int]]:
    """Bytes by IPU (of one replica) and category (CATEGORIES).  code_bytes: code and exchange code
    of one IPU.
    """
    stages = job.stages()
    memory: Dict[int, Dict[str, int]] = {}
    for index, (ipu, blocks) in enumerate(stages):
        stage = stage_memory(job, stage_totals(blocks),
                             job.config.matmul_shares()[ipu], index, len(stages), code_bytes)
        memory[ipu] = join(memory[ipu], stage) if ipu in memory else stage
    return {ipu: {name: int(memory[ipu][name]) for name in CATEGORIES} for ipu in sorted(memory)}


def stage_memory(job: Job, totals: Totals, matmul_proportion: float, index: int, stages: int,
                 code_bytes: int) -> Dict[str, Any]:
    """Bytes by category of forward stage `index` of `stages`, with its backward stage, alone on an
    IPU.

    totals: of the stage, or of all possible stages (then each category is an array).
    """
    config, size, state = job.config, job.element_bytes, job.state_bytes_per_parameter()
    if config.recompute_checkpoint_every_layer:
        waiting, live = totals.checkpoint_bytes, totals.most_saved_bytes
    else:  # PopART recomputes a stage from its inputs, but for the last one, which goes backward at once
        waiting, live = (0 if index == stages - 1 else totals.input_bytes), totals.saved_bytes
    memory = {
        "weights": totals.parameters * size,
        "gradients": totals.parameters * size,
        "optimizer_state": 0 if config.optimizer_state_offchip else totals.parameters * state,
        "stash": stash_depth(index, stages) * waiting,
        "code": code_bytes,
        "activations": live + 2 * totals.output_bytes,  # and a gradient coming in and going out
        "matmul_temporaries": np.minimum(matmul_proportion * job.machine.memory_bytes,
                                         MATMUL_COPIES * totals.matmul_bytes),
        "embedding_gradient": totals.embedding_parameter * size, }
    memory["update_temporaries"] = _beyond_step(
        memory, totals.largest_parameter * state if config.optimizer_state_offchip else 0)
    return memory


def join(one: Dict[str, Any], other: Dict[str, Any]) -> Dict[str, Any]:
    """Two stages on one IPU: what is always there adds up (but for the code, one program), what
    comes and goes shares its place.
    """
    memory = {
        name: one[name] + other[name] if name in ALWAYS else max(one[name], other[name])
        for name in CATEGORIES}
    memory["code"] = one["code"]
    update = max(stage["update_temporaries"] + _in_step(stage) for stage in (one, other) if stage["update_temporaries"]) \
        if one["update_temporaries"] or other["update_temporaries"] else 0
    memory["update_temporaries"] = _beyond_step(memory, update)
    return memory


def reasons(job: Job, memory: Dict[int, Dict[str, int]]) -> List[str]:
    """One line for each IPU that does not fit: by how much, and its largest category."""
    lines = []
    for ipu, parts in memory.items():
        over = sum(parts.values()) - job.machine.memory_bytes
        if over > 0:
            name = max(parts, key=lambda category: parts[category])
            lines.append(
                f"IPU {ipu} is over by {over / 2**20:.0f} MiB; its largest part is {name.replace('_', ' ')}, "
                f"{parts[name] / 2**20:.0f} MiB")
    return lines


def _in_step(memory: Dict[str, Any]) -> Any:
    return sum(memory[name] for name in IN_STEP)


def _beyond_step(memory: Dict[str, Any], update: Any) -> Any:
    """What the weight update needs beyond the memory that the pipeline's steps have just left free.
    """
    return np.maximum(0, update - _in_step(memory))
