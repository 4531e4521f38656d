"""Annotates a model for PopTorch: places each block on an IPU of a replica.

`parallelize` adds the annotations, and `deparallelize` makes the model plain PyTorch again.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import torch
from torch import nn

from ipu_options import poptorch
from ipu_options.layout import Layout
from qa.model.roberta import ForSpans
from runtime.errors import UsageError

# In the names of parameters; it follows the encoder's own prefix.
WORD_EMBEDDING = "embeddings.word_embeddings."


@dataclass(frozen=True)
class Block:
    """One poptorch block.

    kind: "embedding", "layer" or "head". ipu: within one replica. module: its call begins the
    block.
    """

    name: str
    kind: str
    ipu: int
    module: nn.Module


def parallelize(model: ForSpans, layout: Layout, *,
                recompute_checkpoint_every_layer: bool = True,
                embedding_serialization_factor: int = 1) -> List[Block]:
    """Place each block of `model` on its IPU; returns the blocks in the order of execution.

    layout: the IPU of each block; a stage begins where the IPU changes (options.py, AutoIncrement).
    recompute_checkpoint_every_layer: True keeps, for the backward pass, each layer's output and
    recomputes what lies between; False keeps only what enters a stage. The last layer's output is
    not kept: its backward pass follows at once, so that recomputing it would only take time
    (graphcore/examples, nlp/bert/pytorch/modeling.py, PipelinedBertForQuestionAnswering, leaves it
    out as well).
    embedding_serialization_factor: number of parts of the word embedding (see SerializedEmbedding).

    The embedding's LayerNorm gets an outlining attribute of its own. If it were outlined together
    with the encoder's LayerNorms, it would get their tensor layout, which spoils the tile mapping
    of the stashes. Annotations of an earlier call are removed first. Raises ValueError if `layout`
    is for a model with another number of layers.
    """
    deparallelize(model)
    embeddings = model.base_model.embeddings
    if embedding_serialization_factor > 1:
        embeddings.word_embeddings = SerializedEmbedding(
            embeddings.word_embeddings,
            part_sizes(embeddings.word_embeddings.num_embeddings, embedding_serialization_factor,
                       *(each.num_embeddings for each in embeddings.children()
                         if isinstance(each, nn.Embedding)
                         and each is not embeddings.word_embeddings)))
    modules, places = _block_modules(model), layout.blocks()
    if len(modules) != len(places):
        raise ValueError(f"the layout has {len(places)} blocks, the model has {len(modules)}")
    blocks = [Block(name, kind, ipu, module)
              for (name, ipu), (kind, module) in zip(places, modules)]
    handles = _outline(embeddings.LayerNorm, "embedding")
    layers = [block for block in blocks if block.kind == "layer"]
    if recompute_checkpoint_every_layer:
        handles += [block.module.register_forward_hook(_checkpoint_output) for block in layers[:-1]]
    stage_of = {name: i for i, (_, names) in enumerate(layout.stages()) for name in names}
    for block in layers:
        block.module.stage = stage_of[block.name]
    for block in blocks:
        poptorch.BeginBlock(block.module, block.name, ipu_id=block.ipu)
    model.annotation_handles = handles
    return blocks


def deparallelize(model: ForSpans) -> None:
    """Remove all that `parallelize` has added; does nothing to a model without annotations."""
    for handle in model.__dict__.pop("annotation_handles", []):
        handle.remove()
    poptorch.removeBlocks(model)
    for layer in model.layers:
        layer.stage = 0
    embeddings = model.base_model.embeddings
    if isinstance(embeddings.word_embeddings, SerializedEmbedding):
        embeddings.word_embeddings = embeddings.word_embeddings.to_embedding()


class SerializedEmbedding(nn.Module):
    """An embedding that is stored and looked up in parts, to save memory.

    Only the gradient of one part is live at a time. Parts are joined and split where weights and
    optimizer states are saved and restored, so that checkpoints do not depend on their number.

    sizes: the number of rows of each part, see `part_sizes`.
    """

    def __init__(self, embedding: nn.Embedding, sizes: List[int]):
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(part.detach().clone()) for part in embedding.weight.split(sizes))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, [B, S, hidden], of input_ids, int [B, S].

        Each part contributes the embeddings of the tokens that it holds, and zeros for all others;
        the contributions are added.
        """
        total, first = None, 0
        for part in self.parts:
            local, first = input_ids - first, first + part.shape[0]
            inside = torch.logical_and(local >= 0, local < part.shape[0])
            found = nn.functional.embedding(local * inside.to(local.dtype),
                                            part) * inside.unsqueeze(-1).to(part.dtype)
            total = found if total is None else total + found
        return total

    def to_embedding(self) -> nn.Embedding:
        """Return a plain nn.Embedding with the same weights."""
        return nn.Embedding.from_pretrained(torch.cat([part.detach() for part in self.parts]),
                                            freeze=False)


def part_sizes(rows: int, parts: int, *others: int) -> List[int]:
    """Return the number of rows of each part of an embedding of `rows` rows: nearly equal numbers.

    They all differ, and none is in `others`, the numbers of rows of other embeddings in the block.
    PopTorch joins all gathers of a block whose data and indices have the same shapes to a single
    one over the concatenated data (poptorch/source/GNNOptimizations.cpp, groupGatherNodes and
    dispatch), so that parts of equal sizes would be one embedding again, and so would their
    gradients. Raises UsageError if there are too few rows for so many parts.
    """
    for first in range((rows - parts * (parts - 1) // 2) // parts, 0, -1):
        sizes = list(range(first, first + parts - 1))
        sizes.append(rows - sum(sizes))
        if not {*others} & {*sizes}:
            return sizes
    raise UsageError(
        f"--embedding_serialization_factor {parts}: an embedding of {rows} rows cannot be divided "
        "into so many parts of different sizes; use fewer")


def parameter_to_watch(model: ForSpans) -> str:
    """Return the name of a parameter whose gradient tells whether a backward pass was finite.

    It is that of the LayerNorm behind the embeddings, to which the gradients of all activations
    lead: a value among them that is not finite makes it not finite, too. A weight's gradient that
    overflows while those of the activations are finite does not show in it.
    """
    return f"{model.base_model_prefix}.embeddings.LayerNorm.bias"


def weights_of(model: ForSpans) -> Dict[str, torch.Tensor]:
    """Return the model's state_dict under Hugging Face's names.

    The parts of a serialised word embedding are joined to one tensor. This is a function and not a
    hook of state_dict, because PopTorch reads state_dict while the parameters are on the device.
    """
    return join_parts(model.state_dict())


def set_weights(model: ForSpans, weights: Dict[str, torch.Tensor]) -> None:
    """Load weights that `weights_of` returned, also for another number of embedding parts.

    Raises RuntimeError, as load_state_dict does, for weights of another model.
    """
    model.load_state_dict(split_parts(model, weights))


def join_parts(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return `tensors` with those of a serialised word embedding's parts joined, if it has parts.

    tensors: by a parameter's name, possibly with a prefix (Accl1___ and others in an optimizer's
    state). Tensors with less than two dimensions have a single value for the whole parameter, and
    the first part's is taken.
    """
    joined: Dict[str, torch.Tensor] = {}
    parts: Dict[str, Dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, found, index = name.partition(WORD_EMBEDDING + "parts.")
        if found:
            parts.setdefault(prefix, {})[int(index)] = tensor
        else:
            joined[name] = tensor
    for prefix, by_index in parts.items():
        ordered = [by_index[index] for index in sorted(by_index)]
        joined[f"{prefix}{WORD_EMBEDDING}weight"] = (
            torch.cat(ordered) if ordered[0].dim() > 1 else ordered[0])
    return joined


def split_parts(model: nn.Module, tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return what `join_parts` returned, divided as the word embedding of `model` is."""
    sizes = [parameter.shape[0] for name, parameter in model.named_parameters()
             if WORD_EMBEDDING + "parts." in name]
    divided = dict(tensors)
    for name in tensors:
        if sizes and name.endswith(WORD_EMBEDDING + "weight"):
            tensor, prefix = divided.pop(name), name[:-len(WORD_EMBEDDING + "weight")]
            parts = tensor.split(sizes) if tensor.dim() > 1 else [tensor] * len(sizes)
            divided.update((f"{prefix}{WORD_EMBEDDING}parts.{i}", part)
                           for i, part in enumerate(parts))
    return divided


def _block_modules(model: ForSpans) -> List[Tuple[str, nn.Module]]:
    """Return (kind, module) of each block in the order of execution, that of Layout.blocks()."""
    return [("embedding", model.base_model.embeddings),
            *(("layer", layer) for layer in model.layers),
            ("head", model.qa_outputs)]


def _outline(module: nn.Module, name: str) -> List[Any]:
    """Set PopART's outlining attribute `layer` during calls of `module`; returns hook handles."""
    attribute = poptorch.Attribute(__outline={"layer": name})

    def begin(*unused):
        attribute.__enter__()

    def end(*unused):
        attribute.__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def _checkpoint_output(module, inputs, output):
    return poptorch.recomputationCheckpoint(output)
