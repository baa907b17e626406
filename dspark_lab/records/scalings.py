"""Joint temperatures of the confidences, and whether temperatures are worth using at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.checks import Count, Size, checked, require_columns
from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.rates import (
    SequentialTemperatures,
    fit_identifiable_slots,
    interval,
    non_identifiable_slots,
    prefix_survival,
    resampled,
    resampled_errors,
    split_prompts,
    temperature_scale,
)

# The hottest and, turned over, the coldest temperature of the joint fit, as in SGLang's own search.
_HOTTEST = 10.0
# The least distance of a survival from 0 and 1 in the joint fit.
_EDGE = 1e-8
# Numbers of a bootstrap that are drawn at a time.
_PIECE = 2**24
_INTERVALS = ["difference", "difference_low", "difference_high"]


@checked
def fit_joint_temperatures(
    trace: pd.DataFrame | Rounds, *, bins: Count = 15
) -> SequentialTemperatures:
    """Find the temperatures of all slots together.

    They minimise the negative log-likelihood of survival, 0 or 1, under the product of the
    calibrated confidences up to each slot, summed over rounds and slots, where
    :meth:`SequentialTemperatures.fit` keeps the temperatures before a slot as they are. All lie
    between 0.1 and 10.

    Args:
        trace: rounds with confidences, as a trace or from :func:`load_shards`.
        bins: a slot needs as many rounds with a known survival, some of them 0 and some 1; without
            them its temperature is 1.
    """
    # Imported here, so that `import dspark_lab` does not wait for it.
    from scipy.optimize import minimize

    rounds = rounds_of(trace)
    survival = prefix_survival(rounds.outcome())
    fixed = non_identifiable_slots(rounds.confidence, survival, bins)
    free = np.array([slot not in fixed for slot in range(survival.shape[1])])
    if not free.any():
        return SequentialTemperatures((1.0,) * len(free))
    limits = [(-widest, widest) for widest in np.log(_HOTTEST) * free]
    fits = [
        minimize(
            _survival_loss,
            start * free,
            args=(rounds.confidence, survival),
            jac=True,
            bounds=limits,
            method="L-BFGS-B",
            options={"ftol": 1e-12, "gtol": 1e-8},
        )
        for start in (0.0, 1.0, -1.0)
    ]
    best = min(fits, key=lambda fit: fit.fun)
    return SequentialTemperatures(tuple(np.exp(best.x).tolist()))


@checked
def compare_scalings(
    trace: pd.DataFrame | Rounds,
    *,
    bins: Count = 15,
    resamples: Count = 500,
    seed: Size = 0,
) -> pd.DataFrame:
    """Hold greedy and joint temperatures against none, on conversations that they did not see.

    The conversations of each domain are cut in two at random; temperatures found on either half
    scale the confidences of the other. The error is the expected calibration error, in ``bins`` of
    equal width, of the product of confidences up to a slot against survival, as a mean over the
    slots with as many known rounds as bins. Intervals are 95 % percentile bootstraps over all
    conversations, the same for every row, temperatures kept. They lie too high, the more so the
    nearer the error is to 0, so that a small gain is missed rather than made up.

    Args:
        trace: rounds with confidences, as a trace or from :func:`load_shards`.

    Returns:
        a row for each ``scaling``, "none", "greedy" (:meth:`SequentialTemperatures.fit`) and
        "joint" (:func:`fit_joint_temperatures`): its ``temperatures`` found on all conversations,
        1 at slots without enough rounds; the held-out ``error`` with ``low`` and ``high``; its
        ``difference`` to none with ``difference_low`` and ``difference_high``, below 0 where
        scaling helps; ``slot_errors``, held out as well, NaN at slots that are left out; ``rounds``
        and ``conversations``.
    """
    rounds = rounds_of(trace)
    fits: dict[str, Callable[[Rounds], SequentialTemperatures]] = {
        "none": lambda seen: SequentialTemperatures((1.0,) * seen.confidence.shape[1]),
        "greedy": lambda seen: fit_identifiable_slots(seen, bins=bins),
        "joint": lambda seen: fit_joint_temperatures(seen, bins=bins),
    }
    whose = pd.DataFrame({"prompt": rounds.prompt, "domain": rounds.domain})
    halves = [part.index.to_numpy() for part in split_prompts(whose, seed=seed)]
    survival = prefix_survival(rounds.outcome())
    owner, conversations = rounds.conversation, len(np.unique(rounds.prompt))
    products = np.empty((len(fits), *survival.shape))
    for product, fit in zip(products, fits.values(), strict=True):
        for seen, held in (halves, halves[::-1]):
            scaled = fit(rounds.take(seen)).apply(rounds.confidence[held])
            product[held] = np.cumprod(scaled, axis=1)
    known = ~np.isnan(survival) & ~np.isnan(products[0])
    enough = np.flatnonzero(known.sum(axis=0) >= bins)

    def errors(drawn: Int[np.ndarray, "resample conversation"]) -> np.ndarray:
        """Of each scaling, resample and slot."""
        found = np.full((len(products), len(drawn), known.shape[1]), np.nan)
        for place, product in enumerate(products):
            for slot in enough:
                own = known[:, slot]
                pairs = product[own, slot], survival[own, slot], owner[own]
                found[place, :, slot] = resampled_errors(*pairs, drawn, bins, "width")
        return found

    by_slot = errors(np.ones((1, conversations), dtype=np.int64))[:, 0]
    piece = max(1, _PIECE // conversations)
    sizes = [min(piece, resamples - first) for first in range(0, resamples, piece)]
    drawn = (resampled(conversations, size, (seed, n)) for n, size in enumerate(sizes))
    spread = np.concatenate([_mean_error(errors(one), enough) for one in drawn], axis=1).T
    low, high = interval(spread, conversations)
    lower, higher = interval(spread - spread[:, :1], conversations)
    error = _mean_error(by_slot, enough)
    table = pd.DataFrame({"scaling": list(fits), "error": error, "low": low, "high": high})
    table.insert(1, "temperatures", [fit(rounds).temperatures for fit in fits.values()])
    table[_INTERVALS] = np.stack([error - error[0], lower, higher], axis=1)
    table.loc[0, _INTERVALS] = np.nan
    table["slot_errors"] = [tuple(row) for row in by_slot.tolist()]
    return table.assign(rounds=len(rounds), conversations=conversations)


@checked
def scaling_advice(table: pd.DataFrame) -> str:
    """Say in a sentence whether temperatures are worth using, from :func:`compare_scalings`.

    They are where the interval of the difference lies below 0; of two such the one with the lower
    error.
    """
    require_columns("table", table, ["scaling", "error", *_INTERVALS])
    rows = table.set_index("scaling")
    others = rows.drop(index="none", errors="ignore")
    if not rows.index.is_unique or len(others) in (0, len(rows)):
        found = table["scaling"].tolist()
        raise ValueError(f"table must have one row of 'none' and others, got {found}")
    none = rows.loc["none", "error"]
    sure = others[others["difference_high"] < 0]
    if len(sure):
        best = sure["error"].idxmin()
        error, (change, low, high) = sure.loc[best, "error"], sure.loc[best, _INTERVALS]
        return (
            f"Use the {best} temperatures: on conversations held out, the calibration error falls "
            f"from {none:.4f} to {error:.4f}, by {-change:.4f} (95 % interval {-high:.4f} to "
            f"{-low:.4f})."
        )
    changes = [
        f"{name} by {change:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
        for name, (change, low, high) in others[_INTERVALS].iterrows()
    ]
    return (
        "Keep the confidences as they are: no temperatures surely lower their calibration error on "
        f"conversations held out, {none:.4f}; it changes {', '.join(changes)}."
    )


def _survival_loss(
    logs: Float[np.ndarray, " slot"],
    confidence: Float[np.ndarray, "round slot"],
    survival: Float[np.ndarray, "round slot"],
) -> tuple[float, Float[np.ndarray, " slot"]]:
    """The mean loss of :func:`fit_joint_temperatures`, and its slope in each log-temperature.

    loss = -sum_k (s_k log P_k + (1 - s_k) log(1 - P_k)),   P_k = prod_{j <= k} c_j
    d log c_j / d log T_j = -(1 - c_j) logit(f_j) / T_j
    """
    temperatures = np.exp(logs)
    scaled = temperature_scale(confidence, temperatures)
    product = np.cumprod(scaled, axis=1)
    known = ~np.isnan(survival) & ~np.isnan(product)
    p, s = product.clip(_EDGE, 1 - _EDGE), survival
    losses = -(s * np.log(p) + (1 - s) * np.log1p(-p))
    of_product = np.where(known & (p == product), (1 - s) * p / (1 - p) - s, 0)
    of_slot = np.cumsum(of_product[:, ::-1], axis=1)[:, ::-1]
    # No temperature moves a confidence of 0 or 1.
    f = np.where((confidence > 0) & (confidence < 1), confidence, 0.5)
    slopes = of_slot * -(1 - np.nan_to_num(scaled)) * np.log(f / (1 - f)) / temperatures
    return float(losses[known].sum() / known.sum()), slopes.sum(axis=0) / known.sum()


def _mean_error(
    errors: Float[np.ndarray, "*axes slot"], enough: Int[np.ndarray, " kept"]
) -> Float[np.ndarray, "*axes"]:
    """The mean over the slots that count; NaN where there is none."""
    kept = errors[..., enough]
    count = (~np.isnan(kept)).sum(axis=-1)
    return np.nansum(kept, axis=-1) / np.where(count > 0, count, np.nan)
