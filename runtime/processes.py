"""The processes of one run: which of them this is, and what they tell each other.

`poprun` starts several processes on IPU hosts, `torchrun` on hosts without IPUs. Both run the same
command line in each of them. The first process prints, and writes all files; the others compute.

    torchrun  sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (PyTorch, "torchrun
              (Elastic Launch)", Environment Variables).
    poprun    sets POPDIST_NUM_TOTAL_REPLICAS, POPDIST_NUM_LOCAL_REPLICAS,
              POPDIST_NUM_IPUS_PER_REPLICA, POPDIST_REPLICA_INDEX_OFFSET and
              POPDIST_LOCAL_INSTANCE_INDEX. The number of processes is total / local, this one's
              index offset / local.

What the processes tell each other travels over gloo (torch.distributed) under both, in messages of
JSON: nothing is pickled. IPUs exchange gradients among themselves; poptorch_host does it in
_reduction.py. All functions that say "collective" must be called by every process, in the same
order. With one process they do nothing. This module does not import torch before `join`.

If a process ends or fails, the others' next collective raises ConnectionError. `together` turns it
into one line that names the process, printed by the first one. A process that is stopped, or hangs,
is found when the timeout of `join` is over.
"""
from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

from runtime.errors import RunError, Stopped, UsageError
from runtime.flags import Settings

TIMEOUT = 1800  # seconds, torch's own default
_ERRORS = {"UsageError": UsageError, "RunError": RunError}
_PATIENCE = 10.0  # seconds in which a process that is alive notices that another one has gone
_UNREACHABLE = "has ended, or its host cannot be reached"
_ROOT = Path(__file__).resolve().parents[1]


class Place(NamedTuple):
    """This process among those of the run.

    index: from 0. count: of all processes. local_index: among those of this host. launcher: poprun,
    torchrun, or None. replicas: under poprun, the replicas of all processes; else None.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    launcher: Optional[str] = None
    replicas: Optional[int] = None
    ipus_per_replica: Optional[int] = None


@lru_cache(maxsize=None)
def place() -> Place:
    """Return this process's place, from the environment. Raises UsageError if it makes no sense."""
    if "POPDIST_NUM_TOTAL_REPLICAS" in os.environ:
        total, local, offset = map(_number, (
            "POPDIST_NUM_TOTAL_REPLICAS", "POPDIST_NUM_LOCAL_REPLICAS",
            "POPDIST_REPLICA_INDEX_OFFSET"))
        if local < 1 or total % local or offset % local or not 0 <= offset < total:
            raise UsageError(
                f"poprun's replicas (POPDIST_NUM_TOTAL_REPLICAS={total}, "
                f"POPDIST_NUM_LOCAL_REPLICAS={local}, POPDIST_REPLICA_INDEX_OFFSET={offset}) are "
                "not the same number in each process: make --num-replicas a multiple of "
                "--num-instances")
        return Place(offset // local, total // local, _number("POPDIST_LOCAL_INSTANCE_INDEX"),
                     "poprun", total, _number("POPDIST_NUM_IPUS_PER_REPLICA"))
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        index, of = _number("RANK"), _number("WORLD_SIZE")
        if not 0 <= index < of:
            raise UsageError(f"RANK={index}, WORLD_SIZE={of}: start the processes with torchrun")
        local = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else index
        return Place(index, of, local, "torchrun")
    mpi = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if mpi != "1":
        raise UsageError(f"mpirun has started {mpi} processes, which do not know each other: start "
                         "them with poprun on IPU hosts, with torchrun on others")
    return Place()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}={text}: it should be a number, as poprun and torchrun "
                         "set it") from None


def count() -> int:
    """Return the number of processes."""
    return place().count


def is_first() -> bool:
    """Return whether this process prints, and writes the files."""
    return place().index == 0


def own_path(path: Union[str, Path]) -> str:
    """Return `path` for the first process, and a path beside it for each other one.

    FOLDER/trace.json becomes FOLDER/trace.process1.json.
    """
    path = Path(path)
    return str(path if is_first() else
               path.with_name(f"{path.stem}.process{place().index}{path.suffix}"))


# ---- the run of all processes ----


def together(main: Callable[[], Optional[int]]) -> Callable[[], Optional[int]]:
    """Return `main`, so that an error in any process ends all, and is told once.

    The first process raises the error, its own or another's, with a name of the process before it.
    In the others SystemExit carries the exit status, with which nothing is printed.
    """
    def run() -> Optional[int]:
        if count() == 1:
            return main()
        try:
            status = main()
        except (Exception, Stopped) as error:  # pylint: disable=broad-except
            if _group is None and not isinstance(error, Stopped):
                return join(error=error)
            if _group is None:
                raise
            return _group.end(error)
        if _group is not None:
            _group.end(None)
        return status
    return run


def join(*settings: Settings, error: Optional[Exception] = None) -> None:
    """Collective: meet the other processes, and check that all are to do the same.

    settings: those of the run. process_timeout among them gives the seconds after which a process
    that does not answer counts as gone. error: if this process has failed already; it is then
    raised in all.

    Raises UsageError, which names the process, if the settings, the program's files or the versions
    of its packages differ.
    """
    global _group
    if count() == 1:
        return
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are stack traces
    values = {name: value for each in settings for name, value in each.values().items()}
    _group = _Group(values.get("process_timeout", TIMEOUT))
    failed = None if error is None else _as_json(error)
    _group.members = share({
        "error": failed, "host": socket.gethostname(), "pid": os.getpid(),
        "namespace": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    })
    _raise_shared([each["error"] for each in _group.members])
    agree({"the program's files": _files_hash(), "Python": platform.python_version(),
           **_versions(), **{f"--{name}": value for name, value in values.items()
                             if name != "hub_token"}})
    if is_first():
        print(f"{count()} processes ({place().launcher}) on "
              f"{len({each['host'] for each in _group.members})} host(s)")


def share(value: Any) -> List[Any]:
    """Collective: return the values of all processes, in their order. They are JSON values."""
    if count() == 1:
        return [value]
    import torch
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = _gathered(torch.tensor([len(data)]))
    room = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
    room[:len(data)] = data
    return [json.loads(bytes(each[:int(size)].tolist()))
            for each, size in zip(_gathered(room), sizes)]


def gather_rows(tensor: Any, width: int) -> Any:
    """Collective: return the rows of all processes' tensors in the order of the combined batch.

    tensor: [groups x width, ...], or a scalar. width: rows of this process that follow each other:
    of its replicas in one pipeline step. A combined batch is ordered by step, then replica.
    """
    if count() == 1:
        return tensor
    import torch
    tensor = tensor.reshape(-1) if tensor.dim() == 0 else tensor
    parts = [each.view(-1, width, *tensor.shape[1:]) for each in _gathered(tensor.contiguous())]
    return torch.stack(parts, dim=1).flatten(0, 2)


def on_first(function: Callable[..., Any], *arguments: Any) -> Any:
    """Collective: call `function` in the first process only, and return its result in all.

    The result is a JSON value. A UsageError, RunError or OSError of the function is raised in all.
    """
    if count() == 1:
        return function(*arguments)
    if not is_first():
        told = share(None)[0]
        if "error" in told:
            raise _from_json(told["error"])
        return told["result"]
    try:
        result = function(*arguments)
    except (UsageError, RunError, OSError) as error:
        share({"error": _as_json(error)})
        raise
    return share({"result": result})[0]["result"]


def first_of_host_first(function: Callable[..., Any], *arguments: Any) -> Any:
    """Collective: return what `function` returns, in one process of each host before the others.

    These find what it has put into a cache. An error of it is raised in all.
    """
    if count() == 1:
        return function(*arguments)
    result, error = None, None
    for turn in (True, False):
        if (place().local_index == 0) == turn:
            try:
                result = function(*arguments)
            except (UsageError, RunError, OSError) as caught:
                error = caught
        _raise_shared(share(error and _as_json(error)))
    return result


def _raise_shared(told: List[Optional[Dict[str, Any]]]) -> None:
    """Raise the first of the errors that the processes have shared, if any."""
    failed = [index for index, each in enumerate(told) if each]
    if failed:
        raise _from_json(told[failed[0]], f"{_group.name(failed[0])}: " if failed[0] else "")


def agree(facts: Dict[str, Any]) -> None:
    """Collective: raise UsageError, in all processes, unless `facts` are the same in all.

    facts: JSON values by what to call them.
    """
    if count() == 1:
        return
    all_facts = share(json.loads(json.dumps(facts)))
    for index, theirs in enumerate(all_facts):
        for name, value in all_facts[0].items():
            if theirs.get(name) != value:
                raise UsageError(
                    f"{_group.name(index)} differs from the first: {name} is {theirs.get(name)!r} "
                    f"there, {value!r} on the first; start all with the same")


def any_true(value: Union[bool, int]) -> int:
    """Collective: return the largest of all processes' numbers, 0 for False."""
    return max(map(int, share(int(value))))


def watch_signal(received: Optional[Callable[[], int]]) -> None:
    """Have `raise_stopped` look at the signal, or 0, that `received` returns; None: at nothing."""
    global _received
    _received = received


def raise_stopped() -> None:
    """Collective: raise Stopped in all processes if one has received a signal that is watched."""
    if _received is not None:
        number = any_true(_received())
        if number:
            raise Stopped(128 + number)


_received: Optional[Callable[[], int]] = None


# ---- what is behind it ----


class _Group:
    """The connections of this process to the others.

    The store holds, for each process: beat/INDEX, which counts its seconds; words/INDEX, why it has
    ended, and spoken/INDEX if there are any; left/INDEX, that it knows of the end; done/INDEX, that
    it needs the store no more.
    """

    def __init__(self, timeout: float):
        import torch.distributed as dist
        here = place()
        self.timeout, self.members, self.lost = timeout, [], set()
        self.patience = min(_PATIENCE, timeout)
        # Recent exchanges: see _leave.
        self.works: Any = deque(maxlen=64)
        address = _address()
        try:
            self.store, *_ = next(dist.rendezvous("env://", here.index, here.count,
                                                  timeout=timedelta(seconds=timeout)))
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("gloo", self.store), rank=here.index,
                world_size=here.count, timeout=timedelta(seconds=timeout))
            self.store.set_timeout(timedelta(seconds=_PATIENCE))
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the {here.count} processes could not meet at {address} within "
                           f"{timeout:.0f} s ({str(error).splitlines()[0][:200]})") from error
        self._ending = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        atexit.register(self._stop_beating)

    def name(self, index: int) -> str:
        """Return what to call a process in a message."""
        if not self.members:  # it has gone before they have met
            return f"process {index}"
        member = self.members[index]
        return f"process {index} (pid {member['pid']} on {member['host']})"

    def end(self, error: Optional[BaseException]) -> None:
        """Leave the others. `error` is why, or None at the end of a run that went well.

        Raises what this process has to raise: see `together`.
        """
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun ends the others meanwhile
            with suppress(ValueError):
                signal.signal(number, signal.SIG_IGN)
        if error is None:
            with suppress(ConnectionError):
                share(None)
            self._leave()
            return
        lost = isinstance(error, ConnectionError)
        if not lost:
            with suppress(RuntimeError):
                self._ask("set", f"words/{place().index}", json.dumps(_as_json(error)))
                self._mark("spoken")
        with suppress(RuntimeError):
            self._leave()  # wakes those who wait for this process
        try:
            if lost:
                error = self._explained(error)
            elif not is_first():
                error = SystemExit(_status(error))
        finally:
            self._wait_until_all_know()
        raise error

    @staticmethod
    def _leave() -> None:
        """Close the connections.

        In torch 2.0 destroy_process_group holds the GIL while it waits for gloo's worker threads
        (~ProcessGroupGloo). One that frees the tensors of an exchange takes the GIL, and neither
        would end: so `works` keeps the last ones, and those before get time to be freed.
        """
        import torch.distributed as dist
        time.sleep(0.1)
        dist.destroy_process_group()

    def _explained(self, error: BaseException) -> BaseException:
        """Return what to raise after a lost connection, once it is clear who has gone and why."""
        culprits, told = self._culprits()
        self.lost = set(culprits) if told is None else set()
        if told and told["status"] > 2:
            return SystemExit(told["status"])  # a signal, which that process has told about
        speaker = min(set(range(count())) - set(culprits))
        if place().index != speaker:
            return SystemExit(told["status"] if told else 1)
        sys.stderr = sys.__stderr__  # if the first process is gone, another speaks
        if told:
            return _from_json(told, f"{self.name(next(iter(culprits)))}: ")
        if not culprits:
            return RunError(f"the connection between the processes was lost ({error})")
        return RunError("; ".join(f"{self.name(i)} {why}" for i, why in culprits.items())
                        + "; the run of all processes ends here")

    def _culprits(self) -> tuple:
        """Return ({index: what is wrong with that process}, its last words or None)."""
        others = [index for index in range(count()) if index != place().index]
        until = time.monotonic() + self.patience
        try:
            self._mark("left")
            while True:
                for index in others:
                    if self._marked("spoken", index):
                        return {index: ""}, json.loads(self._ask("get", f"words/{index}"))
                # Those that have left because of this same loss are not its cause.
                silent = [index for index in others if not self._marked("left", index)]
                gone = {index: why for index in silent for why in [self._gone(index)] if why}
                if gone or not silent:
                    return gone, None
                if time.monotonic() > until:
                    why = f"has not answered for --process_timeout {self.timeout:.0f} s"
                    return dict.fromkeys(silent, why), None
                time.sleep(0.1)
        except RuntimeError:  # the store ends, or stops, with the first process
            with suppress(RuntimeError):
                return {0: self._gone(0) or "does not answer"}, None
            return {0: _UNREACHABLE}, None

    def _gone(self, index: int) -> Optional[str]:
        """Return in what way a process is gone, or None if it is alive."""
        if not self.members:
            return None
        member, mine = self.members[index], self.members[place().index]
        if (member["host"], member["namespace"]) == (mine["host"], mine["namespace"]):
            try:
                status = Path(f"/proc/{member['pid']}/stat").read_text()
            except OSError:
                return "has ended"
            state = status.rpartition(")")[2].split()[0]
            return {"Z": "has ended", "X": "has ended", "T": "is stopped"}.get(state)
        before = self._ask("add", f"beat/{index}", 0)
        time.sleep(2.5)
        return None if self._ask("add", f"beat/{index}", 0) > before else _UNREACHABLE

    def _beat(self) -> None:
        with suppress(RuntimeError):
            while not self._ending.wait(1):
                self.store.add(f"beat/{place().index}", 1)

    def _stop_beating(self) -> None:
        """End the thread before Python does.

        Python 3.11 ends a thread by unwinding, which torch's C++ code answers with std::terminate:
        if the thread is in the store then, the process ends with SIGABRT.
        """
        self._ending.set()
        self._beating.join(0 if 0 in self.lost else _PATIENCE)

    def _wait_until_all_know(self) -> None:
        """Let the others read the store, which may end with this process."""
        if 0 in self.lost:
            return
        until = time.monotonic() + _PATIENCE
        with suppress(RuntimeError):
            self._mark("left")
            self._mark("done")
            others = [index for index in range(count()) if index not in self.lost
                      and index != place().index and not self._gone(index)]
            while is_first() and time.monotonic() < until and not all(
                    self._marked("done", index) for index in others):
                time.sleep(0.05)

    def _mark(self, what: str) -> None:
        self._ask("add", f"{what}/{place().index}", 1)

    def _marked(self, what: str, index: int) -> bool:
        return self._ask("add", f"{what}/{index}", 0) > 0  # torch 2.0's stores have no check()

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return what a method of the store returns. Raises RuntimeError if it does not answer.

        torch 2.13 would wait for ever for the store of a process that is stopped.
        """
        answer: List[Any] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answer.append(getattr(self.store, method)(*arguments))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_PATIENCE)
        if not answer:
            raise RuntimeError("the store does not answer")
        return answer[0]


_group: Optional[_Group] = None


def _address() -> str:
    """Set what torch's rendezvous reads from the environment; returns the address of the store.

    torchrun sets both variables. poprun sets neither: on one host the loopback address is right.
    """
    if place().launcher == "poprun":
        several = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != os.environ.get(
            "OMPI_COMM_WORLD_SIZE")
        if several and "MASTER_ADDR" not in os.environ:
            raise UsageError(
                "poprun has started processes on several hosts: name the first host to all, with "
                '--mpi-global-args="-x MASTER_ADDR=HOST"')
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _gathered(tensor: Any) -> List[Any]:
    """Return the tensors of all processes, which have the same shape."""
    import torch
    import torch.distributed as dist
    parts = [torch.empty_like(tensor) for _ in range(count())]
    try:
        _group.works.append(dist.all_gather(parts, tensor, async_op=True))
        _group.works[-1].wait()
    except RuntimeError as error:
        raise ConnectionError(str(error).splitlines()[0]) from error
    return parts


def _status(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    return 2 if isinstance(error, UsageError) else 1


def _as_json(error: BaseException) -> Dict[str, Any]:
    kind = type(error).__name__ if type(error).__name__ in _ERRORS else "RunError"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif type(error).__name__ not in _ERRORS:
        text = f"{type(error).__name__}: {text}"
    return {"kind": kind, "text": text, "status": _status(error)}


def _from_json(told: Dict[str, Any], before: str = "") -> Exception:
    return _ERRORS[told["kind"]](before + told["text"])


def _files_hash() -> str:
    """Return a hash of the program's Python files and configurations."""
    digest = hashlib.sha256()
    packages = [_ROOT / name for name in (
        "planner", "qa", "ipu_options", "runtime", "poptorch_host")]
    files: Sequence[Path] = [
        *_ROOT.glob("*.py"), *(path for folder in packages for path in folder.rglob("*.py")),
        *(_ROOT / "qa" / "configs").glob("*.yaml")]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _versions() -> Dict[str, str]:
    import importlib.metadata
    found = {}
    for package in ("torch", "transformers", "tokenizers", "datasets", "numpy", "poptorch"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
