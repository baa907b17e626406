"""A record of acceptance: what a server counted, as sums by request and slot.

Whatever a program writes, it becomes the table of sums of :mod:`dspark_lab.rates.acceptance`: in
how many rounds a slot was *reached* (verified, and all slots before it accepted) and in how many it
was *passed* (accepted with all before it). So there is one meaning of each rate:

    survival_k    = passed_k / rounds     a share of all rounds, as every program prints it;
    conditional_k = passed_k / reached_k  as lifetimes are counted (Kaplan and Meier 1958);
    tau           = 1 + accepted / rounds tokens of a round, the target's own token included.

A slot that was not verified, because the draft was short or a threshold or a scheduler cut it, was
not reached; where a record does not say how often that was, its conditional rates are unknown, and
survival is a lower bound of that of whole blocks.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import Count, Size, checked
from dspark_lab.rates import rate_table, resampled, tau_table
from dspark_lab.serving import AcceptanceProfile

# Columns of a record's lines that every one has.
LINE = ["line", "rounds", "accepted", "drafted"]


@dataclass(frozen=True, eq=False)
class AcceptanceRecord:
    """What a file or a server says of acceptance.

    Attributes:
        kind: the program and what it wrote, such as "vllm log".
        unit: what a line is: "request", or "interval", "data set", "server", of which no intervals
            can be drawn.
        lines: a line for each, with ``line`` (a request's id, or a number), ``rounds``, tokens
            ``accepted`` (without the target's own) and ``drafted`` (NaN where not known), and what
            else is known: ``temperature``, ``label``, ``seconds`` (of its time), ``prompt_tokens``,
            ``output_tokens``, and the fields in ``unknown`` as they are.
        reached, passed: rounds of each line and slot; NaN where not known, no slots where none is.
        exact: whether the rounds are counts, not worked out of rounded figures.
        definition: what the source counts and what was made of it.
        notes: what to beware of.
        unknown: names of fields that the reader does not know.
        truncated: where the file ends within a line, which is left out.
    """

    kind: str
    unit: str
    lines: pd.DataFrame
    reached: Float[np.ndarray, "line slot"]
    passed: Float[np.ndarray, "line slot"]
    exact: bool
    definition: str
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    truncated: str | None = None

    @property
    def rounds(self) -> float:
        return float(self.lines["rounds"].sum())

    @property
    def accepted(self) -> float:
        """Tokens that were accepted, without the target's own."""
        return float(self.lines["accepted"].sum())

    @property
    def tau(self) -> float:
        """Tokens of a round as it was served, the target's own among them."""
        return 1 + self.accepted / self.rounds

    @property
    def survival(self) -> Float[np.ndarray, " slot"]:
        """The share of all rounds in which a slot and all before it were accepted."""
        return np.nansum(self.passed, axis=0) / self.rounds

    @property
    def conditional(self) -> Float[np.ndarray, " slot"]:
        """The share of the rounds that reached a slot in which it was accepted; NaN: unknown."""
        return _ratio(self.passed.sum(axis=0), self.reached.sum(axis=0))

    @property
    def requests(self) -> pd.DataFrame | None:
        """The lines, where each is a request, with each one's ``tau``."""
        if self.unit != "request":
            return None
        return self.lines.assign(tau=1 + self.lines["accepted"] / self.lines["rounds"])

    @checked
    def part(
        self, *, temperature: float | None = None, label: str | float | None = None
    ) -> AcceptanceRecord:
        """The lines of one temperature, of one label, or of both.

        Raises:
            ValueError: the record does not say them, or has no such line.
        """
        kept = np.ones(len(self.lines), dtype=bool)
        for name, wanted in {"temperature": temperature, "label": label}.items():
            if wanted is None:
                continue
            held = self.values(name)
            if wanted not in held:
                raise ValueError(f"{name} must be one of the record's, {held}, got {wanted!r}")
            kept &= (self.lines[name] == wanted).to_numpy()
        if not kept.any():
            raise ValueError(f"no line has temperature {temperature} and label {label!r}")
        lines = self.lines[kept].reset_index(drop=True)
        return replace(self, lines=lines, reached=self.reached[kept], passed=self.passed[kept])

    def values(self, name: str) -> list[Any]:
        """The values of a column of the lines, such as "temperature", in order; none without it."""
        held = self.lines[name].dropna().unique().tolist() if name in self.lines else []
        # Numbers come before texts.
        return sorted(held, key=lambda value: (isinstance(value, str), value))

    def sums(self) -> pd.DataFrame:
        """The table of sums by request and slot, for :func:`dspark_lab.rates.rate_table`.

        With the columns ``temperature``, ``label`` where the record has them. Records without
        requests are one conversation, so that nothing is drawn from them.
        """
        slots = self.passed.shape[1]
        values = {"reached": self.reached, "passed": self.passed, "survived": self.passed}
        flat = {name: np.nan_to_num(one).ravel() for name, one in values.items()}
        flat["reached"] = self.reached.ravel()
        return self._lines(slots).assign(slot=np.tile(np.arange(slots), len(self.lines)), **flat)

    def table(self, by: str | Sequence[str] = ()) -> pd.DataFrame:
        """Survival and conditional rate of each slot, with 95 % intervals where there are requests.

        ``by``: columns of :meth:`sums` to keep apart.
        """
        self._require_slots()
        return rate_table(self.sums(), by).drop(columns="kind")

    def tau_table(self, by: str | Sequence[str] = ()) -> pd.DataFrame:
        """Tau with its 95 % interval where there are requests."""
        accepted = self.lines["accepted"].to_numpy(dtype=float)
        counts = {"slot": 0, "reached": 0.0, "passed": 0.0, "survived": accepted}
        return tau_table(self._lines(1).assign(**counts), by).drop(columns="kind")

    @checked
    def profile(self, *, resamples: Count = 1000, seed: Size = 0) -> AcceptanceProfile:
        """The accept rates for serving: the same at every draft length, as counted in whole blocks.

            serving.best_length(record.profile(), costs)

        Its samples are of requests drawn again; none where there are no requests. A trace would say
        more: rates of shorter drafts differ a little.
        """
        self._require_slots()
        rates = self.conditional
        if not np.isfinite(rates[:1]).all():
            raise ValueError(f"the record must say how often its slots were verified: {self.kind}")
        # Slots that no round reached stay, with a rate that nobody knows.
        known = int(np.cumprod(np.isfinite(self.reached.sum(axis=0))).sum())
        drawn = np.empty((0, len(self.lines)))
        count = len(self.lines) if self.unit == "request" else 0
        if count > 1:
            drawn = resampled(count, resamples, seed).astype(float)
        sampled = _ratio(drawn @ self.passed[:, :known], drawn @ self.reached[:, :known])
        held = self.lines["temperature"].unique() if "temperature" in self.lines else []
        kept = np.tri(known, dtype=bool)
        return AcceptanceProfile(
            by_length=np.where(kept, rates[:known], np.nan),
            samples=np.where(kept, sampled[:, None, :], np.nan),
            conversations=count,
            temperature=float(held[0]) if len(held) == 1 and pd.notna(held[0]) else None,
        )

    @property
    def reason(self) -> str:
        """What is known, in words."""
        about = "" if self.exact else "about "
        rounds = "round" if self.rounds == 1 else "rounds"
        text = f"{self.kind}: tau {self.tau:.2f} over {about}{self.rounds:,.0f} {rounds}"
        if self.unit == "request":
            text += f" of {len(self.lines):,} request{'s' * (len(self.lines) != 1)}"
        else:
            text += "; no intervals: sums only"
        parts = [text, self.definition, *self.notes]
        if self.unknown:
            parts.append(f"Fields that are not known: {', '.join(self.unknown)}")
        if self.truncated:
            parts.append(f"{self.truncated} is cut off and left out")
        return ". ".join(part.rstrip(".") for part in parts) + "."

    def __repr__(self) -> str:
        return self.reason

    def _lines(self, slots: int) -> pd.DataFrame:
        """The columns of :meth:`sums` that a line has, for so many slots each."""
        lines = self.lines
        kept = [name for name in ("temperature", "label") if name in lines]
        table = lines[["line", *kept, "rounds"]].rename(columns={"line": "conversation"})
        if self.unit != "request":
            table["conversation"] = self.unit
        table = table.assign(kind="empirical", domain=table.get("label", ""))
        return table.loc[table.index.repeat(slots)].reset_index(drop=True)

    def _require_slots(self) -> None:
        if not self.passed.shape[1]:
            raise ValueError(
                f"the record must have acceptance by slot, got sums alone: {self.kind}"
            )


def _ratio(part: Any, whole: Any) -> Any:
    return part / np.where(whole == 0, np.nan, whole)


class Tally:
    """The lines of a record while it is read: numbers in arrays, so that many take little."""

    def __init__(self, kind: str, unit: str, definition: str) -> None:
        self.kind, self.unit, self.definition = kind, unit, definition
        self.exact, self.count = True, 0
        self.notes: dict[str, None] = {}
        self.unknown: dict[str, None] = {}
        self._numbers = {name: array("d") for name in LINE[1:]}
        self._slots, self._reached, self._passed = array("i"), array("d"), array("d")
        self._about: dict[str, list[Any]] = {}

    def add(
        self,
        rounds: float,
        accepted: float,
        drafted: float = math.nan,
        *,
        passed: Sequence[float] = (),
        reached: Sequence[float] | None = None,
        about: Mapping[str, Any] | None = None,
        rounding: float = 0.0006,
    ) -> None:
        """One more line.

        ``rounding``: how far off a rate of the source may be, as it is printed.

        Without ``reached``, all slots of each round were verified if so many were drafted, or if
        that is not known; else it is only known that the first one was.
        """
        if accepted > drafted:
            raise ValueError(
                f"accepted tokens must be at most those drafted, {drafted:g}, got {accepted:g}"
            )
        # Counters are not read all at once.
        allowed = 1 + 0.01 * accepted + rounding * rounds * len(passed)
        if len(passed) and abs(sum(passed) - accepted) > allowed:
            by_slot = f"those of the slots together, {sum(passed):g}"
            raise ValueError(f"accepted tokens must be {by_slot}, got {accepted:g}")
        if reached is None:
            reached = [rounds, *passed[:-1]][: len(passed)]
            if drafted < rounds * len(passed):
                reached = [rounds] + [math.nan] * (len(passed) - 1)
                self.notes["drafts were not all whole blocks: no conditional rates"] = None
        for name, value in zip(LINE[1:], (rounds, accepted, drafted), strict=True):
            self._numbers[name].append(value)
        self._slots.append(len(passed))
        self._passed.extend(passed)
        self._reached.extend(reached)
        for name, value in (about or {}).items():
            column = self._about.setdefault(name, [])
            column.extend([None] * (self.count - len(column)))
            column.append(value)
        self.count += 1

    def add_histogram(
        self,
        histogram: Sequence[float],
        slots: int,
        drafted: float = math.nan,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """A line of rounds by the number of tokens that they accepted, 0 to ``slots``."""
        counts = np.zeros(max(slots, len(histogram) - 1) + 1)
        counts[: len(histogram)] = histogram
        rounds = float(counts.sum())
        passed = counts[::-1].cumsum()[::-1][1:]
        accepted = float(counts @ np.arange(len(counts)))
        self.add(rounds, accepted, drafted, passed=passed.tolist(), about=about)

    def add_steps(
        self,
        accepted: Sequence[int],
        drafted: Sequence[int],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """A line of which each round is known."""
        taken, given = np.array(accepted, dtype=int), np.array(drafted, dtype=int)
        slot = np.arange(max(given.max(initial=0), taken.max(initial=0)))[:, None]
        passed, reached = taken > slot, (taken >= slot) & (given > slot)
        sums = (passed.sum(axis=1).tolist(), reached.sum(axis=1).tolist())
        totals = (len(taken), int(taken.sum()), int(given.sum()))
        self.add(*totals, passed=sums[0], reached=sums[1], about=about)

    def record(self, truncated: str | None = None) -> AcceptanceRecord:
        lines = pd.DataFrame({name: np.array(one) for name, one in self._numbers.items()})
        for name, column in self._about.items():
            lines[name] = column + [None] * (self.count - len(column))
        numbers = pd.Series(np.arange(1, self.count + 1))
        lines["line"] = lines["line"].fillna(numbers) if "line" in lines else numbers
        sizes = np.array(self._slots, dtype=int)
        shape = (self.count, int(sizes.max(initial=0)))
        place = np.arange(shape[1]) < sizes[:, None]
        reached, passed = np.zeros(shape), np.zeros(shape)
        reached[place], passed[place] = np.array(self._reached), np.array(self._passed)
        others = [name for name in lines if name not in LINE]
        return AcceptanceRecord(
            self.kind,
            self.unit,
            lines[[*LINE, *others]],
            reached,
            passed,
            self.exact,
            self.definition,
            tuple(self.notes),
            tuple(self.unknown),
            truncated,
        )
