"""run.json, log.jsonl and its readers, and progress where the output is no terminal."""
from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from ipu_options.config import IPUConfig
from qa.run.log import LOG, RunLog, before_resume, read_log
from qa.run.progress import progress_bar
from qa.settings import TrainSettings, parse_train
from runtime.errors import UsageError

ROWS = SimpleNamespace(windows=SimpleNamespace(fingerprint="ab12"))


def test_a_killed_runs_log_is_read_without_the_line_that_it_left_incomplete(tmp_path):
    with RunLog(TrainSettings(output_dir=str(tmp_path), compile_only=False)) as log:
        log.begin(IPUConfig(), ROWS)
        log.add("log", 2, 0.5, loss=1.5, learning_rate=1e-5)
    with open(tmp_path / LOG, "a", encoding="utf-8") as file:
        file.write('{"event": "log", "step": 4, "lo')
    lines = read_log(tmp_path / LOG)
    assert [(line["event"], line["step"]) for line in lines] == [("started", 0), ("log", 2)]
    assert lines[1]["loss"] == 1.5 and lines[1]["epoch"] == 0.5 and "+00:00" in lines[1]["time"]
    assert read_log(tmp_path / "none.jsonl") == []


def test_a_resumed_run_drops_what_it_does_once_more():
    lines = [{"event": event, "step": step} for event, step in (
        ("started", 0), ("log", 2), ("saved", 2), ("evaluation", 2), ("log", 4), ("saved", 4),
        ("trained", 4), ("evaluation", 4))]
    assert before_resume(lines, 2) == lines[:4]
    assert before_resume(lines, 4) == lines[:6]  # the end is done again


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / LOG).mkdir()
    with RunLog(TrainSettings(output_dir=str(tmp_path))) as log:
        log.begin(IPUConfig(), ROWS)
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {tmp_path / LOG}: cannot write it (Is a directory)")


def test_a_missing_or_contradictory_reporter_is_one_line_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for flags, message in (("wandb", "--report_to wandb needs the package wandb: pip install"),
                           ("none wandb", "--report_to none wandb: none excludes the others"),
                           ("mlflow", "--report_to mlflow: choose from tensorboard, wandb, none")):
        with pytest.raises(UsageError, match=message):
            parse_train(["--report_to", *flags.split()])


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for seconds, lines in ((3600, []), (1e-9, ["Answers: window 8/20", "Answers: window 20/20"])):
        with progress_bar(20, "Answers", "window", seconds=seconds) as bar:
            bar.update(8)
            tqdm.write("a log line")
            bar.update(12)
        assert sys.stderr.getvalue().splitlines() == lines


def test_a_line_of_the_log_is_plain_json(tmp_path):
    with RunLog(TrainSettings(output_dir=str(tmp_path))) as log:
        log.add("nonfinite", 3, why='the loss is nan: "é"')
    (line,) = (tmp_path / LOG).read_text("ascii").splitlines()
    assert json.loads(line)["why"] == 'the loss is nan: "é"'


@pytest.mark.parametrize("flag", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"],
                                  ["--token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_the_record_of_a_run_repeats_it_and_keeps_no_token(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["train.py", *flag, "--output_dir", "a folder"])
    RunLog(TrainSettings(output_dir=str(tmp_path), seed=43, hub_token="hf_secret")).begin(
        IPUConfig(), ROWS)
    text = (tmp_path / "run.json").read_text()
    record = json.loads(text)
    assert "hf_secret" not in text and record["command"].endswith("--output_dir 'a folder'")
    assert record["settings"]["seed"] == 43 and record["data_fingerprint"] == "ab12"
    assert torch.__version__.startswith(record["versions"]["torch"].split("+")[0])
