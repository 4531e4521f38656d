"""Maps the job to IPUs, and decides which PopTorch runs; no other module makes that decision.

`from ipu_options import poptorch, kernels, device` gives PopTorch, the matching kernels for
attention and dropout, and the device that the figures of a run are of: "IPU" or "host". With
Graphcore's PopTorch, the kernels use only operations from PopTorch's list of supported operations;
with poptorch_host, they are the host's own. The names are resolved on first use (PEP 562), so that
`--help` and the checks of the command line do not import torch.
"""
import os

# Threads that have nothing to do sleep. If they spin, as is OpenMP's default, each of thousands of
# small operations takes long where another process wants the processor. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name):
    if name not in ("poptorch", "kernels", "device"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    device = "IPU"
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
    globals().update(poptorch=poptorch, kernels=kernels, device=device)
    return globals()[name]
