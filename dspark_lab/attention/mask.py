"""The training mask: one rule and its three forms.

The queries are the slots of all blocks of a row, block after block. The keys are the row's own
tokens, the *context*, followed by the same slots. The rule (DSpark, section 3.1, after DFlash): a
slot of block b sees exactly

    context prefix: the context tokens of the anchor's document before the anchor itself, and
    own block:      all slots of block b, earlier and later ones.

Two variants that layers may have (:class:`View`): under a sliding *window*, slot k of the block at
anchor a sees of its prefix only the tokens j with a + k - j < window; a *causal* layer's slot sees
of its block no later slot.

The anchor's own token enters through slot 0. A dummy block (``block_keep_mask`` False) has an empty
prefix and sees only itself, so that no row of the mask is empty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.blocks import Blocks
from dspark_lab.checks import BlockSize, Count, SeqLen, Size, checked, debug_range

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@checked
@dataclass(frozen=True)
class View:
    """What a layer's slots see: of the context a window (None: all), of their block no later slot.

    The defaults are the rule.
    """

    window: Count | None = None
    causal: bool = False


FULL = View()


@checked
@dataclass(frozen=True, eq=False)
class ContextRanges:
    """The context prefix of each block: context tokens ``start`` to ``end - 1``, both long."""

    start: Int[Tensor, "batch anchor"]
    end: Int[Tensor, "batch anchor"]
    seq_len: Size
    block_size: Count
    view: View = FULL

    @classmethod
    @checked
    def of(cls, blocks: Blocks, view: View = FULL) -> "ContextRanges":
        return context_ranges(
            blocks.anchor_positions,
            blocks.block_keep_mask,
            seq_len=blocks.seq_len,
            block_size=blocks.block_size,
            doc_ids=blocks.doc_ids,
            window=view.window,
            causal=view.causal,
        )

    @property
    def slot_start(self) -> Int[Tensor, "batch query"]:
        """The first context token that each slot sees, ``end`` or later where it sees none."""
        start = self.start.unsqueeze(2).expand(-1, -1, self.block_size)
        if self.view.window is not None:
            slot = torch.arange(self.block_size, device=start.device)
            start = start.maximum(self.end.unsqueeze(2) + slot + 1 - self.view.window)
        return start.flatten(1)

    @property
    def queries(self) -> int:
        return self.start.shape[1] * self.block_size

    @property
    def keys(self) -> int:
        return self.seq_len + self.queries


@checked
def context_ranges(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: SeqLen,
    block_size: BlockSize,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
    window: Count | None = None,
    causal: bool = False,
) -> ContextRanges:
    """The context prefix of each block.

    It begins where the anchor's document begins (at 0 without ``doc_ids``) and ends before the
    anchor; a dummy block's is empty, ``start == end == 0``. Anchors may be in any order;
    ``doc_ids`` never fall along the row (see :func:`dspark_lab.common.context_doc_ids`).
    """
    debug_range("anchor_positions", anchor_positions, 0, max(seq_len, 1))
    end = anchor_positions.long() * block_keep_mask
    if doc_ids is None or seq_len == 0:
        start = torch.zeros_like(end)
    else:
        start = document_starts(doc_ids, end) * block_keep_mask
    return ContextRanges(start, end, seq_len, block_size, View(window, causal))


def document_starts(doc_ids: Tensor, positions: Tensor) -> Tensor:
    """Where the document of the token at each position begins."""
    return torch.searchsorted(doc_ids.contiguous(), doc_ids.gather(1, positions))


def in_context_prefix(key: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Whether a key is one of the context tokens ``start`` to ``end - 1``."""
    return (key >= start) & (key < end)


def in_own_block(key: Tensor, first: Tensor, past: Tensor) -> Tensor:
    """Whether a key is one of the slots ``first`` to ``past - 1``."""
    return (key >= first) & (key < past)


@checked
def mask_mod(ranges: ContextRanges) -> MaskMod:
    """The rule as a function of (batch row, head, query, key), for FlexAttention."""
    start, end = ranges.slot_start, ranges.end
    # Sizes are in tensors, of each query: for numbers, such as the row's length, a kernel would be
    # compiled anew.
    number = torch.arange(ranges.queries, device=start.device) // ranges.block_size
    first = number * ranges.block_size + ranges.seq_len
    past = first + ranges.block_size
    if ranges.view.causal:
        past = ranges.seq_len + torch.arange(ranges.queries, device=start.device) + 1

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        context_prefix = in_context_prefix(key, start[batch, query], end[batch, number[query]])
        return context_prefix | in_own_block(key, first[query], past[query])

    return visible


@checked
def dense_mask(ranges: ContextRanges) -> Bool[Tensor, "batch query key"]:
    """The rule at every pair: True where a query sees a key. For looking and for checking."""
    device = ranges.start.device
    row = torch.arange(ranges.start.shape[0], device=device).view(-1, 1, 1)
    query = torch.arange(ranges.queries, device=device).view(1, -1, 1)
    key = torch.arange(ranges.keys, device=device).view(1, 1, -1)
    return mask_mod(ranges)(row, row, query, key)


@checked
def block_mask(ranges: ContextRanges, tile_size: Count = 128) -> BlockMask:
    """The rule as FlexAttention's ``BlockMask``, the same as ``create_block_mask`` makes of it.

    ``create_block_mask`` asks the rule at every pair. Here a tile's state (empty, partial, full)
    follows from the context ranges of the few blocks that its queries belong to, so time and memory
    grow with the number of tiles.
    """
    tiles = _classify_tiles(ranges, tile_size)
    (kv_num, full_kv_num), (kv_indices, full_kv_indices) = _list_tiles(tiles)
    (q_num, full_q_num), (q_indices, full_q_indices) = _list_tiles(tiles.transpose(-1, -2))
    return BlockMask(
        seq_lengths=(ranges.queries, ranges.keys),
        kv_num_blocks=kv_num,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(tile_size, tile_size),
        mask_mod=mask_mod(ranges),
    )


def training_mask_mod(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    block_size: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
    window: int | None = None,
    causal: bool = False,
) -> MaskMod:
    """:func:`mask_mod` of :func:`context_ranges`."""
    sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size}
    sizes |= {"window": window, "causal": causal}
    ranges = context_ranges(anchor_positions, block_keep_mask, doc_ids=doc_ids, **sizes)
    return mask_mod(ranges)


def training_dense_mask(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    block_size: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
    window: int | None = None,
    causal: bool = False,
) -> Bool[Tensor, "batch query key"]:
    """:func:`dense_mask` of :func:`context_ranges`."""
    sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size}
    sizes |= {"window": window, "causal": causal}
    ranges = context_ranges(anchor_positions, block_keep_mask, doc_ids=doc_ids, **sizes)
    return dense_mask(ranges)


def training_block_mask(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    block_size: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
    window: int | None = None,
    causal: bool = False,
    tile_size: int = 128,
) -> BlockMask:
    """:func:`block_mask` of :func:`context_ranges`; most GPUs want multiples of 128 as tiles."""
    sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size}
    sizes |= {"window": window, "causal": causal}
    ranges = context_ranges(anchor_positions, block_keep_mask, doc_ids=doc_ids, **sizes)
    return block_mask(ranges, tile_size)


def _classify_tiles(
    ranges: ContextRanges, tile_size: int
) -> Bool[Tensor, "2 batch 1 query_tile key_tile"]:
    """Which tiles are partial (first) and which are full (second); the rest are empty."""
    # A tile's queries belong to a run of consecutive blocks. It is full where all of these blocks
    # see all of its keys; a tile that reaches past the last query or key never is.
    queries, seq_len, block_size = ranges.queries, ranges.seq_len, ranges.block_size
    device = ranges.start.device
    first_query = torch.arange(0, queries, tile_size, device=device)
    first_key = torch.arange(0, ranges.keys, tile_size, device=device)

    first_block = first_query // block_size
    last_block = ((first_query + tile_size).clamp(max=queries) - 1) // block_size
    most_blocks = (tile_size + block_size - 2) // block_size + 1
    run = first_block.unsqueeze(1) + torch.arange(most_blocks, device=device)
    # Short runs repeat their last block, which changes neither "one of" nor "all of".
    run = torch.minimum(run, last_block.unsqueeze(1))

    # Of a block's queries in the tile the first sees most of the context, the last least.
    starts, end = ranges.start[:, run], ranges.end[:, run]
    least = starts
    if ranges.view.window is not None:
        slots = first_query.unsqueeze(1) - run * block_size
        first_slot, last_slot = slots.clamp(min=0), (slots + tile_size).clamp(max=block_size) - 1
        least = starts.maximum(end + last_slot + 1 - ranges.view.window)
        starts = starts.maximum(end + first_slot + 1 - ranges.view.window)

    # Marking where each run of tiles begins (+1) and stops (-1) and summing along the keys counts
    # the blocks that touch and that cover every tile.
    begin, stop = tiles_of_ranges(starts, least, end, tile_size)
    edges = begin.new_zeros((*begin.shape[:-1], first_key.shape[0] + 1), dtype=torch.int32)
    one = torch.ones_like(begin, dtype=torch.int32)
    edges = edges.scatter_add(-1, begin, one).scatter_add(-1, stop, -one)
    touching, covering = edges.cumsum(-1, dtype=torch.int32)[..., :-1]

    # The own blocks of a run are one run of keys; all queries see it only if they share one block,
    # and in a causal block only up to the first of them.
    own_first = (seq_len + first_block * block_size).unsqueeze(1)
    own_past = (seq_len + (last_block + 1) * block_size).unsqueeze(1)
    all_past = own_past
    if ranges.view.causal:
        own_past = (seq_len + (first_query + tile_size).clamp(max=queries)).unsqueeze(1)
        all_past = (seq_len + first_query + 1).unsqueeze(1)
    own_touched = (first_key < own_past) & (first_key + tile_size > own_first)
    own_covered = (first_key >= own_first) & (first_key + tile_size <= all_past)
    own_covered &= (first_block == last_block).unsqueeze(1)

    touched = (touching > 0) | own_touched
    full = (covering == most_blocks) | own_covered
    full &= (first_query + tile_size <= queries).unsqueeze(1)
    return torch.stack([touched & ~full, full]).unsqueeze(2)


def tiles_of_ranges(
    touched: Tensor, covered: Tensor, end: Tensor, tile_size: int
) -> tuple[Tensor, Tensor]:
    """The first tile of keys that ranges touch, and cover, and past the last; equal if none.

    The ranges to touch begin at ``touched``, those to cover at ``covered``.
    """
    begin = torch.stack([touched // tile_size, -(-covered // tile_size)])
    stop = torch.stack([-(-end // tile_size), end // tile_size])
    visible = end > torch.stack([touched, covered])
    return begin, torch.where(visible, torch.maximum(begin, stop), begin)


def _list_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and the columns: set ones first, both parts ascending."""
    # A sort says the same in one line, but takes a fifth longer where the mask is compiled.
    column = torch.arange(tiles.shape[-1], device=tiles.device, dtype=torch.int32)
    set_so_far = tiles.cumsum(-1, dtype=torch.int32)
    count = tiles.sum(-1, dtype=torch.int32)
    place = torch.where(tiles, set_so_far - 1, count.unsqueeze(-1) + column - set_so_far)
    return count, torch.empty_like(place).scatter(-1, place.long(), column.expand_as(place))
