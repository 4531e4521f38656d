"""Runs of train.py that are killed, stopped or refused, or that diverge, and what they leave."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from qa.run.checkpoint import find_checkpoint
from qa.run.nonfinite import find_nonfinite
from tests.tools.kill_and_resume import ROOT, differences

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, configurations and uninterrupted runs.

    tests.tools.kill_and_resume makes them while it kills and compares runs; what it prints is in
    the file `said`.
    """
    work = tmp_path_factory.mktemp("work")
    command = [
        sys.executable, "-m", "tests.tools.kill_and_resume", "--kills", "2", "--seed", "3",
        "--work",
        str(work)]
    with open(work / "said", "w") as said:
        subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT)
    return work


def start(work, name, output_dir, *flags):
    """Start train.py in a new process group; what it prints can be read from `.stdout`."""
    command = [
        sys.executable,
        str(ROOT / "train.py"), "--config",
        str(work / f"{name}.yaml"), "--output_dir",
        str(output_dir)]
    environment = {**ENVIRONMENT, "HF_DATASETS_CACHE": str(work / "cache")}
    return subprocess.Popen([*command, *flags], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, universal_newlines=True,
                            start_new_session=True)


def end(run):
    """Wait for a run; returns its exit status and the rest of what it printed."""
    with run:
        said = run.stdout.read()
    return run.wait(), said


def test_killed_runs_end_bit_for_bit_as_if_never_interrupted(work):
    said = (work / "said").read_text()
    assert re.match("2 kills survived in [0-9]+ runs", said.splitlines()[-1]), said


def test_a_signal_stops_after_the_step_with_a_checkpoint_from_which_the_run_goes_on_exactly(work):
    """The run is stopped by SIGINT, resumed, stopped by SIGTERM, and resumed to its end.

    SIGINT is sent as a terminal does, to the loader's worker as well.
    """
    for number, status, after in ((signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 5)):
        run = start(work, "packed", work / "stopped", "--resume_from_checkpoint", "auto",
                    "--logging_steps", "1")
        while not run.stdout.readline().startswith(f"step {after}/12 "):
            assert run.poll() is None
        os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
        found, said = end(run)
        assert found == status and "Traceback" not in said, said
        assert re.search(
            f"(?m)^stopped by {number.name} after step .*; "
            "the same command with --resume_from_checkpoint auto", said)
    found, said = end(start(work, "packed", work / "stopped", "--resume_from_checkpoint", "auto"))
    assert found == 0, said
    # The file holds the state of Python's generator, which the system seeds in each process.
    # Nothing draws from it.
    assert set(differences(work / "packed-reference", work / "stopped")) <= {
        "checkpoint-12/training_state.json"}


def test_going_on_with_another_seed_is_refused(work):
    found, said = end(
        start(work, "packed", work / "packed-reference", "--resume_from_checkpoint", "auto",
              "--seed", "7"))
    assert found == 2 and "Traceback" not in said, said
    assert re.search("(?m)^error: .*checkpoint-12: --seed was 42, is 7. Go on", said)


def test_a_run_that_diverges_stops_with_what_to_try_and_keeps_the_last_good_checkpoint(work):
    flags = ["--learning_rate", "1e30", "--save_steps", "1", "--warmup_ratio", "0.5"]
    found, said = end(start(work, "unpacked", work / "diverged", *flags))
    assert found == 1 and "Traceback" not in said, said
    assert re.search(
        r"error: step \d+: the loss is nan, .* learning rate .*, try --learning_rate 3e-05",
        said), said
    weights = load_file(find_checkpoint(work / "diverged", "auto") / "model.safetensors")
    assert find_nonfinite(weights.items()) is None
