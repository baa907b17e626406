"""One temperature per slot of the block: found, applied, saved, and followed over time.

This file knows arrays of confidences and of what came of them, and where a trace holds the two; it
knows nothing about models, nor about what calibrated confidences are good for.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from dspark_lab.checks import require_int, require_number
from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.files import written_whole
from dspark_lab.model import CALIBRATION
from dspark_lab.rates.scores import (
    Binning,
    as_numbers,
    binned_error,
    require_binning,
    require_range,
)
from dspark_lab.rates.survival import prefix_survival

__all__ = [
    "TEMPERATURE_GRID",
    "SequentialTemperatures",
    "disjoint_rounds",
    "fit_identifiable_slots",
    "non_identifiable_slots",
    "online_temperatures",
    "temperature_scale",
]

_METHOD = "sequential_temperature_scaling"

# From 1/5 to 5 in steps of 2 %, with 1 itself in the middle.
TEMPERATURE_GRID = tuple(np.exp(np.linspace(-np.log(5), np.log(5), 163)).tolist())
COARSE_GRID = TEMPERATURE_GRID[::3]


def temperature_scale(confidence: ArrayLike, temperatures: ArrayLike) -> Float[np.ndarray, "..."]:
    """sigmoid(logit(confidence) / temperature), entry by entry (Guo et al. 2017, section 4.2).

    A temperature above 1 draws confidences towards 1/2. Their order under one temperature is kept;
    0, 1 and NaN stay what they are.

    Args:
        confidence: ``[..., slot]``, probabilities; NaN where there is none.
        temperatures: that broadcast against it, such as ``[slot]`` or ``[round, slot]``; above 0.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: probabilities outside [0, 1]; temperatures that are not positive and finite.
    """
    values = as_numbers("confidence", confidence)
    require_range("confidence", values)
    t = as_numbers("temperatures", temperatures)
    if not (np.isfinite(t) & (t > 0)).all():
        raise ValueError(f"temperatures must be positive and finite, got {t.tolist()}")
    return _sigmoid(_logit(values) / t)


@dataclass(frozen=True)
class SequentialTemperatures:
    """One temperature per slot of the block (DSpark's STS, arXiv 2607.05147).

    A scheduler multiplies the confidences of a block, so what has to be right is their product up
    to each slot. The temperatures are found from left to right: slot k's is the one that makes the
    product of the calibrated confidences up to k agree best with the survival of slots 0 to k,
    while the temperatures before it stay as they were found.
    """

    temperatures: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.temperatures, tuple) or not self.temperatures:
            raise TypeError(f"temperatures must be a tuple of numbers, got {self.temperatures!r}")
        for value in self.temperatures:
            _require_temperature("each temperature", value)

    @classmethod
    def fit(
        cls,
        confidence: Float[np.ndarray, "round slot"],
        outcome: Float[np.ndarray, "round slot"],
        *,
        otherwise: float | None = None,
        grid: Sequence[float] = TEMPERATURE_GRID,
        bins: int = 15,
        binning: Binning = "width",
    ) -> SequentialTemperatures:
        """Searches ``grid`` for each slot, left to right, for the least expected calibration error.

        Of equally good temperatures the one nearest to 1 is taken. Rounds whose survival up to a
        slot is unknown are left out there; a rejected slot settles all slots behind it.

        With accept rates as outcomes (products of c* over reached slots) the rounds that count at
        slot k are those that reached it, which favours states where the earlier rates were high; a
        head that is right on average then looks too careful. Prefer 0/1 outcomes, and leave rates
        to fully known blocks.

        Args:
            confidence: NaN where the round has no such slot.
            outcome: 0/1 or accept rates; NaN where the slot was not reached. As
                :meth:`Rounds.outcome` returns it.
            otherwise: the temperature of slots that none can be told for; an error where None. With
                1 they keep their confidences.
            grid: temperatures to choose from. A warning is given where the choice is its lowest or
                highest, which says that the grid is too narrow or the sample too small.
            bins, binning: of the calibration error.

        Raises:
            TypeError: what is no array of numbers.
            ValueError: probabilities outside [0, 1], shapes that differ, temperatures that are not
                positive and finite, or, without ``otherwise``, a slot that no temperature can be
                told for: fewer known rounds than bins, or a survival that is 0 in all of them, or 1
                in all.
        """
        return _warned(
            *_fit(confidence, outcome, otherwise=otherwise, grid=grid, bins=bins, binning=binning)
        )

    @classmethod
    def fit_trace(cls, trace: pd.DataFrame | Rounds, **options: Any) -> SequentialTemperatures:
        """:meth:`fit` on a trace's confidences and on what was accepted; ``options`` as there.

        Raises:
            TypeError, ValueError: as :func:`rounds_of` and :meth:`fit`.
        """
        rounds = rounds_of(trace)
        return _warned(*_fit(rounds.confidence, rounds.outcome(), **options))

    def apply(self, confidence: ArrayLike) -> Float[np.ndarray, "... slot"]:
        """Calibrated confidences of ``[..., slot]`` ones, in the same order within each slot.

        The block may be shorter than the one that was fitted. NaN stays NaN.

        Raises:
            TypeError, ValueError: as :func:`temperature_scale`, or more slots than temperatures.
        """
        values = as_numbers("confidence", confidence)
        return temperature_scale(values, self._for(values))

    def apply_logits(self, logits: ArrayLike) -> Float[np.ndarray, "... slot"]:
        """The same from the confidence head's logits: sigmoid(logit / temperature)."""
        values = as_numbers("logits", logits)
        return _sigmoid(values / self._for(values))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``calibration.json`` into a drafter's folder, all of it or nothing.

        Raises:
            ValueError: ``folder`` is no folder.
            OSError: it cannot be written.
        """
        place = Path(folder)
        if not place.is_dir():
            raise ValueError(f"folder must be an existing folder, got {place}")
        text = json.dumps({"method": _METHOD, "temperatures": list(self.temperatures)}, indent=2)
        with written_whole(place / CALIBRATION) as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SequentialTemperatures:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder holds no ``calibration.json``.
            ValueError: the file is not of this method, or its temperatures are none.
        """
        path = Path(folder) / CALIBRATION
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["method"] != _METHOD:
                raise ValueError(f"method must be {_METHOD!r}, got {values['method']!r}")
            return cls(tuple(values["temperatures"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no sequential temperatures: {error!r}") from None

    def _for(self, values: np.ndarray) -> np.ndarray:
        slots = values.shape[-1] if values.ndim else 0
        if not 0 < slots <= len(self.temperatures):
            raise ValueError(
                f"the last axis must be 1 to {len(self.temperatures)} slots, as many as there are "
                f"temperatures, got shape {values.shape}"
            )
        return np.asarray(self.temperatures[:slots])


def online_temperatures(
    confidence: Float[np.ndarray, "round slot"],
    outcome: Float[np.ndarray, "round slot"],
    *,
    half_life: float,
    every: int = 50,
    start: SequentialTemperatures | None = None,
    min_rounds: int | None = None,
    grid: Sequence[float] = COARSE_GRID,
    bins: int = 15,
) -> Float[np.ndarray, "round slot"]:
    """Sequential temperature scaling that follows the traffic: recent rounds weigh more.

    Every ``every`` rounds all temperatures are found anew, left to right, on the rounds before,
    where a round that lies h rounds back weighs 0.5 ** (h / half_life); rounds more than ten half
    lives back are left out. So the temperatures of a round never come from that round or a later
    one, and calibration errors measured with them are honest. A slot that cannot be told yet (fewer
    known rounds than ``min_rounds``, or survival of one class) keeps its temperature.

    Args:
        confidence, outcome: as in :meth:`SequentialTemperatures.fit`, rounds in order of time.
        half_life: in rounds.
        every: rounds between two searches.
        start: temperatures to begin with; 1 where None.
        min_rounds: to search a slot's temperature; ``bins`` where None.
        grid: coarser than the offline one, since the window is short.
        bins: of equal width.

    Returns:
        the temperatures in force at each round; :func:`temperature_scale` applies them.

    Raises:
        TypeError, ValueError: as :meth:`SequentialTemperatures.fit`, a half life that is not
            positive, or a start with fewer slots.
    """
    f, survival = _round_arrays(confidence, outcome)
    require_number("half_life", half_life)
    if not (np.isfinite(half_life) and half_life > 0):
        raise ValueError(f"half_life must be positive and finite, got {half_life}")
    require_int("every", every, 1)
    require_binning(bins, "width")
    enough = bins if min_rounds is None else min_rounds
    require_int("min_rounds", enough, 1)
    choices = _checked_grid(grid)
    current = np.ones(f.shape[1]) if start is None else start._for(f)
    temperatures = np.empty_like(f)
    span = int(np.ceil(10 * half_life))
    for now in range(0, len(f), every):
        window = slice(max(0, now - span), now)
        age = now - 1 - np.arange(window.start, now)
        recent, lived = f[window], survival[window]
        unidentified = non_identifiable_slots(recent, lived, enough)
        weights = 0.5 ** (age / half_life)
        current = _search(recent, lived, weights, current, unidentified, choices, bins, "width")
        temperatures[now : now + every] = current
    return temperatures


def disjoint_rounds(
    fit: pd.DataFrame | Rounds, *others: pd.DataFrame | Rounds
) -> tuple[Rounds, ...]:
    """The rounds of each trace; refused where another one has a prompt of ``fit``."""
    first, *rest = map(rounds_of, (fit, *others))
    for other in rest:
        shared = np.intersect1d(first.prompt, other.prompt)
        if len(shared):
            raise ValueError(
                f"fit and test must have no prompt in common, got {len(shared)} in both, such as "
                f"{shared[0]}; cut one trace with split_prompts, or number the prompts of two runs "
                "apart"
            )
    return first, *rest


def fit_identifiable_slots(rounds: Rounds, **options: Any) -> SequentialTemperatures:
    """A fit for a table: without warnings, and with 1 where no temperature can be told."""
    scaling, _ = _fit(rounds.confidence, rounds.outcome(), otherwise=1.0, **options)
    return scaling


def non_identifiable_slots(
    confidence: Float[np.ndarray, "round slot"],
    survival: Float[np.ndarray, "round slot"],
    enough: int,
) -> dict[int, str]:
    """The slots that no temperature can be told for, each with the reason."""
    reasons = {}
    for slot, known in enumerate(_known(confidence, survival).T):
        lived = survival[known, slot]
        if len(lived) < enough:
            reasons[slot] = f"{len(lived)} rounds with a known survival, {enough} are needed"
        elif (lived == lived[0]).all() and lived[0] in (0, 1):
            reasons[slot] = f"survival is {lived[0]:.0f} in all of its {len(lived)} rounds"
    return reasons


def _fit(
    confidence: Float[np.ndarray, "round slot"],
    outcome: Float[np.ndarray, "round slot"],
    *,
    otherwise: float | None = None,
    grid: Sequence[float] = TEMPERATURE_GRID,
    bins: int = 15,
    binning: Binning = "width",
) -> tuple[SequentialTemperatures, list[str]]:
    """What :meth:`SequentialTemperatures.fit` finds, and what there is to warn of."""
    f, survival = _round_arrays(confidence, outcome)
    require_binning(bins, binning)
    choices = _checked_grid(grid)
    if otherwise is not None:
        _require_temperature("otherwise", otherwise)
    unidentified = non_identifiable_slots(f, survival, bins)
    if unidentified and otherwise is None:
        slot, reason = next(iter(unidentified.items()))
        raise ValueError(f"slot {slot}: {reason}; fit on more rounds or on fewer slots")
    weights = np.ones(len(f))
    start = np.full(f.shape[1], otherwise, dtype=np.float64)
    found = _search(f, survival, weights, start, unidentified, choices, bins, binning)
    ends = (choices.min(), choices.max()) if len(choices) > 2 else ()
    messages = [
        f"slot {slot}: the best temperature, {best:.3g}, is at the end of the grid"
        for slot, best in enumerate(found)
        if slot not in unidentified and best in ends
    ]
    return SequentialTemperatures(tuple(found.tolist())), messages


def _warned(scaling: SequentialTemperatures, messages: list[str]) -> SequentialTemperatures:
    """The scaling, after a warning to whoever called the method that calls this."""
    for message in messages:
        warnings.warn(message, stacklevel=3)
    return scaling


def _search(
    f: Float[np.ndarray, "round slot"],
    survival: Float[np.ndarray, "round slot"],
    weights: Float[np.ndarray, " round"],
    start: Float[np.ndarray, " slot"],
    unidentified: Container[int],
    choices: Float[np.ndarray, " choice"],
    bins: int,
    binning: str,
) -> Float[np.ndarray, " slot"]:
    """New temperatures, left to right; slots that none can be told for keep that of ``start``.

    A slot's is the first of ``choices`` whose product up to the slot has the least error.
    """
    found = start.copy()
    product = np.ones(len(f))
    for slot, known in enumerate(_known(f, survival).T):
        logit = _logit(f[:, slot])
        if slot not in unidentified:
            before, own, lived, weight = (
                values[known] for values in (product, logit, survival[:, slot], weights)
            )
            errors = [
                binned_error(before * _sigmoid(own / t), lived, bins, binning, weight)
                for t in choices
            ]
            found[slot] = choices[np.argmin(errors)]
        product = product * _sigmoid(logit / found[slot])
    return found


def _known(
    confidence: Float[np.ndarray, "round slot"], survival: Float[np.ndarray, "round slot"]
) -> Bool[np.ndarray, "round slot"]:
    """Where both the survival up to a slot and all confidences up to it are known."""
    return ~np.isnan(survival) & ~np.isnan(np.cumsum(confidence, axis=1))


def _require_temperature(name: str, value: float) -> None:
    require_number(name, value)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _logit(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(p) - np.log1p(-p)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _round_arrays(confidence: ArrayLike, outcome: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and survival, both ``[round, slot]``."""
    f, o = as_numbers("confidence", confidence), as_numbers("outcome", outcome)
    for name, values in (("confidence", f), ("outcome", o)):
        if values.ndim != 2 or values.size == 0:
            raise ValueError(
                f"{name} must be [round, slot] with one or more of both, got shape {values.shape}"
            )
        require_range(name, values)
    if f.shape != o.shape:
        raise ValueError(f"confidence and outcome must have one shape, got {f.shape} and {o.shape}")
    return f, prefix_survival(o)


def _checked_grid(grid: Sequence[float]) -> np.ndarray:
    """Its temperatures, nearest to 1 first, so that the first minimum is the mildest."""
    values = as_numbers("grid", grid)
    if values.ndim != 1 or len(values) == 0 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"grid must be one or more positive temperatures, got {grid!r}")
    return values[np.argsort(np.abs(np.log(values)), kind="stable")]
