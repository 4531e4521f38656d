"""Format answers as infer.py prints them."""
from __future__ import annotations

import codecs
import sys
from contextlib import suppress
from typing import Any, Dict

from qa.answers.confidence import judgement


def as_text(answer: Dict[str, Any]) -> str:
    """Return an answer of `Answerer.ask` as a line, with the n-best list below it if it is one."""
    def line(text, score, start, end, more=""):
        where = f", characters {start}-{end}" if text else ""
        return f"{text or '(no answer)'}   (score {score:.3f}{where}{more and ', ' + more})"

    lines = [line(answer["answer"], answer["score"], answer["start"], answer["end"],
                  judgement(answer))]
    if len(answer["nbest"]) > 1:
        lines += [
            f"  {rank}. {line(entry['text'], entry['probability'], entry['start'], entry['end'])}"
            for rank, entry in enumerate(answer["nbest"], 1)]
    return "\n".join(lines)


class Console:
    """Lines that are typed, pasted or piped in. Both methods raise EOFError at the end."""

    def __init__(self) -> None:
        with suppress(AttributeError):
            # The C locale knows ASCII alone; text is UTF-8 there, too. Line ends stay as they are.
            ascii_only = codecs.lookup(sys.stdin.encoding or "utf-8").name == "ascii"
            sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="replace",
                                  newline="")
        if sys.stdin.isatty():
            with suppress(ImportError):
                # Line editing, and lines of more than the 4,095 characters of a bare terminal.
                import readline  # noqa: F401  (input() uses it from now on)

    def line(self, prompt: str) -> str:
        """Return the next line without the white space around it."""
        return self._read(prompt).strip()

    def paragraph(self, prompt: str) -> str:
        """Return the lines up to an empty one, or to the end of the input, as one text."""
        lines = [self._read(prompt)]
        with suppress(EOFError):
            while lines[-1].strip():
                lines.append(self._read(""))
        return "".join(lines).rstrip()

    def _read(self, prompt: str) -> str:
        if sys.stdin.isatty():
            return input(prompt) + "\n"
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.lstrip("\ufeff")  # a byte order mark is no part of a text
