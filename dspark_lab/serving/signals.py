"""The speed that other signals than the confidence head would give (`rates.margins`)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dspark_lab import rates
from dspark_lab.checks import Count, Size, checked
from dspark_lab.serving.engine import Engine
from dspark_lab.serving.load import FixedLength, PrefixScheduler, simulate
from dspark_lab.serving.requests import draw_requests
from dspark_lab.serving.thresholds import best_threshold


@checked
def signal_speeds(
    trace: pd.DataFrame,
    engine: Engine,
    concurrency: Sequence[Count] = (1, 16),
    *,
    requests: Count = 200,
    resamples: Count = 200,
    seed: Size = 0,
) -> pd.DataFrame:
    """Predicted speed under each signal, as a threshold and in the prefix scheduler.

    Args:
        trace: of whole blocks of one drafter at one temperature, with margins. Signals and
            thresholds are learned on one half of its conversations, speeds are of the other.

    Returns:
        a row for each ``concurrency`` and ``signal``: the fastest ``threshold`` and its ``speedup``
        over plain decoding, with a 95 % interval, and ``scheduled``, the same of the scheduler, as
        :func:`simulate` counts it.
    """
    halves = rates.signals(*rates.split_prompts(trace))
    rows = []
    for together in concurrency:
        costs = engine.costs(together)
        for name, (fit, test) in halves.items():
            best = best_threshold(fit, costs, test=test, resamples=resamples, seed=seed)
            drawn = draw_requests(test, requests, seed=seed)
            length = min(drawn.answers.slots, engine.longest)
            plain, scheduled = (
                simulate(drawn, engine, policy, concurrency=together, draft_length=length)
                for policy in (FixedLength(0), PrefixScheduler())
            )
            row = {"concurrency": together, "signal": name}
            row |= best[["threshold", "speedup", "speedup_low", "speedup_high"]].to_dict()
            faster = scheduled.figures["throughput"] / plain.figures["throughput"]
            rows.append(row | {"scheduled": faster})
    return pd.DataFrame(rows)
