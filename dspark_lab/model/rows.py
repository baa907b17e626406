"""Which columns of a key/value cache belong to which row, where rows are of unequal length.

    a cache holds `width` columns for every row, of which the first `lengths[row]` are the row's;
    new columns are put behind all the others, at `width` and on;
    `commit` says how many of the new ones each row keeps, and closes the gaps.

So a rejected token is never seen again, whatever the other rows accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Rows:
    """The lengths of a cache's rows, on the host."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.width = max(self.lengths, default=0)
        self.device = device

    def positions(self, new: int) -> Int[Tensor, "batch new"]:
        """Where the next ``new`` tokens of each row stand, counted from 0."""
        return _column(self.lengths).to(self.device) + torch.arange(new, device=self.device)

    @property
    def even(self) -> bool:
        """Whether every column is every row's."""
        return all(length == self.width for length in self.lengths)

    def mask(self, new: int, *, causal: bool = True) -> Bool[Tensor, "batch new key"]:
        """The keys of each of ``new`` tokens: its row's columns, and new ones (up to itself)."""
        own = _column(self.lengths).to(self.device)
        old = torch.arange(self.width, device=self.device) < own
        seen = torch.ones(new, new, dtype=torch.bool, device=self.device)
        if causal:
            seen = seen.tril()
        batch = len(self.lengths)
        return torch.cat([old.unsqueeze(1).expand(-1, new, -1), seen.expand(batch, -1, -1)], dim=2)

    def commit(
        self, counts: Sequence[int], kept: Sequence[int] | None = None
    ) -> slice | Int[Tensor, "2 kept columns"]:
        """Row r keeps ``counts[r]`` of its new columns; returns what :func:`take` cuts a cache by.

        ``kept`` are the rows that go on; the others leave the cache.
        """
        rows = list(range(len(self.lengths)) if kept is None else kept)
        even, width = self.even and len(rows) == len(self.lengths), self.width
        before = [self.lengths[row] for row in rows]
        self.lengths = [n + counts[row] for n, row in zip(before, rows, strict=True)]
        self.width = max(self.lengths, default=0)
        if even:
            return slice(0, self.width)
        old, own = (_column(n) for n in (before, self.lengths))
        column = torch.arange(self.width)
        moved = torch.where(column < old, column, column - old + width)
        # What lies past a row's length is nobody's; any column will do.
        moved = torch.where(column < own, moved, 0)
        row = _column(rows).expand_as(moved)
        return torch.stack([row, moved]).to(self.device)


def take(
    states: Float[Tensor, "batch heads width head_dim"], cut: slice | Int[Tensor, "2 kept columns"]
) -> Float[Tensor, "kept heads columns head_dim"]:
    """The columns that :meth:`Rows.commit` left."""
    if isinstance(cut, slice):
        return states[:, :, cut]
    row, column = cut
    return states[row, :, column].transpose(1, 2)


def _column(numbers: Sequence[int]) -> Int[Tensor, "batch 1"]:
    return torch.tensor(numbers, dtype=torch.long).unsqueeze(1)
