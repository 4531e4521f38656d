"""tokenizer.json is the tokenizer, whatever the other files call it, and offsets are the text's."""
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from qa.data.tokenizer import QATokenizer
from qa.data.windows import make_windows
from qa.settings import ModelSettings
from tests.data.test_windows import examples_of
from tests.reference.windows import tokenizer_of

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The Falcon Prize (of 1921) went to Zoë, who wrote the book about Oslo, and to Ada."
ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
           "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}


def folder_of(folder, backend, config=ROBERTA):
    """Write a tokenizer's two files."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level():
    backend = Tokenizer.from_str(tokenizer_of("roberta").backend_tokenizer.to_str())
    backend.no_truncation()  # which another test may have set
    return backend


def robbert():
    """A byte-level tokenizer that splits into words first, as RobBERT's: its offsets lie."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Punctuation()])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return backend


def lower_case():
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return backend


@pytest.mark.parametrize("config", [
    {"tokenizer_class": "RobertaTokenizer", **ROBERTA},
    {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True, **ROBERTA},
    {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", **ROBERTA},
    {"tokenizer_class": "OfNoRelease", "cls_token": {"content": "<s>", "lstrip": False}}, {}],
    ids=str)
@pytest.mark.parametrize("backend", [robbert, lower_case])
def test_the_tokens_are_those_of_tokenizer_json_and_of_what_is_saved(tmp_path, backend, config):
    """A known class, one of another release of transformers, one of none, or an old file."""
    tokenizer = QATokenizer.read(folder_of(tmp_path / "a", backend(), config), "it")
    expected = backend().encode(TEXT, TEXT).ids
    texts = [tokenizer.backend.encode(TEXT, add_special_tokens=False).ids] * 2
    assert tokenizer.before + texts[0] + tokenizer.between + texts[1] + tokenizer.after == expected
    assert (tokenizer.cls_token_id, tokenizer.pad_token_id) == (0, 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"model_type": "roberta"}')
    tokenizer.save(tmp_path / "b")
    by_transformers = AutoTokenizer.from_pretrained(str(tmp_path / "b"))
    assert by_transformers(TEXT, TEXT)["input_ids"] == expected
    assert (by_transformers.cls_token_id, by_transformers.pad_token_id) == (0, 1)
    again = QATokenizer.read(tmp_path / "b", "it")
    assert again.file.to_str() == tokenizer.file.to_str() and again[2:] == tokenizer[2:]


def test_files_that_contradict_each_other_are_noted(tmp_path, capsys):
    for key in ("do_lower_case", "add_prefix_space"):
        folder = folder_of(tmp_path, lower_case(), {
            "do_lower_case": True, key: False, "add_prefix_space": key[0] == "a", **ROBERTA})
        QATokenizer.read(folder, "it")
        assert capsys.readouterr().err == (
            f"note: it: its tokenizer_config.json says {key} {str(key[0] == 'a').lower()}, its "
            "tokenizer.json does the opposite; tokenizer.json, which has the tokens, is used\n")


def digits():
    """Real spaces before some words, and those of the pre-tokenizer before others."""
    backend = robbert()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(), pre_tokenizers.Split(" Prize", "isolated"),
        pre_tokenizers.Split(" Quist", "merged_with_next"),
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True)])
    return backend


def metaspace():
    return Tokenizer.from_str(tokenizer_of("xlm-roberta").backend_tokenizer.to_str())


def template():
    backend = robbert()
    backend.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)])])
    return backend


@pytest.mark.parametrize("backend", [robbert, digits, metaspace, template])
def test_offsets_that_lie_are_corrected_and_labels_read_back_are_the_answers(
        tmp_path, caplog, backend):
    """Every word and every two words of the text are answers."""
    words = [(place, place + len(word)) for word in {*TEXT.replace("(", " ").split()}
             for place in [TEXT.index(word)]]
    spans = [*words, *((a, b) for a, _ in words for _, b in words if a < b <= a + 20)]
    tokenizer = QATokenizer.read(folder_of(tmp_path, backend()), "it")
    assert tokenizer.trims
    windows = make_windows(
        examples_of([("Who?", TEXT, span) for span in spans]), tokenizer,
        ModelSettings(max_seq_length=256, doc_stride=32), labels=True, offsets=True)
    for window, span in enumerate(spans):
        first, last = (place[window] - windows.context_start[window]
                       for place in (windows.start_position, windows.end_position))
        offsets = windows.offsets(window)
        read = TEXT[offsets[first, 0]:offsets[last, 1]]
        assert read == TEXT[slice(*span)]
    assert not caplog.records


def test_offsets_that_cannot_be_corrected_are_named_with_figures(tmp_path, caplog):
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(",", "isolated")  # a token is half a sentence
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    tokenizer = QATokenizer.read(folder_of(tmp_path, backend), "it")
    spans = [(4, 10), (11, 16), (35, 38)]
    make_windows(examples_of([("Who?", TEXT, span) for span in spans]), tokenizer,
                 ModelSettings(max_seq_length=64, doc_stride=16), labels=True, offsets=True)
    (record,) = caplog.records
    assert record.getMessage() == (
        "warning: the labels of 3 of 3 answers read back as other text, for example 'The Falcon "
        "Prize (of 1921) went to Zoë' for 'Falcon': the character offsets of it are not those of "
        "its tokens")
