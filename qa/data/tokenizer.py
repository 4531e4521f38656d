"""The tokenizer of a checkpoint: the file tokenizer.json, as the tokenizers library reads it.

transformers 5 rebuilds the tokenizers of classes that it knows from their vocabulary and drops the
file's normalizer and pre-tokenizer; earlier releases change the file's add_prefix_space and do not
know the class names of version 5. The model was trained on the file's tokens.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

from tokenizers import Tokenizer

from runtime.errors import RunError, UsageError, one_line
from runtime.files import read_json_object, write_json

# What old files leave to the class of the tokenizer: RoBERTa's names, or else BERT's.
_USUAL = ({"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
           "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
          {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
           "mask_token": "[MASK]"})
_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
_PROBE = "The Falcon Prize of Ada Quist was hers"


class QATokenizer(NamedTuple):
    """A tokenizer, and how it joins a question and its context."""

    file: Tokenizer  # as it was read
    backend: Tokenizer  # the same tokens, and offsets that `trims` makes exact
    trims: bool  # whether the spaces at the ends of a token's characters are not part of it
    special_tokens: Dict[str, str]  # by their roles: cls_token, pad_token, ...
    before: List[int]  # special tokens before, between and after the two texts
    between: List[int]
    after: List[int]
    context_first: bool  # of tokenizers that pad on the left
    token_types: bool  # whether a model gets the types 0 and 1 for the two texts
    model_max_length: Optional[int]
    name: str  # for messages

    @property
    def cls_token_id(self) -> int:
        """The id of the token that stands for `no answer`."""
        return self.file.token_to_id(self.special_tokens["cls_token"])

    @property
    def pad_token_id(self) -> Optional[int]:
        """The id of the padding token, if there is one."""
        return self.file.token_to_id(self.special_tokens.get("pad_token", ""))

    @classmethod
    def read(cls, folder: Path, name: str) -> "QATokenizer":
        """Return the tokenizer of folder/tokenizer.json, whose other files say the tokens' roles.

        Raises RunError if it cannot be read, and what `of` raises.
        """
        try:
            file = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the tokenizers library raises no other
            raise RunError(f"{name}: its tokenizer cannot be loaded (tokenizer.json: "
                           f"{one_line(error)[:200]})") from error
        values: Dict[str, Any] = {}
        for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
            if path.is_file():
                values.update(read_json_object(path, f"{name}: {path.name}"))
        _note_contradictions(file, values, name)
        special = {role: token["content"] if isinstance(token, dict) else token
                   for role, token in values.items() if role in _USUAL[0] and token}
        usual = next((usual for usual in _USUAL if file.token_to_id(usual["cls_token"])
                      is not None), {})
        special = {**{role: token for role, token in usual.items()
                      if file.token_to_id(token) is not None}, **special}
        return cls.of_backend(file, special, values.get("padding_side") == "left",
                              "token_type_ids" in values.get("model_input_names", _INPUTS),
                              values.get("model_max_length"), name)

    @classmethod
    def of(cls, tokenizer: Any, name: str = "") -> "QATokenizer":
        """Return the same as a fast tokenizer of transformers. Raises what `of_backend` raises."""
        name = name or tokenizer.name_or_path or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(f"{name}: its tokenizer is a slow one, without the character offsets "
                             "that answers need; name one with a tokenizer.json with "
                             "--tokenizer_name")
        special = {role: token for role, token in tokenizer.special_tokens_map.items()
                   if role in _USUAL[0]}
        return cls.of_backend(
            tokenizer.backend_tokenizer, special, tokenizer.padding_side == "left",
            "token_type_ids" in tokenizer.model_input_names, tokenizer.model_max_length, name)

    @classmethod
    def of_backend(cls, file: Tokenizer, special_tokens: Dict[str, str], context_first: bool,
                   token_types: bool, model_max_length: Any, name: str) -> "QATokenizer":
        """Return the same as a tokenizer of the tokenizers library.

        Raises UsageError for one that windows cannot be made with.
        """
        cls_token_id = file.token_to_id(special_tokens.get("cls_token", ""))
        if cls_token_id is None:
            raise UsageError(f"{name}: its tokenizer has no CLS token, which stands for `no "
                             "answer`; name a model of RoBERTa's family")
        if file.truncation or file.padding:  # each text is encoded as a whole
            file = Tokenizer.from_str(file.to_str())
            file.no_truncation()
            file.no_padding()
        pair = file.encode("a", "b")
        first, second = ([place for place, text in enumerate(pair.sequence_ids) if text == number]
                         for number in (0, 1))
        if not first or not second:
            raise UsageError(f"{name}: its tokenizer makes no token of an ordinary text; its "
                             "tokenizer.json is incomplete")
        ids = pair.ids
        special = ids[:first[0]], ids[first[-1] + 1:second[0]], ids[second[-1] + 1:]
        if cls_token_id not in sum(special, []):
            raise UsageError(f"{name}: its tokenizer puts no CLS token around a pair of texts (a "
                             "post_processor in tokenizer.json does), which stands for `no "
                             "answer`")
        backend, trims = _with_exact_offsets(file)
        limit = model_max_length if type(model_max_length) is int else None
        return cls(file, backend, trims, special_tokens, *special, context_first,
                   token_types and 1 in pair.type_ids, limit, name)

    def save(self, folder: Union[str, Path]) -> None:
        """Write tokenizer.json and tokenizer_config.json.

        Their class makes every release of transformers use the file as it is. Raises OSError, or
        what the tokenizers library raises in its place.
        """
        self.file.save(str(Path(folder) / "tokenizer.json"))
        values = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens,
                  "padding_side": "left" if self.context_first else "right",
                  "model_input_names": _INPUTS if self.token_types else _INPUTS[::2],
                  "clean_up_tokenization_spaces": False}
        if self.model_max_length:
            values["model_max_length"] = self.model_max_length
        write_json(Path(folder) / "tokenizer_config.json", values)


def _with_exact_offsets(file: Tokenizer):
    """Return (tokenizer, whether to trim): the same tokens, with the characters they stand for.

    Some tokenizers report spans that begin a character late: a byte-level pre-tokenizer that puts a
    space before each word of an earlier one, after which the post-processor takes the first
    character of the word for that space. Others report spans that begin at the space before a word.
    Without the post-processor's trimming, and with the spaces of the text itself trimmed, both are
    exact.
    """
    if _finds_words(file, False):
        return file, False
    values = json.loads(file.to_str())
    values["post_processor"] = json.loads(json.dumps(values.get("post_processor")), object_hook=(
        lambda part: {**part, "trim_offsets": False} if "trim_offsets" in part else part))
    untrimmed = Tokenizer.from_str(json.dumps(values))
    return (untrimmed, True) if _finds_words(untrimmed, True) else (file, False)


def _finds_words(backend: Tokenizer, trims: bool) -> bool:
    """Return whether a token begins at the first character of each word of a text."""
    begins = {0}
    for begin, end in backend.encode(_PROBE, add_special_tokens=False).offsets:
        if trims and _PROBE[begin:begin + 1] == " " and begin < end:
            begin += 1
        if begin < end:
            begins.add(begin)
    return all(place + 1 in begins for place, character in enumerate(_PROBE) if character == " ")


def _note_contradictions(file: Tokenizer, values: Dict[str, Any], name: str) -> None:
    """Say where tokenizer_config.json describes another tokenizer than tokenizer.json."""
    normalizer, tokens = file.normalizer, file.encode("a", add_special_tokens=False).tokens
    facts = {"do_lower_case": normalizer is not None and normalizer.normalize_str("A") == "a",
             "add_prefix_space": bool(tokens) and tokens[0].startswith(("Ġ", "▁"))}
    for key, fact in facts.items():
        if isinstance(values.get(key), bool) and values[key] != fact:
            print(f"note: {name}: its tokenizer_config.json says {key} "
                  f"{str(values[key]).lower()}, its tokenizer.json does the opposite; "
                  "tokenizer.json, which has the tokens, is used", file=sys.stderr)
