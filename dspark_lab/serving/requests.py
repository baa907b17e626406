"""Pre-drawn requests (common random numbers): answers of a trace and the draws of every round.

Everything random about a request is drawn beforehand, so that policies that serve the same requests
differ by what they do. Rounds of another length are taken to begin where the trace's did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from dspark_lab.checks import Count, NonNegative, Size, Within, checked
from dspark_lab.decoding import probabilities, read_trace
from dspark_lab.rates import SequentialTemperatures, prefix_survival


@checked
@dataclass(frozen=True)
class Geometric:
    """Lengths of answers: n tokens with probability p (1 - p)**(n - 1), where p = 1 / ``mean``."""

    mean: Annotated[float, Within(1)]

    def quantile(self, point: Float[np.ndarray, " request"]) -> Int[np.ndarray, " request"]:
        """The length that a share ``point``, in [0, 1), of answers do not reach."""
        if self.mean == 1:
            return np.ones(len(point), dtype=np.int64)
        return 1 + (np.log1p(-point) / np.log1p(-1 / self.mean)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a trace and the blocks drafted for them, from :func:`answers_of`.

    A conversation has ``count`` rounds, from ``first`` on, which yielded ``tokens``.
    """

    accept_prob: Float[np.ndarray, "round slot"]
    confidence: Float[np.ndarray, "round slot"]
    first: Int[np.ndarray, " conversation"]
    count: Int[np.ndarray, " conversation"]
    tokens: Int[np.ndarray, " conversation"]
    domain: Shaped[np.ndarray, " conversation"]

    @property
    def slots(self) -> int:
        return self.accept_prob.shape[1]


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests with all their random draws, from :func:`draw_requests`.

    ``gap`` is the time since the request before, in units of the mean; a round drafts the ``block``
    of the trace anew, and ``acceptable`` slots of it are accepted if verified.
    """

    answers: Answers
    conversation: Int[np.ndarray, " request"]
    tokens: Int[np.ndarray, " request"]
    gap: Float[np.ndarray, " request"]
    block: Int[np.ndarray, "request round"]
    acceptable: Int[np.ndarray, "request round"]

    def __len__(self) -> int:
        return len(self.tokens)


@checked
def answers_of(
    trace: pd.DataFrame | Answers,
    calibrated: SequentialTemperatures | None = None,
    *,
    seed: Size = 0,
) -> Answers:
    """The answers and blocks of a trace.

    Slots are accepted with the probabilities of the drafted tokens, not with the rates c*: an
    accepted token is not distributed as a drafted one. Rounds that the end of an answer cut are
    completed from a whole round of their domain, drawn with the probability that its slots up to
    there are accepted.

    Args:
        trace: of whole blocks, of one drafter at one temperature; answers are returned as they are.
    """
    if isinstance(trace, Answers):
        return trace
    rounds, row = read_trace(trace)
    verified, accepted = rounds.verified, rounds.accepted
    asked, drafted, kept = (values.sum(axis=1) for values in (verified, row >= 0, accepted))
    stopped = (asked < drafted) & ((kept < asked) | (asked == 0))
    if stopped.any():
        number = stopped.argmax()
        raise ValueError(
            "trace must be decoded without a threshold or scheduler, got a round of prompt "
            f"{rounds.prompt[number]} that verified {asked[number]} of {drafted[number]} slots"
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


@checked
def draw_requests(
    trace: pd.DataFrame | Answers,
    requests: Count,
    *,
    answer_tokens: Count | Geometric | None = None,
    domains: Mapping[str, NonNegative] | None = None,
    within: Literal["conversation", "domain"] = "conversation",
    seed: Size = 0,
) -> Requests:
    """Draws conversations of a trace and the outcome of every round.

    Args:
        answer_tokens: by default as many as the conversation had.
        domains: a weight for each that is wanted; by default conversations are equally likely.
        within: rounds are drawn from the conversation, or from its domain, so that all are alike.
    """
    answers = answers_of(trace)
    # Independent streams, so that changing one thing leaves the other draws as they are.
    asking, arriving, lasting, drafting = map(
        np.random.default_rng, np.random.SeedSequence(seed).spawn(4)
    )
    edges = np.cumsum(_conversation_weights(answers.domain, domains))
    conversation = np.searchsorted(edges / edges[-1], asking.random(requests), side="right")
    gap = arriving.exponential(size=requests)
    if answer_tokens is None:
        tokens = answers.tokens[conversation]
    elif isinstance(answer_tokens, Geometric):
        tokens = answer_tokens.quantile(lasting.random(requests))
    else:
        tokens = np.full(requests, answer_tokens)

    by_domain = within == "domain"
    pools = pd.factorize(answers.domain)[0] if by_domain else np.arange(len(answers.count))
    pool_of_round = pools.repeat(answers.count)
    members, size = np.argsort(pool_of_round, kind="stable"), np.bincount(pool_of_round)
    start, pool = np.cumsum(size) - size, pools[conversation, None]
    # No answer has more rounds than tokens.
    place, uniform = drafting.random((2, requests, int(tokens.max())))
    block = members[start[pool] + (place * size[pool]).astype(np.int64)]
    acceptable = accepted_slots(prefix_survival(answers.accept_prob), block, uniform)
    return Requests(answers, conversation, tokens, gap, block, acceptable)


def accepted_slots(
    survival: Float[np.ndarray, "block slot"],
    block: Int[np.ndarray, "request round"],
    uniform: Float[np.ndarray, "request round"],
) -> Int[np.ndarray, "request round"]:
    """Slots of each round's block whose survival lies above the round's uniform random number."""
    slots = np.zeros(block.shape, dtype=np.int64)
    for alive in survival.T:
        slots += uniform < alive[block]
    return slots


def _complete(
    accept: Float[np.ndarray, "round slot"],
    confidence: Float[np.ndarray, "round slot"],
    asked: Int[np.ndarray, " round"],
    domain: Shaped[np.ndarray, " round"],
    rng: np.random.Generator,
) -> None:
    """Fill in what follows the first ``asked`` slots of each round."""
    slots = accept.shape[1]
    for name in pd.unique(domain):
        whole_rounds = np.flatnonzero((asked == slots) & (domain == name))
        cut = np.flatnonzero((asked < slots) & (domain == name))
        if len(cut) and not len(whole_rounds):
            raise ValueError(
                f"trace must have a round of domain {name!r} that verified {slots} slots, got none"
            )
        survival = prefix_survival(accept[whole_rounds])
        for length in np.unique(asked[cut]):
            cut_rounds = cut[asked[cut] == length]
            alive = survival[:, length - 1]
            share = alive / alive.sum() if alive.sum() > 0 else None
            chosen = rng.choice(whole_rounds, size=len(cut_rounds), p=share)
            for values in (accept, confidence):
                values[cut_rounds, length:] = values[chosen, length:]


def _conversation_weights(
    domain: Shaped[np.ndarray, " conversation"], weights: Mapping[str, float] | None
) -> Float[np.ndarray, " conversation"]:
    if weights is None:
        return np.ones(len(domain))
    code, names = pd.factorize(domain)
    if unknown := [name for name in weights if name not in names]:
        raise ValueError(f"domains must be among {sorted(names)}, got {unknown[0]!r}")
    if not sum(weights.values()) > 0:
        raise ValueError(f"domains must have a weight above 0, got {dict(weights)}")
    share = np.array([weights.get(name, 0.0) for name in names]) / np.bincount(code)
    return share[code]
