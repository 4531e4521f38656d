"""Write down which operations PopTorch handles, read from its sources.

    python -m tests.tools.poptorch_operations PATH_TO_POPTORCH

PATH_TO_POPTORCH is a git checkout of graphcore/poptorch. The names, which are all that is kept, go
to tests/model/poptorch_operations.json together with the files they were found in and the commit:

handlers: {file: operations that it translates to PopART}, from the calls of registerHandler() in
    poptorch/source/popart_canonicalization. What has no handler is refused when a model is compiled
    (ErrorOnUnsupportedAten.cpp).
dispatcher: {operation with its overload: function}, from the kernels that PopTorch registers for
    IPU tensors (dispatch_tracer/RegisterOptionalAtenOps.cpp.inc). The function `fallback` passes
    the operation on to its handler, others treat it themselves. An operation that is not listed
    reaches its handler as well, unless PyTorch decomposes it first.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path("poptorch/source")
HANDLERS = SOURCE / "popart_canonicalization"
DISPATCHER = SOURCE / "dispatch_tracer" / "RegisterOptionalAtenOps.cpp.inc"
DATA = Path(__file__).resolve().parents[1] / "model" / "poptorch_operations.json"
HANDLER = re.compile(r"registerHandler\(\s*(?:\w+::)*?(\w+)::(\w+),")
LIBRARY = re.compile(r"TORCH_LIBRARY_IMPL\((\w+), IPU, m\) \{(.*?)\n\}", re.DOTALL)
KERNEL = re.compile(r'm\.impl\(\s*"([\w.]+)",.*?\b(\w+)>?\(?\)+;', re.DOTALL)


def operations(checkout: Path) -> dict:
    """Return the contents of the data file for a checkout."""
    handlers = {
        str(file.relative_to(checkout)): sorted(
            f"{domain}::{name}" for domain, name in HANDLER.findall(file.read_text()))
        for file in sorted((checkout / HANDLERS).rglob("*.cpp"))}
    dispatcher = {
        f"{domain}::{name}": function
        for domain, body in LIBRARY.findall((checkout / DISPATCHER).read_text())
        for name, function in KERNEL.findall(body)}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, stdout=subprocess.PIPE,
                            check=True, text=True).stdout.strip()
    version = json.loads((checkout / "version.json").read_text())
    return {
        "repository": "https://github.com/graphcore/poptorch", "commit": commit,
        "version": ".".join(version.values()),
        "handlers": {file: names for file, names in handlers.items() if names},
        "dispatcher_file": str(DISPATCHER), "dispatcher": dispatcher}


def main(checkout: str) -> int:
    """Write the data file and print how many names it holds; returns the exit status."""
    found = operations(Path(checkout))
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    print(f"PopTorch {found['version']}: {sum(map(len, found['handlers'].values()))} handlers, "
          f"{len(found['dispatcher'])} kernels -> {DATA}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
