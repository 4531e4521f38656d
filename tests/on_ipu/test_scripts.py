"""What train.py and infer.py do on an IPU, with the demo's model on 4 IPUs."""
import contextlib
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import RobertaConfig, RobertaForQuestionAnswering

import infer
import train
from planner.commands import main as planner_command
from planner.from_settings import MODELS
from planner.profile import open_profile
from planner.sweep import read_rows
from qa.data.demo import write_demo
from tests.end_to_end.test_train import SMALL, flat, run
from tests.on_ipu.conftest import on_host

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TRAINING = [*SMALL, "--pack", "--precision", "float16", "--loss_scaling", "64"]


def call(script, *arguments):
    """Run a script in this process and free its IPUs; returns (exit status, what it printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = run(script, *arguments)
    gc.collect()
    return status, out.getvalue()


def flags(demo, out, *more):
    return [*TRAINING, "--model_name_or_path", demo / "model", "--train_file", demo / "train.json",
            "--validation_file", demo / "validation.json", "--output_dir", out, *more]


def start(*arguments):
    """Start train.py in a process of its own; what it prints can be read from `.stdout`."""
    return subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), *map(str, arguments)], cwd=ROOT, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """Runs of train.py with one executable cache: {name: (exit status, output, cached files)}.

    offline: only compiles. whole: 4 steps, saved and evaluated after 2. plain: 4 steps without
    that. resumed: from the whole run's checkpoint after step 2.
    """
    folder, done = tmp_path_factory.mktemp("runs"), {}
    cache, steps = folder / "cache", ("--max_steps", "4")
    commands = {"offline": ["--compile_only"], "plain": [*steps],
                "whole": [*steps, "--save_steps", "2", "--eval_steps", "2"],
                "resumed": [*steps, "--save_steps", "2", "--resume_from_checkpoint",
                            folder / "whole" / "checkpoint-2"]}
    for name, more in commands.items():
        status, said = call(train, *flags(demo, folder / name, "--executable_cache_dir", cache,
                                          *more))
        done[name] = status, said, sorted(path.name for path in cache.rglob("*"))
    return folder, done


def succeeded(runs, *names):
    """Return the output of runs, which must have succeeded."""
    for name in names:
        status, said, _ = runs[1][name]
        assert status == 0, f"{name}: " + said.strip().splitlines()[-1]
    return [runs[1][name][1] for name in names]


def seconds_to_compile(runs, name):
    return json.loads((runs[0] / name / "train_results.json").read_text())["compile_seconds"]


def differing(one, other):
    """Return the names of the weights that differ between the models in two folders."""
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return [name for name in one if not one[name].equal(other[name])]


def test_training_runs(runs, seen):
    """train.py trains, saves and evaluates, packed, in float16, on 4 IPUs."""
    said, _ = succeeded(runs, "whole", "plain")
    seen(re.search(r"PopTorch: .*", said)[0] + "; " + re.findall(r"windows/s [\d.]+", said)[-1])
    assert "evaluation at step 2" in said and "evaluation at step 4" in said
    metrics = json.loads((runs[0] / "whole" / "metrics.json").read_text())
    assert 0 <= metrics["exact_match"] <= metrics["f1"] <= 100


def test_saving_and_evaluating(runs, seen):
    """Saving and evaluating change nothing in the training."""
    succeeded(runs, "whole", "plain")
    names = differing(runs[0] / "whole", runs[0] / "plain")
    seen(f"{len(names)} weights differ")
    assert not names


def test_resuming(runs, seen):
    """A resumed run ends with the same weights."""
    succeeded(runs, "whole", "resumed")
    names = differing(runs[0] / "whole", runs[0] / "resumed")
    seen(f"{len(names)} weights differ")
    assert not names


def test_offline_compilation(runs, seen, only_on_ipu):
    """A run finds what --compile_only has compiled."""
    (said,) = succeeded(runs, "offline")
    assert "nothing was run" in said
    only_on_ipu("nothing is compiled; the command ran")
    succeeded(runs, "plain")
    before, after = runs[1]["offline"][2], runs[1]["plain"][2]
    seen(f"{len(before)} files compiled offline, {len(after)} after the run, whose compilation "
         f"took {seconds_to_compile(runs, 'plain'):.0f} s")
    assert before and before == after


def test_second_start(runs, seen, only_on_ipu):
    """The second start of a run finds its executables in the cache."""
    succeeded(runs, "whole", "resumed")
    only_on_ipu("nothing is compiled")
    before, after = runs[1]["whole"][2], runs[1]["resumed"][2]
    seen(f"{len(before)} files, then {len(after)}; compilation took "
         f"{seconds_to_compile(runs, 'resumed'):.0f} s")
    assert before and before == after


def test_three_ways_to_ask(runs, demo, tmp_path, seen, monkeypatch):
    """infer.py gives the same answers to a question, to a file and in a conversation."""
    succeeded(runs, "whole")
    first, *_ = questions = flat(demo / "validation.json")
    ask = ["--checkpoint", runs[0] / "whole", "--json"]
    answers = tmp_path / "answers.jsonl"
    status, said = call(infer, *ask[:2], "--input_file", demo / "validation.json", "--output_file",
                        answers)
    assert status == 0, said
    by_file = [json.loads(line) for line in answers.read_text().splitlines()]
    status, said = call(infer, *ask, "--question", first["question"], "--context",
                        first["context"])
    assert status == 0, said
    by_flag = json.loads(said.splitlines()[-1])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{first['context']}\n\n{first['question']}\n"))
    status, said = call(infer, *ask)
    assert status == 0, said
    typed = json.loads(re.search(r"\{.*\}", said)[0])
    assert len(by_file) == len(questions)
    scores = [each["score"] for each in (by_file[0], by_flag, typed)]
    seen(f"scores of one answer: {', '.join(f'{score:.4f}' for score in scores)}")
    assert by_file[0]["answer"] == by_flag["answer"] == typed["answer"]
    # The file runs through the pipeline, single questions through one stage after the other.
    assert scores == pytest.approx([scores[0]] * 3, abs=5e-3)
    predictions = json.loads((runs[0] / "whole" / "predictions.json").read_text())
    assert {each["id"]: each["answer"] for each in by_file} == predictions


def test_overflow(demo, tmp_path, seen):
    """An overflow of float16 becomes NaN in the watched gradient, and is diagnosed."""
    status, said = call(train, *flags(demo, tmp_path, "--max_steps", "3", "--loss_scaling", "1e9",
                                      "--watch_gradients", "true"))
    error = said.strip().splitlines()[-1]
    seen(error[:150])
    assert status == 1 and "float16 overflowed" in error and "try --loss_scaling 8192" in error
    assert "error: step 1: the gradient of roberta.embeddings.LayerNorm.bias" in error


def test_synthetic_data(demo, tmp_path, seen):
    """A run on synthetic data is timed to its end, and reads nothing."""
    status, said = call(train, *flags(demo, tmp_path, "--max_steps", "4", "--synthetic_data",
                                      "--logging_steps", "4"))
    assert status == 0, said
    assert "timed on synthetic data: 4 steps; nothing was saved" in said
    seen(re.search(r"windows/s [\d.]+", said)[0])


def test_profile(demo, tmp_path, seen, only_on_ipu, capsys):
    """A profile is where the README says, and `report` reads it."""
    profile, more = tmp_path / "profile", ["--max_eval_samples", "4", "--show_predictions", "0"]
    with start(*flags(demo, tmp_path / "out", "--max_steps", "1", "--profile_dir", profile,
                      *more)) as process:
        said = process.stdout.read()
    assert process.returncode == 0, said
    for phase in ("training", "inference"):
        written = json.loads((profile / phase / "framework.json").read_text())
        assert written["layers_per_ipu"] == [1, 1, 1, 1]
    assert (profile / "host").is_dir()
    only_on_ipu("a host writes no profile; framework.json was there")
    found = sorted(str(path.relative_to(profile)) for path in profile.rglob("*.p*"))
    assert {"training/profile.pop", "inference/profile.pop"} <= set(found), found
    assert any(name.startswith("host/") and name.endswith(".pvti") for name in found), found
    assert planner_command(
        ["report", str(profile), *map(str, flags(demo, tmp_path / "out"))]) == 0
    seen(capsys.readouterr().out.strip().splitlines()[-1])


def test_signals(demo, tmp_path, seen):
    """SIGTERM lets a run finish its step and save, and ends it with status 143."""
    command = flags(demo, tmp_path / "out", "--max_steps", "100000", "--logging_steps", "1",
                    "--resume_from_checkpoint", "auto")
    with start(*command) as process:
        for line in process.stdout:
            if line.lstrip().startswith("step 1/"):
                process.send_signal(signal.SIGTERM)
                break
        said = process.stdout.read()
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", said)
    assert process.returncode == 143 and stopped, said[-300:]
    (step,) = stopped.groups()
    seen(stopped[0])
    assert (tmp_path / "out" / f"checkpoint-{step}" / "manifest.json").is_file()


def test_a_signal_while_compiling(runs, tmp_path, seen, only_on_ipu):
    """SIGTERM ends a compilation at once, and prints no stacks."""
    succeeded(runs, "whole")
    only_on_ipu("nothing is compiled")
    command = [sys.executable, "-u", str(ROOT / "infer.py"), "--checkpoint", runs[0] / "whole",
               "--question", "Who?", "--context", "Ada.", "--executable_cache_dir", tmp_path]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        said = b""
        while b"Graph compilation" not in said:  # its progress bar has no ends of lines
            part = process.stdout.read(1)
            assert part, said
            said += part
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said += process.stdout.read()
    seen(f"status {process.returncode} after {time.monotonic() - begin:.0f} s")
    assert process.returncode == -signal.SIGTERM and b"Current thread" not in said, said[-500:]


def test_calibration(demo, tmp_path, seen, only_on_ipu, capsys):
    """The planner's constants are measured on this machine, and saved for later plans."""
    job, splits, sizes = calibration_job(demo, tmp_path)
    table, profile = tmp_path / "sweep.csv", tmp_path / "profile"
    status = planner_command([
        "sweep", "--layers_per_ipu", *splits, "--micro_batch_size", *sizes, "--run", "--output",
        str(table), "--steps", "10", "--", *job])
    rows = read_rows(table)
    assert status == 0 and all(row["status"].startswith("measured") for row in rows), rows
    with start(*job, "--layers_per_ipu", *splits[0].split(), "--micro_batch_size", sizes[0],
               "--output_dir", tmp_path / "out", "--max_steps", "1", "--synthetic_data",
               "--profile_dir", profile) as process:
        said = process.stdout.read()
    assert process.returncode == 0, said
    only_on_ipu("; ".join(f"{row['setting']}: {row['status']}" for row in rows))
    ipu = "bow" if open_profile(str(profile)).clock_hz > 1.6e9 else "mk2"
    assert planner_command(["calibrate", "--measured", str(table), "--profile", str(profile),
                                "--ipu", ipu, *job]) == 0
    seen("; ".join(capsys.readouterr().out.splitlines()[-1 - len(rows):]))


def calibration_job(demo, folder):
    """Return (train.py's flags, splits, micro-batch sizes) of the runs that calibrate the planner.

    On IPUs the model has the size of roberta-base and random weights, so that nothing is
    downloaded; its speed is that of the trained one. A host, whose speed says nothing about IPUs,
    runs the demo's.
    """
    if on_host():
        return list(map(str, flags(demo, folder / "out"))), ["1 1 1 1"], ["2", "4"]
    write_demo(folder, seed=5)  # enough questions to fill the rows of all steps
    RobertaForQuestionAnswering(RobertaConfig(**MODELS["roberta-base"])).save_pretrained(
        folder / "model")
    return (["--config", "squad_base_384", *(f"--{name}={folder / file}" for name, file in (
        ("model_name_or_path", "model"), ("train_file", "train.json"),
        ("validation_file", "validation.json")))], ["0 4 4 4", "3 3 3 3"], ["1", "2", "4"])
