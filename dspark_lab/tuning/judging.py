"""Hold advice against runs that were really trained: what is lost against the best cell.

A setting is what the runs learned from and their budget; a cell is rows, anchors and block size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.chats import Encoded
from dspark_lab.checks import NotEmpty, Positive, checked, require_columns
from dspark_lab.rates import interval
from dspark_lab.training import TrainConfig
from dspark_lab.tuning.choice import choose_training
from dspark_lab.tuning.shape import Shape
from dspark_lab.tuning.spans import Spans
from dspark_lab.tuning.steptime import StepTime, fit_step_time

CELL = ["batch_size", "num_anchors", "block_size"]
SETTING = ["budget", "amount", "mix"]
# How far beyond a cell's own budgets its tau is still told, as a factor.
FARTHEST = 1.5


@checked
def fitted_cells(
    table: pd.DataFrame,
    by: str = "held_out",
    setting: Annotated[Sequence[str], NotEmpty()] = tuple(SETTING),
) -> pd.DataFrame:
    """The cells of each setting on a surface that is fitted to all of them, and which is the best.

    The logarithm of the column ``by`` of :func:`run_table` is fitted by a second-degree polynomial
    in the logarithms of rows, anchors and block size, each run alike: so the best of many cells is
    not the luckiest.

    Returns:
        one line for each cell: its ``seeds`` and their mean ``found``, the ``fitted`` one with its
        95 % interval ``low`` to ``high``, ``best``, and the share of the best's fitted one that it
        loses, ``lost``, with the interval ``lost_low`` to ``lost_high``. Intervals are Student's,
        and NaN with no more runs than coefficients.
    """
    from scipy import stats

    require_columns("table", table, (*setting, *CELL, by))
    found = []
    for _, part in table.groupby(list(setting), observed=True):
        part = part.sort_values(CELL, ignore_index=True)
        logs = np.log(part[CELL].to_numpy(dtype=float))
        pairs = combinations_with_replacement(range(len(CELL)), 2)
        terms = [np.ones(len(part)), *logs.T, *(logs[:, i] * logs[:, j] for i, j in pairs)]
        design, aim = np.stack(terms, axis=1), np.log(part[by].to_numpy(dtype=float))
        # The terms of what takes only one or two values are not told apart, but their sums are.
        hat = design @ np.linalg.pinv(design)
        fitted = hat @ aim
        freedom = len(part) - np.linalg.matrix_rank(design)
        spread = (((aim - fitted) ** 2).sum() / freedom) ** 0.5 if freedom else np.nan
        quantile = stats.t.ppf(0.975, freedom) if freedom else np.nan
        best = int(fitted.argmax())

        def half(rows: Float[np.ndarray, "run run"], by: float = spread * quantile) -> Any:
            return by * np.sqrt((rows**2).sum(axis=1))

        behind, error = fitted - fitted[best], half(hat - hat[best])
        lines = part[[*setting, *CELL]].assign(
            found=part[by],
            fitted=np.exp(fitted),
            low=np.exp(fitted - half(hat)),
            high=np.exp(fitted + half(hat)),
            lost=1 - np.exp(behind),
            lost_low=1 - np.exp(behind + error),
            lost_high=1 - np.exp(behind - error),
        )
        groups = lines.groupby([*setting, *CELL], observed=True)
        cells = groups.mean()
        cells.insert(0, "seeds", groups.size())
        found.append(cells.assign(best=cells["fitted"] == cells["fitted"].max()).reset_index())
    return pd.concat(found, ignore_index=True)


@checked
def taus_at(
    table: pd.DataFrame,
    kind: Literal["seconds", "slots"],
    amount: Positive,
    by: str = "held_out",
) -> pd.DataFrame:
    """The tau of each cell for a budget between those that its runs had.

    The logarithm of ``by`` (a column of :func:`run_table`, mean over the seeds) on straight lines
    over that of the runs' seconds (steps times the step time) or supervised slots; beyond the
    cell's own budgets on the nearest line, no farther than by a factor of 1.5.

    Returns:
        one line for each mix and cell that reaches so far, with the budget as a setting and the
        ``steps`` and ``slots`` that it pays for: a table like that of :func:`run_table`.
    """
    require_columns("table", table, ("mix", *CELL, "amount", "steps", "step_seconds", "slots", by))
    logs = table[["mix", *CELL, "amount", "step_seconds"]].assign(per_step=table["slots"])
    logs["per_step"] /= table["steps"]
    cost = logs["per_step"] if kind == "slots" else table["step_seconds"]
    logs["spent"], logs["tau"] = np.log(table["steps"] * cost), np.log(table[by])
    columns = ["spent", "tau", "step_seconds", "per_step"]
    points = logs.groupby(["mix", *CELL, "amount"], observed=True)[columns].mean()
    lines, at = [], float(np.log(amount))
    for cell, part in points.groupby(["mix", *CELL], observed=True):
        x, y = part.sort_values("spent")[["spent", "tau"]].to_numpy().T
        beyond = max(x[0] - at, at - x[-1], 0.0)
        if len(x) < 2 and beyond > 0 or beyond > np.log(FARTHEST):
            continue
        tau = float(np.interp(at, x, y))
        if at < x[0]:
            tau = float(y[0] + (at - x[0]) * (y[1] - y[0]) / (x[1] - x[0]))
        elif at > x[-1]:
            tau = float(y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]))
        seconds, per_step = part[["step_seconds", "per_step"]].mean()
        steps = amount / (per_step if kind == "slots" else seconds)
        figures = (steps, seconds, steps * per_step, float(np.exp(tau)))
        lines.append((kind, float(amount), *cell, *figures))
    figures_of = ["steps", "step_seconds", "slots", by]
    return pd.DataFrame(lines, columns=["budget", "amount", "mix", *CELL, *figures_of])


@checked
def judge_advice(
    table: pd.DataFrame,
    advice: pd.DataFrame,
    *,
    fresh: pd.DataFrame | None = None,
    by: str = "held_out",
) -> pd.DataFrame:
    """What each advised cell loses against the best cell of its setting.

    Args:
        table: of :func:`run_table`, or of :func:`taus_at`.
        advice: lines with the columns of a setting and a cell, the ``advisor``'s name, and
            ``spent``: seconds that it took, which a budget of seconds has less.
        fresh: a table of runs with other seeds, of the cells that matter. Where it has the advised
            cell and others of the setting, the best is the one of these with the highest mean, and
            the loss is that between the two means, with Student's interval; their standard
            deviation is pooled over all cells. So no cell is the best by the luck of its seed.

    Returns:
        a line for each line of advice: the cell's ``tau`` after what was spent, the ``best_*``
        cell and its tau, ``lost`` (a share of it) with its 95 % interval ``low`` to ``high``, the
        part of it that was lost to time, ``lost_to_time``, and ``seeds``, how many fresh ones.
    """
    require_columns("advice", advice, (*SETTING, *CELL, "advisor", "spent"))
    if fresh is not None:
        require_columns("fresh", fresh, (*SETTING, *CELL, by))
    cells = fitted_cells(table, by)
    spreads = None if fresh is None else _pooled(fresh, by)
    lines = []
    for one in advice.to_dict("records"):
        part = cells[(cells[SETTING] == [one[name] for name in SETTING]).all(axis=1)]
        mine = part[(part[CELL] == [one[name] for name in CELL]).all(axis=1)]
        if mine.empty:
            wanted = [one[name] for name in (*SETTING, *CELL)]
            raise ValueError(f"table must hold every advised cell, got none for {wanted}")
        own, top = mine.iloc[0], part[part["best"]].iloc[0]
        loss, seeds = own[["lost", "lost_low", "lost_high"]].to_numpy(dtype=float), 0
        if fresh is not None and spreads is not None:
            again = _fresh_loss(fresh, one, by, *spreads)
            if again is not None:
                loss, top, seeds = again
        kept = 1.0
        if one["budget"] == "seconds" and one["spent"] > 0:
            kept = _kept(table, one, by)
        lost, low, high = 1 - (1 - loss) * kept
        line = {name: one[name] for name in ("advisor", *SETTING, *CELL, "spent")}
        line |= {f"best_{name}": int(top[name]) for name in CELL}
        line |= {"tau": float(top["fitted"] * (1 - lost)), "best_tau": float(top["fitted"])}
        line |= {"lost": lost, "low": low, "high": high, "lost_to_time": (1 - loss[0]) * (1 - kept)}
        lines.append({**line, "seeds": seeds})
    return pd.DataFrame(lines)


@checked
def judged_table(judged: pd.DataFrame) -> pd.DataFrame:
    """Sum up a table of :func:`judge_advice`: a line for each advisor and kind of budget.

    ``median`` of the loss with its 95 % bootstrap interval over the settings, the ``worst`` of it
    and the setting where, and ``within``, the share of settings whose loss is at most 3 %.
    """
    require_columns("judged", judged, ("advisor", *SETTING, "lost", "spent"))
    lines = []
    for by, part in judged.groupby(["budget", "advisor"], sort=False, observed=True):
        worst = part.loc[part["lost"].idxmax()]
        lost = part["lost"].to_numpy(dtype=float)
        drawn = np.random.default_rng(0).integers(0, len(lost), (10_000, len(lost)))
        low, high = interval(np.median(lost[drawn], axis=1), len(lost)).tolist()
        where = f"{worst['mix']}, {worst['amount']:g} {worst['budget']}"
        median = float(part["lost"].median())
        figures = (len(part), median, low, high, float(worst["lost"]), where)
        lines.append((*by, *figures, float((part["lost"] <= 0.03).mean()), part["spent"].max()))
    columns = ["budget", "advisor", "settings", "median", "low", "high", "worst", "where"]
    return pd.DataFrame(lines, columns=[*columns, "within", "most_spent"])


@checked
def coverage_advice(
    table: pd.DataFrame,
    data: Mapping[str, Sequence[Encoded] | Spans],
    shape: Shape,
    training: TrainConfig,
) -> pd.DataFrame:
    """What :func:`choose_training` advises for each setting: the most coverage gained a second.

    With the runs' own step times, or, for a budget of slots, a supervised slot. ``data`` holds what
    each mix's drafters learned from, ``table`` is of :func:`run_table` or :func:`taus_at`.
    """
    require_columns("table", table, (*SETTING, *CELL, "steps", "step_seconds", "slots"))
    both = table.merge(_counted(table, data, shape, training)[["mix", *CELL, "gain"]])
    by_time = both["budget"] == "seconds"
    both["rate"] = both["gain"] / both["step_seconds"].where(by_time, both["slots"] / both["steps"])
    best = both.loc[both.groupby(SETTING, observed=True)["rate"].idxmax(), [*SETTING, *CELL]]
    return best.assign(advisor="coverage", spent=0.0).reset_index(drop=True)


@checked
def recorded_step_time(
    table: pd.DataFrame,
    data: Mapping[str, Sequence[Encoded] | Spans],
    shape: Shape,
    training: TrainConfig,
) -> StepTime:
    """Fit the step times that recorded runs were planned with, the target's features cached.

    Arguments as of :func:`coverage_advice`.
    """
    require_columns("table", table, ("mix", *CELL, "step_seconds"))
    counted = _counted(table, data, shape, training)[["mix", *CELL, "operations"]]
    kinds = table.merge(counted).groupby(["mix", *CELL], observed=True)
    found = kinds[["operations", "step_seconds"]].first()
    return fit_step_time(found.rename(columns={"step_seconds": "seconds"}))


def _counted(
    table: pd.DataFrame,
    data: Mapping[str, Sequence[Encoded] | Spans],
    shape: Shape,
    training: TrainConfig,
) -> pd.DataFrame:
    """What :func:`choose_training` counts of each cell of each mix."""
    parts = []
    for mix, chats in data.items():
        own = table[table["mix"] == mix]
        for rows, part in own.groupby("batch_size"):
            options: dict[str, Any] = {
                "num_anchors": sorted({int(n) for n in part["num_anchors"]}),
                "block_sizes": sorted({int(k) for k in part["block_size"]}),
                "batch_size": int(str(rows)),
                "gamma": training.loss_decay_gamma,
                "dtype": training.precision,
                "features": "cached",
                "per": training.anchors_per,
            }
            found = choose_training(chats, shape, time=StepTime(1.0, 0.0, 0.0, 0.0, 0), **options)
            parts.append(found.table.assign(mix=mix, batch_size=int(str(rows))))
    return pd.concat(parts)


def _kept(table: pd.DataFrame, one: Mapping[str, Any], by: str) -> float:
    """The share of its tau that a cell has where its budget is less by what was spent."""
    left = one["amount"] - one["spent"]
    if left <= 0:
        raise ValueError(f"spent must be less than the budget, {one['amount']}, got {one['spent']}")
    same = (table[["mix", *CELL]] == [one[name] for name in ("mix", *CELL)]).all(axis=1)
    own = table[same]
    taus = [taus_at(own, "seconds", amount, by) for amount in (left, one["amount"])]
    if any(found.empty for found in taus):
        raise ValueError(f"table must reach down to {left:g} seconds, got no such runs of {one}")
    less, whole = (found[by].iloc[0] for found in taus)
    return float(less / whole)


def _pooled(fresh: pd.DataFrame, by: str) -> tuple[float, int]:
    """The standard deviation of log tau between seeds of a cell, and its degrees of freedom."""
    logs = np.log(fresh[by])
    groups = [fresh[name] for name in (*SETTING, *CELL)]
    means = logs.groupby(groups, observed=True).transform("mean")
    freedom = len(fresh) - logs.groupby(groups, observed=True).ngroups
    if freedom < 1:
        raise ValueError("fresh must hold two seeds of a cell, got one of each")
    return float((((logs - means) ** 2).sum() / freedom) ** 0.5), int(freedom)


def _fresh_loss(
    fresh: pd.DataFrame, one: Mapping[str, Any], by: str, spread: float, freedom: int
) -> tuple[Float[np.ndarray, " three"], pd.Series, int] | None:
    """The loss with its interval, the best of the fresh cells, and the seeds of the advised one."""
    from scipy import stats

    part = fresh[(fresh[SETTING] == [one[name] for name in SETTING]).all(axis=1)]
    logs = np.log(part[by].astype(float))
    groups = logs.groupby([part[name] for name in CELL])
    means, counts = groups.mean(), groups.size()
    cell = tuple(one[name] for name in CELL)
    if cell not in means.index or len(means) < 2:
        return None
    best = means.idxmax()
    behind = means[cell] - means[best]
    error = spread * (1 / counts[cell] + 1 / counts[best]) ** 0.5 if best != cell else 0.0
    half = error * stats.t.ppf(0.975, freedom)
    top = pd.Series([*best, float(np.exp(means[best]))], index=[*CELL, "fitted"])
    return 1 - np.exp(behind + np.array([0, half, -half])), top, int(counts[cell])
