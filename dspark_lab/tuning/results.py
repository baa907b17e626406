"""What came of a sweep, as tables and files: a line a drafter, or all that it went through."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dspark_lab.checks import Count, checked, require_columns
from dspark_lab.files import read_json, shipped, written_whole
from dspark_lab.rates import ratio_interval, resampled
from dspark_lab.tuning.cells import ALL

# A run's settings, then a line's own columns.
RUN = ["budget", "amount", "mix", "batch_size", "num_anchors", "block_size", "seed"]
_SETTINGS = [*RUN, "steps", "step_seconds", "learning_rate", "warmup_steps"]
_NUMBERS = """temperature tau tau_spread loss ce l1 confidence accept_rate grad_norm lr seconds
    spent""".split()
_WHOLE = "batch_size num_anchors block_size seed steps warmup_steps step slots tokens".split()
_COUNTS = ["conversations", "blocks"]
_WORDS = ["budget", "mix", "kind", "domain", "conversation"]
_BY_SLOT = ["accept", "survival"]
_LINE = """kind step slots tokens seconds domain conversation temperature conversations blocks tau
    tau_spread accept survival loss ce l1 confidence accept_rate grad_norm lr spent""".split()


@checked
def runs_table(work: str | Path) -> pd.DataFrame:
    """All that the finished cells of a work folder have seen, as :func:`load_runs` describes it."""
    work = Path(work)
    files = [read_json(path) for path in sorted((work / "cells").glob("*.json"))]
    table = result_table(files)
    for name in ("sweep", "step_seconds"):
        if (work / f"{name}.json").exists():
            # As text: pandas copies attributes deeply with nearly every operation.
            table.attrs[name] = (work / f"{name}.json").read_text(encoding="utf-8")
    return table


def result_table(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The lines of :func:`run_cell`'s results, as :func:`load_runs` describes them."""
    lines = [found["run"] | line for found in results for line in found["lines"]]
    table = pd.DataFrame(lines).reindex(columns=[*_SETTINGS, *_LINE])
    types = dict.fromkeys(_WHOLE, "int64") | dict.fromkeys(_COUNTS, "Int64")
    numbers = [*_NUMBERS, "amount", "step_seconds", "learning_rate"]
    types |= dict.fromkeys(numbers, "float64") | dict.fromkeys(_WORDS, "category")
    return table.astype(types).sort_values(RUN, kind="stable", ignore_index=True)


@checked
def save_runs(runs: pd.DataFrame, path: str | Path) -> None:
    """Write a table of :func:`runs_table` as Parquet, what was measured in 32 bits."""
    require_columns("runs", runs, (*_SETTINGS, *_LINE))
    table = runs.astype(dict.fromkeys(_NUMBERS, "float32"))
    for name in _BY_SLOT:
        table[name] = [
            None if one is None or one is np.nan else np.float32(one) for one in table[name]
        ]
    with written_whole(Path(path)) as partial:
        table.to_parquet(partial, index=False, compression="zstd")


@checked
def load_runs(path: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """The runs of a sweep, curves included; those that advice is judged on by default.

    A run is a drafter that was trained from its start to its budget's end, its learning rate fallen
    by then. Each line repeats the run's settings: ``budget`` and ``amount``; ``mix``: what it
    learned from; rows ``batch_size``, anchors ``num_anchors``, ``block_size``, ``seed``; ``steps``
    and ``step_seconds``, the time of one as measured alone; ``learning_rate`` (the highest) and
    ``warmup_steps``. A line is of a ``step``, until which the run has seen ``slots`` supervised
    slots and ``tokens``, and has trained for ``seconds`` by a clock that other runs disturbed:
    ``step * step_seconds`` is the time to compare by. There are four kinds of line:

    ``train``: means over the steps since the line before: ``loss`` and its parts ``ce``, ``l1`` and
    ``confidence``, ``accept_rate``, ``tau``, ``grad_norm``; ``tau_spread``: the standard deviation
    of the steps' tau; ``lr``: the learning rate of the last one.

    ``held_out``: analytic figures on the same held-out blocks for all drafters of the sweep, each
    block as long as the longest block size: ``tau``, and by slot the lists ``accept`` and
    ``survival`` (the first sum(survival[:k]) + 1 is tau when k slots are drafted), means over
    ``conversations``; ``domain`` "all" or one. ``conversation``: the same for each conversation,
    at the last step alone.

    ``decoded``: by decoding at a ``temperature``, at the last step: ``tau`` over all rounds
    (``blocks``), ``survival`` the share of whole blocks whose slot was accepted with all before it.

    ``spent``: seconds that this evaluation or decoding took, which no budget pays for. The table's
    ``attrs`` have all settings of the ``sweep`` and the repeats of every ``step_seconds`` as JSON.
    """
    path = Path(path or shipped("pocket/runs.parquet"))
    with path.open("rb") as file:
        try:
            table = pd.read_parquet(file)
            require_columns("runs", table, (*_SETTINGS, *_LINE))
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path} must hold the runs of a sweep as Parquet: {error}") from error
    return table


@checked
def run_table(runs: pd.DataFrame, *, domain: str = ALL) -> pd.DataFrame:
    """One line for each run of :func:`load_runs`: what it had seen and what it reached at its end.

    ``held_out`` is the analytic tau, ``decoded_0`` and so on tau by decoding at that temperature,
    all over the conversations of a ``domain``.
    """
    require_columns("runs", runs, (*_SETTINGS, *_LINE))
    ended = runs[(runs["step"] == runs["steps"]) & (runs["domain"] == domain)]
    own = ended[ended["kind"] == "held_out"].set_index(RUN)
    if own.empty:
        raise ValueError(f"domain must be one of {list(set(runs['domain']))}, got {domain!r}")
    table = own[["steps", "step_seconds", "slots", "tokens", "seconds"]].assign(held_out=own["tau"])
    decoded = ended[ended["kind"] == "decoded"]
    for temperature, part in decoded.groupby("temperature"):
        table[f"decoded_{temperature:g}"] = part.set_index(RUN)["tau"]
    return table.reset_index()


@checked
def block_loss(
    runs: pd.DataFrame,
    trained: Count = 15,
    served: Count = 7,
    *,
    by: Sequence[str] = ("mix", "amount"),
    domain: str = ALL,
) -> pd.DataFrame:
    """What is lost by training long blocks and serving shorter ones, in pairs.

    A run of blocks of ``trained`` slots, of which the first ``served`` are drafted, is compared
    with one that differs from it in its block size alone, ``served``: of the same budget; and after
    as many steps, where the shorter blocks have runs of fewer and of more (log tau of each
    conversation is then linear in log steps between them). Both on the same conversations, at the
    end of :func:`load_runs`' runs or where these have stopped.

    Returns:
        one line for each kind of ``equal``, "budget" or "steps", and each combination of the
        columns ``by``: the number of pairs, ``runs``, and of ``conversations``; mean tau of those
        trained on ``served`` slots; and what the others have ``lost`` of it, a share, in its 95 %
        interval over conversations, ``low`` to ``high``.
    """
    require_columns("runs", runs, (*_SETTINGS, *_LINE))
    if not served < trained:
        raise ValueError(f"served must be below trained, {trained}, got {served}")
    lines = runs[(runs["kind"] == "conversation") & runs["block_size"].isin([trained, served])]
    lines = lines[lines["step"] == lines.groupby(RUN, observed=True)["step"].transform("max")]
    lines = lines if domain == ALL else lines[lines["domain"] == domain]
    tau = [1 + float(np.sum(one[:served])) for one in lines["survival"]]
    same = [name for name in RUN if name != "block_size"] + ["conversation"]
    table = lines[[*same, "block_size", "step"]].astype({"conversation": str}).assign(tau=tau)
    long, short = (
        table[table["block_size"] == size].drop(columns="block_size") for size in (trained, served)
    )
    pairs = {"budget": long.merge(short, on=same, suffixes=("_long", ""))}
    pairs["steps"] = _after_equal_steps(long, short, [n for n in same if n != "amount"])
    parts = []
    for equal, pair in pairs.items():
        groups = pair.groupby(list(by), observed=True) if by else [((), pair)]
        for key, part in groups:
            if len(part):
                one_by_one = part.groupby("conversation", observed=True)[["tau_long", "tau"]].sum()
                top, bottom = one_by_one.to_numpy().T
                drawn = resampled(len(top), 10_000, 0)
                high, low = 1 - ratio_interval(top, bottom, drawn)
                count = len(part[same[:-1]].drop_duplicates())
                found = (count, len(top), part["tau"].mean(), 1 - top.sum() / bottom.sum())
                parts.append((equal, *key, *found, float(low), float(high)))
    columns = ["runs", "conversations", "tau", "lost", "low", "high"]
    return pd.DataFrame(parts, columns=["equal", *by, *columns])


def _after_equal_steps(long: pd.DataFrame, short: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Each line of ``long`` with the tau that ``short`` would have after as many steps."""
    curves = {key: part.sort_values("step") for key, part in short.groupby(by, observed=True)}
    found = []
    for line, key in zip(long.to_dict("records"), long[by].itertuples(index=False), strict=True):
        curve = curves.get(tuple(key))
        if curve is None or not curve["step"].min() <= line["step"] <= curve["step"].max():
            continue
        logs = np.log(curve["step"]), np.log(curve["tau"])
        tau = float(np.exp(np.interp(np.log(line["step"]), *logs)))
        found.append({**line, "tau_long": line["tau"], "tau": tau})
    return pd.DataFrame(found, columns=[*long.columns, "tau_long"])
