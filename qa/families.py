"""The families of encoders: where transformers keeps their parts, and what differs between them.

qa/model/roberta.py is written for RoBERTa. The other families are the same post-norm encoder under
other names, and their differences are entries of a Family. CONTRIBUTING says how to add one. This
module does not import torch, so that a model that cannot be run is refused in a second.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, NamedTuple, Optional, Tuple

from runtime.errors import UsageError
from runtime.files import read_json_object
from runtime.flags import Settings
from runtime.hub import checkpoint_folder, offline_unless_reachable


class LayerParts(NamedTuple):
    """The parts of an encoder layer: in a Family, their paths; in an EncoderLayer, the modules.

    The paths begin at transformers' module of a layer. A part that a family lacks is None.
    """

    query: Any = "attention.self.query"
    key: Any = "attention.self.key"
    value: Any = "attention.self.value"
    attention_dropout: Any = "attention.self.dropout"
    mixed: Any = "attention.output.dense"
    mixed_dropout: Any = "attention.output.dropout"
    mixed_norm: Any = "attention.output.LayerNorm"
    inner: Any = "intermediate.dense"
    activation: Any = "intermediate.intermediate_act_fn"
    outer: Any = "output.dense"
    outer_dropout: Any = "output.dropout"
    outer_norm: Any = "output.LayerNorm"
    # Of families whose attention depends on distances (qa/model/deberta.py):
    fused: Any = None  # the module with query, key and value in one
    position_key: Any = None
    position_query: Any = None
    position_dropout: Any = None


# The fields of config.json that are whole numbers, and the least of each.
SIZES = {"vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
         "intermediate_size": 1, "max_position_embeddings": 1, "type_vocab_size": 1,
         "pad_token_id": 0}
# No encoder is larger: a number beyond is a mistake, and would be counted for ever.
MOST_LAYERS, LARGEST_SIZE = 256, 10_000_000
_OPTIONAL = ("type_vocab_size", "pad_token_id", "max_relative_positions",
             "position_buckets")  # in config.json
# The least --max_seq_length: a model with fewer positions has room for no row.
LEAST_POSITIONS = 16


@dataclass(frozen=True)
class Family:
    """A family of models; the defaults are those of BERT."""

    model: str  # transformers' class with the head for question answering
    layers: str = "encoder.layer"  # the path of the layers in its encoder
    parts: LayerParts = LayerParts()  # of a layer
    projection: Optional[str] = None  # of embeddings that are narrower than the layers
    head_dropout: Optional[str] = None  # the field of config.json with the dropout before the head
    positions_after_padding: bool = False  # whether they count from padding_idx + 1, not from 0
    distances: bool = False  # whether attention depends on the distances between tokens
    # The fields of config.json that are checked: the least of each, those from 0 to 1, and those of
    # which only some values are built (None: left out).
    sizes: Dict[str, int] = field(default_factory=SIZES.copy)
    fractions: Tuple[str, ...] = ("layer_norm_eps", "hidden_dropout_prob",
                                  "attention_probs_dropout_prob")
    built: Dict[str, Tuple[Any, ...]] = field(default_factory=dict)
    own_names: Dict[str, str] = field(default_factory=dict)  # of fields that it calls otherwise


ROBERTA = Family("RobertaForQuestionAnswering", positions_after_padding=True)
BERT = Family("BertForQuestionAnswering")
ELECTRA = Family("ElectraForQuestionAnswering", projection="embeddings_project",
                 sizes={**SIZES, "embedding_size": 1})
DISTILBERT = Family(
    "DistilBertForQuestionAnswering", layers="transformer.layer", head_dropout="qa_dropout",
    parts=LayerParts(
        query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
        attention_dropout="attention.dropout", mixed="attention.out_lin", mixed_dropout=None,
        mixed_norm="sa_layer_norm", inner="ffn.lin1", activation="ffn.activation",
        outer="ffn.lin2", outer_dropout="ffn.dropout", outer_norm="output_layer_norm"),
    sizes={**dict.fromkeys(("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim",
                            "max_position_embeddings"), 1), "pad_token_id": 0},
    fractions=("dropout", "attention_dropout", "qa_dropout"),
    own_names={"hidden_size": "dim", "num_hidden_layers": "n_layers",
               "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim",
               "hidden_act": "activation"})
_BY_DISTANCE = {"relative_attention": (True, ),
                "pos_att_type": ("c2p|p2c", "p2c|c2p", ["c2p", "p2c"], ["p2c", "c2p"])}
DEBERTA = Family(
    "DebertaForQuestionAnswering", distances=True,
    parts=LayerParts(
        query=None, key=None, value=None, fused="attention.self",
        position_key="attention.self.pos_proj", position_query="attention.self.pos_q_proj",
        position_dropout="attention.self.pos_dropout"),
    sizes={**SIZES, "type_vocab_size": 0, "max_relative_positions": -1, "position_buckets": -1},
    built={**_BY_DISTANCE, "talking_head": (False, None), "position_buckets": (-1, None),
           "norm_rel_ebd": ("none", None)})
_V2 = LayerParts(
    query="attention.self.query_proj", key="attention.self.key_proj",
    value="attention.self.value_proj", position_key="attention.self.pos_key_proj",
    position_query="attention.self.pos_query_proj", position_dropout="attention.self.pos_dropout")
DEBERTA_V2 = replace(DEBERTA, model="DebertaV2ForQuestionAnswering", parts=_V2, built={
    **_BY_DISTANCE, "conv_kernel_size": (0, None)})  # the convolution is v2-xlarge's
DEBERTA_V3 = replace(DEBERTA_V2, parts=_V2._replace(position_key=_V2.key, position_query=_V2.query))
# By the model_type of config.json. distilroberta has the type "roberta", MiniLM the type "bert".
FAMILIES = {"roberta": ROBERTA, "xlm-roberta": ROBERTA, "camembert": ROBERTA, "bert": BERT,
            "distilbert": DISTILBERT, "electra": ELECTRA, "deberta": DEBERTA,
            "deberta-v2": DEBERTA_V2}

# Why a model cannot be run, and what works instead, by its model_type.
REFUSED = {
    "albert": "its layers share one set of weights, and PopTorch cannot share weights between the "
              "IPUs of a pipeline; a bert or an electra model works",
    "mpnet": "its layers share one bias by the distance between tokens, which the attention here "
             "does not add; a roberta or an electra model of its size works"}
_DECODER = ("it is a decoder, whose tokens do not see what follows them; an encoder of the "
            "families {families} works")


def family_of(config: Any, name: str = "the model") -> Family:
    """Return the family of a model, `name` in messages. Raises UsageError if it is of none."""
    kind, families = config.model_type, ", ".join(FAMILIES)
    decodes = any(getattr(config, name, False) for name in (
        "is_decoder", "is_encoder_decoder", "add_cross_attention"))
    if kind in FAMILIES and not decodes:
        shares = kind == "deberta-v2" and getattr(config, "share_att_key", False)
        return DEBERTA_V3 if shares else FAMILIES[kind]
    if not decodes and kind not in REFUSED:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        decodes = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    reason = REFUSED.get(kind, f"this program has the families {families}")
    if decodes:
        reason = _DECODER.format(families=families)
    raise UsageError(f"{name} is of the type {kind}: {reason}")


def refuse_early(settings: Settings) -> None:
    """Before torch is imported: find out whether the hub answers, and `check_checkpoint`."""
    offline_unless_reachable(settings.needs_hub)
    if not settings.demo_data:
        check_checkpoint(settings)


def check_checkpoint(settings: Settings, weights: bool = True) -> None:
    """Refuse the checkpoint settings.model_name_or_path by its files, fetched if need be.

    weights: whether they are needed, too. Raises what `checkpoint_folder` and `check_config` raise.
    """
    folder, name = folder_and_name(settings, "model_name_or_path", weights)
    if (folder / "config.json").is_file():
        values = read_json_object(folder / "config.json", f"{name}: config.json")
        if "model_type" not in values:
            raise UsageError(f"{name}: its config.json has no model_type; it should be one of "
                             f"{', '.join(FAMILIES)}")
        config = SimpleNamespace(**values)
        check_config(config, name)
        check_row_length(settings, most_tokens(config))


def folder_and_name(settings: Settings, kind: str, weights: bool) -> Tuple[Path, str]:
    """Return the folder of the checkpoint that the setting `kind` names, and what to call it."""
    name, source = getattr(settings, kind), settings.source(kind)
    revision = settings.model_revision if kind == "model_name_or_path" else "main"
    return checkpoint_folder(name, source, revision, settings.hub_token,
                             getattr(settings, "cache_dir", None), weights), f"{source} {name}"


def check_config(config: Any, name: str) -> None:
    """Raise UsageError if a model is of no family here, or if no model has its sizes.

    config: transformers' configuration, or what config.json holds of it.
    """
    family = family_of(config, name)

    def refuse(key: str, right: str):
        raise UsageError(f"{name}: {key} is {_shown(getattr(config, key, None))} in its "
                         f"config.json; it should be {right}")

    for key, least in family.sizes.items():
        most = MOST_LAYERS if "layers" in key else LARGEST_SIZE
        size = getattr(config, key, least if key in _OPTIONAL else None)
        if type(size) is not int or not least <= size <= most:
            refuse(key, f"a whole number from {least} to {most:,}")
    for key in family.fractions:
        number = getattr(config, key, 0.0)
        if type(number) not in (int, float) or not 0 <= number < 1:
            refuse(key, "a number from 0 to 1")
    for key, values in family.built.items():
        if getattr(config, key, None) not in values:
            refuse(key, f"{values[0]}; nothing else is built")
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise UsageError(f"{name} has {config.position_embedding_type} positions; only absolute "
                         "ones are built")
    width, heads, positions = (
        family.own_names.get(key, key)
        for key in ("hidden_size", "num_attention_heads", "max_position_embeddings"))
    if getattr(config, width) % getattr(config, heads):
        refuse(width, f"a multiple of the {getattr(config, heads)} attention heads")
    if family.distances:
        for key, size in (("embedding_size", config.hidden_size), (
                "attention_head_size", config.hidden_size // config.num_attention_heads)):
            if getattr(config, key, size) != size:
                refuse(key, f"{size}; nothing else is built")
        most = 2 * farthest_distance(config) - 3
        if 0 <= getattr(config, "position_buckets", -1) not in range(2, most + 1):
            refuse("position_buckets", f"-1, or a whole number from 2 to {most}")
    if _pad_token_id(config) >= config.vocab_size:
        refuse("pad_token_id", f"less than vocab_size, which is {config.vocab_size}")
    if most_tokens(config) < LEAST_POSITIONS:
        refuse(positions, f"at least {LEAST_POSITIONS + first_position(config)}")


def check_row_length(settings: Settings, most: int) -> None:
    """Raise UsageError unless the model's `most` positions suffice for max_seq_length tokens."""
    if settings.max_seq_length > most:
        raise UsageError(
            f"{settings.source('max_seq_length')} {settings.max_seq_length}: "
            f"{settings.model_name_or_path} has positions for {most} tokens; use at most {most}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def first_position(config: Any) -> int:
    """Return the position of a window's first token, as the model counts."""
    return _pad_token_id(config) + 1 if family_of(config).positions_after_padding else 0


def _pad_token_id(config: Any) -> int:
    """Return pad_token_id, which old files leave out where it is the family's usual one."""
    return getattr(config, "pad_token_id", int(family_of(config).positions_after_padding))


def most_tokens(config: Any) -> int:
    """Return how many tokens of a window the model has positions for."""
    return config.max_position_embeddings - first_position(config)


def farthest_distance(config: Any) -> int:
    """Return the distance between tokens beyond which DeBERTa tells none apart."""
    most = getattr(config, "max_relative_positions", -1)
    return config.max_position_embeddings if most < 1 else most


def row_kind(config: Any) -> Dict[str, Any]:
    """Return what qa/data/rows.py needs to know of a model, as arguments other than RoBERTa's."""
    wanted: Dict[str, Any] = {"pad_token_id": config.pad_token_id}
    if not family_of(config).positions_after_padding:
        wanted["first_position"] = 0
    if getattr(config, "type_vocab_size", 1) > 1:
        wanted["token_types"] = True
    return wanted
