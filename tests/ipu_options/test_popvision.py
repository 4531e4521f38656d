"""PopVision's environment variables and the phases that are timed on the host."""
from __future__ import annotations

import json
import os

import pytest

from ipu_options.config import DeviceSettings, IPUConfig
from ipu_options.popvision import PhaseTimer, profiling_environment
from runtime.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.setenv("PVTI_OPTIONS", "")  # whatever a test sets it to is undone afterwards


def test_environment_keeps_what_the_user_set_and_notes_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("PVTI_OPTIONS", '{"channels": "train"}')
    settings = DeviceSettings(profile_dir=str(tmp_path / "profile"), pod_type="pod16")
    profiling_environment(settings, IPUConfig(layers_per_ipu=[0, 4, 4, 4]), "training", "inference")
    options = json.loads(os.environ["PVTI_OPTIONS"])
    assert options == {
        "enable": "true", "directory": str(tmp_path / "profile" / "host"), "channels": "train"}
    for phase in ("training", "inference"):
        note = json.loads((tmp_path / "profile" / phase / "framework.json").read_text())
        assert (note["layers_per_ipu"] == [0, 4, 4, 4] and note["pod_type"] == "pod16"
                and "sources" not in note)


def test_nothing_happens_without_a_folder():
    profiling_environment(DeviceSettings(), IPUConfig(), "training")
    assert os.environ["PVTI_OPTIONS"] == ""


def test_environment_that_is_not_json_and_folders_that_cannot_be_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        profiling_environment(DeviceSettings(profile_dir=str(tmp_path / "file")), IPUConfig(),
                              "training")
    monkeypatch.setenv("PVTI_OPTIONS", "{enable")
    with pytest.raises(UsageError, match="should be a JSON object"):
        profiling_environment(DeviceSettings(profile_dir=str(tmp_path / "profile")), IPUConfig(),
                              "training")


def test_spans_nest_and_are_written_even_when_the_loop_fails(tmp_path):
    path = tmp_path / "trace.json"
    with pytest.raises(ValueError):
        with PhaseTimer("train", DeviceSettings(trace=str(path))) as timer:
            with timer("step"):
                with timer("data"):
                    pass
                raise ValueError("a loop that ends badly")
    events = {e["name"]: e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"}
    data, step = events["data"], events["step"]
    assert step["ts"] <= data["ts"] and data["ts"] + data["dur"] <= step["ts"] + step["dur"]


def test_the_time_of_each_phase_adds_up():
    with PhaseTimer("train", DeviceSettings()) as timer:
        for _ in range(3):
            with timer("step"):
                with timer("data"):
                    pass
    assert set(timer.seconds) == {"step", "data"} and timer.seconds["step"] > timer.seconds["data"]
