"""Command-line flags from dataclasses: one flag for each field, checked by type and range.

A field is declared with `flag(default, help, ...)`. Its value may come from a flag, from a YAML
configuration or from a JSON file; `Settings.source` remembers which, so that a refusal names the
place that has to be corrected. There is no torch in here: `--help` and a refusal take a fraction of
a second. (transformers' HfArgumentParser would take two seconds to import.)
"""
from __future__ import annotations

import argparse
import difflib
import math
import re
from dataclasses import Field, dataclass, field, fields
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple, TypeVar

from ipu_options.errors import UsageError

S = TypeVar("S", bound="Settings")


@dataclass
class Settings:
    """Base of all groups of settings."""

    sources: Dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def source(self, name: str) -> str:
        """What to call the field `name` in a message: its flag, or the file that its value came
        from and the key there.
        """
        return self.sources.get(name, f"--{name}")

    def values(self) -> Dict[str, Any]:
        """All fields and their values, without their sources."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sources"}


class Layer(NamedTuple):
    """Values from one place. `origin` is the file they were read from, None for the command line.
    """

    values: Dict[str, Any]
    origin: Optional[str] = None


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    metadata: `min`, `max` (inclusive bounds), `above`, `below` (exclusive bounds), `choices`,
    `type` (where the default does not tell it), `nargs` ("+" for a list), `by_pod` (a dictionary by
    pod type may take the place of a value), `positional`.
    """
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses by raising UsageError with one line, and that accepts no
    abbreviated flags.
    """

    def __init__(self, program: str, description: str):
        super().__init__(
            program, description=description, allow_abbrev=False,
            argument_default=argparse.SUPPRESS, formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=42, width=120))
        # argparse's own pattern has no exponents, and would take -2e-5 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str):
        raise UsageError(message.replace("argument --", "--", 1).replace(": ", " ", 1))

    def parse_args(self, args=None, namespace=None):
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UsageError(
                f"{unknown[0]}: there is no such flag{did_you_mean(unknown[0], flags)}; --help lists them"
            )
        return given


def add_flags(parser: argparse.ArgumentParser, group: type) -> None:
    """Add a flag for each field of the dataclass `group`, under the first line of its docstring as
    a heading.

    A boolean flag takes an optional true or false; one that is true by default has a --no_ twin. No
    flag has a default in the parser, so that the result of parsing holds only what was given.
    """
    section = parser.add_argument_group((group.__doc__ or
                                         group.__name__).strip().splitlines()[0].rstrip("."))
    for f in fields(group):
        if "help" not in f.metadata:
            continue
        default, kind = _default_and_kind(f)
        shown = "" if default is None or isinstance(default,
                                                    dict) else f" (default: {_text(default)})"
        options = dict(help=f.metadata["help"].replace("%", "%%") + shown, type=_reader(kind))
        if f.metadata.get("positional"):
            section.add_argument(f.name, metavar=f.name.upper(), **options)
            continue
        if kind is bool:
            options.update(nargs="?", const=True, metavar="true|false")
        elif "choices" in f.metadata:
            options.update(metavar="|".join(map(str, f.metadata["choices"])))
        else:
            options.update(metavar={int: "N", float: "X"}.get(kind, "TEXT"),
                           nargs=f.metadata.get("nargs"))
        section.add_argument("--" + f.name, dest=f.name, **options)
        if default is True:
            section.add_argument("--no_" + f.name, dest=f.name, action="store_false",
                                 help=argparse.SUPPRESS)


def make_settings(group: Callable[..., S], layers: Iterable[Layer]) -> S:
    """An instance of the dataclass `group` from the values of `layers`, of which a later one takes
    precedence.

    Values that are not fields of `group` are ignored. Raises UsageError, naming the source, for a
    value that a field does not allow.
    """
    values, sources = {}, {}
    known = {f.name for f in fields(group)} - {"sources"}
    for layer in layers:
        for name in layer.values:
            if name not in known:
                continue
            values[name] = layer.values[name]
            sources[name] = f"--{name}" if layer.origin is None else f"{layer.origin}: {name}"
    for name, value in values.items():
        check_field(group, name, value, sources[name])
    return group(**values, sources=sources)


def check_field(group: type, name: str, value: Any, source: Optional[str] = None) -> None:
    """Raise UsageError unless `value` has the type, the range and the choices of the field `name`
    of `group`.

    source: what to call the field in the message; by default its flag.
    """
    f = next(f for f in fields(group) if f.name == name)
    if "help" not in f.metadata:
        return
    default, kind = _default_and_kind(f)
    source = source or f"--{name}"
    if value is None:
        if default is not None and "None" not in str(f.type) and "Optional" not in str(f.type):
            raise UsageError(f"{source} has no value: give {_article(kind)}")
        return
    if isinstance(value, dict):
        for by_pod in value.values():
            check_field(group, name, by_pod, source)
        return
    if f.metadata.get("nargs") == "+" and isinstance(value, list):
        if not value:
            raise UsageError(f"{source} is an empty list: give at least one value")
        for one in value:
            check_field(group, name, one, source)
        return
    choices = f.metadata.get("choices")
    if isinstance(value,
                  list):  # not printed: a few aliases of YAML write out to more than fits in memory
        raise UsageError(f"{source} is a list: it should be {_article(kind)}" +
                         (f", one of {', '.join(choices)}" if choices else ""))
    if choices and value not in choices:
        raise UsageError(f"{source} {value}: choose from {', '.join(map(str, choices))}")
    if not isinstance(value, kind) and not (kind is float and isinstance(value, int)) or (
            kind is not bool and isinstance(value, bool)):
        raise UsageError(f"{source} {value!r}: it should be {_article(kind)}")
    _check_range(f, value, source)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """" (did you mean X?)" for the nearest of the known words, or the empty text."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _check_range(f: Field, value: Any, source: str) -> None:
    low, high, above, below = (f.metadata.get(bound) for bound in ("min", "max", "above", "below"))
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{source} {value}: it should be a finite number")
    if low is not None and value < low or above is not None and value <= above:
        right = f"at least {low}" if low is not None else f"more than {above}"
        raise UsageError(f"{source} {value} is too small: it should be {right}")
    if high is not None and value > high or below is not None and value >= below:
        right = f"at most {high}" if high is not None else f"less than {below}"
        raise UsageError(f"{source} {value} is too large: it should be {right}")


def _default_and_kind(f: Field) -> Tuple[Any, type]:
    default = f.default_factory() if callable(f.default_factory) else f.default
    return default, f.metadata.get("type") or (str if default is None else type(default))


def _reader(kind: type) -> Callable[[str], Any]:
    """argparse's `type`: converts as `kind` does, with a refusal that says what would be right."""
    def read(text: str) -> Any:
        if kind is bool:
            if text.lower() in ("true", "yes", "1", "false", "no", "0"):
                return text.lower() in ("true", "yes", "1")
            raise argparse.ArgumentTypeError(f"{text}: it should be true or false")
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: it should be {_article(kind)}") from None
    return read


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
