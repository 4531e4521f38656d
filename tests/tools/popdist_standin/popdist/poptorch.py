"""popdist.poptorch.Options: what poprun decides can be read and not set.

The refusals are those of PopTorch's tests/popdist_test.py, test_blocked_options.
"""
import popdist
import poptorch_host


def _refuse(name):
    def refused(*args, **kwargs):
        raise RuntimeError(f"Cannot call `{name}` with popdist.poptorch.Options")
    return refused


class Options(poptorch_host.Options):
    def __init__(self, ipus_per_replica=None):
        super().__init__()
        popdist.checkNumIpusPerReplica(ipus_per_replica or popdist.getNumIpusPerReplica())
        poptorch_host.Options.replicationFactor(self, popdist.getNumLocalReplicas())
        self.Distributed.configureProcessId(popdist.getInstanceIndex(), popdist.getNumInstances())

    replicationFactor = _refuse("replicationFactor")
    useIpuId = _refuse("useIpuId")
