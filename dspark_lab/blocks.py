"""One draw of blocks on a batch: where they stand, their input, and what each slot predicts.

The alignment rule (DSpark, section 3.1): slot k of the block at anchor a has position a + k, reads
the anchor's token where k is 0 and a mask token elsewhere, follows token a + k and predicts token
a + k + 1; its teacher is the target's distribution behind token a + k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dspark_lab.chats import Batch
from dspark_lab.checks import Count, Size, Within, checked, require
from dspark_lab.common import (
    build_eval_mask,
    context_doc_ids,
    create_noise_embed,
    create_position_ids,
    sample_anchor_positions,
)


@checked
@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a batch, with all that follows from where they stand.

    Attributes:
        noise_ids: the drafter's input: anchors' tokens in slot 0 of kept blocks, mask tokens.
        position_ids: the slots' positions within their documents.
        label_indices: row positions of the tokens to predict, which may lie past the row's end.
        safe_label_indices: the same clamped into the row, 0 for dummy anchors.
        prev_indices: row positions of the tokens before those, clamped into the row. There the
            target's final hidden states are the slots' teachers.
        target_ids, prev_ids: the tokens at ``safe_label_indices`` and ``prev_indices``.
        eval_mask: which slots are supervised.
        context_position_ids, doc_ids: each token's position within its document, and which one.
    """

    anchor_positions: Int[Tensor, "batch anchor"]
    block_keep_mask: Bool[Tensor, "batch anchor"]
    noise_ids: Int[Tensor, "batch anchor slot"]
    position_ids: Int[Tensor, "batch anchor slot"]
    label_indices: Int[Tensor, "batch anchor slot"]
    safe_label_indices: Int[Tensor, "batch anchor slot"]
    prev_indices: Int[Tensor, "batch anchor slot"]
    target_ids: Int[Tensor, "batch anchor slot"]
    prev_ids: Int[Tensor, "batch anchor slot"]
    eval_mask: Bool[Tensor, "batch anchor slot"]
    context_position_ids: Int[Tensor, "batch seq"]
    doc_ids: Int[Tensor, "batch seq"]
    mask_token_id: Size

    @property
    def seq_len(self) -> int:
        return self.doc_ids.shape[1]

    @property
    def num_anchors(self) -> int:
        return self.noise_ids.shape[1]

    @property
    def block_size(self) -> int:
        return self.noise_ids.shape[2]

    def row(self, index: int) -> "Blocks":
        require("row", index, Annotated[int, Within(0, len(self.noise_ids) - 1)])
        return self._each(lambda tensor: tensor[index : index + 1])

    def reordered(self, order: Int[Tensor, "anchor"]) -> "Blocks":
        return self._each(lambda tensor: tensor[:, order], but=("context_position_ids", "doc_ids"))

    def _each(self, change: Callable[[Tensor], Tensor], but: Sequence[str] = ()) -> "Blocks":
        names = [name for name in vars(self) if name not in (*but, "mask_token_id")]
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


@checked
def draw_blocks(
    batch: Batch,
    num_anchors: Count,
    block_size: Count,
    *,
    mask_token_id: Size = 0,
    seed: int | None = None,
) -> Blocks:
    """Sample anchors and cut a block at each; ``seed`` None draws from torch's own stream."""
    seq_len, device = batch.input_ids.shape[1], batch.input_ids.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    drawn = sample_anchor_positions(
        seq_len, batch.loss_mask, num_anchors, device, batch.doc_remaining, generator
    )
    return cut_blocks(batch, *drawn, block_size, mask_token_id=mask_token_id)


@checked
def cut_blocks(
    batch: Batch,
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    block_size: Count,
    *,
    mask_token_id: Size = 0,
) -> Blocks:
    """The blocks at given anchors."""
    seq_len = batch.input_ids.shape[1]
    label_indices, safe_label_indices = _label_positions(
        anchor_positions, block_keep_mask, seq_len=seq_len, block_size=block_size
    )
    prev_indices = _previous_positions(anchor_positions, seq_len=seq_len, block_size=block_size)
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
        prev_indices=prev_indices,
        target_ids=batch.input_ids.unsqueeze(1).take_along_dim(safe_label_indices, 2),
        prev_ids=batch.input_ids.unsqueeze(1).take_along_dim(prev_indices, 2),
        eval_mask=eval_mask,
        context_position_ids=batch.position_ids,
        doc_ids=context_doc_ids(batch.seq_lens, seq_len, batch.input_ids.device),
        mask_token_id=mask_token_id,
    )


@checked
def times_supervised(blocks: Blocks) -> Int[Tensor, "batch seq"]:
    """How many slots of the draw are supervised with each token of the row as their label."""
    labels, supervised = blocks.safe_label_indices.flatten(1), blocks.eval_mask.flatten(1)
    return torch.zeros_like(blocks.doc_ids).scatter_add(1, labels, supervised.long())


def _label_positions(
    anchor_positions: Tensor, block_keep_mask: Tensor, *, seq_len: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Row positions of the slots' labels, as they are, and clamped into the row (0 for dummies)."""
    distance = torch.arange(1, block_size + 1, device=anchor_positions.device)
    label_indices = anchor_positions.long().unsqueeze(-1) + distance
    return label_indices, label_indices.clamp(max=seq_len - 1) * block_keep_mask.unsqueeze(-1)


def _previous_positions(anchor_positions: Tensor, *, seq_len: int, block_size: int) -> Tensor:
    """Row positions of the tokens before the slots' labels, clamped into the row."""
    offset = torch.arange(block_size, device=anchor_positions.device)
    return (anchor_positions.long().unsqueeze(-1) + offset).clamp(max=seq_len - 1)
