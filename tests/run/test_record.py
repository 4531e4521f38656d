"""run.json, the record of a run's settings, versions and data."""
from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from ipu_options.config import IPUConfig
from qa.run.record import write_run_record
from qa.settings import TrainSettings


@pytest.mark.parametrize("flag", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_the_record_of_a_run_repeats_it_and_keeps_no_token(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["train.py", *flag, "--output_dir", "a folder"])
    rows = SimpleNamespace(windows=SimpleNamespace(fingerprint="ab12"))
    write_run_record(TrainSettings(output_dir=str(tmp_path), seed=43, hub_token="hf_secret"),
                     IPUConfig(), rows, saved=None)
    text = (tmp_path / "run.json").read_text()
    record = json.loads(text)
    assert "hf_secret" not in text and record["command"].endswith("--output_dir 'a folder'")
    assert record["settings"]["seed"] == 43 and record["data_fingerprint"] == "ab12"
    assert torch.__version__.startswith(record["versions"]["torch"].split("+")[0])
