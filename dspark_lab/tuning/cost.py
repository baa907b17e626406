"""Operations and bytes of a training step, part by part.

An operation is a floating-point multiplication or addition inside a matrix product or attention, so
that a product of [m, k] and [k, n] takes 2 m k n, as in PyTorch's own counter. Elementwise work
(norms, RoPE, activations) is left out there and here, but for the objective's softmaxes and the
optimiser, whose lines say so (``counted`` False).

Attention is counted twice: by the pairs of query and key that the training mask shows, and by the
tiles of 128 x 128 pairs that hold one of them, which is what a kernel computes. With anchors drawn
uniformly both are expectations, in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.checks import Count, Share, checked
from dspark_lab.tuning.moments import StepBytes
from dspark_lab.tuning.shape import Layers, Shape
from dspark_lab.tuning.step import Dtype, Step

# Queries and keys of a tile of FlexAttention.
TILE = 128
# For each entry of a slot's two softmaxes: operations forward, on a drafter's logit (8), a target's
# (6) and on both (4), and for the gradient; and bytes, since such a number crosses memory 31
# times (read or written, no two operations fused).
_OBJECTIVE = (18, 5, 4 * 31)
# AdamW, for each weight: two moments (3 and 4), decay (1), the step (5), clipping (3); and bytes.
_OPTIMISER = (16, 0, 4 * 10)


@dataclass(frozen=True)
class AttentionWork:
    """Pairs of query and key that the mask shows, over all rows of a batch, for one head of one
    layer; ``tiled``, all pairs of the tiles that hold one of them."""

    pairs: float
    tiled: float


@checked
def expected_work(
    seq_len: Count,
    num_anchors: Count,
    block_size: Count,
    batch_size: Count = 1,
    window: Count | None = None,
    causal: bool = False,
) -> AttentionWork:
    """The expected work under the training mask, anchors drawn uniformly from one-document rows.

    Every position but the last is a candidate. A block at anchor a has ``block_size`` queries that
    see the a tokens before it and their own block; blocks beyond the candidates see themselves.
    ``window`` and ``causal`` are a layer's :class:`~dspark_lab.attention.View`. Under a window
    ``tiled`` holds every tile from the first to the last that a row of tiles needs: an upper bound
    where anchors stand further apart than the window is wide.
    """
    candidates = seq_len - 1
    kept = min(num_anchors, candidates)
    queries = num_anchors * block_size
    context = np.arange(max(candidates, 1))[:, None]
    if window is not None:
        context = np.minimum(context, np.maximum(window - 1 - np.arange(block_size), 0))
    own = block_size * (block_size + 1) / 2 if causal else block_size**2
    pairs = kept * float(np.broadcast_to(context, (len(context), block_size)).mean(0).sum())
    pairs += num_anchors * own
    # The first and the last block of each row of tiles.
    first_query = np.arange(0, queries, TILE)
    first = first_query // block_size
    last = (np.minimum(first_query + TILE, queries) - 1) // block_size
    # The last kept block of each run sees the most context, and its tiles are those of the run.
    deepest = np.minimum(last, kept - 1)
    reaches = np.zeros((len(first), 1))
    if kept:
        starts = np.arange(0, seq_len, TILE)
        reaches = _exceeds(deepest, kept, candidates, starts)
        if window is not None:
            # A tile that lies before the window of the run's first block is not needed.
            shallowest, behind = np.minimum(first, kept - 1), starts + TILE + window - 2
            reaches = np.maximum(reaches - _exceeds(shallowest, kept, candidates, behind), 0)
        reaches = reaches * (deepest >= first)[:, None]
    # Tiles that hold a block's view of itself.
    begin = (seq_len + first * block_size) // TILE
    last_seen = (last + 1) * block_size
    if causal:
        last_seen = np.minimum(first_query + TILE, queries)
    past = -(-(seq_len + last_seen) // TILE)
    tiles = reaches.sum() + (past - begin).sum()
    # Where context and slots meet in a tile, it is one tile, not two.
    border = seq_len // TILE
    if kept and seq_len % TILE:
        tiles -= reaches[begin == border, border].sum()
    return AttentionWork(batch_size * float(pairs), batch_size * float(tiles) * TILE**2)


@checked
def training_cost(
    shape: Shape,
    *,
    seq_len: Count | None = None,
    num_anchors: Count | None = None,
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
    """The cost of one training step on one micro-batch, part by part.

    Arguments as in :class:`~dspark_lab.tuning.Step`; sizes left out are the shape's own.

    Returns:
        a line per ``part``, in the order of the step: operations by the mask's true pairs and by
        its tiles (``tile_``; ``operations`` is their sum, which determines the time);
        ``bytes_moved``, every operand of every product once; ``bytes_held``, what the part saves
        for the backward pass, holds throughout (target, optimiser) or while it runs (objective);
        ``counted``, whether ``torch.utils.flop_counter`` knows such operations.
    """
    options = (dtype, features, target_dtype, objective, supervised, vocabulary, device)
    seq_len, block_size = seq_len or shape.seq_len, block_size or shape.block_size
    num_anchors = num_anchors or shape.num_anchors
    return step_cost(shape, Step(seq_len, num_anchors, block_size, batch_size, *options))


def step_cost(shape: Shape, step: Step) -> pd.DataFrame:
    """The table of :func:`training_cost` for a step."""
    held = StepBytes(shape, step)
    kept = held.kept()
    layers, c = shape.drafter, step.product_bytes
    work = _work_of_layers(shape, step)
    d, r, inner = layers.hidden_size, shape.markov_rank, layers.intermediate_size
    q, kv = layers.query_width, layers.kv_width
    slots, keys = step.slots, step.tokens + step.slots
    predicting = step.predicting_slots(shape)
    logits, vocab = float(step.counted_slots(shape)), step.vocabulary or shape.vocab_size
    own = min(vocab, shape.output_size)
    trained = shape.sizes.trained_parameters

    fc = _Products((step.tokens, shape.context_size, d))
    fc_backward = _backward(fc, input_needs_gradient=False)  # features are the frozen target's
    fc_moved = c * (2 * fc.crossing + fc.weights) + 4 * fc.weights
    projections = _Products((slots, d, q), (slots, q, d), (keys, d, 2 * kv))
    # Each row of tiles reads the keys and values that it touches, once for the heads that share
    # them; backward both directions do.
    read = 2 * work.tiled / TILE * kv
    attention = 4 * q * work.pairs
    # It makes the scores again, and then four gradients from them: five products to two.
    attention_backward = 2.5 * attention
    attention_moved = 3 * c * (2 * layers.count * slots * q + read)
    mlp = _Products((slots, d, 2 * inner), (slots, inner, d))
    head_weights = shape.sizes.latent_weights + shape.sizes.confidence_width
    heads = 2 * predicting * head_weights
    heads_moved = (2 * c + 4) * head_weights + 3 * c * predicting * (d + 3 * r)
    # The LM head is frozen; the matrix of the Markov bias has a gradient, and so have both inputs.
    lm_head = 2 * logits * (own * (d + r) + vocab * d)
    lm_backward = 2 * logits * own * (d + 2 * r)
    lm_moved = c * (2 * own * r + (own + vocab) * d + logits * (4 * d + 3 * r + 4 * own + vocab))
    lm_moved += 4 * own * r

    # Part, operations forward and backward, bytes moved and held.
    rows: list[tuple[Any, ...]] = [
        ("context projection", fc.operations, fc_backward, fc_moved, kept["context projection"]),
        _in_layers("attention projections", projections, step, layers, kept),
        ("attention", attention, attention_backward, attention_moved, kept["attention"]),
        _in_layers("MLP", mlp, step, layers, kept),
        ("heads", heads, 2 * heads, heads_moved, kept["heads"]),
        ("LM head", lm_head, lm_backward, lm_moved, c * own * d),
        ("objective", *(n * logits * vocab for n in _OBJECTIVE), held.logits()),
        ("optimiser", *(n * trained for n in _OPTIMISER), 16 * trained),
    ]
    if step.features == "live":
        rows.insert(0, _target_row(shape, step))
    part, *numbers = zip(*rows, strict=True)
    forward, backward, moved, bytes_held = np.array(numbers, dtype=float)
    tiles = np.where(np.equal(part, "attention"), work.tiled / work.pairs, 1.0)
    return pd.DataFrame(
        {
            "part": part,
            "forward": forward,
            "backward": backward,
            "tile_forward": forward * tiles,
            "tile_backward": backward * tiles,
            "operations": (forward + backward) * tiles,
            "bytes_moved": moved,
            "bytes_held": bytes_held,
            "counted": ~np.isin(part, ("objective", "optimiser")),
        }
    )


def _work_of_layers(shape: Shape, step: Step) -> AttentionWork:
    """The attention of one head in all layers of the drafter together."""
    pairs, tiled = 0.0, 0.0
    sizes = step.seq_len, step.num_anchors, step.block_size, step.batch_size
    views = shape.drafter_config().views
    for view in dict.fromkeys(views):
        work = expected_work(*sizes, view.window, view.causal)
        pairs += views.count(view) * work.pairs
        tiled += views.count(view) * work.tiled
    return AttentionWork(pairs, tiled)


class _Products:
    """Matrix products by rows, inputs and outputs; ``crossing``: numbers that go in or come out."""

    def __init__(self, *sizes: tuple[int, int, int]) -> None:
        self.operations = 2.0 * sum(rows * inputs * outputs for rows, inputs, outputs in sizes)
        self.weights = sum(inputs * outputs for _, inputs, outputs in sizes)
        self.crossing = sum(rows * (inputs + outputs) for rows, inputs, outputs in sizes)


def _backward(products: _Products, *, input_needs_gradient: bool) -> float:
    """Operations of the gradients of the weights, and of the inputs where these need one."""
    return products.operations * (2 if input_needs_gradient else 1)


def _in_layers(
    part: str, products: _Products, step: Step, layers: Layers, kept: dict[str, Any]
) -> tuple[str, float, float, float, float]:
    """The row of products in every layer of the drafter."""
    c, count = step.product_bytes, layers.count
    moved = 3 * c * products.crossing + (2 * c + 4) * products.weights
    backward = _backward(products, input_needs_gradient=True)
    return part, count * products.operations, count * backward, count * moved, kept[part]


def _target_row(shape: Shape, step: Step) -> tuple[str, float, float, float, float]:
    layers, tokens = shape.target, step.tokens
    assert layers is not None
    d, inner = layers.hidden_size, layers.intermediate_size
    q, kv = layers.query_width, layers.kv_width
    products = _Products(
        (tokens, d, q + 2 * kv), (tokens, q, d), (tokens, d, 2 * inner), (tokens, inner, d)
    )
    pairs = step.batch_size * _causal_pairs(layers, step.seq_len)
    forward = layers.count * (products.operations + 4 * q * pairs)
    crossing = products.crossing + 2 * tokens * (q + kv)
    moved = layers.count * step.target_bytes * (products.weights + crossing)
    return "target forward", forward, 0.0, moved, shape.target_parameters * step.target_bytes


def _causal_pairs(layers: Layers, tokens: int) -> float:
    """Tokens that the tokens of one row see, themselves included, in a layer on average."""
    whole = tokens * (tokens + 1) / 2
    if not layers.sliding or layers.window is None:
        return whole
    sees = np.minimum(np.arange(1, tokens + 1), layers.window)
    share = layers.sliding / layers.count
    return share * float(sees.sum()) + (1 - share) * whole


def _exceeds(
    rank: Int[np.ndarray, " rank"],
    drawn: int,
    candidates: int,
    positions: Int[np.ndarray, " position"],
) -> Float[np.ndarray, "rank position"]:
    """The probability that the j-th smallest of the drawn anchors lies beyond each position.

    Of ``drawn`` out of ``0 .. candidates - 1`` without replacement, the number at or below position
    p is hypergeometric, and the j-th (from 0) lies beyond p where that number is at most j.
    """
    below = np.minimum(positions + 1, candidates)
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, candidates + 1)).cumsum()])

    def log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
        possible = (k >= 0) & (k <= n)
        k = np.where(possible, k, 0)
        logs = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
        return np.where(possible, logs, -np.inf)

    # Ten standard deviations (each at most half the root of ``drawn``) on either side of the mean
    # hold all but 1e-22 of the distribution.
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
