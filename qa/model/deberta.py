"""DeBERTa's attention by distance: what it needs beyond RoBERTa's (He et al. 2021, section 3).

A token attends to another by three products: their contents, as everywhere; its query and the key
of the distance between them; and the other's key and the query of that distance. Distances have
embeddings, which all layers share, and each layer makes its keys and queries of them.
"""
from __future__ import annotations

import math
from functools import lru_cache
from operator import attrgetter
from typing import Any, List, Tuple

import torch
from torch import nn

from qa.families import LayerParts, farthest_distance


def use_torchs_modules(model: nn.Module) -> None:
    """Put torch's LayerNorm and Dropout in the place of transformers' own, with their parameters.

    Those compute the same in many operations, each of which an IPU would run and keep.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                norm = nn.LayerNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm)
            elif hasattr(child, "drop_prob"):
                setattr(module, name, nn.Dropout(child.drop_prob))


def embeddings_of_distances(encoder: nn.Module, config: Any, path: str,
                            input_ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of the distances -S to S - 1, [2 S, hidden].

    encoder: transformers' model without a head. path: of the embedding in it. input_ids: [B, S].

    They are computed once, on the IPU of the embeddings, and handed on from stage to stage with the
    hidden states, because weights belong to one IPU. Distances that share an embedding are told
    apart here already: projecting a few more rows in each layer costs less than gathering the
    projected ones, twice in each layer and once more for each gradient. Dropout is therefore drawn
    for each distance, where transformers draws it for each embedding.
    """
    length = input_ids.shape[1]
    embedding = attrgetter(path)(encoder)
    rows = distance_rows(length, len(embedding.weight) // 2,
                         getattr(config, "position_buckets", -1), farthest_distance(config))
    distances = nn.functional.embedding(input_ids.new_tensor(rows), embedding.weight)
    norms = getattr(config, "norm_rel_ebd", "none").lower()
    return encoder.encoder.LayerNorm(distances) if "layer_norm" in norms else distances


def keys_and_queries(parts: LayerParts, distances: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Return a layer's keys and queries of distances, as the kernels' attention takes them.

    One multiplication makes both. DeBERTa's first version has no bias for the keys.
    """
    key, query = parts.position_key, parts.position_query
    keys, queries = nn.functional.linear(distances, torch.cat((key.weight, query.weight))).split(
        len(key.weight), dim=-1)
    return (keys if key.bias is None else keys + key.bias).flip(0), queries + query.bias


def split_projection(attention: nn.Module, heads: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of query, key and value one after the other.

    attention: of DeBERTa's first version, which has them head by head, and no bias for the key.
    """
    weight = attention.in_proj.weight
    weight = weight.view(heads, 3, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
    width = len(attention.q_bias)
    return weight, torch.cat((nn.functional.pad(attention.q_bias, (0, width)), attention.v_bias))


@lru_cache(maxsize=None)
def distance_rows(length: int, reach: int, buckets: int, most: int) -> List[int]:
    """Return the row of the embedding for each of the distances -length to length - 1.

    reach: half of its rows. buckets: of near distances, which have a row each, and of farther ones
    up to `most`, which share one by their logarithm (transformers, modeling_deberta_v2.py,
    make_log_bucket_position); less than 1 if there are none.
    """
    def bucket(distance: int) -> int:
        middle = buckets // 2
        if buckets < 1 or abs(distance) <= middle:
            return distance
        share = math.log(abs(distance) / middle) / math.log((most - 1) / middle)
        return int(math.copysign(math.ceil(share * (middle - 1)) + middle, distance))

    return [min(max(reach + bucket(distance), 0), 2 * reach - 1)
            for distance in range(-length, length)]
