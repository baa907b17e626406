"""One draw of blocks on a batch: where they stand, what goes in, what each slot should predict.

The alignment rule (DSpark, section 3.1): slot k of the block at anchor a has position a + k, reads
the anchor's token where k is 0 and a mask token elsewhere, and predicts token a + k + 1.

This file puts the utilities of ``dspark_lab.common`` together, in the order of a training forward.
It knows batches and positions; it knows nothing about attention, models or text.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dspark_lab.chats import Batch
from dspark_lab.checks import (
    require_bool,
    require_int,
    require_integers,
    require_same_device,
    require_shape,
    require_tensor,
)
from dspark_lab.common import (
    build_eval_mask,
    create_noise_embed,
    create_position_ids,
    sample_anchor_positions,
)

__all__ = ["Blocks", "cut_blocks", "draw_blocks", "label_positions", "times_supervised"]


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a batch; axes ``batch``, ``anchor``, ``slot``.

    ``noise_ids`` are the drafter's input tokens, ``position_ids`` the slots' positions (within the
    anchor's document), ``label_indices`` the row positions of the tokens to predict, which may lie
    past the row's end, and ``safe_label_indices`` the same clamped into the row.
    """

    anchor_positions: Int[Tensor, "batch anchor"]
    block_keep_mask: Bool[Tensor, "batch anchor"]
    noise_ids: Int[Tensor, "batch anchor slot"]
    position_ids: Int[Tensor, "batch anchor slot"]
    label_indices: Int[Tensor, "batch anchor slot"]
    safe_label_indices: Int[Tensor, "batch anchor slot"]
    target_ids: Int[Tensor, "batch anchor slot"]
    eval_mask: Bool[Tensor, "batch anchor slot"]
    mask_token_id: int


def draw_blocks(
    batch: Batch,
    num_anchors: int,
    block_size: int,
    *,
    mask_token_id: int = 0,
    seed: int | None = None,
) -> Blocks:
    """Sample anchors and cut a block at each; ``seed`` None draws from torch's own stream.

    Raises:
        TypeError, ValueError: ``num_anchors`` or ``block_size`` is not an int of at least 1.
    """
    generator = None
    if seed is not None:
        generator = torch.Generator(batch.input_ids.device).manual_seed(seed)
    anchor_positions, block_keep_mask = sample_anchor_positions(
        seq_len=batch.input_ids.shape[1],
        loss_mask=batch.loss_mask,
        num_anchors=num_anchors,
        device=batch.input_ids.device,
        doc_remaining=batch.doc_remaining,
        generator=generator,
    )
    return cut_blocks(
        batch, anchor_positions, block_keep_mask, block_size, mask_token_id=mask_token_id
    )


def cut_blocks(
    batch: Batch,
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    block_size: int,
    *,
    mask_token_id: int = 0,
) -> Blocks:
    """The blocks at given anchors.

    Raises:
        TypeError, ValueError: what the utilities of ``dspark_lab.common`` refuse.
    """
    seq_len = batch.input_ids.shape[1]
    label_indices, safe_label_indices = label_positions(
        anchor_positions, block_keep_mask, seq_len=seq_len, block_size=block_size
    )
    eval_mask = build_eval_mask(
        seq_len=seq_len,
        loss_mask=batch.loss_mask,
        label_indices=label_indices,
        safe_label_indices=safe_label_indices,
        block_keep_mask=block_keep_mask,
        doc_remaining=batch.doc_remaining,
        anchor_positions=anchor_positions,
    )
    position_ids = create_position_ids(anchor_positions, block_size, batch.position_ids)
    # An "embedding" that returns the ids shows what the drafter's real one would look up.
    noise_ids = create_noise_embed(
        embed_tokens=lambda ids: ids.unsqueeze(-1),
        input_ids=batch.input_ids,
        anchor_positions=anchor_positions,
        block_keep_mask=block_keep_mask,
        mask_token_id=mask_token_id,
        block_size=block_size,
    )
    return Blocks(
        anchor_positions=anchor_positions,
        block_keep_mask=block_keep_mask,
        noise_ids=noise_ids.view(label_indices.shape),
        position_ids=position_ids.view(label_indices.shape),
        label_indices=label_indices,
        safe_label_indices=safe_label_indices,
        target_ids=batch.input_ids.gather(1, safe_label_indices.flatten(1)).view_as(label_indices),
        eval_mask=eval_mask,
        mask_token_id=mask_token_id,
    )


def label_positions(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: int,
    block_size: int,
) -> tuple[Int[Tensor, "batch anchor slot"], Int[Tensor, "batch anchor slot"]]:
    """Row positions of the slots' labels, anchor + 1 to anchor + block_size.

    Returns:
        the positions as they are, and clamped into the row (0 for dummy anchors), both long.

    Raises:
        TypeError, ValueError: wrong kind, rank, shape or device, or ``seq_len`` or ``block_size``
            below 1.
    """
    require_tensor("anchor_positions", anchor_positions, ("batch", "anchor"))
    require_integers("anchor_positions", anchor_positions)
    require_shape(
        "block_keep_mask", block_keep_mask, ("batch", "anchor"), tuple(anchor_positions.shape)
    )
    require_bool("block_keep_mask", block_keep_mask)
    require_same_device(anchor_positions=anchor_positions, block_keep_mask=block_keep_mask)
    require_int("seq_len", seq_len, 1)
    require_int("block_size", block_size, 1)
    distance = torch.arange(1, block_size + 1, device=anchor_positions.device)
    label_indices = anchor_positions.long().unsqueeze(-1) + distance
    return label_indices, label_indices.clamp(max=seq_len - 1) * block_keep_mask.unsqueeze(-1)


def times_supervised(blocks: Blocks, seq_len: int) -> Int[Tensor, "batch seq"]:
    """How many slots of the draw are supervised with each token of the row as their label."""
    count = blocks.label_indices.new_zeros((blocks.label_indices.shape[0], seq_len))
    return count.scatter_add(
        1, blocks.safe_label_indices.flatten(1), blocks.eval_mask.flatten(1).long()
    )
