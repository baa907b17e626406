"""Pictures of choosing for serving: speed-up, a round's seconds, thresholds, load.

Each takes a table of :mod:`dspark_lab.serving.speedup`, :mod:`dspark_lab.serving.load` or
:mod:`dspark_lab.serving.schedule` and returns a figure. Nothing is worked out here beyond where ink goes;
style and colours are those of :mod:`dspark_lab.explore.plots`. A mark is filled where drafting is faster
than plain decoding and open where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dspark_lab.explore.plots import (
    BLUE,
    GREEN,
    INK,
    LINE_COLOURS,
    MARKERS,
    ORANGE,
    PINK,
    RED,
    add_rules,
    legend_above,
    new_figure,
    plain_text,
)
from dspark_lab.serving import StepsPerSecond

__all__ = [
    "plot_load",
    "plot_round",
    "plot_schedule",
    "plot_serving",
    "plot_speedup",
    "plot_steps",
    "plot_temperatures",
    "plot_thresholds_speed",
]

PLAIN = "plain decoding"
# The parts of a round in the order in which they happen, and how each is told from the others.
_PARTS: dict[str, dict[str, Any]] = {
    "draft": {"facecolor": ORANGE, "hatch": "////"},
    "verify": {"facecolor": BLUE},
    "replay": {"facecolor": RED, "hatch": "xxxx"},
    "rollback": {"facecolor": PINK, "hatch": "...."},
    "overhead": {"facecolor": INK},
}
_PART_NAMES = {"overhead": "rest"}
# A walk of more slots than this is a line without marks.
_MOST_MARKS = 64


def plot_speedup(
    tables: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    chosen: int | None = None,
    bold: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Speed-up over plain decoding against draft length, with its 95 % interval.

    The fastest length of each line is ringed. Dashed, where it differs, is what a model would
    promise that forgets what rejections cost.

    Args:
        tables: from :func:`dspark_lab.serving.speedup.speedup_table`, one or several by name.
        chosen: a draft length to mark.
        bold: the name of the table that stands out; the others are thin and have neither band nor
            dashes. All are alike where None.
        ax: draw here instead of in a new figure.

    Raises:
        ValueError: no table, or no table of the name ``bold``.
    """
    named = _named(tables)
    if bold is not None and bold not in named:
        raise ValueError(f"bold must be one of {list(named)}, got {bold!r}")
    if ax is None:
        _, ax = new_figure(7, 3.8)
    forgets = False
    for (name, table), colour, marker in zip(
        named.items(), cycle(LINE_COLOURS), cycle(MARKERS), strict=False
    ):
        thin = bold not in (None, name)
        label = ": ".join(filter(None, (plain_text(name), _best_in_words(table, "draft_length"))))
        if not thin:
            _band(ax, table, "draft_length", colour)
            if not np.allclose(table["without_replay"], table["speedup"], equal_nan=True):
                forgets = True
                ax.plot(table["draft_length"], table["without_replay"], "--", color=colour)
        width = 1 if thin else 2
        _speed_line(ax, table, "draft_length", colour, marker, label=label, linewidth=width)
    # The shortest drafts are rarely the fastest, so there is room for words.
    _plain_line(ax, "left")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _mark(ax, "draft length K", chosen)
    handles = ax.get_legend_handles_labels()[0]
    if forgets:
        handles.append(Line2D([], [], linestyle="--", color=INK, label="forgetting replay"))
    # Two lines of the key, for as many as six.
    legend_above(ax, 2 if len(handles) <= 4 else 3, handles=handles, handlelength=2.5)
    return cast(Figure, ax.figure)


def plot_round(
    table: pd.DataFrame, *, draft_length: int | None = None, ax: Axes | None = None
) -> Figure:
    """Where the time of a round goes, beside the plain steps that yield as many tokens.

    A round pays where its bar is shorter than the outlined one below it.

    Args:
        table: from :func:`dspark_lab.serving.speedup.speedup_table`.
        draft_length: the one to show; all where None.
        ax: draw here instead of in a new figure.

    Raises:
        ValueError: the table has no such draft length.
    """
    if draft_length is not None:
        held = table["draft_length"].tolist()
        if draft_length not in held:
            raise ValueError(f"draft_length must be one of {held}, got {draft_length}")
        table = table[table["draft_length"] == draft_length]
    if ax is None:
        _, ax = new_figure(7, 0.48 * len(table) + 1.4)
    y = np.arange(len(table))
    total = 1000 * table["round_seconds"].to_numpy()
    plain = total * table["speedup"].to_numpy()
    left, handles = np.zeros(len(table)), []
    for part, look in _PARTS.items():
        width = 1000 * table[f"{part}_seconds"].to_numpy()
        if not np.nan_to_num(width).any():
            continue
        style: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.6, **look}
        ax.barh(y - 0.14, width, 0.42, left=left, **style)
        handles.append(Patch(label=_PART_NAMES.get(part, part), **style))
        left = left + width
    outline: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "linewidth": 1.2}
    ax.barh(y + 0.22, plain, 0.24, **outline)
    handles.append(Patch(label="plain steps", **outline))
    for row, round_, steps, speed in zip(y, total, plain, table["speedup"], strict=True):
        if np.isfinite(speed):
            word = "faster" if speed > 1 else "slower"
            _note(ax, f"{speed:.2f}, {word}", (max(round_, steps), row), (5, 0), va="center")
    names = [
        f"K {k}\ntau {tau:.2f}" for k, tau in zip(table["draft_length"], table["tau"], strict=True)
    ]
    if draft_length is None:
        ax.set_yticks(y, names)
        ax.set_ylabel("draft length, tokens per round")
    else:
        ax.set_yticks([])
        ax.set_ylabel(names[0])
    ax.set_ylim(len(table) - 0.5, -0.5)
    # Room for the words beside the longest bar.
    ax.set_xlim(0, 1.3 * np.nanmax(np.append([total, plain], 0)) or 1)
    ax.set_xlabel("ms of a round")
    legend_above(ax, 3, handles=handles, columnspacing=1, handlelength=1.5)
    return cast(Figure, ax.figure)


def plot_temperatures(table: pd.DataFrame) -> Figure:
    """Where the accept rate falls below the break-even rate, the win is gone.

    Args:
        table: from :func:`dspark_lab.serving.speedup.temperature_table`.
    """
    figure, (left, right) = new_figure(8.6, 3.7, columns=2, wspace=0.08)
    x = table["temperature"].to_numpy()
    forgets = not np.allclose(table["without_replay"], table["speedup"], equal_nan=True)
    need = table["break_even_rate"].to_numpy()
    pays = table["accept_rate"].to_numpy() > need
    for which, colour, linestyle, label in (
        (pays, GREEN, "-", "pays"),
        (~pays, RED, ":", "does not pay"),
    ):
        # A rate that none reaches is drawn as certainty.
        ends = np.minimum(need[which], 1)
        rates = table["accept_rate"][which]
        if which.any():
            look = {"colors": colour, "linestyles": linestyle, "linewidth": 3}
            left.vlines(x[which], rates, ends, label=label, zorder=1, **look)
    left.plot(x, table["accept_rate"], "-o", color=BLUE, label="accept rate")
    left.plot(x, _reachable(need), "--s", color=RED, fillstyle="none", label="break-even rate")
    if forgets:
        left.plot(
            x,
            _reachable(table["break_even_without_replay"].to_numpy()),
            ":",
            color=RED,
            linewidth=1.5,
            label="break-even, forgetting replay",
        )
    for place in x[np.isinf(need)]:
        side, shift = ("right", -5) if place > x.mean() else ("left", 5)
        _note(left, "no rate pays", (place, 1), (shift, 0), ha=side, va="top")
    left.margins(y=0.1)
    left.yaxis.set_major_formatter("{x:.0%}")
    left.set_ylabel("accept rate of a slot")
    add_rules(left)
    _band(right, table, "temperature", BLUE)
    label = f"K {table['draft_length'].iloc[0]}"
    _speed_line(right, table, "temperature", BLUE, "o", label=label, ring=False)
    if forgets:
        right.plot(x, table["without_replay"], "--", color=BLUE, label="forgetting replay")
    _plain_line(right)
    for ax in (left, right):
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.margins(x=0.12)
        ax.set_xlabel("temperature")
        legend_above(ax, 2, handlelength=2.5)
    return figure


def plot_thresholds_speed(table: pd.DataFrame, *, chosen: float | None = None) -> Figure:
    """What a static threshold does to the speed and to the slots that are verified.

    The fastest threshold of each draft length is ringed.

    Args:
        table: from :func:`dspark_lab.serving.speedup.threshold_table`.
        chosen: a threshold to mark.
    """
    figure, (left, right) = new_figure(8.6, 3.7, columns=2, wspace=0.08)
    for (length, part), colour, marker in zip(
        table.groupby("draft_length"), cycle(LINE_COLOURS), cycle(MARKERS), strict=False
    ):
        _band(left, part, "threshold", colour)
        label = f"K {length}: {_best_in_words(part, 'threshold')}"
        _speed_line(left, part, "threshold", colour, marker, label=label)
        right.plot(
            part["threshold"],
            part["verified"],
            "-" + marker,
            color=colour,
            markersize=4,
            label=f"K {length}",
        )
    _plain_line(left)
    right.set_ylim(bottom=0)
    right.set_ylabel("verified slots per round")
    add_rules(right)
    for ax in (left, right):
        _mark(ax, "threshold on the confidence", chosen)
        legend_above(ax, 2)
    return figure


def plot_load(
    table: pd.DataFrame, *, concurrency: int | None = None, axes: Sequence[Axes] | None = None
) -> Figure:
    """Policies under load: throughput against the speed of one user, and what they verify.

    One line for each policy, one mark for each concurrency, some of which are written at the marks
    of the policy with the highest throughput. Further up and to the right is better.

    Args:
        table: from :func:`dspark_lab.serving.load.load_table`.
        concurrency: one to mark.
        axes: draw in these two instead of in a new figure.

    Raises:
        ValueError: the table has no such concurrency.
    """
    levels = sorted(set(table["concurrency"]))
    # No more names than there is room for.
    shown = levels[:: -(-len(levels) // 5)]
    if concurrency is not None and concurrency not in levels:
        raise ValueError(f"concurrency must be one of {levels}, got {concurrency}")
    if axes is None:
        _, axes = new_figure(8.6, 3.9, columns=2, wspace=0.08)
    left, right = axes
    # Others than those of the temperatures beside them.
    styles = cycle(zip(LINE_COLOURS[2:], MARKERS[2:], strict=True))
    fastest = table.loc[table["throughput"].idxmax(), "policy"]
    for policy, part in table.groupby("policy", sort=False):
        style: dict[str, Any] = {"color": INK, "linestyle": "--", "marker": "x"}
        if policy != PLAIN:
            colour, marker = next(styles)
            style = {"color": colour, "linestyle": "-", "marker": marker}
        for ax, x, y in (
            (left, "per_user", "throughput"),
            (right, "concurrency", "verified_per_request"),
        ):
            ax.plot(part[x], part[y], markersize=4, label=plain_text(policy), **style)
        if policy == fastest:
            for row in part[part["concurrency"].isin(shown)].itertuples(index=False):
                _note(left, f"{row.concurrency}", (row.per_user, row.throughput), (5, 3))
    ringed = table[table["concurrency"] == concurrency]
    _ring(left, ringed["per_user"], ringed["throughput"], INK)
    left.set_xlim(left=0)
    left.set_xlabel("tokens/s of one user")
    left.set_ylabel("tokens/s of all")
    right.set_xscale("log", base=2)
    right.minorticks_off()
    right.set_xticks(shown, [str(level) for level in shown])
    _mark(right, "requests in the batch", concurrency)
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
        table: from :func:`dspark_lab.serving.schedule.schedule_table`.

    Raises:
        ValueError: a table without candidates.
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
        ax.plot(
            [place],
            [theta[place]],
            marker,
            color=colour,
            fillstyle="none",
            markersize=size,
            label=label,
        )
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

    Raises:
        TypeError, ValueError: as :meth:`dspark_lab.serving.schedule.StepsPerSecond.of`.
    """
    steps = table if isinstance(table, StepsPerSecond) else StepsPerSecond.of(table)
    figure, (left, right) = new_figure(8.6, 3.5, columns=2, wspace=0.08)
    low, high = steps.tokens[0], steps.tokens[-1]
    between = np.unique(np.append(np.geomspace(low, high, 200).round(), steps.tokens))
    for ax, style in ((left, {"color": BLUE}), (right, {"color": GREEN})):
        for tokens, look in ((between, "-"), (steps.tokens, "o")):
            value = 1000 * steps.seconds(tokens) if ax is left else tokens * steps(tokens)
            ax.plot(tokens, value, look, markersize=5, **style)
        ax.set_xscale("log", base=2)
        ax.minorticks_off()
        # No more names than there is room for.
        shown = steps.tokens[:: -(-len(steps.tokens) // 10)].tolist()
        ax.set_xticks(shown, [str(count) for count in shown])
        ax.set_xlabel("tokens per step")
        ax.set_ylim(bottom=0)
        add_rules(ax)
    left.set_ylabel("time of a step in ms")
    right.set_ylabel("tokens/s that are read")
    where = f"{steps.device}, context {steps.context_length}"
    left.set_title(plain_text(where), loc="left", color=INK, fontsize=9)
    return figure


def plot_serving(
    speedups: Mapping[str, pd.DataFrame],
    load: pd.DataFrame,
    *,
    bold: str,
    draft_length: int,
    requests: int,
    replay: bool = False,
) -> Figure:
    """:func:`plot_speedup`, :func:`plot_round` and both panels of :func:`plot_load`.

    Args:
        speedups: at this load, by name.
        load: of the simulated policies.
        bold: the name of the table whose temperature was chosen.
        draft_length, requests: the chosen ones.
        replay: whether the tables of speed-up count it; the simulated load never does.

    Raises:
        ValueError: as these functions.
    """
    figure, axes = new_figure(9.5, 5.6, columns=4, layout="none")
    # Places are fixed: finding the best ones would take longer than all the drawing.
    grid = figure.add_gridspec(
        2, 2, left=0.075, right=0.985, bottom=0.09, top=0.87, hspace=0.75, wspace=0.22
    )
    for i, ax in enumerate(axes):
        ax.set_subplotspec(grid[divmod(i, 2)])
        ax.xaxis.set_label_coords(0.5, -0.17)
        ax.yaxis.set_label_coords(-0.125, 0.5)
        ax.yaxis.set_major_locator(MaxNLocator(3))
    plot_speedup(speedups, chosen=draft_length, bold=bold, ax=axes[0])
    plot_round(speedups[bold], draft_length=draft_length, ax=axes[1])
    plot_load(load, concurrency=requests, axes=axes[2:])
    for ax in axes[:3]:
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax, title in zip(
        axes,
        (
            f"{requests} request{'s' * (requests != 1)} a step",
            f"a round, {plain_text(bold)}",
            f"simulated load{', without replay' if replay else ''}",
        ),
        strict=False,
    ):
        ax.set_title(title, loc="left", color=INK, fontsize=9, y=1, pad=32)
    return figure


def _named(tables: pd.DataFrame | Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    named = {"": tables} if isinstance(tables, pd.DataFrame) else dict(tables)
    if not named:
        raise ValueError("tables must hold at least one table, got none")
    return named


def _best_in_words(table: pd.DataFrame, by: str) -> str:
    if table["speedup"].isna().all():
        return "no rate known"
    best = table.loc[table["speedup"].idxmax()]
    return f"best {best[by]:g}, {best['speedup']:.2f}"


def _band(ax: Axes, table: pd.DataFrame, x: str, colour: str) -> None:
    low, high = table["speedup_low"], table["speedup_high"]
    ax.fill_between(table[x], low, high, color=colour, alpha=0.15, linewidth=0)


def _speed_line(
    ax: Axes,
    table: pd.DataFrame,
    x: str,
    colour: str,
    marker: str,
    *,
    ring: bool = True,
    **options: Any,
) -> None:
    """A line of speed-ups: filled marks are wins, open ones losses, the fastest is ringed."""
    ax.plot(
        table[x], table["speedup"], color=colour, marker=marker, fillstyle="none", ms=5, **options
    )
    wins = table[table["speedup"] > 1]
    ax.plot(wins[x], wins["speedup"], color=colour, linestyle="none", marker=marker, ms=5)
    if ring and table["speedup"].notna().any():
        best = table.loc[[table["speedup"].idxmax()]]
        _ring(ax, best[x], best["speedup"], colour)


def _ring(ax: Axes, x: pd.Series, y: pd.Series, colour: str) -> None:
    ax.plot(x, y, "o", color=colour, fillstyle="none", markersize=11, clip_on=False)


def _plain_line(ax: Axes, side: str = "right") -> None:
    """The line that drafting has to beat; what lies below it is shaded."""
    low, high = ax.get_ylim()
    reach = 0.15 * max(high - low, 0.2)
    low, high = min(low, 1 - reach), max(high, 1 + reach)
    ax.set_ylim(low, high)
    ax.axhline(1, color=INK, linewidth=1.2)
    ax.axhspan(low, 1, color=INK, alpha=0.1, linewidth=0)
    edge, shift = (0, 3) if side == "left" else (1, -3)
    _note(ax, "plain", (edge, 1), (shift, 2), x="axes fraction", ha=side)
    _note(ax, "slower", (edge, 1), (shift, -3), x="axes fraction", ha=side, va="top")
    ax.set_ylabel("speed-up over plain")
    add_rules(ax)


def _mark(ax: Axes, label: str, chosen: float | None) -> None:
    """The name of the x axis, and a dotted line at what was chosen on it."""
    if chosen is not None:
        ax.axvline(chosen, color=INK, linestyle=":", linewidth=1.2)
        label += f" (dotted {chosen:g})"
    ax.set_xlabel(label)


def _reachable(rates: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(rates), np.nan, rates)


def _note(
    ax: Axes,
    text: str,
    place: tuple[Any, Any],
    shift: tuple[float, float],
    *,
    x: str = "data",
    y: str = "data",
    **options: Any,
) -> None:
    """Words beside a place, ``shift`` points away from it."""
    ax.annotate(
        text,
        place,
        xycoords=(x, y),
        xytext=shift,
        textcoords="offset points",
        color=INK,
        fontsize=8,
        **options,
    )
