"""Figures that programs print at their end, a name and a number on each line."""

from __future__ import annotations

import math
import re
from typing import ClassVar

from dspark_lab.records.record import Tally

# A figure that is not known, laid out as the others are, so that no text is taken for a name; other
# figures, headings of further ones, and lines between them; and the line below them all.
_OTHER = re.compile(
    r"([A-Za-z][\w ()%/.-]*(?=: {5})|[a-z]+_\w+(?= *[:=]))\s*[:=]\s*(?:[\d.]+%?|nan)\s*$"
)
_BETWEEN = re.compile(r"(?:^|[\s|])-+\s*$|^[\s`]*$|[A-Za-z][\w ()%/.-]*[:=]\s*[\d.]*%?\s+$")
_BELOW = re.compile(r"(?:^|[\s|])=+\s*$")


class Printed:
    """A block of figures begins with a line of ``marks`` and ends before one that is no figure.

    ``names`` finds a name and its number in a line, whatever a logger puts in front; one that comes
    again, or ``first``, is of another block.
    """

    marks: ClassVar[tuple[str, ...]]
    names: ClassVar[re.Pattern[str]]
    first: ClassVar[str] = ""

    def __init__(self, tally: Tally) -> None:
        self._tally, self._figures = tally, dict[str, float]()
        self.open, self.lacks = False, ""

    def read(self, line: str) -> bool:
        found = self.names.search(line)
        if found is not None:
            # A number that the end of the file may have cut is believed by its two decimals.
            if not line[-1].isspace() and not re.search(r"\.\d\d%?$", line):
                return False
            if found[1] in (self.first, *self._figures):
                self._end()
            self._figures[found[1]] = float(found[2])
        elif any(mark in line for mark in self.marks):
            self._end()
        elif other := _OTHER.search(line):
            self._tally.unknown[other[1]] = None
        elif not _BETWEEN.search(line):
            self._end()
            return bool(_BELOW.search(line))
        self.open = True
        return True

    def _end(self) -> None:
        if self._figures:
            self._add(self._figures)
        self._figures, self.open = {}, False

    def _add(self, figures: dict[str, float]) -> None:
        """Make a line of a whole block; else let ``lacks`` name the figures that are missing."""
        raise NotImplementedError

    def _missing(self, figures: dict[str, float], *names: str) -> bool:
        missing = [name for name in names if name not in figures]
        if missing:
            self.lacks = f"blocks without {', '.join(missing)} do not count"
        return bool(missing)

    @property
    def used(self) -> bool:
        self._end()
        return self._tally.count > 0

    @property
    def tally(self) -> Tally:
        self._end()
        return self._tally


_VLLM = {
    "Drafts": "rounds",
    "Draft tokens": "drafted",
    "Accepted tokens": "accepted",
    "Acceptance length": "length",
    "num_drafts": "rounds",
    "num_draft_tokens": "drafted",
    "num_accepted_tokens": "accepted",
    "mean acceptance length": "length",
}


class VllmPrinted(Printed):
    """The end of ``vllm bench serve``, and of vLLM's offline example."""

    marks: ClassVar[tuple[str, ...]] = (
        "-Speculative Decoding-",
        "total_num_output_tokens:",
        "mean acceptance length:",
    )
    names: ClassVar[re.Pattern[str]] = re.compile(
        rf"(?<!\w)({'|'.join(_VLLM)}|Acceptance rate \(%\)|total_num_output_tokens|Position \d+|"
        r"acceptance at token \d+):\s*(\d+\.?\d*)\s*$"
    )

    first = "total_num_output_tokens"

    def __init__(self) -> None:
        definition = "Counters of one run; rates by position are shares of all rounds (survival), "
        definition += "the mean length counts the target's token"
        super().__init__(Tally("vLLM console", "server", definition))

    def _add(self, figures: dict[str, float]) -> None:
        found = {_VLLM[name]: value for name, value in figures.items() if name in _VLLM}
        # The console prints percent.
        parts = 1 if "mean acceptance length" in figures else 100
        rates = {
            int(name.split()[-1]): value / parts
            for name, value in figures.items()
            if name.startswith(("Position", "acceptance at token"))
        }
        if sorted(rates) != list(range(len(rates))):
            raise ValueError(f"positions must be 0, 1, 2, ..., got {sorted(rates)}")
        if found.keys() == {"length"} and parts == 1 and "total_num_output_tokens" not in figures:
            self._tally.exact = False
            self._tally.notes["rounds are not known, and counted as one"] = None
            found |= {"rounds": 1, "accepted": found["length"] - 1, "drafted": math.nan}
        if self._missing(found, "rounds", "accepted", "drafted", "length") or not found["rounds"]:
            return
        rounds, accepted, drafted = (found[name] for name in ("rounds", "accepted", "drafted"))
        if abs(1 + accepted / rounds - found["length"]) > 0.0051:
            wanted = f"{1 + accepted / rounds:.2f}"
            raise ValueError(f"the mean length must be {wanted}, got {found['length']:g}")
        if rates and drafted / rounds > len(rates):
            self._tally.notes[f"positions behind {max(rates)} are missing: no rates by slot"] = None
            rates = {}
        passed = [rates[slot] * rounds for slot in range(len(rates))]
        self._tally.add(rounds, accepted, drafted, passed=passed, rounding=0.0051)


class LlamaPrinted(Printed):
    """The end of ``llama-speculative`` and ``llama-speculative-simple``."""

    marks: ClassVar[tuple[str, ...]] = ("n_draft ", "n_predict ")
    names: ClassVar[re.Pattern[str]] = re.compile(
        r"(?<!\w)(n_draft|n_predict|n_drafted|n_accept|accept)\s*=\s*(\d+\.?\d*)%?\s*$"
    )

    def __init__(self) -> None:
        definition = "Drafted and accepted tokens of one run; a round is what was not accepted of "
        definition += "those predicted, its own token"
        super().__init__(Tally("llama.cpp speculative", "server", definition))
        self._tally.exact = False

    def _add(self, figures: dict[str, float]) -> None:
        if self._missing(figures, "n_predict", "n_drafted", "n_accept"):
            return
        accepted, drafted = figures["n_accept"], figures["n_drafted"]
        rounds = figures["n_predict"] - accepted
        if drafted and rounds < 1:
            raise ValueError(f"n_accept must be below n_predict, got {accepted:g}")
        percent = 100 * accepted / (drafted or math.nan)
        if abs(figures.get("accept", percent) - percent) > 0.01:
            raise ValueError(f"accept must be {percent:.3f}%, got {figures['accept']:g}%")
        if drafted > figures.get("n_draft", math.inf) * rounds:
            self._tally.notes["more was drafted than n_draft a round, as in trees"] = None
        if drafted:
            self._tally.add(rounds, accepted, drafted)
