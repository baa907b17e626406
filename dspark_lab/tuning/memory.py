"""The peak memory of a training step, and what therefore fits on a card.

The step is that of ``dspark_lab.training`` from its second on: weights, gradients and AdamW's state
in fp32, products in fp32 or, under autocast, in bf16; nothing is compiled but, on CUDA, the
attention. There the objective's chunks are the largest it makes: with little memory left they are
smaller. What an allocator rounds up or loses between tensors, and what a driver takes for itself,
is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Literal

import numpy as np
import pandas as pd

from dspark_lab.checks import Count, Share, Within, checked
from dspark_lab.model import most_slots
from dspark_lab.tuning.moments import PARTS, StepBytes
from dspark_lab.tuning.shape import CARDS, TARGETS, Card, Shape
from dspark_lab.tuning.step import Dtype, Step

Memory = float | str | Card


@checked
def training_memory(
    shape: Shape,
    *,
    seq_len: Count,
    num_anchors: Count,
    block_size: Count | None = None,
    batch_size: Count = 1,
    dtype: Dtype = "bf16",
    features: Literal["live", "cached"] = "live",
    target_dtype: Dtype | None = None,
    objective: Literal["chunked", "full"] = "chunked",
    supervised: Share = 1.0,
    vocabulary: Count | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> int:
    """The most bytes that a training step holds at one time, weights and optimiser included.

    Arguments as in :class:`~dspark_lab.tuning.Step`; ``block_size`` None is the shape's own. Within
    5 % of the measured peak on a CPU, see ``benchmarks/cost.py``.
    """
    options = (dtype, features, target_dtype, objective, supervised, vocabulary, device)
    step = Step(seq_len, num_anchors, block_size or shape.block_size, batch_size, *options)
    return int(StepBytes(shape, step).peak)


@checked
def memory_table(
    shape: Shape,
    *,
    seq_len: Count,
    num_anchors: Count,
    block_size: Count | None = None,
    batch_size: Count = 1,
    dtype: Dtype = "bf16",
    features: Literal["live", "cached"] = "live",
    target_dtype: Dtype | None = None,
    objective: Literal["chunked", "full"] = "chunked",
    supervised: Share = 1.0,
    vocabulary: Count | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> pd.DataFrame:
    """The bytes ``held`` (:func:`training_memory`) at the fullest ``moment``, part by part."""
    options = (dtype, features, target_dtype, objective, supervised, vocabulary, device)
    step = Step(seq_len, num_anchors, block_size or shape.block_size, batch_size, *options)
    sizes = StepBytes(shape, step)
    moments = sizes.moments()
    fullest = max(moments, key=lambda moment: sum(moments[moment].values()))
    held = dict.fromkeys(PARTS, 0) | sizes.always() | moments[fullest]
    return pd.DataFrame(
        {"part": PARTS, "held": [int(held[part]) for part in PARTS], "moment": fullest}
    )


@checked
def usable_bytes(
    memory: Memory, usable: Annotated[float, Within(0, 1, above=True)] = 0.92
) -> float:
    """The share of a memory, in bytes or a card's, that tensors may take; see :func:`fit_table`."""
    if isinstance(memory, str):
        if memory not in CARDS:
            raise ValueError(f"memory must be bytes or one of {list(CARDS)}, got {memory!r}")
        memory = CARDS[memory]
    size = memory.memory_bytes if isinstance(memory, Card) else memory
    if not size > 0:
        raise ValueError(f"memory must be > 0, got {size}")
    return size * usable


@checked
def fit_table(
    shape: Shape,
    memory: Memory,
    seq_lens: Sequence[Count] = (1024, 2048, 4096, 8192),
    block_sizes: Sequence[Count] = (4, 7, 11, 15),
    *,
    usable: float = 0.92,
    batch_size: Count = 1,
    dtype: Dtype = "bf16",
    features: Literal["live", "cached"] = "live",
    target_dtype: Dtype | None = None,
    objective: Literal["chunked", "full"] = "chunked",
    supervised: Share = 1.0,
    vocabulary: Count | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> pd.DataFrame:
    """The largest number of anchors that fits into a memory, for each row length and block size.

    Args:
        memory: bytes, or a card of :data:`~dspark_lab.tuning.CARDS`.
        usable: share of the memory that tensors may take; the rest is the driver's, the kernels'
            and what lies idle between tensors. All others as in :class:`~dspark_lab.tuning.Step`.

    Returns:
        a line each: ``num_anchors`` (0 where not even one fits; at most ``seq_len - 1``), ``held``
        (bytes of that many, or of one), ``full`` (whether memory, not the row, is the limit).
    """
    options = (dtype, features, target_dtype, objective, supervised, vocabulary, device)
    limit = usable_bytes(memory, usable)
    lines = []
    for seq_len, block_size in product(seq_lens, block_sizes):
        most, held = _most_anchors(shape, Step(seq_len, 1, block_size, batch_size, *options), limit)
        lines.append((seq_len, block_size, most, held, most < max(1, seq_len - 1)))
    return pd.DataFrame(lines, columns=["seq_len", "block_size", "num_anchors", "held", "full"])


@checked
def card_table(
    targets: Sequence[str | Shape] = tuple(TARGETS),
    cards: Sequence[str | Card] = tuple(CARDS),
    *,
    seq_len: Count = 4096,
    block_size: Count = 7,
    num_anchors: Count = 512,
    usable: float = 0.92,
    batch_size: Count = 1,
    dtype: Dtype = "bf16",
    features: Literal["live", "cached"] = "live",
) -> pd.DataFrame:
    """Which drafter trains on which card: published configurations and common cards by default.

    Arguments as in :func:`fit_table`. ``held_gb`` (10^9 bytes) are of a step of ``num_anchors``,
    ``memory_gb`` of the card; ``most_anchors`` is the largest number that fits.
    """
    lines = []
    for target in targets:
        shape = target if isinstance(target, Shape) else Shape.of(target)
        step = Step(seq_len, num_anchors, block_size, batch_size, dtype, features)
        held = StepBytes(shape, step).peak
        for card in cards:
            limit = usable_bytes(card, usable)
            most, _ = _most_anchors(shape, step, limit)
            name, size = getattr(card, "name", card), limit / usable / 1e9
            lines.append((shape.name, int(held) / 1e9, name, size, held <= limit, most))
    columns = ["target", "held_gb", "card", "memory_gb", "fits", "most_anchors"]
    return pd.DataFrame(lines, columns=columns)


def _most_anchors(shape: Shape, step: Step, limit: float) -> tuple[int, int]:
    """The largest number of anchors that fits, or 0, and the bytes of that many, or of one."""

    def peaks(anchors: np.ndarray) -> np.ndarray:
        return np.broadcast_to(StepBytes(shape, step.with_each(anchors)).peak, anchors.shape)

    # One anchor more may hold less, since its logits may come in smaller chunks, by at most what a
    # whole chunk holds. So a few numbers bracket the answer.
    vocab = step.vocabulary or shape.vocab_size
    width = vocab + shape.drafter.hidden_size + shape.markov_rank
    chunk_bytes = 20 * most_slots(vocab, step.device == "cuda") * width
    few = np.unique(np.linspace(1, max(1, step.seq_len - 1), 65).astype(int))
    held = peaks(few)
    first = int(few[held <= limit].max(initial=1))
    last = int(few[held > limit + chunk_bytes].min(initial=few[-1]))
    anchors = np.arange(first, last + 1)
    held = peaks(anchors)
    most = int(anchors[held <= limit].max(initial=0))
    return most, int(held[max(most, first) - first])
