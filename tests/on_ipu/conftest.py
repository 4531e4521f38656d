"""The acceptance suite for the first hour on an IPU; docs/ipu_host.md walks through it.

    python -m pytest tests/on_ipu               on a machine with 4 IPUs and the Poplar SDK
    python -m pytest tests/on_ipu --on_host     the same code against poptorch_host

Each test checks one assumption of this project that could not be tried without an IPU. The first
line of its docstring states the assumption. The suite ends with a table of all assumptions and
whether they were held, and with a JSON report. What a host cannot show is "not on a host" there.
"""
import gc
import platform
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
import transformers

from ipu_options import device, poptorch
from planner.text import table
from runtime.files import write_json
from tests.reference.small_demo import write_small_demo

HERE = Path(__file__).parent
IPUS = 4
HELD, NOT_HELD, NOT_ON_A_HOST = "held", "NOT HELD", "not on a host"
ROWS = []  # of the table: (assumption, verdict, what was seen)


def on_host():
    """Whether poptorch_host runs the suite."""
    return device == "host"


def why_skipped(config):
    """Return why this machine cannot run the suite, or None if it can."""
    if on_host():
        return None if config.getoption("on_host") else (
            "PopTorch is not installed; --on_host runs it against poptorch_host")
    if config.getoption("on_host"):
        raise pytest.UsageError(f"--on_host: this machine has PopTorch {poptorch.__version__}, "
                                "which would run; leave it out")
    if not poptorch.ipuHardwareIsAvailable(IPUS):
        return f"PopTorch finds no {IPUS} IPUs here (gc-info -l lists them)"
    return None


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if HERE in Path(item.fspath).parents]
    why = why_skipped(config) if ours else None
    for item in ours if why else ():
        item.add_marker(pytest.mark.skip(reason=why))
    if not config.getoption("calibrate"):
        items[:] = [item for item in items if item.name != "test_calibration"]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if why_skipped(item.config) or report.when == "teardown" and report.passed or (
            report.when == "setup" and report.passed):
        return
    which = f" [{item.callspec.id}]" if hasattr(item, "callspec") else ""
    verdict = HELD if report.passed else NOT_HELD
    seen = "; ".join(value for name, value in item.user_properties if name == "seen")
    if report.skipped:
        verdict, _, why = call.excinfo.value.msg.partition(": ")
        seen = "; ".join(filter(None, (why, seen)))
    elif report.failed:
        error = call.excinfo.value
        first = (str(error).strip().splitlines() or [""])[0]
        seen = "; ".join(filter(None, (f"{type(error).__name__}: {first}"[:200], seen)))
        free_ipus()
    ROWS.append((item.function.__doc__.splitlines()[0].rstrip(".") + which, verdict, seen))


def free_ipus():
    """Free the IPUs that a failed test still holds, so that the next test can have them."""
    for held in gc.get_objects():
        if isinstance(held, poptorch.PoplarExecutor) and held.isAttachedToDevice():
            held.detachFromDevice()


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        why = why_skipped(config)
        if why:
            terminalreporter.write_line(f"tests/on_ipu skipped: {why}")
        return
    device = "poptorch_host, no IPU" if on_host() else f"IPU Mk{poptorch.ipuHardwareVersion()}"
    path = Path(config.getoption("ipu_report"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": device,
        "versions": {"poptorch": poptorch.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "checks": [dict(zip(("assumption", "verdict", "seen"), row)) for row in ROWS]})
    counts = ", ".join(f"{sum(row[1] == verdict for row in ROWS)} {verdict}"
                       for verdict in (HELD, NOT_HELD, NOT_ON_A_HOST))
    terminalreporter.section(f"What this project assumes of an IPU, on {device}")
    terminalreporter.write_line(table(["assumption", "verdict", "seen"], ROWS, left=(0, 1, 2)))
    terminalreporter.write_line(f"{counts}; report: {path}")


@pytest.fixture
def seen(record_property):
    """Call it with a text to have the text in the table."""
    return lambda text: record_property("seen", text)


@pytest.fixture
def only_on_ipu():
    """Call it before what only an IPU can show: on a host, it ends the test with that verdict."""
    def check(why=""):
        if on_host():
            pytest.skip(f"{NOT_ON_A_HOST}: {why}")
    return check


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with the demo's model and a hundred of its questions."""
    folder = tmp_path_factory.mktemp("demo")
    write_small_demo(folder, train=20, validation=5)
    return folder
