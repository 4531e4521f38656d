"""Checkpoints that plain transformers wrote, in a folder or on the hub.

A server on the loopback interface takes the place of the hub.
"""
from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ipu_options.errors import UsageError
from qa.model.pretrained import load_config, load_tokenizer
from qa.settings import TrainSettings
from tests.reference.loopback import Handler, serving
from tests.reference.windows import tokenizer_of

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Ada was born in Oslo in 1888."
COMMIT = "0123456789" * 4
QUESTION = ["--question", "Where was Ada born?", "--context", TEXT, "--json"]


class Hub(Handler):
    """The endpoints that reading a repository uses: its description, its tree and its files."""

    def do_GET(self):
        path, models = self.path.split("?")[0].strip("/"), self.server.models
        self.server.asked.append(path)
        match = re.fullmatch(
            r"(api/models/)?(.+?)(/(revision|resolve|tree)/([^/]+))?(/[^/]+)?", path)
        is_api, name, _, what, revision, file = match.groups()
        if what is None and file:
            name, file = name + file, None
        if name not in models or revision not in (None, "main", COMMIT):
            kind = "RepoNotFound" if name not in models else "RevisionNotFound"
            return self.send(b"", 404, {"X-Error-Code": kind})
        folder = models[name]
        files = sorted(path.name for path in folder.iterdir())
        if is_api and what == "tree":
            return self.send(json.dumps([
                {"type": "file", "path": name, "size": (folder / name).stat().st_size,
                 "oid": hashlib.sha1((folder / name).read_bytes()).hexdigest()}
                for name in files]).encode())
        if is_api:
            return self.send(json.dumps({
                "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [],
                "downloads": 0, "siblings": [{"rfilename": name} for name in files]}).encode())
        if file is None or file[1:] not in files:
            return self.send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = (folder / file[1:]).read_bytes()
        return self.send(content, 200, {
            "X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    do_HEAD = do_GET


@pytest.fixture
def hub():
    with serving(Hub) as server:
        server.models, server.asked = {}, []
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What save_pretrained writes: whole, in shards, without a trained head, and a pickle."""
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForQuestionAnswering

    root = tmp_path_factory.mktemp("foreign")
    tokenizer = tokenizer_of("roberta")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=66, initializer_range=0.5)
    model = RobertaForQuestionAnswering(config).eval()
    model.save_pretrained(root / "whole", safe_serialization=True)
    model.save_pretrained(root / "shards", safe_serialization=True, max_shard_size="20KB")
    RobertaForMaskedLM(config).save_pretrained(root / "headless", safe_serialization=True)
    config.save_pretrained(root / "pickled")
    torch.save(model.state_dict(), root / "pickled" / "pytorch_model.bin")
    for folder in root.iterdir():
        tokenizer.save_pretrained(folder)
    return root


@pytest.fixture
def run(tmp_path, hub):
    """A function: run a script with the loopback hub and an empty cache, (status, out, err)."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE",
                 "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)

    def run(*command, **more):
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT,
                              env={**environment, **more}, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True)
        return done.returncode, done.stdout, done.stderr

    return run


def answer_by_transformers(folder):
    """The best span and its probability among all spans, by plain transformers."""
    from transformers import AutoTokenizer, RobertaForQuestionAnswering

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = RobertaForQuestionAnswering.from_pretrained(folder).eval()
    row = tokenizer(QUESTION[1], TEXT, return_tensors="pt", return_offsets_mapping=True)
    offsets = row.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        out = model(**row)
    context = [place for place, which in enumerate(row.sequence_ids()) if which == 1]
    start, end = out.start_logits[0], out.end_logits[0]
    first, last = max(((i, j) for i in context for j in context if i <= j < i + 30),
                      key=lambda span: (start[span[0]] + end[span[1]]).item())
    return TEXT[offsets[first][0]:offsets[last][1]]


def test_a_folder_of_save_pretrained_answers_as_transformers_does(folders, run):
    expected = answer_by_transformers(folders / "whole")
    for name in ("whole", "shards"):
        status, out, err = run("infer.py", "--checkpoint", folders / name, *QUESTION,
                               "--precision", "float32")
        assert status == 0 and json.loads(out)["answer"] == expected
        notes = [line for line in err.splitlines() if line.startswith("note: ")]
        assert notes == [
            f"note: {folders / name} has no qa_settings.json and no ipu_config.json; taken: "
            "--max_seq_length 64 --doc_stride 21 --version_2_with_negative false "
            "--layers_per_ipu -1 -1; flags change that"]


@pytest.mark.slow
def test_a_name_on_the_hub_answers_like_its_folder_and_from_the_cache(folders, run, hub):
    hub.models = {"ada/roberta-squad2": folders / "shards"}
    command = ("infer.py", "--checkpoint", "ada/roberta-squad2", *QUESTION)
    status, out, err = run(*command)
    assert status == 0, err
    assert "--version_2_with_negative true (by its name)" in err
    assert run("infer.py", "--checkpoint", folders / "shards", "--version_2_with_negative",
               *QUESTION)[1] == out
    asked = len(hub.asked)
    assert run(*command, HF_HUB_OFFLINE="1")[:2] == (0, out) and len(hub.asked) == asked


@pytest.mark.slow
def test_training_takes_the_name_too_and_says_that_the_head_is_random(folders, run, hub, tmp_path):
    hub.models = {"ada/headless": folders / "headless"}
    questions = tmp_path / "train.jsonl"
    questions.write_text("".join(json.dumps({
        "id": str(i), "question": "Where?", "context": TEXT,
        "answers": {"text": ["Oslo"], "answer_start": [16]}}) + "\n" for i in range(4)))
    status, out, err = run(
        "train.py", "--model_name_or_path", "ada/headless", "--train_file", questions,
        "--validation_file", questions, "--output_dir", tmp_path / "out", "--max_seq_length", "64",
        "--doc_stride", "16", "--layers_per_ipu", "2", "1", "--gradient_accumulation_steps", "3",
        "--num_train_epochs", "1")
    assert status == 0, err
    assert "note: ada/headless has no trained head for question answering" in err
    assert (tmp_path / "out" / "model.safetensors").is_file()


REFUSED = [
    ("ada/pickled", "main", 2, "its weights only in pytorch_model.bin.*a pickle can run code.*"
     r"convert it: python -c .*'ada/pickled'.*'pickled'"),
    ("ada/none", "main", 1, "it has no model of that name"),
    ("ada/whole", "v9", 1, "it has no revision v9"),
    ("ada/who le", "main", 2, "no such folder"), ("/no/such/folder", "main", 2, "no such folder")]


@pytest.mark.slow
@pytest.mark.parametrize("name, revision, status, message", REFUSED)
def test_what_the_hub_does_not_give_is_one_line(folders, run, hub, name, revision, status, message):
    hub.models = {f"ada/{folder.name}": folder for folder in folders.iterdir()}
    given, _, err = run("infer.py", *QUESTION, "--checkpoint", name, "--model_revision", revision)
    assert given == status and re.match(f"error: --checkpoint {name}: .*{message}", err), err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_training_refuses_a_pickle_before_it_reads_data(folders, run, hub, tmp_path):
    hub.models = {"ada/pickled": folders / "pickled"}
    status, _, err = run("train.py", "--model_name_or_path", "ada/pickled", "--train_file",
                         ROOT / "README.md", "--validation_file", ROOT / "README.md",
                         "--output_dir", tmp_path / "out")
    assert status == 2 and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert re.match("error: --model_name_or_path ada/pickled: .*" + REFUSED[0][3], err), err


@pytest.mark.slow
def test_the_command_that_converts_a_pickle_does(folders, run, tmp_path):
    import shutil
    folder = tmp_path / "pickled"
    shutil.copytree(folders / "pickled", folder)
    status, _, err = run("infer.py", "--checkpoint", folder, *QUESTION)
    assert status == 2
    code = re.search(r'python -c "(.*)"', err).group(1)
    assert run("-c", code)[0] == 0
    status, out, _ = run("infer.py", "--checkpoint", folder, *QUESTION, "--precision", "float32")
    assert status == 0 and json.loads(out)["answer"] == answer_by_transformers(folders / "whole")


def refused_tokenizers():
    """Tokenizers that no model of 389 embeddings can be trained with, and what is said of each."""
    added = copy.deepcopy(tokenizer_of("roberta"))
    added.add_tokens(["Oslo"])
    backend = tokenizer_of("xlm-roberta").backend_tokenizer
    bare = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    return {
        "an added token": (added, "ids up to 389, and the model embeddings for 389"),
        "no CLS": (PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"),
                   "has no CLS token"),
        "no post-processor": (PreTrainedTokenizerFast(tokenizer_object=bare, cls_token="<s>",
                                                      unk_token="<unk>"), "no CLS token around")}


@pytest.mark.parametrize("kind", list(refused_tokenizers()))
def test_a_tokenizer_that_does_not_fit_is_refused_before_any_work(folders, tmp_path, kind):
    tokenizer, message = refused_tokenizers()[kind]
    tokenizer.save_pretrained(tmp_path)
    settings = TrainSettings(model_name_or_path=str(folders / "whole"), max_seq_length=64,
                             tokenizer_name=str(tmp_path))
    config = load_config(settings)
    config.vocab_size = 389
    with pytest.raises(UsageError, match=f"^--tokenizer_name {tmp_path}: .*{message}") as refusal:
        load_tokenizer(settings, config)
    assert "\n" not in str(refusal.value)
