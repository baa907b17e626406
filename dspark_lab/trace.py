"""The trace of a decoding run: a table with one row for each drafted slot, and its files.

Made by :func:`dspark_lab.decode.decode`, which says what each column is. This file knows the table;
it does not know how a trace came about.
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

__all__ = ["TRACE_COLUMNS", "load_trace", "save_trace"]

TRACE_COLUMNS = {
    "prompt": "int64",
    "domain": "object",
    "round": "int64",
    "slot": "int64",
    "position": "int64",
    "token": "int64",
    "draft_prob": "float64",
    "target_prob": "float64",
    "accept_prob": "float64",
    "accept_rate": "float64",
    "confidence": "float64",
    "verified": "bool",
    "accepted": "bool",
    "resampled": "Int64",
}

_SUFFIXES = (".parquet", ".csv")


def save_trace(trace: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Writes a trace as Parquet or CSV, by the name's suffix, whole or not at all.

    Raises:
        ValueError: another suffix.
    """
    path = _trace_path(path)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".csv":
        trace.to_csv(partial, index=False)
    else:
        trace.to_parquet(partial, index=False)
    os.replace(partial, path)


def load_trace(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A trace that :func:`save_trace` wrote, its columns of the same types.

    Raises:
        ValueError: another suffix, or a file with other columns.
    """
    path = _trace_path(path)
    if path.suffix == ".csv":
        # A domain may be called "NA" or "7"; only an empty number is missing.
        empty = {name: [""] for name in TRACE_COLUMNS if name != "domain"}
        table = pd.read_csv(
            path,
            dtype={"domain": "object"},
            keep_default_na=False,
            na_values=empty,
        )
    else:
        table = pd.read_parquet(path)
    missing = [name for name in TRACE_COLUMNS if name not in table]
    if missing:
        raise ValueError(f"{path} must hold a trace, but it has no {', '.join(missing)}")
    return table.astype(TRACE_COLUMNS)


def _trace_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"a trace is saved as one of {_SUFFIXES}, got {path.name!r}")
    return path
