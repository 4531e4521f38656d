"""Predicts the In-Processor-Memory that each IPU needs, by category, in bytes.

Permanent (ALWAYS): weights, gradient accumulators, optimizer state on chip, the stash of
micro-batches that wait for their backward pass, and code. Temporary in a pipeline step (IN_STEP),
each counted at its largest: activations that are recomputed, temporaries of matrix multiplications,
and the part of the word embedding's gradient (of one part, if it is serialised) that exceeds them.
Temporary in the weight update, which follows the steps: what the optimizer needs for the largest
parameter. tests/planner/test_popart_facts.py holds all but the code and the temporaries of
multiplications to what PopART compiles.
"""
from __future__ import annotations

from typing import Any, Dict, List

import numpy as np

from planner.job import Job
from planner.matmul import temporary_bytes
from planner.schedule import stash_depth
from planner.totals import Totals, stage_totals

ALWAYS = ("weights", "gradients", "optimizer_state", "stash", "code")
IN_STEP = ("activations", "matmul_temporaries", "embedding_gradient")
CATEGORIES = ALWAYS + IN_STEP + ("update_temporaries",)
# An estimate: the share of a training program's code that forward passes alone have.
INFERENCE_CODE = 0.5


def ipu_memory(job: Job, code_bytes: int) -> Dict[int, Dict[str, int]]:
    """Return {IPU: {category: bytes}} of one replica. code_bytes: of all code of one IPU."""
    stages = job.stages()
    memory: Dict[int, Dict[str, int]] = {}
    for index, (ipu, blocks) in enumerate(stages):
        stage = stage_memory(job, stage_totals(blocks),
                             job.config.matmul_shares()[ipu], index, len(stages), code_bytes)
        memory[ipu] = join(memory[ipu], stage) if ipu in memory else stage
    return {ipu: {name: int(memory[ipu][name]) for name in CATEGORIES} for ipu in sorted(memory)}


def stage_memory(job: Job, totals: Totals, matmul_proportion: float, index: int, stages: int,
                 code_bytes: int) -> Dict[str, Any]:
    """Return {category: bytes} of stage `index` of `stages`, forward and backward, on its own IPU.

    totals: of the stage, or arrays of all possible stages, as the bytes then are.
    """
    config, size = job.config, job.element_bytes
    if not job.training:
        return _inference_memory(job, totals, matmul_proportion, code_bytes)
    last = index == stages - 1
    by_layer = stages > 1 and config.recompute_checkpoint_every_layer
    kept = totals.checkpoint_bytes if by_layer else totals.input_bytes
    live = totals.most_saved_bytes if by_layer else totals.saved_bytes
    if by_layer and last:  # its backward pass follows at once, and needs no stash
        live = np.maximum(live, totals.tail_saved_bytes) + np.maximum(0, kept - totals.output_bytes)
    elif by_layer:  # the mask stays for the layers before, their gradients of distances for the sum
        layers = 1 + (kept - totals.input_bytes) / np.maximum(totals.output_bytes, 1)
        live = live + _mask_bytes(job) + (layers + 1) * totals.handed_bytes
    memory = {
        "weights": totals.parameters * size,
        "gradients": totals.parameters * size,
        "optimizer_state": (0 if config.optimizer_state_offchip else
                            totals.parameters * job.state_bytes_per_parameter()),
        "stash": (0 if last else stash_depth(index, stages)) * kept,
        "code": code_bytes,
        "activations": live + _most_gradients(totals, size) + (0 if last else totals.output_bytes),
        "matmul_temporaries": temporary_bytes(job, totals.matmul_flops, matmul_proportion)}
    # The embedding's gradient comes last, when all is free again but the embeddings and their
    # gradient (with several parts: that of one, too). With layers there are the stage's output and
    # the gradients of queries, keys and values, which PopART multiplies for the weights only then.
    beside = (2 + (config.embedding_serialization_factor > 1) + 4 * (totals.layer_parameter > 0)
              ) * totals.output_bytes * (totals.embedding_parameter > 0)
    memory["embedding_gradient"] = np.maximum(0, (
        totals.embedding_parameter * size + beside - memory["activations"]
        - memory["matmul_temporaries"]))
    memory["update_temporaries"] = _beyond_step(memory, _update_bytes(job, totals))
    return memory


def _most_gradients(totals: Totals, size: int) -> Any:
    """Return the most bytes that a layer's backward pass adds to what the forward pass has saved.

    It is at one of three places. The largest weight's gradient comes with the gradient of the
    layer's output. At the activation function, its gradient takes its output's place, and there is
    one more. At the softmax are three tensors of its size; what follows it in the layer is gone.
    """
    return np.maximum(
        np.maximum(totals.layer_parameter * size + totals.output_bytes, totals.linear_bytes),
        3 * totals.result_bytes - totals.saved_results - 2 * totals.linear_bytes -
        2 * totals.output_bytes)


def _inference_memory(job: Job, totals: Totals, matmul_proportion: float,
                      code_bytes: int) -> Dict[str, Any]:
    """Return what `stage_memory` does, for inference.

    PopART computes in place what it can. Most is live where probabilities meet values: the
    probabilities, query, key and value, what comes of it, the layer's input and the mask. In rows
    so short that another result is larger than the probabilities, this is more than there is.
    """
    # DeBERTa's products by distance, of queries and of keys, are both live.
    results = np.where(totals.handed_bytes > 0, 2, 1) * totals.result_bytes
    return {
        **dict.fromkeys(CATEGORIES, 0 * totals.parameters),
        "weights": totals.parameters * job.element_bytes,
        "code": round(INFERENCE_CODE * code_bytes),
        "activations": results + 5 * totals.output_bytes + _mask_bytes(job),
        "matmul_temporaries": temporary_bytes(job, totals.matmul_flops, matmul_proportion)}


def _mask_bytes(job: Job) -> int:
    """Return the bytes of a micro-batch's attention mask, [rows, 1, tokens, tokens]."""
    return job.micro_batch_size * job.max_seq_length ** 2 * job.element_bytes


def _update_bytes(job: Job, totals: Totals) -> Any:
    """Return the temporary bytes of the weight update of a stage.

    PopART updates one tensor after the other. It casts the accumulated gradient to float32 if both
    moments are float32, and unscales it in place (popart, willow/src/patterns/adamdecompose.cpp);
    the moments join it if they are streamed in. All this is done on a replica's shard. With
    sharding, the new weights are then gathered whole.

    With clipping, the float32 gradients of all parameters wait for their norm (popart,
    willow/src/transforms/clipweightgradientsbynorm.cpp).
    """
    config, size, largest = job.config, job.element_bytes, totals.largest_parameter
    gradient = size if config.enable_half_first_order_momentum else 4
    waiting = (4 * totals.parameters if job.clips else 0) / job.shards
    shard = size / job.shards if job.shards > 1 else 0  # of the weights
    updated = (0 if job.clips else gradient / job.shards) + shard + (
        job.state_bytes_per_parameter() if config.optimizer_state_offchip else 0)
    return waiting + largest * max(updated, shard and size + shard)


def join(one: Dict[str, Any], other: Dict[str, Any]) -> Dict[str, Any]:
    """Return {category: bytes} of two stages on one IPU, whose temporary parts share memory."""
    memory = {
        name: one[name] + other[name] if name in ALWAYS else max(one[name], other[name])
        for name in CATEGORIES}
    memory["code"] = one["code"]
    update = max([stage["update_temporaries"] + _in_step(stage) for stage in (one, other)
                  if stage["update_temporaries"]], default=0)
    memory["update_temporaries"] = _beyond_step(memory, update)
    return memory


def reasons(job: Job, memory: Dict[int, Dict[str, int]]) -> List[str]:
    """Return a line for each IPU that does not fit: by how much, and its largest category."""
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
    return sum(memory[name] for name in IN_STEP)


def _beyond_step(memory: Dict[str, Any], update: Any) -> Any:
    # The weight update follows the steps and reuses their temporary memory.
    return np.maximum(0, update - _in_step(memory))
