"""The demo's files are as documented, and the ordinary code reads them."""
import json
import resource

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from qa.data.dataset import load_examples
from qa.data.demo import use_demo_data, write_demo
from qa.settings import TrainSettings
from runtime.errors import RunError


@pytest.mark.parametrize("version_2", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_demo(tmp_path, version_2):
    state = torch.random.get_rng_state()
    for folder in ("demo", "again"):
        write_demo(tmp_path / folder, seed=3, version_2_with_negative=version_2)
    assert torch.equal(state, torch.random.get_rng_state())
    for name in ("train.json", "validation.json", "model/tokenizer.json",
                 "model/model.safetensors"):
        assert (tmp_path / "demo" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

    contexts = []
    for split, questions in (("train", 8000), ("validation", 500)):
        file = tmp_path / "demo" / f"{split}.json"
        assert set(json.loads(file.read_text())["data"][0]) == {"title", "paragraphs"}
        examples = load_examples(split=split, file=file, version_2_with_negative=version_2,
                                 cache_dir=tmp_path)
        unanswered = sum(not row["answers"]["text"] for row in examples)
        assert len(examples) == questions and (0.28 < unanswered / questions < 0.39
                                               if version_2 else unanswered == 0)
        contexts.append(set(examples["context"]))
    assert not contexts[0] & contexts[1]

    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "demo" / "model"))
    model = AutoModelForQuestionAnswering.from_pretrained(str(tmp_path / "demo" / "model"))
    assert model.config.num_hidden_layers == 4 and len(tokenizer) <= model.config.vocab_size
    tokens = tokenizer(examples["question"][:], examples["context"][:])["input_ids"]
    assert max(map(len, tokens)) < 80


def test_a_disk_that_takes_no_more_is_named_in_one_line(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
                RunError,
                match=f"^{tmp_path}/demo_data: the demo's files cannot be written "
                "\\(File too large\\); .* --output_dir$"):
            use_demo_data(
                TrainSettings(output_dir=str(tmp_path), seed=1, demo_data=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
