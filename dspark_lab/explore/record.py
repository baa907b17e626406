"""A server's record in one picture: rates, options, drift and likely causes, with what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from html import escape
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dspark_lab import rates, serving
from dspark_lab.checks import checked, require_columns
from dspark_lab.explore import controls as make
from dspark_lab.explore import style
from dspark_lab.explore.charts import RATE_COLUMNS, Rate
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame
from dspark_lab.explore.serving import CONCURRENCY, SHIPPED_ENGINE, WHOLE_STEPS
from dspark_lab.explore.style import BLUE, GREEN, INK, RED, plain_text
from dspark_lab.explore.watch import plot_stretches
from dspark_lab.files import shipped
from dspark_lab.model import DrafterConfig
from dspark_lab.pairs import load_traces
from dspark_lab.records import (
    HEALTHY,
    AcceptanceRecord,
    Decision,
    Diagnosis,
    acceptance_over,
    decide_serving,
    diagnose,
    read_engine,
    record_parts,
    trained_record,
)
from dspark_lab.serving import Engine

# What a record may change over, and how it is written.
_OVER = {
    "position": "position in the answer",
    "seconds": "seconds since the first line",
    "running": "requests that decode together",
    "prompt_tokens": "tokens of the prompt",
    "output_tokens": "tokens of the answer",
}
_EXAMPLE = "records/stale.jsonl"
# Causes that are drawn, the likeliest first.
_CAUSES = 5


@checked
def plot_options(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Gain in speed over what was served, with 95 % intervals, of :attr:`Decision.options`.

    Filled marks are surely faster than what was served, which is the line at 0.
    """
    require_columns("table", table, ["option", "gain_percent", "gain_low", "gain_high", "faster"])
    if ax is None:
        _, ax = style.new_figure(7, 0.3 * len(table) + 0.9)
    ax.axvline(0, color=INK, linewidth=0.8)
    better = table["faster"].astype(bool)
    for which, colour, fill in ((better, GREEN, GREEN), (~better, BLUE, "none")):
        rows, part = np.flatnonzero(which), table[which]
        ax.hlines(rows, part["gain_low"], part["gain_high"], color=colour, linewidth=2)
        ax.plot(part["gain_percent"], rows, "o", color=colour, markerfacecolor=fill, markersize=5)
    ax.set_yticks(range(len(table)), _named(table["option"]))
    ax.invert_yaxis()
    ax.margins(y=0.08)
    ax.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("speed against what was served")
    ax.set_ylabel("option")
    return cast(Figure, ax.figure)


@checked
def plot_causes(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """The likeliest causes and their shares, of :attr:`Diagnosis.table`."""
    require_columns("table", table, ["cause", "share"])
    first = table.head(_CAUSES)
    if ax is None:
        _, ax = style.new_figure(7, 0.3 * len(first) + 0.9)
    colours = [GREEN if cause == HEALTHY else RED for cause in first["cause"]]
    ax.barh(range(len(first)), first["share"], 0.6, color=colours)
    for row, share in enumerate(first["share"]):
        style.add_note(ax, f"{share:.0%}", (share, row), (4, 0), va="center")
    ax.set_yticks(range(len(first)), list(map(plain_text, first["cause"])))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xticks([0, 0.5, 1])
    ax.set_xlabel("share of the likelihood")
    ax.set_ylabel("cause")
    return cast(Figure, ax.figure)


@checked
def plot_record(
    rates: pd.DataFrame,
    options: pd.DataFrame,
    over: pd.DataFrame | None = None,
    causes: pd.DataFrame | None = None,
    *,
    of: str = "position in the answer",
    title: str = "",
) -> Figure:
    """Rates by slot, :func:`plot_options`, :func:`plot_stretches` and :func:`plot_causes`.

    ``of`` names what the stretches are of, ``title`` is what to do.

    ``rates`` has the columns ``record`` (a line for each), ``slot``, and ``conditional`` or, where
    that is not known, ``survival``, with their bounds. What is not known is said in words.
    """
    require_columns("rates", rates, ["record", "slot"])
    figure, axes = style.new_figure(style.WIDEST, 5.6, columns=2, rows=2)
    if len(rates):
        _plot_rates(axes[0], rates)
    panels: tuple[tuple[Any, pd.DataFrame | None, dict[str, Any], str], ...] = (
        (plot_options, options, {}, "no option can be judged"),
        (plot_stretches, over, {"of": of}, "no time, load or length differs by line"),
        (plot_causes, causes, {}, "causes need trained= and rates by slot"),
    )
    titles = ("acceptance by slot", "options", "drift", "what may be wrong")
    for ax, (plot, table, settings, lacking) in zip(axes[1:], panels, strict=True):
        if table is not None and len(table):
            plot(table, ax=ax, **settings)
        else:
            _say(ax, lacking)
    if not len(rates):
        _say(axes[0], "the record has totals alone")
    for ax, name in zip(axes, titles, strict=True):
        style.add_title(ax, name)
    if title:
        look = {"color": INK, "fontsize": 11, "fontweight": "bold"}
        figure.suptitle(plain_text(title), x=0.01, ha="left", **look)
    return figure


def _plot_rates(ax: Axes, table: pd.DataFrame) -> None:
    known: Rate = "conditional" if table["conditional"].notna().all() else "survival"
    label, *names = RATE_COLUMNS[known]
    for i, (name, part) in enumerate(table.groupby("record", sort=False)):
        look = style.line_look(i) | {"markersize": 4, "label": plain_text(name)}
        rate, low, high = (part[name] for name in names)
        style.add_band(ax, part["slot"], low, high, look["color"])
        ax.plot(part["slot"], rate, **look)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set_xlabel("slot of the block")
    ax.set_ylim(0, 1)
    style.percent_axis(ax, label)
    style.add_legend(ax, loc="lower left")


def _named(options: pd.Series) -> list[str]:
    """The options' names; the first was served."""
    first, *others = map(plain_text, options)
    return [f"{first}, served", *others]


def _say(ax: Axes, words: str) -> None:
    ax.set_label("<text>")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.text(0, 0.5, words, color=INK, fontsize=9, transform=ax.transAxes)


@checked
def explore_record(
    record: AcceptanceRecord | pd.DataFrame | str | os.PathLike[str] | None = None,
    trained: AcceptanceRecord | pd.DataFrame | str | os.PathLike[str] | None = None,
    *,
    drafter: str | None = None,
    config: DrafterConfig | None = None,
    engine: Engine | str | os.PathLike[str] | None = None,
    temperature: float | None = None,
    requests: int = 1,
    over: str | None = None,
) -> Explorer:
    """What a server's record says, and what to do: keep, change, stop drafting, or mend.

        lab.explore_record("server.jsonl", trained=lab.decode(target, drafter, prompts).trace)

    The picture is :func:`plot_record`; below it stands what
    :func:`dspark_lab.records.decide_serving` advises, and why.

    Args:
        record: of a server, or its path, in any form of :func:`dspark_lab.load_acceptance`; or a
            trace. That of a shipped server with a fault, beside what its drafter does here, where
            None.
        trained: what the checkpoint does here, as of :func:`dspark_lab.diagnose`. Without it,
            or of a record of totals alone, nothing is looked for that may be wrong.
        drafter: which one of a trace of several.
        config: of the drafter, see :func:`dspark_lab.diagnose`.
        engine: what a round costs on the machine that serves, or its file
            (:func:`dspark_lab.records.read_engine`); that of the pocket pair where None, which is
            said.
        temperature, requests, over: where the controls start. ``over`` is what the drift is over:
            "position" (of a trace), "seconds", "running", "prompt_tokens" or "output_tokens", as
            far as the record says them. Where a record says no temperature, ``temperature`` is the
            one at which it was served.

    Returns:
        an explorer whose ``table`` is :attr:`Decision.options`; ``tables`` also has ``rates`` (of
        ``record`` "server" and "trained"), ``tau``, ``over``, and ``causes`` and ``figures`` of the
        diagnosis.

    Raises:
        ValueError: as of :func:`dspark_lab.load_acceptance` and :func:`dspark_lab.diagnose`.
    """
    given = dict(locals())
    if record is None:
        record, trained, drafter = shipped(_EXAMPLE), load_traces(), "dspark-k7"
    parts = record_parts(record, drafter)
    own = engine or serving.load_engine()
    if isinstance(own, (str, os.PathLike)):
        slots = max(part.passed.shape[1] for part, _ in parts.values())
        own = read_engine(own, block_size=max(slots, 1))
    if temperature is not None and list(parts) == [None]:
        parts = {temperature: parts[None]}
    held = list(parts)
    chosen_over = list(dict.fromkeys(name for part in parts.values() for name in _known(*part)))
    controls = [make.selection_slider("requests", requests, CONCURRENCY)]
    if len(held) > 1:
        start = held[0] if temperature is None else temperature
        controls.insert(0, make.dropdown("temperature", start, held))
    elif temperature is not None:
        style.require_one_of("temperature", temperature, held)
    if chosen_over:
        controls.append(make.dropdown("over", over or chosen_over[0], chosen_over))
    elif over is not None:
        raise ValueError(f"the record says nothing that changes, got over={over!r}")

    @cache
    def diagnosed(t: Any) -> Diagnosis | None:
        if trained is None or not parts[t][0].passed.shape[1]:
            return None
        return diagnose(parts[t][0], trained, drafter=drafter, temperature=t, config=config)

    @cache
    def decided(t: Any, load: int) -> Decision:
        served, trace = parts[t]
        whole = served if trace is None else trace
        return decide_serving(whole, own.costs(load), diagnosis=diagnosed(t))

    @cache
    def told(t: Any) -> dict[str, pd.DataFrame]:
        served, _ = parts[t]
        beside = {"server": served}
        if trained is not None:
            beside["trained"] = trained_record(trained, drafter, [] if t is None else [t])
        return {"rates": _rates(beside), "tau": _tau(beside)}

    @cache
    def drift(t: Any, name: str) -> pd.DataFrame | None:
        served, trace = parts[t]
        if name not in _known(served, trace):
            return None
        if name == "position":
            assert trace is not None
            return rates.depth_table(trace)
        return acceptance_over(served, name)

    def draw(chosen: SimpleNamespace) -> Frame:
        t = getattr(chosen, "temperature", held[0])
        decision = decided(t, chosen.requests)
        name = getattr(chosen, "over", "")
        stretches = drift(t, name) if name else None
        tables = {"options": decision.options, **told(t)}
        if stretches is not None:
            tables["over"] = stretches
        if decision.diagnosis is not None:
            tables["causes"] = decision.diagnosis.table
            tables["figures"] = decision.diagnosis.figures
        lines = [decision.reason, *_unknown(decision), parts[t][0].reason]
        if stretches is not None and len(stretches) > 1:
            lines.append(rates.stretch_reason(stretches, _OVER[name]))
        if engine is None:
            lines.append(SHIPPED_ENGINE)
        if not own.plain_known:
            lines.append(WHOLE_STEPS)
        html = "".join(f"<p>{escape(line)}</p>" for line in lines)

        def figure() -> Figure:
            return plot_record(
                tables["rates"],
                decision.options,
                stretches,
                tables.get("causes"),
                of=_OVER.get(name, ""),
                title=decision.headline,
            )

        alt = f"acceptance by slot, options, drift and causes; {decision.action}"
        return Frame(tables, figure, alt=alt, html=html)

    # What cannot be compared is refused here, and not beside the picture.
    diagnosed(held[0] if temperature is None else temperature)
    return Explorer("explore_record", controls, draw, given=given)


def _known(record: AcceptanceRecord, trace: pd.DataFrame | None) -> list[str]:
    """What differs from line to line, so that acceptance can be looked at over it."""
    lines = record.lines
    found = [
        name
        for name in _OVER
        if name in lines
        and pd.api.types.is_numeric_dtype(lines[name])
        and lines[name].notna().all()
        and lines[name].nunique() > 1
    ]
    return ["position", *found] if trace is not None else found


def _rates(records: Mapping[str, AcceptanceRecord]) -> pd.DataFrame:
    """Rates by slot, of those records that have any."""
    tables = {name: one.table() for name, one in records.items() if one.passed.shape[1]}
    return _joined(tables) if tables else pd.DataFrame(columns=["record", "slot"])


def _tau(records: Mapping[str, AcceptanceRecord]) -> pd.DataFrame:
    return _joined({name: one.tau_table() for name, one in records.items()})


def _joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    named = [table.assign(record=name) for name, table in tables.items()]
    joined = pd.concat(named, ignore_index=True)
    return joined[["record", *(name for name in joined if name != "record")]]


def _unknown(decision: Decision) -> tuple[str, ...]:
    """What cannot be told, where the reason does not say it."""
    found = decision.diagnosis
    return () if found is None or decision.action == "something is wrong" else found.unknown
