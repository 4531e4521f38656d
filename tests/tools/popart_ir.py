"""What PopART's intermediate representation of a compiled model says, beside the plan of the job.

It is a file of JSON lines, one for each operation and each tensor after all of PopART's transforms,
of a model that was compiled without outlining: every operation then stands in its own stage.
`problems` holds it to what the options ask for, `facts` adds up what the planner predicts.
"""
from __future__ import annotations

import collections
import json
import math
import re
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from planner.job import Job
from planner.schedule import stash_depth

TYPES = {"float16": "FLOAT16", "float32": "FLOAT"}
# Operations that look at their input in another way or hand it on. "Inplace" is cut off everywhere.
VIEWS = ("Identity", "Reshape", "Transpose", "Detach", "Slice")
# Whether these are recomputed is checked: the others follow from them.
WORK = ("MatMul", "Softmax", "Dropout", "Gelu", "GroupNormalization")
# PopART's names (popart, transforms/automaticlossscaling.cpp and util.cpp)
OF_LOSS_SCALING = ("summedCastedHistograms", "finalInverseLossScale")
# They differ by attributes, which the file does not hold.
WITH_ATTRIBUTES = ("ConcatGrad", "Init", "GetRandomSeed", "ReduceSum", "Cast")


class Ir:
    """The operations of the main graph in the order of their schedule, and the tensors by name."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        self.refused = [line["text"] for line in lines if line["kind"] == "problem"]
        self.ops = [line for line in lines if line["kind"] == "op"]
        self.tensors = {line["id"]: line for line in lines if line["kind"] == "tensor"}
        self.producer = {tensor: op for op in self.ops for tensor in op["out"].values()}
        # Where the schedule turns to the backward pass.
        self.loss = min((op["pos"] for op in self.ops if op["from_loss"]), default=len(lines))
        for op in self.ops:
            op["base"] = re.sub(r"(Lhs|Rhs)?Inplace$", "", op["type"])

    def of(self, *types: str, context: str = "Normal") -> Iterator[dict]:
        """Yield the operations of these types in a context; "" means any."""
        return (op for op in self.ops if op["base"] in types and context in ("", op["context"]))

    def first(self, op: dict, side: str = "in") -> dict:
        """Return the first input tensor of an operation, or its first output."""
        return self.tensors[op[side]["0"]]

    def source(self, tensor: str) -> str:
        """Return what a tensor is a view or a copy of."""
        while tensor in self.producer and self.producer[tensor]["base"] in (*VIEWS, "IpuCopy"):
            tensor = self.producer[tensor]["in"]["0"]
        return tensor

    def persistent(self) -> Iterator[Tuple[str, str, dict]]:
        """Yield (kind, parameter, tensor) of all that lives from step to step.

        kind: "" for the parameter itself, "Accum" for its accumulator, "Accl1" and "Accl2" for its
        moments. A tensor that is sharded on chip is remote, but loaded once with the weights
        (popart, transforms/streamingmemoryopinserter.cpp): its shard takes its place.
        """
        for tensor in self.tensors.values():
            kind, _, parameter = tensor["id"].rpartition("___")
            if tensor["type"] != "Variable" or "producer" in tensor or not block_of(parameter):
                continue
            shard = f"{tensor['id']}__init"
            if self.producer.get(shard, {}).get("context") == "WeightsFromHostFragment":
                tensor = {**tensor, "bytes": self.tensors[shard]["bytes"], "remote": False}
            yield kind, parameter, tensor


def block_of(name: str) -> Optional[str]:
    """Return the block of a parameter or an operation, by its name; None if it is of no block."""
    name = name.partition("Gradient___")[2] or name
    layer = re.match(r"(\d+)/", name) or re.search(r"\blayer\.(\d+)\.", name)
    if layer:
        return f"Encoder {layer[1]}"
    if re.search(r"(^|\.)(embeddings|encoder\.)", name):
        return "Embedding"
    return "QA head" if name.startswith("qa_outputs") else None


def problems(ir: Ir, job: Job, settings: Any) -> List[str]:
    """Return what the file shows that the job does not ask for, one line each."""
    # What a stage without blocks holds are inputs' detach operations, which inference lacks
    # (poptorch, AddDetachOperations.cpp); PopTorch counts the stage nevertheless.
    stages = [stage for stage in job.layout.stages() if stage[1] or job.training]
    places = {name: (ipu, stage) for stage, (ipu, names) in enumerate(stages) for name in names}
    found = [*ir.refused, *_places(ir, job, places), *_recomputed(ir, job, places),
             *_crossings(ir, job), *_stashes(ir, job), *_types(ir, job), *_repetitions(ir)]
    return found + (list(_optimizer(ir, job, settings, places)) if job.training else [])


def _places(ir: Ir, job: Job, places: Dict[str, Tuple[int, int]]) -> Iterator[str]:
    """Each block's operations are on its IPU, in its forward or backward stage."""
    last = len(job.layout.stages()) - 1
    for op in ir.ops:
        if op.get("ipu") is None and op["base"] != "IpuCopy":
            yield f"{op['type']} {op['name']} is on no IPU"
        # What joins blocks: sums of gradients, copies from and to other stages, shared exchanges.
        if (op["base"] in ("IpuCopy", "MultiExchange", "Sum") or "GradSum" in op["name"]
                or "ipelineCopy" in op["name"]):
            continue
        names = [op["name"], *op["in"].values(), *op["out"].values()]
        if op["context"] == "Normal":  # the name tells, of an accumulation the accumulator
            names = names[1:2] if op["base"] == "Accumulate" else names[:1]
        block = next(filter(None, map(block_of, names)), None)
        if block:
            ipu, stage = places[block]
            if op.get("ipu") not in (None, ipu):
                yield f"{op['type']} {names[0]} of {block} is on IPU {op['ipu']}, not {ipu}"
            if op.get("stage") not in (None, stage, 2 * last - stage):
                yield f"{op['type']} {names[0]} of {block} is in stage {op['stage']}"


def _recomputed(ir: Ir, job: Job, places: Dict[str, Tuple[int, int]]) -> Iterator[str]:
    """Layers' outputs are kept as parallelize says, and what lies between is computed again."""
    layers, stages = len(job.layout.layer_ipus), job.layout.stages()
    by_layer = job.training and job.config.recompute_checkpoint_every_layer
    kept = {block_of(op["name"]) for op in ir.of("Identity")
            if re.match(r"\d+/Checkpoint", op["name"]) and not op["from_loss"]
            and op["recompute"] != "Recompute"}
    expected = {f"Encoder {layer}" for layer in range(layers - 1)} if by_layer else set()
    for block in sorted(kept ^ expected):
        yield f"the output of {block} is {'' if block in kept else 'not '}kept"
    # From the last checkpoint on the backward pass follows at once.
    tail = {f"Encoder {layers - 1}", "QA head"} if by_layer else set(stages[-1][1])
    deberta = any("rel_embeddings" in name for name in ir.tensors)
    for op in ir.of(*WORK) if job.training else ():
        block = block_of(op["name"])
        if block and not op["from_loss"]:
            # Distances follow from no checkpoint, so that PopART computes with them again.
            *others, tokens, _ = ir.first(op)["shape"]
            of_distances = (deberta and math.prod(others) == 1
                            and tokens == 2 * job.max_seq_length)
            again = len(stages) > 1 and (of_distances or not (
                block in tail and places[block][1] == len(stages) - 1))
            if (op["recompute"] == "Recompute") != again:
                yield f"{op['type']} {op['name']} is {'not ' if again else ''}computed again"


def _crossings(ir: Ir, job: Job) -> Iterator[str]:
    """Activations, embeddings of distances, their gradients, ids and seeds go from IPU to IPU.

    Norms to clip do, too, and what automatic loss scaling counts and scales by.
    """
    rows = [job.micro_batch_size, job.max_seq_length]
    for op in ir.of("IpuCopy", context=""):
        tensor = ir.first(op)
        shape, dtype = tensor["shape"], tensor["dtype"]
        meant = (dtype == TYPES[job.precision] and len(shape) == 3 and shape[:2] == rows
                 or dtype == TYPES[job.precision] and shape[:-1] == [2 * job.max_seq_length]
                 or dtype == "INT32" and shape == rows or dtype == "UINT32" and shape == [2]
                 or shape == [] and op["context"] != "Normal" and job.clips
                 or ir.source(tensor["id"]).startswith(OF_LOSS_SCALING))
        if not meant:
            yield f"{ir.source(tensor['id'])} {dtype}{shape} crosses from IPU to IPU"


def _stashes(ir: Ir, job: Job) -> Iterator[str]:
    """A stage stashes what enters it and its checkpoints; the last one stashes nothing."""
    stages = job.layout.stages()
    for stage, (_, names) in enumerate(stages):
        stashed = [op for op in ir.of("Stash") if op["stage"] == stage]
        activations = [op["stashed"] for op in stashed if len(ir.first(op)["shape"]) == 3]
        layers = sum(name.startswith("Encoder") for name in names)
        expected = 0
        if job.training and stage < len(stages) - 1:
            expected = ("Embedding" not in names and bool(names)) + (
                max(0, layers - 1) if job.config.recompute_checkpoint_every_layer else 0)
        if len(activations) != expected:
            yield f"stage {stage} stashes {len(activations)} activations, not {expected}"
        for op in stashed:
            if op["stash_size"] != stash_depth(stage, len(stages)):
                yield f"stage {stage} stashes {op['stash_size']} of {op['stashed']}"
            if math.prod(ir.first(op)["shape"]) == 1:
                yield f"stage {stage} stashes the scalar {ir.source(op['stashed'])}"


def _types(ir: Ir, job: Job) -> Iterator[str]:
    """Multiplications are in the model's type, and no cast undoes another."""
    for op in ir.of("MatMul"):
        dtype = ir.first(op, "out")["dtype"]
        if dtype != TYPES[job.precision]:
            yield f"MatMul {op['name']} is in {dtype}"
    for op in ir.of("Cast", context=""):
        before = ir.producer.get(ir.source(op["in"]["0"]))
        if before and before["base"] == "Cast" and (
                ir.first(before)["dtype"] == ir.first(op, "out")["dtype"]):
            yield f"Cast {op['name']} undoes {before['name']}"


def _repetitions(ir: Ir) -> Iterator[str]:
    """No operation computes in a stage what another has computed there."""
    same: Dict[str, str] = {}  # views of the same, which cost nothing
    seen: Dict[Tuple, dict] = {}
    for op in ir.ops:
        if (op["context"] != "Normal" or op["base"] in ("IpuCopy", *WITH_ATTRIBUTES)
                or op["modifies"] or not op["in"]):
            continue
        inputs = tuple(same.get(tensor, tensor) for tensor in op["in"].values())
        shapes = tuple(tuple(ir.tensors[tensor]["shape"]) for tensor in op["out"].values())
        before = seen.setdefault((op["base"], op.get("ipu"), op.get("stage"), inputs, shapes), op)
        if before is op or op["base"] in ("Slice", "Transpose"):
            continue
        if op["base"] in VIEWS:
            same.update(zip(op["out"].values(), before["out"].values()))
        else:
            yield f"{op['type']} {op['name']} repeats {before['name']}"


def _optimizer(ir: Ir, job: Job, settings: Any, places: Dict[str, Tuple[int, int]]
               ) -> Iterator[str]:
    """Accumulators, moments, means, clipping and loss scaling are as the options ask."""
    config = job.config
    tensors: Dict[str, Dict[str, dict]] = collections.defaultdict(dict)
    for kind, parameter, tensor in ir.persistent():
        tensors[kind][parameter] = tensor
    moment = "FLOAT16" if config.enable_half_first_order_momentum else "FLOAT"
    for kind, dtype, off_chip in (("Accum", TYPES[job.precision], False),
                                  ("Accl1", moment, config.optimizer_state_offchip),
                                  ("Accl2", "FLOAT", config.optimizer_state_offchip)):
        for parameter in sorted(set(tensors[""]) ^ set(tensors[kind])):
            yield f"{parameter} and {kind} do not belong together"
        for parameter, tensor in tensors[kind].items():
            if (tensor["dtype"], tensor["remote"]) != (dtype, off_chip):
                yield (f"{kind} of {parameter} is {tensor['dtype']}, "
                       f"{'off' if tensor['remote'] else 'on'} chip")
    sharded = any(tensor["sharded"] for tensor in tensors["Accl2"].values())
    if sharded != (config.replicated_tensor_sharding and config.replication_factor > 1):
        yield f"the moments are {'' if sharded else 'not '}sharded over the replicas"
    outer = "AccumulateOuterFragment"
    reduced = {ir.source(op["in"]["0"]).split("__t")[0] for op in ir.of(
        "ReplicatedAllReduce", "ReplicatedReduceScatter", context=outer)}
    for parameter in tensors[""] if config.replication_factor > 1 else ():
        if f"Accum___{parameter}" not in reduced:
            yield f"the gradient of {parameter} is not reduced over the replicas"
    updated = sum(1 for _ in ir.of("AdamVarUpdate", context=outer))
    if updated != len(tensors[""]):
        yield f"{updated} updates of {len(tensors[''])} parameters"
    # A float16 sum is a mean all along; a float32 sum is divided where it is unscaled (PopTorch,
    # python/_optimizer_attributes.py, MeanReductionStrategy).
    counters = [op for op in ir.of("Accumulate") if op["name"] == "_counterIncrement"]
    if bool(counters) != (job.precision == "float16"):
        yield f"{len(counters)} counters make means of the accumulated gradients"
    squares = sum(1 for _ in ir.of("ReduceSumSquare", context=outer))
    if settings.optimizer == "adamw" and squares != (len(tensors[""]) if job.clips else 0):
        yield f"{squares} gradients are squared for their norm"
    scaled = {op.get("ipu") for op in ir.ops if op["context"] == "Normal" and any(
        tensor.startswith(("lossScaling", "finalLossScale")) for tensor in op["in"].values())}
    if not config.auto_loss_scaling and scaled != {places["QA head"][0]}:
        yield f"the loss is scaled on the IPUs {sorted(scaled)}"


def facts(ir: Ir, job: Job) -> Dict[str, Dict[str, int]]:
    """Return {IPU: {quantity: bytes, FLOPs or number}} of what the planner predicts.

    live: the most bytes of tensors that are alive at once in a pipeline step, parameters and
    stashes aside, by the order of the operations. live_in_update: the same of the weight update.
    sent: to other IPUs in a step.
    """
    ipus: Dict[int, collections.Counter] = {
        ipu: collections.Counter() for ipu, _ in job.layout.stages()}
    of_block = dict(job.layout.blocks())
    names = {"": "weights", "Accum": "gradients", "Accl1": "optimizer_state",
             "Accl2": "optimizer_state"}
    for kind, parameter, tensor in ir.persistent():
        if kind in names and not tensor["remote"]:
            ipus[of_block[block_of(parameter)]][names[kind]] += tensor["bytes"]
    for op in ir.of("Stash"):
        ipus[op["ipu"]]["stash"] += op["stash_size"] * ir.first(op)["bytes"]
    for op in ir.of("IpuCopy"):
        ipu = ir.producer.get(op["in"]["0"], ir.first(op)).get("ipu")
        if ipu is not None:  # else a tensor that is only passed on
            ipus[ipu]["sent"] += ir.first(op)["bytes"]
    for op in ir.of("MatMul"):
        of = "backward" if op["from_loss"] else "forward"
        flops = 2 * ir.first(op)["shape"][-1] * math.prod(ir.first(op, "out")["shape"])
        ipus[op["ipu"]][f"{of}_flops"] += flops
        ipus[op["ipu"]][f"{of}_matmuls"] += 1
        ipus[op["ipu"]]["recompute_flops"] += flops * (op["recompute"] == "Recompute")
    for ipu, counts in ipus.items():
        counts["live"] = _most_live(ir, ipu, "Normal")
        counts["live_in_update"] = _most_live(ir, ipu, "AccumulateOuterFragment")
    return {str(ipu): dict(sorted(counts.items())) for ipu, counts in sorted(ipus.items())}


def _most_live(ir: Ir, ipu: int, context: str) -> int:
    """Return the most bytes of one IPU's tensors that are alive at once, see `facts`."""
    steps = _steps(ir, ipu, context)
    storages: Dict[Tuple[str, bool], List[int]] = {}   # [bytes, first step, last step]
    held: Dict[Tuple[str, bool], Set[Tuple[str, bool]]] = {}  # the storages that a tensor lies in

    def new(tensor: str, again: bool, step: int) -> None:
        held[tensor, again] = {(tensor, again)}
        storages[tensor, again] = [ir.tensors[tensor]["bytes"], step, step]

    def places(tensor: str, again: bool) -> Set[Tuple[str, bool]]:
        return held.get((tensor, again and (tensor, True) in held), set())

    copies = list(ir.of("IpuCopy", context=context))
    for copy in copies:  # what comes from other IPUs is there when the step begins
        if ir.first(copy, "out").get("ipu") == ipu:
            new(copy["out"]["0"], False, 0)
    for step, (op, again) in enumerate(steps):
        backward = again or op["pos"] >= ir.loss
        if op["base"] == "Restore":
            new(op["out"]["0"], False, step)
            held[op["in"]["1"], True] = held[op["out"]["0"], False]
            continue
        for tensor in op["in"].values():
            for storage in places(tensor, backward):
                storages[storage][2] = step
        for index, tensor in op["out"].items():
            aliases = [op["in"][str(i)] for i, o in op["aliases"] if str(o) == index]
            if aliases or op["base"] == "Stash":
                held[tensor, again] = set().union(*(places(each, backward) for each in aliases))
            else:
                new(tensor, again, step)
    for copy in copies:  # and what goes there stays until it ends
        for storage in places(copy["in"]["0"], False):
            storages[storage][2] = len(steps)
    change: Dict[int, int] = collections.Counter()
    for size, first, last in storages.values():
        change[first] += size
        change[last + 1] -= size
    live = most = 0
    for step in sorted(change):
        live += change[step]
        most = max(most, live)
    return most


def _steps(ir: Ir, ipu: int, context: str) -> List[Tuple[dict, bool]]:
    """Return (operation, whether it computes again) for all that an IPU does in a context.

    What is to be computed again is so before the first operation of the backward pass that needs
    it.
    """
    steps: List[Tuple[dict, bool]] = []
    done: Set[int] = set()
    for op in ir.ops:
        if op.get("ipu") != ipu or op["context"] != context:
            continue
        needed, todo = [], [op] if op["pos"] >= ir.loss else []
        while todo:
            for tensor in todo.pop()["in"].values():
                before = ir.producer.get(tensor)
                if before and before["recompute"] == "Recompute" and before["id"] not in done:
                    done.add(before["id"])
                    needed.append(before)
                    todo.append(before)
        steps += [(before, True) for before in sorted(needed, key=lambda each: each["pos"])]
        steps.append((op, False))
    return steps
