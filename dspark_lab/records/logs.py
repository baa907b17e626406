"""Records in lines of text: what vLLM, SGLang and llama.cpp log or print, and Prometheus' text."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import ClassVar, Protocol

from dspark_lab.records.dump import STEP_MARK, DumpSums, step_of_line
from dspark_lab.records.record import Tally


class LogReader(Protocol):
    """Reads the lines that hold one of ``marks``; ``tally`` is what they came to.

    While it is ``open`` the next line may belong to it, whatever that holds. ``lacks``: why some
    lines do not count.
    """

    marks: ClassVar[tuple[str, ...]]
    open: bool
    lacks: str

    def read(self, line: str) -> bool:
        """Take a line in; false where it is not what it begins as, or ends too early to tell.

        The last line of a file may be cut: then it does not end with a line break.
        """
        ...

    @property
    def used(self) -> bool:
        """Whether a line was taken in."""
        ...

    @property
    def tally(self) -> Tally: ...


_TIME = re.compile(r"(\d{4}-)?\d\d-\d\d[ T]\d\d:\d\d:\d\d")
# Names and values of a line, a value with commas ends where the next name begins.
_PAIR = re.compile(r"([A-Z][\w -]*): (.*?)(?=,\s+[A-Z][\w -]*: |,?\s*$)")
# Seconds of the year 2000, which stands for one that is missing.
_YEAR = 366 * 86400.0


class _Clock:
    """Seconds since the first time stamp of a log; a year is missing in some."""

    def __init__(self) -> None:
        self.first: datetime | None = None
        self.last, self.years = 0.0, 0

    def seconds(self, line: str) -> float | None:
        found = _TIME.search(line)
        if found is None:
            return None
        stamp = found[0].replace("T", " ")
        now = datetime.fromisoformat(stamp if found[1] else f"2000-{stamp}")
        self.first = self.first or now
        seconds = (now - self.first).total_seconds() + self.years * _YEAR
        if not found[1] and seconds < self.last - _YEAR / 2:
            seconds, self.years = seconds + _YEAR, self.years + 1
        self.last = seconds
        return seconds


class _Log:
    """A log whose lines are lines of a record."""

    tally: Tally
    open = False
    lacks = ""

    @property
    def used(self) -> bool:
        return self.tally.count > 0


class VllmLog(_Log):
    marks: ClassVar[tuple[str, ...]] = ("SpecDecoding metrics:",)

    def __init__(self) -> None:
        self.tally = Tally(
            "vLLM log",
            "interval",
            "Rates by position are shares of all rounds (survival), tau counts the target's token; "
            "tokens behind an end of turn count as accepted",
        )
        self._clock = _Clock()

    def read(self, line: str) -> bool:
        found = dict(_PAIR.findall(line.split(self.marks[0], 1)[1].strip()))
        names, whole = ("Accepted", "Drafted"), line.endswith(("\n", "%"))
        taken, given = (re.match(r"(\d+) tokens", found.get(name, "")) for name in names)
        if taken is None or given is None or not whole:
            return False
        accepted, drafted = int(taken[1]), int(given[1])
        if not drafted:
            return True
        rates = _numbers(found.get("Per-position acceptance rate", ""))
        if not rates:
            raise ValueError("vLLM's log must have rates by position: this version has none")
        rounds, exact = _rounds(accepted, drafted, rates)
        self.tally.exact &= exact
        passed = [rate * rounds for rate in rates]
        about = {"seconds": self._clock.seconds(line)}
        self.tally.add(rounds, accepted, drafted, passed=passed, about=about)
        return True


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",") if one.strip()]


def _rounds(accepted: int, drafted: int, rates: list[float]) -> tuple[int, bool]:
    """The rounds of an interval, and whether they are exact: whole blocks that fit all figures."""
    whole, rest = divmod(drafted, len(rates))
    off = abs(accepted / whole - sum(rates)) if whole else math.inf
    if not rest and off <= 0.0005 * len(rates) + 1e-9:
        return whole, True
    return max(round(accepted / sum(rates)) if sum(rates) > 0 else whole, 1), False


class SglangLog(_Log):
    marks: ClassVar[tuple[str, ...]] = ("accept len:",)
    # Decoding steps between two lines, by default.
    _STEPS = 40

    def __init__(self) -> None:
        self.tally = Tally(
            "SGLang log",
            "interval",
            "Mean accepted length with the target's token, over the steps since the line before; "
            f"rounds are {self._STEPS} steps, the default, of the running requests",
        )
        self.tally.exact = False
        self._clock = _Clock()

    def read(self, line: str) -> bool:
        found = dict(re.findall(r"([#\w][\w .()/-]*): ([\d.]+)", line.split("Decode batch", 1)[-1]))
        whole = line.endswith("\n") or re.search(r"accept len: [\d.]+,", line)
        if "Decode batch" not in line or not found.get("accept len", "").strip(".") or not whole:
            return False
        length, running = float(found["accept len"]), int(found.get("#running-req", 1))
        rounds = self._STEPS * max(running, 1)
        if float(found.get("cap len", 0)) > 0:
            self.tally.notes["a cap cut what was verified: tau is that of the cut rounds"] = None
        about = {"seconds": self._clock.seconds(line), "running": running}
        self.tally.add(rounds, (length - 1) * rounds, about=about)
        return True


class SglangSteps:
    """Early builds' debug lines, a step each."""

    marks: ClassVar[tuple[str, ...]] = (STEP_MARK,)
    open = False
    lacks = ""

    def __init__(self) -> None:
        self._sums = DumpSums()

    def read(self, line: str) -> bool:
        found = step_of_line(line)
        if found is not None:
            self._sums.add(found)
        elif line.endswith("\n"):
            raise ValueError("it must hold a whole step as JSON")
        return found is not None

    @property
    def used(self) -> bool:
        return len(self._sums) > 0

    @property
    def tally(self) -> Tally:
        return self._sums.tally()


_DRAFTED = re.compile(
    r"draft acceptance(?: rate)? = ([\d.]+) \(\s*(\d+) accepted /\s*(\d+) generated\)"
    r"(?:, mean (?:len|acceptance length) =\s*([\d.]+))?"
    r"(?:, acceptance rate per position = \(([\d., ]+)\))?"
)
_BY_SLOT = re.compile(r"task (\d+) .*acc per pos = \(([\d., ]+)\)")


class LlamaLog:
    marks: ClassVar[tuple[str, ...]] = ("draft acceptance", "acc per pos")
    open = False

    def __init__(self) -> None:
        self.lacks = ""
        self._tally = Tally(
            "llama.cpp log",
            "request",
            "The mean length counts the target's token, over rounds that had a draft; rounds are "
            "worked out of it",
        )
        self._tally.exact = False
        # The last request, whose rates by position may follow.
        self._request: tuple[str | int, int, int, int, list[float]] | None = None

    def read(self, line: str) -> bool:
        by_slot = _BY_SLOT.search(line)
        if by_slot:
            if self._request and self._request[0] == by_slot[1]:
                self._request = (*self._request[:4], _numbers(by_slot[2]))
            return True
        found = _DRAFTED.search(line)
        cut = not line.endswith("\n")
        if found is None or (cut and not (found[4] and line.endswith(")"))):
            return False
        accepted, drafted = int(found[2]), int(found[3])
        if found[4] is None:
            self.lacks = "llama.cpp's lines before June 2026 have no mean length: they do not count"
            return True
        length = float(found[4])
        rounds = max(round(accepted / (length - 1)), 1) if length > 1 else drafted
        task = re.search(r"task (\d+)", line)
        self._flush()
        name = task[1] if task else self._tally.count + 1
        self._request = (name, rounds, accepted, drafted, _numbers(found[5] or ""))
        return True

    def _flush(self) -> None:
        if self._request is not None:
            name, rounds, accepted, drafted, rates = self._request
            passed = [rate * rounds for rate in rates]
            self._tally.add(rounds, accepted, drafted, passed=passed, about={"line": name})
            self._request = None

    @property
    def used(self) -> bool:
        return self._request is not None or self._tally.count > 0

    @property
    def tally(self) -> Tally:
        self._flush()
        return self._tally


_COUNTS = re.compile(r"(\[\d+\] )?.*\bstatistics\s+(\S+): (.*)")
_COUNT = re.compile(r"#([a-z][\w /(),]*?) =\s*(\([\d., ]*\)|[\d.]+(?:\s+\d+)*)")
_COUNTED = ("gen drafts", "acc drafts", "gen tokens", "acc tokens")
_KNOWN = frozenset({"calls", "calls(b,g,a)", "mean acc len", "acc rate/pos", *_COUNTED})


class LlamaStatistics:
    """Counters since a server's start, again with every request: only the last ones count."""

    marks: ClassVar[tuple[str, ...]] = ("#gen drafts",)
    open = False
    lacks = ""

    def __init__(self) -> None:
        self._tally = Tally(
            "llama.cpp statistics",
            "server",
            "Counters since the server's start; rates by position are shares of all rounds "
            "(survival), the mean length counts the target's token",
        )
        # By the port that a router puts in front, and the kind of draft.
        self._last: dict[tuple[str, str], dict[str, str]] = {}

    def read(self, line: str) -> bool:
        found = _COUNTS.match(line.strip())
        counts = dict(_COUNT.findall(found[3])) if found else {}
        whole = line.endswith("\n") or "acc rate/pos" in counts
        if found is None or not set(_COUNTED) <= set(counts) or not whole:
            return False
        place = found[1] or "", found[2].replace("_", "-")
        before = self._last.get(place, counts)
        if int(before["gen tokens"]) > int(counts["gen tokens"]):
            self._tally.notes["counters fell: the server, or a slot's own counters, began anew"] = (
                None
            )
            self._add(place[1], before)
        self._last[place] = counts
        return True

    def _add(self, name: str, counts: dict[str, str]) -> None:
        self._tally.unknown.update(dict.fromkeys(one for one in counts if one not in _KNOWN))
        drafts, passing, drafted, accepted = (int(counts[one]) for one in _COUNTED)
        calls = counts.get("calls(b,g,a)", "").split()
        rounds = verified = int(calls[-1]) if calls else drafts
        if not calls or verified == passing < drafts:
            # Some builds did not count the calls of which nothing was accepted.
            rounds, self._tally.exact = drafts, False
            self._tally.notes["rounds are the drafts that were made"] = None
        if not rounds:
            return
        length = counts.get("mean acc len")
        if length and abs(1 + accepted / max(verified, 1) - float(length)) > 0.0051:
            wanted = f"{1 + accepted / max(verified, 1):.2f}"
            raise ValueError(f"mean acc len must be that of the counters, {wanted}, got {length}")
        rates = _numbers(counts.get("acc rate/pos", "").strip("()"))
        passed = [rate * verified for rate in rates]
        self._tally.add(rounds, accepted, drafted, passed=passed, about={"label": name})

    @property
    def used(self) -> bool:
        return bool(self._last)

    @property
    def tally(self) -> Tally:
        for (_, name), counts in self._last.items():
            self._add(name, counts)
        self._last = {}
        return self._tally


_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})?\s+([\d.eE+-]+|NaN)(?:\s+\d+)?\s*$")
_COUNTERS = re.compile(
    r"(?:vllm:|llamacpp:|trtllm[:_])spec_decode_(?:num_)?"
    r"(drafts|draft_tokens|drafted_tokens|accepted_tokens|accepted_tokens_per_pos)(?:_total)?$"
)


class Exposition:
    """Prometheus' text: counters since a server's start, of all its engines together."""

    marks: ClassVar[tuple[str, ...]] = ("spec_",)
    open = False
    lacks = ""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], tuple[float, int | None, str]] = {}
        self._program = ""

    def read(self, line: str) -> bool:
        if line.startswith("#"):
            return True
        sample = _SAMPLE.match(line.strip())
        if sample is None:
            return False
        counter = _COUNTERS.match(sample[1])
        if counter:
            self._program = {"v": "vLLM", "l": "llama.cpp", "t": "TensorRT-LLM"}[sample[1][0]]
        elif sample[1].startswith("sglang:spec_"):
            self._program = "SGLang"
        else:
            return True
        place = re.search(r'(?:token_)?position="(\d+)"', sample[2] or "")
        name = counter[1] if counter else sample[1].removeprefix("sglang:")
        at = int(place[1]) if place else None
        self._last[sample[1], sample[2] or ""] = (float(sample[3]), at, name)
        return True

    @property
    def used(self) -> bool:
        return bool(self._last)

    def _sum(self, name: str) -> float:
        found = [value for value, _, own in self._last.values() if own == name]
        return sum(found) if found else math.nan

    def _by_slot(self, name: str) -> list[float]:
        found: dict[int, float] = {}
        for value, place, own in self._last.values():
            if own == name and place is not None:
                found[place] = found.get(place, 0.0) + value
        return [found.get(slot, 0.0) for slot in range(max(found, default=-1) + 1)]

    @property
    def tally(self) -> Tally:
        tally = Tally(
            f"{self._program} metrics",
            "server",
            "Counters since the server's start, what warmed it up among them; by position the "
            "rounds whose slot was accepted with all before it",
        )
        if self._program == "SGLang":
            tally.definition = "The mean of the last interval, of which the rounds are not known"
            lengths = [v for v, _, own in self._last.values() if own == "spec_accept_length"]
            # Of ranks that have served nothing yet it is 0 or no number.
            lengths = [length for length in lengths if length >= 1]
            if not lengths:
                raise ValueError("SGLang's metrics must have a spec_accept_length, got none")
            tally.exact = False
            for length in lengths:
                tally.add(1, length - 1)
            return tally
        if self._program == "TensorRT-LLM":
            passed, offered = self._by_slot("accepted_tokens"), self._by_slot("drafted_tokens")
            if not offered:
                raise ValueError("TensorRT-LLM's metrics must count drafted tokens by position")
            rounds, drafted = offered[0], sum(offered)
            # A slot was verified in all rounds that passed the one before, if it was in all.
            reached = [
                (rounds, *passed)[slot] if offered[slot] == rounds else math.nan
                for slot in range(len(passed))
            ]
            tally.add(rounds, sum(passed), drafted, passed=passed, reached=reached)
            return tally
        rounds, drafted = self._sum("drafts"), self._sum("draft_tokens")
        if not rounds > 0:
            raise ValueError("the metrics must count rounds (spec_decode_num_drafts), got none")
        passed = self._by_slot("accepted_tokens_per_pos")
        accepted = self._sum("accepted_tokens")
        accepted = sum(passed) if math.isnan(accepted) else accepted
        tally.add(rounds, accepted, drafted, passed=passed)
        return tally


# Acceptance that a server was told to make up.
MADE_UP = ("synthetic speculative acceptance is enabled", "synthetic acceptance:")
