"""Pictures of a comparison of training settings: supervision by slot, the best options, a sweep."""

import math
from itertools import product
from typing import Any, cast

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dspark_lab.explore.style import (
    BLUE,
    INK,
    ORANGE,
    RED,
    add_rules,
    add_title,
    legend_above,
    new_figure,
)

# Dark is little, light is much, to any eye and in grey, too.
_HEAT = matplotlib.colormaps["viridis"]


def plot_slots(table: pd.DataFrame) -> Figure:
    """How often each slot of a block has a label in a pass, and what that weighs in the loss.

    Args:
        table: from :func:`dspark_lab.tuning.slot_supervision`: ``slot``, ``expected``, ``weighted``.
    """
    figure, ax = new_figure(7, 3.2)
    bar: dict[str, Any] = {"width": 0.38, "edgecolor": INK, "linewidth": 0}
    label = "supervised slots"
    ax.bar(table["slot"] - 0.2, table["expected"], color=BLUE, label=label, **bar)
    bar |= {"color": ORANGE, "hatch": "////", "label": "their summed weight"}
    ax.bar(table["slot"] + 0.2, table["weighted"], **bar)
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
        table: of :func:`dspark_lab.choose_training`: ``num_anchors``, ``block_size``, ``seq_len``,
            ``gain_per_second``, ``gain_per_byte``, ``fits`` and ``front``, whose options are named.
    """
    front = table[table["front"]].sort_values("gain_per_second", ascending=False)
    figure, ax = new_figure(7, max(3.6, 0.19 * len(front) + 1.1))
    dot: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": "none"}
    diamond = dot | {"marker": "D", "markersize": 6}
    kinds = (
        ("fits", table["fits"] & ~table["front"], dot | {"color": BLUE}),
        ("does not fit", ~table["fits"], dot | {"color": INK, "fillstyle": "none"}),
        ("on the front: none beats it", table["front"], diamond | {"color": RED}),
    )
    for label, shown, look in kinds:
        part = table[shown]
        if len(part):
            gain_per_gb = 1e9 * part["gain_per_byte"]
            ax.plot(gain_per_gb, part["gain_per_second"], label=label, **look)
    ax.set_ylim(0, 1.06 * table["gain_per_second"].max())
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.set_xlabel("gain of a step for each GB that it holds")
    ax.set_ylabel("gain per second")
    _name_beside(ax, 1e9 * front["gain_per_byte"], front["gain_per_second"], _names(front, table))
    add_rules(ax)
    legend_above(ax, 3)
    return figure


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


def plot_sweeps(cells: pd.DataFrame) -> Figure:
    """Tau of each cell of a sweep that trained its drafters, with its 95 % interval.

    A heat map for every budget (across) and temperature (down), in common colours; the best cell of
    each has a frame, and one that is missing stays empty.

    Args:
        cells: from :func:`dspark_lab.tuning.cell_table`: ``budget``, ``temperature``,
            ``num_anchors``, ``block_size``, ``tau``, ``low`` and ``high`` (NaN where not known).
    """
    budgets = sorted(cells["budget"].unique())
    temperatures = sorted(cells["temperature"].unique())
    columns, rows = cells["num_anchors"].nunique(), cells["block_size"].nunique()
    figure, axes = new_figure(
        len(budgets) * (1.05 * columns + 0.7) + 0.9,
        len(temperatures) * (0.6 * rows + 0.9) + 0.2,
        columns=len(budgets),
        rows=len(temperatures),
    )
    axes = np.atleast_1d(axes)
    colours = Normalize(cells["tau"].min(), cells["tau"].max())
    for ax, (temperature, budget) in zip(axes, product(temperatures, budgets), strict=True):
        shown = (cells["budget"] == budget) & (cells["temperature"] == temperature)
        _heat_map(ax, cells[shown], colours)
    _colour_bar(figure, axes, colours)
    return figure


def _heat_map(ax: Axes, cells: pd.DataFrame, colours: Normalize) -> None:
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
    add_title(
        ax,
        f"budget: {best['budget']}, temperature {best['temperature']:g}\n"
        f"framed: the best, N {best['num_anchors']:,}, K {best['block_size']:,}",
        y=1,
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
