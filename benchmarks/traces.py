"""From a trace of a million rows to rates with intervals, against a loop over its rows."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pandas as pd

from benchmarks.measure import compare, median_seconds
from dspark_lab.rates import rate_table, tau_table, trace_sums

ROWS, SLOTS, PROMPTS = 1_000_000, 7, 1000
# The loop reads one part in so many of the trace.
FEW = 20


def run() -> Iterator[str]:
    trace = _trace()
    few = trace[trace["prompt"] < PROMPTS // FEW]
    yield compare(
        f"sums of {len(few):,} rows against a loop", lambda: trace_sums(few), lambda: _loop(few)
    )
    sums = trace_sums(trace)
    for name, call in {
        "sums": lambda: trace_sums(trace),
        "rates and their intervals": lambda: rate_table(sums),
        "tau and its intervals": lambda: tau_table(sums),
    }.items():
        yield f"{len(trace):,} rows: {name:<28} {median_seconds(call, runs=5):6.2f} s"


def _trace() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rounds = ROWS // SLOTS
    rate = rng.uniform(0.5, 1, (rounds, SLOTS))
    accepted = np.logical_and.accumulate(rng.uniform(size=rate.shape) < rate, axis=1)
    prompt = np.sort(rng.integers(0, PROMPTS, rounds))
    columns = {
        "prompt": prompt.repeat(SLOTS),
        "domain": "none",
        "round": np.arange(rounds).repeat(SLOTS),
        "slot": np.tile(np.arange(SLOTS), rounds),
        "accept_rate": rate.ravel(),
        "confidence": rng.uniform(size=rate.size),
        "verified": True,
        "accepted": accepted.ravel(),
    }
    return pd.DataFrame(columns)


def _loop(trace: pd.DataFrame) -> Counter:
    sums: Counter = Counter()
    alive = True
    product = 1.0
    for row in trace.itertuples(index=False):
        if row.slot == 0:
            alive, product = True, 1.0
        product *= row.confidence
        if alive:
            sums["reached", row.prompt, row.slot] += 1
            sums["on policy", row.prompt, row.slot] += row.accept_rate
            sums["empirical", row.prompt, row.slot] += row.accepted
            sums["predicted", row.prompt, row.slot] += row.confidence
        sums["predicted survival", row.prompt, row.slot] += product
        alive = alive and row.accepted
    return sums
