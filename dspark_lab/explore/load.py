"""Pictures of a serving engine: policies under load, the prefix scheduler, steps per second."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_lab.explore.speedup import mark_chosen, ring
from dspark_lab.explore.style import (
    BLUE,
    GREEN,
    INK,
    RED,
    add_note,
    add_rules,
    add_title,
    doubling_axis,
    legend_above,
    line_look,
    new_figure,
    plain_text,
)
from dspark_lab.serving import StepsPerSecond

PLAIN = "plain decoding"
# A walk of more slots than this is a line without marks.
_MOST_MARKS = 64


def plot_load(
    table: pd.DataFrame, *, concurrency: int | None = None, axes: Sequence[Axes] | None = None
) -> Figure:
    """Policies under load: throughput against the speed of one user, and what they verify.

    One line for each policy, one mark for each concurrency, some of which are written at the marks
    of the policy with the highest throughput. Further up and to the right is better.

    Args:
        table: from :func:`dspark_lab.serving.load_table`.
        concurrency: one to mark.
        axes: draw in these two instead of in a new figure.
    """
    levels = sorted(set(table["concurrency"]))
    # No more names than there is room for.
    shown = levels[:: -(-len(levels) // 5)]
    if concurrency is not None and concurrency not in levels:
        raise ValueError(f"concurrency must be one of {levels}, got {concurrency}")
    if axes is None:
        _, axes = new_figure(8.6, 3.9, columns=2, wspace=0.08)
    left, right = axes
    fastest = table.loc[table["throughput"].idxmax(), "policy"]
    drafting = [policy for policy in table["policy"].unique() if policy != PLAIN]
    for policy, part in table.groupby("policy", sort=False):
        style: dict[str, Any] = {"color": INK, "linestyle": "--", "marker": "x"}
        if policy != PLAIN:
            # Other looks than those of the temperatures in the panel above.
            style = line_look(2 + drafting.index(policy) % 4)
        for ax, x, y in (
            (left, "per_user", "throughput"),
            (right, "concurrency", "verified_per_request"),
        ):
            ax.plot(part[x], part[y], markersize=4, label=plain_text(policy), **style)
        if policy == fastest:
            for row in part[part["concurrency"].isin(shown)].itertuples(index=False):
                add_note(left, f"{row.concurrency}", (row.per_user, row.throughput), (5, 3))
    ringed = table[table["concurrency"] == concurrency]
    ring(left, ringed["per_user"], ringed["throughput"], INK)
    left.set_xlim(left=0)
    left.set_xlabel("tokens/s of one user")
    left.set_ylabel("tokens/s of all")
    doubling_axis(right, shown)
    mark_chosen(right, "requests in the batch", concurrency)
    right.set_ylabel("verified per request")
    for ax in (left, right):
        ax.margins(y=0.1)
        ax.set_ylim(bottom=0)
        add_rules(ax)
    legend_above(left, 2)
    return cast(Figure, left.figure)


def plot_schedule(table: pd.DataFrame) -> Figure:
    """Theta while slots are admitted one by one, and where the prefix scheduler stops.

    Filled marks are admitted. A search for the best Theta of all, which would bias the answers,
    may go on past a slot that lowers it.

    Args:
        table: from :func:`dspark_lab.serving.schedule_table`.
    """
    if table.empty:
        raise ValueError("table must hold at least one slot to admit, got none")
    figure, ax = new_figure(7, 3.6)
    number = np.arange(len(table) + 1)
    theta = np.append(table["theta_before"].iloc[0], table["theta"])
    stop, best = int(table["admitted"].sum()), int(table["retrospective"].sum())
    ax.plot(number, theta, color=BLUE)
    marks = {"color": BLUE, "linestyle": "none", "markersize": 4}
    if len(number) <= _MOST_MARKS:
        ax.plot(number[stop + 1 :], theta[stop + 1 :], "o", fillstyle="none", **marks)
        ax.plot(number[: stop + 1], theta[: stop + 1], "o", **marks)
    for place, marker, colour, size, label in (
        (stop, "s", GREEN, 8, f"prefix scheduler: stops at {stop}"),
        (best, "D", RED, 11, f"retrospective, biased: {best}"),
    ):
        ax.axvline(place, color=colour, linestyle="-" if marker == "s" else ":", linewidth=1)
        look = {"color": colour, "fillstyle": "none", "markersize": size, "label": label}
        ax.plot([place], [theta[place]], marker, **look)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.set_xlabel("slots admitted, likeliest first")
    ax.set_ylabel("Theta, expected tokens/s")
    add_rules(ax)
    legend_above(ax, 2, markerscale=0.7)
    return figure


def plot_steps(table: pd.DataFrame | StepsPerSecond) -> Figure:
    """Seconds of a target's step, and its tokens per second, by tokens per step.

    Marks are measured, lines what is taken to lie between them.

    Args:
        table: steps per second, or their table.
    """
    steps = table if isinstance(table, StepsPerSecond) else StepsPerSecond.of(table)
    figure, (left, right) = new_figure(8.6, 3.5, columns=2, wspace=0.08)
    low, high = steps.tokens[0], steps.tokens[-1]
    between = np.unique(np.append(np.geomspace(low, high, 200).round(), steps.tokens))
    for ax, style in ((left, {"color": BLUE}), (right, {"color": GREEN})):
        for tokens, look in ((between, "-"), (steps.tokens, "o")):
            value = 1000 * steps.seconds(tokens) if ax is left else tokens * steps(tokens)
            ax.plot(tokens, value, look, markersize=5, **style)
        # No more names than there is room for.
        doubling_axis(ax, steps.tokens[:: -(-len(steps.tokens) // 10)].tolist())
        ax.set_xlabel("tokens per step")
        ax.set_ylim(bottom=0)
        add_rules(ax)
    left.set_ylabel("time of a step in ms")
    right.set_ylabel("tokens/s that are read")
    where = f"{steps.device}, context {steps.context_length}"
    add_title(left, plain_text(where))
    return figure
