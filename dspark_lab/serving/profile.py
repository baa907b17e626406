"""The accept rate of each slot of a block, of one drafter at one temperature.

Counted as lifetimes are (Kaplan and Meier 1958): slot k's rate is over the rounds that reached it,
survival is the product of the rates, and a round that the end of its answer cut counts up to the
cut.

Shorter blocks have rates of their own: a round of k tokens that are all accepted is followed by one
that begins in easy text. So the trace is cut again: a *run* is all tokens from one rejection to the
next, token i of it is token i mod (k + 1) of a round of k, whose last is the target's own, and slot
j's rate is over all tokens that fall on it. For whole blocks these are the trace's rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import Rounds, column, read_trace, slot_before
from dspark_lab.rates import as_probabilities, interval, prefix_survival, resampled
from dspark_lab.serving.costs import require_lengths


@dataclass(frozen=True, eq=False)
class AcceptanceProfile:
    """How often each slot is accepted, given that all before it were.

    Row k - 1 is of rounds of k tokens: NaN behind them, and where no round reached the slot.
    ``samples`` are of conversations drawn again.
    """

    by_length: Float[np.ndarray, "length slot"]
    samples: Float[np.ndarray, "resample length slot"]
    conversations: int = 0
    temperature: float | None = None
    drafter: str | None = None

    @classmethod
    @checked
    def of(cls, rates: Sequence[float], *, temperature: float | None = None) -> AcceptanceProfile:
        """From plain numbers, such as published ones, the same at each length; no intervals."""
        values = as_probabilities("rates", list(rates))
        by_length = np.where(np.tri(len(values), dtype=bool), values, np.nan)
        return cls(by_length, np.empty((0, *by_length.shape)), temperature=temperature)

    @classmethod
    @checked
    def of_survival(
        cls, survival: Sequence[float], *, temperature: float | None = None
    ) -> AcceptanceProfile:
        """From the shares of all rounds that pass each slot, as servers print them.

        Raises:
            ValueError: a slot passes more rounds than the one before it.
        """
        shares = as_probabilities("survival", list(survival))
        before = np.append(1.0, shares[:-1])
        if (shares > before).any():
            slot = int((shares > before).argmax())
            wanted = f"survival must not rise, so of slot {slot} be at most {before[slot]:g}"
            raise ValueError(f"{wanted}, got {shares[slot]:g}")
        rates = np.where(before > 0, shares / np.where(before > 0, before, 1), 0.0)
        return cls.of(rates.tolist(), temperature=temperature)

    @property
    def rates(self) -> Float[np.ndarray, " slot"]:
        """Those of whole blocks."""
        return self.by_length[-1]

    @property
    def survival(self) -> Float[np.ndarray, " slot"]:
        """How often each slot of a whole block and all before it are accepted."""
        return prefix_survival(self.rates)

    def survival_of(self, draft_length: int) -> Float[np.ndarray, " slot"]:
        """The same of rounds of so many slots."""
        return prefix_survival(self.by_length[draft_length - 1, :draft_length])

    def sampled_survival(self, draft_length: int) -> Float[np.ndarray, "resample slot"]:
        return prefix_survival(self.samples[:, draft_length - 1, :draft_length])

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
            return float(1 + self.survival_of(draft_length).sum())
        return float(tau_of_answers(self.survival_of(draft_length), np.array([tokens])))

    def table(self) -> pd.DataFrame:
        table = pd.DataFrame({"slot": np.arange(len(self.rates))})
        rates = self.rates, self.samples[:, -1]
        survival = self.survival, self.sampled_survival(len(self.rates))
        for name, (value, sample) in (("rate", rates), ("survival", survival)):
            low, high = self.interval(sample)
            table = table.assign(**{name: value, f"{name}_low": low, f"{name}_high": high})
        return table

    @checked
    def between(self, hotter: AcceptanceProfile, temperature: float) -> AcceptanceProfile:
        """An estimate for a temperature between that of this profile and of a ``hotter`` one.

        Rates are taken to be linear in the temperature, both profiles to be of the same drafter and
        prompts, drawn alike. Decoding there says more: tau was off by up to 6 % on the shipped
        pairs.
        """
        low, high = self.temperature, hotter.temperature
        if low is None or high is None or not low < high or not low <= temperature <= high:
            raise ValueError(
                f"temperature must lie between those of two profiles, a colder and a hotter one, "
                f"got {temperature} and profiles of {low} and {high}"
            )
        if self.samples.shape != hotter.samples.shape:
            shapes = [list(profile.samples.shape) for profile in (self, hotter)]
            raise ValueError(f"both profiles must have as many samples and slots, got {shapes}")
        share = (temperature - low) / (high - low)
        return replace(
            self,
            by_length=(1 - share) * self.by_length + share * hotter.by_length,
            samples=(1 - share) * self.samples + share * hotter.samples,
            temperature=float(temperature),
        )

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
    trace must be of whole blocks. The first tokens of an answer are the easiest, so that a trace of
    short answers promises too much for long ones. ``drafter`` and ``temperature`` say which rows to
    take, or label a trace without the column.
    """
    trace, drafter, temperature = rows_of(trace, drafter, temperature)
    rounds, row = read_trace(trace)
    require_whole_blocks(rounds, row >= 0)
    passed, reached = _cut_again(rounds)
    drawn = resampled(len(reached), resamples, seed)
    return AcceptanceProfile(
        by_length=ratio(passed.sum(axis=0), reached.sum(axis=0)),
        samples=ratio(np.tensordot(drawn, passed, axes=1), np.tensordot(drawn, reached, axes=1)),
        conversations=len(reached),
        temperature=temperature,
        drafter=drafter,
    )


def _cut_again(rounds: Rounds) -> Float[np.ndarray, "sum conversation length slot"]:
    """Summed rates, and their number, of the slots that were reached in rounds of each length."""
    reached, conversation = rounds.reached, rounds.conversation
    slots = reached.shape[1]
    # Rounds behind which their run goes on.
    whole = rounds.accepted.all(axis=1) & np.append(np.diff(conversation) == 0, False)
    number = np.arange(len(rounds))
    begin = np.maximum.accumulate(np.where(np.append(False, whole[:-1]), 0, number))
    # The target's own token of a whole round was not drafted, so that nobody knows its rate.
    token = (number - begin)[:, None] * (slots + 1) + np.arange(slots)
    weights = np.nan_to_num(rounds.outcome("analytic")).ravel(), reached.ravel()
    sums = np.zeros((2, conversation.max() + 1, slots, slots))
    for k in range(1, slots + 1):
        place = (conversation[:, None] * (k + 1) + token % (k + 1)).ravel()
        for total, weight in zip(sums, weights, strict=True):
            count = np.bincount(place, weight, minlength=len(total) * (k + 1))
            # The last of k + 1 is the target's own.
            total[:, k - 1, :k] = count.reshape(-1, k + 1)[:, :k]
    return sums


@checked
def rows_of(
    trace: pd.DataFrame, drafter: str | None = None, temperature: float | None = None
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
