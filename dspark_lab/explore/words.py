"""Tables for readers: headings in words with their units, and numbers written to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import pandas as pd

from dspark_lab.checks import Within, checked

# For each kind of number: what it is multiplied by, and how it is written.
_KINDS: dict[str, tuple[float, str]] = {
    "count": (1, ",.0f"),
    "tenths": (1, ",.1f"),
    "share": (100, ",.1f"),
    "ms": (1e3, ",.1f"),
    "GB": (1e-9, ",.2f"),
    "tera": (1e-12, ",.2f"),
}
# Heading and kind of a column; what is not listed keeps its name and is written with `digits`.
_COLUMNS: dict[str, tuple[str, str]] = {
    "num_anchors": ("anchors N", "count"),
    "block_size": ("block K", "count"),
    "seq_len": ("row S", "count"),
    "times_supervised": ("times a label", "count"),
    "p_covered": ("chance to be covered, %", "share"),
    "position_id": ("position", "count"),
    "context": ("context tokens", "count"),
    "kept": ("kept", ""),
    "blocks": ("blocks", "tenths"),
    "expected": ("covered, expected, %", "share"),
    "sampled": ("covered, one draw, %", "share"),
    "supervisions": ("times a label", ""),
    "ceiling": ("covered at most, %", "share"),
    "goal": ("goal, %", "share"),
    "documents": ("documents a row", "tenths"),
    "median_length": ("median length", "tenths"),
    "pairs": ("pairs", "count"),
    "share": ("share, %", "share"),
    "work": ("work, % of all pairs", "share"),
    "wasted": ("wasted, % of the work", "share"),
    "lr": ("learning rate", ""),
    "accept": ("accept rate", ""),
    "gain_percent": ("gain, %", "tenths"),
    "ece": ("error, %", "share"),
    "ece_scaled": ("error, scaled, %", "share"),
    "ece_product": ("of the product, %", "share"),
    "ece_product_scaled": ("of the product, scaled, %", "share"),
    "ece_raw": ("error, raw, %", "share"),
    "ece_static": ("error, fixed, %", "share"),
    "ece_online": ("error, online, %", "share"),
    "samples": ("slots", "count"),
    "reached": ("slots reached", "count"),
    "conditional": ("accept rate", ""),
    "accept_rate": ("accept rate", ""),
    "acceptance_rate": ("acceptance, %", "share"),
    "verified": ("verified a round", ""),
    "accepted": ("accepted a round", ""),
    "seconds": ("step, ms", "ms"),
    "gain": ("gain a step", "count"),
    "gain_per_second": ("gain a second", "count"),
    "memory_bytes": ("memory, GB", "GB"),
    "bytes_held": ("held, GB", "GB"),
    "bytes_moved": ("moved, GB", "GB"),
    "forward": ("forward, 10¹²", "tera"),
    "backward": ("backward, 10¹²", "tera"),
    "operations": ("operations, 10¹²", "tera"),
    "held_gb": ("held, GB", "tenths"),
    "weighted": ("times weight", "count"),
    "of_tokens": ("of all tokens, %", "share"),
    "of_supervised": ("of supervised, %", "share"),
    "covered": ("tokens covered", "count"),
    "times": ("times a label", ""),
    "steps": ("steps", "count"),
    "slots": ("slots", "count"),
    "lost": ("tau lost, %", "share"),
    "best_tau": ("its tau", ""),
    "draft_length": ("drafted K", "count"),
    "draft_seconds": ("draft, ms", "ms"),
    "verify_seconds": ("verify, ms", "ms"),
    "replay_seconds": ("read again, ms", "ms"),
    "overhead_seconds": ("overhead, ms", "ms"),
    "round_seconds": ("round, ms", "ms"),
    "best_share": ("fastest, % of resamples", "share"),
    "speedup_low": ("low", ""),
    "speedup_high": ("high", ""),
    "tau_low": ("low", ""),
    "tau_high": ("high", ""),
    "break_even_rate": ("break-even rate", ""),
    "break_even_without_replay": ("break-even without it", ""),
    "without_replay": ("speed-up without it", ""),
    "speedup_decoded": ("speed-up, decoded", ""),
    "speedup": ("speed-up", ""),
    "steps_per_second": ("steps a second", "tenths"),
    "theta": ("Theta, tokens/s", "tenths"),
    "concurrency": ("requests together", "count"),
}


def _heading(name: Any) -> str:
    if isinstance(name, str):
        return _COLUMNS.get(name, (name.replace("_", " "),))[0]
    return "" if name is None else _written(name, "", 2)


def _written(value: Any, kind: str, digits: int) -> str:
    if isinstance(value, str):
        return value.replace("\n", "⏎").replace("\t", "⇥")
    if pd.isna(value):
        return "–"
    if pd.api.types.is_bool(value):
        return "yes" if value else "no"
    if not pd.api.types.is_number(value):
        return str(value)
    whole = ",d" if pd.api.types.is_integer(value) else f",.{digits}f"
    factor, form = _KINDS.get(kind, (1, whole))
    text = format(int(value) if form == ",d" else value * factor, form)
    return text.replace("-", "−")


def _in_words(index: pd.Index) -> pd.Index:
    """An index or the headings, each level's values written and its name in words."""
    kinds = [_COLUMNS.get(str(name), ("", ""))[1] for name in index.names]
    names = [None if name is None else _heading(name) for name in index.names]
    if isinstance(index, pd.MultiIndex):
        rows = [[_label(v, k) for v, k in zip(row, kinds, strict=True)] for row in index]
        return pd.MultiIndex.from_tuples(rows, names=names)
    return pd.Index([_label(value, kinds[0]) for value in index], name=names[0])


def _label(value: Any, kind: str) -> str:
    if isinstance(value, str):
        return _heading(value)
    if pd.api.types.is_float(value) and not kind:
        return f"{value:g}"
    return _written(value, kind, 2)


@checked
def readable(
    table: pd.DataFrame,
    columns: Sequence[str] | None = None,
    *,
    values: str = "",
    digits: Annotated[int, Within(0, 6)] = 2,
) -> pd.DataFrame:
    """Return a table of text for readers.

    Columns are named in words with their units; thousands are separated, bytes are in GB, times in
    ms, shares in percent. What an index without a name numbers is left out.

    Args:
        columns: those to show, in this order; all by default.
        values: the column that a pivoted table holds in all of its columns.
        digits: decimals of a number whose column has no unit of its own.
    """
    unknown = [name for name in columns or () if name not in table.columns]
    if unknown:
        raise ValueError(f"columns must be among {list(table.columns)}, got {unknown}")
    table = table if columns is None else table[list(columns)]
    shown = {}
    for place, name in enumerate(table.columns):
        kind = _COLUMNS.get(values or str(name), ("", ""))[1]
        shown[place] = [_written(value, kind, digits) for value in table.iloc[:, place]]
    text = pd.DataFrame(shown, index=table.index, dtype=object)
    text.columns = _in_words(table.columns)
    if table.index.names == [None] and isinstance(table.index, pd.RangeIndex | pd.Index):
        text.index = pd.Index([""] * len(text))
    else:
        text.index = _in_words(table.index)
    return text
