"""Command-line flags from dataclasses: one flag for each field, checked by type and range.

A field is declared with `flag(default, help, ...)`. Its value may come from the command line, a
YAML configuration or a JSON file; `Settings.source` says which, for error messages.
"""
from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Sequence, TypeVar

from runtime.errors import UsageError

S = TypeVar("S", bound="Settings")
# Keys of a dictionary that stands for a value: what the published ipu_config.json files use.
PODS = ("pod4", "pod8", "pod16", "pod32", "pod64", "pod128", "pod256", "default")
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass
class Settings:
    """Base class of all groups of settings."""

    # {name of a field that is not left at its default: what to call it in an error message}
    sources: Dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def source(self, name: str) -> str:
        """Return what to call a field in an error message: its flag, or a file and a key."""
        return self.sources.get(name, f"--{name}")

    def named(self, name: str) -> str:
        """Return a field's source and value, as in "--layers_per_ipu 0 4 4 4"."""
        value = getattr(self, name)
        value = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        return f"{self.source(name)} {value}"

    def values(self) -> Dict[str, Any]:
        """Return all fields and their values as a dictionary, without `sources`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sources"}


class Source(NamedTuple):
    """The values that one source of settings gives: a file, or the command line (name None)."""

    values: Dict[str, Any]
    name: Optional[str] = None


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field that is also a command-line flag.

    metadata: `min` and `max` (inclusive bounds), `above` and `below` (exclusive ones), `choices`,
    `type` (where the default does not show it), `nargs` ("+" for a list), `positional`, `by_pod` (a
    dictionary by pod type may stand for the value), `aliases` (names that --help does not show).
    """
    metadata.update(help=help, default=default)
    metadata.setdefault("type", str if default is None else type(default))
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError with a one-line message instead of exiting.

    It accepts dashes for underscores, and its result holds only flags of the command line. hints:
    {what does the work here: flags of other programs, without dashes}.
    """

    def __init__(self, program: str, description: str,
                 hints: Optional[Dict[str, Sequence[str]]] = None):
        super().__init__(
            program, description=description, allow_abbrev=False,
            argument_default=argparse.SUPPRESS, formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=42, width=120))
        self._hints = hints or {}
        # argparse's own pattern knows no exponents and takes -2e-5 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str):
        raise UsageError(message.replace("argument --", "--", 1).replace(": ", " ", 1))

    def parse_args(self, args=None, namespace=None):
        """Parse `args` (default: sys.argv[1:]); raises UsageError, also for unknown flags."""
        args = [_with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0].lstrip("-")
            for hint, names in self._hints.items():
                if name in names:
                    raise UsageError(f"{unknown[0]}: {hint}")
            flags = [option for action in self._actions for option in action.option_strings
                     if action.help != argparse.SUPPRESS]
            raise UsageError(
                f"{unknown[0]}: there is no such flag{did_you_mean(unknown[0], flags)}; "
                "--help lists them")
        return parsed


def add_flags(parser: argparse.ArgumentParser, group: type, without: Sequence[str] = ()) -> None:
    """Add flags for the fields of a dataclass, under its docstring as their heading in --help."""
    section = parser.add_argument_group(
        (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip("."))
    for f in fields(group):
        if "help" not in f.metadata or f.name in without:
            continue
        default, kind = f.metadata["default"], f.metadata["type"]
        text = " ".join(map(str, default)) if isinstance(default, list) else default
        shown = "" if default is None or isinstance(default, dict) else f" (default: {text})"
        options = dict(help=f.metadata["help"].replace("%", "%%") + shown, type=_reader(kind))
        if f.metadata.get("positional"):
            section.add_argument(f.name, metavar=f.name.upper(), **options)
            continue
        if kind is bool:
            options.update(nargs="?", const=True, metavar="true|false")
        else:
            letter = {int: "N", float: "X"}.get(kind, "TEXT")
            options.update(nargs=f.metadata.get("nargs"),
                           metavar="|".join(map(str, f.metadata.get("choices", [letter]))))
        section.add_argument("--" + f.name, dest=f.name, **options)
        for alias in f.metadata.get("aliases", ()):
            section.add_argument("--" + alias, dest=f.name,
                                 **{**options, "help": argparse.SUPPRESS})
        if default is True:
            section.add_argument("--no_" + f.name, dest=f.name, action="store_false",
                                 help=argparse.SUPPRESS)


def make_settings(group: Callable[..., S], sources: Iterable[Source]) -> S:
    """Return an instance of `group` with its values of `sources`; later ones win."""
    values, source_of = {}, {}
    declared = {f.name: f for f in fields(group) if f.name != "sources"}
    for source in sources:
        for name in source.values:
            if name in declared:
                values[name] = source.values[name]
                source_of[name] = f"--{name}" if source.name is None else f"{source.name}: {name}"
    for name, value in values.items():
        if "help" in declared[name].metadata:
            values[name] = _as_declared(declared[name], value)
            check_value(declared[name], values[name], source_of[name])
    return group(**values, sources=source_of)


def check_value(f: Field, value: Any, source: str) -> None:
    """Raise UsageError, which calls the flag `source`, unless its field `f` allows `value`."""
    right = _WORDS[f.metadata["type"]]
    if value is None:
        if "None" not in str(f.type) and "Optional" not in str(f.type):
            raise UsageError(f"{source} has no value: give {right}")
    elif isinstance(value, dict):
        if not value or not f.metadata.get("by_pod"):
            raise UsageError(f"{source} is a dictionary: it should be {right}")
        for pod, pod_value in value.items():
            if pod not in PODS or pod_value is None or isinstance(pod_value, dict):
                raise UsageError(f"{source}: a dictionary should give {right} for each of "
                                 f"{', '.join(PODS)}; {_shown(pod)} is {_shown(pod_value)}")
            check_value(f, pod_value, source)
    elif isinstance(value, list) and f.metadata.get("nargs") == "+":
        if not value:
            raise UsageError(f"{source} is an empty list: give at least one value")
        for element in value:
            if isinstance(element, (list, dict)) or element is None:
                raise UsageError(f"{source} holds {_shown(element)}: each should be {right}")
            check_value(f, element, source)
    else:
        _check_one(f, value, source)


def _check_one(f: Field, value: Any, source: str) -> None:
    kind, choices = f.metadata["type"], f.metadata.get("choices")
    if isinstance(value, list):
        # Its content is not printed: a few YAML aliases can expand to more than fits in memory.
        raise UsageError(f"{source} is a list: it should be {_WORDS[kind]}" +
                         (f", one of {', '.join(choices)}" if choices else ""))
    if choices and value not in choices:
        raise UsageError(f"{source} {_shown(value)}: choose from {', '.join(map(str, choices))}")
    if not isinstance(value, kind) and not (kind is float and isinstance(value, int)) or (
            kind is not bool and isinstance(value, bool)):
        shown = repr(value) if isinstance(value, str) and len(value) < 80 else _shown(value)
        raise UsageError(f"{source} {shown}: it should be {_WORDS[kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{source} {value}: it should be a finite number")
    low, high, above, below = (f.metadata.get(bound) for bound in ("min", "max", "above", "below"))
    if low is not None and value < low or above is not None and value <= above:
        right = f"at least {low}" if low is not None else f"more than {above}"
        raise UsageError(f"{source} {_shown(value)} is too small: it should be {right}")
    if high is not None and value > high or below is not None and value >= below:
        right = f"at most {high}" if high is not None else f"less than {below}"
        raise UsageError(f"{source} {_shown(value)} is too large: it should be {right}")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return " (did you mean X?)" with the known word most similar to `word`; "" if none is."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _as_declared(f: Field, value: Any) -> Any:
    # YAML 1.1 reads 1e-5 as text, and published files have one number for a list.
    if isinstance(value, str) and f.metadata["type"] is float:
        with suppress(ValueError):
            return float(value)
    one = isinstance(value, (int, str)) and re.fullmatch(r"(Optional\[)?List.*", str(f.type))
    return [value] if one else value


def _shown(value: Any) -> str:
    """Return a value as a message shows it: nothing can make the message long."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > 10 ** 30:
        return "a number of more than 30 digits"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _reader(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return _BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text}: it should be {_WORDS[kind]}") from None
    return read
