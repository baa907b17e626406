"""The accept rate of each slot of a block, of one drafter at one temperature.

Counted as lifetimes are (Kaplan and Meier 1958): slot k's rate is over the rounds that reached it,
survival is the product of the rates, and a round that the end of its answer cut counts up to the
cut. A trace of long blocks promises a little less of short ones than they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import Rounds, column, read_trace, slot_before
from dspark_lab.rates import as_probabilities, interval, prefix_survival, resampled, trace_sums
from dspark_lab.serving.costs import require_lengths


@dataclass(frozen=True, eq=False)
class AcceptanceProfile:
    """How often each slot is accepted, given that all before it were.

    ``rates`` are NaN where no round reached the slot; ``samples`` are of conversations drawn again.
    """

    rates: Float[np.ndarray, " slot"]
    samples: Float[np.ndarray, "resample slot"]
    conversations: int = 0
    temperature: float | None = None
    drafter: str | None = None

    @classmethod
    @checked
    def of(cls, rates: Sequence[float], *, temperature: float | None = None) -> AcceptanceProfile:
        """From plain numbers, such as published ones; without intervals."""
        values = as_probabilities("rates", list(rates))
        return cls(values, np.empty((0, len(values))), temperature=temperature)

    @property
    def survival(self) -> Float[np.ndarray, " slot"]:
        """How often each slot and all before it are accepted."""
        return prefix_survival(self.rates)

    @property
    def longest(self) -> int:
        """The most slots of a round whose survival is known."""
        return int(np.isfinite(self.survival).sum())

    @checked
    def tau(self, draft_length: Count, tokens: Count | None = None) -> float:
        """Mean tokens of a round of so many slots, the target's own among them.

        ``tokens`` is the length of an answer without its first token; None is an endless one.
        """
        require_lengths([draft_length], len(self.rates))
        if tokens is None:
            return float(1 + self.survival[:draft_length].sum())
        return float(tau_of_answers(self.survival[:draft_length], np.array([tokens])))

    def table(self) -> pd.DataFrame:
        table = pd.DataFrame({"slot": np.arange(len(self.rates))})
        rates, survival = (self.rates, self.samples), (self.survival, prefix_survival(self.samples))
        for name, (value, sample) in (("rate", rates), ("survival", survival)):
            low, high = self.interval(sample)
            table = table.assign(**{name: value, f"{name}_low": low, f"{name}_high": high})
        return table

    def interval(
        self, figures: Float[np.ndarray, "resample *figure"]
    ) -> Float[np.ndarray, "bound *figure"]:
        """The 95 % interval of a figure of :attr:`samples`; NaN without any."""
        if len(figures) == 0:
            return np.full((2, *figures.shape[1:]), np.nan)
        return interval(figures, self.conversations)


@checked
def acceptance_profile(
    trace: pd.DataFrame,
    *,
    drafter: str | None = None,
    temperature: float | None = None,
    resamples: Count = 1000,
    seed: Size = 0,
) -> AcceptanceProfile:
    """The accept rates of a trace, of one drafter at one temperature.

    A rate is the mean of the analytic c* = sum_v min(p, q) over the slots that were reached; the
    trace must be of whole blocks. ``drafter`` and ``temperature`` say which rows to take, or label
    a trace without the column.
    """
    trace, drafter, temperature = rows_of(trace, drafter, temperature)
    rounds, row = read_trace(trace)
    require_whole_blocks(rounds, row >= 0)
    sums = trace_sums(trace)
    sums = sums[sums["kind"] == "on policy"]
    table = sums.pivot(index="conversation", columns="slot", values=["passed", "reached"])
    passed, reached = table["passed"].to_numpy(float), table["reached"].to_numpy(float)
    drawn = resampled(len(reached), resamples, seed)
    return AcceptanceProfile(
        rates=ratio(passed.sum(axis=0), reached.sum(axis=0)),
        samples=ratio(drawn @ passed, drawn @ reached),
        conversations=len(reached),
        temperature=temperature,
        drafter=drafter,
    )


def rows_of(
    trace: pd.DataFrame, drafter: str | None, temperature: float | None
) -> tuple[pd.DataFrame, str | None, float | None]:
    """The rows of one drafter at one temperature, and which these are."""
    labels: list[Any] = []
    for name, wanted in (("drafter", drafter), ("temperature", temperature)):
        held = column(trace, name, complete=True).unique().tolist() if name in trace else []
        if wanted is None and len(held) > 1:
            raise ValueError(
                f"trace must be of one {name}, or {name} must say which, got {sorted(held)}"
            )
        if wanted is not None and held and wanted not in held:
            raise ValueError(f"{name} must be one of the trace's {sorted(held)}, got {wanted}")
        if len(held) > 1:
            trace = trace[trace[name] == wanted]
        labels.append(held[0] if wanted is None and held else wanted)
    return trace, *labels


def require_whole_blocks(rounds: Rounds, drafted: Bool[np.ndarray, "round slot"]) -> None:
    """Refuse rounds cut by more than the end of an answer, which comes behind an accepted slot."""
    verified = rounds.verified
    if not verified[:, 0].any():
        raise ValueError("trace must have a verified slot, got none")
    behind_accepted = slot_before(rounds.accepted)
    behind_accepted[:, 0] = False
    cut = drafted & ~verified & slot_before(verified) & ~behind_accepted
    if cut.any():
        number, slot = np.argwhere(cut)[0]
        raise ValueError(
            "trace must be of whole blocks, without a threshold or scheduler, got one in which "
            f"slot {slot} of a round of prompt {rounds.prompt[number]} was drafted but not verified"
        )


def ratio(
    part: Float[np.ndarray, "*axes"], whole: Float[np.ndarray, "*axes"]
) -> Float[np.ndarray, "*axes"]:
    return part / np.where(whole == 0, np.nan, whole)


def tau_of_answers(
    survival: Float[np.ndarray, "*axes slot"], answers: Int[np.ndarray, " answer"]
) -> Float[np.ndarray, "*axes"]:
    """Tokens over rounds of answers of so many tokens, their first ones left out."""
    rounds = _rounds_needed(survival, int(answers.max()))
    return answers.sum() / rounds[answers].sum(axis=0)


def _rounds_needed(
    survival: Float[np.ndarray, "*axes slot"], tokens: int
) -> Float[np.ndarray, "tokens *axes"]:
    """Mean rounds that 0, 1, ..., ``tokens`` more tokens take."""
    ends = -np.diff(np.concatenate([survival, np.zeros_like(survival[..., :1])], axis=-1))
    # How often a round yields 1, 2, ..., K + 1 tokens.
    yields = np.concatenate([1 - survival[..., :1], ends], axis=-1)
    rounds = [np.zeros(survival.shape[:-1])]
    for left in range(1, tokens + 1):
        rounds.append(np.ones(survival.shape[:-1]))
        for n in range(1, min(left, yields.shape[-1]) + 1):
            rounds[left] += yields[..., n - 1] * rounds[left - n]
    return np.stack(rounds)
