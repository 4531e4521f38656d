"""Run PopTorch's own tests against poptorch_host.

    python -m tests.tools.poptorch_conformance PATH_TO_POPTORCH [--only FILE ...]

PATH_TO_POPTORCH is a checkout of graphcore/poptorch; FILE is a name like "batching" (default: all
of FILES). Each test file runs in a process of its own. Prints the failed tests with the reasons
that EXPLAINED gives, why how many tests are out of scope, a table by file, and how many of the
tests in scope pass. The exit status is 1 if one fails without a reason.

A test is out of scope if it uses a name of NOT_OFFERED, or looks at something that cannot exist on
a host (OUT_OF_SCOPE). The command needs what PopTorch's tests need: Python 3.8, torch 2.0.1 and,
for fine_tuning, torchvision (`pip install --no-deps torchvision==0.15.2 pillow`).
"""
from __future__ import annotations

import argparse
import collections
import importlib
import inspect
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import xml.etree.ElementTree
from pathlib import Path
from typing import List

import pytest

FILES = (
    "batching dataloader options optimizers outputs inputs replicated_graph custom_loss losses "
    "pipelining sharding precompilation requires_grad fine_tuning hooks buffers attach_detach "
    "attach_detach_wait_for_ipu ops half_float poplar_executor weights_writing").split()
EXCLUDED = "out of scope: "
TEST_SECONDS = 300  # a test that takes longer counts as failed

# (pattern in the source of a test, why such a test is out of scope)
OUT_OF_SCOPE = (
    (r"_debugGetPopartIR|getTensorNames", "reads PopART's graph"),
    (r"Graph before lowering|mode\(Pipelined\)|graph optimizer|MatMulPartialsType|"
     r"strides=\[1\]|\"lossScaling=2\"",
     "reads the graph or optimizer that PopTorch's compiled core logs "
     "when it makes them for PopART"),
    (r"poptorch\.Options (set|added)|set enableEngineCaching|user configuration: Ipu model|"
     r"IPU cycles: |Acquired 1 IPU",
     "reads what PopTorch's compiled core logs of its options, devices and executable cache"),
    (r"finalLossScale",
     "reads the loss scaling that a device chooses from the range of its float16 gradients"),
    (r"custom_op|customCodelets", "runs an operation compiled for an IPU"),
    (r"import pva|pva\.|profile\.pop", "reads the Poplar compiler's profile"),
    (r"saveInitializersToFile|\.onnx|export_proto", "reads a file that PopART writes"),
    (r"compileAndExport|loadExecutable|poptorch\.load\(|test_precompile_then_load",
     "keeps an executable compiled for an IPU in a file"),
    (r"Failed to acquire|waitForIpu|wait_for_ipu",
     "waits for an IPU that another process holds"),
    (r"_accessor\._worker|_data_buffers|_restoreWrapperIfNecessary",
     "looks into private parts of PopTorch"),
    (r'"test_broken_dataset"', "runs a test that uses AsynchronousDataAccessor"),
    (r"\.replicaGrouping\(", "uses Parameter.replicaGrouping"),
    (r"module_repr|BeginBlock\(user_id", "prints a model with its blocks"),
)

# {pattern of a test's name: why it fails}
EXPLAINED = {
    r"optimizers::test_read_ipu_state\[optim:SGD\]":
        "PopART stores SGD's learning rate and weight decay multiplied together; here ipu_param "
        "has them as they are",
    r"half_float::test_distributions":
        "torch.distributions reads constants, which a host cannot tell from a device's tensors"}

SHIM = "import poptorch_conformance; poptorch_conformance.install()"

# ---- What runs in the process of a test file and in those that it starts

used: List[str] = []  # names that are not offered, of the running test
collecting = True


class LeftOut:
    """Stands for a name that is not offered while a test file is imported; its use comes later."""

    def __init__(self, *args):  # with more arguments where a class is derived from it
        self.path = args[0]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return LeftOut(f"{self.path}.{name}")

    def __iter__(self):
        return iter([self])

    def __call__(self, *args, **kwargs):
        if not collecting:
            used.append(self.path)
            raise AssertionError(f"{self.path} is not offered")
        return self

    def __instancecheck__(self, instance):
        self()


def install():
    """Make poptorch_host the module `poptorch`, with what else PopTorch's tests look for in it."""
    import poptorch_host
    from poptorch_host import _checks, blocks, enums, optim, options

    for module in pkgutil.iter_modules(poptorch_host.__path__):
        sys.modules["poptorch." + module.name] = importlib.import_module(
            "poptorch_host." + module.name)
    sys.modules["poptorch"] = poptorch_host
    # Their helpers.py asks this to decide on which device it creates tensors.
    poptorch_host._impl = types.SimpleNamespace(isDispatchTracing=lambda: False)
    ours = poptorch_host.Options().outputMode(poptorch_host.OutputMode.All).toDict()
    core = types.ModuleType("poptorch.poptorch_core")
    core.__dict__.update(
        Error=poptorch_host.Error,
        isCompilingWithDispatcher=lambda: blocks.recorder is not None,
        _validateOptions=lambda values: _checks.popart_options(
            {name: value for name, value in values.items() if name not in ours}))
    poptorch_host.poptorch_core = sys.modules["poptorch.poptorch_core"] = core
    # With this the tests marked ipuHardwareRequired run too.
    poptorch_host.ipuHardwareVersion = lambda: 2
    poptorch_host.ipuHardwareIsAvailable = lambda num_ipus=1: True

    def stand_in(path, module):
        def get(name):
            if path + name not in poptorch_host.NOT_OFFERED:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return LeftOut(path + name)
        return get

    for module, path in ((poptorch_host, ""), (enums, ""), (optim, "optim."), (options, "")):
        module.__getattr__ = stand_in(path, module)
    construct = poptorch_host.NotOffered.__init__

    def noticed(self, name, reason):
        used.append(name)
        construct(self, name, reason)

    poptorch_host.NotOffered.__init__ = noticed


def pytest_collection_modifyitems(items):
    """Skip the tests that look at something which cannot exist on a host."""
    global collecting
    collecting = False
    for item in items:
        source = "".join(inspect.getsourcelines(item.function)[0])  # including decorators
        reason = next((why for pattern, why in OUT_OF_SCOPE if re.search(pattern, source)), None)
        if reason:
            item.add_marker(pytest.mark.skip(reason=EXCLUDED + reason))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """End a test that hangs."""
    def too_long(number, frame):
        raise TimeoutError(f"{item.name} took longer than {TEST_SECONDS} seconds")

    used.clear()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(TEST_SECONDS)
    yield
    signal.alarm(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Report a test that has used a name which is not offered as skipped."""
    report = (yield).get_result()
    names = used or re.findall(r"poptorch\.(\S+) is not offered by", str(report.longrepr or ""))
    if call.when == "call" and names:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"{EXCLUDED}uses {names[0]}")


# ---- The command


def run(checkout: Path, name: str, folder: Path) -> dict:
    """Run one test file; returns {(outcome, reason): [test names]}."""
    report = folder / f"{name}.xml"
    ours = [str(folder), str(Path(__file__).resolve().parents[2]),
            str(Path(__file__).resolve().parent)]
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "poptorch_conformance", f"--junitxml={report}",
        f"--rootdir={folder}", "-p", "no:cacheprovider",
        str(checkout / "tests" / f"{name}_test.py")]
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join([*ours, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if not report.exists():
        raise SystemExit(f"{name}: pytest did not run\n{done.stdout}")
    outcomes = collections.defaultdict(list)
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        result = next((child for child in case if child.tag in ("failure", "error", "skipped")),
                      None)
        outcome = {"failure": "failed", "error": "failed"}.get(
            result.tag, result.tag) if result is not None else "passed"
        outcomes[outcome, "" if result is None else result.get("message", "")].append(
            case.get("name"))
    return outcomes


def main() -> int:
    """Run all test files and print the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="PATH_TO_POPTORCH", type=Path)
    parser.add_argument("--only", metavar="FILE", nargs="+", default=FILES)
    arguments = parser.parse_args()
    total, reasons, failures, table = collections.Counter(), collections.Counter(), [], []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "poptorch").mkdir()
        (Path(folder) / "poptorch" / "__init__.py").write_text(SHIM)
        for name in arguments.only:
            began, count = time.monotonic(), collections.Counter()
            for (outcome, message), tests in run(arguments.checkout.resolve(), name,
                                                 Path(folder)).items():
                count[outcome] += len(tests)
                if outcome == "skipped":
                    ours = message.startswith(EXCLUDED)
                    reasons[message[len(EXCLUDED):]
                            if ours else f"skipped by PopTorch itself: {message}"] += len(tests)
                elif outcome == "failed":
                    failures += [(f"{name}::{test}", message) for test in tests]
            table.append((name, count, time.monotonic() - began))
            print(f"{name}: {dict(count)}", file=sys.stderr, flush=True)
            total.update(count)
    unexplained = 0
    print("failed:")
    for name, message in failures:
        why = next((why for pattern, why in EXPLAINED.items() if re.search(pattern, name)), None)
        unexplained += why is None
        print(f"  {name}: {why or (message.splitlines() or [''])[0][:150]}")
    print("\nout of scope:")
    for reason, number in reasons.most_common():
        print(f"  {number:>4}  {reason}")
    print(f"\n{'file':<28}{'passed':>8}{'failed':>8}{'out of scope':>14}{'seconds':>9}")
    for name, count, seconds in [*table, ("total", total, time.monotonic() - begin)]:
        print(f"{name:<28}{count['passed']:>8}{count['failed']:>8}"
              f"{count['skipped']:>14}{seconds:>9.0f}")
    print(f"\n{total['passed']} of {total['passed'] + total['failed']} tests that use offered "
          f"names only pass; {len(failures) - unexplained} fail for a reason that is known, "
          f"{unexplained} without one; {total['skipped']} are out of scope")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
