"""Several processes: the same bits, one voice, and one end for all, whatever happens to one.

The processes are forks of this one, with the environment that torchrun would give them, which saves
the imports of each; one test starts torchrun itself. They do 4 replicas' work.
"""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from ipu_options.config import inference_pipeline, training_pipeline
from planner.flags import TrainPlanSettings
from poptorch_host import _reduction
from qa.data.rows import ProcessRows
from qa.settings import named_configs, parse_train
from runtime import processes
from runtime.errors import RunError, UsageError
from runtime.flags import Settings
from tests.tools.kill_and_resume import (
    ROOT,
    differences,
    end_of,
    forked,
    free_port,
    has_ended,
    place_of,
    prepare,
    start,
)

FEW = ("--max_steps", "2", "--do_train")


class Numbers(torch.utils.data.Dataset):
    """Rows whose content is their index."""

    def __len__(self):
        return 24

    def __getitems__(self, indices):
        return {"row": torch.tensor(list(indices))}


def test_the_rows_of_a_process_are_those_of_its_replicas_and_gathered_are_in_order():
    """24 rows: 2 updates x 3 micro-batches x 4 replicas x 1 row, by PopTorch's order."""
    order = torch.arange(24).view(2, 3, 4)  # update, accumulation step, replica
    for count in (1, 2, 4):
        for index in range(count):
            rows = ProcessRows(Numbers(), index, count, 4 // count)
            mine = order.chunk(count, dim=2)[index].flatten()
            assert torch.equal(rows.__getitems__(range(len(rows)))["row"], mine)


@dataclass
class Timeout(Settings):
    process_timeout: float = 300.0


def fork(count, function, tmp_path, place=None, lost=None):
    """Run `function` in `count` processes; returns (exit statuses, what they print).

    place(index): the environment of a process; by default the one that torchrun would give it.
    lost: a process that does not end by itself, and is killed after the others, as by torchrun.
    """
    port = free_port()
    pids = [forked(function, tmp_path / "log", port,
                   place(index) if place else place_of(index, count)) for index in range(count)]
    until = time.monotonic() + 300
    while time.monotonic() < until and not all(
            has_ended(pid) for index, pid in enumerate(pids) if index != lost):
        time.sleep(0.01)
    for pid in pids:
        if not has_ended(pid):
            os.kill(pid, signal.SIGKILL)
    return [end_of(pid) for pid in pids], (tmp_path / "log").read_text()


def test_what_processes_tell_each_other(tmp_path):
    def run():
        processes.join()
        index = processes.place().index
        assert processes.share([index, "ä"]) == [[0, "ä"], [1, "ä"], [2, "ä"]]
        assert processes.on_first(lambda: os.getpid()) == processes.share(os.getpid())[0]
        rows = torch.arange(12).view(2, 3, 2)[:, index].flatten()  # two groups, two rows each
        assert processes.gather_rows(rows, 2).tolist() == list(range(12))
        processes.agree({"x": 1.5})
        print("well")
        return 0

    assert fork(3, run, tmp_path) == ([0, 0, 0], "3 processes (torchrun) on 1 host\nwell\n")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_gradients_are_summed_in_the_order_of_a_tree_bit_for_bit(tmp_path, monkeypatch, count):
    """Against the sum written out; a matrix of 8 elements travels alone, and without zero rows."""
    monkeypatch.setattr(_reduction, "PIECE", 8)
    make = torch.Generator().manual_seed(count)
    nan, inf, zero = float("nan"), float("inf"), torch.zeros(9, 3)
    shapes = [(), (0,), (5,), (7, 1), (3, 3), (11, 3), (13,), (2, 2, 5)]
    parts = [[torch.randn(shape, generator=make) for shape in shapes] for _ in range(count)]
    for index, part in enumerate(parts):
        sparse, odd = zero.clone(), zero.clone()
        sparse[2 * index % 9] = torch.randn(3, generator=make)
        odd[4] = torch.tensor([-0.0, nan if index == 1 else 1.0, inf])
        odd[5:7] = -0.0 if index else torch.tensor([[0.0], [-0.0]])
        part += [None, zero.clone(), sparse, odd, torch.randn(9, 4, generator=make).t()]

    def run():
        processes.join()
        mine = [each if each is None else each.clone() for each in parts[processes.place().index]]
        found = _reduction.sum_over_processes(mine, count)
        for each, *given in zip(found, *parts):
            if each is None:
                assert given == [None] * count
                continue
            total = given[0] + given[1]
            if count == 4:
                total = total + (given[2] + given[3])
            elif count == 3:
                total = total + given[2]
            assert each.numpy().tobytes() == total.contiguous().numpy().tobytes(), (each, total)
        return 0

    assert fork(count, run, tmp_path)[0] == [0] * count, (tmp_path / "log").read_text()


LOST = "error: another process has ended, or has not answered for --process_timeout; its launcher"


@pytest.mark.parametrize("case, statuses, line", [
    ("usage", [2, 2, 2], "error: no such thing$"),  # in all, as a wrong flag
    ("usage of one", [2, 2, 2], r"error: no such thing \(process 1\)$"),
    pytest.param("disk", [1, 1, 1], "error: No space left on device: model.safetensors$",
                 marks=pytest.mark.slow),
    ("other", [2, 2, 2], "error: process 2 differs from the first: x is 2 there, 0 on the .*same$"),
    ("own", [1, 1, 1], r"error: ZeroDivisionError: .* \(process 1\)$"),
    ("died", [1, -9, 1], LOST),
    pytest.param("stopped", [1, -9, 1], LOST, marks=pytest.mark.slow),
    pytest.param("first stopped", [-9, 1, 1], LOST + r".* \(process 1\)$", marks=pytest.mark.slow),
    pytest.param("hung", [1, -9, 1], LOST, marks=pytest.mark.slow),
    pytest.param("first died", [-9, 1, 1], LOST + r".* \(process 1\)$",
                 marks=pytest.mark.slow),
])
def test_an_error_in_one_process_ends_all_with_one_line(tmp_path, case, statuses, line):
    lost = {"hung": 1, "stopped": 1, "first stopped": 0}.get(case)

    def run():
        index = int(os.environ["RANK"])
        if case == "usage" or case == "usage of one" and index == 1:
            raise UsageError("no such thing")
        processes.join(Timeout(
            process_timeout=5.0 if lost is not None else 300.0))
        if case == "disk":
            def full():
                raise RunError("No space left on device: model.safetensors")
            processes.on_first(full)
        elif case == "other":
            processes.agree({"x": index if index == 2 else 0})
        elif case == "own" and index == 1:
            return 1 // 0
        elif case.endswith("stopped") and index == lost:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif case == "hung" and index == 1:
            time.sleep(1000)
        elif lost is None and index == (0 if case == "first died" else 1):
            os.kill(os.getpid(), signal.SIGKILL)
        processes.share("after")
        return 0

    begin = time.monotonic()
    ends, output = fork(3, run, tmp_path, lost=lost)
    lines = [text for text in output.splitlines() if "processes (torchrun)" not in text]
    assert ends == statuses, output
    assert len(lines) == 1 and re.match(line, lines[0]), output
    assert time.monotonic() - begin < 60  # the timeout and 10 s more, on a machine that is busy


@pytest.fixture
def poprun(monkeypatch):
    """A function that sets what poprun tells the first of several processes."""
    def start(processes_, replicas, ipus):
        for name, value in dict(NUM_TOTAL_REPLICAS=replicas, REPLICA_INDEX_OFFSET=0,
                                NUM_LOCAL_REPLICAS=replicas // processes_, LOCAL_INSTANCE_INDEX=0,
                                NUM_IPUS_PER_REPLICA=ipus).items():
            monkeypatch.setenv(f"POPDIST_{name}", str(value))
        processes.place.cache_clear()
    yield start
    monkeypatch.undo()
    processes.place.cache_clear()


@pytest.mark.parametrize("name", named_configs())
def test_each_configuration_has_an_inference_layout_of_the_size_of_popruns_replicas(poprun, name):
    _, config, _ = parse_train(["--config", name, "--output_dir", "x"], TrainPlanSettings)
    pod = "pod64"
    alone = config.for_pod(pod)
    counts = alone.layers_per_ipu
    layers = 12 if -1 in counts else sum(counts)
    ipus, replicas = alone.num_ipus(), 4
    poprun(2, replicas, ipus)
    training, inference = (of(config, layers, pod)
                           for of in (training_pipeline, inference_pipeline))
    assert len({ipu for _, ipu in inference.layout.blocks()}) == ipus
    assert inference.config.replication_factor == training.config.replication_factor == replicas
    assert inference.config.device_iterations >= len(inference.layout.stages())


def test_an_inference_layout_that_poprun_has_no_ipus_for_is_refused_and_one_it_has_is_kept(poprun):
    flags = ["--config", "squad_base_384_pod16", "--output_dir", "x"]
    poprun(2, 4, 4)
    _, config, _ = parse_train([*flags, "--inference_layers_per_ipu", "6", "6"], TrainPlanSettings)
    with pytest.raises(UsageError, match="--inference_layers_per_ipu 6 6 takes 2 IPUs, poprun "
                                         "--ipus-per-replica is 4"):
        inference_pipeline(config, 12, "pod16")
    poprun(2, 4, 2)  # infer.py, whose training layout does not matter
    _, config, _ = parse_train(flags, TrainPlanSettings)
    assert inference_pipeline(config, 12, "pod16").layout.layers_per_ipu(2) == [6, 6]


def test_nothing_is_compiled_ahead_under_poprun(poprun):
    poprun(2, 4, 4)
    with pytest.raises(UsageError, match="--compile_only: under poprun nothing can be compiled"):
        parse_train(["--config", "squad_base_384_pod16", "--output_dir", "x", "--compile_only"])


def test_inference_replicas_that_poprun_does_not_have_are_refused_from_a_flag_only(
        poprun, tmp_path):
    poprun(2, 4, 4)
    (tmp_path / "ipu_config.json").write_text('{"inference_replication_factor": 2}')
    flags = ["--config", "squad_base_384_pod16", "--output_dir", "x"]
    for given, right in ((("--inference_replication_factor", "2"), False),
                         (("--inference_replication_factor", "4"), True),
                         (("--ipu_config", str(tmp_path)), True)):
        _, config, _ = parse_train([*flags, *given], TrainPlanSettings)
        if right:
            assert inference_pipeline(config, 12, "pod16").config.replication_factor == 4
        else:
            with pytest.raises(UsageError, match="^--inference_replication_factor 2: poprun "
                                                 "--num-replicas is 4; leave the flag out"):
                inference_pipeline(config, 12, "pod16")


def test_a_pod_of_several_hosts_takes_processes_enough_for_its_ipus(poprun):
    flags = ["--config", "squad_base_384_pod16", "--output_dir", "x", "--pod_type"]
    for pod, count, replicas in (("pod128", 2, 32), ("pod256", 4, 64)):
        settings, config, planning = parse_train([*flags, pod], TrainPlanSettings)
        with pytest.raises(UsageError, match=f"--pod_type {pod} takes several hosts: start sev"):
            planning.refuse_without_plan(settings)
        poprun(count, replicas, 4)
        planning.refuse_without_plan(settings)
        assert training_pipeline(config, 12, pod).config.replication_factor == replicas
        poprun(count // 2, replicas, 4)
        if count > 2:
            with pytest.raises(UsageError, match="64 takes 128 IPUs in each of 2 processes.*"
                                                 "start at least 4 processes"):
                training_pipeline(config, 12, pod)
        poprun(1, replicas, 4)


@pytest.mark.parametrize("environment, wrong", [
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started 4 processes.*poprun"),
    ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4, WORLD_SIZE=4"),
    ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK=x: it should be a number"),
    ({"POPDIST_NUM_TOTAL_REPLICAS": "5", "POPDIST_NUM_LOCAL_REPLICAS": "2",
      "POPDIST_REPLICA_INDEX_OFFSET": "2"}, "make --num-replicas a multiple"),
])
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, environment, wrong):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.place.cache_clear()
    try:
        with pytest.raises(UsageError, match=wrong):
            processes.place()
    finally:
        monkeypatch.undo()
        processes.place.cache_clear()


@pytest.mark.parametrize("launcher, wrong", [
    (dict(POPDIST_NUM_TOTAL_REPLICAS="2", POPDIST_NUM_LOCAL_REPLICAS="1",
          POPDIST_NUM_IPUS_PER_REPLICA="4", POPDIST_LOCAL_INSTANCE_INDEX="0",
          OMPI_COMM_WORLD_LOCAL_SIZE="1"), "MASTER_ADDR=HOST"),  # two hosts
    ({}, "mpirun has started 2 processes")])
def test_what_is_wrong_before_the_processes_meet_is_told_once(tmp_path, monkeypatch, launcher,
                                                              wrong):
    def main():
        monkeypatch.delenv("MASTER_ADDR")
        processes.join()

    def place(index):
        return {**launcher, "POPDIST_REPLICA_INDEX_OFFSET": str(index),
                "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(index)}

    statuses, said = fork(2, main, tmp_path, place)
    assert statuses == [2, 2]
    assert said.count("error: ") == 1 and wrong in said


# ---- whole runs ----

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, and two configurations of 4 replicas with their runs of one process."""
    work = tmp_path_factory.mktemp("processes")
    before = dict(os.environ)
    prepare(work, replicas=4)
    for name in ("packed", "unpacked"):
        assert end_of(*start(work, name, work / f"{name}-reference")) == 0, log(work, name)
    yield work
    os.environ.clear()
    os.environ.update(before)


def log(work, name):
    return (work / f"{name}.log").read_text()


def wait_for_checkpoint(work, name, output):
    """Wait until the run has written its first checkpoint, after 2 steps."""
    until = time.monotonic() + 300
    while not (output / "checkpoint-2").exists():
        assert time.monotonic() < until, log(work, name)
        time.sleep(0.005)


def ends(pids):
    return [end_of(pid) for pid in pids]


@pytest.mark.slow
@pytest.mark.parametrize("name, then", [("packed", 4), ("unpacked", 1)])
def test_stopped_on_two_and_resumed_on_other_processes_is_bit_for_bit_the_run_of_one(
        work, name, then):
    """SIGTERM to one process, not the first, saves once and ends all with its status."""
    output = work / f"{name}-many"
    (work / f"{name}.log").write_text("")
    pids = start(work, name, output, processes=2)
    wait_for_checkpoint(work, name, output)
    os.kill(pids[1], signal.SIGTERM)
    assert ends(pids) == [143, 143], log(work, name)
    assert log(work, name).count("stopped by SIGTERM after step") == 1
    assert ends(start(work, name, output, processes=then)) == [0] * then, log(work, name)
    assert differences(work / f"{name}-reference", output) == []
    said = log(work, name)
    assert said.count("saved to") == 1 and said.count("resuming from") == 1


@pytest.mark.slow
def test_a_process_that_is_killed_takes_the_others_down(work):
    (work / "packed.log").write_text("")
    pids = start(work, "packed", work / "lost", processes=2)
    wait_for_checkpoint(work, "packed", work / "lost")
    os.kill(pids[1], signal.SIGKILL)
    assert ends(pids) == [1, -9], log(work, "packed")
    errors = re.findall("(?m)^error: .*", log(work, "packed"))
    assert len(errors) == 1 and re.match(LOST, errors[0]), errors


@pytest.mark.slow
@pytest.mark.parametrize("flags, status, line", [
    (("--replication_factor", "3", "--pod_type", "pod16"), 2,
     "error: --replication_factor 3 cannot be shared out over 2 processes"),
    (("--learning_rate", "x"), 2, "error: --learning_rate x: it should be a number"),
    (("--replication_factor", "64"), 2, "error: --replication_factor 64 takes 64 IPUs, pod16 has"),
    ((), 2, "error: --output_dir .*: holds checkpoint-.* of an earlier run"),
])
def test_what_is_refused_is_refused_once(work, flags, status, line):
    (work / "packed.log").write_text("")
    output = work / ("refused" if flags else "packed-reference")
    assert ends(start(work, "packed", output, *(flags or FEW), processes=2)) == [status] * 2
    errors = re.findall("(?m)^error: .*", log(work, "packed"))
    assert len(errors) == 1 and re.match(line, errors[0]), log(work, "packed")


@pytest.mark.slow
def test_questions_are_shared_out_and_the_answers_written_in_order(work, tmp_path):
    import infer

    def run(count, output):
        def main():
            return infer.main(["--checkpoint", str(work / "packed-reference"), "--input_file",
                               str(work / "demo" / "validation.json"), "--output_file",
                               str(output), "--n_best", "3"])
        (tmp_path / output.stem).mkdir()
        return fork(count, main, tmp_path / output.stem)

    for count in (1, 2, 4):
        statuses, said = run(count, tmp_path / f"{count}.jsonl")
        assert statuses == [0] * count and said.count("500 answers in") == 1, said
    one = (tmp_path / "1.jsonl").read_bytes()
    assert one == (tmp_path / "2.jsonl").read_bytes() == (tmp_path / "4.jsonl").read_bytes()


@pytest.mark.slow
def test_torchrun_with_two_agents_trains_as_one_process(work, tmp_path):
    """Two agents on one host stand for two hosts."""
    assert end_of(*start(work, "packed", tmp_path / "one", *FEW)) == 0, log(work, "packed")
    port = free_port()
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
             str(node), "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port",
             str(port), str(ROOT / "train.py"), "--config", str(work / "packed.yaml"),
             "--output_dir", str(tmp_path / "two"), *FEW], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, universal_newlines=True) for node in (0, 1)]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "saved to" in said[0] and "saved to" not in said[1]
    name = "model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_poprun_runs_the_same_job_through_popdist(work, tmp_path, monkeypatch):
    """With a stand-in for popdist, which refuses a call of the engine that not all make."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "tools" / "popdist_standin"))
    monkeypatch.setenv("POPDIST_NUM_TOTAL_REPLICAS", "4")
    monkeypatch.setenv("POPDIST_NUM_LOCAL_REPLICAS", "2")
    monkeypatch.setenv("POPDIST_NUM_IPUS_PER_REPLICA", "1")

    def run(*flags):
        def main():
            import train
            return train.main(["--config", str(work / "unpacked.yaml"), *flags])

        def place(index):
            return {"POPDIST_REPLICA_INDEX_OFFSET": str(2 * index),
                    "POPDIST_LOCAL_INSTANCE_INDEX": str(index), "OMPI_COMM_WORLD_SIZE": "2",
                    "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        return fork(2, main, tmp_path, place)

    output = tmp_path / "poprun"
    statuses, said = run("--output_dir", str(output))
    assert statuses == [0, 0] and "2 processes (poprun) on 1 host" in said, said
    for name in ("model.safetensors", "predictions.json", "metrics.json"):
        assert (output / name).read_bytes() == (work / "unpacked-reference" / name).read_bytes()
    statuses, said = run("--replication_factor", "2", "--output_dir", str(tmp_path / "no"))
    assert statuses == [2, 2]
    assert said.count("error: --replication_factor 2: poprun --num-replicas is 4; leave") == 1
    statuses, said = run("--layers_per_ipu", "2", "2", "--gradient_accumulation_steps", "4",
                         "--output_dir", str(tmp_path / "no"))
    assert statuses == [2, 2] and said.count("poprun --ipus-per-replica is 1: start") == 1


def test_a_call_of_the_engine_that_one_process_leaves_out_is_an_error(tmp_path, monkeypatch):
    """The stand-in for popdist notices it, so that the test above means something.

    The other process makes its next call of the engine instead.
    """
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "tools" / "popdist_standin"))
    monkeypatch.setenv("POPDIST_NUM_TOTAL_REPLICAS", "2")
    monkeypatch.setenv("POPDIST_NUM_LOCAL_REPLICAS", "1")

    def main():
        processes.join()
        import popdist

        import poptorch_host
        popdist.init()
        import popdist.poptorch
        options = popdist.poptorch.Options(1)
        for refused in (options.replicationFactor, options.useIpuId):
            with pytest.raises(RuntimeError, match="Cannot call `"):
                refused(1)
        model = poptorch_host.trainingModel(Loss(), options)
        model(torch.ones(1))
        if processes.is_first():
            model.copyWeightsToHost()
        model(torch.ones(1))

    def place(index):
        return {"POPDIST_REPLICA_INDEX_OFFSET": str(index), "POPDIST_LOCAL_INSTANCE_INDEX": "0",
                "POPDIST_NUM_IPUS_PER_REPLICA": "1", "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}

    statuses, said = fork(2, main, tmp_path, place)
    assert statuses == [1, 1], said
    assert "popdist: the instances make different calls: ['download', 'run']" in said, said


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        import poptorch_host
        return poptorch_host.identity_loss((self.weight * x).sum(), reduction="none")
