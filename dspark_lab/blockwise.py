"""Block attention on the CPU that does only the work the training mask keeps.

A dense kernel multiplies every slot with every key and throws most of it away. Here consecutive
blocks are taken in small groups: a group meets the context tokens that any of its blocks can see,
and each block meets itself. The two parts are normalised each on its own and then joined by the
share of the weight that falls on either, as if one softmax had run over both. Scores exist for one
group and a few heads at a time, so memory does not grow with queries times keys.

This file knows context ranges (``start``, ``end`` of each block's prefix), not anchors; the rule
they come from is in ``dspark_lab.attention``. It is one opaque operator for the compiler, because
the ranges decide the sizes of the products and are read on the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Queries of one group, and heads at a time: few enough that the anchors of a group lie close
# together and the scores stay in the cache, many enough for efficient matrix products.
GROUP_QUERIES = 32
HEADS = 5


@dataclass(frozen=True)
class Group:
    """Consecutive blocks' queries, and the context ``lo`` to ``hi - 1`` that any of them sees.

    ``hidden`` marks, for the last ``hidden.shape[1]`` tokens of that context, what a query does not
    see; the tokens before them are seen by all. The context is never empty, but may be all hidden.
    """

    queries: slice
    lo: int
    hi: int
    hidden: Tensor


@dataclass(frozen=True)
class Piece:
    """What a group meets in a few heads; ``share`` of a query's weight falls on the context.

    ``query`` is scaled, ``[kv_head, rows, head_dim]`` where rows are the queries of all heads that
    share a key head; ``weights`` is ``[kv_head, rows, context]`` and ``own_weights``
    ``[kv_head, repeats, block, slot, slot]``, each normalised on its own.
    """

    query: Tensor
    weights: Tensor
    own_weights: Tensor
    share: Tensor


@torch.library.custom_op("dspark_lab::blockwise_attention", mutates_args=(), device_types="cpu")
def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    seq_len: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """See :func:`dspark_lab.attention.block_attention`; shapes are checked there.

    Args:
        q: ``[batch, heads, anchor * slot, head_dim]``.
        k, v: ``[batch, kv_heads, seq_len + anchor * slot, head_dim]``.
        start, end: ``[batch, anchor]``, long; the context prefix of each block.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    shared_out = _by_kv_head(out, k)
    shared_q = _by_kv_head(q, k)
    for row, group, heads in _steps(k, start, end, block_size):
        context, own = _keys(group, seq_len)
        query = shared_q[row, heads, :, group.queries]
        piece = _piece(group, query, k[row, heads, context], k[row, heads, own], block_size, scale)
        on_context = piece.weights @ _working(v[row, heads, context])
        own_value = _blocks(_working(v[row, heads, own]).unsqueeze(1), block_size)
        on_own = (piece.own_weights @ own_value).reshape(on_context.shape)
        joined = torch.lerp(on_own, on_context, piece.share)
        shared_out[row, heads, :, group.queries] = joined.reshape(query.shape).to(q.dtype)
    return out


@torch.library.custom_op(
    "dspark_lab::blockwise_attention_backward", mutates_args=(), device_types="cpu"
)
def _backward(
    d_out: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    seq_len: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for ``q``, ``k`` and ``v``; weights are computed again, not kept."""
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = (torch.zeros(x.shape, dtype=_working_dtype(x)) for x in (k, v))
    shared_q, shared_d_q = _by_kv_head(q, k), _by_kv_head(d_q, k)
    shared_out, shared_d_out = _by_kv_head(out, k), _by_kv_head(d_out, k)
    for row, group, heads in _steps(k, start, end, block_size):
        context, own = _keys(group, seq_len)
        query = shared_q[row, heads, :, group.queries]
        key, value = _working(k[row, heads, context]), _working(v[row, heads, context])
        piece = _piece(group, query, key, k[row, heads, own], block_size, scale)
        share = piece.share
        grad = _working(shared_d_out[row, heads, :, group.queries]).flatten(1, 2)
        mean = (grad * shared_out[row, heads, :, group.queries].flatten(1, 2)).sum(-1, keepdim=True)

        # A softmax's gradient: weights * (their gradient - its mean under the weights).
        d_scores = torch.bmm(grad, value.mT).sub_(mean).mul_(piece.weights)
        d_query = torch.bmm(d_scores, key).mul_(share)
        d_k[row, heads, context].baddbmm_(d_scores.mT, piece.query * share)
        d_v[row, heads, context].baddbmm_(piece.weights.mT, grad * share)

        def blocks(x: Tensor, rows: torch.Size = query.shape[1:3]) -> Tensor:
            return _blocks(x.unflatten(1, rows), block_size)

        own_key, own_value = (
            _blocks(_working(x[row, heads, own]).unsqueeze(1), block_size) for x in (k, v)
        )
        own_weights = piece.own_weights * blocks(1 - share)
        d_own = (blocks(grad) @ own_value.mT).sub_(blocks(mean)).mul_(own_weights)
        d_query += (d_own @ own_key).reshape(d_query.shape)
        own_shape = own_key.squeeze(1).flatten(1, 2).shape
        d_k[row, heads, own] += (d_own.mT @ blocks(piece.query)).sum(1).reshape(own_shape)
        d_v[row, heads, own] += (own_weights.mT @ blocks(grad)).sum(1).reshape(own_shape)
        shared_d_q[row, heads, :, group.queries] = d_query.mul_(scale).reshape(query.shape)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


def _steps(
    k: Tensor, start: Tensor, end: Tensor, block_size: int
) -> Iterator[tuple[int, Group, slice]]:
    """Every row, every group of its blocks, a few key heads at a time."""
    kv_heads = k.shape[1]
    pieces = -(-kv_heads // HEADS)
    for row in range(k.shape[0]):
        for group in _groups(start[row], end[row], block_size):
            for piece in range(pieces):
                yield (
                    row,
                    group,
                    slice(piece * kv_heads // pieces, (piece + 1) * kv_heads // pieces),
                )


def _groups(start: Tensor, end: Tensor, block_size: int) -> Iterator[Group]:
    """Cut a row's blocks into groups; ``start`` and ``end`` are ``[anchor]``."""
    per_group = max(1, GROUP_QUERIES // block_size)
    starts, ends = start.tolist(), end.tolist()
    for first in range(0, len(starts), per_group):
        blocks = slice(first, min(first + per_group, len(starts)))
        lo = min(starts[blocks])
        hi = max(lo + 1, *ends[blocks])
        same_start = lo == max(starts[blocks])
        token = torch.arange(min(ends[blocks]) if same_start else lo, hi)
        hidden = (token < start[blocks].unsqueeze(1)) | (token >= end[blocks].unsqueeze(1))
        queries = slice(blocks.start * block_size, blocks.stop * block_size)
        yield Group(queries, lo, hi, hidden.repeat_interleave(block_size, dim=0))


def _keys(group: Group, seq_len: int) -> tuple[slice, slice]:
    """Where the keys of a group's context and of its own blocks are."""
    own = slice(seq_len + group.queries.start, seq_len + group.queries.stop)
    return slice(group.lo, group.hi), own


def _piece(
    group: Group, query: Tensor, key: Tensor, own_key: Tensor, block_size: int, scale: float
) -> Piece:
    """The weights of a group's queries, ``[kv_head, repeats, query, head_dim]``."""
    repeats = query.shape[1]
    query = (_working(query) * scale).flatten(1, 2)
    scores = torch.bmm(query, _working(key).mT)
    by_query = scores.unflatten(1, (repeats, -1))
    ragged = group.hidden.shape[1]
    # Not -inf: a query that sees no context keeps finite weights there, which its share of 0 drops.
    nothing = torch.finfo(scores.dtype).min / 2
    by_query[..., by_query.shape[-1] - ragged :].masked_fill_(group.hidden, nothing)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1, out=scores)
    log_sum = largest - weights.amax(-1, keepdim=True).log()

    own_query = _blocks(query.unflatten(1, (repeats, -1)), block_size)
    own_scores = own_query @ _blocks(_working(own_key).unsqueeze(1), block_size).mT
    own_log_sum = own_scores.logsumexp(-1).reshape(log_sum.shape)
    share = torch.sigmoid(log_sum - own_log_sum)
    return Piece(query, weights, own_scores.softmax(-1), share)


def _by_kv_head(x: Tensor, k: Tensor) -> Tensor:
    """``[batch, heads, ...]`` with an axis of its own for the heads that share a key head."""
    return x.unflatten(1, (k.shape[1], -1))


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """``[..., slots of all blocks, features]`` with the blocks on an axis of their own."""
    return x.unflatten(-2, (-1, block_size))


def _working(x: Tensor) -> Tensor:
    return x.to(_working_dtype(x))


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@blockwise_attention.register_fake
def _(q, k, v, start, end, seq_len, block_size, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(d_out, out, q, k, v, start, end, seq_len, block_size, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:5])
    ctx.sizes = inputs[5:]


def _differentiate(ctx: Any, d_out: Tensor) -> tuple:
    gradients = _backward(d_out, *ctx.saved_tensors, *ctx.sizes)
    return (*gradients, None, None, None, None, None)


blockwise_attention.register_autograd(_differentiate, setup_context=_save)
