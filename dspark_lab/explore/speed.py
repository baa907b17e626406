"""Pictures of serving: speed-up, the seconds of a round, policies under load, steps per second.

A mark is filled where drafting is faster than plain decoding and open where it is not.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dspark_lab.checks import require_columns
from dspark_lab.explore import style
from dspark_lab.explore.style import BLUE, GREEN, INK, ORANGE, PINK, RED, add_note, plain_text
from dspark_lab.serving import StepsPerSecond

# The parts of a round in the order in which they happen, and how each is told from the others.
_PARTS: dict[str, dict[str, Any]] = {
    "draft": {"facecolor": ORANGE, "hatch": "////"},
    "verify": {"facecolor": BLUE},
    "replay": {"facecolor": RED, "hatch": "xxxx"},
    "rollback": {"facecolor": PINK, "hatch": "...."},
    "overhead": {"facecolor": INK},
}
_PLAIN = "plain decoding"
_SPEED = ["speedup", "speedup_low", "speedup_high"]
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

    The fastest length of each line is ringed. Dashed, where it differs, is the speed-up
    without what rejections cost. The tables, one or several by name, are from
    :func:`dspark_lab.serving.speedup_table`. ``chosen`` is a draft length to mark, ``bold`` names
    the one table with a thick line, a band and dashes; all are alike where None.
    """
    named = style.tables_by_name(tables, ["draft_length", "speedup"])
    style.require_one_of("bold", bold, (None, *named))
    thick = named if bold is None else {bold: named[bold]}
    style.tables_by_name(thick, [*_SPEED, "without_replay"])
    alone = ax is None
    if ax is None:
        _, ax = style.new_figure(7, 3.8)
    forgets = False
    for i, (name, table) in enumerate(named.items()):
        thin = name not in thick
        words = filter(None, (plain_text(name), _best_in_words(table, "draft_length")))
        if not thin and _replay_counts(table):
            forgets = True
            colour = style.line_look(i)["color"]
            ax.plot(table["draft_length"], table["without_replay"], "--", color=colour)
        look: dict[str, Any] = {"label": ": ".join(words), "linewidth": 1 if thin else 2}
        _plot_speed(ax, table, "draft_length", i, band=not thin, **look)
    _plain_line(ax)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _mark_chosen(ax, "draft length K", chosen)
    handles = ax.get_legend_handles_labels()[0]
    if forgets:
        handles.append(Line2D([], [], linestyle="--", color=INK, label="forgetting replay"))
    # Two lines of the legend, for as many as six, where there is room.
    columns = 3 if alone and len(handles) > 4 else 2
    style.legend_above(ax, columns, handles=handles, handlelength=2.5)
    return cast(Figure, ax.figure)


def plot_round(
    table: pd.DataFrame, *, draft_length: int | None = None, ax: Axes | None = None
) -> Figure:
    """Where the time of a round goes, beside the plain steps that yield as many tokens.

    From :func:`dspark_lab.serving.speedup_table`, for one ``draft_length`` or all. A round pays
    where its bar is shorter than the outlined one below it.
    """
    seconds = ["round_seconds", *(f"{part}_seconds" for part in _PARTS)]
    require_columns("table", table, ["draft_length", "tau", "speedup", *seconds])
    if draft_length is not None:
        style.require_one_of("draft_length", draft_length, table["draft_length"].tolist())
        table = table[table["draft_length"] == draft_length]
    if ax is None:
        _, ax = style.new_figure(7, 0.48 * len(table) + 1.4)
    y = np.arange(len(table))
    total = 1000 * table["round_seconds"].to_numpy()
    plain = total * table["speedup"].to_numpy()
    left, handles = np.zeros(len(table)), []
    for part, look in _PARTS.items():
        width = 1000 * table[f"{part}_seconds"].to_numpy()
        if not np.nan_to_num(width).any():
            continue
        bar: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.6, **look}
        ax.barh(y - 0.14, width, 0.42, left=left, **bar)
        handles.append(Patch(label="rest" if part == "overhead" else part, **bar))
        left = left + width
    outline: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "linewidth": 1.2}
    ax.barh(y + 0.22, plain, 0.24, **outline)
    handles.append(Patch(label="plain steps", **outline))
    for row, round_, steps, speed in zip(y, total, plain, table["speedup"], strict=True):
        if np.isfinite(speed):
            words = f"{speed:.2f}, {'faster' if speed > 1 else 'slower'}"
            add_note(ax, words, (max(round_, steps), row), (5, 0), va="center")
    names = [f"K {one.draft_length}\ntau {one.tau:.2f}" for one in table.itertuples()]
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
    style.legend_above(ax, 3, handles=handles, columnspacing=1, handlelength=1.5)
    return cast(Figure, ax.figure)


def plot_temperatures(table: pd.DataFrame) -> Figure:
    """Accept rate, break-even rate and speed-up of :func:`~dspark_lab.serving.temperature_table`.

    Where the accept rate falls below the break-even rate, the win is gone.
    """
    needed = ["accept_rate", "break_even_rate", "break_even_without_replay"]
    given = ["temperature", "draft_length", *needed, *_SPEED, "without_replay"]
    require_columns("table", table, given)
    figure, (left, right) = style.new_figure(style.WIDEST, 3.7, columns=2, wspace=0.08)
    x = table["temperature"].to_numpy()
    forgets = _replay_counts(table)
    need = table["break_even_rate"].to_numpy()
    pays = table["accept_rate"].to_numpy() > need
    kinds = ((pays, GREEN, "-", "pays"), (~pays, RED, ":", "does not pay"))
    for which, colour, linestyle, label in kinds:
        if which.any():
            look = {"colors": colour, "linestyles": linestyle, "linewidth": 3, "zorder": 1}
            # A rate that none reaches is drawn as certainty.
            ends = np.minimum(need[which], 1)
            left.vlines(x[which], table["accept_rate"][which], ends, label=label, **look)
    left.plot(x, table["accept_rate"], "-o", color=BLUE, label="accept rate")
    reachable = table.replace(np.inf, np.nan)
    look = {"color": RED, "fillstyle": "none", "label": "break-even rate"}
    left.plot(x, reachable["break_even_rate"], "--s", **look)
    if forgets:
        look = {"color": RED, "linewidth": 1.5, "label": "break-even, forgetting replay"}
        left.plot(x, reachable["break_even_without_replay"], ":", **look)
    for place in x[np.isinf(need)]:
        side, shift = ("right", -5) if place > x.mean() else ("left", 5)
        add_note(left, "no rate pays", (place, 1), (shift, 0), ha=side, va="top")
    left.margins(y=0.1)
    style.percent_axis(left, "accept rate of a slot")
    label = f"K {table['draft_length'].iloc[0]}"
    _plot_speed(right, table, "temperature", 0, ringed=False, label=label)
    if forgets:
        right.plot(x, table["without_replay"], "--", color=BLUE, label="forgetting replay")
    _plain_line(right)
    for ax in (left, right):
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.margins(x=0.12)
        ax.set_xlabel("temperature")
        style.legend_above(ax, 2, handlelength=2.5)
    return figure


def plot_thresholds_speed(table: pd.DataFrame, *, chosen: float | None = None) -> Figure:
    """Speed-up and verified slots by static threshold, and the ``chosen`` one marked.

    From :func:`dspark_lab.serving.threshold_table`. The fastest of each draft length is ringed.
    """
    require_columns("table", table, ["draft_length", "threshold", "verified", *_SPEED])
    figure, (left, right) = style.new_figure(style.WIDEST, 3.7, columns=2, wspace=0.08)
    for i, (length, part) in enumerate(table.groupby("draft_length")):
        label = f"K {length}: {_best_in_words(part, 'threshold')}"
        _plot_speed(left, part, "threshold", i, label=label)
        look = style.line_look(i) | {"markersize": 4, "label": f"K {length}"}
        right.plot(part["threshold"], part["verified"], **look)
    _plain_line(left)
    right.set_ylim(bottom=0)
    right.set_ylabel("verified slots per round")
    style.add_rules(right)
    for ax in (left, right):
        _mark_chosen(ax, "threshold on the confidence", chosen)
        style.legend_above(ax, 2)
    return figure


def plot_load(
    table: pd.DataFrame, *, concurrency: int | None = None, axes: Sequence[Axes] | None = None
) -> Figure:
    """Policies under load: throughput against the speed of one user, and what they verify.

    From :func:`dspark_lab.serving.load_table`; further up and to the right is better.
    ``concurrency`` is one to mark: dotted, on the left from policy to policy, the fastest ringed.
    """
    figures = ["throughput", "per_user", "verified_per_request"]
    require_columns("table", table, ["policy", "concurrency", *figures])
    levels = sorted(set(table["concurrency"]))
    # No more names than there is room for.
    shown = levels[:: -(-len(levels) // 5)]
    style.require_one_of("concurrency", concurrency, (None, *levels))
    if axes is None:
        _, axes = style.new_figure(style.WIDEST, 3.9, columns=2, wspace=0.08)
    left, right = axes
    fastest = table.loc[table["throughput"].idxmax(), "policy"]
    drafting = [policy for policy in table["policy"].unique() if policy != _PLAIN]
    for policy, part in table.groupby("policy", sort=False):
        look: dict[str, Any] = {"color": INK, "linestyle": "--", "marker": "x"}
        if policy != _PLAIN:
            # Other looks than those of the temperatures in the panel above.
            look = style.line_look(2 + drafting.index(policy) % 4)
        look |= {"markersize": 4, "label": plain_text(policy)}
        left.plot(part["per_user"], part["throughput"], **look)
        right.plot(part["concurrency"], part["verified_per_request"], **look)
        if policy == fastest:
            for row in part[part["concurrency"].isin(shown)].itertuples(index=False):
                add_note(left, f"{row.concurrency}", (row.per_user, row.throughput), (5, 3))
    chosen = table[table["concurrency"] == concurrency].sort_values("throughput")
    left.plot(chosen["per_user"], chosen["throughput"], ":", color=INK, linewidth=1.2)
    # They may lie close together, where rings around all would hide them.
    _ring(left, chosen["per_user"].tail(1), chosen["throughput"].tail(1), INK)
    left.set_xlim(left=0)
    left.set_xlabel("tokens/s of one user")
    left.set_ylabel("tokens/s of all")
    style.doubling_axis(right, shown)
    _mark_chosen(right, "requests in the batch", concurrency)
    right.set_ylabel("verified per request")
    for ax in (left, right):
        ax.margins(y=0.1)
        ax.set_ylim(bottom=0)
        style.add_rules(ax)
    style.legend_above(left, 2)
    return cast(Figure, left.figure)


def plot_schedule(table: pd.DataFrame) -> Figure:
    """Theta while slots are admitted one by one, and where the prefix scheduler stops.

    From :func:`dspark_lab.serving.schedule_table`. Filled marks are admitted. A search for the best
    Theta of all, which would bias the answers, may go on past a slot that lowers it.
    """
    columns = ["theta_before", "theta", "admitted", "retrospective"]
    require_columns("table", table, columns)
    if table.empty:
        raise ValueError("table must hold at least one slot to admit, got none")
    figure, ax = style.new_figure(7, 3.6)
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
    style.add_rules(ax)
    style.legend_above(ax, 2, markerscale=0.7)
    return figure


def plot_steps(table: pd.DataFrame | StepsPerSecond) -> Figure:
    """Seconds of a target's step, and its tokens per second, by tokens per step.

    Marks are measured, lines what is taken to lie between them.
    """
    steps = table if isinstance(table, StepsPerSecond) else StepsPerSecond.of(table)
    figure, (left, right) = style.new_figure(style.WIDEST, 3.5, columns=2, wspace=0.08)
    low, high = steps.tokens[0], steps.tokens[-1]
    between = np.unique(np.append(np.geomspace(low, high, 200).round(), steps.tokens))
    for ax, colour in ((left, BLUE), (right, GREEN)):
        for tokens, look in ((between, "-"), (steps.tokens, "o")):
            value = 1000 * steps.seconds(tokens) if ax is left else tokens * steps(tokens)
            ax.plot(tokens, value, look, markersize=5, color=colour)
        # No more names than there is room for.
        style.doubling_axis(ax, steps.tokens[:: -(-len(steps.tokens) // 10)].tolist())
        ax.set_xlabel("tokens per step")
        ax.set_ylim(bottom=0)
        style.add_rules(ax)
    left.set_ylabel("time of a step in ms")
    right.set_ylabel("tokens/s that are read")
    style.add_title(left, plain_text(f"{steps.device}, context {steps.context_length}"))
    return figure


def _best_in_words(table: pd.DataFrame, by: str) -> str:
    if table["speedup"].isna().all():
        return "no rate known"
    best = table.loc[table["speedup"].idxmax()]
    return f"best {best[by]:g}, {best['speedup']:.2f}"


def _replay_counts(table: pd.DataFrame) -> bool:
    """Whether replay changes the speed-up."""
    return not np.allclose(table["without_replay"], table["speedup"], equal_nan=True)


def _plot_speed(
    ax: Axes,
    table: pd.DataFrame,
    x: str,
    i: int,
    *,
    band: bool = True,
    ringed: bool = True,
    **options: Any,
) -> None:
    """Line ``i`` of speed-ups: filled marks are wins, open ones losses, the fastest is ringed."""
    look = style.line_look(i) | {"markersize": 5}
    if band:
        style.add_band(ax, table[x], table["speedup_low"], table["speedup_high"], look["color"])
    ax.plot(table[x], table["speedup"], **look | {"fillstyle": "none"}, **options)
    wins = table[table["speedup"] > 1]
    ax.plot(wins[x], wins["speedup"], **look | {"fillstyle": "full", "linestyle": "none"})
    if ringed:
        best = table.nlargest(1, "speedup")
        _ring(ax, best[x], best["speedup"], look["color"])


def _ring(ax: Axes, x: pd.Series, y: pd.Series, colour: str) -> None:
    ax.plot(x, y, "o", color=colour, fillstyle="none", markersize=11, clip_on=False)


def _plain_line(ax: Axes) -> None:
    """Draw the line that drafting has to beat, and shade what lies below."""
    low, high = ax.get_ylim()
    reach = 0.15 * max(high - low, 0.2)
    # Below all that is drawn there is room for the words.
    low, high = min(low, 1) - reach, max(high, 1 + reach)
    ax.set_ylim(low, high)
    ax.axhline(1, color=INK, linewidth=1.2)
    ax.axhspan(low, 1, color=INK, alpha=0.1, linewidth=0)
    add_note(ax, "slower than plain", (0, 0), (3, 3), x="axes fraction", y="axes fraction")
    ax.set_ylabel("speed-up over plain")
    style.add_rules(ax)


def _mark_chosen(ax: Axes, label: str, chosen: float | None) -> None:
    """Name the x axis, and draw a dotted line at what was chosen on it."""
    if chosen is not None:
        ax.axvline(chosen, color=INK, linestyle=":", linewidth=1.2)
        label += f" (dotted {chosen:g})"
    ax.set_xlabel(label)
