"""Which conversations each step sees: rows, micro-batches and epochs, from the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from dspark_lab.chats import Batch, Encoded, collate, fill_rows, packed_rows, token_counts
from dspark_lab.checks import Count, Size, checked
from dspark_lab.training.config import TrainConfig


@checked
@dataclass
class BatchOrder:
    """The micro-batches of one process; each epoch has its own order, from the seed alone.

    A row is a conversation; or, with ``pack_length``, one of the rows that
    :func:`dspark_lab.chats.pack` makes of them all. An epoch has every row once, but for the few
    that fill no batch, and no two processes see the same.
    """

    tokens: Sequence[Encoded]
    config: TrainConfig
    pad_token_id: int = 0
    rank: Size = 0
    processes: Count = 1

    def __post_init__(self) -> None:
        length = self.config.pack_length
        self.lengths = token_counts(self.tokens)
        self.rows = [[index] for index in range(len(self.tokens))]
        if length is not None:
            self.rows = packed_rows(self.lengths, length)
            self.lengths = np.full(len(self.rows), length)
        self.epoch, self.groups = -1, [[0]]

    def micro_batches(self, step: int) -> Iterator[tuple[Batch, int]]:
        """The micro-batches of a 0-based step, each with the seed of its blocks."""
        config = self.config
        per_epoch = len(self.rows) // config.batch_size
        for number in range(config.accumulate):
            place = (step * config.accumulate + number) * self.processes + self.rank
            epoch, place_in_epoch = divmod(place, per_epoch)
            if epoch != self.epoch:
                seed, size = config.seed, config.batch_size
                self.epoch, self.groups = epoch, row_groups(self.lengths, size, seed, epoch)
            rows = [self.rows[row] for row in self.groups[place_in_epoch]]
            group = [index for row in rows for index in row]
            some = [self.tokens[index] for index in group]
            if config.pack_length is None:
                batch = collate(some, self.pad_token_id)
            else:
                counted = iter(range(len(group)))
                places = [[next(counted) for _ in row] for row in rows]
                batch = fill_rows(some, places, config.pack_length, self.pad_token_id)
            batch.chat_index.copy_(torch.tensor([*group, -1])[batch.chat_index])
            yield batch, ((config.seed << 40) + place) % 2**63


@checked
def row_groups(
    lengths: Int[np.ndarray, " row"], batch_size: Count, seed: Size = 0, epoch: Size = 0
) -> list[list[int]]:
    """The rows of each micro-batch of an epoch, of similar length, so that little is padding.

    Each pool of at most sixteen batches is sorted by itself: batches differ between epochs.
    """
    rng, length = random.Random(f"{seed}/{epoch}"), lengths.tolist()
    order = list(range(len(length)))
    rng.shuffle(order)
    groups = []
    pool_size = batch_size * min(16, max(1, len(order) // (4 * batch_size)))
    for first in range(0, len(order), pool_size):
        pool = order[first : first + pool_size]
        pool.sort(key=length.__getitem__)
        whole = range(0, len(pool) - batch_size + 1, batch_size)
        groups += [pool[i : i + batch_size] for i in whole]
    # The few that the last pool may leave over have their turn in another epoch.
    rng.shuffle(groups)
    return groups
