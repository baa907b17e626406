"""Temperature scaling of confidences: one temperature per slot, fitted, applied, saved, followed.

Temperatures are here always those of the confidence head, never the one that tokens are drawn at.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from dspark_lab.checks import Count, Positive, checked
from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.files import read_json, write_json
from dspark_lab.model import CALIBRATION
from dspark_lab.rates.scores import Binning, as_numbers, binned_error, require_range
from dspark_lab.rates.survival import prefix_survival

Chance = Float[np.ndarray, "round slot"]

_METHOD = "sequential_temperature_scaling"

# From 1/5 to 5 in steps of 2 %, with 1 itself in the middle.
TEMPERATURE_GRID = tuple(np.exp(np.linspace(-np.log(5), np.log(5), 163)).tolist())
COARSE_GRID = TEMPERATURE_GRID[::3]


def temperature_scale(confidence: ArrayLike, temperatures: ArrayLike) -> Float[np.ndarray, "..."]:
    """Return sigmoid(logit(confidence) / temperature) (Guo et al. 2017, section 4.2).

    A temperature above 1 draws confidences towards 1/2; 0, 1 and NaN stay what they are.
    ``temperatures`` broadcast against the ``[..., slot]`` confidences.
    """
    values = as_numbers("confidence", confidence)
    require_range("confidence", values)
    t = as_numbers("temperatures", temperatures)
    if not (np.isfinite(t) & (t > 0)).all():
        raise ValueError(f"temperatures must be positive and finite, got {t.tolist()}")
    return _sigmoid(_logit(values) / t)


@checked
@dataclass(frozen=True)
class SequentialTemperatures:
    """One temperature per slot of the block (DSpark's STS, arXiv 2607.05147).

    A scheduler multiplies the confidences of a block. So the temperatures are found from left to
    right: slot k's makes the product of the calibrated confidences up to k agree best with the
    survival of slots 0 to k, while the temperatures before it stay as they were found.
    """

    temperatures: tuple[Positive, ...]

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ValueError("temperatures must hold one or more numbers, got none")

    @classmethod
    @checked
    def fit(
        cls,
        confidence: ArrayLike,
        outcome: ArrayLike,
        *,
        otherwise: Positive | None = None,
        grid: ArrayLike = TEMPERATURE_GRID,
        bins: Count = 15,
        binning: Binning = "width",
    ) -> SequentialTemperatures:
        """Search ``grid`` for each slot, left to right, for the least expected calibration error.

        Among equally good temperatures the one nearest to 1 is taken. Prefer 0/1 outcomes, unless
        all slots are known: with accept rates the rounds that count at slot k are those that
        reached it, which favours states where the earlier rates were high; a head that is right on
        average then looks too careful.

        Args:
            confidence: ``[round, slot]``; NaN where the round has no such slot.
            outcome: ``[round, slot]``, as :meth:`Rounds.outcome` returns it.
            otherwise: the temperature of non-identifiable slots: with fewer known rounds than bins,
                or a survival that is 0 in all of them, or 1 in all. An error where None.
            grid: temperatures to choose from; the lowest or highest as a choice is warned of.
        """
        f, survival = _confidence_and_survival(confidence, outcome)
        choices = _nearest_to_1_first(grid)
        fixed = non_identifiable_slots(f, survival, bins)
        if fixed and otherwise is None:
            slot, reason = next(iter(fixed.items()))
            raise ValueError(f"slot {slot}: {reason}; fit on more rounds or on fewer slots")
        start = np.full(f.shape[1], otherwise, dtype=np.float64)
        found = search(f, survival, np.ones(len(f)), start, fixed, choices, bins, binning)
        ends = (choices.min(), choices.max()) if len(choices) > 2 else ()
        for slot, best in enumerate(found):
            if slot not in fixed and best in ends:
                words = f"slot {slot}: the best temperature, {best:.3g}, is at the end of the grid"
                warnings.warn(words, stacklevel=_level_of_caller())
        return cls(tuple(found.tolist()))

    @classmethod
    def fit_trace(cls, trace: pd.DataFrame | Rounds, **options: Any) -> SequentialTemperatures:
        """:meth:`fit` on a trace's confidences and on what was accepted; ``options`` as there."""
        rounds = rounds_of(trace)
        return cls.fit(rounds.confidence, rounds.outcome(), **options)

    def apply(self, confidence: ArrayLike) -> Float[np.ndarray, "... slot"]:
        """Return calibrated confidences of blocks that are not longer than those fitted."""
        values = as_numbers("confidence", confidence)
        return temperature_scale(values, self.of_block(values))

    @checked
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``calibration.json`` into a drafter's folder, whole or not at all."""
        place = Path(folder)
        if not place.is_dir():
            raise ValueError(f"folder must be an existing folder, got {place}")
        values = {"method": _METHOD, "temperatures": list(self.temperatures)}
        write_json(place / CALIBRATION, values)

    @classmethod
    @checked
    def load(cls, folder: str | os.PathLike[str]) -> SequentialTemperatures:
        """Read the ``calibration.json`` that :meth:`save` wrote."""
        path = Path(folder) / CALIBRATION
        values = read_json(path)
        if values.get("method") != _METHOD:
            raise ValueError(f"{path} must be of method {_METHOD!r}, got {values.get('method')!r}")
        if not isinstance(values.get("temperatures"), list):
            raise ValueError(f"{path} must list temperatures, got {values.get('temperatures')!r}")
        try:
            return cls(tuple(values["temperatures"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no sequential temperatures: {error}") from None

    def of_block(self, values: Float[np.ndarray, "... slot"]) -> Float[np.ndarray, " slot"]:
        """The temperatures of the slots of ``values``."""
        slots = values.shape[-1] if values.ndim else 0
        most = len(self.temperatures)
        if not 0 < slots <= most:
            raise ValueError(f"the last axis must be 1 to {most} slots, got shape {values.shape}")
        return np.asarray(self.temperatures[:slots])


@checked
def online_temperatures(
    confidence: ArrayLike,
    outcome: ArrayLike,
    *,
    half_life: Positive,
    every: Count = 50,
    start: SequentialTemperatures | None = None,
    grid: ArrayLike = COARSE_GRID,
    bins: Count = 15,
) -> Chance:
    """Return the temperatures in force at each round, which follow the traffic.

    Every ``every`` rounds all temperatures are found anew, as in :class:`SequentialTemperatures`,
    on the rounds before alone, where a round that lies h rounds back weighs 0.5 ** (h / half_life);
    rounds more than ten half lives back are left out. A slot that is not identifiable yet keeps its
    temperature, at first that of ``start``, or 1.
    """
    f, survival = _confidence_and_survival(confidence, outcome)
    choices = _nearest_to_1_first(grid)
    current = np.ones(f.shape[1]) if start is None else start.of_block(f)
    temperatures = np.empty_like(f)
    # More rounds than there are make no difference, and an int has a largest half life.
    span = int(min(np.ceil(10 * half_life), len(f)))
    for now in range(0, len(f), every):
        window = np.arange(max(0, now - span), now)
        weights = 0.5 ** ((now - 1 - window) / half_life)
        seen = f[window], survival[window]
        fixed = non_identifiable_slots(*seen, bins)
        current = search(*seen, weights, current, fixed, choices, bins, "width")
        temperatures[now : now + every] = current
    return temperatures


def disjoint_rounds(
    fit: pd.DataFrame | Rounds, *others: pd.DataFrame | Rounds
) -> tuple[Rounds, ...]:
    """Return the rounds of each trace; refuse another one that has a prompt of ``fit``."""
    first, *rest = map(rounds_of, (fit, *others))
    for other in rest:
        shared = np.intersect1d(first.prompt, other.prompt)
        if len(shared):
            raise ValueError(
                f"fit and test must have no prompt in common, got {len(shared)}, as {shared[0]}; "
                "cut one trace with split_prompts, or number the prompts of two runs apart"
            )
    return first, *rest


@checked
def fit_identifiable_slots(rounds: Rounds, **options: Any) -> SequentialTemperatures:
    """:meth:`SequentialTemperatures.fit` without warnings; other slots keep their confidences."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is at the end of the grid")
        return SequentialTemperatures.fit_trace(rounds, otherwise=1.0, **options)


@checked
def non_identifiable_slots(confidence: Chance, survival: Chance, min_rounds: int) -> dict[int, str]:
    """Return the slots whose temperature the rounds cannot determine, each with the reason."""
    reasons = {}
    for slot, known in enumerate(_known(confidence, survival).T):
        seen = survival[known, slot]
        if len(seen) < min_rounds:
            reasons[slot] = f"{len(seen)} rounds with a known survival, {min_rounds} are needed"
        elif (seen == seen[0]).all() and seen[0] in (0, 1):
            reasons[slot] = f"survival is {seen[0]:.0f} in all of its {len(seen)} rounds"
    return reasons


def search(
    f: Chance,
    survival: Chance,
    weights: Float[np.ndarray, " round"],
    start: Float[np.ndarray, " slot"],
    fixed: Container[int],
    choices: Float[np.ndarray, " choice"],
    bins: int,
    binning: Binning,
) -> Float[np.ndarray, " slot"]:
    """New temperatures, left to right; those of ``fixed`` slots stay as in ``start``.

    A slot takes the first of ``choices`` whose product up to the slot has the least error.
    """
    found = start.copy()
    product = np.ones(len(f))
    for slot, known in enumerate(_known(f, survival).T):
        logit = _logit(f[:, slot])
        if slot not in fixed:
            before, own, seen = product[known], logit[known], survival[known, slot]
            errors = [
                binned_error(before * _sigmoid(own / t), seen, bins, binning, weights[known])
                for t in choices
            ]
            found[slot] = choices[np.argmin(errors)]
        product = product * _sigmoid(logit / found[slot])
    return found


def _level_of_caller() -> int:
    """The stack level, seen from the function that calls this, of the code outside the library."""
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level


def _known(confidence: Chance, survival: Chance) -> Bool[np.ndarray, "round slot"]:
    """Where both the survival up to a slot and all confidences up to it are known."""
    return ~np.isnan(survival) & ~np.isnan(np.cumsum(confidence, axis=1))


def _logit(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    with np.errstate(divide="ignore"):
        return np.log(p) - np.log1p(-p)


def _sigmoid(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _confidence_and_survival(confidence: ArrayLike, outcome: ArrayLike) -> tuple[Chance, Chance]:
    f, o = as_numbers("confidence", confidence), as_numbers("outcome", outcome)
    for name, values in (("confidence", f), ("outcome", o)):
        if values.ndim != 2 or values.size == 0:
            wanted = "[round, slot] with one or more of both"
            raise ValueError(f"{name} must be {wanted}, got shape {values.shape}")
        require_range(name, values)
    if f.shape != o.shape:
        raise ValueError(f"confidence and outcome must have one shape, got {f.shape} and {o.shape}")
    return f, prefix_survival(o)


def _nearest_to_1_first(grid: ArrayLike) -> Float[np.ndarray, " choice"]:
    """The temperatures to choose from, so that the first minimum is the mildest."""
    values = as_numbers("grid", grid)
    if values.ndim != 1 or len(values) == 0 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"grid must be one or more positive temperatures, got {grid!r}")
    return values[np.argsort(np.abs(np.log(values)), kind="stable")]
