"""A serving engine under load: many requests, one batch, and a rule of how much each verifies.

    trace -> answers_of -> draw_requests -> simulate -> LoadResult          load_table: many at once

A step of the engine, in words (continuous batching):

    admit:   requests that have arrived join the batch, in order, as long as there is room;
    draft:   every one of the R requests drafts a block, which takes ``draft_seconds`` of R;
    length:  the policy says, from the confidences of all blocks, how many slots of each to verify;
    verify:  the target reads B = R + verified slots at once, which takes 1 / SPS(B) seconds;
    grow:    each answer grows by its accepted slots and one token of the target's own; those that
             are complete leave.

What a request brings along is drawn beforehand: its answer, and the block and the luck of every
round that it may need. So two policies that serve the same requests differ by what they do, not by
chance, and the same seed gives the same table. Reading the prompts takes no time here, and the
target is as fast at the end of an answer as at its start: SPS holds for one length of context. What
a trace cannot tell is where rounds of another length would have begun: they are taken to be like
its own. (Drafters do better from easy tokens on, and shorter rounds begin there more often, so a
trace of long blocks promises a little less of short ones than they keep.)

This file knows traces, seconds and batches; it runs no model and draws no picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from dspark_lab.checks import require_int, require_number
from dspark_lab.decoding import probabilities, read_trace
from dspark_lab.rates import SequentialTemperatures
from dspark_lab.serving.schedule import Speed, prefix_schedule

__all__ = [
    "Answers",
    "FixedLength",
    "Geometric",
    "LoadResult",
    "PrefixScheduler",
    "Requests",
    "StaticThreshold",
    "answers_of",
    "draw_requests",
    "load_table",
    "simulate",
]

# How many slots of each request to verify, from the confidences of all and the engine's speed.
Policy = Callable[[Float[np.ndarray, "request slot"], Speed], Int[np.ndarray, " request"]]

# Of a step: a number, or worked out from the requests in the batch.
Seconds = float | Callable[[int], float]

_Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class FixedLength:
    """Verifies so many slots of every block; 0 is plain decoding, for which nothing is drafted."""

    slots: int

    def __post_init__(self) -> None:
        require_int("slots", self.slots, 0)

    def __str__(self) -> str:
        return f"fixed {self.slots}" if self.slots else "plain decoding"

    def __call__(
        self, confidence: Float[np.ndarray, "request slot"], speed: Speed
    ) -> Int[np.ndarray, " request"]:
        return np.full(len(confidence), self.slots)


@dataclass(frozen=True)
class StaticThreshold:
    """Verifies up to the first slot whose confidence lies below the threshold."""

    threshold: float

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")

    def __str__(self) -> str:
        return f"threshold {self.threshold:g}"

    def __call__(
        self, confidence: Float[np.ndarray, "request slot"], speed: Speed
    ) -> Int[np.ndarray, " request"]:
        return np.logical_and.accumulate(confidence >= self.threshold, axis=1).sum(axis=1)


@dataclass(frozen=True)
class PrefixScheduler:
    """:func:`dspark_lab.serving.schedule.prefix_schedule`, the early-stopping and therefore lossless one.

    The speed that it weighs is that of a whole step, drafting and overhead included, so that what
    it makes rise is the expected tokens per second of the step.
    """

    def __str__(self) -> str:
        return "prefix scheduler"

    def __call__(
        self, confidence: Float[np.ndarray, "request slot"], speed: Speed
    ) -> Int[np.ndarray, " request"]:
        return prefix_schedule(confidence, speed)


@dataclass(frozen=True)
class Geometric:
    """Lengths of answers: n tokens with probability p (1 - p)**(n - 1), where p = 1 / ``mean``."""

    mean: float

    def __post_init__(self) -> None:
        require_number("mean", self.mean)
        if not 1 <= self.mean < float("inf"):
            raise ValueError(f"mean must be a finite number of at least 1 token, got {self.mean}")

    def quantile(self, point: Float[np.ndarray, " request"]) -> Int[np.ndarray, " request"]:
        """The length that ``point`` of all answers do not reach, for points in [0, 1)."""
        if self.mean == 1:
            return np.ones(len(point), dtype=np.int64)
        return 1 + (np.log1p(-point) / np.log1p(-1 / self.mean)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a trace and the blocks that were drafted for them. Made by :func:`answers_of`.

    ``accept_prob``: of each slot's drafted token, behind the drafted tokens before it, rejected or
    not. ``confidence``: NaN without a confidence head. A conversation's rounds are ``count`` many
    from ``first`` on. ``tokens``: that its rounds yielded.
    """

    accept_prob: Float[np.ndarray, "round slot"]
    confidence: Float[np.ndarray, "round slot"]
    first: Int[np.ndarray, " conversation"]
    count: Int[np.ndarray, " conversation"]
    tokens: Int[np.ndarray, " conversation"]
    domain: Shaped[np.ndarray, " conversation"]

    @property
    def slots(self) -> int:
        """Of a block."""
        return self.accept_prob.shape[1]


@dataclass(frozen=True, eq=False)
class Requests:
    """What users ask, and the luck they will have; the same whatever serves them.

    ``conversation``: of the trace. ``tokens``: of the answer. ``gap``: time since the request
    before it, in units of the mean. ``block``: the round of the trace that each round of the
    request drafts anew. ``lucky``: how many of its slots are accepted if all are verified; if fewer
    are, so many of those. Made by :func:`draw_requests`.
    """

    answers: Answers
    conversation: Int[np.ndarray, " request"]
    tokens: Int[np.ndarray, " request"]
    gap: Float[np.ndarray, " request"]
    block: Int[np.ndarray, "request round"]
    lucky: Int[np.ndarray, "request round"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class LoadResult:
    """What :func:`simulate` returns, all times in seconds.

    ``requests``: a row for each request that was admitted, in order: ``request`` (its number among
    the requests that were drawn), ``domain``, ``arrival``, ``start`` (when it was admitted),
    ``end`` (NaN where the run stopped before), ``tokens`` so far, ``rounds``, ``verified`` and
    ``accepted`` slots, and ``measured``, whether it counts.

    ``steps``: a row for each step: ``start``, ``seconds``, ``requests`` in the batch, ``verified``
    slots, ``batch_tokens``, their sum, and ``tokens`` by which answers grew.

    ``figures``, of the measured requests, and of the steps from the first one's start to the last
    one's end: ``throughput``, tokens of all requests per second; ``per_user``, tokens per second of
    a request from its start to its end, mean, with ``per_user_p10`` and ``per_user_p50``, that a
    tenth and half of the requests do not reach; ``wait`` for the start and ``latency``, arrival to
    end, means; ``tokens_per_round``, ``rounds_per_request`` and ``verified_per_request``;
    ``acceptance``, accepted over verified slots, NaN where there are none; ``batch_requests``,
    ``verified_per_step`` and ``batch_tokens``, means over steps; ``busy``, the share of time that
    is spent in steps.
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    figures: pd.Series


def answers_of(
    trace: pd.DataFrame | Answers,
    calibrated: SequentialTemperatures | None = None,
    *,
    seed: int = 0,
) -> Answers:
    """Reads the trace of one drafter at one temperature, decoded without a threshold.

    A trace tells of every slot that was verified what its drafted token's probability of acceptance
    was, behind a rejected slot too: the target read the drafted tokens. A block is drawn before any
    of it is verified, so the product of these probabilities up to a slot is, given the block, the
    probability that the slots up to there are accepted. (Products of the rates c* are not: a token
    that was accepted is not distributed as one that was drafted.)

    Where an answer ends inside a block, the trace says nothing of the slots behind. To leave such
    rounds out, or to take them as they are, would make rounds look short, since it is the lucky
    ones that reach the end. They are completed from a whole round of their domain, drawn with the
    probability that all of its slots up to there are accepted. An answer that ended with the last
    slot of its block may be taken to have one token more than it had.

    Args:
        trace: columns of :func:`dspark_lab.decoding.trace.read_trace` and ``accept_prob``; answers are
            returned as they are.
        calibrated: scales the confidences.
        seed: of the completion.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.trace.read_trace`, a threshold or scheduler at
            work, or a domain without a whole round to complete others from.
    """
    if isinstance(trace, Answers):
        return trace
    require_int("seed", seed, 0)
    rounds, row = read_trace(trace)
    verified, accepted = rounds.verified, rounds.accepted
    asked, drafted, kept = (values.sum(axis=1) for values in (verified, row >= 0, accepted))
    stopped = (asked < drafted) & ((kept < asked) | (asked == 0))
    if stopped.any():
        raise ValueError(
            "trace must be decoded without a threshold or scheduler, got a round of prompt "
            f"{rounds.prompt[stopped.argmax()]} that verified {asked[stopped.argmax()]} of "
            f"{drafted[stopped.argmax()]} slots"
        )
    accept = np.where(verified, probabilities(trace, "accept_prob", "where verified")[row], np.nan)
    confidence = rounds.confidence.copy()
    _complete(accept, confidence, asked, rounds.domain, np.random.default_rng(seed))
    if calibrated is not None:
        confidence = calibrated.apply(confidence)
    _, first, count = np.unique(rounds.prompt, return_index=True, return_counts=True)
    # An end of turn that was drafted is followed by no token of the target's own.
    own = np.add.reduceat(asked == drafted, first)
    return Answers(
        accept_prob=accept,
        confidence=confidence,
        first=first,
        count=count,
        tokens=np.add.reduceat(kept, first) + own,
        domain=rounds.domain[first],
    )


def draw_requests(
    trace: pd.DataFrame | Answers,
    requests: int,
    *,
    answer_tokens: int | Geometric | None = None,
    domains: Mapping[str, float] | None = None,
    within: Literal["conversation", "domain"] = "conversation",
    seed: int = 0,
) -> Requests:
    """Draws what users ask: conversations of a trace, and the luck of every round.

    Args:
        trace: as :func:`answers_of` takes or returns it.
        requests: how many.
        answer_tokens: a number for all, a distribution, or as many as the conversation had.
        domains: the mix, a weight for each domain that is wanted; by default each conversation of
            the trace is as likely as any other.
        within: where a request's rounds are drawn from, with replacement: its conversation, so that
            some requests are harder than others; or its domain, so that all are alike.
        seed: of everything.

    Raises:
        TypeError, ValueError: as :func:`answers_of`, a domain that the trace does not have, weights
            that are negative or all 0, or a setting out of range.
    """
    answers = answers_of(trace)
    require_int("requests", requests, 1)
    require_int("seed", seed, 0)
    if within not in ("conversation", "domain"):
        raise ValueError(f"within must be 'conversation' or 'domain', got {within!r}")
    # One stream for who asks and one for each thing that may be varied alone.
    who, when, long, what = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(4))
    edges = np.cumsum(_shares(answers.domain, domains))
    conversation = np.searchsorted(edges / edges[-1], who.random(requests), side="right")
    gap = when.exponential(size=requests)
    point = long.random(requests)
    if answer_tokens is None:
        tokens = answers.tokens[conversation]
    elif isinstance(answer_tokens, Geometric):
        tokens = answer_tokens.quantile(point)
    else:
        require_int("answer_tokens", answer_tokens, 1)
        tokens = np.full(requests, answer_tokens)

    # No answer has more rounds than tokens. The luck of a round is one number: the slots that are
    # accepted are those whose survival, the product up to them, lies above it.
    place, luck = what.random((2, requests, int(tokens.max())))
    if within == "conversation":
        pools = [
            np.arange(first, first + count)
            for first, count in zip(answers.first, answers.count, strict=True)
        ]
        pool = conversation
    else:
        pool, names = pd.factorize(answers.domain)
        of_round = pool.repeat(answers.count)
        pools = [np.flatnonzero(of_round == domain) for domain in range(len(names))]
        pool = pool[conversation]
    size = np.array([len(members) for members in pools])
    start = np.cumsum(size) - size
    block = np.concatenate(pools)[start[pool, None] + (place * size[pool, None]).astype(np.int64)]
    lucky = np.zeros(block.shape, dtype=np.int64)
    for survival in np.multiply.accumulate(answers.accept_prob, axis=1).T:
        lucky += luck < survival[block]
    return Requests(answers, conversation, tokens, gap, block, lucky)


def simulate(
    requests: Requests,
    sps: Speed,
    policy: Policy,
    *,
    concurrency: int,
    rate: float | None = None,
    draft_seconds: Seconds = 0.0,
    overhead_seconds: Seconds = 0.0,
    warm_up: int | None = None,
) -> LoadResult:
    """Serves requests, and says how that went.

    The requests that count are served after ``warm_up`` others, and others follow until the last
    that counts is complete, so that none of them sees an engine that fills or empties. The others
    are the same requests once more: their last ones before, their first ones behind.

    Args:
        requests: from :func:`draw_requests`.
        sps: steps per second at B tokens per step, such as a
            :class:`dspark_lab.serving.schedule.StepsPerSecond`; any function of an integer array will do.
        policy: :class:`FixedLength`, :class:`StaticThreshold`, :class:`PrefixScheduler`, or a
            function of the confidences ``[request, slot]`` in the batch and of the engine's speed
            (steps per second at B tokens per step, drafting and overhead included) that returns how
            many slots of each to verify.
        concurrency: the most requests in the batch.
        rate: arrivals per second, a Poisson process; by default whoever is served is followed by
            the next one at once, so that the batch is always full.
        draft_seconds: of a step, a number or a function of the requests in the batch. Plain
            decoding drafts nothing.
        overhead_seconds: of a step, whatever it does, likewise.
        warm_up: requests before those that count; as many as ``concurrency`` by default.

    Raises:
        TypeError, ValueError: a setting out of range, speeds that are not positive and finite, a
            policy that asks for confidences where there are none, for more slots than a block has,
            or for something else than a number of slots.
    """
    served, steps = _serve(
        requests,
        sps,
        policy,
        concurrency=concurrency,
        rate=rate,
        draft_seconds=draft_seconds,
        overhead_seconds=overhead_seconds,
        warm_up=warm_up,
    )
    figures = pd.Series(_figures(served, steps))
    return LoadResult(pd.DataFrame(served), pd.DataFrame(steps), figures)


def load_table(
    trace: pd.DataFrame | Answers,
    sps: Speed,
    policies: Sequence[Policy] | Mapping[str, Policy],
    concurrency: Sequence[int] = (1, 2, 4, 8, 16, 32),
    *,
    requests: int = 200,
    answer_tokens: int | Geometric | None = None,
    domains: Mapping[str, float] | None = None,
    within: Literal["conversation", "domain"] = "conversation",
    rate: float | None = None,
    draft_seconds: Seconds = 0.0,
    overhead_seconds: Seconds = 0.0,
    warm_up: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Policies side by side at several concurrencies, all serving the same requests.

    Args:
        trace, requests, answer_tokens, domains, within, seed: see :func:`draw_requests`.
        sps, rate, draft_seconds, overhead_seconds, warm_up: see :func:`simulate`.
        policies: by name, or a sequence of them, each named by its text.
        concurrency: see :func:`simulate`; several.

    Returns:
        a row for each policy and concurrency: ``policy``, ``concurrency``, and the ``figures`` of a
        :class:`LoadResult`.

    Raises:
        TypeError, ValueError: as :func:`draw_requests` and :func:`simulate`.
    """
    drawn = draw_requests(
        trace,
        requests,
        answer_tokens=answer_tokens,
        domains=domains,
        within=within,
        seed=seed,
    )
    named = policies if isinstance(policies, Mapping) else {str(each): each for each in policies}
    rows = []
    for name, policy in named.items():
        for limit in concurrency:
            served, steps = _serve(
                drawn,
                sps,
                policy,
                concurrency=limit,
                rate=rate,
                draft_seconds=draft_seconds,
                overhead_seconds=overhead_seconds,
                warm_up=warm_up,
            )
            rows.append({"policy": name, "concurrency": limit, **_figures(served, steps)})
    return pd.DataFrame(rows)


def _serve(
    requests: Requests,
    sps: Speed,
    policy: Policy,
    *,
    concurrency: int,
    rate: float | None,
    draft_seconds: Seconds,
    overhead_seconds: Seconds,
    warm_up: int | None,
) -> tuple[_Columns, _Columns]:
    """The two tables of :func:`simulate`, as columns."""
    require_int("concurrency", concurrency, 1)
    warm_up = concurrency if warm_up is None else warm_up
    require_int("warm_up", warm_up, 0)
    answers = requests.answers
    plan = _plan(policy, answers)
    most = policy.slots if isinstance(policy, FixedLength) else answers.slots
    plain = policy == FixedLength(0)
    fixed = _step_seconds(0.0 if plain else draft_seconds, overhead_seconds, concurrency)
    reading = 1 / _speeds(sps, concurrency * (most + 1))
    to_come = None if rate is None else _Arrivals(requests.gap / _positive("rate", rate), warm_up)
    asked = None if plan is None else plan[requests.block].tolist()
    lucky, tokens = requests.lucky.tolist(), requests.tokens.tolist()
    beside, read = fixed.tolist(), reading.tolist()

    now = 0.0
    admitted: list[_Request] = []
    steps: list[tuple[float, float, int, int, int]] = []
    batch: list[_Request] = []
    missing, last = len(requests), warm_up + len(requests)
    while missing:
        room = concurrency - len(batch)
        if room:
            if to_come is None:
                new = [now] * room
            else:
                if room == concurrency:
                    now = max(now, to_come.next)
                new = to_come.until(now, room)
            for arrival in new:
                which = (len(admitted) - warm_up) % len(requests)
                batch.append(_Request(len(admitted), which, arrival, now, tokens[which]))
                admitted.append(batch[-1])

        size = len(batch)
        if asked is None:
            blocks = requests.block[[r.which for r in batch], [r.rounds for r in batch]]
            lengths = _asked(policy, answers.confidence[blocks], reading, beside[size])
        else:
            lengths = [asked[r.which][r.rounds] for r in batch]
        verified, grown = sum(lengths), 0
        begin, seconds = now, beside[size] + read[size + verified - 1]
        now += seconds
        for request, length in zip(batch, lengths, strict=True):
            # What follows the end of an answer is no part of it.
            accepted = min(lucky[request.which][request.rounds], length, request.left)
            more = min(accepted + 1, request.left)
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
    return _served(requests, admitted, warm_up), _steps(steps)


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


def _complete(
    accept: Float[np.ndarray, "round slot"],
    confidence: Float[np.ndarray, "round slot"],
    asked: Int[np.ndarray, " round"],
    domain: Shaped[np.ndarray, " round"],
    rng: np.random.Generator,
) -> None:
    """Fill in what follows the first ``asked`` slots of each round, from whole rounds."""
    slots = accept.shape[1]
    whole = asked == slots
    for name in pd.unique(domain):
        givers = np.flatnonzero(whole & (domain == name))
        cut = np.flatnonzero(~whole & (domain == name))
        if len(cut) and not len(givers):
            raise ValueError(
                f"trace must have a round of domain {name!r} that verified {slots} slots, got none"
            )
        survival = np.multiply.accumulate(accept[givers], axis=1)
        for length in np.unique(asked[cut]):
            takers = cut[asked[cut] == length]
            alive = survival[:, length - 1]
            share = alive / alive.sum() if alive.sum() > 0 else None
            chosen = rng.choice(givers, size=len(takers), p=share)
            for values in (accept, confidence):
                values[takers, length:] = values[chosen, length:]


def _shares(
    domain: Shaped[np.ndarray, " conversation"], weights: Mapping[str, float] | None
) -> Float[np.ndarray, " conversation"]:
    """How likely each conversation is, up to a factor."""
    if weights is None:
        return np.ones(len(domain))
    code, names = pd.factorize(domain)
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"domains must be among {sorted(names)}, got {unknown[0]!r}")
    for name, weight in weights.items():
        require_number(f"the weight of {name!r}", weight)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of {name!r} must be >= 0 and finite, got {weight}")
    if not sum(weights.values()) > 0:
        raise ValueError(f"domains must have a weight above 0, got {dict(weights)}")
    share = np.array([weights.get(name, 0.0) for name in names]) / np.bincount(code)
    return share[code]


def _plan(policy: Policy, answers: Answers) -> Int[np.ndarray, " round"] | None:
    """The slots to verify of each round of the trace, None if the batch decides."""
    if isinstance(policy, FixedLength):
        if policy.slots > answers.slots:
            raise ValueError(
                f"a block has {answers.slots} slots, got a policy that verifies {policy.slots}"
            )
        return np.full(len(answers.accept_prob), policy.slots)
    if np.isnan(answers.confidence).any():
        raise ValueError(f"{policy} needs confidences, got a drafter without a confidence head")
    if isinstance(policy, StaticThreshold):
        return policy(answers.confidence, lambda size: np.ones(len(size)))
    return None


def _asked(
    policy: Policy,
    confidence: Float[np.ndarray, "request slot"],
    reading: Float[np.ndarray, " tokens"],
    fixed: float,
) -> list[int]:
    """What a policy that looks at the whole batch says."""
    size, slots = confidence.shape
    lengths = np.asarray(policy(confidence, lambda tokens: 1 / (fixed + reading[tokens - 1])))
    if lengths.shape != (size,) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"a policy must return a whole number of slots for each of {size} requests, "
            f"got {lengths}"
        )
    if lengths.min() < 0 or lengths.max() > slots:
        raise ValueError(f"a policy must verify 0 to {slots} slots, got {lengths.tolist()}")
    return lengths.tolist()


def _speeds(sps: Speed, most: int) -> Float[np.ndarray, " tokens"]:
    """Steps per second at 1 to ``most`` tokens per step."""
    given = np.asarray(sps(np.arange(1, most + 1)), dtype=np.float64)
    speeds = np.broadcast_to(given, most)
    bad = ~(np.isfinite(speeds) & (speeds > 0))
    if bad.any():
        raise ValueError(
            f"sps must be positive and finite, got {speeds[bad.argmax()]} at {bad.argmax() + 1} "
            "tokens"
        )
    return speeds


def _step_seconds(draft: Seconds, overhead: Seconds, most: int) -> Float[np.ndarray, " requests"]:
    """Seconds of a step beside the target's, with 0 to ``most`` requests in the batch."""
    total = np.zeros(most + 1)
    for name, of in (("draft_seconds", draft), ("overhead_seconds", overhead)):
        seconds = [float(of(size) if callable(of) else of) for size in range(1, most + 1)]
        bad = [value for value in seconds if not 0 <= value < float("inf")]
        if bad:
            raise ValueError(f"{name} must be >= 0 and finite, got {bad[0]}")
        total[1:] += seconds
    return total


def _positive(name: str, value: float) -> float:
    require_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return value


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


def _served(requests: Requests, admitted: list[_Request], warm_up: int) -> _Columns:
    of = {name: np.array([getattr(r, name) for r in admitted]) for name in _Request.__slots__}
    return {
        "request": of["which"],
        "domain": requests.answers.domain[requests.conversation[of["which"]]],
        **{name: of[name] for name in ("arrival", "start", "end")},
        "tokens": requests.tokens[of["which"]] - of["left"],
        **{name: of[name] for name in ("rounds", "verified", "accepted")},
        "measured": (of["number"] >= warm_up) & (of["number"] < warm_up + len(requests)),
    }


def _steps(steps: list[tuple[float, float, int, int, int]]) -> _Columns:
    start, seconds, requests, verified, tokens = map(np.array, zip(*steps, strict=True))
    return {
        "start": start,
        "seconds": seconds,
        "requests": requests,
        "verified": verified,
        "batch_tokens": requests + verified,
        "tokens": tokens,
    }


def _figures(served: _Columns, steps: _Columns) -> dict[str, float]:
    counted = {name: values[served["measured"]] for name, values in served.items()}
    begin = counted["start"][0]
    during = {name: values[steps["start"] >= begin] for name, values in steps.items()}
    time = counted["end"].max() - begin
    speed = counted["tokens"] / (counted["end"] - counted["start"])
    slow, middle = np.quantile(speed, [0.1, 0.5])
    asked = counted["verified"].sum()
    figures = {
        "throughput": during["tokens"].sum() / time,
        "per_user": speed.mean(),
        "per_user_p10": slow,
        "per_user_p50": middle,
        "wait": (counted["start"] - counted["arrival"]).mean(),
        "latency": (counted["end"] - counted["arrival"]).mean(),
        "tokens_per_round": counted["tokens"].sum() / counted["rounds"].sum(),
        "rounds_per_request": counted["rounds"].mean(),
        "verified_per_request": counted["verified"].mean(),
        "acceptance": counted["accepted"].sum() / asked if asked else np.nan,
        "batch_requests": during["requests"].mean(),
        "verified_per_step": during["verified"].mean(),
        "batch_tokens": during["batch_tokens"].mean(),
        "busy": during["seconds"].sum() / time,
    }
    return {name: float(value) for name, value in figures.items()}
