"""Charts in the browser: panels of points whose numbers, and tokens in their text, are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from dspark_lab.checks import checked, require_columns
from dspark_lab.explore.style import plain_text, tables_by_name

Rate = Literal["conditional", "survival"]
Panels = list[dict[str, Any]]

# Each rate's label and columns.
RATE_COLUMNS = {
    "conditional": ("accept rate, given all before", "conditional", "low", "high"),
    "survival": ("accepted with all before it", "survival", "survival_low", "survival_high"),
}
_TOKEN_COLUMNS = ["prompt", "domain", "kind", "round", "slot", "position", "text", "confidence"]
_TOKEN_COLUMNS += ["scaled", "accept_rate", "accepted", "raw_bin", "scaled_bin"]
_WIDE = {"width": 680, "height": 320, "square": False}
# Points of several kinds at one slot stand side by side.
_APART = 0.12


@checked
def rate_panels(table: pd.DataFrame, value: Rate = "conditional") -> Panels:
    """The panel of :func:`dspark_lab.explore.plot_rates` for one drafter's table."""
    label, rate, low, high = RATE_COLUMNS[value]
    counts = ["reached", "conversations"] + ["rounds"] * (value == "survival")
    require_columns("table", table, ["kind", "slot", rate, low, high, *counts])
    kinds = list(table["kind"].unique())
    points = []
    for row in table[table[rate].notna()].to_dict("records"):
        kind = kinds.index(row["kind"])
        count = f"{row['reached']:,.0f} slots reached"
        if value == "survival":
            count = f"slots of {row['rounds']:,.0f} rounds"
        facts = [f"{row['kind']}, slot {row['slot']}", _counted(count, row["conversations"])]
        facts.append(f"{label}: {_share(row[rate])}{_interval(row[low], row[high], _share)}")
        place = {"series": kind, "x": row["slot"] + _APART * (kind - (len(kinds) - 1) / 2)}
        ends = _ends(row[rate], row[low], row[high])
        point = {"key": int(row["slot"]), "name": f"slot {row['slot']}", "facts": facts}
        points.append(place | ends | point)
    last = int(table["slot"].max())
    every = range(0, last + 1, max(1, last // 8))
    axes = {"x_label": "slot of the block", "x_range": [-0.5, last + 0.5], "y_label": label}
    axes |= {"x_ticks": [[slot, str(slot)] for slot in every], **_y_axis(points, _percent)}
    series = [{"name": kind, "look": kind} for kind in kinds]
    held = {"name": "", "guide": None, "column": "slot", "confidence": "confidence"}
    return [{**held, **_WIDE, **axes, "series": series, "points": points}]


@checked
def reliability_panels(tables: Mapping[str, pd.DataFrame]) -> Panels:
    """The panels of :func:`dspark_lab.explore.plot_reliability`, ``raw`` and ``scaled``.

    The tables are from :func:`dspark_lab.rates.reliability_tables`.
    """
    means = ["confidence", "outcome", "outcome_low", "outcome_high", "gap"]
    tables = tables_by_name(tables, ["low", "high", "count", *means])
    most = max(1, *(table["count"].max() for table in tables.values()))
    shares = [[tenths / 10, _percent(tenths / 10)] for tenths in range(0, 11, 2)]
    axes: dict[str, Any] = {"x_label": "confidence, mean of a bin"}
    axes |= {"y_label": "accepted, share of a bin", "x_range": [0, 1], "y_range": [0, 1]}
    axes |= {"x_ticks": shares, "y_ticks": shares}
    panels = []
    for name, table in tables.items():
        points = []
        for number, row in enumerate(table.to_dict("records")):
            if not row["count"]:
                continue
            bounds = f"confidence {row['low']:.2f} to {row['high']:.2f}"
            low, high = row["outcome_low"], row["outcome_high"]
            facts = [f"{name}, {bounds}", f"{row['count']:,} slots"]
            facts.append(f"predicted {_share(row['confidence'])}")
            facts.append(f"actual {_share(row['outcome'])}{_interval(low, high, _share)}")
            sure = "overconfident" if row["gap"] > 0 else "underconfident"
            facts.append(f"{sure} by {100 * abs(row['gap']):.1f} points")
            place = {"series": 0, "x": row["confidence"], "size": float(row["count"] / most)}
            point = {"key": number, "name": bounds, "facts": facts}
            points.append(place | _ends(row["outcome"], low, high) | point)
        held = {"name": name, "guide": [0, 0, 1, 1], "width": 420, "height": 0, "square": True}
        held |= {"column": f"{name}_bin", "confidence": {"raw": "confidence"}.get(name, name)}
        panels.append({**held, **axes, "series": [{"name": name, "look": name}], "points": points})
    return panels


@checked
def bias_panels(table: pd.DataFrame, by: str) -> Panels:
    """The panel of :func:`dspark_lab.explore.plot_bias` by one column."""
    means = ["confidence", "outcome", "bias", "bias_low", "bias_high"]
    require_columns("table", table, [by, "samples", "conversations", *means])
    points = []
    for number, row in enumerate(table.to_dict("records")):
        name = plain_text(row[by])
        low, high = row["bias_low"], row["bias_high"]
        facts = [name, _counted(f"{row['samples']:,} slots", row["conversations"])]
        facts.append(f"confidence {row['confidence']:.3f}, outcome {row['outcome']:.3f}")
        facts.append(f"bias {_signed(row['bias'])}{_interval(low, high, _signed)}")
        point = {"key": row[by], "name": name, "facts": facts}
        points.append({"series": 0, "x": number, **_ends(row["bias"], low, high), **point})
    axes = {"x_range": [-0.5, len(table) - 0.5], "x_label": by}
    axes |= {"x_ticks": [[point["x"], point["name"]] for point in points]}
    axes |= _y_axis(points, lambda tick: f"{tick:+.3g}".replace("-", "−") if tick else "0", 0.0)
    axes["y_label"] = "bias: confidence − outcome; above 0 overconfident"
    held = {"name": "", "guide": [-0.5, 0, len(table) - 0.5, 0], "column": by}
    series = [{"name": "raw", "look": "raw"}]
    shown = {"series": series, "points": points, "confidence": "confidence", "lines": False}
    return [{**held, **_WIDE, **axes, **shown}]


@checked
def threshold_panels(table: pd.DataFrame) -> Panels:
    """The panels of :func:`dspark_lab.explore.plot_thresholds` for one table."""
    drawn = ("acceptance_rate", "verified", "accepted")
    ends = [f"{name}{end}" for name in drawn for end in ("", "_low", "_high")]
    require_columns("table", table, ["threshold", *ends])
    rate = _threshold_panel(table, {"acceptance_rate": "acceptance rate"}, _share, _percent)
    counts = {"verified": "verified", "accepted": "accepted"}
    slots = _threshold_panel(table, counts, lambda number: f"{number:.2f} slots a round", "{:g}")
    rate["y_label"], slots["y_label"] = "acceptance rate, accepted / verified", "slots a round"
    return [rate, slots]


def _threshold_panel(
    table: pd.DataFrame, columns: Mapping[str, str], write: Any, tick: Any
) -> dict[str, Any]:
    points = []
    for number, (column, words) in enumerate(columns.items()):
        for row in table[table[column].notna()].to_dict("records"):
            low, high = row[f"{column}_low"], row[f"{column}_high"]
            name = f"threshold {row['threshold']:.2f}"
            facts = [name, f"{words}: {write(row[column])}{_interval(low, high, write)}"]
            point = {"key": row["threshold"], "name": name, "facts": facts}
            ends = _ends(row[column], low, high)
            points.append({"series": number, "x": row["threshold"], **ends, **point})
    last = max(0.1, float(table["threshold"].max()))
    ticks = MaxNLocator(5).tick_values(0, last)
    axes = {"x_label": "threshold on the confidence", "x_range": [0, last]}
    axes |= {"x_ticks": [[float(at), f"{at:.1f}"] for at in ticks if at <= last]}
    axes |= _y_axis(points, tick if callable(tick) else tick.format, 0.0)
    series = [{"name": words, "look": words} for words in columns.values()]
    held = {"name": "", "guide": None, "column": None, "width": 440, "height": 300}
    return {**held, "square": False, **axes, "series": series, "points": points}


@checked
def chart_state(
    panels: Sequence[Mapping[str, Any]],
    tokens: pd.DataFrame | None = None,
    answers: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """What the browser is given of panels, with the tokens that their points stand for.

    ``tokens`` are from :func:`dspark_lab.explore.reached_tokens` or
    :func:`dspark_lab.explore.bin_tokens`, ``answers`` the texts of each answer's tokens.
    """
    columns = {}
    if tokens is not None:
        known = [name for name in _TOKEN_COLUMNS if name in tokens]
        columns = {name: _plain(tokens[name]) for name in known}
    return {"show": "chart", "panels": panels, "listed": columns, "answers": answers}


def _plain(values: pd.Series) -> list[Any]:
    """Values as JSON knows them."""
    if values.dtype.kind != "f":
        return values.tolist()
    return [None if np.isnan(value) else round(value, 6) for value in values.tolist()]


def _ends(y: float, low: float, high: float) -> dict[str, float | None]:
    known = not np.isnan(low)
    return {"y": y, "low": low if known else None, "high": high if known else None}


def _y_axis(points: Panels, write: Any, within: float | None = None) -> dict[str, Any]:
    """Ticks around all points and their intervals, and ``within``, where it is given."""
    shown = [point[name] for point in points for name in ("y", "low", "high")]
    shown = [value for value in [*shown, within] if value is not None] or [0.0, 1.0]
    places = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(min(shown), max(shown))
    ticks = [float(at) for at in places]
    return {"y_range": [ticks[0], ticks[-1]], "y_ticks": [[at, write(at)] for at in ticks]}


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def _interval(low: float, high: float, write: Any) -> str:
    return "" if np.isnan(low) else f", 95 % interval {write(low)} to {write(high)}"


def _counted(slots: str, conversations: float) -> str:
    return f"{slots}, {conversations:,.0f} conversations"
