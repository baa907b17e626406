"""What to do about a server, from its record: nothing, another draft length or threshold, or mend.

Each option's speed is held against that of what was served, on the same requests drawn again, so
that a change is only advised where its gain is no chance. What is wrong comes first: lengths and
thresholds of a server with a fault are those of the fault.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from dspark_lab.checks import checked
from dspark_lab.decoding import column
from dspark_lab.rates import split_prompts
from dspark_lab.records.causes import HEALTHY, Diagnosis
from dspark_lab.records.reading import load_acceptance, record_of_trace, trace_of_dump
from dspark_lab.records.record import AcceptanceRecord
from dspark_lab.serving import (
    AcceptanceProfile,
    RoundCosts,
    acceptance_profile,
    gain_by_length,
    gain_table,
    rows_of,
)

Action = Literal[
    "keep",
    "change the draft length",
    "change the threshold",
    "stop drafting",
    "something is wrong",
    "cannot be told",
]
# Without intervals a smaller gain is taken for chance: of a few hundred requests it can be.
_WORTH_PERCENT = 10
_NOT_WRONG = (HEALTHY, "harder prompts")
_SPEEDS = ["speedup", "speedup_low", "speedup_high"]
_GAINS = ["gain_percent", "gain_low", "gain_high"]
OPTION_COLUMNS = [
    *("option", "draft_length", "threshold"),
    *_SPEEDS,
    *_GAINS,
    "faster",
]


@dataclass(frozen=True, eq=False)
class Decision:
    """What :func:`decide_serving` advises.

    Attributes:
        action: one of :data:`Action`.
        setting: what to set, by ``draft_length`` (0: do not draft) or ``threshold``.
        options: a row for each ``option``, of which the first is what was served: its ``speedup``
            over plain decoding and its ``gain_percent`` over what was served, with their 95 %
            intervals (of a threshold, of its gain alone), and whether it is surely ``faster``:
            beyond its interval, or without any by more than a tenth.
        diagnosis: the one that was given.
        reason: why, in words.
    """

    action: Action
    setting: dict[str, float]
    options: pd.DataFrame
    diagnosis: Diagnosis | None
    reason: str

    @property
    def headline(self) -> str:
        """What to do in a few words."""
        if self.action == "something is wrong" and self.diagnosis is not None:
            return f"Something is wrong: {self.diagnosis.cause}"
        to = {
            "change the draft length": f" to {self.setting.get('draft_length', 0):.0f}",
            "change the threshold": f" to {self.setting.get('threshold', 0):.2f}",
        }
        return _capital(self.action) + to.get(self.action, "")

    def __repr__(self) -> str:
        return self.reason


@checked
def decide_serving(
    record: AcceptanceRecord | pd.DataFrame | str | os.PathLike[str],
    costs: RoundCosts,
    *,
    diagnosis: Diagnosis | None = None,
) -> Decision:
    """Advise to keep what is served, to change draft length or threshold, or to look for a fault.

        found = lab.diagnose("server.jsonl", trained=trace)
        records.decide_serving("server.jsonl", engine.costs(requests=4), diagnosis=found)

    Drafts longer than those of the record are not looked at, since it says nothing of them.

    Args:
        record: of the server at one temperature, its path, or a trace. Of a trace, and of SGLang's
            debug record, thresholds on the confidence are options too: chosen on half of the
            requests, reported on the others.
        costs: of a round on the machine that serves, at its load. Where its plain steps are not
            known apart from drafting, plain decoding is no option, and no speed-up is told.
        diagnosis: of the same record, from :func:`diagnose`; a fault comes before all options.

    Raises:
        ValueError: a record of several temperatures, or as of :func:`dspark_lab.load_acceptance`.
    """
    parts = record_parts(record)
    if len(parts) > 1:
        wanted = "a record or trace of one temperature, such as record.part(temperature=...)"
        raise ValueError(f"record must be {wanted}, got {list(parts)}")
    [(served, trace)] = parts.values()
    action: Action = "cannot be told"
    setting: dict[str, float] = {}
    try:
        options = _options(_profile(served, trace), trace, costs)
    except ValueError as error:
        options, why = pd.DataFrame(columns=OPTION_COLUMNS), str(error)
    else:
        action, setting, why = _best(options)
    if diagnosis is not None and diagnosis.cause not in _NOT_WRONG:
        return Decision("something is wrong", {}, options, diagnosis, _wrong(diagnosis, options))
    reason = f"{_capital(action)}: {why}."
    if diagnosis is not None:
        first = diagnosis.table.iloc[0]
        reason += f" {_capital(first['cause'])} ({first['share']:.0%} of the likelihood)."
    return Decision(action, setting, options, diagnosis, reason)


@checked
def record_parts(
    record: AcceptanceRecord | pd.DataFrame | str | os.PathLike[str], drafter: str | None = None
) -> dict[float | None, tuple[AcceptanceRecord, pd.DataFrame | None]]:
    """A record by temperature, None where it says none, each part with its trace if there is one.

    ``drafter`` names one of a trace of several.
    """
    if isinstance(record, pd.DataFrame):
        held: list[Any] = [None]
        if "temperature" in record:
            held = sorted(column(record, "temperature", complete=True).unique().tolist())
        traces = {t: _with_rates(rows_of(record, drafter, t)[0]) for t in held}
        return {t: (record_of_trace(trace), trace) for t, trace in traces.items()}
    if isinstance(record, AcceptanceRecord):
        several = record.values("temperature")
        if not several:
            return {None: (record, None)}
        silent = int(record.lines["temperature"].isna().sum())
        note = f"{silent} of {len(record.lines)} lines say no temperature and are left out"
        record = replace(record, notes=(*record.notes, *([note] * (silent > 0))))
        return {t: (record.part(temperature=t), None) for t in several}
    found = load_acceptance(record)
    if found.kind == "SGLang dump":
        return {None: (found, _with_rates(trace_of_dump(record)))}
    return record_parts(found)


def _with_rates(trace: pd.DataFrame) -> pd.DataFrame:
    """A server records no accept rates: outcomes stand for them."""
    if not column(trace, "accept_rate").isna().all():
        return trace
    return trace.assign(accept_rate=trace["accepted"].astype(float))


def _profile(record: AcceptanceRecord, trace: pd.DataFrame | None) -> AcceptanceProfile:
    return record.profile() if trace is None else acceptance_profile(trace)


def _options(
    profile: AcceptanceProfile, trace: pd.DataFrame | None, costs: RoundCosts
) -> pd.DataFrame:
    """What was served, every shorter draft, a threshold and plain decoding."""
    slots = len(profile.rates)
    if slots > costs.longest:
        raise ValueError(f"costs must be of drafts of {slots} tokens, got up to {costs.longest}")
    lengths = gain_by_length(profile, costs, slots).iloc[::-1]
    lengths.insert(0, "option", [f"draft {k}" for k in lengths["draft_length"]])
    served = lengths.iloc[0]
    more = []
    if trace is not None and not trace["confidence"].isna().any():
        more.append(_threshold(trace, costs, served))
    if costs.plain_known:
        slower = 100 / served[["speedup", "speedup_high", "speedup_low"]].astype(float) - 100
        plain = {"option": "plain decoding", "draft_length": 0} | dict.fromkeys(_SPEEDS, 1.0)
        more.append(plain | dict(zip(_GAINS, slower, strict=True)))
    table = pd.concat([lengths, pd.DataFrame(more)], ignore_index=True)
    if not costs.plain_known:
        table[_SPEEDS] = np.nan
    low = table["gain_low"].fillna(table["gain_percent"] - _WORTH_PERCENT)
    return table.assign(faster=low > 0).reindex(columns=OPTION_COLUMNS)


def _threshold(trace: pd.DataFrame, costs: RoundCosts, served: pd.Series) -> dict[str, Any]:
    """The best threshold on the confidence as it is, by its gain over whole blocks.

    The gain is of other requests than those that it was chosen on.
    """
    table = gain_table(*split_prompts(trace), costs).set_index("values")
    threshold, whole = table.loc["raw", "threshold"], table.loc["everything"]
    # The table's gains are those of whole blocks over the threshold.
    ends = ("gain_percent", "gain_high", "gain_low")
    gains = {
        name: 100 / (1 + whole[end] / 100) - 100 for name, end in zip(_GAINS, ends, strict=True)
    }
    row = {"option": f"threshold {threshold:.2f}", "draft_length": served["draft_length"]}
    row |= {
        "threshold": threshold,
        "speedup": served["speedup"] * (1 + gains["gain_percent"] / 100),
    }
    return row | gains


def _best(options: pd.DataFrame) -> tuple[Action, dict[str, float], str]:
    """The fastest of what is surely faster than what was served."""
    served, others = options.iloc[0], options.iloc[1:]
    better = others[others["faster"]]
    speed = f"{served['option']} was served"
    if np.isfinite(served["speedup"]):
        speed = f"{served['option']} has {_number(served)} times the speed of plain decoding"
    if better.empty:
        first = others.loc[others["gain_percent"].idxmax()]
        why = f"{speed}, and nothing is surely faster: {first['option']} {_percent(first)}"
        return "keep", {"draft_length": float(served["draft_length"])}, why
    first = better.loc[better["gain_percent"].idxmax()]
    why = f"{speed}, {first['option']} is faster: {_percent(first)}"
    if first["draft_length"] == 0:
        return "stop drafting", {"draft_length": 0.0}, why
    if np.isfinite(first["threshold"]):
        return "change the threshold", {"threshold": float(first["threshold"])}, why
    return "change the draft length", {"draft_length": float(first["draft_length"])}, why


def _wrong(diagnosis: Diagnosis, options: pd.DataFrame) -> str:
    text = f"Something is wrong, likely: {diagnosis.reason}"
    if len(options):
        text += " Mend it before draft length or threshold: their advice is of the fault."
    return text


def _number(row: pd.Series) -> str:
    return _with_bounds(row[_SPEEDS].tolist(), ".2f", "")


def _percent(row: pd.Series) -> str:
    return _with_bounds(row[_GAINS].tolist(), "+.1f", " %")


def _with_bounds(values: list[float], form: str, unit: str) -> str:
    value, low, high = values
    spread = "" if np.isnan(low) else f" ({low:{form}} to {high:{form}}{unit})"
    return f"{value:{form}}{unit}{spread}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
