"""Windows with labels as transformers' run_qa makes them: padded, labels found token by token."""
from __future__ import annotations

from typing import Union


def features(batch: dict, tokenizer, max_seq_length: int = 384, doc_stride: int = 128,
             padding: Union[str, bool] = "max_length"):
    """Turn a batch of examples into windows, for `datasets.Dataset.map`."""
    encoded = tokenizer([question.lstrip() for question in batch["question"]], batch["context"],
                        truncation="only_second", max_length=max_seq_length, stride=doc_stride,
                        return_overflowing_tokens=True, return_offsets_mapping=True,
                        padding=padding)
    source, mapping = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    encoded["start_positions"], encoded["end_positions"] = [], []
    for i, offsets in enumerate(mapping):
        texts, answers = encoded.sequence_ids(i), batch["answers"][source[i]]
        start = end = encoded["input_ids"][i].index(tokenizer.cls_token_id)
        if answers["text"]:
            first, after = answers["answer_start"][0], answers["answer_start"][0] + len(
                answers["text"][0])
            low, high = texts.index(1), len(texts) - 1
            while texts[high] != 1:
                high -= 1
            if offsets[low][0] <= first and offsets[high][1] >= after:
                while low < len(offsets) and offsets[low][0] <= first:
                    low += 1
                while offsets[high][1] >= after:
                    high -= 1
                start, end = low - 1, high + 1
        encoded["start_positions"].append(start)
        encoded["end_positions"].append(end)
    return encoded
