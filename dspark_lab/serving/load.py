"""A serving engine under load: many requests, one batch, and a policy of how much each verifies.

A step of the engine (continuous batching):

    admit:   requests that have arrived join the batch, in order, as long as there is room;
    draft:   each of the R requests drafts a block;
    length:  from the confidences of all blocks the policy chooses how many slots of each to verify;
    verify:  the target reads B = R + verified slots at once, which takes 1 / SPS(B) seconds;
    grow:    each answer grows by its accepted slots and one token of the target's own; those that
             are complete leave.

Reading the prompts takes no time here, and SPS holds for one length of context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

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
    """What :func:`simulate` returns, all times in seconds.

    ``figures``, of the measured requests, and of the steps from the first one's start to the last
    one's end: ``throughput``, tokens of all requests per second; ``per_user``, tokens per second of
    a request from its start to its end, mean, with the quantiles ``per_user_p10`` and
    ``per_user_p50``; ``wait`` for the start and ``latency``, arrival to end, means;
    ``tokens_per_round``, ``rounds_per_request`` and ``verified_per_request``; ``acceptance``,
    accepted over verified slots, NaN where there are none; ``batch_requests``,
    ``verified_per_step`` and ``batch_tokens``, means over steps; ``busy``, the share of time spent
    in steps.

    ``requests``, a row for each in the order of admission: ``request`` (its number among those
    drawn), ``domain``, ``arrival``, ``start`` (when it was admitted), ``end`` (NaN where the run
    stopped before), ``tokens`` so far, ``rounds``, ``verified`` and ``accepted`` slots, and
    ``measured``, whether it counts. ``steps``: ``start``, ``seconds``, ``requests`` in the batch,
    ``verified`` slots, ``batch_tokens``, their sum, and ``tokens`` by which answers grew.
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

    The requests that count are served after ``warm_up`` others, and others follow until the last
    that counts is complete, so that none of them sees an engine that fills or empties. The others
    are the same requests once more: their last ones before, their first ones behind.

    Args:
        requests: from :func:`draw_requests`.
        engine: what a step costs.
        policy: :class:`FixedLength`, :class:`StaticThreshold`, :class:`PrefixScheduler`, or a
            function of the confidences ``[request, slot]`` in the batch and of the engine's speed
            (steps per second at B tokens per step, with drafting and rest) that returns how many
            slots of each to verify.
        concurrency: the most requests in the batch.
        rate: arrivals per second, a Poisson process; by default the batch is always full.
        draft_length: tokens that a block drafts, all of the trace's by default. Plain decoding
            drafts none.
        warm_up: requests before those that count; as many as ``concurrency`` by default.
    """
    warm_up = concurrency if warm_up is None else warm_up
    answers = requests.answers
    slots = answers.slots if draft_length is None else draft_length
    require_lengths([slots], answers.slots)
    confidence = answers.confidence[:, :slots]
    planned = _planned_slots(policy, confidence)
    other = _seconds_beside_target(engine, 0 if policy == FixedLength(0) else slots, concurrency)
    reading = engine.sps.seconds(np.arange(concurrency * (slots + 1) + 1))
    other_seconds, read_seconds = other.tolist(), reading.tolist()
    arrivals = None if rate is None else _Arrivals(requests.gap / rate, warm_up)
    slots_of = None if planned is None else planned[requests.block].tolist()
    acceptable, tokens = requests.acceptable.tolist(), requests.tokens.tolist()

    now = 0.0
    admitted: list[_Request] = []
    steps: list[tuple[float, float, int, int, int]] = []
    batch: list[_Request] = []
    missing, last = len(requests), warm_up + len(requests)
    while missing:
        room = concurrency - len(batch)
        if room:
            if arrivals is None:
                new = [now] * room
            else:
                if room == concurrency:
                    now = max(now, arrivals.next)
                new = arrivals.until(now, room)
            for arrival in new:
                which = (len(admitted) - warm_up) % len(requests)
                batch.append(_Request(len(admitted), which, arrival, now, tokens[which]))
                admitted.append(batch[-1])

        size = len(batch)
        if slots_of is None:
            blocks = requests.block[[r.which for r in batch], [r.rounds for r in batch]]
            lengths = _chosen_slots(policy, confidence[blocks], reading + other[size])
        else:
            lengths = [slots_of[r.which][r.rounds] for r in batch]
        verified, grown = sum(lengths), 0
        begin, seconds = now, other_seconds[size] + read_seconds[size + verified]
        now += seconds
        for request, length in zip(batch, lengths, strict=True):
            # What follows the end of an answer is no part of it.
            accepted = min(acceptable[request.which][request.rounds], length, request.left)
            more = answer_growth(accepted, request.left)
            grown += more
            request.rounds += 1
            request.verified += length
            request.accepted += accepted
            request.left -= more
            if request.left == 0:
                request.end = now
                missing -= warm_up <= request.number < last
        steps.append((begin, seconds, size, verified, grown))
        batch = [request for request in batch if request.left]
    return _result(requests, admitted, steps, warm_up)


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

    Args:
        trace, requests, answer_tokens, domains, within, seed: see :func:`draw_requests`.
        engine, rate, draft_length, warm_up: see :func:`simulate`.
        policies: by name, or a sequence of them, each named by its text.
        concurrency: see :func:`simulate`; several.

    Returns:
        a row for each policy and concurrency: ``policy``, ``concurrency``, and the ``figures`` of a
        :class:`LoadResult`.
    """
    drawn = draw_requests(
        trace, requests, answer_tokens=answer_tokens, domains=domains, within=within, seed=seed
    )
    named = policies if isinstance(policies, Mapping) else {str(each): each for each in policies}
    rows = []
    for name, policy in named.items():
        for limit in concurrency:
            result = simulate(
                drawn,
                engine,
                policy,
                concurrency=limit,
                rate=rate,
                draft_length=draft_length,
                warm_up=warm_up,
            )
            rows.append({"policy": name, "concurrency": limit, **result.figures})
    return pd.DataFrame(rows)


@dataclass(slots=True)
class _Request:
    """One that was admitted as the ``number``-th; ``which`` of those that were drawn it is."""

    number: int
    which: int
    arrival: float
    start: float
    left: int
    end: float = float("nan")
    rounds: int = 0
    verified: int = 0
    accepted: int = 0


class _Arrivals:
    """When requests arrive, one after the other, without end; those drawn come again and again."""

    def __init__(self, gaps: Float[np.ndarray, " request"], warm_up: int) -> None:
        self._gaps = cycle(np.roll(gaps, warm_up).tolist())
        self.next = next(self._gaps)

    def until(self, now: float, most: int) -> list[float]:
        """Takes those that have arrived, as many as may be taken."""
        taken: list[float] = []
        while self.next <= now and len(taken) < most:
            taken.append(self.next)
            self.next += next(self._gaps)
        return taken


def answer_growth(accepted: int, left: int) -> int:
    """Tokens that an answer grows by: the accepted ones and one of the target's own, if left."""
    return min(accepted + 1, left)


def _seconds_beside_target(
    engine: Engine, draft_length: int, most: int
) -> Float[np.ndarray, " requests"]:
    """Seconds of a step without the target's pass, with 0 to ``most`` requests in the batch."""
    requests = np.arange(1, most + 1)
    plain = engine.plain_rest_seconds(requests)
    if draft_length:
        drafted = engine.draft_seconds(requests, draft_length) + engine.rest_seconds(requests)
        plain = np.maximum(plain, drafted)
    return np.append(0.0, plain)


def _planned_slots(
    policy: Policy, confidence: Float[np.ndarray, "round slot"]
) -> Int[np.ndarray, " round"] | None:
    """The slots to verify of each round of the trace, None if the batch decides."""
    rounds, slots = confidence.shape
    if isinstance(policy, FixedLength):
        if policy.slots > slots:
            raise ValueError(
                f"a block has {slots} slots, got a policy that verifies {policy.slots}"
            )
        return np.full(rounds, policy.slots)
    if np.isnan(confidence).any():
        raise ValueError(f"{policy} needs confidences, got a drafter without a confidence head")
    if isinstance(policy, StaticThreshold):
        return policy(confidence, lambda size: np.ones(len(size)))
    return None


def _chosen_slots(
    policy: Policy,
    confidence: Float[np.ndarray, "request slot"],
    seconds: Float[np.ndarray, " tokens"],
) -> list[int]:
    """The slots that a policy verifies which looks at the whole batch; ``seconds`` of a step."""
    size, slots = confidence.shape
    lengths = np.asarray(policy(confidence, lambda tokens: 1 / seconds[tokens]))
    if lengths.shape != (size,) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"a policy must return a whole number of slots for each of {size} requests, "
            f"got {lengths}"
        )
    if lengths.min() < 0 or lengths.max() > slots:
        raise ValueError(f"a policy must verify 0 to {slots} slots, got {lengths.tolist()}")
    return lengths.tolist()


def _result(
    requests: Requests,
    admitted: list[_Request],
    steps: list[tuple[float, float, int, int, int]],
    warm_up: int,
) -> LoadResult:
    of = {name: np.array([getattr(r, name) for r in admitted]) for name in _Request.__slots__}
    served = {
        "request": of["which"],
        "domain": requests.answers.domain[requests.conversation[of["which"]]],
        **{name: of[name] for name in ("arrival", "start", "end")},
        "tokens": requests.tokens[of["which"]] - of["left"],
        **{name: of[name] for name in ("rounds", "verified", "accepted")},
        "measured": (of["number"] >= warm_up) & (of["number"] < warm_up + len(requests)),
    }
    counted = {name: values[served["measured"]] for name, values in served.items()}
    start, seconds, batch, verified, grown = map(np.array, zip(*steps, strict=True))
    during = start >= counted["start"][0]
    time = counted["end"].max() - counted["start"][0]
    speed = counted["tokens"] / (counted["end"] - counted["start"])
    asked = counted["verified"].sum()
    figures = {
        "throughput": grown[during].sum() / time,
        "per_user": speed.mean(),
        "per_user_p10": np.quantile(speed, 0.1),
        "per_user_p50": np.quantile(speed, 0.5),
        "wait": (counted["start"] - counted["arrival"]).mean(),
        "latency": (counted["end"] - counted["arrival"]).mean(),
        "tokens_per_round": counted["tokens"].sum() / counted["rounds"].sum(),
        "rounds_per_request": counted["rounds"].mean(),
        "verified_per_request": counted["verified"].mean(),
        "acceptance": counted["accepted"].sum() / asked if asked else np.nan,
        "batch_requests": batch[during].mean(),
        "verified_per_step": verified[during].mean(),
        "batch_tokens": (batch + verified)[during].mean(),
        "busy": seconds[during].sum() / time,
    }
    columns = {"start": start, "seconds": seconds, "requests": batch, "verified": verified}
    columns |= {"batch_tokens": batch + verified, "tokens": grown}
    return LoadResult(
        pd.DataFrame(served), pd.DataFrame(columns), pd.Series(figures, dtype=np.float64)
    )
