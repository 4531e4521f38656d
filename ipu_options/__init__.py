"""Maps the job to IPUs, and decides which PopTorch runs; no other module makes that decision.

`from ipu_options import poptorch, kernels, device` gives PopTorch, the matching kernels for
attention and dropout, and the device that the figures of a run are of: "IPU" or "host". With
Graphcore's PopTorch, the kernels use only operations from PopTorch's list of supported operations;
with poptorch_host, they are the host's own. The names are resolved on first use (PEP 562), so that
`--help` and the checks of the command line do not import torch.
"""
import faulthandler
import os
import signal

# These are read when torch is loaded. A thread that waits for work looks for it this number of
# times, then sleeps. With libgomp's default, 300,000 (OMP_WAIT_POLICY not set), each of thousands
# of small operations takes long where another process wants the processor. Sleeping at once takes
# long on an idle machine: 1.3 times the time of a step (measured, 2 layers of roberta-base).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
# Memory of large tensors comes in pages of 2 MiB, where Linux has them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name):
    if name not in ("poptorch", "kernels", "device"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    device = "IPU"
    # IPUs that an evaluation gives up may be taken by others. PopTorch waits for them only if it is
    # told to (popart_compiler, CompilerImpl.cpp, createDevice), and otherwise ends the run.
    os.environ.setdefault("POPTORCH_WAIT_FOR_IPU", "1")
    try:
        import poptorch

        from ipu_options.ipu_kernels import IPU_KERNELS as kernels
    except ModuleNotFoundError as error:
        # If PopTorch is installed but lacks a dependency, fail instead of using poptorch_host.
        if error.name != "poptorch":
            raise
        import poptorch_host as poptorch
        from ipu_options.host_kernels import HOST_KERNELS as kernels
        device = "host"
    # PopTorch has SIGTERM print the stacks of all threads before our handler runs (_logging.py).
    faulthandler.unregister(signal.SIGTERM)
    globals().update(poptorch=poptorch, kernels=kernels, device=device)
    return globals()[name]
