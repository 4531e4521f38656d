"""Keeps every test off the network, and runs the small models on one thread, which is fastest."""
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1",
                  TOKENIZERS_PARALLELISM="false", TORCH_CPP_LOG_LEVEL="ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    """Add the flags of tests/on_ipu; pytest reads them only from a conftest.py of this level."""
    group = parser.getgroup("tests/on_ipu, the acceptance suite for an IPU")
    group.addoption("--on_host", action="store_true",
                    help="run it against poptorch_host, to test the suite itself")
    group.addoption("--calibrate", action="store_true",
                    help="also measure the planner's constants, and save them for later plans")
    group.addoption("--ipu_report", metavar="FILE", default="output/on_ipu.json",
                    help="its JSON report (default: %(default)s)")
