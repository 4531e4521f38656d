"""Checkpoints are read back bit for bit, survive kills and full disks, and do no harm if forged."""
from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from ipu_options import poptorch
from ipu_options.config import DeviceSettings, IPUConfig
from ipu_options.options import training_options
from qa.data.rows import TrainingRows
from qa.run import checkpoint
from qa.run import state as state_module
from qa.run.checkpoint import (
    _AS_FLAGS,
    Checkpoints,
    _check_match,
    check_output_folder,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from qa.run.state import Checkpoint, TrainingState, rng_of_process, set_random_state
from qa.settings import MUST_MATCH, TrainSettings
from runtime import files
from runtime.errors import RunError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def write_model(model, folder, optimizer_state):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)


def save(output_dir, step, write_model=write_model, optimizer=None, rng_state=(42, ),
         losses=(0.5, ), must_match=None, save_total_limit=None):
    if optimizer is None:
        optimizer = {"ipu_state": {"Accl1___w": torch.full((5, ), step)}}
    checkpoints = Checkpoints(output_dir, must_match or {}, write_model, save_total_limit)
    return checkpoints.save(state_at(step, optimizer, rng_state, list(losses)))


def state_at(step, optimizer={}, rng_state=(1, ), losses=()):
    """The state of a training without a model, in place of whose device there are these values."""
    executor = SimpleNamespace(copyWeightsToHostIfNeeded=lambda: None, rng_state=list(rng_state),
                               options=SimpleNamespace(replication_factor=1))
    return TrainingState(None, SimpleNamespace(state_dict=lambda: optimizer), executor, step,
                         list(losses))


def model_at(folder):
    return TrainSettings(model_name_or_path=str(folder), max_seq_length=64)


def save_final(output_dir, write_model):
    Checkpoints(output_dir, {}, write_model).save_final(state_at(0))


def open_run(output_dir, resume_from_checkpoint, overwrite_output_dir, must_match, **settings):
    settings = TrainSettings(
        output_dir=str(output_dir), resume_from_checkpoint=resume_from_checkpoint,
        overwrite_output_dir=overwrite_output_dir, **settings)
    check_output_folder(settings)
    return Checkpoints(output_dir, must_match, write_model).start_or_resume(settings)


def names(output_dir):
    return sorted(path.name for path in Path(output_dir).iterdir())


def assert_same(one, other):
    """Check that two values have the same structure, types and bits."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(
            torch.uint8))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for item, other_item in zip(one, other):
            assert_same(item, other_item)
    else:
        assert repr(one) == repr(other)  # NaN equals itself this way


def test_every_kind_of_state_is_read_back_bit_for_bit(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    optimizer = {
        "ipu_state": {
            "half": torch.tensor([1.5, float("inf"), float("nan"), 6e-8]).half(),
            "bfloat16": torch.randn(3, 2).bfloat16(), "scalar": torch.tensor(7),
            "empty": torch.zeros(0, 3), "a view": shared.t(), "a part": shared[1:],
            "the same memory": shared, "odd / name.\u00e9": torch.tensor([True, False])},
        "ipu_param": None, "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "param_groups": [{
            "lr": 0.1 + 0.2, "betas": (0.9, 0.999), "eps": float("inf"), "foreach": None,
            "params": [0, 1]}]}
    rng_state = [2 ** 64 - 1, 0, 2 ** 32 - 1]
    folder = save(tmp_path, 7, optimizer=optimizer, rng_state=rng_state, losses=[1 / 3, 5e-324],
                  must_match={"seed": 3})
    loaded = load_checkpoint(folder)
    assert_same(loaded.optimizer, optimizer)
    # All files have the same permissions as any other file of the user.
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert (loaded.step, loaded.rng_state, loaded.losses, loaded.must_match, loaded.replicas) == (
        7, rng_state, [1 / 3, 5e-324], {"seed": 3}, 1)
    # Older checkpoints held these under "progress", and no means over windows.
    values = json.loads((folder / "trainer_state.json").read_text())
    older = {"step": values.pop("step"), "progress": {
        key: values[key] for key in ("losses", "must_match", "replicas")}}
    (folder / "trainer_state.json").write_text(json.dumps(older))
    assert repr(load_checkpoint(folder)) == repr(loaded._replace(run_loss=[], logged_loss=[]))


def test_state_of_a_torch_optimizer_continues_exactly(tmp_path):
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    steps(model, optimizer, 3)
    folder = save(tmp_path, 3, optimizer=optimizer.state_dict())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws = random.random(), np.random.rand()
    steps(model, optimizer, 4)

    again = torch.nn.Linear(3, 2)
    again.load_state_dict(weights)
    optimizer_again = torch.optim.AdamW(again.parameters(), lr=7.0)
    loaded = load_checkpoint(folder)
    optimizer_again.load_state_dict(loaded.optimizer)
    set_random_state(loaded.random_state)
    assert (random.random(), np.random.rand()) == draws
    steps(again, optimizer_again, 4)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert_same(optimizer_again.state_dict(), optimizer.state_dict())


def write_weights(model, folder, optimizer_state):
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return poptorch.identity_loss(self.linear(x).float().square().sum(), reduction="none")


def start(output_dir, dtype=torch.float32):
    """A training of `Loss` that accumulates the gradients of two micro-batches in `dtype`."""
    torch.manual_seed(0)
    model = Loss().to(dtype)
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1, accum_type=dtype)
    config = IPUConfig(layers_per_ipu=[1], gradient_accumulation_steps=2, replication_factor=1)
    options = training_options(config, DeviceSettings(), seed=1)
    training_model = poptorch.trainingModel(model, options, optimizer)
    return (TrainingState(model, optimizer, training_model),
            Checkpoints(output_dir, {}, write_weights))


GOOD = list(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)))
BAD = torch.full((4, 3), float("inf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_run_goes_back_to_its_last_checkpoint_after_a_step_gone_wrong(tmp_path, dtype):
    """The run ends as if the batch that went wrong, one of infinities, had been left out.

    That batch comes after two steps and a checkpoint.
    """

    def run(batches):
        state, checkpoints = start(tmp_path, dtype)
        for state.step, batch in enumerate(batches, start=1):
            if not torch.isfinite(state.executor(batch.to(dtype))).all():
                back = checkpoints.newest_of_run()
                state.go_back(back)
                # Only a device that is attached anew has accumulators of 0, see `go_back`.
                assert back.step == 2 and not state.executor.isAttachedToDevice()
            if state.step == 2:
                checkpoints.save(state)
        return {name: tensor.clone() for name, tensor in state.model.state_dict().items()
                }, state.optimizer.state_dict()

    assert_same(run([*GOOD[:2], BAD, *GOOD[2:]]), run(GOOD))


def test_a_run_never_goes_back_to_a_checkpoint_of_another_run(tmp_path):
    """Checkpoint 4 is of a run whose checkpoint 2 this one continues; it is later than step 3."""
    for step in (2, 4):
        save(tmp_path, step)
    checkpoints = Checkpoints(tmp_path, {}, write_model)
    with pytest.raises(
            RunError,
            match="there is no whole checkpoint of this run in .*; save some with --save_steps"):
        checkpoints.newest_of_run()
    checkpoints.start_or_resume(
        TrainSettings(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert checkpoints.newest_of_run().step == 2
    checkpoints.save(state_at(3))
    assert checkpoints.newest_of_run().step == 3
    truncate(tmp_path / "checkpoint-3")
    assert checkpoints.newest_of_run().step == 2


def test_a_state_that_json_cannot_hold_is_an_error_not_a_pickle(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.state\.0: cannot save a set"):
        save(tmp_path, 1, optimizer={"state": [{1, 2}]})
    assert names(tmp_path) == []


# ---- Killed at any moment


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step saved before"])
def test_killed_before_any_line_of_saving_leaves_whole_checkpoints(tmp_path, step):
    """The output folder is copied before every line of code that saving executes.

    Each copy is what SIGKILL would leave behind at that moment.
    """
    output_dir, copies = tmp_path / "output", []
    output_dir.mkdir()

    def trace(frame, event, argument):
        code = frame.f_code
        if code.co_filename not in (checkpoint.__file__, state_module.__file__, files.__file__,
                                    shutil.__file__) or code is state_module._encode.__code__:
            return None  # not a line of saving, or in `_encode`: thousands that touch no file
        if event == "line" and code.co_name != "<listcomp>":
            copies.append(tmp_path / str(len(copies)))
            shutil.copytree(output_dir, copies[-1])
        return trace

    save(output_dir, 1)
    save(output_dir, 2)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        save(output_dir, step, save_total_limit=2)
    finally:
        sys.settrace(before)

    found = []
    for copy in copies:
        begin = open_run(copy, "auto", False, {})
        assert begin.optimizer["ipu_state"]["Accl1___w"].eq(begin.step).all()
        assert all(checkpoint.find_fault(folder) is None for folder in list_checkpoints(copy))
        assert set(names(copy)) <= {"checkpoint-1", "checkpoint-2", f"checkpoint-{step}"}
        found.append(begin.step)
    assert len(copies) > 100 and found == sorted(found) and set(found) == {2, step}


# ---- Damage


def truncate(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


def flip_a_bit(folder):
    data = bytearray((folder / "training_state.safetensors").read_bytes())
    data[-1] ^= 4
    (folder / "training_state.safetensors").write_bytes(data)


def link_outside(folder):
    outside = folder.parent / "outside"
    outside.write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside)


def name_outside(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder.parent / "secret").write_text("x")
    manifest["files"]["../secret"] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def link_folder(folder):
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def put_fifo(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


DAMAGE = [(truncate, "model.safetensors has 1000 bytes instead of 16384"),
          (flip_a_bit, "training_state.safetensors is damaged"),
          (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
          (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: No such file"),
          (lambda folder:
           (folder / "manifest.json").write_text('{"step": 2, "fil'), "manifest.json is damaged"),
          (lambda folder:
           (folder / "manifest.json").write_bytes(b"\x80\xff"), "manifest.json is damaged"),
          (lambda folder:
           (folder / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
          (lambda folder:
           (folder / "manifest.json").write_text('{"files": 3}'), "manifest.json is damaged"),
          (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
           "does not name training_state.safetensors"),
          (link_outside, "model.safetensors is not a regular file"),
          (put_fifo, "model.safetensors is not a regular file"),
          (name_outside, "'../secret', which is not a file of this folder"),
          (link_folder, "it is a symbolic link"), ]


@pytest.mark.parametrize("damage, reason", DAMAGE, ids=[reason for _, reason in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_taken(tmp_path, caplog, damage,
                                                                      reason):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    assert open_run(tmp_path, "auto", False, {}).step == 1
    (message,) = caplog.messages
    assert "checkpoint-2" in message and reason in message and "\n" not in message
    if damage is not link_folder:  # a link that is named explicitly is followed
        with pytest.raises(UsageError,
                           match="--resume_from_checkpoint .*checkpoint-2: ") as refusal:
            find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2"))
        assert reason in str(refusal.value)


def test_no_whole_checkpoint_means_from_the_beginning(tmp_path):
    assert open_run(tmp_path, "auto", False, {}) is None
    truncate(save(tmp_path, 3))
    assert open_run(tmp_path, "auto", False, {}) is None


def test_save_total_limit_keeps_the_newest_and_never_removes_the_last_whole_one(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step, save_total_limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-15"]
    truncate(tmp_path / "checkpoint-15")
    # The resumed run saves step 12. The damaged step 15 still exists, but does not count as one to
    # keep.
    save(tmp_path, 12, save_total_limit=1)
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint-12"
    save(tmp_path, 15, save_total_limit=1)
    assert (names(tmp_path) == ["checkpoint-15"]
            and find_checkpoint(tmp_path, "auto").name == "checkpoint-15")


def test_a_step_that_is_saved_is_not_saved_again_when_a_signal_comes_in_it(tmp_path):
    written = []
    checkpoints = Checkpoints(tmp_path, {}, lambda model, folder, optimizer_state: (
        written.append(folder), write_model(model, folder, optimizer_state)))
    assert (checkpoints.save(state_at(2)) == checkpoints.save(state_at(2))
            == tmp_path / "checkpoint-2")
    assert len(written) == 1
    checkpoints.save(state_at(3))
    assert len(written) == 2


def test_random_states_of_another_number_of_replicas_are_refused(tmp_path):
    checkpoint = load_checkpoint(save(tmp_path, 4, rng_state=(42, 7)))
    assert rng_of_process(checkpoint, 1) == [42, 7]
    with pytest.raises(UsageError, match="--resume_from_checkpoint .*--replication_factor"):
        rng_of_process(checkpoint, 2)


def test_a_fresh_start_among_checkpoints_is_refused_or_removes_them(tmp_path):
    save(tmp_path, 4)
    (tmp_path / ".checkpoint-6.tmp").mkdir()
    (tmp_path / ".checkpoint-6.tmp" / "model.safetensors").write_text("half")
    with pytest.raises(UsageError, match="--resume_from_checkpoint auto.*--overwrite_output_dir"):
        open_run(tmp_path, None, False, {})
    assert "checkpoint-4" in names(tmp_path)
    # A run that trains nothing has no use for them and does them no harm.
    for dry_run in ("compile_only", "synthetic_data"):
        assert open_run(tmp_path, "auto", True, {}, **{dry_run: True}) is None
    assert "checkpoint-4" in names(tmp_path)
    assert open_run(tmp_path, None, True, {}) is None
    assert names(tmp_path) == []


def test_links_in_the_output_folder_are_replaced_or_removed_and_never_followed(tmp_path):
    outside, output_dir = tmp_path / "outside", tmp_path / "output"
    outside.mkdir()
    output_dir.mkdir()
    save(outside, 1)
    (outside / "metrics.json").write_text("theirs")
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}

    def link(name, target):
        (output_dir / name).symlink_to(target)

    save(output_dir, 1)
    for name in (".checkpoint-3.tmp", ".checkpoint-4.removed", ".checkpoint-2.replaced",
                 ".final-model.tmp", "checkpoint-2"):
        link(name, outside / "checkpoint-1")
    link("checkpoint-3", tmp_path / "nowhere")
    for name in ("model.safetensors", "metrics.json", ".metrics.json.0123abcd.tmp"):
        link(name, outside / "metrics.json")
    assert open_run(output_dir, "auto", False, {}).step == 1
    assert names(output_dir) == [
        "checkpoint-1", "checkpoint-2", "checkpoint-3", "metrics.json", "model.safetensors"]
    for step in (2, 3, 4):
        save(output_dir, step, save_total_limit=2)
    save_final(output_dir, write_model)
    files.write_json(output_dir / "metrics.json", {})
    assert names(output_dir) == [
        "checkpoint-3", "checkpoint-4", "config.json", "metrics.json", "model.safetensors"]
    assert not any(path.is_symlink() for path in output_dir.iterdir())
    link("checkpoint-7", outside / "checkpoint-1")
    assert open_run(output_dir, None, True, {}) is None
    assert names(output_dir) == ["config.json", "metrics.json", "model.safetensors"]
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before


def test_a_file_appears_whole_or_not_at_all_and_several_writers_do_not_meet(tmp_path):
    path = tmp_path / "answers"
    with files.written_whole(path) as one, files.written_whole(path, "wb") as other:
        one.write("\u00e9")
        other.write(b"\xff")
        assert not path.exists()
    assert path.read_text("utf-8") == "\u00e9"  # from the writer that was closed last
    with pytest.raises(KeyError):
        with files.written_whole(path) as one:
            one.write("half")
            raise KeyError
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            files.write_json(path, "more than ten bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text("utf-8") == "\u00e9" and names(tmp_path) == ["answers"]
    (tmp_path / "other").touch()
    # The file has the same permissions as any other file of the user.
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_going_on_with_something_else_is_refused_by_name(tmp_path):
    same = {"seed": 42, "micro_batch_size": 2, "training data": "ab12"}
    save(tmp_path, 4, must_match=same)
    assert open_run(tmp_path, "auto", False, dict(same)).step == 4
    with pytest.raises(UsageError, match="--seed was 42, is 43; --training data was ab12, is cd34"):
        open_run(tmp_path, "auto", False, {**same, "seed": 43, "training data": "cd34"})


# ---- Disks


FULL_DISK = """
    import errno, subprocess, sys
    sys.path[:0] = [{root!r}, {root!r} + "/tests"]
    from tests.run.test_checkpoint import *
    disk = Path(sys.argv[1])
    def mount(*words): subprocess.run(["mount", *words], check=True)
    def large(model, folder, optimizer_state):
        write_model(model, folder, optimizer_state)
        (folder / "large").write_bytes(bytes(2 ** 20))
    mount("-t", "tmpfs", "-o", "size=1M", "tmpfs", str(disk))
    save(disk, 1)
    try: save(disk, 2, large)
    except RunError as error: print(error)
    print(names(disk))
    save(disk, 3)
    mount("-o", "remount,ro", str(disk))
    try: save(disk, 4)
    except RunError as error: print(error)
    print(names(disk), find_checkpoint(disk, "auto").name)
"""


@pytest.mark.slow
def test_full_and_read_only_disks_are_one_line_and_lose_nothing(tmp_path):
    script = textwrap.dedent(FULL_DISK).format(root=str(ROOT))
    run = subprocess.run([
        "unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", script,
        str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip("no user namespaces here: " + run.stderr.strip().splitlines()[-1])
    assert run.stderr == "" and run.stdout.replace(str(tmp_path), "DISK").splitlines() == [
        "could not save DISK/checkpoint-2: No space left on device; "
        "the newest checkpoint in DISK is checkpoint-1",
        "['checkpoint-1']",
        "could not save DISK/checkpoint-4: Read-only file system; "
        "the newest checkpoint in DISK is checkpoint-3",
        "['checkpoint-1', 'checkpoint-3'] checkpoint-3", ]


@pytest.mark.parametrize("limit", [10, 1500, 20_000])
def test_a_file_size_limit_is_one_line_and_loses_nothing(tmp_path, limit):
    """Small limits stop our own writers or safetensors', 20,000 bytes only the optimizer's state.

    The optimizer's state is written in Rust.
    """
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RunError,
                           match="could not save .*checkpoint-2: File too large; .* checkpoint-1"):
            save(tmp_path, 2, optimizer={"state": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["checkpoint-1"]
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint-2"


def test_the_final_model_is_put_in_place_whole_or_not_at_all(tmp_path):
    def broken(model, folder, optimizer_state):
        (folder / "config.json").write_text("new")
        raise OSError(28, "No space left on device")

    save(tmp_path, 1)
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(
            RunError,
            match="could not save .*final-model: No space left on device; "
            "the newest .* checkpoint-1"):
        save_final(tmp_path, broken)
    assert (tmp_path / "config.json").read_text() == "old" and names(tmp_path) == [
        "checkpoint-1", "config.json"]
    save_final(tmp_path, write_model)
    assert (tmp_path / "config.json").read_text() == "{}" and names(tmp_path) == [
        "checkpoint-1", "config.json", "model.safetensors"]


def test_a_removed_output_folder_is_one_line(tmp_path):
    with pytest.raises(
            RunError,
            match="could not save .*checkpoint-2: No such file or directory; "
            "there is no checkpoint in .*/gone"):
        save(tmp_path / "gone", 2)


def test_an_error_of_another_kind_is_passed_on_and_leaves_nothing(tmp_path):
    def broken(model, folder, optimizer_state):
        write_model(model, folder, optimizer_state)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save(tmp_path, 1, broken)
    assert names(tmp_path) == []


def test_many_saves_and_resumes_leave_no_files_and_no_descriptors(tmp_path):
    descriptors = len(os.listdir("/proc/self/fd"))
    for step in range(1, 26):
        save(tmp_path, step, save_total_limit=2)
        loaded = open_run(tmp_path, "auto", False, {})
        assert loaded.step == step
    assert names(tmp_path) == ["checkpoint-24", "checkpoint-25"]
    del loaded
    assert len(os.listdir("/proc/self/fd")) == descriptors


# ---- Checkpoints of someone else


class Trap:
    def __reduce__(self):
        return os.mkdir, ("TRAPPED",)


def forge(folder, name, content):
    """Write `content` to a file of a checkpoint, and make the manifest agree with it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


FORGED = [
    ("training_state.safetensors", pickle.dumps(Trap())),
    ("training_state.safetensors", (2 ** 40).to_bytes(8, "little") + b"{}"),
    ("training_state.json", pickle.dumps(Trap())),
    ("training_state.json", b'{"dict": [["optimizer", {"call": ["os.mkdir", "TRAPPED"]}]]}'),
    ("training_state.json", b'{"dict": [["optimizer", {"tensor": "not there"}]]}'),
    ("training_state.json", b"[" * 100_000),
    ("training_state.json", b'{"dict": [[["optimizer"], 1]]}'),
    ("training_state.json", b'{"dict": [["optimizer", 1]]}'),
    ("trainer_state.json", b"[]"),
    ("trainer_state.json", b'{"step": 7}'),
    ("trainer_state.json", b'{"step": "seven", "losses": [], "must_match": {}}'),
    ("trainer_state.json", b'{"step": Infinity, "losses": [], "must_match": {}}'),
    ("trainer_state.json", b'{"step": -1, "losses": [], "must_match": {}}'),
]


@pytest.mark.parametrize("name, content", FORGED)
def test_a_forged_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path, monkeypatch, name,
                                                                     content):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path, 1)
    forge(folder, name, content)
    with pytest.raises(UsageError, match="checkpoint-1: cannot be read as a checkpoint"):
        open_run(tmp_path, "auto", False, {})
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("key, value", [("numpy", ("MT19937", [0] * 624, 10 ** 6, 0, 0.0)),
                                        ("numpy", ("MT19937", [0] * 3, 0, 0, 0.0)), ("numpy", 1),
                                        ("torch", "AAAA"), ("torch", "?"),
                                        ("python", (3, (1, 2), None)),
                                        ("python", (3, (0, ) * 624 + (-5, ), None)), ])
def test_a_forged_random_state_is_refused(tmp_path, key, value):
    state = load_checkpoint(save(tmp_path, 1)).random_state
    with pytest.raises(UsageError, match="random state cannot be used"):
        set_random_state({**state, key: value})
    set_random_state(state)


def test_a_model_folder_of_someone_else_runs_no_code(tmp_path, monkeypatch):
    """Neither a pickle instead of safetensors nor a module named in config.json is executed."""
    from transformers import RobertaConfig

    from qa.model.pretrained import load_config, load_model

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    config = RobertaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                           intermediate_size=8)
    config.auto_map = {"AutoConfig": "trap.Config", "AutoModelForQuestionAnswering": "trap.Model"}
    config.save_pretrained(folder)
    (folder / "trap.py").write_text("import os\nos.mkdir('TRAPPED')\n")
    assert load_config(model_at(folder)).model_type == "roberta"
    for content in (pickle.dumps(Trap(), 2), legacy_torch_file(), b"not a pickle"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises((RunError, UsageError),
                           match="--model_name_or_path .*model: ") as refusal:
            load_model(model_at(folder), config)
        assert "\n" not in str(refusal.value)
    assert names(tmp_path) == ["model"]


def test_a_refused_resume_names_only_what_a_user_can_give():
    """Every argument of the rows and every other setting that must match is a flag or in words."""
    flags = {f.name for group in (TrainSettings, IPUConfig) for f in dataclasses.fields(group)
             if "help" in f.metadata}
    rows = set(inspect.signature(TrainingRows.__init__).parameters) - {
        "self", "windows", "first_step"}
    for name in (*rows, "data", *MUST_MATCH, "embedding_serialization_factor"):
        assert name in flags or not _AS_FLAGS[name].startswith(f"--{name}"), name
    then = Checkpoint(Path("c"), 1, [], [], [], {
        "max_steps": -1, "row_length": 64, "micro_batches_per_update": 9}, 1, None, {}, [], {})
    now = {"max_steps": 5, "row_length": 32, "micro_batches_per_update": 3}
    with pytest.raises(UsageError, match=(
            "--max_steps was not given, is 5; .*--gradient_accumulation_steps x "
            r"--replication_factor\) was 9, is 3; --max_seq_length was 64, is 32\. ")):
        _check_match(then, now)


def test_damaged_files_of_a_model_are_one_line(tmp_path):
    from transformers import RobertaConfig

    from qa.model.pretrained import load_config, load_model, load_tokenizer

    RobertaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                  intermediate_size=8).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    for content in (b"", b"\xff" * 100, (2 ** 40).to_bytes(8, "little") + b"{}",
                    safetensors.torch.save({"a": torch.ones(9)})[:-4]):
        (tmp_path / "model.safetensors").write_bytes(content)
        for load in (load_model, load_tokenizer):
            with pytest.raises(RunError, match="its (model|tokenizer) cannot be loaded") as refusal:
                load(model_at(tmp_path), load_config(model_at(tmp_path)))
            assert "\n" not in str(refusal.value)


def legacy_torch_file():
    """The content of a file written by torch.save, with an object that runs code when loaded."""
    buffer = io.BytesIO()
    torch.save({"roberta.embeddings.word_embeddings.weight": Trap()}, buffer)
    return buffer.getvalue()
