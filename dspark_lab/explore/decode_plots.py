"""Pictures of decoding: rates along the block, calibration, rounds.

Each takes a table of :mod:`dspark_lab.rates.acceptance`, :mod:`dspark_lab.rates.calibration` or
:mod:`dspark_lab.decoding.outcomes` and returns a figure, or HTML where the picture is text. Nothing is
worked out here beyond where ink goes; style and colours are those of :mod:`dspark_lab.explore.plots`. What
a colour says, a line's style, a mark or a word says too.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dspark_lab.decoding import OUTCOMES
from dspark_lab.explore.plots import (
    BLUE,
    GREEN,
    INK,
    LINE_COLOURS,
    MARKERS,
    ORANGE,
    PINK,
    RED,
    add_legend,
    add_rules,
    legend_above,
    new_figure,
    plain_text,
    visible_text,
)

__all__ = [
    "outcome_legend",
    "outcome_text",
    "plot_bias",
    "plot_calibration",
    "plot_distributions",
    "plot_drift",
    "plot_gain",
    "plot_rates",
    "plot_reliability",
    "plot_thresholds",
]

_PANELS_PER_LINE = 4
_KIND_STYLES: dict[str, dict[str, Any]] = {
    "on policy": {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 4},
    "empirical": {
        "color": GREEN,
        "linestyle": "none",
        "marker": "D",
        "markersize": 6,
        "fillstyle": "none",
    },
    "predicted": {"color": ORANGE, "linestyle": "--", "marker": "s", "markersize": 4},
    "teacher-forced": {"color": INK, "linestyle": "-", "linewidth": 1},
    "predicted, teacher-forced": {"color": PINK, "linestyle": ":", "linewidth": 1.5},
}
_RATES = {
    "conditional": ("accept rate, given all before", "low", "high"),
    "survival": ("accepted with all before it", "survival_low", "survival_high"),
}


def plot_rates(
    table: pd.DataFrame, value: Literal["conditional", "survival"] = "conditional"
) -> Figure:
    """Acceptance along the block, actual and predicted, one panel for each drafter.

    Args:
        table: from :func:`dspark_lab.rates.acceptance.rate_table`, with a panel for each of what it is
            kept apart by, such as ``by="drafter"``: ``kind``, ``slot``, ``conditional`` with
            ``low`` and ``high``, ``survival`` with ``survival_low`` and ``survival_high``.
        value: the rate to show.

    Raises:
        ValueError: no such rate.
    """
    if value not in _RATES:
        raise ValueError(f"value must be one of {list(_RATES)}, got {value!r}")
    label, low, high = _RATES[value]
    parts = _panel_tables(table)
    figure, axes = _panels(len(parts), width=2.7, height=2.5)
    for ax, (name, part) in zip(axes, parts.items(), strict=True):
        for kind, line in part.groupby("kind", sort=False):
            _plot_rate(ax, kind, line["slot"], line[value], line[low], line[high])
        ax.set_title(plain_text(name), loc="left", color=INK, fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        add_rules(ax)
        ax.set_xlabel("slot of the block")
        ax.set_ylabel(label)
        ax.yaxis.set_major_formatter("{x:.0%}")
    _share_y(axes)
    handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    _figure_legend(figure, list(handles.values()))
    return figure


def plot_reliability(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Outcome against confidence, bin by bin; a calibrated head lies on the diagonal.

    The larger a bin's mark, the more slots it holds; the strip below counts them.

    Args:
        tables: a name, such as ``"raw"`` or ``"scaled"``, and its table from
            :func:`dspark_lab.rates.calibration.reliability_table`; each gets a panel.

    Raises:
        ValueError: no table.
    """
    if not tables:
        raise ValueError("tables must hold at least one reliability table, got none")
    count = len(tables)
    figure, axes = new_figure(3.2 * count + 0.4, 4.7, columns=2 * count, layout="compressed")
    grid = figure.add_gridspec(2, count, height_ratios=(1, 0.22))
    most = max(int(table["count"].max()) for table in tables.values())
    for i, (name, table) in enumerate(tables.items()):
        colour, marker = LINE_COLOURS[i % 6], MARKERS[i % 6]
        ax, strip = axes[2 * i], axes[2 * i + 1]
        ax.set_subplotspec(grid[0, i])
        strip.set_subplotspec(grid[1, i])
        known = table[table["confidence"].notna()]
        ax.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
        ax.vlines(known["confidence"], known["confidence"], known["outcome"], colour, alpha=0.5)
        ax.plot(known["confidence"], known["outcome"], color=colour, linewidth=1)
        marks = {"s": 12 + 110 * known["count"] / max(1, most), "marker": marker}
        ax.scatter(known["confidence"], known["outcome"], color=colour, clip_on=False, **marks)
        ax.set_title(plain_text(name), loc="left", color=INK, fontsize=9)
        ax.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
        ax.set_xlabel("confidence, mean of a bin")
        ax.set_ylabel("outcome, mean of a bin")
        width = table["high"] - table["low"]
        bars = strip.bar(table["low"], table["count"], width, align="edge", color=colour)
        for bar in bars:
            bar.set(edgecolor=INK, linewidth=0.4)
        strip.set(xlim=(0, 1), ylim=(0, 1.05 * max(1, most)), box_aspect=0.22)
        strip.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        strip.set_xlabel("confidence")
        strip.set_ylabel("slots")
    return figure


def plot_bias(table: pd.DataFrame, by: str | Sequence[str]) -> Figure:
    """How much too sure a confidence head is, with its 95 % interval, group by group.

    Args:
        table: from :func:`dspark_lab.rates.calibration.study`, grouped by the same columns: ``bias``,
            ``bias_low`` and ``bias_high``.
        by: one column, whose values stand on the axis, or two, the second of which is told apart by
            colours and marks.

    Raises:
        ValueError: ``by`` is not one or two of the table's columns.
    """
    names = [by] if isinstance(by, str) else list(by)
    if len(names) not in (1, 2) or any(name not in table.columns for name in names):
        raise ValueError(f"by must be one or two of {list(table.columns)}, got {names}")
    places = list(dict.fromkeys(table[names[0]]))
    kinds = list(dict.fromkeys(table[names[1]])) if len(names) == 2 else [None]
    step = 0.8 / len(kinds)
    height = max(0.34, 0.17 * len(kinds) + 0.1) * len(places) + 1.2
    figure, ax = new_figure(7, height)
    ax.axvline(0, color=INK, linewidth=1)
    for i, kind in enumerate(kinds):
        part = table if kind is None else table[table[names[1]] == kind]
        shift = step * (i - (len(kinds) - 1) / 2)
        y = [places.index(place) + shift for place in part[names[0]]]
        style = _style(i)
        ax.hlines(y, part["bias_low"], part["bias_high"], color=style["color"], linewidth=1.5)
        ax.plot(part["bias"], y, linestyle="none", label=plain_text(kind), **style)
    if len(kinds) > 1:
        ax.hlines(
            np.arange(len(places) - 1) + 0.5,
            0,
            1,
            INK,
            alpha=0.25,
            linewidth=0.6,
            transform=ax.get_yaxis_transform(),
        )
        add_legend(ax, loc="center left", bbox_to_anchor=(1, 0.5), title=plain_text(names[1]))
        ax.get_legend().get_title().set(color=INK, fontsize=8)
    ax.set_yticks(range(len(places)), [plain_text(place) for place in places])
    ax.set_ylim(len(places) - 0.5, -0.5)
    _both_sides(ax)
    for text, place, side in (("← underconfident", 0, "left"), ("overconfident →", 1, "right")):
        ax.annotate(
            text,
            (place, 1),
            xycoords="axes fraction",
            xytext=(0, 4),
            ha=side,
            textcoords="offset points",
            color=INK,
            fontsize=8,
        )
    ax.set_xlabel("bias: mean of confidence − outcome, a difference of probabilities")
    ax.set_ylabel(plain_text(names[0]))
    return figure


def plot_thresholds(tables: pd.DataFrame | Mapping[str, pd.DataFrame]) -> Figure:
    """What a static threshold buys, a higher acceptance rate, and what it costs.

    Args:
        tables: from :func:`dspark_lab.rates.calibration.threshold_sweep`, one or several by name:
            ``threshold``, ``acceptance_rate``, ``verified`` and ``accepted``; columns such as
            ``verified_low`` and ``verified_high`` are drawn as bands.

    Raises:
        ValueError: no table.
    """
    named = {"": tables} if isinstance(tables, pd.DataFrame) else dict(tables)
    if not named:
        raise ValueError("tables must hold at least one table, got none")
    figure, (left, right) = new_figure(8.6, 3.5 + 0.18 * (len(named) - 1), columns=2, wspace=0.08)
    for i, (name, table) in enumerate(named.items()):
        style = _style(i) | {"markersize": 4}
        every = max(1, len(table) // 10)
        name = plain_text(name)
        begin = name + ", " if name else ""
        _band(left, table, "threshold", "acceptance_rate", label=name, markevery=every, **style)
        for column, linestyle in (("verified", "-"), ("accepted", "--")):
            _band(
                right,
                table,
                "threshold",
                column,
                label=begin + column,
                linestyle=linestyle,
                markevery=every,
                **style,
            )
    left.yaxis.set_major_formatter("{x:.0%}")
    left.set_ylabel("acceptance rate (accepted / verified)")
    right.set_ylabel("slots per round")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("threshold on the confidence")
        add_rules(ax)
    if any(named):
        legend_above(left, 2)
    legend_above(right, 2, handlelength=3)
    return figure


def plot_calibration(report: pd.DataFrame) -> Figure:
    """The calibration error of each slot before and after scaling, and how well it ranks.

    Args:
        report: from :func:`dspark_lab.rates.calibration.calibration_report`: ``slot`` (with ``"all"``),
            ``ece``, ``ece_scaled``, ``auroc`` and ``auroc_scaled``.
    """
    figure, (left, right) = new_figure(8.6, 3.4, columns=2, wspace=0.08)
    labels = [str(slot) for slot in report["slot"]]
    # What is not a slot of the block stands apart.
    x = np.arange(len(labels)) + 0.5 * np.array([not label.isdigit() for label in labels])
    for ax, name in ((left, "ece"), (right, "auroc")):
        before, after = report[name], report[f"{name}_scaled"]
        ax.vlines(x, before, after, color=INK, linewidth=1)
        ax.plot(x, before, "s", color=ORANGE, fillstyle="none", markersize=7, label="raw")
        ax.plot(x, after, "o", color=BLUE, markersize=4, label="scaled")
        ax.set_xticks(x, labels)
        ax.set_xlabel("slot of the block")
        add_rules(ax)
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter("{x:.0%}")
    left.set_ylabel("expected calibration error")
    right.axhline(0.5, color=INK, linestyle=":", linewidth=1)
    right.set_ylim(top=1)
    right.set_ylabel("AUROC (0.5: chance)")
    legend_above(left, 2)
    return figure


def plot_drift(table: pd.DataFrame) -> Figure:
    """The calibration error before and after an abrupt change of domain, window by window.

    Args:
        table: from :func:`dspark_lab.rates.calibration.drift_table`: ``start``, ``rounds``, ``ece_raw``,
            ``ece_static`` and ``ece_online``.
    """
    figure, ax = new_figure(7, 3.2)
    lines = (
        ("ece_raw", "raw", {"color": ORANGE, "linestyle": ":"}),
        ("ece_static", "static temperatures", {"color": RED, "linestyle": "--"}),
        ("ece_online", "online temperatures", {"color": BLUE, "linestyle": "-"}),
    )
    # A window's error is drawn over all of the window.
    ends = np.append(table["start"], table["start"].iloc[-1] + table["rounds"].iloc[-1])
    for name, label, style in lines:
        values = np.append(table[name], table[name].iloc[-1])
        ax.plot(ends, values, drawstyle="steps-post", linewidth=1.8, label=label, **style)
    ax.axvline(0, color=INK, linewidth=1)
    ax.annotate(
        "change of domain",
        (0, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        color=INK,
        fontsize=8,
    )
    # Room above the lines for the words.
    ax.margins(y=0.15)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:.0%}")
    add_rules(ax)
    ax.set_xlabel("rounds since the change")
    ax.set_ylabel("expected calibration error")
    legend_above(ax, 3)
    return figure


def plot_gain(table: pd.DataFrame) -> Figure:
    """What each way to choose what is verified gains in speed over the raw confidence.

    Args:
        table: from :func:`dspark_lab.serving.gain_table`: ``values``, ``threshold``,
            ``gain_percent``, ``gain_low`` and ``gain_high``.
    """
    figure, ax = new_figure(7, 0.42 * len(table) + 1.0)
    y = np.arange(len(table))
    ax.axvline(0, color=INK, linewidth=1)
    for i, row in enumerate(table.itertuples(index=False)):
        style = _style(i)
        ax.hlines(i, row.gain_low, row.gain_high, color=style["color"], linewidth=1.5)
        ax.plot([row.gain_percent], [i], linestyle="none", **style)
    labels = [
        name if pd.isna(threshold) else f"{name}, threshold {threshold:.3f}"
        for name, threshold in zip(table["values"], table["threshold"], strict=True)
    ]
    ax.set_yticks(y, labels)
    ax.set_ylim(len(table) - 0.5, -0.5)
    _both_sides(ax)
    ax.set_xlabel("gain in speed over raw, in %")
    ax.set_ylabel("verified by")
    return figure


def plot_distributions(table: pd.DataFrame, drafted_text: str | None = None) -> Figure:
    """The draft's and the target's distribution at one slot, token by token.

    Of each pair of bars the filled part is the overlap, whose sum is the accept rate, in the title;
    the outline is what one of them has more. A diamond, where it is not 0, is the probability with
    which the token is drawn in place of a rejected one.

    Args:
        table: from :func:`dspark_lab.decoding.outcomes.distribution_table`.
        drafted_text: how the title names the drafted token; by default by its text in the table.
    """
    figure, ax = new_figure(7.4, 0.36 * len(table) + 1.4)
    y = np.arange(len(table))
    overlap = table["overlap"].fillna(0)
    for name, colour, hatch, shift in (
        ("draft", ORANGE, "////", -0.19),
        ("target", BLUE, "", 0.19),
    ):
        ax.barh(y + shift, overlap, 0.34, color=colour, hatch=hatch, edgecolor=INK, linewidth=0)
        ax.barh(y + shift, table[name], 0.34, color="none", edgecolor=colour, linewidth=1.2)
    rest = table["residual"].where(table["residual"] > 0)
    ax.plot(rest, y, "D", color=RED, markersize=5, fillstyle="none", clip_on=False)
    ends = table[["draft", "target", "residual"]].max(axis=1)
    for i, (end, drafted, drawn) in enumerate(
        zip(ends, table["drafted"], table["drawn"], strict=True)
    ):
        words = [
            word for word, true in (("drafted", drafted), ("drawn by the target", drawn)) if true
        ]
        if words:
            ax.annotate(
                "← " + ",\n    ".join(words),
                (end, i),
                xytext=(8, 0),
                va="center",
                textcoords="offset points",
                color=INK,
                fontsize=8,
            )
    ax.set_yticks(
        y, [_token_name(t, i) for t, i in zip(table["text"], table["token"], strict=True)]
    )
    ax.set_ylim(len(table) - 0.4, -0.6)
    # Room for the words beside the longest bar, but no tick beyond certainty.
    longest = float(ends.max())
    ticks = MaxNLocator(6).tick_values(0, longest)
    ax.set_xticks([tick for tick in ticks if tick <= 1])
    ax.set_xlim(0, 1.3 * longest)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("probability")
    ax.set_ylabel("token")
    if drafted_text is None and table["drafted"].any():
        drafted_text = table.loc[table["drafted"], "text"].iloc[0]
    if drafted_text is None:
        title = "nothing drafted"
    elif table["overlap"].isna().any():
        title = f"drafted {visible_text(drafted_text)}   the target was not asked"
    else:
        title = f"drafted {visible_text(drafted_text)}   accept rate {table['overlap'].sum():.3f}"
    ax.set_title(title, loc="left", color=INK, fontsize=9, pad=22)
    handles = [
        Patch(facecolor=ORANGE, edgecolor=INK, hatch="////", linewidth=0, label="draft"),
        Patch(facecolor=BLUE, linewidth=0, label="target"),
        Patch(facecolor="none", edgecolor=INK, label="outline: not shared"),
        Line2D(
            [], [], linestyle="", marker="D", color=RED, fillstyle="none", ms=5, label="residual"
        ),
    ]
    legend_above(ax, 4, handles=handles)
    return figure


# How the outcome text marks its tokens; half transparent colours let either theme show through.
_OUTCOME_STYLE = """<style>
.dspark-answer{font:13px/1.9 var(--jp-code-font-family,monospace);white-space:pre-wrap;
 word-break:break-word;color:var(--jp-content-font-color1,inherit);max-height:26em;overflow-y:auto;
 padding:2px 4px}
.dspark-answer span,.dspark-outcomes span{border-radius:3px;padding:1px 0}
.dspark-answer span:hover{outline:2px solid #767676}
.dspark-outcomes{font-size:12px;line-height:2.2;color:var(--jp-content-font-color1,inherit)}
.dspark-outcomes span{padding:2px 6px;margin-right:8px;white-space:nowrap}
.dspark-accepted{background:rgba(86,180,233,.38)}
.dspark-corrected{background:rgba(230,159,0,.40);border-bottom:2px solid #D55E00}
.dspark-bonus{background:rgba(0,158,115,.30);border-bottom:2px dotted #009E73}
.dspark-first{border-bottom:2px solid #767676}
.dspark-rejected{font-size:11px;text-decoration:line-through 2px #D55E00;
 background:rgba(213,94,0,.18)}
.dspark-not-reached{font-size:11px;text-decoration:line-through 1px #767676;opacity:.65}
.dspark-not-verified{font-size:11px;font-style:italic;opacity:.65;border-bottom:1px dashed #767676}
</style>"""


def outcome_text(table: pd.DataFrame, drafts: bool = True) -> str:
    """An answer as text in HTML, token by token, coloured by what became of each.

    Drafted tokens that are not part of the answer stand where they were proposed, small, struck
    through or faint, before the token that came in their place. Hovering over a token tells its
    round and slot, its outcome, its confidence and its rates.

    Args:
        table: from :func:`dspark_lab.decoding.outcomes.outcome_table`.
        drafts: whether to show what is not part of the answer.
    """
    shown = table if drafts else table[table["kept"]]
    spans = [_outcome_span(token) for token in shown.itertuples(index=False)]
    return f'{_OUTCOME_STYLE}<div class="dspark-answer">{"".join(spans)}</div>'


def outcome_legend(table: pd.DataFrame) -> str:
    """The key to :func:`outcome_text` in HTML, with the number of tokens of each outcome."""
    counts = table["outcome"].value_counts()
    spans = [
        f'<span class="{_outcome_class(outcome)}">{outcome} {counts[outcome]}</span>'
        for outcome in OUTCOMES
        if outcome in counts
    ]
    return f'{_OUTCOME_STYLE}<div class="dspark-outcomes">{" ".join(spans)}</div>'


def _outcome_span(token: Any) -> str:
    facts = ["first token" if token.round < 0 else f"round {token.round}"]
    if token.slot >= 0:
        facts = [f"round.slot {token.round}.{token.slot}"]
    facts.append(token.outcome)
    for pairs in (
        (("confidence", token.confidence), ("accept rate", token.accept_rate)),
        (("draft probability", token.draft_prob), ("target probability", token.target_prob)),
    ):
        known = [f"{name} {value:.2f}" for name, value in pairs if not pd.isna(value)]
        if known:
            facts.append(", ".join(known))
    # A line break that is not part of the answer does not break its line.
    text = html.escape(token.text).replace("\n", "⏎\n" if token.kept else "⏎")
    title = html.escape(" · ".join(facts), quote=True)
    return f'<span class="{_outcome_class(token.outcome)}" title="{title}">{text}</span>'


def _outcome_class(outcome: str) -> str:
    return f"dspark-{outcome.replace(' ', '-')}"


def _token_name(text: str, token: int) -> str:
    return text if token < 0 else visible_text(text) or f"(id {token})"


def _panel_tables(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The parts of a rate table by what stands between its kind and its slot, and by drafter."""
    names = list(table.columns[: table.columns.get_loc("slot")])
    by = [name for name in dict.fromkeys([*names, "drafter"]) if name in table and name != "kind"]
    if not by:
        return {"": table}
    parts = table.groupby(by, sort=False, dropna=False)
    return {", ".join(map(str, key)): part for key, part in parts}


def _panels(count: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Axes of one size each, in inches or wider where they are few, so many a line."""
    columns = min(count, _PANELS_PER_LINE)
    lines = -(-count // columns)
    # No less than a legend in one line needs.
    width = max(width * columns, 6.5)
    figure, axes = new_figure(width + 0.5, height * lines + 0.5, columns=count)
    grid = figure.add_gridspec(lines, columns)
    axes = np.atleast_1d(axes)
    for i, ax in enumerate(axes):
        ax.set_subplotspec(grid[divmod(i, columns)])
    return figure, axes


def _share_y(axes: np.ndarray) -> None:
    """One y axis for all panels, labelled on the first of each line."""
    for i, ax in enumerate(axes):
        if i:
            ax.sharey(axes[0])
        if i % _PANELS_PER_LINE:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
    axes[0].autoscale(axis="y")


def _figure_legend(figure: Figure, handles: list[Any]) -> None:
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        frameon=False,
        labelcolor=INK,
        fontsize=8,
        handlelength=3,
    )


def _plot_rate(
    ax: Axes, kind: Any, slot: pd.Series, rate: pd.Series, low: pd.Series, high: pd.Series
) -> None:
    style = _KIND_STYLES.get(kind, {"color": INK, "linestyle": "-."})
    if style["linestyle"] == "none":
        ax.vlines(slot, low, high, color=style["color"], linewidth=1.2)
    else:
        ax.fill_between(slot, low, high, color=style["color"], alpha=0.15, linewidth=0)
    ax.plot(slot, rate, label=kind, **style)


def _band(ax: Axes, table: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    if f"{y}_low" in table.columns:
        ax.fill_between(
            table[x],
            table[f"{y}_low"],
            table[f"{y}_high"],
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )
    ax.plot(table[x], table[y], **style)


def _style(i: int) -> dict[str, Any]:
    """A colour and a mark; after six, marks are open, so that no two look alike."""
    return {
        "color": LINE_COLOURS[i % 6],
        "marker": MARKERS[i % 6],
        "fillstyle": "none" if i // 6 % 2 else "full",
    }


def _both_sides(ax: Axes) -> None:
    """Some of the axis on either side of 0."""
    low, high = ax.get_xlim()
    reach = max(-low, high)
    ax.set_xlim(min(low, -0.25 * reach), max(high, 0.25 * reach))
