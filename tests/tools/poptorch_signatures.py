"""Compare poptorch_host's public names and signatures with PopTorch's source.

    python -m tests.tools.poptorch_signatures PATH_TO_POPTORCH

PATH_TO_POPTORCH is a checkout of graphcore/poptorch, of which nothing is run. The names, order,
kinds and defaults of parameters have to agree. Prints every name that is left out or differs, and
exits with status 1 if one is neither offered nor in NOT_OFFERED, or differs.
"""
from __future__ import annotations

import ast
import inspect
import sys
from functools import reduce
from pathlib import Path
from typing import Any, Iterator, Tuple

import poptorch_host

FILES = ("__init__", "enums", "ops", "options", "optim", "profiling", "_poplar_executor", "_impl")
# Names of the interface for the private classes of options
PARTS = {"_DistributedOptions": "Options.Distributed", "_JitOptions": "Options.Jit",
         "_PopartOptions": "Options._Popart", "_PrecisionOptions": "Options.Precision",
         "_TrainingOptions": "Options.Training",
         "_TensorLocationOptions": "Options.TensorLocations"}
NOT_EXPORTED = {"poptorchAtExit", "OptimizerWrapper", "NameScopeHook", "WeakPtr", "WeakKeyPtrDict",
                "NoExecutable"}


def public_definitions(checkout: Path) -> Iterator[Tuple[str, str, Any]]:
    """Yield (file, name, definition) of functions, classes (without it) and Class.method."""
    for file in FILES:
        for node in ast.parse((checkout / "python" / f"{file}.py").read_text()).body:
            name = getattr(node, "name", "_")
            if name in NOT_EXPORTED or file == "_impl" and name != "isRunningOnIpu":
                continue
            if isinstance(node, ast.FunctionDef) and not name.startswith("_"):
                yield file, name, node
            elif isinstance(node, ast.ClassDef) and (not name.startswith("_") or name in PARTS):
                yield file, name, None
                for item in node.body:
                    setter = any(getattr(d, "attr", "") == "setter"
                                 for d in getattr(item, "decorator_list", []))
                    if isinstance(item, ast.FunctionDef) and not setter and (
                            item.name == "__init__" or not item.name.startswith("_")):
                        yield file, f"{name}.{item.name}", item


def parameters_in_source(node: ast.FunctionDef) -> list:
    """[(name with a prefix for its kind, its default or "required")] of a definition."""
    args = node.args
    defaults = ["required"] * (len(args.args) - len(args.defaults)) + [
        value_of(d) for d in args.defaults]
    out = [(a.arg, default) for a, default in zip(args.args, defaults)]
    out += [("*" + args.vararg.arg, "required")] if args.vararg else []
    out += [("=" + a.arg, value_of(d) if d else "required")
            for a, d in zip(args.kwonlyargs, args.kw_defaults)]
    return out + ([("**" + args.kwarg.arg, "required")] if args.kwarg else [])


def value_of(node: ast.expr) -> Any:
    """The value of a default: a literal, or a member of an enumeration."""
    if not isinstance(node, ast.Attribute):
        return ast.literal_eval(node)
    enumeration = getattr(node.value, "attr", None) or node.value.id
    return getattr(getattr(poptorch_host.enums, enumeration), node.attr)


def our_parameters(function: Any) -> list:
    """The same of a function of ours."""
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.KEYWORD_ONLY: "=",
             inspect.Parameter.VAR_KEYWORD: "**"}
    return [(kinds.get(p.kind, "") + p.name, "required" if p.default is p.empty else p.default)
            for p in inspect.signature(function).parameters.values()]


def difference(file: str, name: str, node: Any) -> str:
    """Why a name of PopTorch is left out, or how ours differs; "" if it is the same."""
    owner, _, method = name.partition(".")
    path = PARTS.get(owner, "optim." * (file == "optim") + owner) + "." * bool(method) + method
    for known in (path, path.rpartition(".")[0], method and owner):
        if known in poptorch_host.NOT_OFFERED:
            return "not offered: " + poptorch_host.NOT_OFFERED[known]
    for module in (poptorch_host, poptorch_host.options, poptorch_host.optim,
                   poptorch_host.profiling):
        try:
            ours = reduce(getattr, filter(None, (owner, method)), module)
            break
        except AttributeError:
            continue
    else:
        return "MISSING"
    ours = ours.fget if isinstance(ours, property) else ours
    if node is None or not hasattr(ours, "__code__") or isinstance(ours, type):
        return ""
    theirs, own = parameters_in_source(node), our_parameters(ours)
    return "" if theirs == own else f"DIFFERENT: {own} instead of {theirs}"


def main(checkout: str) -> int:
    """Compare, print the differences and return the exit status."""
    wrong = 0
    for file, name, node in public_definitions(Path(checkout)):
        text = difference(file, name, node)
        wrong += text[:1].isupper()
        if text:
            print(f"{name}: {text}")
    print(f"{wrong} missing or different")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
