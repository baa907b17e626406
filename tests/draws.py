"""Random draws of blocks on small batches, with what plain loops say of them."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention import ContextRanges, block_mask
from dspark_lab.blocks import Blocks, cut_blocks, draw_blocks
from dspark_lab.chats import Batch, collate, pack
from tests import oracle
from tests.samples import documents

PAD, MASK = 1000, 2000


@dataclass
class Draw:
    """A draw of blocks on a batch, and the same as lists."""

    batch: Batch
    blocks: Blocks

    @property
    def anchors(self) -> list[list[int]]:
        return self.blocks.anchor_positions.tolist()

    @property
    def keep(self) -> list[list[bool]]:
        return self.blocks.block_keep_mask.tolist()

    @property
    def docs(self) -> list[list[int]]:
        return oracle.doc_ids(self.batch.seq_lens.tolist(), self.blocks.seq_len)

    @property
    def masks(self) -> dict[str, list]:
        return {
            "loss_mask": self.batch.loss_mask.tolist(),
            "doc_remaining": self.batch.doc_remaining.tolist(),
        }

    @property
    def eval_mask(self) -> list[list[list[bool]]]:
        sizes = {"seq_len": self.blocks.seq_len, "block_size": self.blocks.block_size}
        return oracle.eval_mask(anchors=self.anchors, keep=self.keep, **sizes, **self.masks)

    @property
    def times(self) -> list[list[int]]:
        return oracle.times_supervised(self.blocks.seq_len, self.anchors, self.eval_mask)

    @property
    def reach(self) -> list[list[int]]:
        return oracle.reaching_anchors(block_size=self.blocks.block_size, **self.masks)

    def dense_mask(self) -> list[list[list[bool]]]:
        return oracle.dense_mask(
            self.anchors, self.keep, self.blocks.seq_len, self.blocks.block_size, self.docs
        )

    def block_mask(self, tile_size: int) -> BlockMask:
        return block_mask(ContextRanges.of(self.blocks), tile_size)


def label_positions(
    anchors: Tensor, keep: Tensor, block_size: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """The slots' labels as they are, and clamped into the row, 0 for dummies."""
    labels = anchors[:, :, None] + 1 + torch.arange(block_size, device=anchors.device)
    return labels, labels.clamp(max=seq_len - 1).clamp(min=0) * keep[:, :, None]


def tile_lists(block_mask: BlockMask) -> list[Tensor]:
    """The lists of partial and of full tiles, in both directions."""
    return [
        getattr(block_mask, f"{which}_{what}")
        for which in ("kv", "full_kv", "q", "full_q")
        for what in ("num_blocks", "indices")
    ]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """A few short documents, one a row or several, with padding or without."""
    marks = draw(st.lists(st.text("aaa.", min_size=1, max_size=8), min_size=1, max_size=4))
    longest = max(len(mark) for mark in marks)
    if draw(st.booleans()):
        return pack(documents(*marks), longest + draw(st.integers(0, 12)), PAD)
    return collate(documents(*marks), PAD, longest + draw(st.integers(0, 3)))


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Up to six sampled anchors."""
    batch, num_anchors, block_size = (
        draw(batches()),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 5)),
    )
    seed = draw(st.integers(0, 99))
    return Draw(batch, draw_blocks(batch, num_anchors, block_size, mask_token_id=MASK, seed=seed))


@st.composite
def cuts(draw: st.DrawFn) -> Draw:
    """Blocks at any anchors: in any order, repeated, kept or dummy, candidates or not."""
    batch, count, block_size = draw(batches()), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rows, seq_len = batch.input_ids.shape
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    keep = [draw(flags) for _ in range(rows)]
    anywhere = st.integers(0, seq_len - 1)
    anchors = [[draw(anywhere) if kept else 0 for kept in row] for row in keep]
    where = torch.tensor(anchors), torch.tensor(keep)
    blocks = cut_blocks(batch, *where, block_size, mask_token_id=MASK)
    assert (blocks.anchor_positions.tolist(), blocks.block_keep_mask.tolist()) == (anchors, keep)
    return Draw(batch, blocks)
