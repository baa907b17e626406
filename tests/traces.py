"""Confidences and what came of them, made up, and loops that read them: one round at a time.

A made-up trace holds everything that a real one may: rows behind a rejection, rows that were not
verified, short rounds. The loops are the definitions that the tests hold tables against.
"""

import heapq
import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from dspark_lab.serving import Answers

# Tenths make ties, and values that lie on a cut; the others are arbitrary.
PROBABILITY = st.one_of(st.integers(0, 10).map(lambda n: n / 10), st.floats(0, 1))

SLOTS = 4


class Made(NamedTuple):
    """A round that was made up: of each slot a confidence and an accept rate."""

    prompt: int
    confidence: Sequence[float]
    rate: Sequence[float]
    verified: int
    accepted: int
    domain: str = "none"

    @property
    def reached(self) -> int:
        """So many slots from the first on."""
        return min(self.verified, self.accepted + 1)


def trace_of(rounds: Iterable[Made]) -> pd.DataFrame:
    """The trace of such rounds, those of a prompt in their order."""
    rows, numbers = [], Counter[int]()
    for r in rounds:
        for slot, (confidence, rate) in enumerate(zip(r.confidence, r.rate, strict=True)):
            verified = slot < r.verified
            place = [r.prompt, r.domain, numbers[r.prompt], slot]
            rates = [rate if verified else math.nan, confidence]
            rows.append([*place, *rates, verified, slot < r.accepted])
        numbers[r.prompt] += 1
    columns = "prompt domain round slot accept_rate confidence verified accepted"
    return pd.DataFrame(rows, columns=columns.split())


def made_trace(
    seed: int,
    prompts: range = range(12),
    rounds: int = 40,
    *,
    distortion: tuple[float, ...] = (0.5,) * SLOTS,
    noise: float = 0.0,
    whole: bool = True,
    domains: tuple[str, ...] = ("code", "chat"),
) -> pd.DataFrame:
    """A trace whose confidences are the true rates, noisy and scaled by known temperatures."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt in (prompt for prompt in prompts for _ in range(rounds)):
        slots = SLOTS if whole else int(rng.integers(1, SLOTS + 1))
        verified = slots if whole else int(rng.integers(0, slots + 1))
        rates, confidences, accepted = [], [], 0
        for slot in range(slots):
            rates.append(float(np.clip(rng.beta(5, 2), 0.01, 0.99)))
            logit = math.log(rates[-1] / (1 - rates[-1])) + noise * rng.normal()
            confidences.append(1 / (1 + math.exp(-logit / distortion[slot])))
            if accepted == slot < verified and rng.random() < rates[-1]:
                accepted += 1
        domain = domains[prompt % len(domains)]
        made.append(Made(prompt, confidences, rates, verified, accepted, domain))
    return trace_of(made)


def rounds_by_hand(trace: pd.DataFrame) -> dict[tuple[int, int], list]:
    found: dict[tuple[int, int], list] = {}
    for row in trace.sort_values("slot").itertuples():
        found.setdefault((row.prompt, row.round), []).append(row)
    return found


def reached_by_hand(trace: pd.DataFrame) -> list:
    """Slot by slot until the first that was not verified or was rejected, that one included."""
    rows = []
    for block in rounds_by_hand(trace).values():
        for row in block:
            if not row.verified:
                break
            rows.append(row)
            if not row.accepted:
                break
    return rows


def unlucky(trace: pd.DataFrame) -> pd.DataFrame:
    """The same trace, but no round accepts its slot 2, so that none reaches slot 3."""
    return trace.assign(accepted=trace["accepted"] & (trace["slot"] < 2))


def equal_answers(rate: float, slots: int, tokens: int = 1) -> Answers:
    """One conversation whose every slot is accepted with the same probability."""
    same, one = np.full((1, slots), rate), np.array([1])
    return Answers(same, same, 0 * one, one, tokens * one, np.array(["all"], dtype=object))


TRACE = made_trace(0)
RAGGED = made_trace(1, whole=False)


def bins_by_hand(confidence, outcome, edges):
    """The samples of each bin: above its low edge, not above its high one; the first takes all."""
    bins = [[] for _ in edges[1:]]
    for f, o in zip(confidence, outcome, strict=True):
        place = 0
        while place < len(bins) - 1 and f > edges[place + 1]:
            place += 1
        bins[place].append((f, o))
    return bins


def ece_by_hand(confidence, outcome, edges) -> float:
    total = 0.0
    for held in bins_by_hand(confidence, outcome, edges):
        if held:
            mean_f = sum(f for f, _ in held) / len(held)
            mean_o = sum(o for _, o in held) / len(held)
            total += len(held) / len(confidence) * abs(mean_f - mean_o)
    return total


def survivals(confidence: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(itertools.accumulate(row, operator.mul)) for row in confidence]


def schedule_by_hand(confidence: Sequence[Sequence[float]], sps) -> list[int]:
    """Early stopping one slot at a time, knowing only the next slot of each request."""
    requests, slots = len(confidence), len(confidence[0])
    known = survivals(confidence)
    heap = [(-row[0], 0, request) for request, row in enumerate(known)]
    heapq.heapify(heap)
    lengths, tokens, tau = [0] * requests, requests, float(requests)
    while heap:
        negative, slot, request = heapq.heappop(heap)
        now, then = sps(np.array([tokens, tokens + 1])).tolist()
        if negative == 0 or not (tau - negative) * then > tau * now:
            break
        tau, tokens, lengths[request] = tau - negative, tokens + 1, slot + 1
        if slot + 1 < slots:
            heapq.heappush(heap, (-known[request][slot + 1], slot + 1, request))
    return lengths
