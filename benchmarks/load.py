"""The load simulator against a loop that serves one request after the other, step by step.

The trace and engine are the pocket pair's, as they ship. The loop counts only what the figures of
one rule need, and keeps no steps; the simulator should not be far behind it. The clock is the
process's CPU time, which other work on the machine disturbs less than wall time.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd

from benchmarks.measure import compare, median_seconds
from dspark_lab.pairs import load_traces
from dspark_lab.serving import (
    Answers,
    Engine,
    FixedLength,
    Policy,
    PrefixScheduler,
    Requests,
    StaticThreshold,
    answers_of,
    draw_requests,
    load_engine,
    load_table,
    simulate,
)

REQUESTS, SLOTS = 200, 7
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
POLICIES: list[Policy] = [FixedLength(0), FixedLength(SLOTS)]
POLICIES += [StaticThreshold(0.5), PrefixScheduler()]


def run() -> Iterator[str]:
    with patch("time.perf_counter", time.process_time):
        yield from _run()


def _run() -> Iterator[str]:
    trace = load_traces()
    trace = trace[(trace["drafter"] == "dspark-k7") & (trace["temperature"] == 1)]
    engine, answers = load_engine(), answers_of(trace)
    for slots, concurrency in (
        (0, CONCURRENCY),
        (SLOTS, CONCURRENCY),
        *((SLOTS, (limit,)) for limit in CONCURRENCY[::3]),
    ):

        def ours(slots=slots, concurrency=concurrency):
            return _ours(answers, engine, [FixedLength(slots)], concurrency)

        def loop(slots=slots, concurrency=concurrency):
            return _loop(answers, engine, slots, concurrency)

        pd.testing.assert_frame_equal(ours(), loop(), rtol=1e-9)
        where = f"{concurrency[0]} to {concurrency[-1]}" if concurrency[1:] else concurrency[0]
        yield compare(f"{FixedLength(slots)}, concurrency {where}, against a loop", ours, loop)
    for policies in (*([policy] for policy in POLICIES), POLICIES):
        name = str(policies[0]) if len(policies) == 1 else f"{len(policies)} policies"
        tokens = _tokens(answers, engine, policies)
        spent = median_seconds(partial(_ours, answers, engine, policies, CONCURRENCY), runs=7)
        yield (
            f"{name} x {len(CONCURRENCY)} concurrencies x {REQUESTS} requests: "
            f"{spent * 1e3:.0f} ms, {tokens / spent:,.0f} simulated tokens a second"
        )
    reading = median_seconds(lambda: answers_of(trace))
    drawing = median_seconds(lambda: draw_requests(answers, REQUESTS))
    yield (
        f"a trace of {len(trace):,} slots read: {reading * 1e3:.1f} ms; "
        f"{REQUESTS} requests drawn: {drawing * 1e3:.1f} ms"
    )


def _ours(
    answers: Answers, engine: Engine, policies: Sequence[Policy], concurrency: Sequence[int]
) -> pd.DataFrame:
    return load_table(answers, engine, policies, concurrency, requests=REQUESTS)


def _tokens(answers: Answers, engine: Engine, policies: Sequence[Policy]) -> int:
    """Tokens of all steps of a table, with those before and behind the requests that count."""
    drawn = draw_requests(answers, REQUESTS)
    runs = (
        simulate(drawn, engine, policy, concurrency=limit)
        for policy in policies
        for limit in CONCURRENCY
    )
    return sum(int(run.steps["tokens"].sum()) for run in runs)


def _loop(answers: Answers, engine: Engine, slots: int, concurrency: Sequence[int]) -> pd.DataFrame:
    requests = draw_requests(answers, REQUESTS)
    rows = []
    for limit in concurrency:
        figures = _served(requests, engine, slots, limit)
        rows.append({"policy": str(FixedLength(slots)), "concurrency": limit, **figures})
    return pd.DataFrame(rows)


def _served(requests: Requests, engine: Engine, slots: int, concurrency: int) -> dict[str, float]:
    """A batch that is always full, each block verified as far as ``slots``."""
    seconds = engine.plain_rest_seconds(concurrency)
    if slots:
        drafted = engine.draft_seconds(concurrency, SLOTS) + engine.rest_seconds(concurrency)
        seconds = max(seconds, drafted)
    seconds += engine.sps.seconds(concurrency * (1 + slots))
    total = len(requests)
    # Those that count come behind as many as fill the batch; they are the same once more.
    order = ((number, (number - concurrency) % total) for number in count())
    clock, missing, tokens = 0.0, total, 0
    batch: list[dict[str, Any]] = []
    served: list[dict[str, Any]] = []
    begin, steps = 0.0, 0
    while missing:
        while len(batch) < concurrency:
            number, which = next(order)
            if number == concurrency:
                begin, steps, tokens = clock, 0, 0
            batch.append({"number": number, "which": which, "start": clock, "rounds": 0})
            batch[-1] |= {"left": int(requests.tokens[which]), "accepted": 0}
        clock += seconds
        steps += 1
        for request in batch:
            which, left = request["which"], request["left"]
            kept = min(int(requests.acceptable[which, request["rounds"]]), slots, left)
            grown = min(kept + 1, left)
            request["rounds"] += 1
            request["accepted"] += kept
            request["left"] -= grown
            tokens += grown
        for request in batch:
            if request["left"] == 0 and concurrency <= request["number"] < concurrency + total:
                served.append(request | {"end": clock})
                missing -= 1
        batch = [request for request in batch if request["left"]]

    speeds = [requests.tokens[r["which"]] / (r["end"] - r["start"]) for r in served]
    rounds = sum(r["rounds"] for r in served)
    spent = clock - begin
    return {
        "throughput": tokens / spent,
        "per_user": sum(speeds) / total,
        "per_user_p10": float(np.quantile(speeds, 0.1)),
        "per_user_p50": float(np.quantile(speeds, 0.5)),
        "wait": 0.0,
        "latency": sum(r["end"] - r["start"] for r in served) / total,
        "tokens_per_round": sum(int(requests.tokens[r["which"]]) for r in served) / rounds,
        "rounds_per_request": rounds / total,
        "verified_per_request": slots * rounds / total,
        "acceptance": sum(r["accepted"] for r in served) / (slots * rounds) if slots else np.nan,
        "batch_requests": float(concurrency),
        "verified_per_step": float(slots * concurrency),
        "batch_tokens": float(concurrency * (1 + slots)),
        "busy": steps * seconds / spent,
    }
