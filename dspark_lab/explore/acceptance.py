"""Accept rates and confidences: how the acceptance along a block is shown, and its explorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_lab.decoding import Decoded, decode, outcome_table, token_kinds
from dspark_lab.explore.calibration import plot_bias, plot_reliability, plot_thresholds
from dspark_lab.explore.decoding import outcome_legend, outcome_text
from dspark_lab.explore.explorer import Explorer, Frame, dropdown, number_slider, slider
from dspark_lab.explore.models import DrafterLike, Models, Prompts, TargetLike, load_models
from dspark_lab.explore.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    add_band,
    add_legend,
    add_title,
    line_look,
    new_figure,
    percent_axis,
    plain_text,
    png,
)
from dspark_lab.rates import (
    rate_table,
    reliability_tables,
    split_prompts,
    study,
    tau_table,
    threshold_sweep,
    trace_sums,
)

VIEWS = ("rates", "survival", "reliability", "domains", "token kinds", "thresholds", "text")
# Those of the views that look at the confidence alone.
_OF_CONFIDENCE = ("reliability", "domains", "token kinds", "thresholds")
_RATE_OF_VIEW: dict[str, Literal["conditional", "survival"]] = {
    "rates": "conditional",
    "survival": "survival",
}


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
    """Acceptance along the block with its 95 % intervals.

    A table of several kinds of rate has a panel for each drafter, or whatever else the table is
    kept apart by; a table of one kind has a line for each in a single panel.

    Args:
        table: from :func:`dspark_lab.rates.rate_table`, kept apart by such as ``by="drafter"``, or
            from :func:`dspark_lab.rates.slot_table`.
        value: the rate to show.
    """
    if value not in _RATES:
        raise ValueError(f"value must be one of {list(_RATES)}, got {value!r}")
    label, *interval = _RATES[value]
    groups = _groups(table)
    if "kind" in table and table["kind"].nunique() > 1:
        figure, axes = _panels(len(groups), width=2.7, height=2.5)
        for ax, (name, part) in zip(axes, groups.items(), strict=True):
            for kind, line in part.groupby("kind", sort=False):
                style = _KIND_STYLES.get(str(kind), {"color": INK, "linestyle": "-."})
                _plot_rate(ax, line, value, interval, {"label": kind, **style})
            add_title(ax, plain_text(name))
        handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
        _figure_legend(figure, list(handles.values()))
    else:
        figure, ax = new_figure(7, 3.4)
        axes = np.array([ax])
        for i, (name, part) in enumerate(groups.items()):
            look = line_look(i) | {"linestyle": "-", "label": plain_text(name)}
            _plot_rate(ax, part, value, interval, look)
        # Steps that whole percents can name.
        ax.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        add_legend(ax)
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_xlabel("slot of the block")
        percent_axis(ax, label)
    _share_y(axes)
    return figure


def _groups(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The parts of a rate table by what stands between its kind and its slot, and by drafter."""
    names = list(table.columns[: table.columns.get_loc("slot")])
    by = [name for name in dict.fromkeys([*names, "drafter"]) if name in table and name != "kind"]
    if not by:
        return {"": table}
    parts = table.groupby(by, sort=False, dropna=False)
    return {", ".join(map(str, key)): part for key, part in parts}


def _plot_rate(
    ax: Axes, line: pd.DataFrame, value: str, interval: list[str], style: dict[str, Any]
) -> None:
    low, high = (line[bound] for bound in interval)
    if style["linestyle"] == "none":
        ax.vlines(line["slot"], low, high, color=style["color"], linewidth=1.2)
    else:
        add_band(ax, line["slot"], low, high, style["color"])
    ax.plot(line["slot"], line[value], **style)


def _panels(count: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Axes of one size each, in inches or wider where they are few, a few a line."""
    columns = min(count, _PANELS_PER_LINE)
    lines = -(-count // columns)
    # No less than a legend in one line needs.
    width = max(width * columns, 6.5)
    figure, axes = new_figure(width + 0.5, height * lines + 0.5, columns, lines)
    axes = np.atleast_1d(axes)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


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


def explore_acceptance(
    target: TargetLike | None = None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None = None,
    prompts: Prompts | None = None,
    *,
    temperature: float = 1.0,
    view: str = "rates",
    max_new_tokens: int = 64,
    batch_size: int | None = 40,
    seed: int = 0,
) -> Explorer:
    """How well the confidence head predicts what the target accepts, on answers decoded for it.

    Args:
        target: a target, its folder or hub id; the pocket target where None.
        drafter: a drafter, a checkpoint's folder, or several by name.
        prompts: user messages, token ids or conversations (their first question), or a JSONL file
            of conversations; some 40 of the shipped ones where None.
        temperature, view: where the controls start. The views are ``VIEWS``: conditional accept
            rates and survival by slot; reliability before and after scaling, which is fitted on
            half of the conversations and shown on the others; bias by domain and by kind of token;
            a sweep of thresholds; and an answer as text.
        max_new_tokens, batch_size, seed: see :func:`dspark_lab.decode`; a target that decodes one
            row at a time does so here, too.

    Returns:
        an explorer whose ``table`` is the one behind the view; ``tables["trace"]`` is the trace,
        ``tables["tau"]`` tau with its intervals.
    """
    controls = [
        dropdown("view", view, VIEWS),
        number_slider("temperature", temperature, 0.0, 2.0, continuous_update=False),
    ]
    models = load_models(target, drafter, prompts)
    controls.insert(1, dropdown("drafter", next(iter(models.drafters)), list(models.drafters)))
    controls.append(slider("conversation", 0, 0, len(models.prompts) - 1))

    @lru_cache(maxsize=8)
    def decoded(drafter: str, temperature: float) -> tuple[Decoded, dict[str, pd.DataFrame]]:
        run = decode(
            models.target,
            models.drafters[drafter],
            models.prompts,
            domains=models.domains,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size if models.target.decodes_batches else None,
            seed=seed,
        )
        tables = {"trace": run.trace}
        if len(run.trace):
            tables["tau"] = tau_table(trace_sums(run.trace))
        return run, tables

    def draw(chosen: SimpleNamespace) -> Frame:
        drafter = models.drafters[chosen.drafter]
        if chosen.view in _OF_CONFIDENCE and not drafter.config.enable_confidence_head:
            raise ValueError(
                f"{chosen.view} needs a drafter with a confidence head, got {chosen.drafter}"
            )
        run, tables = decoded(chosen.drafter, chosen.temperature)
        frame = _frame(chosen.view, run, models, chosen.conversation)
        return replace(frame, tables=frame.tables | tables)

    return Explorer("explore_acceptance", controls, draw)


def _frame(view: str, run: Decoded, models: Models, conversation: int) -> Frame:
    """One view of decoded answers: its table, and the picture or the text of it."""
    if view == "text":
        table = outcome_table(run, models.to_text, conversation)
        return Frame({"tokens": table}, html=outcome_legend(table) + outcome_text(table))
    if view in _RATE_OF_VIEW:
        value = _RATE_OF_VIEW[view]
        table = rate_table(trace_sums(run.trace))
        return Frame({"rates": table}, png=png(plot_rates(table, value)), alt=f"{value} by slot")
    if view == "reliability":
        tables = reliability_tables(*split_prompts(run.trace))
        table = pd.concat(tables, names=["values", "bin"]).reset_index()
        figure = plot_reliability(tables)
        return Frame({"reliability": table}, png=png(figure), alt="reliability diagram")
    if view == "thresholds":
        table = threshold_sweep(run.trace)
        figure = plot_thresholds(table)
        return Frame({"thresholds": table}, png=png(figure), alt="a sweep of thresholds")
    by = "domain" if view == "domains" else "kind"
    kinds = token_kinds(run.trace["token"], models.to_text)
    table = study(run.trace.assign(kind=kinds), by=[by])
    return Frame({"bias": table}, png=png(plot_bias(table, by)), alt=f"bias by {by}")
