"""Keys and values of rows of unequal length, in memory that is allocated once.

    row r holds `lengths[r]` tokens, in its first columns;
    new tokens are written right behind them, and are the row's own once `commit` says so;
    what is not committed is written over by the next ones.

So a rejected token is never seen again, whatever the other rows accepted, and nothing is moved. The
lengths are on the host: no device is ever asked for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dspark_lab.files import upload

PerHead = Float[Tensor, "batch heads key head_dim"]


class Rows:
    """The lengths of a cache's rows, each of which has room for ``capacity`` tokens."""

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.lengths, self.capacity, self.device = [0] * batch, capacity, device
        self._places: dict[int, Tensor] = {}

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all rows hold as many tokens."""
        return len(set(self.lengths)) <= 1

    def positions(self, new: int) -> Int[Tensor, "batch new"]:
        """Where the next ``new`` tokens of each row stand, counted from 0."""
        if new not in self._places:
            lengths = upload(torch.tensor(self.lengths), self.device)
            self._places[new] = lengths.unsqueeze(1) + torch.arange(new, device=self.device)
        return self._places[new]

    def mask(self, new: int, *, causal: bool = True) -> Bool[Tensor, "batch new key"]:
        """The keys of each of ``new`` tokens: its row's own, and the new ones (up to itself)."""
        last = self.positions(new).unsqueeze(2)
        if not causal:
            last = last[:, -1:].expand(-1, new, -1)
        return torch.arange(self.width + new, device=self.device) <= last

    def commit(
        self, counts: Sequence[int], kept: Sequence[int] | None = None
    ) -> Int[Tensor, " kept"] | None:
        """Row r keeps ``counts[r]`` of its new tokens; only the rows ``kept`` go on.

        Returns them for :meth:`KeyValues.keep`, None where all stay as they are.
        """
        every = list(range(len(self.lengths)))
        rows = every if kept is None else list(kept)
        self.lengths = [self.lengths[row] + counts[row] for row in rows]
        self._places.clear()
        if rows == every:
            return None
        return upload(torch.tensor(rows, dtype=torch.long), self.device)


class KeyValues:
    """The keys and values of one layer of attention for the tokens of ``rows``."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, keys: PerHead, values: PerHead) -> tuple[PerHead, PerHead]:
        """Put new tokens behind those of their rows; return all columns up to the last new one."""
        rows, new = self.rows, keys.shape[2]
        behind = rows.width + new
        if behind > rows.capacity:
            raise ValueError(f"a cache has room for {rows.capacity} tokens a row, got {behind}")
        if self.keys is None or self.values is None:
            # Not empty: what nobody may see must still be a number.
            room = (len(keys), keys.shape[1], rows.capacity)
            self.keys, self.values = (x.new_zeros(*room, x.shape[3]) for x in (keys, values))
        seen = []
        for store, written in ((self.keys, keys), (self.values, values)):
            store = store[: len(keys), :, :behind]
            if rows.even:
                store[:, :, rows.width :] = written
            else:
                place = rows.positions(new)[:, None, :, None].expand_as(written)
                store.scatter_(2, place, written)
            seen.append(store)
        return seen[0], seen[1]

    def keep(self, kept: Int[Tensor, " kept"]) -> None:
        """Make these rows the first ones; more rows than there were need new memory."""
        if self.keys is None or self.values is None:
            return
        if len(kept) > len(self.keys):
            self.keys, self.values = self.keys[kept], self.values[kept]
            return
        width = self.rows.width
        for store in (self.keys, self.values):
            store[: len(kept), :, :width] = store[kept, :, :width]
