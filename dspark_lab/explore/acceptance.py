"""Accept rates and confidences: rates along a block, calibration, thresholds, and the explorer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_lab import rates
from dspark_lab.chats import token_texts
from dspark_lab.checks import Count, Size, checked, require_columns
from dspark_lab.decoding import Decoded, Round, outcome_table, token_kinds
from dspark_lab.explore import charts, style
from dspark_lab.explore.charts import RATE_COLUMNS, Rate
from dspark_lab.explore.controls import Control, dropdown, number_slider, slider
from dspark_lab.explore.decoding import DecodingView, decoding_state, plot_outcomes, short_prompt
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame
from dspark_lab.explore.models import DrafterLike, Models, Prompts, TargetLike, open_models
from dspark_lab.explore.style import BLUE, GREEN, INK, ORANGE, PAPER, PINK, RED, plain_text
from dspark_lab.explore.work import Progress

VIEWS = ("rates", "survival", "reliability", "domains", "token kinds", "thresholds", "text")
_OF_CONFIDENCE = ("reliability", "domains", "token kinds", "thresholds")
_PANELS_PER_LINE = 3
# What a token's list says first.
_PLACE = ["prompt", "domain", "round", "slot", "position", "before", "text", "said", "after"]
_PLACE += ["kind", "confidence", "accept_rate", "accepted"]
_OF_BINS = ["scaled", "raw_bin", "scaled_bin"]
# So many decoded runs are kept.
_MOST_RUNS = 8
_KIND_LOOKS: dict[str, dict[str, Any]] = {
    "on policy": {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 4},
    "empirical": {"color": GREEN, "linestyle": "none", "marker": "D", "fillstyle": "none"},
    "predicted": {"color": ORANGE, "linestyle": "--", "marker": "s", "markersize": 4},
    "teacher-forced": {"color": INK, "linestyle": "-", "linewidth": 1},
    "predicted, teacher-forced": {"color": PINK, "linestyle": ":", "linewidth": 1.5},
}


@checked
def plot_rates(table: pd.DataFrame, value: Rate = "conditional") -> Figure:
    """Acceptance along the block with its 95 % intervals.

    The table is from :func:`dspark_lab.rates.rate_table` or :func:`dspark_lab.rates.slot_table`,
    kept apart by such as ``by="drafter"``: a panel for each, or a line if it has one kind of rate.
    """
    label, *names = RATE_COLUMNS[value]
    require_columns("table", table, ["slot", *names])
    groups = _groups(table)
    if "kind" in table and table["kind"].nunique() > 1:
        columns = min(len(groups), _PANELS_PER_LINE)
        lines = -(-len(groups) // columns)
        # No less than a legend in one line needs.
        width = min(max(2.7 * columns + 0.5, 7.0), style.WIDEST)
        figure, panels = style.new_figure(width, 2.5 * lines + 0.5, columns, lines)
        axes, unused = np.split(np.atleast_1d(panels), [len(groups)])
        for ax in unused:
            ax.remove()
        for ax, (name, part) in zip(axes, groups.items(), strict=True):
            for kind, line in part.groupby("kind", sort=False):
                look = _KIND_LOOKS.get(str(kind), {"color": INK, "linestyle": "-."})
                _plot_rate(ax, line, names, {"label": kind, **look})
            style.add_title(ax, plain_text(name))
        named = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
        where = {"loc": "outside upper left", "ncols": len(named), "handlelength": 3}
        style.add_legend(figure, handles=list(named.values()), **where)
    else:
        figure, ax = style.new_figure(7, 3.4)
        axes = np.array([ax])
        for i, (name, part) in enumerate(groups.items()):
            look = style.line_look(i) | {"linestyle": "-", "label": plain_text(name)}
            _plot_rate(ax, part, names, look)
        # Steps that whole percents can name.
        ax.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        if any(groups):
            style.add_legend(ax)
    for i, ax in enumerate(axes):
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_xlabel("slot of the block")
        style.percent_axis(ax, label)
        if i:
            ax.sharey(axes[0])
        if i % _PANELS_PER_LINE:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
    axes[0].autoscale(axis="y")
    return figure


def _groups(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The parts of a rate table by what stands between its kind and its slot, and by drafter."""
    names = list(table.columns[: table.columns.get_loc("slot")])
    by = [name for name in dict.fromkeys([*names, "drafter"]) if name in table and name != "kind"]
    if not by:
        return {"": table}
    parts = table.groupby(by, sort=False, dropna=False)
    return {", ".join(map(str, key)): part for key, part in parts}


def _plot_rate(ax: Axes, line: pd.DataFrame, names: list[str], look: dict[str, Any]) -> None:
    rate, low, high = (line[name] for name in names)
    if look["linestyle"] == "none":
        ax.vlines(line["slot"], low, high, color=look["color"], linewidth=1.2)
    else:
        style.add_band(ax, line["slot"], low, high, look["color"])
    ax.plot(line["slot"], rate, **look)


def plot_reliability(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Outcome against confidence, bin by bin; a calibrated head lies on the diagonal.

    The larger a bin's mark, the more slots it holds; the strip below counts them. A line is the
    interval of the outcome, or reaches to the diagonal without one. Each table, from
    :func:`dspark_lab.rates.reliability_tables`, has a panel with its name, such as ``"raw"``.
    """
    tables = style.tables_by_name(tables, ["low", "high", "count", "confidence", "outcome"])
    count = len(tables)
    grid: dict[str, Any] = {"columns": count, "rows": 2, "height_ratios": (1, 0.22)}
    figure, axes = style.new_figure(
        min(3.2 * count + 0.4, style.WIDEST), 4.7, layout="compressed", **grid
    )
    most = max(1, *(table["count"].max() for table in tables.values()))
    for i, (name, table) in enumerate(tables.items()):
        look = style.line_look(i, name)
        colour = look["color"]
        ax, strip = axes[i], axes[count + i]
        known = table[table["confidence"].notna()]
        ax.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
        low, high = "confidence", "outcome"
        if "outcome_low" in known:
            low, high = "outcome_low", "outcome_high"
        ax.vlines(known["confidence"], known[low], known[high], colour, alpha=0.5)
        ax.plot(known["confidence"], known["outcome"], color=colour, linewidth=1)
        marks = {"s": 12 + 110 * known["count"] / most, "marker": look["marker"]}
        marks |= {"edgecolors": colour, "facecolors": colour}
        if look["fillstyle"] == "none":
            marks["facecolors"] = PAPER
        ax.scatter(known["confidence"], known["outcome"], clip_on=False, zorder=3, **marks)
        style.add_title(ax, plain_text(name))
        ax.set(xlabel="confidence, mean of a bin", ylabel="outcome, mean of a bin")
        ax.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
        bars = {"width": table["high"] - table["low"], "align": "edge", "color": colour}
        strip.bar(table["low"], table["count"], edgecolor=INK, linewidth=0.4, **bars)
        strip.set(xlabel="confidence", ylabel="slots")
        strip.set(xlim=(0, 1), ylim=(0, 1.05 * most), box_aspect=0.22)
        strip.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return figure


def plot_bias(table: pd.DataFrame, by: str | Sequence[str]) -> Figure:
    """How much too sure a confidence head is, with its 95 % interval, group by group.

    The table is from :func:`dspark_lab.rates.study`, grouped by the same columns: ``by`` one, whose
    values stand on the axis, or two, the second of which is told apart by colours and marks.
    """
    require_columns("table", table, ["bias", "bias_low", "bias_high"])
    names = [by] if isinstance(by, str) else list(by)
    if len(names) not in (1, 2) or any(name not in table.columns for name in names):
        raise ValueError(f"by must be one or two of {list(table.columns)}, got {names}")
    places = list(dict.fromkeys(table[names[0]]))
    kinds = list(dict.fromkeys(table[names[1]])) if len(names) == 2 else [None]
    step = 0.8 / len(kinds)
    figure, ax = style.new_figure(7, max(0.34, 0.17 * len(kinds) + 0.1) * len(places) + 1.2)
    ax.axvline(0, color=INK, linewidth=1)
    for i, kind in enumerate(kinds):
        part = table if kind is None else table[table[names[1]] == kind]
        shift = step * (i - (len(kinds) - 1) / 2)
        y = [places.index(place) + shift for place in part[names[0]]]
        look = style.line_look(i, kind)
        _dots(ax, part["bias"], part["bias_low"], part["bias_high"], y, look, plain_text(kind))
    if len(kinds) > 1:
        for between in range(1, len(places)):
            ax.axhline(between - 0.5, color=INK, alpha=0.25, linewidth=0.6)
        where = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        style.add_legend(ax, title=plain_text(names[1]), **where)
        ax.get_legend().get_title().set(color=INK, fontsize=8)
    _finish_dots(ax, [plain_text(place) for place in places])
    corners = {"x": "axes fraction", "y": "axes fraction"}
    style.add_note(ax, "← underconfident", (0, 1), (0, 4), ha="left", **corners)
    style.add_note(ax, "overconfident →", (1, 1), (0, 4), ha="right", **corners)
    label = "bias: mean of confidence − outcome, a difference of probabilities"
    ax.set(xlabel=label, ylabel=plain_text(names[0]))
    return figure


def plot_thresholds(tables: pd.DataFrame | Mapping[str, pd.DataFrame]) -> Figure:
    """The gain of a static threshold, a higher acceptance rate, and its cost.

    The tables, one or several by name, are from :func:`dspark_lab.rates.threshold_sweep`. Columns
    such as ``verified_low`` and ``verified_high`` are drawn as bands.
    """
    columns = ["threshold", "acceptance_rate", "verified", "accepted"]
    named = style.tables_by_name(tables, columns)
    height = 3.5 + 0.18 * (len(named) - 1)
    figure, (left, right) = style.new_figure(style.WIDEST, height, columns=2, wspace=0.08)
    for i, (name, table) in enumerate(named.items()):
        look = style.line_look(i, name) | {"markersize": 4, "markevery": max(1, len(table) // 10)}
        name = plain_text(name)
        begin = name + ", " if name else ""
        for ax, column, label, linestyle in (
            (left, "acceptance_rate", name, "-"),
            (right, "verified", begin + "verified", "-"),
            (right, "accepted", begin + "accepted", "--"),
        ):
            if f"{column}_low" in table.columns:
                low, high = table[f"{column}_low"], table[f"{column}_high"]
                style.add_band(ax, table["threshold"], low, high, look["color"])
            ax.plot(table["threshold"], table[column], label=label, linestyle=linestyle, **look)
    style.percent_axis(left, "acceptance rate (accepted / verified)")
    left.set_xlabel("threshold on the confidence")
    right.set(xlabel="threshold on the confidence", ylabel="slots per round")
    right.set_ylim(bottom=0)
    style.add_rules(right)
    if any(named):
        style.legend_above(left, 2)
    style.legend_above(right, 2, handlelength=3)
    return figure


def plot_calibration(report: pd.DataFrame) -> Figure:
    """ECE and AUROC before and after scaling, from :func:`dspark_lab.rates.calibration_report`."""
    columns = ["slot", "ece", "ece_scaled", "auroc", "auroc_scaled"]
    require_columns("report", report, columns)
    figure, (left, right) = style.new_figure(style.WIDEST, 3.4, columns=2, wspace=0.08)
    labels = [str(slot) for slot in report["slot"]]
    # What is not a slot of the block stands apart.
    x = np.arange(len(labels)) + 0.5 * np.array([not label.isdigit() for label in labels])
    for ax, name in ((left, "ece"), (right, "auroc")):
        before, after = report[name], report[f"{name}_scaled"]
        ax.vlines(x, before, after, color=INK, linewidth=1)
        for values, size, which in ((before, 7, "raw"), (after, 4, "scaled")):
            look = style.line_look(0, which) | {"linestyle": "none", "markersize": size}
            ax.plot(x, values, label=which, **look)
        ax.set_xticks(x, labels)
        ax.set_xlabel("slot of the block")
    left.set_ylim(bottom=0)
    style.percent_axis(left, "slot error (ECE)")
    right.axhline(0.5, color=INK, linestyle=":", linewidth=1)
    right.set_ylim(top=1)
    right.set_ylabel("AUROC (0.5: chance)")
    style.add_rules(right)
    style.legend_above(left, 2)
    return figure


def plot_drift(table: pd.DataFrame) -> Figure:
    """Calibration errors around a change of domain, from :func:`dspark_lab.rates.drift_table`."""
    columns = ["start", "rounds", "ece_raw", "ece_static", "ece_online"]
    require_columns("table", table, columns)
    figure, ax = style.new_figure(7, 3.2)
    lines = {
        "raw": {"color": style.CONFIDENCE_LOOKS["raw"]["color"], "linestyle": ":"},
        "static": {"color": RED, "linestyle": "--"},
        "online": {"color": BLUE, "linestyle": "-"},
    }
    # A window's error is drawn over all of the window.
    ends = np.append(table["start"], table["start"].iloc[-1] + table["rounds"].iloc[-1])
    for name, look in lines.items():
        values = np.append(table[f"ece_{name}"], table[f"ece_{name}"].iloc[-1])
        label = name if name == "raw" else f"{name} temperatures"
        ax.plot(ends, values, drawstyle="steps-post", linewidth=1.8, label=label, **look)
    ax.axvline(0, color=INK, linewidth=1)
    style.add_note(ax, "change of domain", (0, 1), (4, -2), y="axes fraction", va="top")
    # Room above the lines for the words.
    ax.margins(y=0.15)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("rounds since the change")
    style.percent_axis(ax, "product error (ECE)")
    style.legend_above(ax, 3)
    return figure


def plot_gain(table: pd.DataFrame) -> Figure:
    """Gains in speed over the raw confidence, from :func:`dspark_lab.serving.gain_table`."""
    columns = ["values", "threshold", "gain_percent", "gain_low", "gain_high"]
    require_columns("table", table, columns)
    figure, ax = style.new_figure(7, 0.42 * len(table) + 1.0)
    ax.axvline(0, color=INK, linewidth=1)
    names = []
    for i, row in enumerate(table.itertuples(index=False)):
        # None of the others looks like raw or scaled.
        look = style.line_look(i + 2, row.values)
        _dots(ax, [row.gain_percent], row.gain_low, row.gain_high, [i], look)
        cut = "" if pd.isna(row.threshold) else f", threshold {row.threshold:.3f}"
        names.append(f"{row.values}{cut}")
    _finish_dots(ax, names)
    ax.set(xlabel="gain in speed over raw, in %", ylabel="verified by")
    return figure


def _dots(
    ax: Axes, x: Any, low: Any, high: Any, y: list[float], look: dict[str, Any], label: str = ""
) -> None:
    ax.hlines(y, low, high, color=look["color"], linewidth=1.5)
    ax.plot(x, y, linestyle="none", label=label, **look)


def _finish_dots(ax: Axes, names: list[str]) -> None:
    """Name the rows, the first on top, and show some of the axis on either side of 0."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    low, high = ax.get_xlim()
    reach = max(-low, high)
    ax.set_xlim(min(low, -0.25 * reach), max(high, 0.25 * reach))


@checked
def reached_tokens(
    decoded: Decoded, to_text: Callable[[int], str], *, around: Size = 8
) -> pd.DataFrame:
    """The tokens that verification reached, each in its text, with its confidence and its fate.

    Returns:
        the :func:`dspark_lab.rates.reached_rows`: ``text`` is the drafted token's, ``said`` that
        of the token which stands at its ``position`` in the answer, ``before`` and ``after`` up to
        ``around`` tokens of the answer; ``kind`` as :func:`dspark_lab.decoding.token_kind` has it.
    """
    return _in_text(rates.reached_rows(decoded.trace), decoded, to_text, around)


@checked
def bin_tokens(
    decoded: Decoded, to_text: Callable[[int], str], *, around: Size = 8
) -> pd.DataFrame:
    """The tokens of the bins of a reliability diagram: :func:`reached_tokens`, of its slots.

    They are of the second half of :func:`dspark_lab.rates.split_prompts`, with the confidence
    ``scaled`` and the bins of both confidences, ``raw_bin`` and ``scaled_bin``, numbered as the
    rows of :func:`dspark_lab.rates.reliability_tables`.
    """
    slots = rates.reliability_slots(*rates.split_prompts(decoded.trace))
    return _in_text(slots, decoded, to_text, around)


def _in_text(
    slots: pd.DataFrame, decoded: Decoded, to_text: Callable[[int], str], around: int
) -> pd.DataFrame:
    """Rows of a trace, with their places in the answers."""
    answers = {p: token_texts(to_text, decoded.tokens[p]) for p in slots["prompt"].unique()}
    texts: dict[str, list[str]] = {name: [] for name in ("before", "text", "said", "after")}
    for slot in slots.itertuples(index=False):
        answer, at = answers[slot.prompt], slot.position
        texts["before"].append("".join(answer[max(0, at - around) : at]))
        # Nothing, where an answer ended before.
        said = "".join(answer[at : at + 1])
        texts["text"].append(said if slot.accepted else to_text(slot.token))
        texts["said"].append(said)
        texts["after"].append("".join(answer[at + 1 : at + 1 + around]))
    table = slots.assign(**texts, kind=token_kinds(slots["token"], to_text))
    return table[_PLACE + [name for name in _OF_BINS if name in table]]


@checked
def explore_acceptance(
    target: TargetLike | None = None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None = None,
    prompts: Prompts | None = None,
    *,
    temperature: float = 1.0,
    view: str = "rates",
    max_new_tokens: Count = 64,
    batch_size: Count | None = 40,
    seed: Size = 0,
) -> Explorer:
    """How well the confidence head predicts what the target accepts, on answers decoded for it.

    The tables are the view's, the ``tokens`` behind its points, ``trace`` and ``tau`` with its
    intervals. A choice of points is :attr:`~Explorer.selection`, a ``column`` of the tokens and the
    ``keys`` in it.

    Args:
        target: a target, its folder or hub id; the pocket target where None.
        drafter: a drafter, a checkpoint's folder, or several by name.
        prompts: user messages, token ids or conversations (their first question), or a JSONL file
            of conversations; some 40 of the shipped ones where None.
        temperature, view: where the controls start; the view is one of ``VIEWS``. Reliability is
            shown before and after scaling, fitted on half of the conversations, on the others.
        max_new_tokens, batch_size, seed: as in :func:`dspark_lab.decode`.
    """
    given = dict(locals())
    models_of = open_models(target, drafter, prompts)
    at_once = [
        dropdown("view", view, VIEWS),
        number_slider("temperature", temperature, 0.0, 2.0, continuous_update=False),
    ]

    def controls(progress: Progress) -> list[Control]:
        models = models_of(progress)
        names = list(models.drafters)
        chosen = dropdown("drafter", names[0], names, argument=False)
        return [
            at_once[0],
            chosen,
            at_once[1],
            slider("conversation", 0, 0, len(models.prompts) - 1),
        ]

    def reasons(chosen: SimpleNamespace) -> dict[str, str]:
        return {} if chosen.view == "text" else {"conversation": "for the view text"}

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    made: dict[tuple[str, float], tuple[Decoded, dict[str, pd.DataFrame]]] = {}

    def decoded(
        models: Models, name: str, temperature: float, progress: Progress
    ) -> tuple[Decoded, dict[str, pd.DataFrame]]:
        if (name, temperature) in made:
            return made[name, temperature]
        run = models.decode(name, batch_size, progress, temperature=temperature, **options)
        tables = {"trace": run.trace}
        if len(run.trace):
            tables["tau"] = rates.tau_table(rates.trace_sums(run.trace))
        if len(made) == _MOST_RUNS:
            made.pop(next(iter(made)))
        made[name, temperature] = run, tables
        return run, tables

    def draw(chosen: SimpleNamespace, progress: Progress) -> Frame:
        models = models_of(progress)
        config = models.drafters[chosen.drafter].config
        if chosen.view in _OF_CONFIDENCE and not config.enable_confidence_head:
            missing = f"needs a drafter with a confidence head, got {chosen.drafter}"
            raise ValueError(f"{chosen.view} {missing}")
        run, tables = decoded(models, chosen.drafter, chosen.temperature, progress)
        if chosen.view == "text":
            temperature, number = chosen.temperature, chosen.conversation
            rounds = models.decode_again(
                run, number, chosen.drafter, progress, temperature=temperature, **options
            )
            frame = _text_frame(run, models, number, rounds)
        else:
            progress(1, 1, "drawing")
            frame = _frame(chosen.view, run, models.to_text)
        return replace(frame, tables=frame.made_tables | tables)

    how: dict[str, Any] = {"view": DecodingView, "slow": True, "reasons": reasons, "given": given}
    return Explorer("explore_acceptance", controls, draw, **how)


def _text_frame(run: Decoded, models: Models, number: int, rounds: list[Round]) -> Frame:
    """One answer, whose tokens open their slots."""
    table = outcome_table(run, models.to_text, number)
    state = decoding_state(run, models.to_text, prompt=number, rounds=rounds)
    state["asked"] = short_prompt(models.prompts[number], 2000)
    alt = "one answer in the colours of its tokens' outcomes"
    return Frame({"tokens": table}, partial(plot_outcomes, table), alt, state=state)


def _frame(view: str, run: Decoded, to_text: Callable[[int], str]) -> Frame:
    """A view of all answers: its tables, its picture, and what the browser is given."""
    if view == "thresholds":
        table = rates.threshold_sweep(run.trace)
        state = charts.chart_state(charts.threshold_panels(table))
        figure, alt = partial(plot_thresholds, table), "a sweep of thresholds"
        return Frame({view: table}, figure, alt, state=state)
    if view == "reliability":
        parts = rates.reliability_tables(*rates.split_prompts(run.trace))
        tables = {view: pd.concat(parts, names=["values", "bin"]).reset_index()}
        tables["tokens"] = bin_tokens(run, to_text)
        figure, alt = partial(plot_reliability, parts), "reliability diagram"
        panels = charts.reliability_panels(parts)
    else:
        tokens = reached_tokens(run, to_text)
        if view in ("rates", "survival"):
            value: Rate = "survival" if view == "survival" else "conditional"
            table, name = rates.rate_table(rates.trace_sums(run.trace)), "rates"
            figure, alt = partial(plot_rates, table, value), f"{value} by slot"
            panels = charts.rate_panels(table, value)
        else:
            by = "domain" if view == "domains" else "kind"
            kinds = token_kinds(run.trace["token"], to_text)
            table, name = rates.study(run.trace.assign(kind=kinds), by=[by]), "bias"
            figure, alt = partial(plot_bias, table, by), f"bias by {by}"
            panels = charts.bias_panels(table, by)
        tables = {name: table, "tokens": tokens}
    answers = [token_texts(to_text, answer) for answer in run.tokens]
    state = charts.chart_state(panels, tables["tokens"], answers)
    return Frame(tables, figure, alt, state=state)
