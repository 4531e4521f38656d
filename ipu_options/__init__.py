"""How the job is mapped to IPUs. This is the one place that decides which PopTorch runs.

`from ipu_options import poptorch, kernels` gives PopTorch and the kernels (attention, dropout) that suit it: operations of
PopTorch's supported list on an IPU, the host's own on poptorch_host. Both are resolved on first use (PEP 562), so that
`--help` and the command-line checks need no torch.
"""


def __getattr__(name):
    if name not in ("poptorch", "kernels"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import poptorch

        from ipu_options import ipu_kernels as kernels
    except ModuleNotFoundError as error:
        if error.name != "poptorch":  # PopTorch is there, but something it needs is not: say so, do not hide it
            raise
        import poptorch_host as poptorch
        from poptorch_host import kernels
    globals().update(poptorch=poptorch, kernels=kernels)
    return globals()[name]
