"""How the job is mapped to IPUs. `from ipu_options import poptorch` is the one place that decides which PopTorch runs.

`poptorch` is resolved on first use (PEP 562), so that `--help` and the command-line checks need no torch.
"""


def __getattr__(name):
    if name == "poptorch":
        try:
            import poptorch
        except ModuleNotFoundError as error:
            if error.name != "poptorch":  # PopTorch is there, but something it needs is not: say so, do not hide it
                raise
            import poptorch_host as poptorch
        globals()[name] = poptorch
        return poptorch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
