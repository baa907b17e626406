"""Reads pictures as they are drawn: pixels, words, lines, bars and bands."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from dspark_lab.explore import png


def pixels(figure: Figure) -> np.ndarray:
    """The figure's PNG as [row, column, red green blue alpha], 0 to 255."""
    file = png(figure)
    assert file.startswith(b"\x89PNG\r\n\x1a\n")
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGBA")).astype(int)


def luminance(colour: Sequence[float]) -> float:
    """The relative luminance of red, green and blue from 0 to 1, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """The contrast of two colours, 1 to 21, as WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def points(line: Any) -> list[list[float]]:
    """The marks of a line, without those that are unknown."""
    return [pair for pair in line.get_xydata().tolist() if not np.isnan(pair).any()]


def labelled(ax: Axes) -> dict[str, Any]:
    """The lines of the legend by name."""
    return {line.get_label(): line for line in ax.lines if line.get_label()[0] != "_"}


def words(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def title(ax: Axes) -> str:
    return ax.get_title(loc="left")


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def tick_names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def segments(ax: Axes) -> list[list[list[float]]]:
    """All that was drawn as lines from somewhere to somewhere."""
    found = [c.get_segments() for c in ax.collections if hasattr(c, "get_segments")]
    return [line.tolist() for lines in found for line in lines if len(line)]


def bands(ax: Axes) -> list[tuple[float, float]]:
    """The lowest and the highest place of each shaded band between two lines."""
    found = [c for c in ax.collections if not hasattr(c, "get_segments")]
    heights = [c.get_paths()[0].vertices[:, 1] for c in found]
    return [(float(each.min()), float(each.max())) for each in heights]


def shown(figure: Figure) -> list[Text]:
    """All words that are drawn; ticks beyond an axis's limits have labels, too, but no ink."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        legend = ax.get_legend()
        texts += [child for child in ax.get_children() if isinstance(child, Text)]
        texts += [ax.xaxis.label, ax.yaxis.label]
        texts += [] if legend is None else [*legend.get_texts(), legend.get_title()]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]
