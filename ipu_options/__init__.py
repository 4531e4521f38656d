"""How the job is mapped to IPUs. This is the one place that decides which PopTorch runs.

`from ipu_options import poptorch, attention` gives PopTorch and the attention that suits it: operations of PopTorch's
supported list on an IPU, the host's own kernel on poptorch_host. Both are resolved on first use (PEP 562), so that
`--help` and the command-line checks need no torch.
"""


def __getattr__(name):
    if name not in ("poptorch", "attention"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import poptorch

        from ipu_options.kernels import attention
    except ModuleNotFoundError as error:
        if error.name != "poptorch":  # PopTorch is there, but something it needs is not: say so, do not hide it
            raise
        import poptorch_host as poptorch
        from poptorch_host.kernels import attention
    globals().update(poptorch=poptorch, attention=attention)
    return globals()[name]
