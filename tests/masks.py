"""Training masks with planted faults, from a rule that is asked pair by pair."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_lab.blocks import Blocks


@dataclass
class Problem:
    """Blocks, dummies among them, of rows of documents with padding behind (document -1)."""

    anchors: list[list[int]]
    keep: list[list[bool]]
    docs: list[list[int]]
    size: int

    @property
    def seq_len(self) -> int:
        return len(self.docs[0])

    @property
    def blocks(self) -> Blocks:
        padded = torch.tensor(self.docs)
        docs = torch.where(padded < 0, padded.max() + 1, padded)
        where = torch.tensor(self.anchors), torch.tensor(self.keep)
        return Blocks.of(*where, seq_len=self.seq_len, block_size=self.size, doc_ids=docs)


@dataclass
class Rule:
    """The rule as a trainer may have it; as it stands here it is right."""

    end: int = 0  # the context ends so many tokens behind the anchor
    begin: int = 0  # and begins so many behind the document's first
    to_document_end: bool = False
    earlier_documents: bool = False
    later_documents: bool = False
    padding: bool = False
    window: int | None = None
    window_of_anchor: bool = False
    context_of: int = 0  # so many blocks on
    shuffled: bool = False
    swap_rows: bool = False
    size: int | None = None  # slots that are taken for a block
    earlier: bool = True  # a slot sees its block's earlier slots
    itself: bool = True
    later: bool = True
    hidden_slot: int | None = None
    earlier_blocks: bool = False
    later_blocks: bool = False
    dummies_see_token: int | None = None
    ignore_keep: bool = False
    hidden_dummies: bool = False

    def mask(self, problem: Problem) -> Tensor:
        """[batch, query, key]."""
        rows, blocks = len(problem.anchors), len(problem.anchors[0])
        queries = range(blocks * problem.size)
        keys = range(problem.seq_len + len(queries))
        seen = [[[self.sees(problem, r, q, k) for k in keys] for q in queries] for r in range(rows)]
        return torch.tensor(seen)

    def sees(self, problem: Problem, row: int, query: int, key: int) -> bool:
        size, blocks = self.size or problem.size, len(problem.anchors[0])
        block, slot = divmod(query, size)
        if key < problem.seq_len:
            row = (row + 1) % len(problem.anchors) if self.swap_rows else row
            block = min(block, blocks - 1)
            block = (block + self.context_of) % blocks
            if self.shuffled:
                block = (block * 3 + 1) % blocks
            return self.sees_context(problem, row, block, slot, key)
        other, other_slot = divmod(key - problem.seq_len, size)
        if other != block:
            return self.earlier_blocks if other < block else self.later_blocks
        dummy = not problem.keep[row][min(block, blocks - 1)]
        if other_slot == self.hidden_slot or (self.hidden_dummies and dummy):
            return False
        if other_slot == slot:
            return self.itself
        return self.earlier if other_slot < slot else self.later

    def sees_context(self, problem: Problem, row: int, block: int, slot: int, key: int) -> bool:
        anchor, docs = problem.anchors[row][block], problem.docs[row]
        if not problem.keep[row][block] and not self.ignore_keep:
            return key == self.dummies_see_token
        if docs[key] == -1:
            return self.padding
        start, past = docs.index(docs[anchor]), anchor + docs[anchor:].count(docs[anchor])
        if key >= past:
            return self.later_documents
        if key < start:
            if self.begin < 0:
                return key >= start + self.begin
            return self.earlier_documents
        if self.window is not None:
            if anchor + (0 if self.window_of_anchor else slot) - key >= self.window:
                return False
        if key >= start + self.begin and key < anchor + self.end:
            return True
        return self.to_document_end and key >= anchor
