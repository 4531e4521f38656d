"""The data of the benchmarks: made-up questions, a tokenizer trained on them, untrained models."""
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Iterable, Iterator

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROBERTA_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def made_up(count: int, questions_per_context: int = 5, seed: int = 0) -> Iterator[dict]:
    """Yield `count` made-up questions with SQuAD's columns, one at a time, in constant memory.

    `questions_per_context` consecutive questions share a context. The texts are random words, each
    of which becomes one token of `train_tokenizer`. The number of words is drawn so that windows
    are as long as SQuAD's: 181 tokens on average, 300 at the 95th percentile.
    """
    rng = random.Random(seed)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10)))
        for _ in range(5000)]
    for number in range(count):
        if number % questions_per_context == 0:
            chosen = rng.choices(words, k=20 + int(rng.gammavariate(5.0, 29.0)))
        place = rng.randrange(1, len(chosen))
        yield {
            "id": str(number), "question": " ".join(rng.choices(words, k=11)) + "?",
            "context": " ".join(chosen), "answers": {
                "text": [chosen[place]], "answer_start": [len(" ".join(chosen[:place])) + 1]}}


def as_dataset(count: int, questions_per_context: int, folder: str):
    """Made-up questions as a memory-mapped data set.

    It is written row by row, so memory does not grow with `count`.
    """
    import datasets

    answers = {
        "text": datasets.Sequence(datasets.Value("string")),
        "answer_start": datasets.Sequence(datasets.Value("int32"))}
    columns = {name: datasets.Value("string") for name in ("id", "question", "context")}
    return datasets.Dataset.from_generator(
        made_up, gen_kwargs=dict(count=count, questions_per_context=questions_per_context),
        features=datasets.Features({**columns, "answers": answers}), cache_dir=folder)


def write_questions(path: Path, questions: Iterable[dict]) -> None:
    """Write questions as JSON Lines."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(question) + "\n" for question in questions)


def train_tokenizer(texts: Iterable[str]):
    """Train RoBERTa's kind of tokenizer, a byte-level BPE, with at most 20,000 entries."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import RobertaTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=20_000, show_progress=False, special_tokens=SPECIAL)
    backend = Tokenizer.from_str(bpe.to_str())
    backend.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return RobertaTokenizerFast(tokenizer_object=backend, model_max_length=512)


def write_model(folder: Path, tokenizer, layers: int, **shape) -> None:
    """Write a RoBERTa with random weights, and its tokenizer, in Hugging Face's layout.

    `shape` has the keys of ROBERTA_BASE.
    """
    import torch
    from transformers import RobertaConfig, RobertaForQuestionAnswering

    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=len(tokenizer), num_hidden_layers=layers,
                           max_position_embeddings=514, type_vocab_size=1, **shape)
    RobertaForQuestionAnswering(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
