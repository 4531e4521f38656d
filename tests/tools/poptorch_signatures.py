"""Compare poptorch_host's public names and signatures with PopTorch's source.

    python -m tests.tools.poptorch_signatures PATH_TO_POPTORCH

PATH_TO_POPTORCH is a checkout of graphcore/poptorch, of which nothing is run. The names, order,
kinds and defaults of parameters have to agree. Prints every difference with the reason for it, and
exits with status 1 if a difference has no reason.
"""
from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Dict, Iterator, Tuple

import poptorch_host
from poptorch_host._poplar_executor import NOT_OFFERED_METHODS

FILES = ("__init__", "enums", "ops", "options", "optim", "profiling", "_poplar_executor", "_impl")
PRIVATE_CLASSES = ("_DistributedOptions", "_JitOptions", "_PopartOptions", "_PrecisionOptions",
                   "_TensorLocationOptions", "_TrainingOptions")
NOT_EXPORTED = {
    "poptorchAtExit", "OptimizerWrapper", "NameScopeHook", "WeakPtr", "WeakKeyPtrDict",
    "NoExecutable"}

# The intended differences: {name: reason}
REASONS = {
    "registerGeometricCustomArgParsers":
        "registers PyTorch Geometric's types when poptorch_geometric is installed",
    "ConfigFileError":
        "what Options.loadFromFile raises, which runs code from a file and is not offered",
    **{f"PoplarExecutor.{name}": why for name, why in NOT_OFFERED_METHODS.items()}, }


def public_signatures(path: Path) -> Iterator[Tuple[str, ast.FunctionDef]]:
    """Yield (name, definition) of what is public in a source file.

    These are functions, classes (without a definition), and, as Class.name, constructors and
    methods.
    """
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and (
                not node.name.startswith("_") or node.name in PRIVATE_CLASSES):
            yield node.name, None
            for item in node.body:
                setter = any(
                    getattr(d, "attr", "") == "setter" for d in getattr(item, "decorator_list", []))
                if isinstance(item, ast.FunctionDef) and not setter and (
                        item.name == "__init__" or not item.name.startswith("_")):
                    yield f"{node.name}.{item.name}", item


def parameters_of(node: ast.FunctionDef) -> list:
    """[(name with a prefix for its kind, dump of its default or None)] of a definition."""
    args = node.args
    plain = [a.arg for a in args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + [ast.dump(d) for d in args.defaults]
    out = list(zip(plain, defaults))
    out += [("*" + args.vararg.arg, None)] if args.vararg else []
    out += [("=" + a.arg, ast.dump(d) if d else None)
            for a, d in zip(args.kwonlyargs, args.kw_defaults)]
    return out + ([("**" + args.kwarg.arg, None)] if args.kwarg else [])


def our_definition(name: str):
    """poptorch_host's object called `name` and its definition; (None, None) if it does not exist.

    The definition alone is None where Python code for it is not available.
    """
    owner, _, method = name.rpartition(".")
    for place in (poptorch_host, poptorch_host.options, poptorch_host.optim,
                  poptorch_host.profiling, poptorch_host.ops):
        found = getattr(place, owner or method, None)
        if found is not None:
            break
    if found is not None and owner:
        found = getattr(found, method, None)
    if found is None:
        return None, None
    found = found.fget if isinstance(found, property) else found
    if inspect.isclass(found) or not hasattr(found, "__code__"):
        return found, None
    return found, ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]


def normal(parameters: list) -> list:
    """The same parameters, with equivalent defaults written in the same way."""
    return [(name, default and default.replace("enums", "").replace("poptorch", ""))
            for name, default in parameters]


def differences(checkout: Path) -> Dict[str, str]:
    """{name: difference} between the checkout's public interface and ours."""
    found = {}
    for file in FILES:
        for name, definition in public_signatures(checkout / "python" / f"{file}.py"):
            if name.split(".")[0] in NOT_EXPORTED or file == "_impl" and name not in (
                    "isRunningOnIpu", ):
                continue
            owner = name.split(".")[0]
            if owner in poptorch_host.NOT_OFFERED:
                found[owner] = "not offered: " + poptorch_host.NOT_OFFERED[owner]
                continue
            ours, node = our_definition(name)
            if ours is None:
                found[name] = "missing"
            elif definition is not None and node is not None:
                theirs = normal(parameters_of(definition))
                if normal(parameters_of(node)) != theirs:
                    found[name] = f"{normal(parameters_of(node))} instead of {theirs}"
    return found


def main(checkout: str) -> int:
    """Compare, print the differences and return the exit status."""
    unexplained = 0
    for name, difference in sorted(differences(Path(checkout)).items()):
        reason = REASONS.get(name) or (difference if difference.startswith("not offered") else "")
        unexplained += not reason
        print(f"{name}: {reason or 'NO REASON GIVEN: ' + difference}")
    print(f"{unexplained} differences without a reason")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
