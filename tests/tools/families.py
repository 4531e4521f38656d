"""Train a small model of each family from random weights, packed, and show that its loss falls.

    python -m tests.tools.families FOLDER [FAMILY ...]

FOLDER holds train.json and validation.json in SQuAD's layout. Everything is written to a temporary
folder. Prints each family's mean loss at the beginning and at the end, and its metrics.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    BertTokenizerFast,
    DistilBertTokenizerFast,
)

_WIDTH, _LAYERS, _HEADS, _INNER = 60, 4, 3, 130
_BERT = dict(hidden_size=_WIDTH, num_hidden_layers=_LAYERS, num_attention_heads=_HEADS,
             intermediate_size=_INNER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_DEBERTA = dict(**_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0,
                position_biased_input=False)
FAMILIES = {
    "deberta": _DEBERTA, "deberta-v2": dict(**_DEBERTA, share_att_key=True, position_buckets=32,
                                            norm_rel_ebd="layer_norm"),
    "bert": _BERT, "electra": {**_BERT, "embedding_size": 32},
    "distilbert": dict(dim=_WIDTH, n_layers=_LAYERS, n_heads=_HEADS, hidden_dim=_INNER,
                       dropout=0.0, attention_dropout=0.0, qa_dropout=0.0)}


def write_model(folder, family, texts, seed=0):
    """Write a model with random weights and a WordPiece tokenizer that is trained on `texts`."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = (normalizers.BertNormalizer(),
                                                 pre_tokenizers.BertPreTokenizer())
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=2000, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    kind = DistilBertTokenizerFast if family == "distilbert" else BertTokenizerFast
    kind(tokenizer_object=backend, model_max_length=512).save_pretrained(str(folder))
    config = AutoConfig.for_model(family, **FAMILIES[family], pad_token_id=0,
                                  vocab_size=backend.get_vocab_size(), initializer_range=0.08)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForQuestionAnswering.from_config(config).save_pretrained(
            str(folder), safe_serialization=True)


def texts_of(path):
    """All contexts and questions of a file in SQuAD's layout."""
    paragraphs = [paragraph for article in json.loads(Path(path).read_text("utf-8"))["data"]
                  for paragraph in article["paragraphs"]]
    return [text for paragraph in paragraphs
            for text in (paragraph["context"], *(qa["question"] for qa in paragraph["qas"]))]


def losses_of(printed):
    """The mean losses that a run has printed, in order."""
    return [float(loss) for loss in re.findall(r"^step .* loss ([0-9.]+)", printed, re.MULTILINE)]


def main(data, *families):
    data, script = Path(data), Path(__file__).resolve().parents[2] / "train.py"
    with tempfile.TemporaryDirectory() as folder:
        for family in families or FAMILIES:
            out = Path(folder) / family
            write_model(out / "model", family, texts_of(data / "train.json"))
            printed = subprocess.run(
                [sys.executable, str(script), "--model_name_or_path", out / "model", "--train_file",
                 data / "train.json", "--validation_file", data / "validation.json", "--output_dir",
                 out / "run", "--pack", "--num_train_epochs", "4", "--learning_rate", "2e-3",
                 "--gradient_accumulation_steps", "16", "--layers_per_ipu", "1", "1", "1", "1",
                 "--logging_steps", "5", "--show_predictions", "0"],
                check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
            losses = losses_of(printed)
            metrics = json.loads((out / "run" / "metrics.json").read_text("utf-8"))
            print(f"{family}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} log lines, "
                  f"exact match {metrics['exact_match']:.1f}, F1 {metrics['f1']:.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
