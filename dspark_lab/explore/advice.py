"""Advice for training as pictures: what a pilot expects of each option, what advice has lost."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark_lab.checks import Count, checked, require_columns
from dspark_lab.explore import style
from dspark_lab.explore.style import BLUE, INK, RED
from dspark_lab.tuning import CELL, Advice, option_name

# Inches of a line of options or settings, and of what stands above and below them.
_LINE, _AROUND = 0.23, 0.95


@checked
def plot_advice(advice: Advice, found: pd.DataFrame | None = None, *, most: Count = 12) -> Figure:
    """Expected tau of each option of :func:`dspark_lab.pilot` in its 90 % interval, best first.

    Where pilots were run, hollow marks are what was expected before them, diamonds what an option's
    own pilot forecasts. ``found``, of :func:`dspark_lab.tuning.run_table`, adds what runs of the
    same options really reached, their mean. At most so many options, and those that were piloted.
    """
    if found is not None:
        require_columns("found", found, [*CELL, "held_out"])
    table = advice.table.sort_values("tau", ascending=False, kind="stable")
    shown = (np.arange(len(table)) < most) | (table["piloted"] > 0).to_numpy()
    table = table[shown]
    figure, ax = style.new_figure(7, _LINE * len(table) + _AROUND)
    _lines(ax, [option_name(option) for _, option in table.iterrows()])
    y = np.arange(len(table))
    look: dict[str, Any] = {"linestyle": "none", "color": BLUE, "markersize": 5}
    ax.hlines(y, table["low"], table["high"], color=BLUE, linewidth=1.4)
    ax.plot(table["tau"], y, marker="o", label="expected", **look)
    piloted = table["forecast"].notna().to_numpy()
    if piloted.any():
        ax.plot(table["prior"], y, marker="o", fillstyle="none", label="before pilots", **look)
        own = table["forecast"][piloted]
        ax.plot(own, y[piloted], marker="D", fillstyle="none", label="its pilot alone", **look)
    if found is not None:
        reached = found.groupby(CELL)["held_out"].mean()
        taus = reached.reindex(pd.MultiIndex.from_frame(table[CELL])).to_numpy()
        mark = look | {"color": RED, "markersize": 7, "markeredgewidth": 1.6}
        ax.plot(taus, y, marker="x", label="really reached", **mark)
    ax.set_xlabel("tau at the end of the budget")
    ax.set_ylabel("option")
    style.legend_above(ax, 4)
    return figure


@checked
def plot_judged(judged: pd.DataFrame) -> Figure:
    """The tau that advisors lose in each setting, of :func:`dspark_lab.tuning.judge_advice`.

    A line a setting, a mark with its 95 % interval for each advisor.
    """
    by = ["mix", "budget", "amount"]
    require_columns("judged", judged, [*by, "advisor", "lost", "low", "high"])
    settings = judged[by].drop_duplicates().sort_values(by).reset_index(drop=True)
    unit = {"seconds": "s", "slots": "slots"}
    names = [f"{mix}, {amount:,g} {unit[kind]}" for mix, kind, amount in settings.to_numpy()]
    advisors = list(dict.fromkeys(judged["advisor"]))
    figure, ax = style.new_figure(7, 2 * _LINE * len(settings) + _AROUND)
    _lines(ax, names)
    shifts = np.linspace(-0.25, 0.25, len(advisors)) if len(advisors) > 1 else np.zeros(1)
    for i, (advisor, shift) in enumerate(zip(advisors, shifts, strict=True)):
        own = judged[judged["advisor"] == advisor].merge(settings.assign(y=settings.index), on=by)
        y, look = own["y"] + shift, style.line_look(i)
        ax.hlines(y, own["low"], own["high"], color=look["color"], linewidth=1.2)
        ax.plot(own["lost"], y, linestyle="none", markersize=5, label=advisor, **look)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("tau lost against the best cell")
    ax.set_ylabel("conversations, budget")
    style.legend_above(ax, len(advisors))
    return figure


def _lines(ax: Axes, names: list[str]) -> None:
    """A named line each, the first on top, and faint rules between."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
    cast(Any, ax.spines["left"]).set_visible(False)
