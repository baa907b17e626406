"""The style of all pictures: colours, figures, axes, legends, PNG files.

A picture brings its own white paper: on none can words reach a contrast of 4.5 : 1 with both a
white page and JupyterLab's dark one. Colours follow Okabe and Ito, darker where less than 3 : 1
with the paper. What a colour says, a line's style, a mark or a word says too.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark_lab.checks import require_columns

# Pixels in an inch of a PNG.
DPI = 110
PAPER, INK = "#ffffff", "#595959"
BLUE, SKY, GREEN = "#00609C", "#3598D4", "#009E73"
ORANGE, RED, PINK = "#C08600", "#BF4400", "#C8719F"
# The most inches of a figure whose words of 8 points are shown with 9 pixels at least where
# JupyterLab has the least room for it: 592 pixels of a page of 1,024.
WIDEST = 7.3
LINE_COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
CONFIDENCE_LOOKS = {
    "raw": {"color": ORANGE, "marker": "s", "fillstyle": "none"},
    "scaled": {"color": BLUE, "marker": "o", "fillstyle": "full"},
}


def new_figure(
    width: float,
    height: float,
    columns: int = 1,
    rows: int = 1,
    layout: str = "constrained",
    dpi: int | None = None,
    **grid: object,
) -> tuple[Figure, Any]:
    """A figure in inches and its axes: one, or an array of them row by row."""
    size = width, height
    options: dict[str, Any] = {"layout": layout, "dpi": dpi, "gridspec_kw": grid}
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    plt.close(figure)
    figure.set_facecolor(PAPER)
    for ax in np.ravel(axes):
        ax.set_facecolor("none")
        ax.tick_params(colors=INK, labelsize=8)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set(color=INK, fontsize=9)
        for side, spine in ax.spines.items():
            spine.set_color(INK)
            spine.set_linewidth(0.8)
            spine.set_visible(side in ("left", "bottom"))
    return figure, axes if isinstance(axes, Axes) else np.ravel(axes)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    # Hinting letters takes a third of the time of all words.
    with plt.rc_context({"text.hinting": "no_hinting"}):
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def line_look(i: int, name: object = "") -> dict[str, Any]:
    """Colour and mark of line ``i``; after six, marks are open, so that no two look alike.

    Confidences as they are and scaled, by these names, look the same in every picture.
    """
    if name in CONFIDENCE_LOOKS:
        return dict(CONFIDENCE_LOOKS[str(name)])
    fill = "none" if i // 6 % 2 else "full"
    return {"color": LINE_COLOURS[i % 6], "marker": MARKERS[i % 6], "fillstyle": fill}


def add_band(ax: Axes, x: pd.Series, low: pd.Series, high: pd.Series, colour: str) -> None:
    """An interval around a line."""
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def add_title(ax: Axes, text: str, **options: Any) -> None:
    ax.set_title(text, loc="left", color=INK, fontsize=9, **options)


def add_note(
    ax: Axes, text: str, place: Any, shift: Any, *, x: str = "data", y: str = "data", **options: Any
) -> None:
    """Words ``shift`` points away from a place, whose coordinates ``x`` and ``y`` name."""
    look = {"color": INK, "fontsize": 8, **options}
    ax.annotate(text, place, xycoords=(x, y), xytext=shift, textcoords="offset points", **look)


def add_legend(ax: Axes | Figure, **options: Any) -> None:
    ax.legend(frameon=False, labelcolor=INK, fontsize=8, **options)


def legend_above(ax: Axes, columns: int, **options: Any) -> None:
    """The legend over the axes, on their left."""
    add_legend(ax, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0.2, **options)


def add_rules(ax: Axes) -> None:
    """Faint lines to read heights by."""
    ax.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)


def percent_axis(ax: Axes, label: str) -> None:
    """A y axis of shares."""
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set_ylabel(label)
    add_rules(ax)


def doubling_axis(ax: Axes, ticks: Iterable[int]) -> None:
    """A log x axis with plain numbers at ``ticks``."""
    ticks = sorted(set(ticks))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()


def plain_text(name: object) -> str:
    """A name as it is written; two dollars would be maths."""
    return str(name).replace("$", r"\$")


def visible_text(text: str, longest: int = 12) -> str:
    """A token's text as an axis label: white space made visible, maths markup defused."""
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    text = "".join(character if character.isprintable() else "·" for character in text)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return plain_text(text)


def tables_by_name(
    tables: pd.DataFrame | Mapping[str, pd.DataFrame], columns: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """Several tables to draw in one picture, or one without a name; all must have ``columns``."""
    named = {"": tables} if isinstance(tables, pd.DataFrame) else dict(tables)
    if not named:
        raise ValueError("tables must hold at least one table, got none")
    for name, table in named.items():
        require_columns(f"tables[{name!r}]" if name else "tables", table, columns)
    return named


def require_one_of(name: str, value: Any, options: Iterable[Any]) -> None:
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {options}, got {value!r}")
