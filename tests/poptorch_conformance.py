"""PopTorch's own tests, run against poptorch_host:  python tests/poptorch_conformance.py PATH_TO_POPTORCH [FILE ...]

PATH_TO_POPTORCH is a checkout of graphcore/poptorch; FILE a name like "batching" (default: FILES). Prints passed, failed and
out of scope for each file, the failed tests, and how many tests each reason excludes. Exit status 1 if fewer than 90 % of the
tests in scope pass. A test is out of scope if it looks at something that cannot exist on a host: see OUT_OF_SCOPE.
"""
from __future__ import annotations

import collections
import inspect
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

import pytest

FILES = ("batching dataloader options optimizers outputs inputs replicated_graph custom_loss losses pipelining sharding precompilation "
         "requires_grad fine_tuning hooks buffers attach_detach attach_detach_wait_for_ipu ops half_float poplar_executor "
         "weights_writing").split()

# (what the test's source says, why it is out of scope)
OUT_OF_SCOPE = (
    (r"_debugGetPopartIR|getTensorNames", "reads PopART's graph"),
    (r"overridePoptorchLogLevel|overridePopartLogLevel|caplog|POPTORCH_LOG_LEVEL", "reads PopART's log"),
    (r"anchorTensor|anchored_tensors\b.*getAnchored", "names tensors of PopART's graph"),
    (r"custom_op|customCodelets", "runs an operation compiled for an IPU"),
    (r"torchvision|imagenet_model", "needs torchvision and its pretrained weights"),
    (r"import pva|pva\.|profile\.pop", "reads the Poplar compiler's profile"),
    (r"saveInitializersToFile|\.onnx|export_proto", "reads a file that PopART writes"),
    (r"Failed to acquire|waitForIpu|wait_for_ipu", "waits for an IPU that another process holds"),
    (r"_accessor\._worker|_data_buffers", "looks into the private state of PopTorch's worker process"),
    (r"def test_get_compilation_time", "expects a compilation to take longer than a second"),
    (r"cycleCount\(\) > 0", "counts IPU cycles"),
    (r"CommGroupType|replicaGrouping", "gives replicas weights of their own, which PopTorch keeps on the devices alone"),
)

SHIM = """
import importlib, pkgutil, sys, types
import poptorch_host
for module in pkgutil.iter_modules(poptorch_host.__path__):
    if module.name != "__main__":
        sys.modules["poptorch." + module.name] = importlib.import_module("poptorch_host." + module.name)
poptorch_host._impl = types.SimpleNamespace(isDispatchTracing=lambda: False)  # helpers.py asks on which device to make tensors
poptorch_host.ipuHardwareVersion = lambda: 2
poptorch_host.ipuHardwareIsAvailable = lambda num_ipus=1: True  # so that the tests marked ipuHardwareRequired run too
sys.modules["poptorch"] = poptorch_host
"""


def pytest_collection_modifyitems(items):
    """In the pytest process: skip what is out of scope."""
    for item in items:
        source = "".join(inspect.getsourcelines(item.function)[0])  # with its decorators
        reason = next((why for pattern, why in OUT_OF_SCOPE if re.search(pattern, source)), None)
        if reason:
            item.add_marker(pytest.mark.skip(reason="out of scope: " + reason))


def run(checkout: Path, name: str, folder: Path) -> dict:
    """{(outcome, reason): [test names]} of one test file."""
    report = folder / f"{name}.xml"
    paths = os.pathsep.join([str(folder), str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "poptorch_conformance", f"--junitxml={report}", f"--rootdir={folder}",
               "-p", "no:cacheprovider", str(checkout / "tests" / f"{name}_test.py")]
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
           "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not report.exists():
        raise SystemExit(f"{name}: pytest did not run\n{done.stdout}")
    outcomes = collections.defaultdict(list)
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        result = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if result is None else result.tag
        outcomes[outcome, "" if result is None else result.get("message", "")].append(case.get("name"))
    return outcomes


def main(checkout: str, *names: str) -> int:
    """Run and report; returns the exit status."""
    passed = failed = 0
    reasons, failures = collections.Counter(), []
    print(f"{'file':<28}{'passed':>8}{'failed':>8}{'out of scope':>14}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "poptorch").mkdir()
        (Path(folder) / "poptorch" / "__init__.py").write_text(SHIM)
        for name in names or FILES:
            outcomes = run(Path(checkout).resolve(), name, Path(folder))
            count = collections.Counter()
            for (outcome, message), tests in outcomes.items():
                count[outcome] += len(tests)
                if outcome == "skipped":
                    reasons[message.replace("out of scope: ", "")] += len(tests)
                elif outcome != "passed":
                    failures += [(name, test, message) for test in tests]
            bad = count["failure"] + count["error"]
            passed, failed = passed + count["passed"], failed + bad
            print(f"{name:<28}{count['passed']:>8}{bad:>8}{count['skipped']:>14}", flush=True)
    print(f"\n{passed} of {passed + failed} tests in scope pass ({100 * passed / max(1, passed + failed):.1f} %)\n\nfailed:")
    for name, test, message in failures:
        print(f"  {name}::{test}: {message.splitlines()[0][:150] if message else ''}")
    print("\nout of scope:")
    for reason, number in reasons.most_common():
        print(f"  {number:>4}  {reason}")
    return 0 if passed >= 0.9 * (passed + failed) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
