"""Whether a confidence means what it says, how to repair it, and what a better one would be worth.

A confidence is a predicted probability that a drafted slot is accepted, given that all slots before
it in its round were. Its outcome is either *empirical* (accepted, 0 or 1) or *analytic*: the accept
rate c* = sum_v min(p_draft, p_target), a probability itself. Both are defined on *reached* slots
only: verified, and every earlier slot of the round accepted.

This file knows arrays of probabilities and the trace of a decoding run, a table with one row for
each drafted slot. It runs no model: everything here replays a trace or counts on it.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import ArrayLike

from dspark_lab.checks import require_int, require_number

__all__ = [
    "CALIBRATION",
    "TEMPERATURE_GRID",
    "Brier",
    "Rounds",
    "SequentialTemperatures",
    "auroc",
    "brier",
    "calibration_report",
    "drift_table",
    "expected_calibration_error",
    "gain_table",
    "online_temperatures",
    "prefix_survival",
    "reliability_table",
    "rounds_of",
    "split_prompts",
    "study",
    "temperature_scale",
    "threshold_sweep",
]

Binning = Literal["width", "mass"]
Outcome = Literal["empirical", "analytic"]

# Beside a drafter's config.json.
CALIBRATION = "calibration.json"
_METHOD = "sequential_temperature_scaling"

# From 1/5 to 5 in steps of 2 %, with 1 itself in the middle.
TEMPERATURE_GRID = tuple(np.exp(np.linspace(-np.log(5), np.log(5), 163)).tolist())
_COARSE_GRID = TEMPERATURE_GRID[::3]

_THRESHOLDS = tuple(np.linspace(0, 1, 201).tolist())

_COLUMNS = (
    "prompt",
    "domain",
    "round",
    "slot",
    "accept_rate",
    "confidence",
    "verified",
    "accepted",
)


def reliability_table(
    confidence: ArrayLike,
    outcome: ArrayLike,
    bins: int = 15,
    binning: Binning = "width",
    *,
    min_count: int = 1,
) -> pd.DataFrame:
    """Mean confidence beside mean outcome, bin by bin: the numbers of a reliability diagram.

    Bins of equal *width* cut [0, 1] evenly. Bins of equal *mass* are cut at the quantiles of the
    confidences (linear interpolation), so that each holds about as many samples; where many
    confidences are equal, neighbouring cuts coincide and bins stay empty. A confidence on a cut
    belongs to the bin below it. Definition: Guo et al. 2017, section 2.

    Args:
        confidence: ``[sample]``, probabilities.
        outcome: ``[sample]``, 0 or 1, or accept rates in between.
        bins: how many.
        binning: ``"width"`` or ``"mass"``.
        min_count: bins with fewer samples than this keep their count, but no means.

    Returns:
        one row per bin, ascending, empty ones too: ``low`` and ``high`` (bounds of the bin),
        ``count``, ``confidence`` and ``outcome`` (means, NaN where undefined), and ``gap``,
        confidence minus outcome: positive where the head is overconfident.

    Raises:
        TypeError: what is no array of numbers, or an int that is none.
        ValueError: probabilities outside [0, 1] or NaN, arrays that are empty or of different
            length, another binning, or fewer samples than bins of equal mass.
    """
    f, o = _pairs(confidence, outcome)
    _require_binning(bins, binning)
    require_int("min_count", min_count, 1)
    if binning == "mass" and len(f) < bins:
        raise ValueError(
            f"{bins} bins of equal mass need at least as many samples, got {len(f)}; "
            "take fewer bins"
        )
    edges = _edges(f, bins, binning)
    group = _bin(f, edges)
    count = np.bincount(group, minlength=bins)
    known = count >= min_count
    mean_f = _ratio(np.bincount(group, f, bins), count, known)
    mean_o = _ratio(np.bincount(group, o, bins), count, known)
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "count": count,
            "confidence": mean_f,
            "outcome": mean_o,
            "gap": mean_f - mean_o,
        }
    )


def expected_calibration_error(
    confidence: ArrayLike, outcome: ArrayLike, bins: int = 15, binning: Binning = "width"
) -> float:
    """Mean over samples of their bin's \\|mean confidence - mean outcome\\| (Guo et al. 2017).

    Between 0 and 1. A finite sample of a perfectly calibrated head has a positive error too, the
    more so the fewer samples a bin holds: compare numbers of like sample sizes.

    Returns:
        the error; NaN, which is undefined, where there are fewer samples than bins.

    Raises:
        TypeError, ValueError: as :func:`reliability_table`.
    """
    f, o = _pairs(confidence, outcome)
    _require_binning(bins, binning)
    return _ece(f, o, bins, binning) if len(f) >= bins else float("nan")


@dataclass(frozen=True)
class Brier:
    """A Brier score and its parts: ``score = reliability - resolution + uncertainty + within``."""

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


def brier(
    confidence: ArrayLike,
    outcome: ArrayLike,
    bins: int | None = None,
    binning: Binning = "width",
) -> Brier:
    """Mean squared distance of confidence and outcome, and what it is made of (Murphy 1973).

    Samples are put in groups: one for each distinct confidence where ``bins`` is None, else the
    bins of :func:`reliability_table`. With f and o the group's means and w its share of samples:
    ``reliability`` is the sum of w (f - o)^2, ``resolution`` the sum of w (o - mean outcome)^2, and
    ``uncertainty`` the variance of the outcomes, which is m (1 - m) where they are 0 or 1 with mean
    m. ``within`` is what binning hides: the variance of the confidences within their groups less
    twice their covariance with the outcomes there; 0 for groups of one distinct confidence. The
    parts add up to the score for any grouping, but for rounding.

    Raises:
        TypeError, ValueError: as :func:`reliability_table`.
    """
    f, o = _pairs(confidence, outcome)
    if bins is None:
        group = np.unique(f, return_inverse=True)[1]
    else:
        _require_binning(bins, binning)
        group = _bin(f, _edges(f, bins, binning))
    count = np.bincount(group)
    mean_f = _ratio(np.bincount(group, f), count, count > 0)[group]
    mean_o = _ratio(np.bincount(group, o), count, count > 0)[group]
    apart = f - mean_f
    return Brier(
        score=float(np.mean((f - o) ** 2)),
        reliability=float(np.mean((mean_f - mean_o) ** 2)),
        resolution=float(np.mean((mean_o - o.mean()) ** 2)),
        uncertainty=float(np.var(o)),
        within=float(np.mean(apart**2) - 2 * np.mean(apart * (o - mean_o))),
    )


def auroc(confidence: ArrayLike, outcome: ArrayLike) -> float:
    """The chance that an accepted slot has a higher confidence than a rejected one; ties count 1/2.

    Exact, from the counts at each distinct confidence (the Mann-Whitney statistic with average
    ranks). An outcome between 0 and 1 counts as that share of an accepted slot and the rest of a
    rejected one, both with the same confidence.

    Returns:
        the area under the ROC curve; NaN, which is undefined, where all outcomes are 0 or all 1.

    Raises:
        TypeError, ValueError: as :func:`reliability_table`.
    """
    f, o = _pairs(confidence, outcome)
    group = np.unique(f, return_inverse=True)[1]
    accepted, rejected = np.bincount(group, o), np.bincount(group, 1 - o)
    pairs = accepted.sum() * rejected.sum()
    if pairs == 0:
        return float("nan")
    below = np.cumsum(rejected) - rejected
    return float((accepted * (below + rejected / 2)).sum() / pairs)


@dataclass(frozen=True, eq=False)
class Rounds:
    """A trace as arrays, one row for each round, ordered by prompt and round.

    ``confidence``: NaN where the round has no such slot. ``accept_rate``: the analytic rate, NaN
    where not verified. ``verified`` and ``accepted``: each a prefix of the round. ``prompt`` and
    ``domain``: of the round's conversation. Made by :func:`rounds_of`.
    """

    confidence: Float[np.ndarray, "round slot"]
    accept_rate: Float[np.ndarray, "round slot"]
    verified: Bool[np.ndarray, "round slot"]
    accepted: Bool[np.ndarray, "round slot"]
    prompt: Shaped[np.ndarray, " round"]
    domain: Shaped[np.ndarray, " round"]

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def reached(self) -> Bool[np.ndarray, "round slot"]:
        """Verified, and all slots before it accepted."""
        reached = self.verified.copy()
        reached[:, 1:] &= self.accepted[:, :-1]
        return reached

    def outcome(self, kind: Outcome = "empirical") -> Float[np.ndarray, "round slot"]:
        """What became of each reached slot, NaN elsewhere: accepted or not, or its accept rate."""
        _require_outcome(kind)
        values = self.accepted.astype(np.float64) if kind == "empirical" else self.accept_rate
        return np.where(self.reached, values, np.nan)

    def pairs(
        self, slot: int | None = None, kind: Outcome = "empirical"
    ) -> tuple[Float[np.ndarray, " sample"], Float[np.ndarray, " sample"]]:
        """Confidence and outcome of all reached slots, or of those at one place in the block."""
        outcome = self.outcome(kind)
        taken = ~np.isnan(outcome)
        if slot is not None:
            require_int("slot", slot, 0)
            if slot >= outcome.shape[1]:
                raise ValueError(f"slot must be below {outcome.shape[1]}, got {slot}")
            taken[:, np.arange(outcome.shape[1]) != slot] = False
        return self.confidence[taken], outcome[taken]

    def take(self, rows: Shaped[np.ndarray, " row"]) -> Rounds:
        """Some of the rounds: by a mask or by indices, in that order."""
        return Rounds(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def rounds_of(trace: pd.DataFrame) -> Rounds:
    """Reads the trace of one decoding run; the order of its rows makes no difference.

    Args:
        trace: one row for each drafted slot, with the columns ``prompt``, ``domain``, ``round``,
            ``slot``, ``accept_rate``, ``confidence``, ``verified`` and ``accepted``.

    Raises:
        TypeError: no DataFrame.
        ValueError: no rows, a missing column, two rows for one slot, slots of a round that are not
            0, 1, 2, ..., an accepted slot that was not verified or follows a rejected one, a
            confidence that is missing (a drafter without a confidence head), a verified slot
            without an accept rate, or probabilities outside [0, 1].
    """
    frame = _sorted_trace(trace)
    _probabilities("confidence", frame["confidence"])
    first = frame["slot"].to_numpy() == 0
    where = (np.cumsum(first) - 1, frame["slot"].to_numpy())
    shape = (int(first.sum()), int(frame["slot"].max()) + 1)

    def spread(name: str, empty: float | bool) -> np.ndarray:
        array = np.full(shape, empty)
        array[where] = frame[name].to_numpy()
        return array

    return Rounds(
        confidence=spread("confidence", np.nan),
        accept_rate=np.where(spread("verified", False), spread("accept_rate", np.nan), np.nan),
        verified=spread("verified", False),
        accepted=spread("accepted", False),
        prompt=frame["prompt"].to_numpy()[first],
        domain=frame["domain"].to_numpy(dtype=object)[first],
    )


def prefix_survival(outcome: Float[np.ndarray, "round slot"]) -> Float[np.ndarray, "round slot"]:
    """Whether (or how likely) all slots up to each one were accepted: the product of outcomes.

    Once an outcome is 0 the product is 0, whatever is unknown (NaN) beyond it; otherwise it is NaN
    from the first unknown outcome on.
    """
    dead = np.logical_or.accumulate(outcome == 0, axis=1)
    return np.where(dead, 0.0, np.cumprod(outcome, axis=1))


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
    values = _numbers("confidence", confidence)
    _require_range("confidence", values[~np.isnan(values)])
    t = _numbers("temperatures", temperatures)
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
            require_number("each temperature", value)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"each temperature must be positive and finite, got {value}")

    @classmethod
    def fit(
        cls,
        confidence: Float[np.ndarray, "round slot"],
        outcome: Float[np.ndarray, "round slot"],
        *,
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
            grid: temperatures to choose from. A warning is given where the choice is its lowest or
                highest, which says that the grid is too narrow or the sample too small.
            bins, binning: of the calibration error.

        Raises:
            TypeError: what is no array of numbers.
            ValueError: probabilities outside [0, 1], shapes that differ, or a slot that no
                temperature can be told for: fewer known rounds than bins, or a survival that is 0
                in all of them, or 1 in all.
        """
        f, survival = _round_arrays(confidence, outcome)
        _require_binning(bins, binning)
        choices = _checked_grid(grid)
        found: list[float] = []
        product = np.ones(len(f))
        for slot in range(f.shape[1]):
            known = ~np.isnan(survival[:, slot]) & ~np.isnan(product * f[:, slot])
            problem = _not_identified(survival[known, slot], bins)
            if problem:
                raise ValueError(f"slot {slot}: {problem}; fit on more rounds or on fewer slots")
            best = _best_temperature(
                product[known], f[known, slot], survival[known, slot], choices, bins, binning
            )
            if best in (choices.min(), choices.max()) and len(choices) > 2:
                warnings.warn(
                    f"slot {slot}: the best temperature, {best:.3g}, is at the end of the grid",
                    stacklevel=2,
                )
            found.append(best)
            product = product * _sigmoid(_logit(f[:, slot]) / best)
        return cls(tuple(found))

    def apply(self, confidence: ArrayLike) -> Float[np.ndarray, "... slot"]:
        """Calibrated confidences of ``[..., slot]`` ones, in the same order within each slot.

        The block may be shorter than the one that was fitted. NaN stays NaN.

        Raises:
            TypeError, ValueError: as :func:`temperature_scale`, or more slots than temperatures.
        """
        values = _numbers("confidence", confidence)
        return temperature_scale(values, self._for(values))

    def apply_logits(self, logits: ArrayLike) -> Float[np.ndarray, "... slot"]:
        """The same from the confidence head's logits: sigmoid(logit / temperature)."""
        values = _numbers("logits", logits)
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
        handle, name = tempfile.mkstemp(prefix=f".{CALIBRATION}.", dir=place)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.chmod(name, 0o644)
            os.replace(name, place / CALIBRATION)
        except BaseException:
            os.unlink(name)
            raise

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


def split_prompts(
    trace: pd.DataFrame, share: float = 0.5, *, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cuts a trace in two by conversation: to fit on, and to report on.

    Conversations are drawn at random within each domain, ``share`` of them (rounded to whole ones)
    for fitting. The draw follows from the seed and the prompt numbers, not from the rows' order.

    Raises:
        TypeError, ValueError: no trace, a share not between 0 and 1, or too few conversations for
            both sides to have one.
    """
    if not isinstance(trace, pd.DataFrame):
        raise TypeError(f"trace must be a DataFrame, got {type(trace).__name__}")
    require_number("share", share)
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    _require_columns(trace, ("prompt", "domain"))
    rng = np.random.default_rng(seed)
    chosen: list[np.ndarray] = []
    for _, part in trace.groupby("domain", sort=True, dropna=False):
        prompts = np.sort(part["prompt"].unique())
        chosen.append(rng.permutation(prompts)[: round(share * len(prompts))])
    fitted = trace["prompt"].isin(np.concatenate(chosen) if chosen else [])
    fit, test = trace[fitted], trace[~fitted]
    if fit.empty or test.empty:
        raise ValueError(
            f"share {share} of {trace['prompt'].nunique()} conversations leaves one side empty"
        )
    return fit, test


def calibration_report(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    outcome: Outcome = "empirical",
    bins: int = 15,
    binning: Binning = "width",
    grid: Sequence[float] = TEMPERATURE_GRID,
) -> pd.DataFrame:
    """How well calibrated each slot is before and after scaling, on conversations not fitted on.

    Temperatures are found on the accepted slots of ``fit``; every figure is of ``test``.

    Args:
        fit, test: traces of one drafter without a prompt in common, as from :func:`split_prompts`.
        outcome: what confidences are compared with in ``test``, see :class:`Rounds`.
        bins, binning, grid: as in :meth:`SequentialTemperatures.fit`.

    Returns:
        one row for each ``slot``, and a last one, ``"all"``, of all reached slots together:
        ``samples`` (reached), ``temperature``, ``confidence``, ``confidence_scaled`` and
        ``outcome`` (means), ``ece``, ``ece_scaled``, ``brier``, ``brier_scaled``, ``auroc`` (the
        same before and after for one slot), ``auroc_scaled``, and ``ece_product`` and
        ``ece_product_scaled``, the error of the product up to the slot against survival. NaN where
        undefined: no samples, fewer samples than bins, or one class only.

    Raises:
        TypeError, ValueError: as :func:`rounds_of` and :meth:`SequentialTemperatures.fit`, or a
            prompt that is in both.
    """
    _require_outcome(outcome)
    fitted, held = _fit_and_test(fit, test)
    scaling = SequentialTemperatures.fit(
        fitted.confidence, fitted.outcome(), grid=grid, bins=bins, binning=binning
    )
    raw, scaled = held.confidence, scaling.apply(held.confidence)
    seen = held.outcome(outcome)
    survival = prefix_survival(seen)
    products = np.cumprod(raw, axis=1), np.cumprod(scaled, axis=1)

    def row(part: slice) -> dict[str, float]:
        taken = ~np.isnan(seen[:, part])
        o, before, after = (values[:, part][taken] for values in (seen, raw, scaled))
        alive = ~np.isnan(survival[:, part]) & ~np.isnan(raw[:, part])
        lived = survival[:, part][alive]
        errors = [_ece_or_nan(p[:, part][alive], lived, bins, binning) for p in products]
        return {
            "samples": len(o),
            "confidence": _mean(before),
            "confidence_scaled": _mean(after),
            "outcome": _mean(o),
            "ece": _ece_or_nan(before, o, bins, binning),
            "ece_scaled": _ece_or_nan(after, o, bins, binning),
            "brier": _mean((before - o) ** 2),
            "brier_scaled": _mean((after - o) ** 2),
            "auroc": auroc(before, o) if len(o) else float("nan"),
            "auroc_scaled": auroc(after, o) if len(o) else float("nan"),
            "ece_product": errors[0],
            "ece_product_scaled": errors[1],
        }

    slots = seen.shape[1]
    rows: list[dict[str, object]] = [
        {"slot": k, "temperature": scaling.temperatures[k], **row(slice(k, k + 1))}
        for k in range(slots)
    ]
    rows.append({"slot": "all", "temperature": float("nan"), **row(slice(None))})
    return pd.DataFrame(rows)


def online_temperatures(
    confidence: Float[np.ndarray, "round slot"],
    outcome: Float[np.ndarray, "round slot"],
    *,
    half_life: float,
    every: int = 50,
    start: SequentialTemperatures | None = None,
    min_rounds: int | None = None,
    grid: Sequence[float] = _COARSE_GRID,
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
    _require_binning(bins, "width")
    enough = bins if min_rounds is None else min_rounds
    require_int("min_rounds", enough, 1)
    choices = _checked_grid(grid)
    current = np.ones(f.shape[1]) if start is None else start._for(f)
    temperatures = np.empty_like(f)
    span = int(np.ceil(10 * half_life))
    for now in range(0, len(f), every):
        window = slice(max(0, now - span), now)
        age = now - 1 - np.arange(window.start, now)
        current = _search(
            current, f[window], survival[window], 0.5 ** (age / half_life), choices, bins, enough
        )
        temperatures[now : now + every] = current
    return temperatures


def drift_table(
    fit: pd.DataFrame | Rounds,
    before: pd.DataFrame | Rounds,
    after: pd.DataFrame | Rounds,
    *,
    half_life: float,
    window: int = 200,
    every: int = 50,
    bins: int = 15,
    grid: Sequence[float] = _COARSE_GRID,
) -> pd.DataFrame:
    """What an abrupt change of domain does to the calibration, and how fast it is repaired.

    Static temperatures are found on ``fit``. The online ones begin there too, see the rounds of
    ``fit``, then those of ``before``, then, at once, those of ``after``, and are never told of the
    change. Reported are windows of rounds, counted from it.

    Args:
        fit: rounds of the first domain, to fit on.
        before: more of the first domain, other prompts.
        after: of the second domain.
        half_life, every: as in :func:`online_temperatures`.
        window: rounds in a row of the table; windows that are not full are left out. Small windows
            add the same chance error to all three figures.
        bins: of equal width.
        grid: of both searches.

    Returns:
        one row per window: ``start`` (its first round, counted from the change, negative before
        it), ``rounds``, and the calibration error of all the products of a block against survival,
        ``ece_raw``, ``ece_static`` and ``ece_online``; NaN with fewer samples than bins.

    Raises:
        TypeError, ValueError: as :func:`rounds_of` and :func:`online_temperatures`, blocks of
            different length, a prompt of ``fit`` in the others, or no full window.
    """
    parts = [_rounds(part) for part in (fit, before, after)]
    for part in parts[1:]:
        _require_apart(parts[0], part)
    widths = [part.confidence.shape[1] for part in parts]
    if len(set(widths)) > 1:
        raise ValueError(f"fit, before and after must have blocks of one length, got {widths}")
    require_int("window", window, 1)
    f = np.concatenate([part.confidence for part in parts])
    outcome = np.concatenate([part.outcome() for part in parts])
    static = SequentialTemperatures.fit(
        parts[0].confidence, parts[0].outcome(), grid=grid, bins=bins
    )
    online = online_temperatures(
        f, outcome, half_life=half_life, every=every, start=static, grid=grid, bins=bins
    )
    scaled = {
        "ece_raw": f,
        "ece_static": static.apply(f),
        "ece_online": temperature_scale(f, online),
    }
    products = {name: np.cumprod(values, axis=1) for name, values in scaled.items()}
    survival = prefix_survival(outcome)
    change = len(parts[0]) + len(parts[1])
    starts = range(-(len(parts[1]) // window) * window, len(parts[2]) - window + 1, window)
    rows = []
    for start in starts:
        here = slice(change + start, change + start + window)
        known = ~np.isnan(survival[here]) & ~np.isnan(products["ece_raw"][here])
        errors = {
            name: _ece_or_nan(values[here][known], survival[here][known], bins, "width")
            for name, values in products.items()
        }
        rows.append({"start": start, "rounds": window, **errors})
    if not rows:
        raise ValueError(
            f"window must fit into before or after, got {window} for {len(parts[1])} and "
            f"{len(parts[2])} rounds"
        )
    return pd.DataFrame(rows)


def study(
    traces: pd.DataFrame | Mapping[str | tuple[str, float], pd.DataFrame],
    *,
    by: Sequence[str] = ("drafter", "temperature", "domain", "slot"),
    outcome: Outcome = "analytic",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Bias and variance of the confidence head, by whatever it may depend on.

    The error of a reached slot is its confidence less its outcome. ``bias`` is the mean error, over
    slots; ``variance`` its variance; ``spread`` the standard deviation, over conversations, of
    their mean errors: how far off a head that is right on average can be for one user. Against
    accept rates the variance is the head's own; against 0/1 outcomes it holds their chance too.
    ``_low`` and ``_high`` are 95 % percentile bootstrap intervals over conversations, since the
    slots of one conversation resemble each other. A conversation is a prompt number within a
    domain: the same number in two traces must mean the same conversation.

    Args:
        traces: drafter -> trace, or (drafter, decoding temperature) -> trace, or one table with
            columns ``drafter`` and ``temperature`` of its own. A trace with a column of that name
            keeps it.
        by: columns to group by, in this order; leave some out for margins.
        outcome: ``"analytic"`` or ``"empirical"``.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        one row per group of reached slots: the columns of ``by``, ``conversations``, ``samples``,
        ``confidence`` and ``outcome`` (means), and the three figures with their intervals. Slots
        without a confidence do not count. NaN where undefined: no samples, or for spread and
        intervals fewer than two conversations.

    Raises:
        TypeError: no table or mapping of tables.
        ValueError: as :func:`rounds_of`, but for missing confidences; a column to group by that is
            not there; no traces.
    """
    _require_outcome(outcome)
    require_int("resamples", resamples, 1)
    frame = _labelled(traces, by)
    groups = [name for name in ("drafter", "temperature") if name in frame.columns]
    parts = [frame]
    if groups:
        parts = [part for _, part in frame.groupby(groups, sort=False, dropna=False)]
    frame = pd.concat([_reached_rows(part) for part in parts], ignore_index=True)
    chosen = frame["accepted"].astype(np.float64) if outcome == "empirical" else frame.accept_rate
    frame = frame.assign(_outcome=chosen, _error=frame["confidence"] - chosen)
    rows = []
    for key, part in frame.groupby(list(by), dropna=False):
        labels = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        rows.append(
            {**labels, **_bias_and_variance(part.dropna(subset="confidence"), resamples, seed)}
        )
    return pd.DataFrame(rows)


def threshold_sweep(
    trace: pd.DataFrame | Rounds,
    thresholds: Iterable[float],
    calibrated: SequentialTemperatures | None = None,
) -> pd.DataFrame:
    """What a static threshold on the confidence of each slot would have verified and accepted.

    Verification stops before the first slot whose confidence lies below the threshold. The trace is
    replayed, not decoded anew: whether a slot is verified, and then accepted, depends on the slots
    before it alone, so cutting a round short changes nothing in front of the cut. What the replay
    keeps fixed is where rounds begin; the real run would begin its next round earlier. It can only
    cut what was verified: use a trace that was decoded without a threshold.

    Args:
        trace: of one drafter.
        thresholds: in [0, 1]; 0 verifies all that the trace did.
        calibrated: scales the confidences first.

    Returns:
        one row per threshold: ``threshold``, ``acceptance_rate`` (accepted over verified; NaN where
        nothing is verified), ``verified`` and ``accepted`` (slots per round, without the target's
        own token), and ``not_replayed``: slots per round that pass the threshold but that the trace
        did not verify, because it was cut there or the answer ended.

    Raises:
        TypeError, ValueError: as :func:`rounds_of`, or thresholds outside [0, 1].
    """
    rounds = _rounds(trace)
    cuts = _probabilities("thresholds", list(thresholds))
    confidence = rounds.confidence
    if calibrated is not None:
        confidence = calibrated.apply(confidence)
    drafted = ~np.isnan(confidence)
    level = _level(confidence, drafted, "slot")
    passing, verified, accepted = (
        _count(level, mask.astype(np.float64), cuts) / len(rounds)
        for mask in (drafted, rounds.verified, rounds.accepted)
    )
    return pd.DataFrame(
        {
            "threshold": cuts,
            "acceptance_rate": _ratio(accepted, verified, verified > 0),
            "verified": verified,
            "accepted": accepted,
            "not_replayed": passing - verified,
        }
    )


def gain_table(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    draft_seconds: float,
    verify_seconds: float,
    token_seconds: float,
    thresholds: Sequence[float] = _THRESHOLDS,
    on: Literal["slot", "product"] = "slot",
    bins: int = 15,
    binning: Binning = "width",
    grid: Sequence[float] = TEMPERATURE_GRID,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What scaling gains, and what perfect calibration would gain at most, in tokens and in speed.

    Four ways to decide how much of a drafted block is verified: ``everything``; a threshold on the
    ``raw`` confidence; on the ``scaled`` one; and on the ``oracle``, the true accept rate c* in
    place of the confidence. Verification stops before the first slot whose value is below the
    threshold. Temperatures and each way's threshold, the fastest, are chosen on ``fit``; every
    figure is of ``test``.

    A round that verifies n slots accepts, in expectation, the sum of c* over those of them that the
    trace reached, and yields one token more, the target's own. It takes ``draft_seconds +
    verify_seconds + token_seconds * (n + 1)``: the target reads the last token and the n slots.
    Speed is all tokens over all seconds. The trace is replayed as in :func:`threshold_sweep`, so it
    must have verified whole blocks.

    Args:
        fit, test: traces of one drafter without a prompt in common.
        draft_seconds: of drafting a block.
        verify_seconds: of one target pass, whatever its length.
        token_seconds: more for each token of that pass.
        thresholds: to choose from, in [0, 1].
        on: ``"slot"``, a threshold on each slot's own value, or ``"product"``, on the product up to
            the slot, which is how a scheduler weighs slots. Under ``"slot"`` one threshold serves
            early and late slots alike, though they are not worth the same: a miscalibration that
            happens to favour the early ones can be faster than its repair.
        bins, binning, grid: as in :meth:`SequentialTemperatures.fit`.
        resamples, seed: of the bootstrap.

    Returns:
        one row for each way: ``values``, ``threshold`` (NaN for everything), ``verified`` and
        ``accepted`` (slots per round), ``speed`` (tokens per second) with ``speed_low`` and
        ``speed_high``, and ``gain_percent``, its gain over raw, with ``gain_low`` and
        ``gain_high``: 95 % percentile bootstrap intervals over the conversations of ``test``, both
        ways resampled together; NaN with fewer than two conversations.

    Raises:
        TypeError, ValueError: as :func:`calibration_report`; costs that are negative or all 0.
    """
    costs = {"draft": draft_seconds, "verify": verify_seconds, "token": token_seconds}
    for name, value in costs.items():
        require_number(f"{name}_seconds", value)
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"{name}_seconds must be >= 0 and finite, got {value}")
    per_round = draft_seconds + verify_seconds + token_seconds
    if per_round == 0:
        raise ValueError("a round must take time, got 0 for each of the three costs")
    if on not in ("slot", "product"):
        raise ValueError(f"on must be 'slot' or 'product', got {on!r}")
    require_int("resamples", resamples, 1)
    cuts = _probabilities("thresholds", thresholds)
    fitted, held = _fit_and_test(fit, test)
    scaling = SequentialTemperatures.fit(
        fitted.confidence, fitted.outcome(), grid=grid, bins=bins, binning=binning
    )

    def levels(rounds: Rounds) -> dict[str, np.ndarray]:
        ways = {
            "raw": rounds.confidence,
            "scaled": scaling.apply(rounds.confidence),
            "oracle": rounds.accept_rate,
        }
        named = {name: _level(values, rounds.verified, on) for name, values in ways.items()}
        return {"everything": np.where(rounds.verified, np.inf, -np.inf), **named}

    expected = np.nan_to_num(fitted.outcome("analytic"))
    worth = np.nan_to_num(held.outcome("analytic"))
    conversation = np.unique(held.prompt, return_inverse=True)[1]
    rounds_each = np.bincount(conversation)
    drawn = _resampled(len(rounds_each), resamples, seed)
    rows, speeds = [], {}
    found, tried = levels(held), levels(fitted)
    for name, level in found.items():
        verified = _count(tried[name], fitted.verified.astype(np.float64), cuts)
        tokens = len(fitted) + _count(tried[name], expected, cuts)
        fastest = np.argmax(tokens / (len(fitted) * per_round + token_seconds * verified))
        passing = level >= cuts[fastest]
        slots = np.bincount(conversation, passing.sum(axis=1))
        gained = np.bincount(conversation, (passing * worth).sum(axis=1))
        tokens, seconds = rounds_each + gained, rounds_each * per_round + token_seconds * slots
        speeds[name] = np.append(tokens.sum() / seconds.sum(), (drawn @ tokens) / (drawn @ seconds))
        rows.append(
            {
                "values": name,
                "threshold": float("nan") if name == "everything" else cuts[fastest],
                "verified": slots.sum() / len(held),
                "accepted": gained.sum() / len(held),
            }
        )
    for row in rows:
        speed = speeds[row["values"]]
        gain = 100 * (speed / speeds["raw"] - 1)
        row["speed"], row["gain_percent"] = speed[0], gain[0]
        row["speed_low"], row["speed_high"] = _interval(speed[1:], len(rounds_each))
        row["gain_low"], row["gain_high"] = _interval(gain[1:], len(rounds_each))
    order = ["values", "threshold", "verified", "accepted", "speed", "speed_low", "speed_high"]
    return pd.DataFrame(rows)[[*order, "gain_percent", "gain_low", "gain_high"]]


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers, got {array.dtype} ({type(values).__name__})")
    return array.astype(np.float64)


def _require_range(name: str, values: np.ndarray) -> None:
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"{name} must lie in [0, 1], got values from {values.min()} to {values.max()}"
        )


def _probabilities(name: str, values: ArrayLike) -> Float[np.ndarray, " sample"]:
    array = _numbers(name, values)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} must be [sample] with one or more, got shape {array.shape}")
    missing = int(np.isnan(array).sum())
    if missing:
        raise ValueError(f"{name} must lie in [0, 1], got {missing} NaN of {len(array)}")
    _require_range(name, array)
    return array


def _pairs(confidence: ArrayLike, outcome: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    f, o = _probabilities("confidence", confidence), _probabilities("outcome", outcome)
    if len(f) != len(o):
        raise ValueError(f"confidence and outcome must be as long, got {len(f)} and {len(o)}")
    return f, o


def _require_binning(bins: int, binning: str) -> None:
    require_int("bins", bins, 1)
    if binning not in ("width", "mass"):
        raise ValueError(f"binning must be 'width' or 'mass', got {binning!r}")


def _require_outcome(kind: str) -> None:
    if kind not in ("empirical", "analytic"):
        raise ValueError(f"outcome must be 'empirical' or 'analytic', got {kind!r}")


def _require_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ValueError(f"the trace lacks the columns {missing}, got {list(frame.columns)}")


def _ratio(numerator: np.ndarray, denominator: np.ndarray, defined: np.ndarray) -> np.ndarray:
    """Their quotient where it is defined, NaN elsewhere."""
    nothing = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=nothing, where=defined)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _logit(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(p) - np.log1p(-p)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _edges(f: np.ndarray, bins: int, binning: str) -> np.ndarray:
    shares = np.linspace(0, 1, bins + 1)
    return shares if binning == "width" else np.percentile(f, 100 * shares)


def _bin(f: np.ndarray, edges: np.ndarray) -> Int[np.ndarray, " sample"]:
    """Which bin each value is in; one that lies on a cut is in the bin below it."""
    return np.searchsorted(edges[1:-1], f, side="left")


def _ece(
    f: np.ndarray, o: np.ndarray, bins: int, binning: str, weights: np.ndarray | None = None
) -> float:
    w = np.ones_like(f) if weights is None else weights
    gaps = np.bincount(_bin(f, _edges(f, bins, binning)), w * (f - o), bins)
    return float(np.abs(gaps).sum() / w.sum())


def _ece_or_nan(f: np.ndarray, o: np.ndarray, bins: int, binning: str) -> float:
    return _ece(f, o, bins, binning) if len(f) >= bins else float("nan")


def _rounds(trace: pd.DataFrame | Rounds) -> Rounds:
    return trace if isinstance(trace, Rounds) else rounds_of(trace)


def _fit_and_test(fit: pd.DataFrame | Rounds, test: pd.DataFrame | Rounds) -> tuple[Rounds, Rounds]:
    fitted, held = _rounds(fit), _rounds(test)
    _require_apart(fitted, held)
    return fitted, held


def _require_apart(fit: Rounds, test: Rounds) -> None:
    shared = np.intersect1d(fit.prompt, test.prompt)
    if len(shared):
        raise ValueError(
            f"fit and test must have no prompt in common, got {len(shared)} in both, such as "
            f"{shared[0]}; cut one trace with split_prompts, or number the prompts of two runs "
            "apart"
        )


def _sorted_trace(trace: pd.DataFrame) -> pd.DataFrame:
    """The trace by prompt, round and slot, after a look at everything that replaying relies on."""
    if not isinstance(trace, pd.DataFrame):
        raise TypeError(f"trace must be a DataFrame, got {type(trace).__name__}")
    _require_columns(trace, _COLUMNS)
    if trace.empty:
        raise ValueError("the trace must have one or more rows, got none")
    frame = trace.sort_values(["prompt", "round", "slot"], ignore_index=True)
    slot = frame["slot"].to_numpy()
    verified, accepted = frame["verified"].to_numpy(bool), frame["accepted"].to_numpy(bool)
    key = frame[["prompt", "round"]].to_numpy()
    follows = np.append(False, (key[1:] == key[:-1]).all(axis=1))
    expected = np.where(follows, np.append(-1, slot[:-1]) + 1, 0)
    wrong = np.flatnonzero(slot != expected)
    if len(wrong):
        prompt, number = key[wrong[0]]
        raise ValueError(
            "the slots of a round must be 0, 1, 2, ... once each, got slot "
            f"{slot[wrong[0]]} in place of {expected[wrong[0]]} in prompt {prompt}, round "
            f"{number}; runs of several drafters or temperatures are several traces"
        )
    broken = accepted & ~verified
    for prefix in (verified, accepted):
        broken |= follows & prefix & ~np.append(True, prefix[:-1])
    wrong = np.flatnonzero(broken)
    if len(wrong):
        prompt, number = key[wrong[0]]
        raise ValueError(
            "verified and accepted slots must each be the first of their round, and accepted ones "
            f"verified, got otherwise in prompt {prompt}, round {number}, slot {slot[wrong[0]]}"
        )
    if verified.any():
        _probabilities("accept_rate of verified slots", frame["accept_rate"].to_numpy()[verified])
    return frame


def _reached_rows(trace: pd.DataFrame) -> pd.DataFrame:
    frame = _sorted_trace(trace)
    confidence = _numbers("confidence", frame["confidence"])
    _require_range("confidence", confidence[~np.isnan(confidence)])
    before = np.append(True, frame["accepted"].to_numpy(bool)[:-1])
    first = frame["slot"].to_numpy() == 0
    return frame[frame["verified"].to_numpy(bool) & (first | before)]


def _labelled(
    traces: pd.DataFrame | Mapping[str | tuple[str, float], pd.DataFrame], by: Sequence[str]
) -> pd.DataFrame:
    if isinstance(traces, pd.DataFrame):
        frame = traces
    elif isinstance(traces, Mapping):
        parts = []
        for key, trace in traces.items():
            if not isinstance(trace, pd.DataFrame):
                raise TypeError(f"traces[{key!r}] must be a DataFrame, got {type(trace).__name__}")
            names = ("drafter", "temperature") if isinstance(key, tuple) else ("drafter",)
            values = key if isinstance(key, tuple) else (key,)
            labels = dict(zip(names, values, strict=True))
            own = {name: value for name, value in labels.items() if name not in trace.columns}
            parts.append(trace.assign(**own))
        if not parts:
            raise ValueError("traces must hold one or more traces, got none")
        frame = pd.concat(parts, ignore_index=True)
    else:
        raise TypeError(f"traces must be a DataFrame or a mapping, got {type(traces).__name__}")
    if isinstance(by, str) or not by:
        raise TypeError(f"by must be a sequence of column names, got {by!r}")
    _require_columns(frame, by)
    return frame


def _bias_and_variance(part: pd.DataFrame, resamples: int, seed: int) -> dict[str, float]:
    conversation = part.groupby(["domain", "prompt"], dropna=False).ngroup().to_numpy()
    error = part["_error"].to_numpy()
    count = np.bincount(conversation)
    total, squares = np.bincount(conversation, error), np.bincount(conversation, error**2)
    means = total / count

    def figures(drawn: np.ndarray) -> np.ndarray:
        """Bias, variance and spread of samples that hold each conversation so many times."""
        samples = drawn @ count
        bias = drawn @ total / samples
        variance = np.maximum(drawn @ squares / samples - bias**2, 0)
        centre = (drawn @ means / len(count))[:, None]
        between = (drawn * (means - centre) ** 2).sum(axis=1) / max(len(count) - 1, 1)
        return np.stack([bias, variance, np.sqrt(between)])

    found = np.full(3, np.nan)
    bounds = np.full((3, 2), np.nan)
    if len(part):
        found = figures(np.ones((1, len(count))))[:, 0]
    if len(count) > 1:
        drawn = figures(_resampled(len(count), resamples, seed))
        bounds = np.quantile(drawn, [0.025, 0.975], axis=1).T
    else:
        found[2] = np.nan
    row = {
        "conversations": len(count),
        "samples": len(part),
        "confidence": _mean(part["confidence"].to_numpy()),
        "outcome": _mean(part["_outcome"].to_numpy()),
    }
    for name, value, (low, high) in zip(("bias", "variance", "spread"), found, bounds, strict=True):
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def _resampled(count: int, resamples: int, seed: int) -> Int[np.ndarray, "resample count"]:
    """How often each of ``count`` things is drawn when as many are drawn with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)


def _interval(values: np.ndarray, conversations: int) -> tuple[float, float]:
    if conversations < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _round_arrays(confidence: ArrayLike, outcome: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and survival, both ``[round, slot]``."""
    f, o = _numbers("confidence", confidence), _numbers("outcome", outcome)
    for name, values in (("confidence", f), ("outcome", o)):
        if values.ndim != 2 or values.size == 0:
            raise ValueError(
                f"{name} must be [round, slot] with one or more of both, got shape {values.shape}"
            )
        _require_range(name, values[~np.isnan(values)])
    if f.shape != o.shape:
        raise ValueError(f"confidence and outcome must have one shape, got {f.shape} and {o.shape}")
    return f, prefix_survival(o)


def _checked_grid(grid: Sequence[float]) -> np.ndarray:
    """Its temperatures, nearest to 1 first, so that the first minimum is the mildest."""
    values = _numbers("grid", grid)
    if values.ndim != 1 or len(values) == 0 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"grid must be one or more positive temperatures, got {grid!r}")
    return values[np.argsort(np.abs(np.log(values)), kind="stable")]


def _not_identified(survival: np.ndarray, enough: int) -> str | None:
    if len(survival) < enough:
        return f"{len(survival)} rounds with a known survival, {enough} are needed"
    for value in (0, 1):
        if (survival == value).all():
            return f"survival is {value} in all of its {len(survival)} rounds"
    return None


def _best_temperature(
    product: np.ndarray,
    f: np.ndarray,
    survival: np.ndarray,
    choices: np.ndarray,
    bins: int,
    binning: str,
    weights: np.ndarray | None = None,
) -> float:
    """Of ``choices`` the one whose product up to this slot has the least calibration error."""
    logit = _logit(f)
    errors = [
        _ece(product * _sigmoid(logit / t), survival, bins, binning, weights) for t in choices
    ]
    return float(choices[np.argmin(errors)])


def _search(
    current: np.ndarray,
    f: np.ndarray,
    survival: np.ndarray,
    weights: np.ndarray,
    choices: np.ndarray,
    bins: int,
    enough: int,
) -> np.ndarray:
    """New temperatures from weighted rounds; the current one where a slot cannot be told."""
    found = current.copy()
    product = np.ones(len(f))
    for slot in range(f.shape[1]):
        known = ~np.isnan(survival[:, slot]) & ~np.isnan(product * f[:, slot])
        if _not_identified(survival[known, slot], enough) is None:
            found[slot] = _best_temperature(
                product[known],
                f[known, slot],
                survival[known, slot],
                choices,
                bins,
                "width",
                weights[known],
            )
        product = product * _sigmoid(_logit(f[:, slot]) / found[slot])
    return found


def _level(
    values: np.ndarray, allowed: np.ndarray, on: Literal["slot", "product"]
) -> Float[np.ndarray, "round slot"]:
    """The highest threshold at which each slot is still verified; -inf where it never is."""
    along = np.minimum.accumulate if on == "slot" else np.multiply.accumulate
    return np.where(allowed, along(np.where(allowed, values, 0), axis=1), -np.inf)


def _count(level: np.ndarray, weight: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """For each threshold, the summed weight of the slots whose level is not below it."""
    order = np.argsort(level, axis=None)
    beyond = np.append(np.cumsum(weight.ravel()[order][::-1])[::-1], 0)
    return beyond[np.searchsorted(level.ravel()[order], cuts, side="left")]
