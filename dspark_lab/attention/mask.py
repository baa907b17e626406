"""Attention of draft blocks to their context: the training mask's rule, its forms, its kernels.

The queries are the slots of all blocks of a row, block after block. The keys are the row's own
tokens, the *context*, followed by the same slots. This file knows where anchors stand and where
documents begin; it knows nothing about how anchors are drawn or what is predicted.

The rule (DSpark, section 3.1, after DFlash). A slot of block b sees exactly

    context prefix: the context tokens of the anchor's document before the anchor itself, and
    own block:      all slots of block b, earlier and later ones.

The anchor's token is not part of the context prefix: it enters through slot 0. A dummy block
(``block_keep_mask`` False) has an empty prefix and sees only itself, so that no row of the mask is
empty.

The rule is written once, in :func:`context_range` and :func:`training_mask_mod`. The dense mask
asks the latter at every pair; the tiles follow from the former in closed form.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from dspark_lab.attention.blockwise import blockwise_attention
from dspark_lab.checks import (
    debug_range,
    require_bool,
    require_int,
    require_integers,
    require_same_device,
    require_shape,
    require_tensor,
)

__all__ = [
    "block_attention",
    "context_range",
    "training_block_mask",
    "training_dense_mask",
    "training_mask_mod",
]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Backend = Literal["auto", "dense", "flex", "blockwise"]


def context_range(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
) -> tuple[Int[Tensor, "batch anchor"], Int[Tensor, "batch anchor"]]:
    """The context prefix of each block: context tokens ``start`` to ``end - 1``.

    The prefix begins where the anchor's document begins (0 without ``doc_ids``) and ends before the
    anchor; a dummy block's is empty, ``start == end == 0``.

    Args:
        anchor_positions: integers in ``[0, seq_len - 1]``, in any order.
        block_keep_mask: False for dummy anchors.
        seq_len: context tokens in a row.
        doc_ids: which document each context token belongs to, never falling along the row (see
            :func:`dspark_lab.common.context_doc_ids`); None where a row is one document.

    Returns:
        ``start`` and ``end``, long.

    Raises:
        TypeError, ValueError: wrong kind, rank, shape or device.
    """
    require_int("seq_len", seq_len, 0)
    require_tensor("anchor_positions", anchor_positions, ("batch", "anchor"))
    require_integers("anchor_positions", anchor_positions)
    batch, anchors = anchor_positions.shape
    require_shape("block_keep_mask", block_keep_mask, ("batch", "anchor"), (batch, anchors))
    require_bool("block_keep_mask", block_keep_mask)
    require_same_device(
        anchor_positions=anchor_positions, block_keep_mask=block_keep_mask, doc_ids=doc_ids
    )
    debug_range("anchor_positions", anchor_positions, 0, max(seq_len, 1))

    end = anchor_positions.long() * block_keep_mask
    if doc_ids is None:
        return torch.zeros_like(end), end
    require_shape("doc_ids", doc_ids, ("batch", "seq"), (batch, seq_len))
    require_integers("doc_ids", doc_ids)
    if seq_len == 0:
        return torch.zeros_like(end), end
    anchor_doc = doc_ids.gather(1, end)
    start = torch.searchsorted(doc_ids.contiguous(), anchor_doc) * block_keep_mask
    return start, end


def training_mask_mod(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    block_size: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
) -> MaskMod:
    """The rule as a function of (batch row, head, query, key), for FlexAttention.

    Args:
        anchor_positions, block_keep_mask, seq_len, doc_ids: see :func:`context_range`.
        block_size: slots per block.

    Raises:
        TypeError, ValueError: as :func:`context_range`, or ``block_size`` below 1.
    """
    require_int("block_size", block_size, 1)
    start, end = context_range(anchor_positions, block_keep_mask, seq_len=seq_len, doc_ids=doc_ids)
    return _mask_mod(start, end, seq_len, block_size)


def training_dense_mask(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    block_size: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
) -> Bool[Tensor, "batch query key"]:
    """The rule at every pair: True where a query sees a key.

    The shape is ``[batch, anchor * slot, seq_len + anchor * slot]``. It grows with queries times
    keys: it is for looking and for checking. Arguments and errors as :func:`training_mask_mod`.
    """
    visible = training_mask_mod(
        anchor_positions, block_keep_mask, seq_len=seq_len, block_size=block_size, doc_ids=doc_ids
    )
    batch, anchors = anchor_positions.shape
    queries = anchors * block_size
    device = anchor_positions.device
    row = torch.arange(batch, device=device).view(-1, 1, 1)
    query = torch.arange(queries, device=device).view(1, -1, 1)
    key = torch.arange(seq_len + queries, device=device).view(1, 1, -1)
    return visible(row, row, query, key)


def training_block_mask(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    block_size: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
    tile_size: int = 128,
) -> BlockMask:
    """The rule as FlexAttention's ``BlockMask``, the same as ``create_block_mask`` makes of it.

    ``create_block_mask`` asks the rule at every pair of query and key and then counts what each
    tile of ``tile_size`` x ``tile_size`` pairs holds. Here each tile's state (empty, partial, full)
    follows from the context ranges of the few blocks that its queries belong to, so time and memory
    grow with the number of tiles. Both directions of the tile lists are made: the backward pass
    reads the transposed one.

    Args:
        anchor_positions, block_keep_mask, seq_len, doc_ids: see :func:`context_range`.
        block_size: slots per block.
        tile_size: queries and keys per tile; compiled kernels want a multiple of 128 on most GPUs.

    Raises:
        TypeError, ValueError: as :func:`context_range`, or ``block_size`` or ``tile_size`` below 1.
    """
    require_int("block_size", block_size, 1)
    require_int("tile_size", tile_size, 1)
    start, end = context_range(anchor_positions, block_keep_mask, seq_len=seq_len, doc_ids=doc_ids)
    tiles = _classify_tiles(start, end, seq_len, block_size, tile_size)
    (kv_num, full_kv_num), (kv_indices, full_kv_indices) = _list_tiles(tiles)
    (q_num, full_q_num), (q_indices, full_q_indices) = _list_tiles(tiles.transpose(-1, -2))
    queries = anchor_positions.shape[1] * block_size
    return BlockMask(
        seq_lengths=(queries, seq_len + queries),
        kv_num_blocks=kv_num,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(tile_size, tile_size),
        mask_mod=_mask_mod(start, end, seq_len, block_size),
    )


def _mask_mod(
    start: Int[Tensor, "batch anchor"],
    end: Int[Tensor, "batch anchor"],
    seq_len: int,
    block_size: int,
) -> MaskMod:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        context_prefix = (key >= start[batch, block]) & (key < end[batch, block])
        own_block = (key >= seq_len) & ((key - seq_len) // block_size == block)
        return context_prefix | own_block

    return visible


def _classify_tiles(
    start: Int[Tensor, "batch anchor"],
    end: Int[Tensor, "batch anchor"],
    seq_len: int,
    block_size: int,
    tile_size: int,
) -> Bool[Tensor, "2 batch 1 query_tile key_tile"]:
    """Which tiles are partial (first) and which are full (second); the rest are empty.

    A tile's queries belong to a run of consecutive blocks. It is touched where one of these blocks
    sees one of its keys, and full where all of them see all of its keys. A tile that reaches past
    the last query or key is never full.
    """
    batch, anchors = start.shape
    queries = anchors * block_size
    keys = seq_len + queries
    device = start.device
    first_query = torch.arange(0, queries, tile_size, device=device)
    first_key = torch.arange(0, keys, tile_size, device=device)
    query_tiles, key_tiles = first_query.shape[0], first_key.shape[0]

    first_block = first_query // block_size
    last_block = ((first_query + tile_size).clamp(max=queries) - 1) // block_size
    most_blocks = (tile_size + block_size - 2) // block_size + 1
    run = first_block.unsqueeze(1) + torch.arange(most_blocks, device=device)
    # Short runs repeat their last block, which changes neither "one of" nor "all of".
    run = torch.minimum(run, last_block.unsqueeze(1))
    start, end = start[:, run], end[:, run]

    # A context prefix touches a run of key tiles and covers a run of them. Marking where each run
    # begins (+1) and ends (-1) and summing along the keys counts the blocks at every tile.
    begin = torch.stack([start // tile_size, -(-start // tile_size)])
    stop = torch.stack([-(-end // tile_size), end // tile_size])
    stop = torch.where(end > start, torch.maximum(begin, stop), begin)
    edges = begin.new_zeros((2, batch, query_tiles, key_tiles + 1), dtype=torch.int32)
    one = torch.ones_like(begin, dtype=torch.int32)
    edges = edges.scatter_add(-1, begin, one).scatter_add(-1, stop, -one)
    touching, covering = edges.cumsum(-1, dtype=torch.int32)[..., :-1]

    # The own blocks of a run are one run of keys; all queries see it only if they share one block.
    own_first = (seq_len + first_block * block_size).unsqueeze(1)
    own_past = (seq_len + (last_block + 1) * block_size).unsqueeze(1)
    own_touched = (first_key < own_past) & (first_key + tile_size > own_first)
    own_covered = (first_key >= own_first) & (first_key + tile_size <= own_past)
    own_covered &= (first_block == last_block).unsqueeze(1)

    touched = (touching > 0) | own_touched
    full = (covering == most_blocks) | own_covered
    full &= (first_query + tile_size <= queries).unsqueeze(1)
    return torch.stack([touched & ~full, full]).unsqueeze(2)


def _list_tiles(
    tiles: Bool[Tensor, "2 batch 1 row column"],
) -> tuple[Int[Tensor, "2 batch 1 row"], Int[Tensor, "2 batch 1 row column"]]:
    """How many tiles of each row are set, and the columns: set ones first, both parts ascending."""
    column = torch.arange(tiles.shape[-1], device=tiles.device, dtype=torch.int32)
    set_so_far = tiles.cumsum(-1, dtype=torch.int32)
    count = tiles.sum(-1, dtype=torch.int32)
    place = torch.where(tiles, set_so_far - 1, count.unsqueeze(-1) + column - set_so_far)
    columns = torch.empty_like(place).scatter(-1, place.long(), column.expand_as(place))
    return count, columns


def block_attention(
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    v: Float[Tensor, "batch kv_heads key head_dim"],
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    block_size: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    block_mask: BlockMask | None = None,
) -> Float[Tensor, "batch heads query head_dim"]:
    """Attention of every slot to what the training mask lets it see.

    Three back ends give the same result and the same gradients, up to rounding:

    - ``dense``: torch's SDPA with the dense mask, on any device;
    - ``flex``: FlexAttention with the closed-form block mask; the choice for GPUs. Compile the
      model around it; on the CPU it runs forward only, for inputs that need no gradient;
    - ``blockwise``: for the CPU; each group of blocks meets only its own context prefix and
      itself, and no mask of size queries times keys is ever formed. Computes in fp32 at least.

    Args:
        q: queries, the slots of all blocks, block after block.
        k, v: the context's ``seq_len`` keys and values, followed by those of the slots. Their
            number of heads divides that of ``q`` (grouped-query attention).
        anchor_positions, block_keep_mask, seq_len, doc_ids: see :func:`context_range`.
        block_size: slots per block.
        scale: factor on the scores; 1 / sqrt(head_dim) where None.
        backend: ``auto`` takes ``flex`` on CUDA and ``blockwise`` on the CPU.
        block_mask: for ``flex``, what :func:`training_block_mask` made of the same blocks, so that
            several layers share one; made here where None.

    Raises:
        TypeError, ValueError: as :func:`training_mask_mod`; ``q``, ``k``, ``v`` that do not fit
            each other or the blocks; an unknown back end, or one that cannot do what is asked.
    """
    require_int("block_size", block_size, 1)
    start, end = context_range(anchor_positions, block_keep_mask, seq_len=seq_len, doc_ids=doc_ids)
    _require_heads(q, k, v, start, seq_len, block_size)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    blocks: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size, "doc_ids": doc_ids}
    chosen: str = backend
    if backend == "auto":
        chosen = {"cuda": "flex", "cpu": "blockwise"}.get(q.device.type, "dense")

    if chosen == "dense":
        mask = training_dense_mask(anchor_positions, block_keep_mask, **blocks).unsqueeze(1)
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if chosen == "flex":
        if q.device.type == "cpu" and torch.is_grad_enabled() and _needs_grad(q, k, v):
            raise ValueError(
                "backend 'flex' has no backward pass on the CPU; use 'blockwise' or 'dense' there"
            )
        if block_mask is None:
            block_mask = training_block_mask(anchor_positions, block_keep_mask, **blocks)
        return flex_attention(
            q, k, v, block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if chosen == "blockwise":
        if q.device.type != "cpu":
            raise ValueError(f"backend 'blockwise' runs on the CPU, got tensors on {q.device}")
        return blockwise_attention(q, k, v, start, end, seq_len, block_size, float(scale))[0]
    raise ValueError(f"backend must be 'auto', 'dense', 'flex' or 'blockwise', got {backend!r}")


def _require_heads(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, seq_len: int, block_size: int
) -> None:
    batch, queries = start.shape[0], start.shape[1] * block_size
    require_tensor("q", q, ("batch", "heads", "query", "head_dim"))
    require_tensor("k", k, ("batch", "kv_heads", "key", "head_dim"))
    heads, head_dim = q.shape[1], q.shape[-1]
    kv_heads = k.shape[1]
    require_shape(
        "q", q, ("batch", "heads", "query", "head_dim"), (batch, heads, queries, head_dim)
    )
    key_axes = ("batch", "kv_heads", "key", "head_dim")
    for name, tensor in (("k", k), ("v", v)):
        require_shape(name, tensor, key_axes, (batch, kv_heads, seq_len + queries, head_dim))
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    if not q.is_floating_point():
        raise TypeError(f"q, k and v must hold floats, got {q.dtype}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of k and v must divide those of q, got {kv_heads} and {heads}")
    require_same_device(q=q, k=k, v=v, anchor_positions=start)


def _needs_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
