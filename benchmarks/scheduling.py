"""The prefix scheduler against a plain heap, and the pocket target's steps per second, SPS(B)."""

import heapq
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.measure import compare, median_seconds
from dspark_lab.pairs import load_pair
from dspark_lab.serving import (
    StepsPerSecond,
    measure_steps_per_second,
    prefix_schedule,
    schedule_table,
)

REQUESTS, SLOTS = 1000, 16
CONTEXT_LENGTH, MOST = 256, 128


def run() -> Iterator[str]:
    confidence = np.random.default_rng(0).uniform(0.3, 1, (REQUESTS, SLOTS))
    # Milliseconds of a step, and of each of its tokens.
    for name, step, token in (("dear", 1.0, 0.05), ("middling", 5.0, 0.01), ("cheap", 20.0, 0.001)):
        tokens = np.array([1, REQUESTS * (SLOTS + 1)])
        sps = StepsPerSecond(tokens, 1e3 / (step + token * tokens), 0, "imaginary")
        chosen = prefix_schedule(confidence, sps)
        assert chosen.tolist() == _heap(confidence, sps)
        yield compare(
            f"{REQUESTS} x {SLOTS}, tokens {name}: {chosen.sum():>6} admitted, against a heap",
            partial(prefix_schedule, confidence, sps),
            partial(_heap, confidence, sps),
        )
        spent = median_seconds(partial(prefix_schedule, confidence, sps))
        yield f"{'':<4}{spent * 1e6 / confidence.size:.3f} ms per 1,000 candidates"
    few = confidence[:8, :7]
    yield f"8 x 7: {median_seconds(lambda: prefix_schedule(few, sps)) * 1e6:.0f} microseconds"
    spent = median_seconds(lambda: schedule_table(confidence, sps))
    yield f"{REQUESTS} x {SLOTS} as a table: {spent * 1e3:.2f} ms"
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield from _speeds(device)


def _speeds(device: str) -> Iterator[str]:
    pair = load_pair(device=device)
    sizes = [2**power for power in range(MOST.bit_length())]
    sps = measure_steps_per_second(
        pair.target, sizes, context_length=CONTEXT_LENGTH, warm_up=5, repeats=21
    )
    yield f"{sps.target}, {sps.device}, context {sps.context_length}, smooth: {sps.smooth}"
    kept = set(sps.smoothed().tokens.tolist())
    for tokens, speed in zip(sps.tokens.tolist(), sps.steps_per_second.tolist(), strict=True):
        yield (
            f"{tokens:>4} tokens: {speed:8.1f} steps/s, {1e3 / speed:7.2f} ms a step, "
            f"{tokens * speed:9.0f} tokens/s{'' if tokens in kept else '   (not in the envelope)'}"
        )


def _heap(confidence: np.ndarray, sps: StepsPerSecond) -> list[int]:
    """Slot by slot, the likeliest next one of any request first."""
    requests, slots = confidence.shape
    known = confidence.cumprod(axis=1).tolist()
    speeds = sps(np.arange(requests * (slots + 1) + 1)).tolist()
    heap = [(-row[0], 0, request) for request, row in enumerate(known)]
    heapq.heapify(heap)
    lengths, tokens, tau = [0] * requests, requests, float(requests)
    while heap:
        survival, slot, request = heapq.heappop(heap)
        if not (tau - survival) * speeds[tokens + 1] > tau * speeds[tokens]:
            break
        tau, tokens, lengths[request] = tau - survival, tokens + 1, slot + 1
        if slot + 1 < slots:
            heapq.heappush(heap, (-known[request][slot + 1], slot + 1, request))
    return lengths
