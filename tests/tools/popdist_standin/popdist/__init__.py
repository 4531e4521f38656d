"""A stand-in for Graphcore's popdist, for runs of poptorch_host in several processes of one host.

It has the names that graphcore/examples use (nlp/bert/pytorch/args.py, vision/cnns/pytorch/utils/
distributed.py) and reads the environment that poprun sets. Every call of the engine is one that all
instances must make (popart, devicex.cpp: popdist::run around each run of the engine). A call that
only some make hangs on IPUs; here it is an error after PATIENCE seconds.
"""
import functools
import os
from datetime import timedelta

PATIENCE = 20
# What runs a program on the IPUs: steps, weights and optimizer state in both directions, the
# random state, and loading the executable.
ENGINE_CALLS = ("run", "upload", "download", "read_state", "write_state", "get_rng", "attach")
_group = None


def isPopdistEnvSet():
    return "POPDIST_NUM_TOTAL_REPLICAS" in os.environ


def getNumTotalReplicas():
    return int(os.environ.get("POPDIST_NUM_TOTAL_REPLICAS", 1))


def getNumLocalReplicas():
    return int(os.environ.get("POPDIST_NUM_LOCAL_REPLICAS", 1))


def getNumInstances():
    return getNumTotalReplicas() // getNumLocalReplicas()


def getReplicaIndexOffset():
    return int(os.environ.get("POPDIST_REPLICA_INDEX_OFFSET", 0))


def getInstanceIndex():
    return getReplicaIndexOffset() // getNumLocalReplicas()


def getLocalInstanceIndex():
    return int(os.environ.get("POPDIST_LOCAL_INSTANCE_INDEX", 0))


def getNumIpusPerReplica():
    return int(os.environ.get("POPDIST_NUM_IPUS_PER_REPLICA", 1))


def checkNumIpusPerReplica(number):
    if isPopdistEnvSet() and number != getNumIpusPerReplica():
        raise RuntimeError(f"The number of IPUs per replica ({number}) is not that of poprun "
                           f"({getNumIpusPerReplica()})")


def getDeviceId(number=None):
    return getLocalInstanceIndex()


def init():
    global _group
    assert _group is None, "popdist.init() was called twice"
    if getNumInstances() == 1:
        return
    import torch.distributed as dist

    from poptorch_host._device import Device
    _group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
    for name in ENGINE_CALLS:
        setattr(Device, name, _collective(getattr(Device, name)))


def synchronize():
    _meet("synchronize")


def execute_on_instances(instances, function, *args, **kwargs):
    if getInstanceIndex() in instances:
        function(*args, **kwargs)
    synchronize()


def _collective(method):
    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        if not getattr(self, "_popdist_inside", False):  # upload calls others
            _meet(method.__name__)
        self._popdist_inside = True
        try:
            return method(self, *args, **kwargs)
        finally:
            self._popdist_inside = False
    return checked


def _meet(name):
    """Raise RuntimeError unless all instances make the call `name` within PATIENCE seconds."""
    import torch
    import torch.distributed as dist
    mine = torch.zeros(32, dtype=torch.uint8)
    mine[:len(name)] = torch.tensor(list(name.encode()), dtype=torch.uint8)
    names = [torch.empty_like(mine) for _ in range(getNumInstances())]
    try:
        dist.all_gather(names, mine, group=_group)
    except RuntimeError as error:
        raise RuntimeError(f"popdist: not all instances call {name} ({error})") from error
    called = {bytes(each.tolist()).rstrip(b"\0").decode() for each in names}
    if called != {name}:
        raise RuntimeError(f"popdist: the instances make different calls: {sorted(called)}")
