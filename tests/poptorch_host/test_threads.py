"""Threads and memory: what the process may use, and the user's own settings first."""
from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from poptorch_host import _threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets the visible processors and the files of the cgroup."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(_threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(_threads, "_OWN_CGROUPS", tmp_path / "own")

    def be(visible, **files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(visible)), raising=False)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield be
    torch.set_num_threads(before)


@pytest.mark.parametrize("files, expected", [
    ({}, 4), ({"cpu_DOT_max": "max 100000\n"}, 4), ({"cpu_DOT_max": "150000 100000\n"}, 2),
    ({"cpu_DOT_max": "20000 100000\n"}, 1), ({"cpu_DOT_max": "800000 100000\n"}, 4),
    ({"cpu__cpu_DOT_cfs_quota_us": "-1\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, 4),
    ({"cpu__cpu_DOT_cfs_quota_us": "200000\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, 2),
    ({"own": "0::/a/b\n", "a__cpu_DOT_max": "100000 100000\n"}, 1),  # of a cgroup above its own
    ({"own": "0::/a\n", "c__cpu_DOT_max": "100000 100000\n"}, 4),
    ({"own": "3:cpu,cpuacct:/job\n2:cpuset:/\n", "cpu__job__cpu_DOT_cfs_quota_us": "150000\n",
      "cpu__job__cpu_DOT_cfs_period_us": "100000\n"}, 2),
    ({"cpu_DOT_max": "nonsense"}, 4)])
def test_processors_are_those_of_the_affinity_within_the_quota(machine, files, expected):
    machine(4, **files)
    assert _threads.processors() == expected


def test_small_layers_take_one_thread_and_the_users_own_number_stays(machine, monkeypatch, capsys):
    machine(2)
    torch.set_num_threads(2)
    _threads.choose_threads(torch.nn.Linear(96, 384), rows=512)
    assert torch.get_num_threads() == 1 and "1 thread on 2" in capsys.readouterr().err
    # The word embedding is looked up, not multiplied with.
    embedding = torch.nn.Sequential(torch.nn.Embedding(50_000, 8), torch.nn.Linear(8, 8))
    _threads.choose_threads(embedding, rows=512)
    assert torch.get_num_threads() == 1 and not capsys.readouterr().err  # nothing new to say
    _threads.choose_threads(torch.nn.Linear(768, 3072), rows=384)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    _threads.choose_threads(torch.nn.Linear(96, 384), rows=512)
    assert torch.get_num_threads() == 2


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
@pytest.mark.parametrize("settings, kept", [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_freed_memory_is_kept_unless_the_user_has_settings_of_the_allocator(settings, kept):
    """A freed tensor of 80 MB stays in the process, or goes back to the system."""
    script = """
import torch
import poptorch_host

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

tensor = torch.ones(20_000_000)
before = megabytes()
del tensor
print(before - megabytes())
"""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    freed = float(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True,
                                 env={**environment, **settings}).stdout)
    assert freed < 8 if kept else freed > 72
