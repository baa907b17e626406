"""A serving engine under load: many requests, one batch, and a policy of how much each verifies.

A step of the engine (continuous batching):

    admit:   requests that have arrived join the batch, in order, as long as there is room;
    draft:   each of the R requests drafts a block;
    length:  from all confidences the policy chooses how many slots of each block to verify;
    verify:  the target reads B = R + verified slots at once, which takes 1 / SPS(B) seconds;
    grow:    each answer grows by its accepted slots and one token of the target's own.

Reading the prompts takes no time here, and SPS holds for one length of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, product, repeat
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.checks import Count, NonNegative, Positive, Share, Size, checked
from dspark_lab.serving.costs import require_lengths
from dspark_lab.serving.engine import Engine
from dspark_lab.serving.requests import Answers, Geometric, Requests, draw_requests
from dspark_lab.serving.schedule import prefix_schedule
from dspark_lab.serving.steps import Speed

Confidences = Float[np.ndarray, "request slot"]
Lengths = Int[np.ndarray, " request"]
# How many slots of each request to verify, from the confidences of all and the engine's speed.
Policy = Callable[[Confidences, Speed], Lengths]

_REQUESTS = "request domain arrival start end tokens rounds verified accepted measured".split()
_STEPS = ["start", "seconds", "requests", "verified", "batch_tokens", "tokens"]


@checked
@dataclass(frozen=True)
class FixedLength:
    """Verifies so many slots of every block; 0 is plain decoding, for which nothing is drafted."""

    slots: Size

    def __str__(self) -> str:
        return f"fixed {self.slots}" if self.slots else "plain decoding"

    def __call__(self, confidence: Confidences, speed: Speed) -> Lengths:
        return np.full(len(confidence), self.slots)


@checked
@dataclass(frozen=True)
class StaticThreshold:
    """Verifies up to the first slot whose confidence lies below the threshold."""

    threshold: Share

    def __str__(self) -> str:
        return f"threshold {self.threshold:g}"

    def __call__(self, confidence: Confidences, speed: Speed) -> Lengths:
        return np.logical_and.accumulate(confidence >= self.threshold, axis=1).sum(axis=1)


@dataclass(frozen=True)
class PrefixScheduler:
    """:func:`prefix_schedule`, with Theta the expected tokens per second of a whole step."""

    def __str__(self) -> str:
        return "prefix scheduler"

    def __call__(self, confidence: Confidences, speed: Speed) -> Lengths:
        return prefix_schedule(confidence, speed)


@dataclass(frozen=True, eq=False)
class LoadResult:
    """The result of :func:`simulate`, all times in seconds.

    ``requests`` are in the order of admission; those ``measured`` count, and ``end`` is NaN where
    the run stopped before. ``figures`` are of these and of the steps while they are served:
    ``throughput`` in tokens of all requests per second, ``per_user`` in those of one from its start
    to its end, ``latency`` from arrival to end, ``busy`` the share of time spent in steps.
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    figures: pd.Series


@checked
def simulate(
    requests: Requests,
    engine: Engine,
    policy: Policy,
    *,
    concurrency: Count,
    rate: Positive | None = None,
    draft_length: Count | None = None,
    warm_up: Size | None = None,
) -> LoadResult:
    """Serves requests under one policy.

    The same requests once more come before those that count, ``warm_up`` of them (by default
    ``concurrency``), and after them, so that none sees an engine that fills or empties.

    Args:
        policy: one of the classes of this module, or a function of the batch's confidences
            ``[request, slot]`` and of the engine's :data:`Speed` that returns slots to verify.
        concurrency: the most requests in the batch.
        rate: arrivals per second, a Poisson process; by default the batch is always full.
        draft_length: by default all of the trace's slots. Plain decoding drafts none.
    """
    warm_up = concurrency if warm_up is None else warm_up
    answers = requests.answers
    slots = answers.slots if draft_length is None else draft_length
    require_lengths([slots], answers.slots)
    confidence = answers.confidence[:, :slots]
    if not isinstance(policy, FixedLength) and np.isnan(confidence).any():
        raise ValueError(f"{policy} needs confidences, got a drafter without a confidence head")
    sizes = np.arange(1, concurrency + 1)
    other = engine.plain_rest_seconds(sizes)
    if policy != FixedLength(0):
        drafted = engine.draft_seconds(sizes, slots) + engine.rest_seconds(sizes)
        other = np.maximum(other, drafted)
    reading = engine.sps.seconds(np.arange(concurrency * (slots + 1) + 1))
    planned = None
    if isinstance(policy, (FixedLength, StaticThreshold)):
        # Independent of the batch.
        by_block = np.array(_slots_to_verify(policy, confidence, reading))
        planned = by_block[requests.block].tolist()
    other_seconds, read_seconds = [0.0, *other.tolist()], reading.tolist()
    acceptable, tokens = requests.acceptable.tolist(), requests.tokens.tolist()
    arrivals: Iterator[float] = repeat(0.0)
    if rate is not None:
        arrivals = accumulate(cycle(np.roll(requests.gap / rate, warm_up).tolist()))

    now, arrival = 0.0, next(arrivals)
    admitted: list[_Request] = []
    steps: list[tuple[float, float, int, int, int, int]] = []
    batch: list[_Request] = []
    missing, last = len(requests), warm_up + len(requests)
    while missing:
        if not batch:
            now = max(now, arrival)
        while len(batch) < concurrency and arrival <= now:
            drawn = (len(admitted) - warm_up) % len(requests)
            counts = warm_up <= len(admitted) < last
            arrived = now if rate is None else arrival
            batch.append(_Request(drawn, arrived, now, tokens[drawn], counts))
            admitted.append(batch[-1])
            arrival = next(arrivals)

        size = len(batch)
        if planned is None:
            blocks = requests.block[[r.request for r in batch], [r.rounds for r in batch]]
            lengths = _slots_to_verify(policy, confidence[blocks], reading + other_seconds[size])
        else:
            lengths = [planned[r.request][r.rounds] for r in batch]
        verified, grown = sum(lengths), 0
        begin, seconds = now, other_seconds[size] + read_seconds[size + verified]
        now += seconds
        for request, length in zip(batch, lengths, strict=True):
            # What follows the end of an answer is no part of it.
            accepted = min(acceptable[request.request][request.rounds], length, request.left)
            more = answer_growth(accepted, request.left)
            grown += more
            request.rounds += 1
            request.verified += length
            request.accepted += accepted
            request.left -= more
            if request.left == 0:
                request.end = now
                missing -= request.measured
        steps.append((begin, seconds, size, verified, size + verified, grown))
        batch = [request for request in batch if request.left]
    columns = dict(zip(_STEPS, map(np.array, zip(*steps, strict=True)), strict=True))
    return _result(requests, admitted, columns)


@checked
def load_table(
    trace: pd.DataFrame | Answers,
    engine: Engine,
    policies: Sequence[Policy] | Mapping[str, Policy],
    concurrency: Sequence[Count] = (1, 2, 4, 8, 16, 32),
    *,
    requests: Count = 200,
    answer_tokens: Count | Geometric | None = None,
    domains: Mapping[str, NonNegative] | None = None,
    within: Literal["conversation", "domain"] = "conversation",
    rate: Positive | None = None,
    draft_length: Count | None = None,
    warm_up: Size | None = None,
    seed: Size = 0,
) -> pd.DataFrame:
    """Policies at several concurrencies, all serving the same requests.

    Arguments are as in :func:`draw_requests` and :func:`simulate`; a row holds the ``figures``.
    """
    drawn = draw_requests(
        trace, requests, answer_tokens=answer_tokens, domains=domains, within=within, seed=seed
    )
    named = policies if isinstance(policies, Mapping) else {str(each): each for each in policies}
    served: dict[str, Any] = {"rate": rate, "draft_length": draft_length, "warm_up": warm_up}
    rows = []
    for (name, policy), limit in product(named.items(), concurrency):
        figures = simulate(drawn, engine, policy, concurrency=limit, **served).figures
        rows.append({"policy": name, "concurrency": limit, **figures})
    return pd.DataFrame(rows)


@dataclass(slots=True)
class _Request:
    request: int
    arrival: float
    start: float
    left: int
    measured: bool
    end: float = float("nan")
    rounds: int = 0
    verified: int = 0
    accepted: int = 0


def answer_growth(accepted: int, left: int) -> int:
    """The accepted tokens and one of the target's own, as far as they are left."""
    return min(accepted + 1, left)


def _slots_to_verify(
    policy: Policy, confidence: Confidences, seconds: Float[np.ndarray, " tokens"]
) -> list[int]:
    size, slots = confidence.shape
    lengths = np.asarray(policy(confidence, lambda tokens: 1 / seconds[tokens]))
    whole = lengths.shape == (size,) and lengths.dtype.kind in "iu"
    if not (whole and 0 <= lengths.min() and lengths.max() <= slots):
        wanted = f"0 to {slots} whole slots for each of {size} requests"
        raise ValueError(f"a policy must return {wanted}, got {lengths.tolist()}")
    return lengths.tolist()


def _result(requests: Requests, admitted: list[_Request], steps: dict[str, Any]) -> LoadResult:
    of = {name: np.array([getattr(r, name) for r in admitted]) for name in _Request.__slots__}
    of["domain"] = requests.answers.domain[requests.conversation[of["request"]]]
    of["tokens"] = requests.tokens[of["request"]] - of["left"]
    # Arrays until the end: a table for each figure would take longer than the simulation.
    counted = {name: of[name][of["measured"]] for name in _REQUESTS}
    begin, end = counted["start"][0], counted["end"].max()
    during = {name: values[steps["start"] >= begin] for name, values in steps.items()}
    speed = counted["tokens"] / (counted["end"] - counted["start"])
    asked = counted["verified"].sum()
    figures = {
        "throughput": during["tokens"].sum() / (end - begin),
        "per_user": speed.mean(),
        "per_user_p10": np.quantile(speed, 0.1),
        "per_user_p50": np.quantile(speed, 0.5),
        "wait": (counted["start"] - counted["arrival"]).mean(),
        "latency": (counted["end"] - counted["arrival"]).mean(),
        "tokens_per_round": counted["tokens"].sum() / counted["rounds"].sum(),
        "rounds_per_request": counted["rounds"].mean(),
        "verified_per_request": counted["verified"].mean(),
        "acceptance": counted["accepted"].sum() / asked if asked else np.nan,
        "batch_requests": during["requests"].mean(),
        "verified_per_step": during["verified"].mean(),
        "batch_tokens": during["batch_tokens"].mean(),
        "busy": during["seconds"].sum() / (end - begin),
    }
    served = pd.DataFrame({name: of[name] for name in _REQUESTS})
    return LoadResult(served, pd.DataFrame(steps), pd.Series(figures, dtype=np.float64))
