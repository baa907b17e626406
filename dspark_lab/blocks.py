"""One draw of blocks on a batch: where they stand, their input, and what each slot predicts.

The alignment rule: slot k of the block at anchor a has position a + k and reads the anchor's token
where k is 0, a mask token elsewhere. What it predicts is the block's *layout*:

    anchor_predicts: slot k predicts token a + k + 1 (DSpark, section 3.1);
    anchor_given:    slot 0 is the anchor and predicts nothing, slot k > 0 predicts token a + k
                     (DFlash, arXiv 2602.06036).

The teacher of a token is the target's distribution behind the token before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dspark_lab.chats import Batch
from dspark_lab.checks import (
    Axis,
    BlockSize,
    Count,
    Size,
    Within,
    checked,
    may_be_read,
    require,
)
from dspark_lab.common import (
    build_anchor_candidate_mask,
    build_eval_mask,
    context_doc_ids,
    create_noise_embed,
    create_position_ids,
    sample_anchor_positions,
)

Layout = Literal["anchor_predicts", "anchor_given"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# What a number of anchors counts for: each row, each document, or all rows of a micro-batch.
Per = Literal["row", "document", "batch"]
PER: tuple[Per, ...] = get_args(Per)


@checked
@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a batch, with all that follows from where they stand.

    A ``slot`` is a place of a block that the drafter reads, ``label`` one of those that predict:
    all slots, or all but the first where the anchor is given.

    Attributes:
        noise_ids: the drafter's input: anchors' tokens in slot 0 of kept blocks, mask tokens.
        position_ids: the slots' positions within their documents.
        label_indices: row positions of the tokens to predict, which may lie past the row's end.
            These and what follows are of the predicting slots alone.
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
    label_indices: Int[Tensor, "batch anchor label"]
    safe_label_indices: Int[Tensor, "batch anchor label"]
    prev_indices: Int[Tensor, "batch anchor label"]
    target_ids: Int[Tensor, "batch anchor label"]
    prev_ids: Int[Tensor, "batch anchor label"]
    eval_mask: Bool[Tensor, "batch anchor label"]
    context_position_ids: Int[Tensor, "batch seq"]
    doc_ids: Int[Tensor, "batch seq"]
    mask_token_id: Size
    layout: Layout = "anchor_predicts"

    @classmethod
    @checked
    def of(
        cls,
        anchor_positions: Int[Tensor, "batch anchor"],
        block_keep_mask: Bool[Tensor, "batch anchor"],
        *,
        seq_len: Annotated[int, Within(1), Axis("seq")],
        block_size: BlockSize,
        doc_ids: Int[Tensor, "batch seq"] | None = None,
        layout: Layout = "anchor_predicts",
    ) -> "Blocks":
        """The blocks of a trainer that holds their anchors alone.

        ``doc_ids`` never fall along the row, one document where None. All ids of tokens are -1, and
        ``eval_mask`` is as if every token were supervised.
        """
        rows, device = len(anchor_positions), anchor_positions.device
        if may_be_read(anchor_positions) and anchor_positions.numel():
            least, most = int(anchor_positions.min()), int(anchor_positions.max())
            if least < 0 or most >= seq_len:
                wanted = f"anchor_positions must lie in the row, [0, {seq_len - 1}]"
                raise ValueError(f"{wanted}, got {least} to {most}")
        place = torch.arange(seq_len, device=device).expand(rows, -1)
        known = torch.zeros_like(place) if doc_ids is None else doc_ids.long().contiguous()
        if may_be_read(known) and (known[:, 1:] < known[:, :-1]).any():
            raise ValueError("doc_ids must never fall along the row, got a row in which they do")
        first = torch.searchsorted(known, known)
        past = torch.searchsorted(known, known, right=True)
        batch = Batch(
            input_ids=torch.full_like(place, -1),
            loss_mask=torch.ones_like(place, dtype=torch.bool),
            attention_mask=torch.ones_like(place, dtype=torch.bool),
            position_ids=place - first,
            doc_remaining=past - 1 - place,
            seq_lens=place.new_full((rows, 1), seq_len),
            chat_index=place.new_full((rows, 1), -1),
        )
        blocks = cut_blocks(batch, anchor_positions, block_keep_mask, block_size, layout=layout)
        noise_ids = torch.full_like(blocks.noise_ids, -1)
        return replace(blocks, doc_ids=known, noise_ids=noise_ids)

    @property
    def seq_len(self) -> int:
        return self.doc_ids.shape[1]

    @property
    def num_anchors(self) -> int:
        return self.noise_ids.shape[1]

    @property
    def block_size(self) -> int:
        """Slots of a block, an anchor that is given among them."""
        return self.noise_ids.shape[2]

    @property
    def predicted(self) -> int:
        """Slots of a block that predict a token."""
        return self.eval_mask.shape[2]

    def row(self, index: int) -> "Blocks":
        require("row", index, Annotated[int, Within(0, len(self.noise_ids) - 1)])
        return self._each(lambda tensor: tensor[index : index + 1])

    def reordered(self, order: Int[Tensor, "anchor"]) -> "Blocks":
        return self._each(lambda tensor: tensor[:, order], but=("context_position_ids", "doc_ids"))

    def _each(self, change: Callable[[Tensor], Tensor], but: Sequence[str] = ()) -> "Blocks":
        names = [name for name in vars(self) if name not in (*but, "mask_token_id", "layout")]
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
    per: Per = "row",
    layout: Layout = "anchor_predicts",
) -> Blocks:
    """Cut a block at each anchor of :func:`draw_anchors`."""
    drawn = draw_anchors(batch, num_anchors, per=per, seed=seed)
    return cut_blocks(batch, *drawn, block_size, mask_token_id=mask_token_id, layout=layout)


@checked
def draw_anchors(
    batch: Batch, num_anchors: Count, *, per: Per = "row", seed: int | None = None
) -> tuple[Int[Tensor, "batch anchor"], Bool[Tensor, "batch anchor"]]:
    """Draw ``num_anchors`` candidates of each row, of each document, or of the batch in total.

    Every candidate has a random number, and those with the smallest in their row, document or batch
    become anchors: where a row is one document, or a batch one row, the kept anchors are the same.
    ``seed`` None draws from torch's own stream.

    Returns:
        long positions and which are kept, kept ones first and ascending, as
        :func:`~dspark_lab.common.sample_anchor_positions`. Per row there are ``num_anchors`` of
        them. Otherwise, on a CPU, as many as the fullest row keeps; on a GPU, where asking would
        wait, as many as a row can keep: ``seq_len - 1``, or less where the numbers say so.
    """
    seq_len, device = batch.input_ids.shape[1], batch.input_ids.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    if per == "row":
        return sample_anchor_positions(
            seq_len, batch.loss_mask, num_anchors, device, batch.doc_remaining, generator
        )
    candidates = build_anchor_candidate_mask(seq_len, batch.loss_mask, batch.doc_remaining)
    rows, width = candidates.shape
    documents = batch.seq_lens.shape[1]
    numbers = torch.rand(rows, width, device=device, generator=generator)
    units, unit = 1, torch.zeros_like(candidates, dtype=torch.long)
    if per == "document":
        units = rows * documents
        row = torch.arange(rows, device=device).unsqueeze(1)
        unit = row * documents + context_doc_ids(batch.seq_lens, seq_len, device)[:, :width]
    # What is no candidate is a last unit of its own. Stable: ties go to the earlier position.
    unit = torch.where(candidates, unit, units).flatten()
    order = numbers.flatten().argsort(stable=True)
    order = order[unit[order].argsort(stable=True)]
    sizes = torch.zeros(units + 1, dtype=torch.long, device=device)
    sizes = sizes.scatter_add(0, unit, torch.ones_like(unit))
    place = torch.arange(len(order), device=device) - (sizes.cumsum(0) - sizes)[unit[order]]
    drawn = torch.zeros_like(candidates).flatten()
    drawn = drawn.scatter(0, order, (place < num_anchors) & (unit[order] < units)).view(rows, width)

    # Sorting with the others beyond the row's end puts the anchors first.
    past_end = max(seq_len, 1)
    anchors = torch.arange(width, device=device).where(drawn, past_end).sort(dim=1).values
    most = min(width, num_anchors * (documents if per == "document" else 1))
    if may_be_read(drawn):
        most = max(drawn.sum(dim=1).tolist(), default=0)
    most = max(most, 1)
    anchors = nn.functional.pad(anchors, (0, 1), value=past_end)[:, :most]
    block_keep_mask = anchors < past_end
    return anchors * block_keep_mask, block_keep_mask


@checked
def cut_blocks(
    batch: Batch,
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    block_size: Count,
    *,
    mask_token_id: Size = 0,
    layout: Layout = "anchor_predicts",
) -> Blocks:
    """The blocks at given anchors."""
    seq_len, labels = batch.input_ids.shape[1], predicted_slots(block_size, layout)
    label_indices, safe_label_indices = _label_positions(
        anchor_positions, block_keep_mask, seq_len=seq_len, labels=labels
    )
    prev_indices = _previous_positions(anchor_positions, seq_len=seq_len, labels=labels)
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
        noise_ids=noise_ids.view(*anchor_positions.shape, block_size),
        position_ids=position_ids.view(*anchor_positions.shape, block_size),
        label_indices=label_indices,
        safe_label_indices=safe_label_indices,
        prev_indices=prev_indices,
        target_ids=batch.input_ids.unsqueeze(1).take_along_dim(safe_label_indices, 2),
        prev_ids=batch.input_ids.unsqueeze(1).take_along_dim(prev_indices, 2),
        eval_mask=eval_mask,
        context_position_ids=batch.position_ids,
        doc_ids=context_doc_ids(batch.seq_lens, seq_len, batch.input_ids.device),
        mask_token_id=mask_token_id,
        layout=layout,
    )


@checked
def predicted_slots(block_size: Count, layout: Layout) -> int:
    """How many slots of a block predict a token."""
    if layout == "anchor_given" and block_size < 2:
        wanted = "block_size must be at least 2 where the first slot is the anchor's own"
        raise ValueError(f"{wanted}, got {block_size}")
    return block_size - (layout == "anchor_given")


@checked
def times_supervised(blocks: Blocks) -> Int[Tensor, "batch seq"]:
    """How many slots of the draw are supervised with each token of the row as their label."""
    labels, supervised = blocks.safe_label_indices.flatten(1), blocks.eval_mask.flatten(1)
    return torch.zeros_like(blocks.doc_ids).scatter_add(1, labels, supervised.long())


def _label_positions(
    anchor_positions: Tensor, block_keep_mask: Tensor, *, seq_len: int, labels: int
) -> tuple[Tensor, Tensor]:
    """Row positions of the slots' labels, as they are, and clamped into the row (0 for dummies)."""
    distance = torch.arange(1, labels + 1, device=anchor_positions.device)
    label_indices = anchor_positions.long().unsqueeze(-1) + distance
    return label_indices, label_indices.clamp(max=seq_len - 1) * block_keep_mask.unsqueeze(-1)


def _previous_positions(anchor_positions: Tensor, *, seq_len: int, labels: int) -> Tensor:
    """Row positions of the tokens before the slots' labels, clamped into the row."""
    offset = torch.arange(labels, device=anchor_positions.device)
    return (anchor_positions.long().unsqueeze(-1) + offset).clamp(max=seq_len - 1)
