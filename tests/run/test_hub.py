"""Pushing to the hub, with huggingface_hub itself as the client.

A server on the loopback interface takes the place of the hub.
"""
from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qa.answers.answerer import Answerer
from qa.run.hub import model_card
from qa.settings import TrainSettings
from tests.reference.loopback import Handler, serving
from tests.reference.small_demo import write_small_demo

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model_name_or_path": "roberta-base", "dataset_name": "squad", "train_file": None,
    "validation_file": None, "version_2_with_negative": False, "max_seq_length": 384,
    "learning_rate": 2e-5, "seed": 42, "hub_token": "***", }
RUN = {
    "command": "train.py", "settings": SETTINGS, "ipu_config": {
        "layers_per_ipu": [0, 4, 4, 4], "replication_factor": 4}, "data_fingerprint": "ab12cd",
    "versions": {"python": "3.8.10", "torch": "2.0.1"}, "machine": {"host": "secret-host"}, }
METRICS = {"exact_match": 85.266, "f1": 91.747, "step": 692, "epoch": 2.0}


def mode(path):
    return "lfs" if path.endswith(".safetensors") else "regular"


class Hub(Handler):
    """The endpoints that an upload uses.

    These are who-am-I, creation, pre-upload, batch and content of large files, and commit.
    """

    def do_GET(self):
        if self.require_token():  # the only GET request is who-am-I
            self.reply({"type": "user", "name": "ada", "auth": {"type": "access_token"}})

    def do_PUT(self):
        self.server.large[self.path.split("/")[-1]] = self.body()
        self.reply({})

    def do_POST(self):
        body = self.body()
        if self.path == "/api/validate-yaml":
            return self.reply({"warnings": [], "errors": []})
        if not self.require_token():
            return None
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.reply({"url": f"{self.server.url}/ada/{self.server.created['name']}"})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.reply({
                "files": [{"path": path, "shouldIgnore": False, "uploadMode": mode(path)}
                          for path in paths]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]]
            return self.reply({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path and not self.server.read_only:
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            return self.reply({
                "commitUrl": f"{self.server.url}/ada/m/commit/0123", "commitOid": "0123",
                "success": True})
        return self.reply({"error": "You don't have the rights to write here"}, 403)

    def require_token(self):
        if self.headers.get("Authorization") == "Bearer hf_good":
            return True
        self.reply({"error": "Invalid credentials"}, 401)
        return False

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, value, status=200):
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


@pytest.fixture
def hub():
    with serving(Hub) as server:
        server.large, server.commits, server.created, server.read_only = {}, [], None, False
        yield server


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    for private in ("predictions.json", ".lock", "checkpoint-5/config.json", "demo_data/train.json",
                    "pytorch_model.bin"):
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_text("private")
    return folder


CALL = """
import json, sys
sys.path.insert(0, {root!r})
from runtime.errors import run_script
from qa.run import hub
from qa.settings import TrainSettings
name, argument = json.loads(sys.argv[1])
argument = TrainSettings(push_to_hub=True, **argument)
sys.exit(run_script(lambda: getattr(hub, name)(argument)))
"""


def call(url, name, argument):
    """Call a function of qa.run.hub in a new process.

    huggingface_hub reads the environment only when it is imported.
    """
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": "", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN_PATH": "/nonexistent/token", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([
        sys.executable, "-c",
        CALL.format(root=str(ROOT)),
        json.dumps([name, argument], default=str)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)


def test_the_model_and_its_card_are_committed_and_nothing_private(hub, trained):
    done = call(hub.url, "push",
                {"output_dir": trained, "hub_token": "hf_good", "hub_private_repo": True})
    assert (done.stdout, done.stderr, done.returncode) == (f"shared: {hub.url}/ada/m/commit/0123\n",
                                                           "", 0)
    assert hub.created["name"] == "my-model"  # huggingface_hub 2 asks for a visibility
    assert hub.created.get("private") is True or hub.created["visibility"] == "private"
    (commit,) = hub.commits
    small = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit
        if line["key"] == "file"}
    large = {
        line["value"]["path"]: line["value"]["oid"] for line in commit if line["key"] == "lfsFile"}
    assert set(small) == {"README.md", "config.json", "tokenizer.json", "metrics.json"}
    assert large == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert hub.large == {large["model.safetensors"]: b"weights"}
    assert small["README.md"].decode() == (trained / "README.md").read_text() == card_of(trained)


def card_of(folder, **settings):
    return model_card(folder, "ada/my-model", TrainSettings(output_dir=str(folder), **settings))


@pytest.mark.slow
def test_a_run_that_only_evaluates_shares_the_model_with_its_new_metrics(hub, trained, tmp_path):
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "metrics.json").write_text('{"exact_match": 12.5, "f1": 25.0}')
    (scores / "confidence.json").write_text(
        '{"measure": "score", "right_from_f1": 0.5, "rows": [{"from": 0.25, "answers": 10, '
        '"right": 0.75}]}')
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    settings = {"output_dir": scores, "do_eval": True, "model_name_or_path": trained,
                "validation_file": "/home/ada/new.csv", "hub_token": "hf_good"}
    assert call(hub.url, "check_push", settings).returncode == 0
    done = call(hub.url, "push", settings)
    assert done.stdout == f"shared: {hub.url}/ada/m/commit/0123\n", done.stderr
    (commit,) = hub.commits
    small = {line["value"]["path"]: base64.b64decode(line["value"]["content"]).decode()
             for line in commit if line["key"] == "file"}
    assert set(small) == {"README.md", "config.json", "tokenizer.json", "metrics.json",
                          "confidence.json"}
    assert "right |\n| ---: | ---: | ---: |\n| 0.250 | 10 | 75 % |\n\n## Data" in (
        small["README.md"])
    assert json.loads(small["metrics.json"])["f1"] == 25.0 and hub.large
    assert "| f1 | 25.00 |" in small["README.md"] and "evaluated on new.csv" in small["README.md"]
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    (trained / "run.json").unlink()
    refused = call(hub.url, "check_push", settings)
    assert refused.returncode == 2 and "(it has no run.json): name one" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "token, repo_id, read_only, status, message",
    [("hf_bad", "ada/m", False, 1,
      "error: could not push .*my-model to the hub: .*401.*`(hf|huggingface-cli) upload ada/m"),
     ("hf_good", "ada/m", True, 1,
      "error: could not push .*my-model to the hub: .*403.*the model is whole in"),
     ("hf_good", "a/b/c", False, 2, "error: --hub_model_id a/b/c: Repo id must be"),
     ("hf_good", "-.-", False, 2, "error: --hub_model_id -.-: "), ], ids=[
         "a refused token", "no right to write", "too many slashes", "no name at all"])
def test_what_goes_wrong_is_one_line(hub, trained, token, repo_id, read_only, status, message):
    hub.read_only = read_only
    done = call(hub.url, "push",
                {"output_dir": trained, "hub_model_id": repo_id, "hub_token": token})
    assert done.returncode == status and len(done.stderr.splitlines()) == 1
    assert re.match(message, done.stderr), done.stderr


@pytest.mark.slow
def test_a_login_is_checked_before_the_run(hub):
    assert call(hub.url, "check_push", {"hub_token": "hf_good"}).returncode == 0
    for token in ("hf_bad", None):
        refused = call(hub.url, "check_push", {"hub_token": token})
        assert refused.returncode == 2
        assert refused.stderr.startswith(
            "error: --push_to_hub: no valid access token; give --hub_token")
    gone = call("http://127.0.0.1:1", "check_push", {"hub_token": "hf_good"})
    assert gone.returncode == 1 and gone.stderr.startswith(
        "error: --push_to_hub: the hub cannot be reached (")
    assert len(gone.stderr.splitlines()) == 1


def test_the_card_says_what_was_done(trained):
    card = card_of(trained)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "roberta-base" and head["datasets"] == "squad" and head[
        "pipeline_tag"] == "question-answering"
    (entry,) = head["model-index"]
    results = {
        metric["type"]: metric["value"] for result in entry["results"]
        for metric in result["metrics"]}
    assert results == {"exact_match": 85.266, "f1": 91.747}
    assert "CPU host" not in card
    for words in ("| exact_match | 85.27 |", "| layers_per_ipu | [0, 4, 4, 4] |",
                  "| learning_rate | 2e-05 |", "`ab12cd`", 'name = "ada/my-model"',
                  "| torch | 2.0.1 |"):
        assert words in card
    assert "secret-host" not in card and "hub_token" not in card
    (trained / "metrics.json").unlink()
    assert "## Results\n\nNot evaluated.\n" in card_of(trained)

    local = {
        **RUN, "settings": {
            **SETTINGS, "model_name_or_path": str(trained),
            "train_file": "/home/ada/data/train.json",
            "version_2_with_negative": True}}
    (trained / "run.json").write_text(json.dumps(local))
    card = card_of(trained, validation_file="/home/ada/data/dev.json")
    head = yaml.safe_load(card.split("---\n")[1])
    assert ("base_model" not in head and "datasets" not in head and "/home" not in card
            and str(trained) not in card)
    assert "on train.json, evaluated on dev.json" in card and "SQuAD v2" in card


@pytest.mark.slow
def test_the_cards_code_runs_and_answers_as_infer_does(trained, tmp_path, capsys):
    """Of a model with random weights, on the transformers that is installed."""
    write_small_demo(tmp_path / "demo", train=4, validation=1)
    shutil.copytree(tmp_path / "demo" / "model", trained, dirs_exist_ok=True)
    run = {**RUN, "machine": {"device": "host"}}
    (trained / "run.json").write_text(json.dumps(run))
    card = card_of(trained)
    assert "as a pipeline over Graphcore IPUs, for which a CPU host stood in.\n" in card
    code = re.search("```python\n(.*?)```", card, re.DOTALL).group(1)
    exec(code.replace('"ada/my-model"', repr(str(trained))), {})
    answerer = Answerer.load(trained, precision="float32", max_answer_length=100, n_best_size=100)
    answer = answerer.ask("Where do I live?", "My name is Wolfgang and I live in Berlin.")
    assert capsys.readouterr().out == answer["answer"] + "\n"
