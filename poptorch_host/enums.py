"""PopTorch's enumerations, with the same names and values."""
import enum


class MeanReductionStrategy(enum.IntEnum):
    """When ReductionType.Mean divides gradients; all three give the same mean on the host."""

    Running = 0
    Post = 1
    PostAndLoss = 2


class DataLoaderMode(enum.IntEnum):
    """Where a DataLoader reads its data.

    Sync reads in the calling process, Async in a worker process, and AsyncRebatched in a worker
    process that also assembles the combined batches.
    """

    Sync = 0
    Async = 1
    AsyncRebatched = 2


class SharingStrategy(enum.IntEnum):
    """How the worker process of an asynchronous data loader receives the data set."""

    SharedMemory = 0
    FileSystem = 1
    Fork = 2
    ForkServer = 3


class OutputMode(enum.IntEnum):
    """Which micro-batches' outputs a call returns.

    Default means Final in training and All in inference.
    """

    Final = 0
    EveryN = 1
    All = 2
    Sum = 3
    Default = 4


class ConnectionType(enum.IntEnum):
    """When an executor attaches to its device. Never means offline compilation."""

    Always = 0
    OnDemand = 1
    Never = 2


class HalfFloatCastingBehavior(enum.IntEnum):
    """How float16 is cast. Deprecated in PopTorch, and accepted without effect."""

    FloatDowncastToHalf = 0
    HalfUpcastToFloat = 1
    Default = 2


class ReductionType(enum.IntEnum):
    """How gradients are reduced over gradient accumulation and replicas."""

    Sum = 0
    Mean = 1
    NoReduction = 2


class SyncPattern(enum.IntEnum):
    """How IPUs are synchronised. The host has nothing to synchronise."""

    Full = 0
    SinglePipeline = 1
    ReplicaAndLadder = 2


class MatMulSerializationMode(enum.Enum):
    """The dimension along which serializedMatMul splits a product."""

    InputChannels = "input_channels"
    ReducingDim = "reducing_dim"
    OutputChannels = "output_channels"
    Disabled = "none"


class OverlapMode(enum.Enum):
    """How host transfers overlap with computation. The host has no such transfers."""

    NoOverlap = "no_overlap"
    OverlapAccumulationLoop = "overlap_accumulation_loop"
    OverlapDeviceIterationLoop = "overlap_device_iteration_loop"


class AutoStage(enum.IntEnum):
    """How blocks that the execution strategy does not list are assigned to stages.

    The stage has the number of the block's IPU, or a new number for each new block.
    """

    SameAsIpu = 0
    AutoIncrement = 1


class CommGroupType(enum.IntEnum):
    """How replicas are grouped for inputs and per-replica variables."""

    All = 0
    Consecutive = 1
    Orthogonal = 2
    NoGrouping = 3
