"""Everything that the pictures show, as tables.

Each function returns a pandas DataFrame, or the small tensor that one is counted from; a plot, a
widget or a test reads its numbers. There is no other place where what is shown is worked out. This
file knows tokenizers only as things that turn an id into text.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention import context_range, training_block_mask, training_dense_mask
from dspark_lab.blocks import Blocks, times_supervised
from dspark_lab.chats import Batch
from dspark_lab.common import build_anchor_candidate_mask, context_doc_ids
from dspark_lab.tuning import token_coverage

__all__ = [
    "REGIONS",
    "TILE_STATES",
    "TOKEN_STATES",
    "block_table",
    "mask_regions",
    "mask_table",
    "slot_inputs",
    "sorting_table",
    "tile_states",
    "tile_table",
    "token_table",
]

TOKEN_STATES = ("prompt", "not covered", "covered", "never a label", "padding")
REGIONS = ("hidden", "context prefix", "own block", "dummy block")
TILE_STATES = ("empty", "partial", "full")


def token_table(
    batch: Batch, blocks: Blocks, to_text: Callable[[int], str], *, row: int = 0
) -> pd.DataFrame:
    """What each token of one row is, before and after a draw of blocks.

    Args:
        batch: the rows.
        blocks: a draw of blocks on them.
        to_text: one token id to its text, such as ``lambda i: tokenizer.decode([i])``.
        row: which row.

    Returns:
        one line per token: ``position`` in the row, ``document`` (-1 on padding), ``token_id``,
        ``text``, ``supervised``, ``candidate``, ``anchor``, ``times_supervised`` by this draw,
        ``p_covered`` (probability that a draw of as many anchors covers it) and ``state``, one of
        ``TOKEN_STATES``; *never a label* is supervised but first of its run: no anchor reaches it.

    Raises:
        TypeError, ValueError: ``row`` is not one of the batch's rows.
    """
    one = batch.row(row)
    seq_len = one.input_ids.shape[1]
    num_anchors, block_size = blocks.eval_mask.shape[1:]
    candidates = build_anchor_candidate_mask(seq_len, one.loss_mask, one.doc_remaining)[0]
    candidate = torch.nn.functional.pad(candidates, (0, 1))
    anchors = blocks.anchor_positions[row][blocks.block_keep_mask[row]]
    is_anchor = torch.zeros(seq_len, dtype=torch.bool).index_fill(0, anchors.cpu(), True)
    supervised = one.loss_mask[0].cpu().numpy()
    padding = ~one.attention_mask[0].cpu().numpy()
    times = times_supervised(blocks)[row].cpu().numpy()
    p_covered = token_coverage(one, num_anchors, block_size)[0].cpu().numpy()
    document = context_doc_ids(one.seq_lens, seq_len, one.seq_lens.device)[0].cpu().numpy()
    state = np.select(
        [padding, ~supervised, times > 0, p_covered == 0],
        ["padding", "prompt", "covered", "never a label"],
        "not covered",
    )
    token_ids = one.input_ids[0].tolist()
    return pd.DataFrame(
        {
            "position": np.arange(seq_len),
            "document": np.where(padding, -1, document),
            "token_id": token_ids,
            "text": [to_text(token_id) for token_id in token_ids],
            "supervised": supervised,
            "candidate": candidate.cpu().numpy(),
            "anchor": is_anchor.numpy(),
            "times_supervised": times,
            "p_covered": p_covered,
            "state": state,
        }
    )


def block_table(
    batch: Batch, blocks: Blocks, to_text: Callable[[int], str], *, row: int = 0
) -> pd.DataFrame:
    """What each slot of one row's blocks reads, where it stands, and what it should predict.

    Returns:
        one line per slot: ``block``, ``kept``, ``slot``, ``position_id``, ``input`` (see
        :func:`slot_inputs`), ``context`` (how many context tokens it sees), ``label_position``,
        ``label`` (text; empty where the label lies past the row or the block is a dummy) and
        ``supervised``.

    Raises:
        TypeError, ValueError: ``row`` is not one of the batch's rows.
    """
    one = batch.row(row)
    seq_len = one.input_ids.shape[1]
    num_anchors, block_size = blocks.eval_mask.shape[1:]
    start, end = context_range(
        blocks.anchor_positions[row : row + 1],
        blocks.block_keep_mask[row : row + 1],
        seq_len=seq_len,
        doc_ids=context_doc_ids(one.seq_lens, seq_len, one.seq_lens.device),
    )
    kept = blocks.block_keep_mask[row].repeat_interleave(block_size).tolist()
    labels = blocks.label_indices[row].flatten().tolist()
    targets = blocks.target_ids[row].flatten().tolist()
    return pd.DataFrame(
        {
            "block": np.repeat(np.arange(num_anchors), block_size),
            "kept": kept,
            "slot": np.tile(np.arange(block_size), num_anchors),
            "position_id": blocks.position_ids[row].flatten().tolist(),
            "input": slot_inputs(blocks, to_text, row=row),
            "context": (end - start)[0].repeat_interleave(block_size).tolist(),
            "label_position": labels,
            "label": [
                to_text(token_id) if keep and label < seq_len else ""
                for token_id, keep, label in zip(targets, kept, labels, strict=True)
            ],
            "supervised": blocks.eval_mask[row].flatten().tolist(),
        }
    )


def slot_inputs(blocks: Blocks, to_text: Callable[[int], str], *, row: int = 0) -> list[str]:
    """What each slot of one row's blocks reads, as text: ``[mask]`` for the mask token.

    Slot 0 of a kept block reads a token of the conversation, whatever its id.
    """
    return [
        "[mask]"
        if token_id == blocks.mask_token_id and not (keep and slot == 0)
        else to_text(token_id)
        for keep, block in zip(
            blocks.block_keep_mask[row].tolist(), blocks.noise_ids[row].tolist(), strict=True
        )
        for slot, token_id in enumerate(block)
    ]


def mask_regions(
    blocks: Blocks, *, seq_len: int, doc_ids: Int[Tensor, "batch seq"] | None = None, row: int = 0
) -> Int[Tensor, "query key"]:
    """Each pair of one row's attention mask as an index into ``REGIONS``, int8."""
    keep = blocks.block_keep_mask[row : row + 1]
    block_size = blocks.eval_mask.shape[2]
    visible = training_dense_mask(
        blocks.anchor_positions[row : row + 1],
        keep,
        seq_len=seq_len,
        block_size=block_size,
        doc_ids=None if doc_ids is None else doc_ids[row : row + 1],
    )[0]
    region = visible.to(torch.int8)
    own = torch.where(keep[0], REGIONS.index("own block"), REGIONS.index("dummy block"))
    region[:, seq_len:] *= own.to(torch.int8).repeat_interleave(block_size).unsqueeze(1)
    return region


def mask_table(regions: Int[Tensor, "query key"]) -> pd.DataFrame:
    """How many pairs of a mask belong to each region: ``region``, ``pairs``, ``share``."""
    pairs = torch.bincount(regions.flatten().int(), minlength=len(REGIONS)).numpy()
    return pd.DataFrame(
        {"region": REGIONS, "pairs": pairs, "share": pairs / max(1, regions.numel())}
    )


def tile_states(block_mask: BlockMask, *, row: int = 0) -> Int[Tensor, "query_tile key_tile"]:
    """Each tile of one row of a block mask as an index into ``TILE_STATES``, int8."""
    states = _listed(block_mask.kv_num_blocks[row, 0], block_mask.kv_indices[row, 0])
    states = states.to(torch.int8) * TILE_STATES.index("partial")
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks[row, 0], block_mask.full_kv_indices[row, 0])
        states = states.masked_fill(full, TILE_STATES.index("full"))
    return states


def tile_table(states: Int[Tensor, "query_tile key_tile"]) -> pd.DataFrame:
    """How many tiles are in each state: ``state``, ``tiles``, ``share``."""
    tiles = torch.bincount(states.flatten().int(), minlength=len(TILE_STATES)).numpy()
    return pd.DataFrame(
        {"state": TILE_STATES, "tiles": tiles, "share": tiles / max(1, tiles.sum())}
    )


def sorting_table(
    blocks: Blocks,
    *,
    seq_len: int,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
    tile_sizes: tuple[int, ...] = (32, 64, 128),
    seed: int = 0,
) -> pd.DataFrame:
    """What it is worth to have the anchors in ascending order: tiles with and without.

    Returns:
        one line per tile size and order (``as drawn``, that is ascending, and ``shuffled``): the
        tiles in each state over all rows; ``work``, the share of pairs that a kernel computes
        (partial and full tiles); and ``wasted``, the share of that work that the mask hides.
    """
    block_size = blocks.eval_mask.shape[2]
    anchors, keep = blocks.anchor_positions, blocks.block_keep_mask
    order = torch.randperm(anchors.shape[1], generator=torch.Generator().manual_seed(seed))
    sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size, "doc_ids": doc_ids}
    start, end = context_range(anchors, keep, seq_len=seq_len, doc_ids=doc_ids)
    visible = int((end - start).sum() * block_size + keep.numel() * block_size**2)
    rows = []
    for tile_size in tile_sizes:
        for name, index in (("as drawn", slice(None)), ("shuffled", order)):
            mask = training_block_mask(
                anchors[:, index], keep[:, index], tile_size=tile_size, **sizes
            )
            states = torch.cat([tile_states(mask, row=row) for row in range(len(anchors))])
            counts = tile_table(states).set_index("state")["tiles"]
            computed = int(counts["partial"] + counts["full"]) * tile_size**2
            rows.append(
                {
                    "tile_size": tile_size,
                    "order": name,
                    **counts.to_dict(),
                    "work": (counts["partial"] + counts["full"]) / counts.sum(),
                    "wasted": 1 - visible / computed,
                }
            )
    return pd.DataFrame(rows)


def _listed(
    count: Int[Tensor, " row"], columns: Int[Tensor, "row column"]
) -> Bool[Tensor, "row column"]:
    """Which columns each row lists: the first ``count`` of its entries."""
    listed = torch.arange(columns.shape[1], device=columns.device) < count.unsqueeze(1)
    # Adding up, since what stands behind the count may name a listed column again.
    return torch.zeros_like(columns).scatter_add(1, columns.long(), listed.to(columns.dtype)) > 0
