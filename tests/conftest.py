"""Keeps every test off the network and on one thread, which is fastest, and ends one that hangs."""
import os
import signal

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1",
                  TOKENIZERS_PARALLELISM="false", TORCH_CPP_LOG_LEVEL="ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# nohup ignores SIGHUP, and programs that the tests start would inherit that, but no handler.
signal.signal(signal.SIGHUP, lambda number, frame: None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Interrupt a test after a quarter of an hour, and every 30 s what it then does to clean up."""
    def interrupt(number, frame):
        raise TimeoutError(f"{item.nodeid} takes too long")

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3600 if "on_ipu" in item.nodeid else 900, 30)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_addoption(parser):
    """Add the flags of tests/on_ipu; pytest reads them only from a conftest.py of this level."""
    group = parser.getgroup("tests/on_ipu, the acceptance suite for an IPU")
    group.addoption("--on_host", action="store_true",
                    help="run it against poptorch_host, to test the suite itself")
    group.addoption("--calibrate", action="store_true",
                    help="also measure the planner's constants, and save them for later plans")
    group.addoption("--ipu_report", metavar="FILE", default="output/on_ipu.json",
                    help="its JSON report (default: %(default)s)")
