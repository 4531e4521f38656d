"""python -m planner compare: flags, files, runs and profiles side by side."""
from __future__ import annotations

import json
import re
import shlex
import sys
from types import SimpleNamespace

import pytest

from ipu_options.popvision import profiling_environment
from planner.commands import main
from planner.page import curves
from planner.sides import Side
from qa.data.demo import write_demo
from qa.settings import parse_train
from runtime.errors import UsageError
from tests.end_to_end.test_train import fit
from tests.planner.test_planner import SMALL, no_calibration, recorded_profile  # noqa: F401

FLAGS, SHAPE = " ".join(SMALL), SMALL[:6]


def compared(capsys, *words):
    """Return the comparison as JSON, sides by name."""
    capsys.readouterr()
    assert main(["compare", *words[:2], "--json", *words[2:]]) == 0
    found = json.loads(capsys.readouterr().out)
    return {side["name"]: side for side in found["sides"]}, found["differences"]


def planned(capsys, *flags):
    """Return what `plan --json` prints."""
    capsys.readouterr()
    assert main(["plan", *SMALL, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def write_run(folder, device, *flags, **settings):
    """Write the record and log of a run with these flags, as train.py does."""
    given, ipu_config = parse_train([*flags])
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({
        "settings": {**given.values(), "dataset_name": None, **settings},
        "ipu_config": ipu_config.for_pod("pod4").values()}))
    lines = [{"event": "started", "step": 0, "device": device}] + [
        {"event": "log", "step": step, "epoch": 1.0, "loss": 4.0 / step,
         "windows_per_second": speed, "rows_per_second": speed / 2, "data_share": share,
         "step_share": 1 - share, "rest_share": 0.0}
        for step, speed, share in ((1, 700.0, 0.1), (2, 900.0, 0.3))] + [
        {"event": "evaluation", "step": 2, "epoch": 1.0, "questions": "validation", "f1": 80.0},
        {"event": "evaluation", "step": 2, "epoch": 1.0, "questions": "test", "f1": 10.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_flags_a_file_and_a_saved_plan_are_each_their_own_plan(tmp_path, capsys):
    two = planned(capsys, "--micro_batch_size", "2", "--ipu", "bow")
    (tmp_path / "two.json").write_text(json.dumps(two))
    (tmp_path / "ipu_config.json").write_text(json.dumps(
        {"layers_per_ipu": [2, 2], "gradient_accumulation_steps": 16}))
    short = [*SMALL[:6], *SMALL[11:]]  # without layers_per_ipu, which is the file's
    sides, differences = compared(capsys, "--layers_per_ipu 1 1 1 1", str(tmp_path / "two.json"),
                                  str(tmp_path), "--", *short)
    assert [side["kind"] for side in sides.values()] == ["flags", "saved plan", "ipu_config.json"]
    assert sides["A"]["plan"] == planned(capsys) and sides["B"]["plan"] == two
    assert sides["C"]["plan"]["layers_per_ipu"] == [2, 2]
    assert differences == {
        "micro_batch_size": {"A": 1, "B": 2, "C": 1}, "ipu": {"A": "mk2", "B": "bow", "C": "mk2"},
        "layers_per_ipu": {"A": [1] * 4, "B": [1] * 4, "C": [2, 2]},
        "ipus_per_replica": {"A": 4, "B": 4, "C": 2},
        "pod_type": {"A": "pod4", "B": "pod4", "C": "pod2"},
        # What a plan does not hold (the learning rate) makes no difference by itself.
        "gradient_accumulation_steps": {"A": 32, "B": 32, "C": 16}}


@pytest.mark.slow
def test_runs_of_a_host_begin_with_their_curves_and_have_plans_only_if_asked_for(tmp_path, capsys):
    pytest.importorskip("plotly")
    one, two, page = (str(tmp_path / name) for name in ("one", "two", "page.html"))
    write_run(tmp_path / "one", "host")
    write_run(tmp_path / "two", "host", "--seed", "5")
    sides = [Side.from_word(name, item, []) for name, item in (("A", one), ("B", two))]
    for key, points in (("loss", ((1, 2), (4.0, 2.0))), ("f1", ((2,), (80.0,))),
                        ("windows_per_second", ((1, 2), (700.0, 900.0)))):
        traces = curves(sides)[key]["data"]
        assert [(trace["x"], trace["y"]) for trace in traces] == [points] * 2
    for asked in ([], ["--", "--ipu", "mk2"]):
        assert main(["compare", one, two, "--html", page, *asked]) == 0
        text, html = capsys.readouterr().out, (tmp_path / "page.html").read_text()
        assert ("as planned" in text) == ('id="memory"' in html) == bool(asked)
        shown = re.findall(r'id="(loss|f1|windows_per_second|throughput|memory)"', html)
        assert shown[:3] == ["loss", "f1", "windows_per_second"] and bool(shown[3:]) == bool(asked)
    assert all(side["plan"] for side in compared(capsys, one, two)[0].values())  # JSON has all


def test_the_text_has_each_side_at_each_ipu_and_stage(tmp_path, capsys):
    """Also for flags that are longer than the name of a file can be."""
    assert main(["compare", FLAGS, FLAGS + 10 * " --micro_batch_size 2 --max_seq_length 48"]) == 0
    text = capsys.readouterr().out
    for what in ("IPU", "stage"):
        found = re.findall(rf"^  ({what} \d+)  +(\w)  ", text, re.M)
        assert found == [(f"{what} {i}", side) for i in range(4) for side in "AB"]
    assert re.search(r"micro_batch_size +1 +2\n", text)
    bubbles = re.search(r"pipeline bubbles .*? (\S+) % +(\S+) %", text).groups()
    # Forward and backward through S = 4 stages, 32 micro-batches take 32 + 2 S - 2 steps.
    assert bubbles == (f"{100 * 6 / 38:.1f}",) * 2


def test_measured_figures_of_a_host_are_never_in_a_row_of_ipus(tmp_path, capsys):
    for device in ("IPU", "host"):
        write_run(tmp_path / device, device)
    assert main(["compare", str(tmp_path / "IPU"), str(tmp_path / "host"), "--", *SHAPE]) == 0
    text = capsys.readouterr().out
    assert re.search(r"windows/s, measured on IPUs +900 +-\n", text)
    assert re.search(r"windows/s, measured on a host without IPUs +- +900.0\n", text)
    assert re.search(r"relative to its plan +\d\.\d\d +-\n", text)
    assert re.search(r"F1, last evaluation +80.00 % +80.00 %\n", text)
    assert re.search(r"waited for data \(measured\) +20.0 % +20.0 %\n", text)


def test_a_packed_run_is_planned_with_the_windows_it_measured(tmp_path, capsys):
    write_run(tmp_path / "run", "IPU", "--pack", train_file="own.json")
    sides, _ = compared(capsys, str(tmp_path / "run"), "--pack --windows_per_row 2", "--", *SHAPE)
    assert sides["A"]["plan"]["windows_per_row"] == 2.0
    assert sides["A"]["plan"]["windows_per_second"] == sides["B"]["plan"]["windows_per_second"]


def test_a_run_whose_model_is_gone_keeps_its_measured_figures(tmp_path, capsys):
    write_run(tmp_path / "run", "host", model_name_or_path=str(tmp_path / "gone"))
    sides, _ = compared(capsys, str(tmp_path / "run"), FLAGS)
    assert sides["A"]["plan"] is None and "gone" in sides["A"]["note"]
    assert sides["A"]["measured"]["windows_per_second"] == 900.0


@pytest.mark.slow
def test_a_real_run_differs_from_its_own_flags_in_nothing(tmp_path, capsys):
    write_demo(tmp_path / "data", seed=5)
    assert fit(tmp_path / "data", tmp_path / "run", "--max_steps", "2", "--do_train",
               "--max_train_samples", "64") == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    sides, _ = compared(capsys, str(tmp_path / "run"), str(tmp_path / "run"))
    assert sides["A"]["plan"] is not None, sides["A"]["note"]
    assert sides["A"]["measured"]["windows_per_second"] == results["windows_per_second"]
    assert sides["A"]["measured"]["device"] == "host"
    for name, value in sides["A"]["settings"].items():
        if name in record["settings"] and name != "pod_type":
            assert value == record["settings"][name], name


def test_a_profile_is_set_beside_its_own_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pva", SimpleNamespace(
        openReport=lambda path: recorded_profile(slow_ipu=2)))
    monkeypatch.delenv("PVTI_OPTIONS", raising=False)
    settings, ipu_config = parse_train(["--profile_dir", str(tmp_path / "profile"),
                                        "--micro_batch_size", "2"])
    monkeypatch.setenv("PVTI_OPTIONS", "{}")
    profiling_environment(settings, ipu_config, "training")
    (tmp_path / "profile" / "training" / "profile.pop").write_bytes(b"")
    sides, differences = compared(capsys, str(tmp_path / "profile"), "--micro_batch_size 1",
                                  "--", *SHAPE)
    assert sides["A"]["profile"]["total_bytes"] == [4000, 8000, 12000, 16000]
    assert sides["A"]["plan"]["micro_batch_size"] == 2
    assert differences["micro_batch_size"] == {"A": 2, "B": 1}
    assert main(["compare", str(tmp_path / "profile"), "", "--", *SHAPE]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^  IPU \d +A profiled ", text, re.M)) == 4
    assert re.search(r"IPU 2 +A +0.00", text.split("Time in ms of the profiled call")[1])


@pytest.mark.parametrize("words, message", [
    (["A.json"], "1 given"),
    (["nothing.json", ""], 'A, "nothing.json": there is no such file or folder'),
    (["", "--packk"], r'B, "--packk": --packk: there is no such flag \(did you mean --pack'),
    (["", '--config "'], 'B, "--config "": No closing quotation'),
    (["{folder}", ""], "a folder with no profile.pop in it; name"),
    (["{folder}/list.json", ""], "holds a list"),
    (["{folder}/part.json", ""], r"A, .*part.json: not a whole plan \(KeyError: 'phase'\)"),
    (["", "{folder}/hole.json", "--", *SHAPE], r"B, .*hole.json: not a whole plan \(KeyError: 'f"),
    (["{folder}/run", ""], "A, .*run: run.json has no config, .*layers_per_ipu: give the folder"),
    (["{folder}/inference.json", FLAGS], "A is of inference|B is of training"),
    ([FLAGS, FLAGS, "--plot", "x.txt"], "--plot x.txt: name a .png"),
])
def test_what_cannot_be_compared_is_refused_in_one_line(words, message, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "part.json").write_text('{"update_parts_seconds": {"host": 1}, "ipus": 3}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"settings": {"pack": false}, "ipu_config": {}}')
    if "hole" in " ".join(words):
        plan = planned(capsys)
        (tmp_path / "hole.json").write_text(json.dumps({**plan, "stages": [
            {name: value for name, value in stage.items() if name != "forward_seconds"}
            for stage in plan["stages"]]}))
    if "inference" in words[0]:
        (tmp_path / "inference.json").write_text(json.dumps(planned(capsys, "--inference")))
    with pytest.raises(UsageError, match=message) as refused:
        main(["compare", *(word.format(folder=tmp_path) for word in words)])
    assert "\n" not in str(refused.value)


def test_inference_is_compared_by_its_calls(capsys):
    words = shlex.split(FLAGS)
    assert main(["compare", "", "--eval_micro_batch_size 4", "--inference", "--", *words]) == 0
    text = capsys.readouterr().out
    assert "Where the time of a call goes" in text and "eval_micro_batch_size" in text


@pytest.mark.slow
def test_plans_runs_and_profiles_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pva", SimpleNamespace(
        openReport=lambda path: recorded_profile(slow_ipu=2)))
    write_run(tmp_path / "run", "host")
    write_run(tmp_path / "gone", "IPU", model_name_or_path=str(tmp_path / "nowhere"))
    (tmp_path / "profile.pop").write_bytes(b"")  # without settings beside it
    for sides in ([FLAGS, str(tmp_path / "run"), str(tmp_path / "profile.pop")],
                  [str(tmp_path / "gone"), str(tmp_path / "profile.pop")]):
        assert main(["compare", *sides, "--plot", str(tmp_path / "sides.png")]) == 0
        assert (tmp_path / "sides.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_line_says_which_wins_by_how_much_through_what_at_what_price(capsys):
    words = ["compare", "", "--layers_per_ipu 6 6 6 6", "--json", "--", "--config",
             "squad_large_384", "--pod_type", "pod16"]
    assert main(words) == 0
    a, b = (side["plan"] for side in json.loads(capsys.readouterr().out)["sides"])
    assert main([word for word in words if word != "--json"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    slowest = [max(ipu["busy_seconds"] for ipu in plan["ipus"]) / plan["micro_batches"] * 1e3
               for plan in (b, a)]
    more = (b["ipus"][0]["total_bytes"] - a["ipus"][0]["total_bytes"]) / 2**20
    assert line == (
        f"B is {100 * (b['windows_per_second'] / a['windows_per_second'] - 1):.0f} % faster than "
        f"A: its slowest IPU takes {slowest[0]:.2f} against {slowest[1]:.2f} ms a micro-batch; it "
        f"needs {more:.0f} MiB more than A on IPU 0, and leaves {b['free_bytes'] / 2**20:.0f} MiB "
        f"free on IPU {b['fullest_ipu']}, its fullest.")
