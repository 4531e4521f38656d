"""How the job is mapped to IPUs. This is the one place that decides which PopTorch runs.

`from ipu_options import poptorch, kernels` gives PopTorch and the kernels (attention, dropout) that
suit it: operations from PopTorch's list of supported operations on an IPU, the host's own kernels
on poptorch_host. Both are resolved on first use (PEP 562), so that `--help` and the checks of the
command line need no torch.
"""


def __getattr__(name):
    if name not in ("poptorch", "kernels"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import poptorch

        from ipu_options.ipu_kernels import IPU_KERNELS as kernels
    except ModuleNotFoundError as error:
        # PopTorch is installed, but something it needs is not: that must be seen
        if error.name != "poptorch":
            raise
        import poptorch_host as poptorch
        from ipu_options.host_kernels import HOST_KERNELS as kernels
    globals().update(poptorch=poptorch, kernels=kernels)
    return globals()[name]
