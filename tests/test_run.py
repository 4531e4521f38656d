"""Around the loop: one live run in a folder, signals, the record of a run, and what is said of numbers gone wrong."""
from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ipu_options.errors import UsageError
from qa.run import StopSignals, explain_nonfinite, find_nonfinite, output_lock, write_run_record

ROOT = Path(__file__).resolve().parent.parent


def start(script, *arguments):
    """A Python process with the project on its path, that talks to the test line by line."""
    return subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", *map(str, arguments)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)


HOLD = """
import os, signal
from qa.run import output_lock
with output_lock(sys.argv[1]):
    forked = os.fork()  # as the workers that prepare data are; it outlives its parent
    if forked == 0:
        signal.pause()
    print(os.getpid(), forked, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_a_second_run_is_refused_while_the_first_is_alive_and_only_then(tmp_path, end):
    first = start(HOLD, tmp_path / "output")
    holder, forked = first.stdout.readline().split()
    with pytest.raises(UsageError, match=f"--output_dir .*/output: process {holder} on .* is writing there"):
        with output_lock(tmp_path / "output"):
            pass
    if end == "killed":
        first.kill()
    else:
        first.stdin.close()
    first.wait()
    with output_lock(tmp_path / "output"):
        pass
    os.kill(int(forked), signal.SIGKILL)


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--output_dir .*file/output: cannot be written .Not a directory.; name a folder that can"):
        with output_lock(tmp_path / "file" / "output"):
            pass


LOOP = """
from qa.run import StopSignals
with StopSignals() as stop:
    print("begun", flush=True)
    for step in iter(sys.stdin.readline, ""):
        print("step", step.strip(), flush=True)
        if stop.requested:
            print("saved", flush=True)
            sys.exit(stop.exit_status)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_lets_the_step_finish_and_the_second_kills(number, status):
    loop = start(LOOP)
    assert loop.stdout.readline() == "begun\n"
    loop.send_signal(number)
    assert loop.stderr.readline() == "\n"
    assert loop.stderr.readline() == f"{number.name}: saving after this step; once more to stop at once\n"
    out, err = loop.communicate("1\n")
    assert (out, err, loop.returncode) == ("step 1\nsaved\n", "", status)

    loop = start(LOOP)
    loop.stdout.readline()
    loop.send_signal(number)
    loop.stderr.readline(), loop.stderr.readline()
    loop.send_signal(number)
    loop.wait()
    assert loop.returncode == -number  # a shell reports 128 + number


def test_signals_are_handled_as_before_when_the_loop_is_over():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested is signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


WORKER = """
import multiprocessing, os, signal
from qa.run import workers_ignore_interrupt
def work(pipe):
    for word in iter(pipe.recv, None):
        pipe.send(word)
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born with it ignored
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with workers_ignore_interrupt():
        worker = multiprocessing.get_context("spawn").Process(target=work, args=(theirs,), daemon=True)
        worker.start()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for turn in range(2):
        ours.send(turn)
        assert ours.recv() == turn
        os.kill(worker.pid, signal.SIGINT)
    ours.send(None)
    worker.join()
    print("worker ended with", worker.exitcode)
"""


def test_an_interrupt_leaves_the_loaders_worker_alive(tmp_path):
    """In a file, since a spawned process imports the main module again."""
    (tmp_path / "main.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WORKER}")
    assert subprocess.check_output([sys.executable, str(tmp_path / "main.py")], universal_newlines=True) == "worker ended with 0\n"


@pytest.mark.parametrize("flag", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_the_record_of_a_run_repeats_it_and_keeps_no_token(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["train.py", *flag, "--output_dir", "a folder"])
    write_run_record(tmp_path, settings={"seed": 42, "hub_token": "hf_secret"}, data_fingerprint="ab12", resumed_from=None)
    text = (tmp_path / "run.json").read_text()
    record = json.loads(text)
    assert "hf_secret" not in text and record["command"].endswith("--output_dir 'a folder'")
    assert record["settings"]["seed"] == 42 and record["data_fingerprint"] == "ab12"
    assert torch.__version__.startswith(record["versions"]["torch"].split("+")[0])


# ---- Numbers gone wrong: real ones, from a least-squares fit by gradient descent


def fit(*, learning_rate, loss_scaling=1.0, half_gradients=False, growth=1.0, steps=200):
    """Losses up to the first that is not finite. Gradients are scaled, held in float16 as an IPU holds them, and unscaled."""
    torch.manual_seed(0)
    weight, losses = torch.zeros(8), []
    inputs = torch.randn(64, 8)
    target = inputs @ torch.randn(8) + torch.randn(64)
    for step in range(steps):
        error = inputs @ weight - target
        losses.append(error.square().mean().item())
        if not math.isfinite(losses[-1]):
            return losses
        gradient = inputs.t() @ error / 32 * loss_scaling * growth ** step
        weight = weight - learning_rate * (gradient.half().float() if half_gradients else gradient) / loss_scaling
    return losses


def explained(losses, **known):
    assert not math.isfinite(losses[-1])
    return explain_nonfinite(step=len(losses), loss=losses[-1], earlier_losses=losses[:-1], **known)


def test_divergence_and_overflow_are_told_apart():
    diverged = fit(learning_rate=3.0)
    message = explained(diverged, learning_rate=3.0, loss_scaling=64.0, precision="float16")
    assert f"step {len(diverged)}: the loss is" in message and "the run diverged" in message and "--learning_rate 1 " in message
    overflowed = fit(learning_rate=0.01, loss_scaling=1024.0, half_gradients=True, growth=1.1)
    assert len(overflowed) > 10
    message = explained(overflowed, learning_rate=0.01, loss_scaling=1024.0, precision="float16")
    assert "float16 overflowed" in message and "--loss_scaling 128" in message and "diverged" not in message
    assert "\n" not in message
    steady = explained([2.0] * 8 + [math.nan], learning_rate=0.3, loss_scaling=1.0, precision="float32")
    assert "--learning_rate 0.1" in steady and "overflow" not in steady
    assert all(map(math.isfinite, fit(learning_rate=0.01, loss_scaling=1024.0 / 8, half_gradients=True)))  # the advice is good


def test_the_first_step_and_weights_found_bad_before_a_save_are_explained_too():
    known = dict(learning_rate=2e-5, loss_scaling=64.0, precision="float16")
    assert "step 1: the loss is nan" in explain_nonfinite(step=1, loss=math.nan, earlier_losses=[], **known)
    tensors = {"count": torch.tensor(3), "good": torch.ones(2), "half": torch.tensor([1.0, 70000.0]).half()}
    bad = find_nonfinite(tensors.items())
    message = explain_nonfinite(step=8, loss=1.5, earlier_losses=[1.5] * 8, bad_tensor=bad, **known)
    assert bad == "half" and "half is not finite after the update (the loss was 1.5)" in message and "--loss_scaling 8" in message
    bad = "Gradient___embeddings.bias"
    message = explain_nonfinite(step=8, loss=1.5, earlier_losses=[1.5] * 8, bad_tensor=bad, **known)
    assert "the gradient of embeddings.bias is not finite (the loss was 1.5)" in message and message.endswith("try --loss_scaling 8")
    unscaled = dict(known, loss_scaling=1.0)
    for precision, remedy in (("float16", "--precision float32"), ("float32", "--learning_rate")):
        message = explain_nonfinite(step=8, loss=1.5, earlier_losses=[1.5] * 8, bad_tensor=bad, **{**unscaled, "precision": precision})
        assert remedy in message and "--loss_scaling" not in message
    del tensors["half"]
    assert find_nonfinite(tensors.items()) is None
