"""Predicts the In-Processor-Memory that each IPU needs, by category, in bytes.

Permanent (ALWAYS): weights, gradient accumulators, optimizer state on chip, the stash of
micro-batches that wait for their backward pass, and code. Temporary in a pipeline step (IN_STEP),
each counted at its largest: activations that are recomputed, temporaries of matrix multiplications,
and the gradient of the word embedding (of one part, if it is serialised). Temporary in the weight
update, which follows the steps: what the optimizer needs for the largest parameter.
"""
from __future__ import annotations

from typing import Any, Dict, List

import numpy as np

from planner.job import Job
from planner.schedule import stash_depth
from planner.totals import Totals, stage_totals

ALWAYS = ("weights", "gradients", "optimizer_state", "stash", "code")
IN_STEP = ("activations", "matmul_temporaries", "embedding_gradient")
CATEGORIES = ALWAYS + IN_STEP + ("update_temporaries",)
# Size of the rearranged operands and the partial sums of a matrix multiplication, as a multiple of
# the size of its operands and result. This is an estimate. Poplar plans a multiplication within
# matmul_proportion, which is therefore the upper limit.
MATMUL_COPIES = 8
# Share of a training program's code that an inference program has: the forward pass without its
# backward pass and the weight update. This is an estimate as well.
INFERENCE_CODE = 0.5


def ipu_memory(job: Job, code_bytes: int) -> Dict[int, Dict[str, int]]:
    """Return {IPU: {category: bytes}} for the IPUs of one replica and all CATEGORIES.

    code_bytes: size of code, control code and exchange code of one IPU.
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
    """Return {category: bytes} of one forward stage and its backward stage, alone on an IPU.

    totals: of the stage, or of all possible stages; in that case the bytes are arrays, too.
    matmul_proportion: of the stage's IPU. index: of the stage among the `stages` of the pipeline.
    """
    config, size = job.config, job.element_bytes
    if not job.training:
        return _inference_memory(job, totals, matmul_proportion, code_bytes)
    last = index == stages - 1
    if stages == 1:  # without a pipeline nothing is recomputed, and nothing waits
        waiting, live = 0, totals.saved_bytes
    elif config.recompute_checkpoint_every_layer:
        waiting = totals.checkpoint_bytes - (totals.head_input_bytes if last else 0)
        live = np.maximum(totals.most_saved_bytes, totals.tail_saved_bytes if last else 0)
    else:
        # PopART recomputes a stage from its inputs, except the last one, whose backward pass
        # follows at once.
        waiting, live = (0 if last else totals.input_bytes), totals.saved_bytes
    memory = {
        "weights": totals.parameters * size,
        "gradients": totals.parameters * size,
        "optimizer_state": (0 if config.optimizer_state_offchip else
                            totals.parameters * job.state_bytes_per_parameter()),
        "stash": stash_depth(index, stages) * waiting,
        "code": code_bytes,
        # Besides what the backward pass needs: the gradient that comes in, the one that goes out,
        # and the largest of those in between.
        "activations": live + 2 * totals.output_bytes + totals.result_bytes,
        "matmul_temporaries": _matmul_temporaries(job, totals, matmul_proportion),
        "embedding_gradient": totals.embedding_parameter * size}
    memory["update_temporaries"] = _beyond_step(memory, _update_bytes(job, totals))
    return memory


def _inference_memory(job: Job, totals: Totals, matmul_proportion: float,
                      code_bytes: int) -> Dict[str, Any]:
    """Return what `stage_memory` does, for inference.

    An operation's operand and result are live, with the block's input, which is added to its
    output, and the tensors that come from and go to other IPUs.
    """
    return {
        **dict.fromkeys(CATEGORIES, 0 * totals.parameters),
        "weights": totals.parameters * job.element_bytes,
        "code": round(INFERENCE_CODE * code_bytes),
        "activations": 2 * totals.result_bytes + 3 * totals.output_bytes,
        "matmul_temporaries": _matmul_temporaries(job, totals, matmul_proportion)}


def _matmul_temporaries(job: Job, totals: Totals, matmul_proportion: float) -> Any:
    return np.minimum(matmul_proportion * job.machine.memory_bytes,
                      MATMUL_COPIES * totals.matmul_bytes)


def _update_bytes(job: Job, totals: Totals) -> Any:
    """Return the temporary bytes of the weight update of a stage.

    PopART updates one tensor after the other. It casts the accumulated gradient to float32 if both
    moments are float32, and unscales it into another tensor (popart,
    willow/src/patterns/adamdecompose.cpp); the moments join them if they are streamed in. All this
    is done on a replica's shard. With sharding, the new weights are then gathered whole.

    With clipping, the float32 gradients of all parameters wait for their norm (popart,
    willow/src/transforms/clipweightgradientsbynorm.cpp).
    """
    config, size = job.config, job.element_bytes
    gradient = size if config.enable_half_first_order_momentum else 4
    streamed = job.state_bytes_per_parameter() if config.optimizer_state_offchip else 0
    gradients = (4 * totals.parameters if job.clips else
                 2 * gradient * totals.largest_parameter) / job.shards
    return gradients + totals.largest_parameter * (streamed + (size if job.shards > 1 else 0))


def join(one: Dict[str, Any], other: Dict[str, Any]) -> Dict[str, Any]:
    """Return {category: bytes} of two stages on one IPU, from what each needs alone.

    Permanent categories add up, except for the code, which is one program. Temporary ones share
    their memory, so that the larger counts.
    """
    memory = {
        name: one[name] + other[name] if name in ALWAYS else max(one[name], other[name])
        for name in CATEGORIES}
    memory["code"] = one["code"]
    update = max(stage["update_temporaries"] + _in_step(stage) for stage in (one, other)
                 if stage["update_temporaries"]) \
        if one["update_temporaries"] or other["update_temporaries"] else 0
    memory["update_temporaries"] = _beyond_step(memory, update)
    return memory


def reasons(job: Job, memory: Dict[int, Dict[str, int]]) -> List[str]:
    """Return one line for each IPU that does not fit: by how much, and its largest category.

    memory: what `ipu_memory` returns.
    """
    lines = []
    for ipu, parts in memory.items():
        over = sum(parts.values()) - job.machine.memory_bytes
        if over > 0:
            name = max(parts, key=lambda category: parts[category])
            lines.append(
                f"IPU {ipu} is over by {over / 2**20:.0f} MiB; its largest part is "
                f"{name.replace('_', ' ')}, {parts[name] / 2**20:.0f} MiB")
    return lines


def _in_step(memory: Dict[str, Any]) -> Any:
    """Return the bytes of all that is temporary in a pipeline step."""
    return sum(memory[name] for name in IN_STEP)


def _beyond_step(memory: Dict[str, Any], update: Any) -> Any:
    """Return the part of the `update` bytes that exceeds what is temporary in the pipeline steps.

    The weight update follows the steps and reuses their temporary memory.
    """
    return np.maximum(0, update - _in_step(memory))
