"""PopTorch's enumerations, with the same names and values."""
import enum


class MeanReductionStrategy(enum.IntEnum):
    """When ReductionType.Mean divides gradients; all three give the same mean on the host."""

    Running = 0
    Post = 1
    PostAndLoss = 2


class DataLoaderMode(enum.IntEnum):
    """Whether the calling process reads the data set (Sync) or worker processes do (Async)."""

    Sync = 0
    Async = 1
    AsyncRebatched = 2  # not offered


class OutputMode(enum.IntEnum):
    """Which micro-batches' outputs a call returns."""

    Final = 0
    EveryN = 1
    All = 2
    Sum = 3
    Default = 4  # Final in training, All in inference


class ConnectionType(enum.IntEnum):
    """When an executor attaches to its device; Never: offline compilation."""

    Always = 0
    OnDemand = 1
    Never = 2


class ReductionType(enum.IntEnum):
    """How gradients are reduced over gradient accumulation and replicas."""

    Sum = 0
    Mean = 1
    NoReduction = 2


class AutoStage(enum.IntEnum):
    """The stage of a block: the number of its IPU, or a new number for each new block."""

    SameAsIpu = 0
    AutoIncrement = 1
