"""Pictures: each takes a table or a tensor and returns a figure, or HTML where the picture is text.

Nothing is worked out here beyond where ink goes. Backgrounds are transparent and lines mid-grey, so
that one picture reads on a light and on a dark page; colours are those of Okabe and Ito, which
people with any colour vision can tell apart.
"""

import html
import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dspark_lab.explore.tables import REGIONS, TILE_STATES

__all__ = [
    "mask_and_tiles",
    "plot_acceptance",
    "plot_coverage",
    "plot_mask",
    "plot_packing",
    "plot_sorting",
    "plot_tiles",
    "plot_training",
    "png",
    "token_legend",
    "token_text",
]

INK = "#767676"
BLUE, SKY, GREEN, ORANGE, RED, PINK = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
)
REGION_COLOURS = {"context prefix": SKY, "own block": RED, "dummy block": PINK}
TILE_COLOURS = {"partial": ORANGE, "full": BLUE}
LINE_COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
# A picture of at most this many cells along a side is drawn cell by cell, with its tokens' names.
MOST_NAMED_CELLS = 48
# A larger one has as many rows and columns as its axes surely have pixels, so that none is lost.
MOST_ROWS, MOST_COLUMNS = 240, 480


def new_figure(
    width: float, height: float, columns: int = 1, layout: str = "constrained", **grid: object
) -> tuple:
    """A figure in inches, in the lab's style, and its axes (one, or an array of ``columns``)."""
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), layout=layout, gridspec_kw=grid
    )
    plt.close(figure)
    figure.set_facecolor("none")
    for ax in np.atleast_1d(axes):
        ax.set_facecolor("none")
        ax.tick_params(colors=INK, labelsize=8)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set(color=INK, fontsize=9)
        for side, spine in ax.spines.items():
            spine.set_color(INK)
            spine.set_linewidth(0.8)
            spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    # Hinting letters takes a third of the time of all words.
    with plt.rc_context({"text.hinting": "no_hinting"}):
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def plot_coverage(table: pd.DataFrame, *, goal: float | None = 0.9) -> Figure:
    """Coverage against ``num_anchors``: the closed form as lines, draws as marks.

    Args:
        table: from :func:`dspark_lab.tuning.coverage.coverage_table`.
        goal: a share to mark with a dotted line; None for none.
    """
    figure, ax = new_figure(7, 3.6)
    for (block_size, part), colour, marker in zip(
        table.groupby("block_size"), cycle(LINE_COLOURS), cycle(MARKERS), strict=False
    ):
        ax.plot(part["num_anchors"], part["expected"], color=colour, label=f"block {block_size}")
        ax.plot(part["num_anchors"], part["sampled"], marker, color=colour, fillstyle="none")
    if goal is not None:
        ax.axhline(goal, color=INK, linestyle=":", linewidth=1)
        ax.annotate(
            f"{goal:.0%}",
            (0, goal),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            color=INK,
            fontsize=8,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(set(table["num_anchors"])), sorted(set(table["num_anchors"])))
    ax.minorticks_off()
    ax.set_xlabel("anchors per row (num_anchors)")
    _share_axis(ax, "supervised tokens covered in one pass")
    ax.set_title("line: expected (closed form)   mark: sampled", loc="left", color=INK, fontsize=9)
    add_legend(ax, loc="lower right")
    return figure


def plot_packing(table: pd.DataFrame) -> Figure:
    """Coverage when rows hold several documents.

    Args:
        table: columns ``row`` (what a row is, as text), ``anchors per`` (``row`` or ``document``),
            ``num_anchors`` and ``expected``.
    """
    figure, ax = new_figure(7, 3.4)
    styles = cycle(zip(LINE_COLOURS, MARKERS, strict=True))
    for ((row, per), part), (colour, marker) in zip(
        table.groupby(["row", "anchors per"], sort=False), styles, strict=False
    ):
        style = "--" if per == "document" else "-"
        label = f"{row}, per {per}"
        ax.plot(part["num_anchors"], part["expected"], style + marker, color=colour, label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(set(table["num_anchors"])), sorted(set(table["num_anchors"])))
    ax.minorticks_off()
    ax.set_xlabel("anchors (num_anchors)")
    _share_axis(ax, "supervised tokens covered")
    add_legend(ax)
    return figure


def plot_acceptance(table: pd.DataFrame) -> Figure:
    """Acceptance along the block, given that all slots before survived, with its 95 % interval.

    Args:
        table: from :func:`dspark_lab.rates.teacher_forced.slot_table`.
    """
    figure, ax = new_figure(7, 3.4)
    styles = cycle(zip(LINE_COLOURS, MARKERS, strict=True))
    for (drafter, part), (colour, marker) in zip(
        table.groupby("drafter", sort=False), styles, strict=False
    ):
        ax.fill_between(part["slot"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
        ax.plot(part["slot"], part["conditional"], "-" + marker, color=colour, label=drafter)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("slot of the block")
    ax.set_ylabel("accept rate, given all before")
    # Steps that two decimals can name.
    ax.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter("{x:.2f}")
    add_legend(ax)
    return figure


def plot_training(table: pd.DataFrame) -> Figure:
    """Loss, accept rate and tau, step by step: each step's value as a dot, their course as a line.

    Args:
        table: columns ``step``, ``loss``, ``accept_rate`` and ``tau``, as
            :meth:`dspark_lab.training.loop.History.table` gives them.
    """
    figure, axes = new_figure(9, 2.8, columns=3)
    course = table.ewm(span=max(2, len(table) // 12)).mean() if len(table) else table
    for ax, (name, title), colour in zip(
        axes,
        (("loss", "loss"), ("accept_rate", "accept rate"), ("tau", "tau (accepted length)")),
        (INK, BLUE, RED),
        strict=True,
    ):
        if len(table):
            ax.plot(table["step"], table[name], ".", color=colour, alpha=0.35, markersize=4)
            ax.plot(table["step"], course[name], color=colour)
        ax.set_title(title, loc="left", color=INK, fontsize=9)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def plot_mask(
    regions: Int[Tensor, "query key"],
    *,
    seq_len: int,
    block_size: int,
    context_text: Sequence[str] | None = None,
    slot_text: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The attention mask with its regions in colour: queries down, keys across.

    A small mask is drawn cell by cell with the tokens on its axes. A large one is averaged: the
    deeper a pixel's colour, the larger the share of its pairs that is visible, so nothing that is
    there falls between the pixels.

    Args:
        regions: from :func:`dspark_lab.explore.tables.mask_regions`.
        seq_len, block_size: the shape of what is shown.
        context_text: names of the context tokens; positions where None.
        slot_text: names of the slots' input tokens.
        ax: draw here instead of in a new figure.
    """
    queries, keys = regions.shape
    named = max(queries, keys) <= MOST_NAMED_CELLS
    if ax is None:
        width, height = (0.24 * keys + 1.6, 0.24 * queries + 1.9) if named else (8.0, 4.6)
        _, ax = new_figure(width, height)
    present = set(regions.unique().tolist())
    colours = {
        REGIONS.index(region): colour
        for region, colour in REGION_COLOURS.items()
        if REGIONS.index(region) in present
    }
    _paint(ax, regions, colours)
    ax.axvline(seq_len - 0.5, color=INK, linewidth=1)
    if named:
        _name_cells(ax, regions, seq_len, block_size, context_text, slot_text)
    else:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_xlabel(f"keys: {seq_len} context tokens, then {queries} slots")
        ax.set_ylabel(f"queries: {queries // block_size} blocks of {block_size} slots")
    handles = [Patch(facecolor=colour, label=REGIONS[i]) for i, colour in colours.items()]
    legend_above(ax, 3, handles=handles)
    return cast(Figure, ax.figure)


def plot_tiles(
    states: Int[Tensor, "query_tile key_tile"],
    *,
    seq_len: int,
    tile_size: int,
    ax: Axes | None = None,
) -> Figure:
    """The tile map that a FlexAttention kernel works through: empty, partial, full.

    Args:
        states: from :func:`dspark_lab.explore.tables.tile_states`.
        seq_len: context tokens in a row; a line marks where they end.
        tile_size: queries and keys per tile.
        ax: draw here instead of in a new figure.
    """
    rows, columns = states.shape
    if ax is None:
        _, ax = new_figure(8.0, 4.6)
    _paint(ax, states, {TILE_STATES.index(state): colour for state, colour in TILE_COLOURS.items()})
    ax.axvline(seq_len / tile_size - 0.5, color=INK, linewidth=1)
    if rows * columns <= 4000:
        _rule(ax, np.arange(rows), np.arange(columns), linewidth=0.3)
    for axis, tiles in ((ax.xaxis, columns), (ax.yaxis, rows)):
        axis.set_ticks(range(0, tiles, -(-tiles // 6)))
    ax.set_xlabel(f"key tiles of {tile_size}")
    ax.set_ylabel(f"query tiles of {tile_size}")
    counts = [(state, int((states == i).sum())) for i, state in enumerate(TILE_STATES)]
    handles = [
        Patch(facecolor=TILE_COLOURS.get(state, "none"), edgecolor=INK, label=f"{state} {count}")
        for state, count in counts
    ]
    legend_above(ax, 3, handles=handles)
    return cast(Figure, ax.figure)


def mask_and_tiles(
    regions: Int[Tensor, "query key"],
    states: Int[Tensor, "query_tile key_tile"],
    *,
    seq_len: int,
    block_size: int,
    tile_size: int,
    context_text: Sequence[str] | None = None,
    slot_text: Sequence[str] | None = None,
) -> Figure:
    """:func:`plot_mask` and :func:`plot_tiles` side by side."""
    named = max(regions.shape) <= MOST_NAMED_CELLS
    width, height = 9.5, min(max(3.6, 0.15 * regions.shape[0] + 1.9), 6.5) if named else 3.6
    figure, (mask_ax, tile_ax) = new_figure(
        width, height, columns=2, layout="none", width_ratios=(3, 2), wspace=0.25
    )
    # Fixed margins, in inches: finding the best ones would take longer than all the drawing.
    left, bottom = (1.35, 1.35) if named else (0.65, 0.55)
    figure.subplots_adjust(
        left=left / width, right=0.99, bottom=bottom / height, top=1 - 0.35 / height
    )
    plot_mask(
        regions,
        seq_len=seq_len,
        block_size=block_size,
        context_text=context_text,
        slot_text=slot_text,
        ax=mask_ax,
    )
    plot_tiles(states, seq_len=seq_len, tile_size=tile_size, ax=tile_ax)
    return figure


def plot_sorting(table: pd.DataFrame) -> Figure:
    """Tiles in each state with anchors in ascending order and shuffled, as stacked bars.

    Args:
        table: from :func:`dspark_lab.explore.tables.sorting_table`.
    """
    figure, ax = new_figure(7, 0.34 * len(table) + 1.3)
    labels = [
        f"{size} · {order}" for size, order in zip(table["tile_size"], table["order"], strict=True)
    ]
    total = table[list(TILE_STATES)].sum(axis=1)
    left = np.zeros(len(table))
    for state in ("full", "partial", "empty"):
        share = (table[state] / total).to_numpy()
        colour = TILE_COLOURS.get(state, "none")
        ax.barh(labels, share, left=left, color=colour, edgecolor=INK, linewidth=0.6, label=state)
        left = left + share
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("share of tiles")
    ax.set_ylabel("tile size · anchors")
    legend_above(ax, 3)
    return figure


# How the token text marks its tokens; half transparent colours let either theme show through.
_TOKEN_STYLE = """<style>
.dspark-text{font:13px/1.75 var(--jp-code-font-family,monospace);white-space:pre-wrap;
 word-break:break-word;color:var(--jp-content-font-color1,inherit);max-height:26em;overflow-y:auto;
 padding:2px 4px}
.dspark-text span,.dspark-key span{border-radius:3px;padding:1px 0}
.dspark-text span:hover{outline:2px solid #767676}
.dspark-key{font-size:12px;line-height:2;color:var(--jp-content-font-color1,inherit)}
.dspark-key span{padding:2px 6px;margin-right:8px;white-space:nowrap}
.dspark-document{border-top:1px solid #767676;margin-top:.6em;font-size:11px;opacity:.7}
.dspark-prompt{opacity:.55}.dspark-padding{opacity:.3}
.dspark-not-covered{background:rgba(230,159,0,.30)}
.dspark-covered{background:rgba(86,180,233,.38)}
.dspark-never-a-label{background:rgba(204,121,167,.55)}
.dspark-candidate{border-bottom:2px dotted #767676}
.dspark-anchor{border-bottom:3px solid #D55E00;font-weight:700}
</style>"""


def token_text(table: pd.DataFrame) -> str:
    """A conversation as text in HTML, token by token, coloured by what each token is.

    Hovering over a token tells its position, id and state.

    Args:
        table: from :func:`dspark_lab.explore.tables.token_table`.
    """
    shown = table[table["state"] != "padding"]
    spans = []
    document = 0
    for token in shown.itertuples(index=False):
        if token.document != document:
            document = token.document
            spans.append(f'<div class="dspark-document">document {document}</div>')
        spans.append(_token_span(token))
    return f'{_TOKEN_STYLE}<div class="dspark-text">{"".join(spans)}</div>'


def token_legend(table: pd.DataFrame) -> str:
    """The key to :func:`token_text` in HTML, with the number of tokens of each kind."""
    states = table["state"].value_counts()
    entries = [
        (f"dspark-{state.replace(' ', '-')}", f"{state} {states[state]}")
        for state in ("prompt", "covered", "not covered", "never a label")
        if state in states
    ]
    entries.append(("dspark-candidate", f"candidate {int(table['candidate'].sum())}"))
    entries.append(("dspark-anchor", f"anchor {int(table['anchor'].sum())}"))
    spans = [f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in entries]
    return f'{_TOKEN_STYLE}<div class="dspark-key">{" ".join(spans)}</div>'


def _token_span(token: Any) -> str:
    kinds = [f"dspark-{token.state.replace(' ', '-')}"]
    facts = [f"position {token.position}", f"id {token.token_id}", token.state]
    if token.candidate:
        kinds.append("dspark-anchor" if token.anchor else "dspark-candidate")
        facts.append("anchor" if token.anchor else "candidate")
    if token.supervised:
        facts.append(f"supervised by {token.times_supervised} slots of this draw")
        facts.append(f"covered with probability {token.p_covered:.3f}")
    if token.document > 0:
        facts.append(f"document {token.document}")
    text = html.escape(token.text).replace("\n", "⏎\n")
    title = html.escape(" · ".join(facts), quote=True)
    return f'<span class="{" ".join(kinds)}" title="{title}">{text}</span>'


def _paint(ax: Axes, cells: Int[Tensor, "row column"], colours: dict[int, str]) -> None:
    """Draw cells in the colours of their values, cell (i, j) centred at (j, i).

    Where there are more cells than pixels, a pixel is as deep as the share of its cells that have a
    colour, and mixes their colours.
    """
    rows, columns = cells.shape
    high, wide = -(-rows // MOST_ROWS), -(-columns // MOST_COLUMNS)
    padded = torch.nn.functional.pad(cells, (0, -columns % wide, 0, -rows % high), value=-1)
    inside = _count(padded >= 0, high, wide)
    image = np.zeros((*inside.shape, 4))
    for value, colour in colours.items():
        share = _count(padded == value, high, wide) / inside
        image[..., :3] += share[..., None] * to_rgb(colour)
        image[..., 3] += share
    image[..., :3] /= np.maximum(image[..., 3:], 1e-9)
    right, bottom = padded.shape[1] - 0.5, padded.shape[0] - 0.5
    ax.imshow(image, extent=(-0.5, right, bottom, -0.5), aspect="auto", interpolation="nearest")
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    for spine in ax.spines.values():
        spine.set_visible(True)


def _count(cells: Bool[Tensor, "row column"], high: int, wide: int) -> np.ndarray:
    """How many of the cells under each pixel of ``high`` x ``wide`` cells are set."""
    numbers = cells.numpy().astype(np.int32)
    lines = np.add.reduce([numbers[line::high] for line in range(high)])
    return np.add.reduce([lines[:, column::wide] for column in range(wide)])


def _rule(ax: Axes, rows: np.ndarray, columns: np.ndarray, linewidth: float) -> None:
    """Lines above the given rows and left of the given columns of cells."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    ax.hlines(rows - 0.5, left, right, color=INK, linewidth=linewidth)
    ax.vlines(columns - 0.5, bottom, top, color=INK, linewidth=linewidth)


def _name_cells(
    ax: Axes,
    regions: Tensor,
    seq_len: int,
    block_size: int,
    context_text: Sequence[str] | None,
    slot_text: Sequence[str] | None,
) -> None:
    queries, keys = regions.shape
    context = context_text or [str(position) for position in range(seq_len)]
    slot = slot_text or [""] * queries
    slots = [f"{i // block_size}.{i % block_size} {visible_text(slot[i])}" for i in range(queries)]
    ax.set_xticks(range(keys), [visible_text(text) for text in context] + slots, rotation=90)
    ax.set_yticks(range(queries), slots)
    ax.tick_params(labelsize=7 if keys <= 40 else 6, length=0)
    _rule(ax, np.arange(queries), np.arange(keys), linewidth=0.3)
    edges = np.arange(block_size, queries, block_size)
    _rule(ax, edges, seq_len + edges, linewidth=1)
    ax.set_xlabel("keys: context tokens, then slots (block.slot input)")
    ax.set_ylabel("queries: slots (block.slot input)")


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


def _share_axis(ax: Axes, label: str) -> None:
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set_ylabel(label)
    add_rules(ax)


def add_legend(ax: Axes, **options: Any) -> None:
    ax.legend(frameon=False, labelcolor=INK, fontsize=8, **options)


def legend_above(ax: Axes, columns: int, **options: Any) -> None:
    """The key over the axes, on their left."""
    add_legend(ax, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0.2, **options)


def add_rules(ax: Axes) -> None:
    """Faint lines to read heights by."""
    ax.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
