"""What a training step, a drafting step and a verification cost: operations and bytes, in parts.

An operation is a floating-point multiplication or addition inside a matrix product or attention, so
that a product of [m, k] and [k, n] is 2 m k n, as in PyTorch's own counter. What happens number by
number (norms, RoPE, activations) is left out there and here, but for the objective's softmaxes and
the optimiser, whose lines say so (``counted`` False).

Attention is counted twice: by the pairs of query and key that the training mask lets through, which
is the work that there is, and by the tiles of 128 x 128 pairs that hold one of them, which is the
work that a kernel does. With anchors drawn uniformly both are expectations, in closed form.

This file knows the arithmetic; it runs no model and knows no times (``dspark_lab.tuning.steptime``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from dspark_lab.checks import require_int
from dspark_lab.tuning.memory import (
    WIDTH,
    Dtype,
    Step,
    card_table,
    fit_table,
    kept_bytes,
    logit_bytes,
    memory_table,
    training_memory,
)
from dspark_lab.tuning.shape import CARDS, TARGETS, Card, Layers, Shape

__all__ = [
    "CARDS",
    "TARGETS",
    "TILE",
    "AttentionWork",
    "Card",
    "Layers",
    "Shape",
    "anchored_work",
    "drafting_cost",
    "expected_work",
    "card_table",
    "fit_table",
    "memory_table",
    "training_cost",
    "training_memory",
    "verify_cost",
]

# Queries and keys of a tile of FlexAttention.
TILE = 128
# The backward pass makes the scores again, and then four gradients from them: five products to two.
_ATTENTION_BACKWARD = 2.5
# Of the chunked objective, for each word of a slot's two softmaxes: what `_losses_` does to a logit
# of the draft (8), of the target (6), to both (4), and for the gradient (5), and how often such a
# number crosses memory on the way (read or written, no two steps fused).
_OBJECTIVE_FORWARD, _OBJECTIVE_BACKWARD, _OBJECTIVE_CROSSINGS = 18, 5, 31
# AdamW, for each weight: two moments (3 and 4), decay (1), the step (5), and clipping (3).
_OPTIMISER, _OPTIMISER_CROSSINGS = 16, 10


@dataclass(frozen=True)
class AttentionWork:
    """Pairs of query and key, over all rows of a batch, for one head of one layer.

    ``pairs`` that the mask lets through; ``tiled``, those in the tiles that hold one of them;
    ``dense``, all that there are.
    """

    pairs: float
    tiled: float
    dense: float


def expected_work(
    seq_len: int, num_anchors: int, block_size: int, batch_size: int = 1
) -> AttentionWork:
    """The training mask's, expected over anchors drawn uniformly from rows of one document.

    Every position but the last is a candidate. A block at anchor a has ``block_size`` queries that
    see the a tokens before it and their own block; blocks beyond the candidates see themselves.

    Raises:
        TypeError, ValueError: a size that is not an int of at least 1.
    """
    for name, value in (
        ("seq_len", seq_len),
        ("num_anchors", num_anchors),
        ("block_size", block_size),
        ("batch_size", batch_size),
    ):
        require_int(name, value, 1)
    candidates = seq_len - 1
    kept = min(num_anchors, candidates)
    queries = num_anchors * block_size
    pairs = kept * block_size * max(candidates - 1, 0) / 2 + queries * block_size
    first, last = _runs(num_anchors, block_size)
    # The last kept block of each run sees the most context, and its tiles are those of the run.
    deepest = np.minimum(last, kept - 1)
    sees = deepest >= first
    reaches = np.zeros((len(first), 1))
    if kept:
        beyond = _exceeds(deepest, kept, candidates, np.arange(0, seq_len, TILE))
        reaches = beyond * sees[:, None]
    tiles = reaches.sum() + _own_tiles(first, last, seq_len, block_size)
    # Where context and slots meet in a tile, it is one tile, not two.
    border = seq_len // TILE
    if seq_len % TILE:
        shares = (seq_len + first * block_size) // TILE == border
        tiles -= reaches[shares, border].sum() if kept else 0
    return AttentionWork(
        batch_size * float(pairs),
        batch_size * float(tiles) * TILE**2,
        batch_size * float(queries * (seq_len + queries)),
    )


def anchored_work(
    anchor_positions: Int[np.ndarray, "batch anchor"],
    block_keep_mask: Bool[np.ndarray, "batch anchor"] | None = None,
    *,
    seq_len: int,
    block_size: int,
    doc_starts: Int[np.ndarray, "batch anchor"] | None = None,
) -> AttentionWork:
    """The training mask's, exactly, for given blocks.

    Args:
        anchor_positions: in any order.
        block_keep_mask: False for dummy blocks, which see themselves; all True where None.
        seq_len, block_size: as in :func:`dspark_lab.attention.training_block_mask`.
        doc_starts: where each anchor's document begins; 0 where None.

    Raises:
        TypeError, ValueError: a size that is not an int of at least 1, or arrays that do not fit.
    """
    require_int("seq_len", seq_len, 1)
    require_int("block_size", block_size, 1)
    end = np.asarray(anchor_positions)
    if end.ndim != 2 or end.dtype.kind not in "iu":
        raise ValueError(
            f"anchor_positions must be whole numbers, [batch, anchor], got {end.dtype} of shape "
            f"{end.shape}"
        )
    keep = np.ones(end.shape, bool) if block_keep_mask is None else np.asarray(block_keep_mask)
    start = np.zeros_like(end) if doc_starts is None else np.asarray(doc_starts)
    for name, given in (("block_keep_mask", keep), ("doc_starts", start)):
        if given.shape != end.shape:
            raise ValueError(
                f"{name} must be [batch, anchor] = {end.shape}, got shape {given.shape}"
            )
    end, start = end * keep, start * keep
    batch, anchors = end.shape
    queries = anchors * block_size
    pairs = int(((end - start) * block_size).sum()) + batch * queries * block_size
    key_tiles = -(-(seq_len + queries) // TILE)
    tiles = 0
    for first, last in zip(*_runs(anchors, block_size), strict=True):
        touched = np.zeros((batch, key_tiles + 1), int)
        for block in range(first, last + 1):
            some = np.flatnonzero(end[:, block] > start[:, block])
            touched[some, start[some, block] // TILE] += 1
            touched[some, -(-end[some, block] // TILE)] -= 1
        seen = touched.cumsum(axis=1)[:, :-1] > 0
        own = seq_len + first * block_size, seq_len + (last + 1) * block_size
        seen[:, own[0] // TILE : -(-own[1] // TILE)] = True
        tiles += int(seen.sum())
    dense = batch * queries * (seq_len + queries)
    return AttentionWork(float(pairs), float(tiles * TILE**2), float(dense))


def training_cost(
    shape: Shape,
    *,
    seq_len: int | None = None,
    num_anchors: int | None = None,
    block_size: int | None = None,
    batch_size: int = 1,
    dtype: Dtype = "bf16",
    work: AttentionWork | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The cost of one training step on one micro-batch, part by part.

    Args:
        shape: of target and drafter; sizes left out are its own.
        seq_len, num_anchors, block_size, batch_size, dtype, options: see
            :class:`dspark_lab.tuning.memory.Step`.
        work: of the attention, where it is not that of uniformly drawn anchors.

    Returns:
        a line per part, in the order of the step: ``part``; ``forward`` and ``backward``,
        operations by the mask's true pairs; ``tile_forward`` and ``tile_backward``, by its tiles
        (the same but for attention); ``operations``, forward and backward by tiles, which is what
        takes time; ``bytes_moved`` between memory and processor, every operand of every product
        once; ``bytes_held``, what the part keeps from the forward to the backward pass, holds
        throughout (target, optimiser) or while it runs (objective); ``counted``, whether
        ``torch.utils.flop_counter`` knows such operations. The most bytes that are held at one time
        are :func:`training_memory`'s.

    Raises:
        TypeError, ValueError: as :class:`~dspark_lab.tuning.memory.Step`.
    """
    step = Step.of(
        shape,
        shape.seq_len if seq_len is None else seq_len,
        shape.num_anchors if num_anchors is None else num_anchors,
        block_size,
        batch_size=batch_size,
        dtype=dtype,
        **options,
    )
    if work is None:
        work = expected_work(step.seq_len, step.num_anchors, step.block_size, batch_size)
    layers, c = shape.drafter, step.product_bytes
    d, r, inner = layers.hidden_size, shape.markov_rank, layers.intermediate_size
    q, kv = layers.query_width, layers.kv_width
    slots, both = step.slots, step.tokens + step.slots
    counted, vocab = float(step.counted_slots), step.vocabulary or shape.vocab_size
    kept = kept_bytes(shape, step)
    lines = []

    def add(
        part: str,
        forward: float,
        backward: float,
        moved: float,
        held: float,
        *,
        tiles: float = 1.0,
        counted: bool = True,
    ) -> None:
        lines.append(
            {
                "part": part,
                "forward": float(forward),
                "backward": float(backward),
                "tile_forward": forward * tiles,
                "tile_backward": backward * tiles,
                "operations": (forward + backward) * tiles,
                "bytes_moved": float(moved),
                "bytes_held": float(held),
                "counted": counted,
            }
        )

    if step.features == "live":
        add(
            "target forward",
            *_target_forward(shape, step),
            held=shape.target_parameters * step.target_bytes,
        )
    # Features ask for no gradient, so there is one product backward; elsewhere there are two.
    fc = _products((step.tokens, shape.context_size, d))
    add(
        "context projection",
        fc.operations,
        fc.operations,
        moved=c * (2 * fc.crossing + fc.weights) + 4 * fc.weights,
        held=kept["context projection"],
    )

    def add_layers(part: str, products: _Products) -> None:
        forward = layers.count * products.operations
        moved = layers.count * (3 * c * products.crossing + (2 * c + 4) * products.weights)
        add(part, forward, 2 * forward, moved, kept[part])

    add_layers("attention projections", _products((slots, d, q), (slots, q, d), (both, d, 2 * kv)))
    forward = 4 * q * layers.count * work.pairs
    # Each row of tiles reads the keys and values that it touches, once for the heads that share
    # them; backward both directions do.
    keys = 2 * work.tiled / TILE * kv
    add(
        "attention",
        forward,
        _ATTENTION_BACKWARD * forward,
        moved=3 * c * layers.count * (2 * slots * q + keys),
        held=kept["attention"],
        tiles=work.tiled / work.pairs,
    )
    add_layers("MLP", _products((slots, d, 2 * inner), (slots, inner, d)))
    weights = shape.latent_weights + shape.confidence_width
    add(
        "heads",
        2 * slots * weights,
        4 * slots * weights,
        moved=(2 * c + 4) * weights + 3 * c * slots * (d + 3 * r),
        held=kept["heads"],
    )
    # The head is frozen; the matrix of the Markov bias has a gradient, and so have both inputs.
    add(
        "LM head",
        2 * counted * vocab * (2 * d + r),
        2 * counted * vocab * (d + 2 * r),
        moved=c * (2 * vocab * (d + r) + counted * (4 * d + 3 * r + 5 * vocab)) + 4 * vocab * r,
        held=c * vocab * d,
    )
    add(
        "objective",
        _OBJECTIVE_FORWARD * counted * vocab,
        _OBJECTIVE_BACKWARD * counted * vocab,
        moved=4 * _OBJECTIVE_CROSSINGS * counted * vocab,
        held=logit_bytes(step, vocab),
        counted=False,
    )
    trained = shape.trained_parameters
    add(
        "optimiser",
        _OPTIMISER * trained,
        0,
        moved=4 * _OPTIMISER_CROSSINGS * trained,
        held=16 * trained,
        counted=False,
    )
    return pd.DataFrame(lines)


def drafting_cost(
    shape: Shape,
    *,
    context_length: int,
    block_size: int | None = None,
    batch_size: int = 1,
    dtype: Dtype = "bf16",
    new_tokens: int | None = None,
) -> pd.DataFrame:
    """The cost of drafting one block for each request of a batch.

    Args:
        shape: of target and drafter; a block size left out is its own.
        context_length: tokens before the block, the same for all requests.
        block_size: slots that are drafted.
        batch_size: requests.
        dtype: of weights, cache and products.
        new_tokens: of each request, that the drafter reads before it drafts; ``block_size + 1``, as
            a round of ``dspark_lab.decoding.loop`` leaves them, where None.

    Returns:
        a line per part: ``part``, ``operations``, ``bytes_moved`` (weights once a batch, the cache
        once a request), ``bytes_held`` (weights; with attention, the cache).

    Raises:
        TypeError, ValueError: a size that is not an int of at least 1 (0 for ``context_length`` and
            ``new_tokens``), or an unknown dtype.
    """
    size = shape.block_size if block_size is None else block_size
    new = size + 1 if new_tokens is None else new_tokens
    require_int("context_length", context_length, 0)
    require_int("block_size", size, 1)
    require_int("batch_size", batch_size, 1)
    require_int("new_tokens", new, 0)
    c = _bytes_of(dtype)
    layers, r, vocab = shape.drafter, shape.markov_rank, shape.vocab_size
    d, inner, q, kv = (
        layers.hidden_size,
        layers.intermediate_size,
        layers.query_width,
        layers.kv_width,
    )
    read, slots = batch_size * new, batch_size * size
    cached = batch_size * (context_length + size)
    weights = shape.latent_weights + shape.confidence_width
    projections = _products((slots, d, q), (slots, q, d), (slots + read, d, 2 * kv))
    return _table(
        _line("context projection", c, _products((read, shape.context_size, d))),
        _line("attention projections", c, projections, layers.count),
        _attention_line(layers, c, slots, cached, slots * (context_length + size)),
        _line("MLP", c, _products((slots, d, 2 * inner), (slots, inner, d)), layers.count),
        {
            "part": "heads",
            "operations": 2 * slots * weights,
            "bytes_moved": c * (weights + slots * (d + 3 * r)),
            "bytes_held": c * (weights + vocab * r),
        },
        _line("LM head", c, _products((slots, d, vocab))),
        # Slot after slot, so that its matrix is read for each.
        _line("Markov bias", c, _products((batch_size, r, vocab)), size)
        | {"bytes_held": c * r * vocab},
    )


def verify_cost(
    shape: Shape,
    *,
    context_length: int,
    tokens: int,
    batch_size: int = 1,
    dtype: Dtype = "bf16",
) -> pd.DataFrame:
    """The cost of one pass of the target over ``tokens`` new tokens of each request.

    1 token is plain decoding; to verify a block takes its slots and the anchor. The other
    arguments, the columns and the errors are those of :func:`drafting_cost`.

    Raises:
        ValueError: the shape does not know its target.
    """
    require_int("context_length", context_length, 0)
    require_int("tokens", tokens, 1)
    require_int("batch_size", batch_size, 1)
    c = _bytes_of(dtype)
    layers = shape.target
    if layers is None:
        raise ValueError("verification needs the target's shape: give Shape.of its target")
    d, inner, q, kv = (
        layers.hidden_size,
        layers.intermediate_size,
        layers.query_width,
        layers.kv_width,
    )
    new, length = batch_size * tokens, context_length + tokens
    near = length if layers.window is None else min(length, layers.window + tokens - 1)
    share = layers.sliding / layers.count
    cached = batch_size * (share * near + (1 - share) * length)
    pairs = batch_size * _causal_pairs(layers, context_length, tokens)
    return _table(
        _line(
            "attention projections",
            c,
            _products((new, d, q + 2 * kv), (new, q, d)),
            layers.count,
        ),
        _attention_line(layers, c, new, cached, pairs),
        _line("MLP", c, _products((new, d, 2 * inner), (new, inner, d)), layers.count),
        _line("LM head", c, _products((new, d, shape.vocab_size))),
    )


@dataclass(frozen=True)
class _Products:
    """Of matrix products: operations, numbers in all weights, numbers that go in and come out."""

    operations: float
    weights: int
    crossing: int


def _products(*sizes: tuple[int, int, int]) -> _Products:
    """Of so many rows, inputs and outputs each."""
    return _Products(
        2.0 * sum(rows * inputs * outputs for rows, inputs, outputs in sizes),
        sum(inputs * outputs for _, inputs, outputs in sizes),
        sum(rows * (inputs + outputs) for rows, inputs, outputs in sizes),
    )


def _line(part: str, c: int, products: _Products, times: int = 1) -> dict[str, Any]:
    """Of a step without a backward pass."""
    return {
        "part": part,
        "operations": times * products.operations,
        "bytes_moved": times * c * (products.weights + products.crossing),
        "bytes_held": times * c * products.weights,
    }


def _attention_line(
    layers: Layers, c: int, queries: int, cached: float, pairs: float
) -> dict[str, Any]:
    cache = c * layers.count * 2 * layers.kv_width * cached
    return {
        "part": "attention",
        "operations": 4 * layers.count * layers.query_width * pairs,
        "bytes_moved": cache + c * layers.count * 2 * queries * layers.query_width,
        "bytes_held": cache,
    }


def _table(*lines: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(lines)
    return table.astype({name: "float64" for name in table.columns if name != "part"})


def _target_forward(shape: Shape, step: Step) -> tuple[float, float, float]:
    """Operations forward and backward, and bytes moved, of the target without its LM head."""
    layers = shape.target
    assert layers is not None
    d, inner, q, kv = (
        layers.hidden_size,
        layers.intermediate_size,
        layers.query_width,
        layers.kv_width,
    )
    tokens, c = step.tokens, step.target_bytes
    products = _products(
        (tokens, d, q + 2 * kv), (tokens, q, d), (tokens, d, 2 * inner), (tokens, inner, d)
    )
    pairs = step.batch_size * _causal_pairs(layers, 0, step.seq_len)
    operations = layers.count * (products.operations + 4 * q * pairs)
    crossing = products.crossing + 2 * tokens * (q + kv)
    return operations, 0.0, layers.count * c * (products.weights + crossing)


def _causal_pairs(layers: Layers, context_length: int, tokens: int) -> float:
    """What the new tokens of one row see, themselves included, in a layer on average."""
    whole = tokens * context_length + tokens * (tokens + 1) / 2
    if not layers.sliding or layers.window is None:
        return whole
    sees = np.minimum(context_length + np.arange(1, tokens + 1), layers.window)
    share = layers.sliding / layers.count
    return share * float(sees.sum()) + (1 - share) * whole


def _runs(
    anchors: int, block_size: int
) -> tuple[Int[np.ndarray, " tile"], Int[np.ndarray, " tile"]]:
    """The first and the last block of each row of tiles."""
    queries = anchors * block_size
    first_query = np.arange(0, queries, TILE)
    last_query = np.minimum(first_query + TILE, queries) - 1
    return first_query // block_size, last_query // block_size


def _own_tiles(first: np.ndarray, last: np.ndarray, seq_len: int, block_size: int) -> int:
    """Tiles that hold a block's view of itself."""
    begin = (seq_len + first * block_size) // TILE
    past = -(-(seq_len + (last + 1) * block_size) // TILE)
    return int((past - begin).sum())


def _exceeds(
    rank: Int[np.ndarray, " rank"],
    drawn: int,
    candidates: int,
    positions: Int[np.ndarray, " position"],
) -> Float[np.ndarray, "rank position"]:
    """The probability that the j-th smallest of some positions drawn lies beyond each position.

    Of ``drawn`` out of ``0 .. candidates - 1`` without replacement, the number that lie at or below
    p is hypergeometric, and the j-th (from 0) lies beyond p where that number is at most j.
    """
    below = np.minimum(positions + 1, candidates)
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, candidates + 1)).cumsum()])

    def log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
        possible = (k >= 0) & (k <= n)
        k = np.where(possible, k, 0)
        return np.where(
            possible, log_factorial[n] - log_factorial[k] - log_factorial[n - k], -np.inf
        )

    # The number varies little: ten standard deviations (at most half the root of what is drawn) on
    # either side of its mean hold all but 1e-22 of it.
    reach = min(drawn, math.ceil(5 * math.sqrt(drawn)) + 2)
    first = np.maximum(np.round(drawn * below / candidates).astype(int) - reach, 0)
    some = first + np.arange(2 * reach + 1)[:, None]
    with np.errstate(invalid="ignore"):
        chance = np.exp(
            log_choose(np.broadcast_to(below, some.shape), some)
            + log_choose(np.broadcast_to(candidates - below, some.shape), drawn - some)
            - log_choose(np.array(candidates), np.array(drawn))
        )
    at_most = np.minimum(chance.cumsum(axis=0), 1.0)
    wanted = rank[:, None] - first
    inside = np.take_along_axis(at_most, np.clip(wanted, 0, 2 * reach), axis=0)
    return np.where(wanted < 0, 0.0, inside)


def _bytes_of(dtype: str) -> int:
    if dtype not in WIDTH:
        raise ValueError(f"dtype must be one of {tuple(WIDTH)}, got {dtype!r}")
    return WIDTH[dtype]
