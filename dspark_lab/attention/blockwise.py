"""Block attention on the CPU that does only the work the training mask keeps.

Torch's own fused kernel is called on pieces: a few consecutive blocks against keys that they see.
With its output the kernel returns the logarithm of the sum that its softmax divides by, and from
these the pieces are joined as if one softmax had run over all. Given the joined output and
logarithm, the kernel's backward pass yields each piece's part of the gradient.

It is one opaque operator for the compiler, because the context ranges decide the sizes of the
pieces and are read on the host.
"""

from collections.abc import Iterator
from typing import Any

import torch
from numpy import s_
from torch import Tensor

Index = tuple[Any, ...]

# The most queries and keys of a piece. Forward it has few queries, so that their anchors lie close
# together and little of its keys is hidden from some; backward, the keys are cut instead.
FORWARD, BACKWARD = (96, 2048), (128, 128)
# Among their own slots, the blocks of a piece see 1 / blocks of the pairs, so a piece has few.
OWN_QUERIES = 48

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.library.custom_op("dspark_lab::blockwise_attention", mutates_args=(), device_types="cpu")
def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    seq_len: int,
    block_size: int,
    window: int | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The attention, and the logarithm of the sum that each query's softmax divides by.

    ``ranges`` are the starts and ends of the blocks' context prefixes, ``[2, batch, anchor]``.
    """
    query, key, value = _split(q, k), _share(k, q), _share(v, q)
    out = torch.zeros(q.shape, dtype=query.dtype)
    log_sum = torch.full(q.shape[:-1], -torch.inf, dtype=query.dtype)
    results, sums = _split(out, k), _split(log_sum, k)
    for slots, keys, bias in _pieces(
        ranges, seq_len, block_size, window, causal, FORWARD, query.dtype
    ):
        seen, seen_sum = _kernel(query[slots], key[keys], value[keys], attn_mask=bias, scale=scale)
        joined_sum = torch.logaddexp(sums[slots], seen_sum)
        share = seen_sum.sub_(joined_sum).exp_().unsqueeze(-1)
        results[slots].lerp_(seen, share)
        sums[slots] = joined_sum
    return out.to(q.dtype), log_sum


@torch.library.custom_op(
    "dspark_lab::blockwise_attention_backward", mutates_args=(), device_types="cpu"
)
def _backward(
    d_out: Tensor,
    out: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    seq_len: int,
    block_size: int,
    window: int | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for ``q``, ``k`` and ``v``; weights are computed again, not kept."""
    query, key, value = _split(q, k), _share(k, q), _share(v, q)
    # The kernel wants its sums as it returns them, heads next to each other in memory.
    sums = _split(log_sum.transpose(1, 2).contiguous().transpose(1, 2), k)
    result, d_result = _split(out, k), _split(d_out, k)
    d_query, d_key, d_value = (torch.zeros(x.shape, dtype=query.dtype) for x in (q, k, v))
    d_queries = _split(d_query, k)
    for slots, keys, bias in _pieces(
        ranges, seq_len, block_size, window, causal, BACKWARD, query.dtype
    ):
        piece = d_result[slots], query[slots], key[keys], value[keys], result[slots], sums[slots]
        query_part, key_part, value_part = _kernel_backward(
            *piece, 0.0, False, attn_mask=bias, scale=scale
        )
        d_queries[slots] += query_part
        for gradient, part in ((d_key, key_part), (d_value, value_part)):
            for head_part in part.unbind(1):
                gradient[keys] += head_part
        # Freed before the next piece makes its own.
        del query_part, key_part, value_part, part, head_part
    return d_query.to(q.dtype), d_key.to(k.dtype), d_value.to(v.dtype)


def _pieces(
    ranges: Tensor,
    seq_len: int,
    block_size: int,
    window: int | None,
    causal: bool,
    most: tuple[int, int],
    dtype: torch.dtype,
) -> Iterator[tuple[Index, Index, Tensor | None]]:
    """Cut the mask of each batch row into pieces that hold all that is visible.

    Yields where the slots are, where the keys are, and the bias; None where all is visible.
    """
    most_queries, most_keys = most
    own = max(1, OWN_QUERIES // block_size)
    slot = torch.arange(own * block_size)
    outside = (slot.unsqueeze(1) // block_size) != (slot // block_size)
    if causal:
        outside |= slot > slot.unsqueeze(1)
    apart = _bias(outside, dtype)
    for row, (start, end) in enumerate(ranges.unbind(1)):
        start = start.unsqueeze(1)
        if window is not None:
            start = start.maximum(end.unsqueeze(1) + torch.arange(block_size) + 1 - window)
        starts, least, ends = start[:, 0].tolist(), start[:, -1].tolist(), end.tolist()
        for blocks in _runs(len(starts), own):
            slots = _slots(blocks, block_size)
            keys = slice(seq_len + slots.start, seq_len + slots.stop)
            size = slots.stop - slots.start
            hides = size > block_size or causal
            bias = apart[..., :size, :size].contiguous() if hides else None
            yield s_[row, :, :, slots], s_[row, ..., keys, :], bias

        for blocks in _runs(len(starts), max(1, most_queries // block_size)):
            lo, hi = min(starts[blocks]), max(ends[blocks])
            for first in range(lo, hi, most_keys):
                past = min(first + most_keys, hi)
                seeing = [
                    block
                    for block in range(blocks.start, blocks.stop)
                    if starts[block] < past and ends[block] > first
                ]
                if not seeing:
                    continue
                some = slice(seeing[0], seeing[-1] + 1)
                bias = None
                if max(least[some]) > first or min(ends[some]) < past:
                    token = torch.arange(first, past)
                    hidden = token < start[some].unsqueeze(2)
                    hidden = hidden | (token >= end[some].view(-1, 1, 1))
                    hidden = hidden.expand(-1, block_size, -1).flatten(0, 1)
                    bias = _bias(hidden, dtype)
                yield s_[row, :, :, _slots(some, block_size)], s_[row, ..., first:past, :], bias


def _runs(count: int, length: int) -> list[slice]:
    return [slice(first, min(first + length, count)) for first in range(0, count, length)]


def _slots(blocks: slice, block_size: int) -> slice:
    return slice(blocks.start * block_size, blocks.stop * block_size)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers to add to each slot's scores: very low where ``hidden``, ``[slot, key]``."""
    # Not -inf, so that a query that sees nothing of a piece has a result there, of no weight.
    return hidden.to(dtype).mul_(torch.finfo(dtype).min / 2)[None, None]


def _split(x: Tensor, k: Tensor) -> Tensor:
    """``[batch, heads, ...]`` as the kernel gets it, ``[batch, kv_head, repeat, ...]``."""
    return _working(x).unflatten(1, (k.shape[1], -1))


def _share(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with an axis, ``repeat``, for the query heads that share them."""
    return _working(x).unsqueeze(2).expand(-1, -1, q.shape[1] // x.shape[1], -1, -1)


def _working(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is that already, with the features contiguous in memory."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if x.dim() < 4 or x.stride(-1) == 1 else x.contiguous()


@blockwise_attention.register_fake
def _(q, k, v, ranges, seq_len, block_size, window, causal, scale):
    return q.new_empty(q.shape), _working(q).new_empty(q.shape[:-1])


@_backward.register_fake
def _(d_out, out, log_sum, q, k, v, ranges, seq_len, block_size, window, causal, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:4])
    ctx.sizes = inputs[4:]


def _differentiate(ctx: Any, d_out: Tensor, _d_log_sum: Tensor) -> tuple:
    gradients = _backward(d_out, *ctx.saved_tensors, *ctx.sizes)
    return (*gradients, *(None,) * 6)


blockwise_attention.register_autograd(_differentiate, setup_context=_save)
