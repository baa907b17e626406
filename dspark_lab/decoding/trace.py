"""The trace of a decoding run, a row for each drafted slot: its files, and how it is read.

Its columns: see :class:`dspark_lab.decoding.Decoded`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from dspark_lab.checks import checked
from dspark_lab.files import written_whole

Outcome = Literal["empirical", "analytic"]
_Required = Literal["nowhere", "where verified", "in every row"]

TRACE_COLUMNS = {"prompt": "int64", "domain": "object"}
TRACE_COLUMNS |= dict.fromkeys(("round", "slot", "position", "token"), "int64")
TRACE_COLUMNS |= dict.fromkeys(("draft_prob", "target_prob", "accept_prob"), "float64")
TRACE_COLUMNS |= dict.fromkeys(("accept_rate", "confidence", "top_prob", "margin"), "float64")
TRACE_COLUMNS |= {"verified": "bool", "accepted": "bool", "resampled": "Int64"}

# Older traces have none of them.
_LATER_COLUMNS = ("top_prob", "margin")
_SUFFIXES = (".parquet", ".csv")
_KINDS: dict[str, tuple[Callable[..., bool], type]] = {
    "integers": (pd.api.types.is_integer_dtype, np.int64),
    "truth values": (pd.api.types.is_bool_dtype, bool),
}
# How far from [0, 1] a sum of a vocabulary's fp32 probabilities may end; it is clipped.
_ROUNDING = 1e-5


@checked
def save_trace(trace: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a trace as Parquet or CSV, by the name's suffix, whole or not at all."""
    path = _trace_path(path)
    write = trace.to_csv if path.suffix == ".csv" else trace.to_parquet
    with written_whole(path) as partial:
        write(partial, index=False)


@checked
def load_trace(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a trace that :func:`save_trace` wrote, its columns of the same types.

    ``top_prob`` and ``margin`` are NaN where an older trace has none.
    """
    path = _trace_path(path)
    with path.open("rb") as file:
        try:
            if path.suffix == ".csv":
                # A domain may be called "NA" or "7"; only an empty number is missing.
                empty = {name: [""] for name in TRACE_COLUMNS if name != "domain"}
                options: dict[str, Any] = {"dtype": {"domain": "object"}, "keep_default_na": False}
                table = pd.read_csv(file, na_values=empty, **options)
            else:
                table = pd.read_parquet(file)
            later = [name for name in _LATER_COLUMNS if name not in table]
            table = table.assign(**dict.fromkeys(later, np.nan))
            missing = [name for name in TRACE_COLUMNS if name not in table]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            return table.astype(TRACE_COLUMNS)
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path} must hold a trace as {path.suffix[1:]}: {error}") from error


@dataclass(frozen=True, eq=False)
class Rounds:
    """A trace as arrays, one row for each round, ordered by prompt and round.

    ``confidence``: NaN where the round has no such slot. ``accept_rate``: the analytic rate, NaN
    where not verified, and everywhere in a server's trace. ``verified`` and ``accepted``: each a
    prefix of the round.
    """

    confidence: Float[np.ndarray, "round slot"]
    accept_rate: Float[np.ndarray, "round slot"]
    verified: Bool[np.ndarray, "round slot"]
    accepted: Bool[np.ndarray, "round slot"]
    prompt: Shaped[np.ndarray, " round"]
    domain: Shaped[np.ndarray, " round"]

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def reached(self) -> Bool[np.ndarray, "round slot"]:
        """Verified, and all slots before it accepted."""
        return reached_slots(self.verified, self.accepted)

    @property
    def conversation(self) -> Int[np.ndarray, " round"]:
        """The number of each round's conversation, counted from 0 in the order of the prompts."""
        return pd.factorize(self.prompt, sort=True)[0]

    @checked
    def outcome(self, kind: Outcome = "empirical") -> Float[np.ndarray, "round slot"]:
        """Whether each reached slot was accepted, or its accept rate; NaN elsewhere."""
        values = self.accepted.astype(np.float64) if kind == "empirical" else self.accept_rate
        found = np.where(self.reached, values, np.nan)
        if np.isnan(found).all() and self.reached.any():
            raise ValueError(
                "the trace must have accept rates, which servers do not record: use outcomes "
                "('empirical'), or trace.assign(accept_rate=trace['accepted'].astype(float))"
            )
        return found

    @checked
    def pairs(
        self, kind: Outcome = "empirical"
    ) -> tuple[Float[np.ndarray, " sample"], Float[np.ndarray, " sample"]]:
        """Confidence and outcome of all reached slots."""
        outcome = self.outcome(kind)
        taken = ~np.isnan(outcome)
        return self.confidence[taken], outcome[taken]

    @checked
    def take(self, rows: Shaped[np.ndarray, " row"]) -> Rounds:
        """Some of the rounds: by a mask or by indices, in that order."""
        return Rounds(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@checked
def rounds_of(trace: pd.DataFrame | Rounds) -> Rounds:
    """Return the rounds of one run, every slot with a confidence; rounds as they are."""
    if isinstance(trace, Rounds):
        return trace
    rounds, _ = read_trace(trace)
    probabilities(trace, "confidence", "in every row")
    return rounds


def read_trace(trace: pd.DataFrame) -> tuple[Rounds, Int[np.ndarray, "round slot"]]:
    """Return the rounds of a trace, and the row in which each slot stands; -1 where there is none.

    The rows are of one run, in any order; the tokens and their own probabilities are not needed.
    """
    code, prompts = pd.factorize(column(trace, "prompt", complete=True), sort=True)
    if len(trace) == 0:
        raise ValueError("trace must have at least one row, got 0")
    domains = column(trace, "domain", complete=True)
    domain, _ = pd.factorize(domains)
    _, begin = np.unique(code, return_index=True)
    other = np.flatnonzero(domain != domain[begin[code]])
    if len(other):
        prompt, own = prompts[code[other[0]]], domains.iloc[begin[code[other[0]]]]
        found = f"{domains.iloc[other[0]]!r} and {own!r} for conversation {prompt}"
        raise ValueError(f"a conversation must have one domain, got {found}")
    number, place = _typed(trace, "round", "integers"), _typed(trace, "slot", "integers")
    order = np.lexsort((place, number, code))
    slot = place[order]
    begins = np.append(True, (np.diff(code[order]) != 0) | (np.diff(number[order]) != 0))
    starts, of_round = np.flatnonzero(begins), begins.cumsum() - 1
    rule = "the slots of a round must be 0, 1, 2, ..., each once, and every run a trace of its own"
    _refuse(trace, "slot", order[slot != np.arange(len(slot)) - starts[of_round]], rule)
    first = order[starts]
    row = np.full((len(first), slot.max() + 1), -1)
    row[of_round, slot] = order

    def spread(values: np.ndarray, empty: float | bool) -> np.ndarray:
        return np.where(row < 0, empty, values[row])

    verified = spread(_typed(trace, "verified", "truth values"), False)
    accepted = spread(_typed(trace, "accepted", "truth values"), False)
    for name, prefix in (("verified", verified), ("accepted", accepted)):
        rule = f"{name} must be False after a slot that was not"
        _refuse(trace, name, row[prefix & ~slot_before(prefix)], rule)
    rule = "accepted must be False where not verified"
    _refuse(trace, "accepted", row[accepted & ~verified], rule)
    # Servers record what was accepted, not how probable that was.
    known = column(trace, "accept_rate").notna().any()
    required: _Required = "where verified" if known else "nowhere"
    rate = spread(probabilities(trace, "accept_rate", required), np.nan)
    rounds = Rounds(
        confidence=spread(probabilities(trace, "confidence"), np.nan),
        accept_rate=np.where(verified, rate, np.nan),
        verified=verified,
        accepted=accepted,
        prompt=prompts.take(code[first]).to_numpy(),
        domain=domains.iloc[first].to_numpy(dtype=object),
    )
    return rounds, row


@checked
def column(trace: pd.DataFrame, name: str, *, complete: bool = False) -> pd.Series:
    """Return a column of a trace; refuse a missing column, or a missing value if ``complete``."""
    if name not in trace.columns:
        raise ValueError(f"trace must have a column {name!r}, got {list(trace.columns)}")
    values = trace[name]
    missing = int(values.isna().sum()) if complete else 0
    if missing:
        raise ValueError(f"trace[{name!r}] must have a value in every row, {missing} are missing")
    return values


def _typed(
    trace: pd.DataFrame, name: str, kind: Literal["integers", "truth values"]
) -> Shaped[np.ndarray, " row"]:
    values = column(trace, name, complete=True)
    is_kind, dtype = _KINDS[kind]
    if not is_kind(values):
        raise TypeError(f"trace[{name!r}] must hold {kind}, got {values.dtype}")
    return values.to_numpy(dtype)


@checked
def probabilities(
    trace: pd.DataFrame,
    name: str,
    required: _Required = "nowhere",
) -> Float[np.ndarray, " row"]:
    """Return a column of probabilities; NaN where none is required."""
    values = column(trace, name)
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        raise TypeError(f"trace[{name!r}] must hold numbers, got {values.dtype}")
    numbers = values.to_numpy(np.float64, na_value=np.nan)
    outside = (numbers < -_ROUNDING) | (numbers > 1 + _ROUNDING)
    _refuse(trace, name, np.flatnonzero(outside), f"{name} must lie in [0, 1]")
    if required != "nowhere":
        missing = np.isnan(numbers)
        if required == "where verified":
            missing &= _typed(trace, "verified", "truth values")
        _refuse(trace, name, np.flatnonzero(missing), f"{name} must be a number {required}")
    return numbers.clip(0, 1)


def reached_slots(
    verified: Bool[np.ndarray, "round slot"], accepted: Bool[np.ndarray, "round slot"]
) -> Bool[np.ndarray, "round slot"]:
    """The verified slots before which all are accepted."""
    return verified & slot_before(accepted)


@checked
def slot_before(values: Shaped[np.ndarray, "*axes slot"]) -> Shaped[np.ndarray, "*axes slot"]:
    """Return the value of the slot before; 1 (or True) at the first slot."""
    return np.insert(values[..., :-1], 0, 1, axis=-1)


def _refuse(trace: pd.DataFrame, name: str, rows: Int[np.ndarray, " bad"], rule: str) -> None:
    """Raise the rule with what the first of these rows holds in column ``name``."""
    if len(rows):
        given, prompt, number, slot = (
            trace[key].iloc[rows[0]] for key in (name, "prompt", "round", "slot")
        )
        raise ValueError(f"{rule}, got {given} in prompt {prompt}, round {number}, slot {slot}")


def _trace_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"a trace is saved as one of {_SUFFIXES}, got {path.name!r}")
    return path
