"""Random draws of blocks on small batches, with what plain loops say of them."""

from dataclasses import dataclass

from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention import ContextRanges, block_mask
from dspark_lab.blocks import Blocks, draw_blocks
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
        return oracle.eval_mask(
            self.blocks.seq_len,
            anchors=self.anchors,
            keep=self.keep,
            block_size=self.blocks.block_size,
            **self.masks,
        )

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


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Up to six anchors on a few short documents, one a row or several, with padding or without."""
    marks = draw(st.lists(st.text("aaa.", min_size=1, max_size=8), min_size=1, max_size=4))
    longest = max(len(mark) for mark in marks)
    if draw(st.booleans()):
        batch = pack(documents(*marks), longest + draw(st.integers(0, 12)), PAD)
    else:
        batch = collate(documents(*marks), PAD, longest + draw(st.integers(0, 3)))
    blocks = draw_blocks(
        batch,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 5)),
        mask_token_id=MASK,
        seed=draw(st.integers(0, 99)),
    )
    return Draw(batch, blocks)
