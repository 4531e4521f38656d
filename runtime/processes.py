"""The processes of one run: which of them this is, and what they tell each other.

`poprun` starts several processes on IPU hosts, `torchrun` on hosts without IPUs, all with the same
command line. The first process prints, and writes all files; the others compute.

Messages travel over gloo (torch.distributed) as JSON: nothing is pickled. A "collective" function
must be called by every process, in the same order; with one process it does nothing.

A process that fails prints one line and ends. The others' next collective raises ConnectionError,
and they end in silence. The launcher ends those that compute meanwhile, and reports a process that
was killed. The timeout of `join` ends waiting for one that hangs.
"""
from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import sys
import threading
import warnings
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union

from runtime.errors import RunError, Stopped, UsageError, counted, one_line
from runtime.flags import Settings

TIMEOUT = 1800  # seconds, torch's own default
_STORE_TIMEOUT = 10  # seconds
_store: Any = None  # torch's key-value store of the processes, once they have met


class Place(NamedTuple):
    """This process among all of the run."""

    index: int = 0
    count: int = 1
    local_index: int = 0  # on this host
    launcher: Optional[str] = None  # "poprun", "torchrun" or None
    replicas: Optional[int] = None  # of all processes; only poprun says so
    ipus_per_replica: Optional[int] = None  # only poprun says so


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
        index, world = _number("RANK"), _number("WORLD_SIZE")
        if not 0 <= index < world:
            raise UsageError(f"RANK={index}, WORLD_SIZE={world}: start the processes with torchrun")
        local = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else index
        return Place(index, world, local, "torchrun")
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


def process_path(path: Union[str, Path]) -> str:
    """Return `path` in the first process, and in another one FOLDER/trace.process1.json."""
    path = Path(path)
    return str(path if is_first() else
               path.with_name(f"{path.stem}.process{place().index}{path.suffix}"))


# ---- beginning and end ----


def together(main: Callable[[], Optional[int]]) -> Callable[[], Optional[int]]:
    """Wrap `main`: an error in any process ends all of them and is printed once."""
    def run() -> Optional[int]:
        try:
            alone = count() == 1
        except UsageError:
            if os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
                raise
            return 2  # the first process says why
        if alone:
            return main()
        try:
            status = main()
            if _store is not None:
                share(None)  # the store ends with the first process, so none ends before all
            return status
        except (Exception, Stopped) as error:  # pylint: disable=broad-except
            raise _last_word(error)
    return run


def join(*settings: Settings, error: Optional[Exception] = None) -> None:
    """Collective: meet the other processes; raises UsageError unless all have the same settings.

    settings: of the run, process_timeout among them. error: of this process, raised in all.
    """
    if count() == 1:
        return
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are stack traces
    values = {name: value for group in settings for name, value in group.values().items()}
    _meet(values.get("process_timeout", TIMEOUT))
    _raise_in_all(error)
    agree({f"--{name}": value for name, value in values.items() if name != "hub_token"})
    hosts = share(socket.gethostname())
    print(f"{count()} processes ({place().launcher}) on {counted(len(set(hosts)), 'host')}")


class _NotMet(RunError):
    """The processes could not meet."""


def _meet(timeout: float) -> None:
    # The timeout, in seconds, holds for every later collective too.
    global _store
    import torch.distributed as dist
    address, here, limit = _address(), place(), timedelta(seconds=timeout)
    try:
        store, *_ = next(dist.rendezvous("env://", here.index, here.count, timeout=limit))
        dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=here.index,
                                world_size=here.count, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise _NotMet(f"the {here.count} processes could not meet at {address} within "
                      f"{timeout:.0f} s ({one_line(error)[:200]})") from error
    store.set_timeout(timedelta(seconds=_STORE_TIMEOUT))
    _store = store


def _address() -> str:
    """Set what torch's rendezvous reads from the environment, as torchrun does; returns it."""
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


def _last_word(error: BaseException) -> BaseException:
    """Return what to raise for `error`: silence, if another process has failed before."""
    if _store is None and not isinstance(error, (_NotMet, Stopped)):
        try:
            join(error=error)
        except Exception as shared:  # pylint: disable=broad-except
            error = shared
    in_all = getattr(error, "in_all", False)
    speaks = is_first() if in_all else _fails_first(error)
    status = error.code if isinstance(error, Stopped) else 2 if isinstance(error, UsageError) else 1
    # A lost connection leaves threads of gloo behind, at which Python's own way out may abort
    # (torch 2.13) or wait for ever (2.0). What is registered last is called first.
    atexit.register(_leave, status)
    if in_all and not speaks:
        with suppress(ConnectionError):  # once this process has ended, torchrun ends the first:
            share(None)                  # it prints before, and takes no part in this
    if isinstance(error, Stopped) or not speaks:
        return SystemExit(status)
    sys.stderr = sys.__stderr__
    if isinstance(error, ConnectionError):
        error = RunError("another process has ended, or has not answered for --process_timeout; "
                         f"its launcher says more ({str(error).rpartition('] ')[2]})")
    return error if in_all else _named(error, place().index)


def _leave(status: int) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _fails_first(error: BaseException) -> bool:
    """Tell the others that this process fails; returns whether it is the first to do so."""
    failures: List[int] = []

    def count_failure() -> None:
        with suppress(RuntimeError):
            failures.append(_store.add("failures", 1))

    if _store is None:
        return is_first() or isinstance(error, _NotMet)
    thread = threading.Thread(target=count_failure, daemon=True)
    thread.start()
    thread.join(_STORE_TIMEOUT)
    if failures:
        return failures == [1]
    # The store's holder has ended, or is stopped: the second process tells of the loss.
    return isinstance(error, ConnectionError) and place().index == 1


def _named(error: Exception, index: int) -> Exception:
    if index == 0:
        return error
    kind = UsageError if isinstance(error, UsageError) else RunError
    return kind(f"{one_line(error)} (process {index})")


# ---- what they tell each other ----


def share(value: Any) -> List[Any]:
    """Collective: return the values of all processes, in their order. They are JSON values."""
    if count() == 1:
        return [value]
    import torch
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [int(size) for size in _gathered(torch.tensor([len(data)]))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[:len(data)] = data
    return [json.loads(bytes(part[:size].tolist()))
            for part, size in zip(_gathered(padded), sizes)]


def gather_rows(tensor: Any, width: int) -> Any:
    """Collective: return the rows of all processes' tensors in the order of the combined batch.

    tensor: [steps x width, ...], or a scalar. width: consecutive rows from this process in one
    pipeline step (its replicas x micro-batch size).
    """
    if count() == 1:
        return tensor
    import torch
    tensor = tensor.reshape(-1) if tensor.dim() == 0 else tensor
    parts = [part.view(-1, width, *tensor.shape[1:]) for part in _gathered(tensor.contiguous())]
    return torch.stack(parts, dim=1).flatten(0, 2)


def _gathered(tensor: Any) -> List[Any]:
    import torch
    parts = [torch.empty_like(tensor) for _ in range(count())]
    try:
        torch.distributed.all_gather(parts, tensor)
    except RuntimeError as error:
        raise ConnectionError(str(error).splitlines()[0]) from error
    return parts


def on_first(function: Callable[..., Any], *arguments: Any) -> Any:
    """Collective: call `function` in the first process, and return its result, JSON, in all.

    A UsageError, RunError or OSError of the function is raised in all.
    """
    return share(_in_turn(is_first(), function, *arguments))[0]


def first_of_host_first(function: Callable[..., Any], *arguments: Any) -> Any:
    """Collective: call `function` in one process per host, then in the others, with its cache.

    A UsageError, RunError or OSError is raised in all.
    """
    leads = place().local_index == 0
    results = [_in_turn(leads == turn, function, *arguments) for turn in (True, False)]
    return results[0 if leads else 1]


def _in_turn(takes_part: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    result, error = None, None
    try:
        result = function(*arguments) if takes_part else None
    except (UsageError, RunError, OSError) as caught:
        error = caught
    _raise_in_all(error)
    return result


def _raise_in_all(error: Optional[Exception]) -> None:
    for index, shared in enumerate(share(error and [isinstance(error, UsageError),
                                                    one_line(error)])):
        if shared:
            is_usage, text = shared
            if index != place().index:
                error = _named((UsageError if is_usage else RunError)(text), index)
            error.in_all = True  # the first process prints it
            raise error


def agree(facts: Dict[str, Any]) -> None:
    """Collective: raise UsageError in all unless all have the same facts, {name: JSON value}."""
    first, *others = share(facts)
    for index, theirs in enumerate(others, 1):
        for name, value in first.items():
            if theirs.get(name) != value:
                _raise_in_all(UsageError(
                    f"process {index} differs from the first: {name} is {theirs.get(name)!r} "
                    f"there, {value!r} on the first; start all with the same"))
