"""Coverage of 100,000 conversations in closed form, against a plain loop over their tokens."""

from collections.abc import Iterator
from itertools import groupby
from math import comb, exp

import numpy as np
import torch

from benchmarks.measure import compare, median_seconds
from dspark_lab.chats import SHIPPED_CHATS, Chat, Encoded, encode, load_chats, load_tokenizer
from dspark_lab.tuning import Spans, never_table, supervision

CONVERSATIONS, ANCHORS, BLOCK, ROW = 100_000, 64, 7, 4096
# Conversations that the loop reads.
FEW = 500


def run() -> Iterator[str]:
    encoded = _conversations(CONVERSATIONS)
    tokens = sum(len(item) for item in encoded)
    sizes = f"{CONVERSATIONS:,} conversations, {tokens / 1e6:.0f} million tokens"
    yield f"{sizes}, N {ANCHORS}, K {BLOCK}"
    spans, packed = Spans.of(encoded), Spans.of(encoded, row_length=ROW)
    for name, call in {
        "spans": lambda: Spans.of(encoded),
        f"spans of rows of {ROW}": lambda: Spans.of(encoded, row_length=ROW),
        "spans and supervision": lambda: supervision(encoded, ANCHORS, BLOCK),
        "supervision of the spans": lambda: supervision(spans, ANCHORS, BLOCK),
        "supervision of the packed spans": lambda: supervision(packed, ANCHORS, BLOCK),
        "tokens that are never a label": lambda: never_table(spans),
    }.items():
        seconds = median_seconds(call, runs=7)
        yield f"{name:<32} {seconds * 1e3:8.1f} ms, {CONVERSATIONS / seconds:12,.0f} a second"
    few = encoded[:FEW]
    yield compare(
        f"{FEW} of them, spans made anew, against a loop",
        lambda: supervision(few, ANCHORS, BLOCK),
        lambda: [_loop(item) for item in few],
        runs=5,
    )
    tokenizer = load_tokenizer()
    shipped = Spans.of([encode(chat, tokenizer) for chat in load_chats(SHIPPED_CHATS)])
    milliseconds = 1e3 * median_seconds(lambda: supervision(shipped, ANCHORS, BLOCK), runs=51)
    yield f"one choice on the {shipped.documents} shipped conversations: {milliseconds:.2f} ms"


def _conversations(count: int) -> list[Encoded]:
    """Conversations of one to four answers, prompts and answers of random lengths."""
    rng = np.random.default_rng(0)
    chat = Chat(({"role": "assistant", "content": ""},), id="drawn")
    turns = rng.integers(1, 5, count)
    lengths = rng.lognormal(4.5, 0.8, (count, 4, 2)).astype(int) + 1
    encoded = []
    for of_turns, number in zip(lengths, turns, strict=True):
        mask = np.tile([False, True], number).repeat(of_turns[:number].ravel())[:ROW]
        ids = torch.zeros(1, dtype=torch.long).expand(len(mask))
        encoded.append(Encoded(ids, torch.from_numpy(mask), chat))
    return encoded


def _loop(item: Encoded) -> tuple[float, float, list[float]]:
    """Covered tokens, weight and supervised slots of one conversation."""
    runs = [len(list(run)) for flag, run in groupby(item.loss_mask.tolist()) if flag]
    candidates = sum(run - 1 for run in runs)
    drawn = min(ANCHORS, candidates)
    covered, weighted, slots = 0.0, 0.0, [0.0] * BLOCK
    for run in runs:
        for offset in range(1, run):
            reach = min(offset, BLOCK)
            covered += 1 - comb(candidates - reach, drawn) / comb(candidates, drawn)
            for slot in range(reach):
                slots[slot] += drawn / candidates
                weighted += drawn / candidates * exp(-slot / 4)
    return covered, weighted, slots
