"""Write down which operations and options PopTorch's compiler takes, read from the sources.

    python -m tests.tools.poptorch_compiler PATH_TO_POPTORCH PATH_TO_POPART

The paths are git checkouts of graphcore/poptorch and graphcore/popart. The names, which are all
that is kept, go to poptorch_host/compiler.json together with the commits:

handlers: {file: operations that it translates to PopART}, from the calls of registerHandler() in
    poptorch/source/popart_canonicalization. What has no handler is refused when a model is compiled
    (ErrorOnUnsupportedAten.cpp).
dispatcher: {operation with its overload: function}, from the kernels that PopTorch registers for
    IPU tensors (dispatch_tracer/RegisterOptionalAtenOps.cpp.inc). The function `fallback` passes
    the operation on to its handler, others treat it themselves. An operation that is not listed
    reaches its handler as well, unless PyTorch decomposes it first.
options: {type of the value: names}, from popart_compiler/source/SessionOptions.cpp.
enumerations: {option: [type, number of its members]}, likewise, and from PopART's headers.
patterns: the names of PopART's patterns, from willow/src/patterns.
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
OPTIONS = Path("popart_compiler/source/SessionOptions.cpp")
DATA = Path(__file__).resolve().parents[2] / "poptorch_host" / "compiler.json"
HANDLER = re.compile(r"registerHandler\(\s*(?:\w+::)*?(\w+)::(\w+),")
LIBRARY = re.compile(r"TORCH_LIBRARY_IMPL\((\w+), IPU, m\) \{(.*?)\n\}", re.DOTALL)
KERNEL = re.compile(r'm\.impl\(\s*"([\w.]+)",.*?\b(\w+)>?\(?\)+;', re.DOTALL)
SETTER = re.compile(r'registerSetter\(\s*(\w+)_options,\s*"([\w.]+)"')
NAMED_SETTER = re.compile(r'(\w+)_options\["([\w.]+)"\] =')
MACRO = re.compile(r"ADD_POPART_(\w+)_OPTION\(\s*([\w.]+)(?:,\s*(\w+))?\);")
PATTERN = re.compile(r'(?:PatternCreator|AddPatternName)<[^>]+>\s*\w+\(\s*"(\w+)"')


def operations(checkout: Path) -> dict:
    """Return `handlers` and `dispatcher` of the data file for a checkout of PopTorch."""
    handlers = {
        str(file.relative_to(checkout)): sorted(
            f"{domain}::{name}" for domain, name in HANDLER.findall(file.read_text()))
        for file in sorted((checkout / HANDLERS).rglob("*.cpp"))}
    dispatcher = {
        f"{domain}::{name}": function
        for domain, body in LIBRARY.findall((checkout / DISPATCHER).read_text())
        for name, function in KERNEL.findall(body)}
    return {"handlers": {file: names for file, names in handlers.items() if names},
            "dispatcher_file": str(DISPATCHER), "dispatcher": dispatcher}


def options(poptorch: Path, popart: Path) -> dict:
    """Return `options`, `enumerations` and `patterns`."""
    source = (poptorch / OPTIONS).read_text()
    names = {kind: set() for kind in ("bool", "uint64", "double", "string", "container")}
    for kind, name in SETTER.findall(source) + NAMED_SETTER.findall(source):
        names[kind].add(name)
    headers = "".join(path.read_text() for path in (popart / "willow/include").rglob("*.hpp"))
    enumerations = {}
    for kind, name, enumeration in MACRO.findall(source):
        names["uint64" if kind == "ENUM" else kind.lower()].add(name)
        if kind == "ENUM":
            body = re.search(rf"enum class {enumeration} \{{(.*?)\n\}};", headers, re.DOTALL)[1]
            members = re.findall(r"^\s*(\w+)(?: = \d+)?,?$", re.sub(r"//.*", "", re.sub(
                r"/\*.*?\*/", "", body, flags=re.DOTALL)), re.MULTILINE)
            enumerations[name] = [enumeration, members.index("N")]
    patterns = {"InPlace", "UpdateInplacePrioritiesForIpu"}.union(*(
        PATTERN.findall(path.read_text())
        for path in (popart / "willow/src/patterns").rglob("*.cpp")))
    return {"options": {kind: sorted(found) for kind, found in names.items()},
            "enumerations": enumerations, "patterns": sorted(patterns)}


def commit(checkout: Path) -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, stdout=subprocess.PIPE,
                          check=True, universal_newlines=True).stdout.strip()


def main(poptorch: str, popart: str) -> int:
    """Write the data file and print how many names it holds; returns the exit status."""
    poptorch, popart = Path(poptorch), Path(popart)
    version = json.loads((poptorch / "version.json").read_text())
    data = {
        "repositories": {f"https://github.com/graphcore/{path.name}": commit(path)
                         for path in (poptorch, popart)},
        "version": ".".join(version.values()), **operations(poptorch), **options(poptorch, popart)}
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    print(f"PopTorch {data['version']}: {sum(map(len, data['handlers'].values()))} handlers, "
          f"{len(data['dispatcher'])} kernels, {sum(map(len, data['options'].values()))} options, "
          f"{len(data['patterns'])} patterns -> {DATA}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
