"""Pictures of choosing for training: what is covered, what it costs, what fits, what was found.

Each takes a table of :mod:`dspark_lab.tuning.choice`, :mod:`dspark_lab.tuning.coverage`, :mod:`dspark_lab.tuning.cost`,
:mod:`dspark_lab.tuning.memory` or :mod:`dspark_lab.tuning.sweep` and returns a figure. Nothing is worked out here
beyond where ink goes; style and colours are those of :mod:`dspark_lab.explore.plots`. What a colour says, a
line's style, a mark or a word says too. This file does not know how a table was made, nor what is
to be recommended.
"""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any, cast

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from dspark_lab.explore.plots import (
    BLUE,
    GREEN,
    INK,
    LINE_COLOURS,
    MARKERS,
    ORANGE,
    RED,
    add_legend,
    add_rules,
    legend_above,
    new_figure,
)

__all__ = [
    "plot_budget",
    "plot_fit",
    "plot_front",
    "plot_parts",
    "plot_slots",
    "plot_sweep",
    "plot_sweeps",
]

# What the sliders say, in every panel.
_CHOSEN: dict[str, Any] = {
    "color": ORANGE,
    "marker": "*",
    "markersize": 13,
    "markeredgecolor": INK,
    "markeredgewidth": 0.6,
    "linestyle": "none",
    "clip_on": False,
    "zorder": 4,
}
# Marks as a title writes them. A title is drawn in a third of the time that a legend takes, and the
# explorer draws four panels for each step of a slider.
_STAR, _RING, _SQUARE = "★", "○", "□"
# Dark is little, light is much, to any eye and in grey, too.
_HEAT = matplotlib.colormaps["viridis"]
# A log axis with more doublings than this names every second, or third.
_MOST_TICKS = 6


def plot_fit(
    table: pd.DataFrame, *, at: tuple[int, int] | None = None, ax: Axes | None = None
) -> Figure:
    """The largest number of anchors that fits, against the row's length, a line per block size.

    Args:
        table: from :func:`dspark_lab.tuning.memory.fit_table`: ``seq_len``, ``block_size``,
            ``num_anchors`` (0, where nothing fits, has a place of its own) and ``full``; hollow
            marks are where it is False.
        at: a row length and a number of anchors to mark as the chosen ones.
        ax: draw here instead of in a new figure.
    """
    if ax is None:
        _, ax = new_figure(7, 3.8)
    blocks = table["block_size"].unique()
    key = [f"block {blocks[0]}"] if len(blocks) == 1 else []
    styles = cycle(zip(LINE_COLOURS, MARKERS, strict=True))
    for (block_size, part), (colour, marker) in zip(
        table.groupby("block_size"), styles, strict=False
    ):
        look = {"color": colour, "marker": marker, "clip_on": False}
        _line_and_marks(
            ax, part["seq_len"], part["num_anchors"], part["full"], f"block {block_size}", look
        )
    numbers, lengths = table["num_anchors"].tolist(), table["seq_len"].tolist()
    if at is not None:
        ax.plot([at[0]], [at[1]], **_CHOSEN)
        key.append(f"{_STAR} chosen")
        lengths.append(at[0])
        numbers.append(at[1])
    if not table["full"].all():
        key.append("hollow: row is the limit")
    ax.set_xscale("log", base=2)
    # From 1 on it is a log axis; below there is room for 0.
    ax.set_yscale("symlog", base=2, linthresh=1)
    _name_doublings(ax.xaxis, lengths)
    _name_doublings(ax.yaxis, numbers, zero="none: 0" if 0 in numbers else "")
    ax.set_ylim(0 if 0 in numbers else 0.8 * min(numbers), 1.6 * max(1, *numbers))
    ax.set_xlabel("tokens of a row (seq_len)")
    ax.set_ylabel("most anchors that fit")
    add_rules(ax)
    _title(ax, "   ".join(key))
    if len(blocks) > 1:
        add_legend(ax, loc="center left", bbox_to_anchor=(1, 0.5))
    return cast(Figure, ax.figure)


def plot_parts(
    cost: pd.DataFrame,
    memory: pd.DataFrame | None = None,
    *,
    limit: float | None = None,
    seconds: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Where a training step's operations go, part by part, and its bytes.

    Args:
        cost: from :func:`dspark_lab.tuning.cost.training_cost`: ``part`` and ``operations``.
        memory: from :func:`dspark_lab.tuning.memory.memory_table`: ``part``, ``held`` and ``moment``; a
            panel of its own.
        limit: bytes that tensors may take, told in words.
        seconds: of the step, told in words.
        ax: draw the operations here instead of in a new figure, and no memory.

    Raises:
        ValueError: memory together with ``ax``, or a limit without memory.
    """
    if memory is not None and ax is not None:
        raise ValueError("memory must be None where ax is given, got both")
    if limit is not None and memory is None:
        raise ValueError(f"limit must come with a memory table, got {limit} without")
    if ax is None:
        most = max(len(cost), 0 if memory is None else len(memory))
        figure, axes = new_figure(
            4.8 if memory is None else 9.6, 0.27 * most + 1.1, columns=1 if memory is None else 2
        )
        ax, *others = np.atleast_1d(axes)
        if memory is not None:
            _plot_bytes(others[0], memory, limit)
    total = cost["operations"].sum()
    share = (cost["operations"] / total).to_numpy()
    _bars(
        ax,
        cost["part"],
        share,
        [f"{part:.1%}" if part >= 0.0005 else "< 0.1%" for part in share],
        BLUE,
    )
    ax.set_xlabel("share of operations")
    ax.set_ylabel("part")
    title = f"a step: {EngFormatter(places=1)(total)} operations"
    if seconds is not None:
        title += f", {seconds:.3g} s"
    _title(ax, title)
    return cast(Figure, ax.figure)


def plot_slots(table: pd.DataFrame) -> Figure:
    """How often each slot of a block has a label in a pass, and what that weighs in the loss.

    Args:
        table: from :func:`dspark_lab.tuning.coverage.slot_table`: ``slot``, ``expected``, ``weighted``.
    """
    figure, ax = new_figure(7, 3.2)
    for name, label, shift, look in (
        ("expected", "supervised slots", -0.2, {"color": BLUE}),
        ("weighted", "their summed weight", 0.2, {"color": ORANGE, "hatch": "////"}),
    ):
        ax.bar(
            table["slot"] + shift,
            table[name],
            0.38,
            edgecolor=INK,
            linewidth=0,
            label=label,
            **look,
        )
    ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("slot of the block")
    ax.set_ylabel("expected in one pass over the data")
    add_rules(ax)
    legend_above(ax, 2)
    return figure


def plot_front(table: pd.DataFrame) -> Figure:
    """What options gain a second, and what they gain for each byte that a step holds.

    Args:
        table: from :func:`dspark_lab.tuning.choice.training`: ``num_anchors``, ``block_size``, ``seq_len``,
            ``gain_per_second``, ``gain_per_byte``, ``fits`` and ``front``, whose options are named.
    """
    front = table[table["front"]].sort_values("gain_per_second", ascending=False)
    figure, ax = new_figure(7, max(3.6, 0.19 * len(front) + 1.1))
    for chosen, style in (
        (
            table["fits"] & ~table["front"],
            {"color": BLUE, "marker": "o", "markersize": 5, "label": "fits"},
        ),
        (
            ~table["fits"],
            {
                "color": INK,
                "marker": "o",
                "markersize": 5,
                "fillstyle": "none",
                "label": "does not fit",
            },
        ),
        (
            table["front"],
            {"color": RED, "marker": "D", "markersize": 6, "label": "on the front: none beats it"},
        ),
    ):
        part = table[chosen]
        if len(part):
            gain_per_gb = 1e9 * part["gain_per_byte"]
            ax.plot(gain_per_gb, part["gain_per_second"], linestyle="none", **style)
    ax.set_ylim(0, 1.06 * table["gain_per_second"].max())
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.set_xlabel("gain of a step for each GB that it holds")
    ax.set_ylabel("gain per second")
    _name_beside(ax, 1e9 * front["gain_per_byte"], front["gain_per_second"], _names(front, table))
    add_rules(ax)
    legend_above(ax, 3)
    return figure


def plot_sweep(cells: pd.DataFrame, *, budget: str, temperature: float) -> Figure:
    """Tau of each cell of a sweep that really trained its drafters, with its 95 % interval.

    Args:
        cells: from :func:`dspark_lab.tuning.sweep.cell_table`: ``budget``, ``temperature``,
            ``num_anchors``, ``block_size``, ``tau``, ``low`` and ``high`` (NaN where not known).
            The best cell has a frame; one that is missing stays empty.
        budget, temperature: which of the table's to show.

    Raises:
        ValueError: a budget or a temperature that the table does not hold.
    """
    for name, value in (("budget", budget), ("temperature", temperature)):
        held = cells[name].unique().tolist()
        if value not in held:
            raise ValueError(f"{name} must be one of {held}, got {value!r}")
    part = cells[(cells["budget"] == budget) & (cells["temperature"] == temperature)]
    columns, rows = part["num_anchors"].nunique(), part["block_size"].nunique()
    figure, ax = new_figure(1.15 * columns + 1.9, 0.62 * rows + 1.2)
    colours = Normalize(part["tau"].min(), part["tau"].max())
    _heat(ax, part, colours)
    _colour_bar(figure, [ax], colours)
    return figure


def plot_sweeps(cells: pd.DataFrame) -> Figure:
    """:func:`plot_sweep` for every budget (across) and temperature (down), in common colours.

    Args:
        cells: see :func:`plot_sweep`.
    """
    budgets = sorted(cells["budget"].unique())
    temperatures = sorted(cells["temperature"].unique())
    columns, rows = cells["num_anchors"].nunique(), cells["block_size"].nunique()
    figure, axes = new_figure(
        len(budgets) * (1.05 * columns + 0.7) + 0.9,
        len(temperatures) * (0.6 * rows + 0.9) + 0.2,
        columns=len(budgets) * len(temperatures),
    )
    grid = figure.add_gridspec(len(temperatures), len(budgets))
    axes = np.atleast_1d(axes)
    colours = Normalize(cells["tau"].min(), cells["tau"].max())
    for i, ax in enumerate(axes):
        row, column = divmod(i, len(budgets))
        ax.set_subplotspec(grid[row, column])
        shown = cells["budget"] == budgets[column]
        _heat(ax, cells[shown & (cells["temperature"] == temperatures[row])], colours)
    _colour_bar(figure, axes, colours)
    return figure


def plot_budget(
    options: pd.DataFrame,
    cost: pd.DataFrame,
    fit: pd.DataFrame,
    *,
    num_anchors: int,
    at: tuple[int, int],
) -> Figure:
    """What a choice for training covers, gains, costs and leaves room for, in four panels.

    Args:
        options: from :func:`dspark_lab.tuning.choice.training`, a line per number of anchors, the chosen one
            among them; one block size, one row length.
        cost: from :func:`dspark_lab.tuning.cost.training_cost`, of the chosen step.
        fit: from :func:`dspark_lab.tuning.memory.fit_table`.
        num_anchors: the chosen one of the options.
        at: where it stands in ``fit``: the longest row, and its blocks.

    Raises:
        ValueError: ``num_anchors`` is not one of the options.
    """
    options = options.sort_values("num_anchors")
    if num_anchors not in options["num_anchors"].to_numpy():
        raise ValueError(
            f"num_anchors must be one of {options['num_anchors'].tolist()}, got {num_anchors}"
        )
    chosen = options[options["num_anchors"] == num_anchors]
    width, height = 9.5, 5.6
    # Fixed margins, in inches, and fixed places of labels: finding the best ones would take long.
    figure, axes = new_figure(width, height, columns=4, layout="none")
    grid = figure.add_gridspec(
        2,
        2,
        left=1.95 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.35 / height,
        wspace=0.25,
        hspace=0.5,
    )
    for i, ax in enumerate(axes):
        ax.set_subplotspec(grid[divmod(i, 2)])
    _plot_share(axes[0], options, chosen)
    _plot_gain(axes[1], options, chosen)
    plot_parts(cost, seconds=float(chosen["seconds"].iloc[0]), ax=axes[2])
    plot_fit(fit, at=at, ax=axes[3])
    places = ((0.55, 0.25), (0.55, 0.25), (1.8, 0.08), (0.55, 0.25))
    for ax, (beside, under) in zip(axes, places, strict=True):
        _, _, wide, high = ax.get_position().bounds
        ax.xaxis.set_label_coords(0.5, -under / (height * high))
        ax.yaxis.set_label_coords(-beside / (width * wide), 0.5)
    return figure


def _plot_share(ax: Axes, options: pd.DataFrame, chosen: pd.DataFrame) -> None:
    ax.plot(options["num_anchors"], options["share"], "-o", color=BLUE, markersize=4)
    ax.plot(chosen["num_anchors"], chosen["share"], **_CHOSEN)
    ax.set_ylim(0, 1.02)
    _share_axis(ax, "tokens covered")
    _anchor_axis(ax, options)
    n, share = chosen["num_anchors"].iloc[0], chosen["share"].iloc[0]
    _title(ax, f"{_STAR} chosen: N {n:,} covers {share:.0%}")


def _plot_gain(ax: Axes, options: pd.DataFrame, chosen: pd.DataFrame) -> None:
    """Relative to the best that fits, or to the best of all where nothing does."""
    fits = options["fits"]
    possible = options[fits] if fits.any() else options
    best = possible.loc[[possible["gain_per_second"].idxmax()]]
    unit = best["gain_per_second"].iloc[0]
    gain = options["gain_per_second"] / unit
    _line_and_marks(
        ax, options["num_anchors"], gain, options["fits"], "", {"color": BLUE, "marker": "o"}
    )
    key = [f"{_STAR} chosen"]
    if fits.any():
        ax.plot(
            best["num_anchors"],
            [1],
            color=GREEN,
            marker="s",
            markersize=11,
            fillstyle="none",
            markeredgewidth=1.8,
        )
        key.append(f"{_SQUARE} best that fits: N {best['num_anchors'].iloc[0]:,}")
    if not fits.all():
        key.append(f"{_RING} too large")
    ax.plot(chosen["num_anchors"], chosen["gain_per_second"] / unit, **_CHOSEN)
    ax.set_ylim(0, 1.08 * gain.max())
    _share_axis(ax, "gain/s, of the best")
    _anchor_axis(ax, options)
    _title(ax, "   ".join(key))


def _line_and_marks(
    ax: Axes, x: pd.Series, y: pd.Series, filled: pd.Series, label: str, look: dict[str, Any]
) -> None:
    """A line whose marks are hollow where they are not to be filled."""
    known, look = filled.to_numpy(dtype=bool), look | {"markersize": 5}
    ax.plot(x, y, linewidth=1.4, label=label, markevery=known, **look)
    ax.plot(x[~known], y[~known], linestyle="none", fillstyle="none", **look)


def _plot_bytes(ax: Axes, memory: pd.DataFrame, limit: float | None) -> None:
    held = (memory["held"] / 1e9).to_numpy()
    _bars(ax, memory["part"], held, [f"{size:.2f} GB" if size else "0" for size in held], GREEN)
    ax.set_xlabel("held, in GB")
    ax.set_ylabel("what is held")
    title = f"{held.sum():.1f} GB at the fullest moment: {memory['moment'].iloc[0]}"
    if limit is not None and math.isfinite(limit):
        title += f"\n{held.sum() / (limit / 1e9):.0%} of the {limit / 1e9:.1f} GB that it may take"
    _title(ax, title)


def _bars(ax: Axes, names: pd.Series, values: np.ndarray, labels: list[str], colour: str) -> None:
    """A bar for each part, the first on top; its axis names the part and its value."""
    y = np.arange(len(values))
    ax.barh(y, values, 0.7, color=colour)
    ax.set_yticks(y, [f"{name}  {label}" for name, label in zip(names, labels, strict=True)])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.set_xticks([])


def _heat(ax: Axes, cells: pd.DataFrame, colours: Normalize) -> None:
    grid = cells.pivot(index="block_size", columns="num_anchors", values="tau")
    ax.imshow(grid, cmap=_HEAT, norm=colours, aspect="auto")
    rows, columns = list(grid.index), list(grid.columns)
    for cell in cells.itertuples(index=False):
        words = f"{cell.tau:.2f}"
        if not math.isnan(cast(float, cell.low)):
            words += f"\n{cell.low:.2f} to {cell.high:.2f}"
        ax.text(
            columns.index(cell.num_anchors),
            rows.index(cell.block_size),
            words,
            ha="center",
            va="center",
            color=_readable_on(_HEAT(colours(cell.tau))),
            fontsize=8,
        )
    best = cells.loc[cells["tau"].idxmax()]
    corner = columns.index(best["num_anchors"]) - 0.5, rows.index(best["block_size"]) - 0.5
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=3, clip_on=False))
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("anchors (num_anchors)")
    ax.set_ylabel("slots of a block (block_size)")
    _title(
        ax,
        f"budget: {best['budget']}, temperature {best['temperature']:g}\n"
        f"framed: the best, N {best['num_anchors']:,}, K {best['block_size']:,}",
    )


def _colour_bar(figure: Figure, axes: Any, colours: Normalize) -> None:
    bar = figure.colorbar(ScalarMappable(colours, _HEAT), ax=list(axes), fraction=0.04, pad=0.02)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.set_label("tau (tokens per round)", color=INK, fontsize=9)
    bar.outline.set_visible(False)


def _readable_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out more on a colour (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _anchor_axis(ax: Axes, options: pd.DataFrame) -> None:
    ax.set_xscale("log", base=2)
    _name_doublings(ax.xaxis, options["num_anchors"].tolist())
    ax.set_xlabel("num_anchors")


def _share_axis(ax: Axes, label: str) -> None:
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 5, 10]))
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set_ylabel(label)
    add_rules(ax)


def _name_doublings(axis: Any, values: list[int], zero: str = "") -> None:
    """Ticks at powers of two, as plain numbers, and at 0 where it has a name."""
    positive = [value for value in values if value > 0] or [1]
    powers = range(math.floor(math.log2(min(positive))), math.ceil(math.log2(max(positive))) + 1)
    ticks = [2**power for power in powers[:: -(-len(powers) // _MOST_TICKS)]]
    names = [str(tick) for tick in ticks]
    if zero:
        ticks, names = [0, *ticks], [zero, *names]
    axis.set_ticks(ticks, names)
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _names(front: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """What sets the options apart; the row's length where there are several."""
    several = table["seq_len"].nunique() > 1
    return [
        f"N {n:,}, K {k:,}" + (f", S {s:,}" if several else "")
        for n, k, s in zip(front["num_anchors"], front["block_size"], front["seq_len"], strict=True)
    ]


def _name_beside(ax: Axes, x: pd.Series, y: pd.Series, names: list[str]) -> None:
    """Names in a column right of the axes, from high to low, each with a line from its point."""
    to_name = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)}
    gap = 0.17 / (cast(Figure, ax.figure).get_figheight() - 1.0)
    low, high = ax.get_ylim()
    heights = ((y - low) / (high - low)).tolist()
    # Downwards, none nearer than a line's height to the one above; then up again from the floor.
    for i in range(1, len(heights)):
        heights[i] = min(heights[i], heights[i - 1] - gap)
    floor = 0.0
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = floor = max(heights[i], floor)
        floor += gap
    for name, px, py, place in zip(names, x, y, heights, strict=True):
        ax.annotate(
            name,
            (px, py),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            color=INK,
            fontsize=8,
            annotation_clip=False,
            arrowprops=to_name,
        )


def _title(ax: Axes, text: str) -> None:
    # A place that is given need not be searched for.
    ax.set_title(text, loc="left", color=INK, fontsize=9, y=1)
