#!/usr/bin/env python3
"""Kill training runs at random moments, resume them, and compare their results.

    python -m tests.tools.kill_and_resume --kills 100
    python -m tests.tools.kill_and_resume --kills 100 --processes 2 4

Each run must end, bit for bit, like a run that was never interrupted. A tiny model learns some of
the demo's questions for several epochs, in turn packed in float16 and unpacked in float32, with a
checkpoint every second step. Half of the kills (SIGKILL) come at any time between the start of a
process and its end, the other half while a checkpoint is being written. Every run is a fork of this
process, made after the imports, which saves five seconds per kill.

With --processes the replicas are shared out over that many processes, one of the numbers at random
in each start, also of a resumed run. One process of them is killed, and the others must end by
themselves. What each run is compared with is always a run of one process.
"""
from __future__ import annotations

import argparse
import importlib
import multiprocessing.forkserver
import os
import pkgutil
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork does not get the threads of its parent
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before the fork, in which it would be late
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1",
                  TOKENIZERS_PARALLELISM="false")

CONFIG = """
model_name_or_path: {work}/demo/model
train_file: {work}/demo/train.json
validation_file: {work}/demo/validation.json
max_train_samples: 96
max_eval_samples: 12
max_seq_length: 128
doc_stride: 32
pack: {pack}
max_windows_per_row: 4
micro_batch_size: 2
gradient_accumulation_steps: {accumulation}
replication_factor: {replicas}
pod_type: pod16
num_train_epochs: {epochs}
learning_rate: 1.0e-3
precision: {precision}
save_steps: 2
save_total_limit: 2
layers_per_ipu: [{layers}]
inference_device_iterations: 4
"""
# What is compared apart from the last checkpoint. run.json contains the time, so it differs.
RESULTS = ("model.safetensors", "metrics.json", "predictions.json", "nbest_predictions.json")


def prepare(work: Path, replicas: int = 1) -> None:
    """Write the data, the model and two configurations, and import all that a run needs.

    replicas: their number; several have a pipeline of one IPU, for which an update is as large.
    """
    os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
    import train  # noqa: F401
    from ipu_options import poptorch  # noqa: F401
    for package in ("answers", "data", "model", "run"):
        for module in pkgutil.iter_modules([str(ROOT / "qa" / package)], f"qa.{package}."):
            importlib.import_module(module.name)
    from qa.data import demo

    demo.write_demo(work / "demo", seed=0)
    for name, pack, precision, epochs in (("packed", "true", "float16", 3),
                                          ("unpacked", "false", "float32", 2)):
        (work / f"{name}.yaml").write_text(
            CONFIG.format(work=work, pack=pack, precision=precision, epochs=epochs,
                          replicas=replicas, accumulation=8 // replicas,
                          layers="1, 1, 1, 1" if replicas == 1 else "4"))


def start(work: Path, name: str, output_dir: Path, *flags: str, processes: int = 1) -> List[int]:
    """Start `train.py --config NAME.yaml --resume_from_checkpoint auto`; returns process ids.

    With several processes each gets the environment that torchrun would give it. What they print
    is appended to NAME.log.
    """
    def run():
        import train

        random.seed(0)  # its state is compared too, and each process seeds it from the system
        sys.argv = [
            "train.py", "--config",
            str(work / f"{name}.yaml"), "--output_dir",
            str(output_dir), *(flags or ("--resume_from_checkpoint", "auto"))]
        return train.main()

    port = free_port()
    return [forked(run, work / f"{name}.log", port, place_of(index, processes))
            for index in range(processes)]


def free_port() -> int:
    """Return a port of the loopback interface on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def place_of(index: int, processes: int) -> Dict[str, str]:
    """Return the variables by which torchrun tells a process its place."""
    return dict(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(processes))


def forked(run: Callable[[], Optional[int]], log: Path, port: int, place: Dict[str, str]) -> int:
    """Start a fork of this process that calls `run` as a script does; returns its process id.

    log: the file to which it appends what it prints. port: where the processes meet. place: the
    variables that a launcher gives to this one.
    """
    pid = os.fork()
    if pid:
        return pid
    status: Any = 99
    try:
        file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        from runtime import processes
        from runtime.errors import run_script

        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        processes.place.cache_clear()
        # A fork server that the parent may have started is no child of this process.
        multiprocessing.forkserver._forkserver.__init__()
        status = run_script(processes.together(run))
        sys.stdout.flush()
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def end_of(pid: int) -> int:
    """Wait for the process; returns its exit status, or minus the signal that ended it."""
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def killed(pids: List[int], victim: int, output_dir: Path, seconds: float, while_saving: bool,
           delay: float) -> bool:
    """Kill the process `victim` after `seconds`; returns False if one has ended before.

    With `while_saving`, wait for the next save after that and kill the process `delay` seconds
    after the save begins. The other processes must end by themselves, which is waited for.
    """
    begin = time.monotonic()
    while time.monotonic() < begin + seconds or (
            while_saving and not any(output_dir.glob(".checkpoint-*"))):
        if any(has_ended(pid) for pid in pids):
            return False
        time.sleep(0.0005)
    if while_saving:
        time.sleep(delay)
    os.kill(victim, signal.SIGKILL)
    alone = time.monotonic() + 20  # processes that have not met yet are ended by torchrun
    while time.monotonic() < alone and not all(has_ended(pid) for pid in pids):
        time.sleep(0.01)
    for pid in pids:
        if not has_ended(pid):
            os.kill(pid, signal.SIGKILL)
    return [end_of(pid) for pid in pids][pids.index(victim)] == -signal.SIGKILL


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def differences(reference: Path, output_dir: Path) -> list:
    """The names of those files of the results and the last checkpoint that are not identical."""
    last = sorted(reference.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    files = [
        *RESULTS,
        *(path.relative_to(reference) for path in last.iterdir() if path.name != "manifest.json")]
    return [str(file) for file in files if content(reference / file) != content(output_dir / file)]


def content(path: Path) -> bytes:
    """The bytes of a file.

    config.json is read without the folder that the model came from, which transformers 4.46 adds.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(
        line for line in lines if path.name != "config.json" or b'"_name_or_path"' not in line)


def kill_and_resume(work: Path, name: str, kills: int, rng: random.Random,
                    processes: List[int]) -> int:
    """Do one run of configuration `name`, killing it up to `kills` times before it ends.

    processes: how many it may have.

    Returns the number of kills. Raises RuntimeError if a process fails, or if the result is not bit
    for bit that of the run that was never interrupted.
    """
    reference, output_dir = work / f"{name}-reference", work / f"{name}-killed"
    if not reference.exists():
        begin = time.monotonic()
        if end_of(*start(work, name, reference)) != 0:
            raise RuntimeError((work / f"{name}.log").read_text())
        (work / f"{name}.seconds").write_text(str(time.monotonic() - begin))
    seconds = float((work / f"{name}.seconds").read_text())
    shutil.rmtree(output_dir, ignore_errors=True)
    survived = 0
    while True:
        pids = start(work, name, output_dir, processes=rng.choice(processes))
        if survived < kills and killed(pids, rng.choice(pids), output_dir,
                                       rng.uniform(0, seconds), rng.random() < 0.5,
                                       rng.expovariate(1 / 0.02)):
            survived += 1
            continue
        status = max(abs(end_of(pid)) for pid in pids)
        found = differences(reference, output_dir) if status == 0 else [f"exit status {status}"]
        if found:
            log = (work / f"{name}.log").read_text()
            raise RuntimeError(
                f"after {survived} kills ({work}): {', '.join(found)}\n{log[-3000:]}")
        return survived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--work", type=Path,
                        help="folder of data and runs, kept (default: a temporary one)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], metavar="N",
                        help="numbers of processes of a start; 4 replicas are shared out over them")
    arguments = parser.parse_args()
    rng, total, runs = random.Random(arguments.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as temporary:
        work = arguments.work or Path(temporary)
        prepare(work, 1 if arguments.processes == [1] else 4)
        while total < arguments.kills:
            kills = min(rng.randint(1, 3), arguments.kills - total)
            total += kill_and_resume(work, ("packed", "unpacked")[runs % 2], kills, rng,
                                     arguments.processes)
            runs += 1
            print(
                f"{total} kills survived in {runs} runs, "
                "each ending bit for bit as if never interrupted", flush=True)


if __name__ == "__main__":
    main()
