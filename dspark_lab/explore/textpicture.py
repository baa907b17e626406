"""Coloured text as a figure: wrapped, monospaced, each piece on paper of its own.

No grey is read at 4.5:1 on a white page and on a dark one. Every piece therefore lies on an opaque
light patch, in dark ink; between the patches the figure is transparent.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from dspark_lab.explore import style

Sign = Literal["", "underline", "dotted", "dashed", "double", "strike", "frame"]

# Characters in a row, and rows beyond which a picture is too long for a page.
COLUMNS = 92
MOST_ROWS = 40

# A letter's width, as a share of the font's size, in the font that comes with matplotlib.
_ADVANCE = 0.60205
# A notebook draws letters whole pixels apart: in this size 8, as far as the areas behind them.
_POINTS = 8 * 72 / (style.DPI * _ADVANCE)
_ROW_POINTS = 16.0
_FONT: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": _POINTS}
# How a sign's lines are dashed, and where in a row they run.
_LINES: dict[str, list[tuple[Any, float]]] = {
    "underline": [("-", 0.88)],
    "dotted": [((0, (1, 1.5)), 0.88)],
    "dashed": [((0, (4, 2)), 0.88)],
    "double": [("-", 0.82), ("-", 0.94)],
    "strike": [("-", 0.5)],
}


@dataclass(frozen=True)
class Look:
    """How a piece of text looks: its paper's colour, and a sign that says the same.

    ``strong``: in bold. ``heading``: on a row of its own.
    """

    paper: str = "#EFEFEF"
    sign: Sign = ""
    line: str = "#555555"
    ink: str = "#1A1A1A"
    strong: bool = False
    heading: bool = False


@dataclass(frozen=True)
class Part:
    """What stands of piece ``number`` in one row, from a column on."""

    number: int
    row: int
    column: int
    text: str
    look: Look


def text_figure(
    pieces: Sequence[tuple[str, Look]],
    legend: Sequence[tuple[str, Look]] = (),
    *,
    noun: str = "tokens",
    columns: int = COLUMNS,
    most_rows: int = MOST_ROWS,
) -> Figure:
    """Pieces of text, one behind the other, each in its look, under a legend of names and looks.

    Rows are broken as :func:`text_parts` says. Where there are more than ``most_rows``, a note says
    how many pieces, called ``noun``, are left out.
    """
    entries = [(f" {name} ", look) for name, look in legend]
    keys = list(text_parts(entries, columns, gap=1))
    shown: list[Part] = []
    note = []
    for number, parts in groupby(text_parts(pieces, columns), key=lambda part: part.number):
        piece = list(parts)
        if piece[-1].row >= most_rows:
            text = f"… and {len(pieces) - number:,} more {noun}"
            note = [Part(number, shown[-1].row + 1 if shown else 0, 0, text, Look())]
            break
        shown += piece
    top = keys[-1].row + 1.5 if keys else 0.0
    last = (note or shown)[-1:]
    height = top + last[0].row + 1 if last else top + 1
    inches = (columns + 1) * _ADVANCE * _POINTS / 72, (height + 0.5) * _ROW_POINTS / 72
    figure, ax = style.new_figure(*inches, layout="none", dpi=style.DPI)
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()
    # These axes count nothing.
    ax.set_label("<text>")
    ax.set(xlim=(-0.5, columns + 0.5), ylim=(height + 0.25, -0.25))
    _draw_parts(ax, keys, 0.0)
    _draw_parts(ax, shown + note, top)
    return figure


def text_parts(
    pieces: Sequence[tuple[str, Look]], columns: int = COLUMNS, gap: int = 0
) -> Iterator[Part]:
    """The parts of all pieces, ``gap`` columns apart.

    A row is broken between pieces, behind a line break (shown as ⏎), around a heading, and in a
    piece that is longer than a row. A character that the font lacks is shown as a box.
    """
    row = column = 0
    for number, (text, look) in enumerate(pieces):
        if look.heading and column:
            row, column = row + 1, 0
        for i, line in enumerate(_drawn_text(text).split("\n")):
            if i:
                row, column = row + 1, 0
            for start in range(0, len(line), columns):
                part = line[start : start + columns]
                if column and (start or column + len(line) > columns):
                    row, column = row + 1, 0
                yield Part(number, row, column, part, look)
                column += len(part)
        column += gap
        if look.heading:
            row, column = row + 1, 0


def _drawn_text(text: str) -> str:
    """Line breaks and tabs made visible, and nothing that the font lacks."""
    text = text.replace("\n", "⏎\n").replace("\t", "⇥")
    known = _known_characters()
    return "".join(c if c == "\n" or (ord(c) in known and c.isprintable()) else "□" for c in text)


@cache
def _known_characters() -> frozenset[int]:
    font = get_font(findfont(FontProperties(family=_FONT["family"])))
    return frozenset([*font.get_charmap(), ord("⏎"), ord("⇥")])


def _draw_parts(ax: Axes, parts: Sequence[Part], top: float) -> None:
    patches, lines, words = defaultdict(list), defaultdict(list), defaultdict(list)
    for part in parts:
        left, right = part.column + 0.05, part.column + len(part.text) - 0.05
        high, low = top + part.row + 0.06, top + part.row + 0.94
        patches[part.look].append([(left, high), (right, high), (right, low), (left, low)])
        for dashes, y in _LINES.get(part.look.sign, []):
            ends = [(left, top + part.row + y), (right, top + part.row + y)]
            lines[part.look.line, dashes].append(ends)
        words[part.row, part.look.ink, part.look.strong].append(part)
    for look, shapes in patches.items():
        width = 1.0 if look.sign == "frame" else 0.0
        colours: dict[str, Any] = {"facecolors": look.paper, "edgecolors": look.line}
        ax.add_collection(PolyCollection(shapes, linewidths=width, **colours))
    for (colour, dashes), segments in lines.items():
        drawn = LineCollection(segments, colors=colour, linewidths=1.4, linestyles=[dashes])
        ax.add_collection(drawn)
    for (row, ink, strong), inked in words.items():
        # All words of a row in one ink are one text, spaces between them: a text for each piece
        # would take seconds.
        begin, text = inked[0].column, ""
        for part in inked:
            text = text.ljust(part.column - begin) + part.text
        across, down = begin + len(text) - len(text.lstrip(" ")), top + row + 0.68
        options: dict[str, Any] = {"color": ink, "fontweight": "bold" if strong else "normal"}
        options |= {"va": "baseline", "parse_math": False, **_FONT}
        ax.text(across, down, text.strip(" "), **options)
