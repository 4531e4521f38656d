"""Checkpoints that plain transformers wrote, in a folder or on the hub.

A server on the loopback interface takes the place of the hub.
"""
from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertConfig, DistilBertConfig, PreTrainedTokenizerFast

from qa.model.pretrained import load_config, load_model, load_tokenizer, save_model
from qa.settings import TrainSettings
from runtime.errors import RunError, UsageError
from runtime.hub import checkpoint_folder
from tests.reference.loopback import Handler, serving
from tests.reference.windows import tokenizer_of

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Ada was born in Oslo in 1888."
COMMIT = "0123456789" * 4
QUESTION = ["--question", "Where was Ada born?", "--context", TEXT, "--json"]


class Hub(Handler):
    """The endpoints that reading a repository uses: its description, its tree and its files."""

    def do_GET(self):
        if self.server.status != 200:
            return self.send(b"<html>" + b"x" * 3000, self.server.status)
        path, models = self.path.split("?")[0].strip("/"), self.server.models
        if not path:  # is the hub there?
            return self.send(b"")
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
        server.models, server.asked, server.status = {}, [], 200
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
    from transformers import AutoModelForQuestionAnswering

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    row = tokenizer(QUESTION[1], TEXT, return_tensors="pt", return_offsets_mapping=True)
    offsets = row.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        out = model(**row)
    context = [place for place, which in enumerate(row.sequence_ids()) if which == 1]
    start, end = out.start_logits[0], out.end_logits[0]
    first, last = max(((i, j) for i in context for j in context if i <= j < i + 30),
                      key=lambda span: (start[span[0]] + end[span[1]]).item())
    return TEXT[offsets[first][0]:offsets[last][1]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_deberta_with_a_sentencepiece_tokenizer_answers_as_transformers_does(tmp_path, run, seed):
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    tokenizer = copy.deepcopy(tokenizer_of("xlm-roberta"))  # all tests share what it returns
    # Of whole words: transformers could answer with a lone mark of a word's begin.
    words = sorted({f"▁{word}" for word in f"{QUESTION[1]} {TEXT}".split()})
    tokenizer.backend_tokenizer.model = models.Unigram(
        [(token, 0.0) for token in ("<unk>", "<pad>", "<s>", "</s>", *words)], 0)
    config = AutoConfig.for_model(
        "deberta-v2", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=96,
        initializer_range=0.5, type_vocab_size=0, relative_attention=True, share_att_key=True,
        position_buckets=8, norm_rel_ebd="layer_norm", pos_att_type="p2c|c2p",
        position_biased_input=False, pad_token_id=1)
    torch.manual_seed(seed)
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(
        tmp_path / "model", safe_serialization=True)
    tokenizer.save_pretrained(tmp_path / "model")
    status, out, _ = run("infer.py", "--checkpoint", tmp_path / "model", *QUESTION, "--precision",
                         "float32")
    assert status == 0
    assert json.loads(out)["answer"] == answer_by_transformers(tmp_path / "model").strip()


@pytest.mark.slow
def test_a_folder_of_save_pretrained_answers_as_transformers_does(folders, run):
    expected = answer_by_transformers(folders / "whole")
    for name in ("whole", "shards"):
        status, out, err = run("infer.py", "--checkpoint", folders / name, *QUESTION,
                               "--precision", "float32")
        assert status == 0 and json.loads(out)["answer"] == expected
        notes = [line for line in err.splitlines() if line.startswith("note: ")]
        assert notes == [
            f"note: {folders / name} has no qa_settings.json and no ipu_config.json; assumed: "
            "--max_seq_length 64 --doc_stride 21 --version_2_with_negative False "
            "--inference_layers_per_ipu -1 -1; flags change that"]


@pytest.mark.slow
def test_a_name_on_the_hub_answers_like_its_folder_and_from_the_cache(folders, run, hub):
    hub.models = {"ada/roberta-squad2": folders / "shards"}
    command = ("infer.py", "--checkpoint", "ada/roberta-squad2", *QUESTION)
    status, out, err = run(*command)
    assert status == 0, err
    assert "--version_2_with_negative True" in err
    assert run("infer.py", "--checkpoint", folders / "shards", "--version_2_with_negative",
               *QUESTION)[1] == out
    asked = len(hub.asked)
    assert run(*command, HF_HUB_OFFLINE="1")[:2] == (0, out) and len(hub.asked) == asked


@pytest.mark.parametrize("files, revision, message", [
    ([], "main", "it does not answer, and the model is not in the cache"),
    (["config.json"], "main", "and the cache has it without weights in safetensors"),
    (["config.json", "pytorch_model.bin"], "main", "its weights only in pytorch_model.bin"),
    (["config.json", "model.safetensors"], "v9", "the cache has only its --model_revision main")])
def test_what_is_cached_and_cannot_be_used_is_said(tmp_path, monkeypatch, files, revision, message):
    commit = tmp_path / "models--ada--m" / "snapshots" / COMMIT
    for name in files:
        commit.mkdir(parents=True, exist_ok=True)
        (commit / name).write_text("{}")
        (tmp_path / "models--ada--m" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--ada--m" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kind = UsageError if "pytorch_model.bin" in files else RunError
    with pytest.raises(kind, match=f"^--checkpoint ada/m: .*{message}"):
        checkpoint_folder("ada/m", "--checkpoint", revision, cache_dir=str(tmp_path))


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
    assert "note: --model_name_or_path ada/headless has no trained head for question" in err
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
@pytest.mark.parametrize("status, cause", [
    (401, "no valid access token, give --hub_token"), (403, "access is forbidden"),
    (429, "too many requests, try again later"), (503, "try again later")])
def test_what_the_hub_answers_is_the_cause_and_not_that_it_is_silent(run, hub, status, cause):
    hub.status = status
    given, _, err = run("infer.py", *QUESTION, "--checkpoint", "ada/whole")
    assert given == 1 and len(err.splitlines()) == 1 and len(err) < 300
    assert f"the hub did not give it (it answers with status {status}: {cause})" in err


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
    folder = tmp_path / "pickled"
    shutil.copytree(folders / "pickled", folder)
    status, _, err = run("infer.py", "--checkpoint", folder, *QUESTION)
    assert status == 2
    code = re.search(r'python -c "(.*)"', err).group(1)
    assert run("-c", code)[0] == 0
    status, out, _ = run("infer.py", "--checkpoint", folder, *QUESTION, "--precision", "float32")
    assert status == 0 and json.loads(out)["answer"] == answer_by_transformers(folders / "whole")


def changed(folder, goal, **values):
    """Copy a checkpoint to `goal` with other values in its config.json; returns its settings."""
    shutil.copytree(folder, goal)
    config = json.loads((goal / "config.json").read_text())
    (goal / "config.json").write_text(json.dumps({**config, **values}))
    return TrainSettings(model_name_or_path=str(goal), max_seq_length=64)


@pytest.mark.parametrize("values, message", [
    ({"num_hidden_layers": 4}, r"its weights lack roberta\.encoder\.layer\.3.* and 15 more"),
    ({"intermediate_size": 48}, r"intermediate.dense.* another size .*\(32 .*and 48"),
    ({"model_type": "camembert"}, None), ({"num_labels": 3}, None),
    ({"num_hidden_layers": 2}, None)])
def test_weights_are_those_of_config_json_or_refused(folders, tmp_path, capfd, values, message):
    """No weight that config.json counts is random. A head has 2 outputs, whatever it counts."""
    settings = changed(folders / "whole", tmp_path / "model", **values)
    config = load_config(settings)
    if message:
        with pytest.raises(RunError, match=f"^--model_name_or_path .*{message}"):
            load_model(settings, config)
        return
    model = load_model(settings, config)
    save_model(model, tmp_path / "again")
    stored = load_file(folders / "whole" / "model.safetensors")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    prefix = {"camembert": "roberta"}.get(config.model_type, config.model_type)
    assert saved and all(torch.equal(stored[name], weight) for name, weight in saved.items())
    assert saved["qa_outputs.bias"].shape == (2, ) and f"{prefix}.embeddings" in str(list(saved))
    said = capfd.readouterr().err.splitlines()  # and no progress bar of transformers
    assert [line[:5] for line in said] == ["note:"] * (config.num_hidden_layers == 2)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_is_the_flags_and_the_saved_files_type_is_float32(folders, tmp_path, kind):
    settings = changed(folders / "whole", tmp_path / "model", torch_dtype=str(kind)[6:],
                       dtype=str(kind)[6:])
    path = tmp_path / "model" / "model.safetensors"
    stored = {name: weight.to(kind) for name, weight in load_file(path).items()}
    save_file(stored, path, {"format": "pt"})
    model = load_model(settings, load_config(settings))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    save_model(model.half(), tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    for name, weight in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(weight, stored[name].half().float())


@pytest.mark.parametrize("metadata", [None, {"format": "np"}])
def test_weights_of_other_programs_have_no_metadata_and_load(folders, tmp_path, metadata):
    settings = changed(folders / "whole", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    stored = {name: weight.clone() for name, weight in load_file(path).items()}
    save_file(stored, path, metadata)
    weights = load_model(settings, load_config(settings)).state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in stored.items())


def test_a_head_of_another_kind_is_refused(folders, tmp_path):
    settings = changed(folders / "whole", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "qa_outputs.weight": torch.ones(3, 16)}, path, {"format": "pt"})
    with pytest.raises(RunError, match=r"its head .* has not 2 outputs.*\(3 x 16 and 2 x 16\)"):
        load_model(settings, load_config(settings))


@pytest.mark.parametrize("values, message", [
    ({"hidden_size": 17}, "hidden_size is 17 .* a multiple of the 2 attention heads"),
    ({"hidden_size": "16"}, "hidden_size is '16' .* a whole number"),
    ({"pad_token_id": 400}, "pad_token_id is 400 .* less than vocab_size, which is 389"),
    ({"max_position_embeddings": 9}, "max_position_embeddings is 9 .* at least 18"),
    ({"hidden_act": "wibble"}, "activation 'wibble'; it should be one of gelu, "),
    ({"layer_norm_eps": "1e-5"}, "layer_norm_eps is '1e-5' .* a number from 0 to 1"),
    ({"add_cross_attention": True}, "it is a decoder")])
def test_a_bad_value_in_config_json_is_the_cause_that_is_named(folders, tmp_path, values, message):
    with pytest.raises(UsageError, match=f"^--model_name_or_path .*{message}"):
        load_config(changed(folders / "whole", tmp_path / "model", **values))


@pytest.mark.parametrize("command", [
    ["train", "--model_name_or_path"], ["train", "--plan", "--model_name_or_path"],
    ["infer", "--question", "Who?", "--context", "Ann", "--checkpoint"]])
def test_a_model_that_cannot_run_is_refused_without_torch(folders, tmp_path, command):
    changed(folders / "whole", tmp_path / "model", model_type="albert")
    script, *flags = command
    code = f"import sys, {script}\ntry:\n    {script}.main()\nexcept ValueError as error:\n" \
        "    print('torch' in sys.modules, error)"
    done = subprocess.run([sys.executable, "-c", code, *flags, str(tmp_path / "model")], cwd=ROOT,
                          stdout=subprocess.PIPE, universal_newlines=True)
    assert re.match("False .* is of the type albert: its layers share one set", done.stdout)


def test_a_tokenizer_that_needs_a_package_is_refused_with_its_name(folders, tmp_path, monkeypatch):
    settings = changed(folders / "whole", tmp_path / "model")
    config = load_config(settings)
    for path in (tmp_path / "model").glob("*"):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(RunError, match="has no tokenizer.json; name a tokenizer by --tokenizer_"):
        load_tokenizer(settings, config)
    (tmp_path / "model" / "sentencepiece.bpe.model").write_bytes(b"")
    monkeypatch.setattr("qa.model.pretrained.find_spec", lambda name: None)
    with pytest.raises(RunError, match="only in sentencepiece.bpe.model, .* pip install sentence"):
        load_tokenizer(settings, config)


@pytest.mark.parametrize("kind, types", [(BertConfig, True), (DistilBertConfig, False)])
def test_a_saved_tokenizer_makes_the_types_that_its_model_takes(tmp_path, kind, types):
    tokenizer_of("bert").save_pretrained(tmp_path)
    load_tokenizer(TrainSettings(model_name_or_path=str(tmp_path)), kind()).save(tmp_path)
    pair = AutoTokenizer.from_pretrained(tmp_path)("Who?", "Ann.")
    assert ("token_type_ids" in pair) == types


def refused_tokenizers():
    """Tokenizers that no model of 389 embeddings can be trained with, and what is said of each."""
    added = copy.deepcopy(tokenizer_of("roberta"))
    added.add_tokens(["Oslo"])
    no_cls = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    bare = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    return {
        "an added token": (added, "ids up to 389, and the model embeddings for 389"),
        "no CLS": (PreTrainedTokenizerFast(tokenizer_object=no_cls, unk_token="<unk>"),
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
