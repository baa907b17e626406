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
    "batch_size": ("rows", "count"),
    "best_num_anchors": ("best N", "count"),
    "best_block_size": ("best K", "count"),
    "best_batch_size": ("best rows", "count"),
    "block_size": ("block K", "count"),
    "seq_len": ("row S", "count"),
    "times_supervised": ("times a label", "count"),
    "p_covered": ("chance to be covered, %", "share"),
    "position_id": ("position", "count"),
    "context": ("context tokens", "count"),
    "kept": ("kept", ""),
    "blocks": ("blocks", "tenths"),
    "labels": ("labels", "count"),
    "share_only_supervised": ("only supervised, %", "share"),
    "share_only_generated": ("only generated, %", "share"),
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
    "accept": ("mean accept rate", ""),
    "gain_percent": ("gain, %", "tenths"),
    "ece": ("slot error, %", "share"),
    "ece_scaled": ("slot error, scaled, %", "share"),
    "ece_product": ("product error, %", "share"),
    "ece_product_scaled": ("product error, scaled, %", "share"),
    "ece_raw": ("product error, raw, %", "share"),
    "ece_static": ("product error, fixed, %", "share"),
    "ece_online": ("product error, online, %", "share"),
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
    "lost_low": ("from, %", "share"),
    "lost_high": ("to, %", "share"),
    "median": ("tau lost, median, %", "share"),
    "worst": ("at worst, %", "share"),
    "within": ("settings below 3 %, %", "share"),
    "error": ("error, median, %", "share"),
    "hit": ("in the interval, %", "share"),
    "hit_low": ("from, %", "share"),
    "hit_high": ("to, %", "share"),
    "width": ("its width, %", "share"),
    "last": ("last value's error, %", "share"),
    "power": ("power law's error, %", "share"),
    "effective": ("effective anchors", "tenths"),
    "piloted": ("run by pilots, %", "share"),
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
    "break_even_tau": ("break-even tau", ""),
    "tokens_per_second": ("tokens/s", "count"),
    "plain_tokens_per_second": ("plain, tokens/s", "count"),
    "break_even_without_replay": ("break-even without it", ""),
    "without_replay": ("speed-up without it", ""),
    "speedup_decoded": ("speed-up, decoded", ""),
    "speedup": ("speed-up", ""),
    "scheduled": ("speed-up, scheduler", ""),
    "over_head": ("over the head", ""),
    "over_head_low": ("low", ""),
    "over_head_high": ("high", ""),
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
        # Of a token's spaces a page would show none.
        text = value if value == value.strip(" ") else value.replace(" ", "␣")
        return text.replace("\n", "⏎").replace("\t", "⇥")
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


def _in_words(index: pd.Index, *, headings: bool) -> pd.Index:
    """An index: the names of its levels in words, its values written; ``headings`` are names too.

    Values of a level with a name are those of a column, and stay as they are where they are text.
    """
    names = [None if name is None else _heading(name) for name in index.names]
    levels = []
    for place, name in enumerate(index.names):
        kind = _COLUMNS.get(str(name), ("", ""))[1]
        written = []
        for value in index.get_level_values(place):
            if headings and name is None:
                written.append(_heading(value))
            elif pd.api.types.is_float(value) and not kind:
                written.append(f"{value:g}")
            else:
                written.append(_written(value, kind, 2))
        levels.append(written)
    if isinstance(index, pd.MultiIndex):
        return pd.MultiIndex.from_arrays(levels, names=names)
    return pd.Index(levels[0], name=names[0])


def _all_whole(column: pd.Series) -> bool:
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        return False
    return bool((column.dropna() % 1 == 0).all())


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
        kind, column = _COLUMNS.get(values or str(name), ("", ""))[1], table.iloc[:, place]
        if kind in ("", "tenths") and _all_whole(column):
            kind = "count"
        shown[place] = [_written(value, kind, digits) for value in column]
    text = pd.DataFrame(shown, index=table.index, dtype=object)
    text.columns = _in_words(table.columns, headings=True)
    if table.index.names == [None]:
        text.index = pd.Index([""] * len(text))
    else:
        text.index = _in_words(table.index, headings=False)
    return text
