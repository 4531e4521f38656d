"""DeBERTa's attention by distance: what it needs beyond RoBERTa's (He et al. 2021, section 3).

A token's score for another is the sum of three products: of its query and the other's key, of its
query and the key of their distance, and of the other's key and the query of that distance. All
layers share the embeddings of distances, and each makes its own keys and queries of them.
"""
from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, List, Tuple

import torch
from torch import nn

from qa.families import LayerParts, farthest_distance


def use_torchs_modules(model: nn.Module) -> None:
    """Put torch's LayerNorm and Dropout in place of DeBERTa's, of more operations, in `model`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                norm = nn.LayerNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm)
            elif hasattr(child, "drop_prob"):
                setattr(module, name, nn.Dropout(child.drop_prob))


def embeddings_of_distances(encoder: nn.Module, config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of the distances -S to S - 1, [2 S, hidden]. ids: int [B, S].

    They are computed on the IPU of the embeddings, because weights belong to one IPU, and handed on
    from stage to stage. Distances that share an embedding part here: layers project a few more
    rows, and need no gather of the projected ones. Dropout is therefore drawn for each distance,
    where transformers draws it for each embedding.
    """
    weight = encoder.rel_embeddings.weight
    rows = distance_rows(ids.shape[1], len(weight) // 2,
                         getattr(config, "position_buckets", -1), farthest_distance(config))
    distances = nn.functional.embedding(ids.new_tensor(rows), weight)
    norms = getattr(config, "norm_rel_ebd", "none").lower()
    return encoder.LayerNorm(distances) if "layer_norm" in norms else distances


def keys_and_queries(parts: LayerParts, distances: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Return a layer's keys and queries of the distances S - 1 to -S, by one multiplication.

    The queries' order is turned round, as the kernels' attention takes them.
    """
    key, query = parts.position_key, parts.position_query
    keys, queries = nn.functional.linear(distances, torch.cat((key.weight, query.weight))).split(
        len(key.weight), dim=-1)
    keys = keys if key.bias is None else keys + key.bias  # the first version's have none
    return keys, (queries + query.bias).flip(0)


def split_projection(attention: nn.Module, heads: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of query, key and value, which version 1 has head by head."""
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
