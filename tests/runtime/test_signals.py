"""The lock on the output folder, and how signals are handled."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import UsageError
from runtime.signals import StopSignals, output_lock, raise_stopped

ROOT = Path(__file__).resolve().parents[2]


def start(script, *arguments):
    """Start a script in a Python process that can import the project and has text pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}",
         *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True)


HOLD = """
import os, signal
from runtime.signals import output_lock
with output_lock(sys.argv[1]):
    forked = os.fork()  # like the workers that prepare data; it lives longer than its parent
    if forked == 0:
        signal.pause()
    print(os.getpid(), forked, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_a_second_run_is_refused_while_the_first_is_alive_and_only_then(tmp_path, end):
    first = start(HOLD, tmp_path / "output")
    holder, forked = first.stdout.readline().split()
    with pytest.raises(UsageError,
                       match=f"--output_dir .*/output: process {holder} on .* is writing there"):
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
    with pytest.raises(
            UsageError,
            match="--output_dir .*file/output: cannot be written .Not a directory.; "
            "name a folder that can"):
        with output_lock(tmp_path / "file" / "output"):
            pass


LOOP = """
from runtime.signals import StopSignals
with StopSignals() as stop, stop.deferred():
    print("begun", flush=True)
    for step in iter(sys.stdin.readline, ""):
        print("step", step.strip(), flush=True)
        if stop.poll():
            print("saved", flush=True)
            sys.exit(stop.exit_status)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130),
                                            (signal.SIGHUP, 129)])
def test_the_first_signal_lets_the_step_finish_and_the_second_kills(number, status):
    loop = start(LOOP)
    assert loop.stdout.readline() == "begun\n"
    loop.send_signal(number)
    assert loop.stderr.readline() == "\n"
    assert loop.stderr.readline() == (
        f"{number.name}: saving after this step; once more to stop at once\n")
    out, err = loop.communicate("1\n")
    assert (out, err, loop.returncode) == ("step 1\nsaved\n", "", status)

    loop = start(LOOP)
    loop.stdout.readline()
    loop.send_signal(number)
    loop.stderr.readline(), loop.stderr.readline()
    loop.send_signal(number)
    loop.wait()
    assert loop.returncode == -number  # which a shell reports as 128 + number


def test_signals_are_handled_as_before_when_the_loop_is_over():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested is None and stop.poll() is stop.requested is signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_ends_a_part_that_is_immediate_and_waits_elsewhere():
    with StopSignals() as stop, stop.deferred():
        with stop.immediate():
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the part went on")
        assert stop.requested is signal.SIGINT and stop.exit_status == 130


def test_a_signal_just_before_a_part_that_is_immediate_ends_it_where_it_looks():
    with StopSignals() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        with stop.immediate():
            raise_stopped()
            raise AssertionError("the part went on")
        assert stop.requested is signal.SIGTERM
