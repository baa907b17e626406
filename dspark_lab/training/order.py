"""Which conversations a micro-batch holds, from seed and step alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from dspark_lab.chats import Batch, Encoded, collate, pack
from dspark_lab.training.config import TrainConfig

__all__ = ["BatchOrder"]


class BatchOrder:
    """The micro-batches of process ``rank`` of ``processes``; each epoch has its own order."""

    def __init__(
        self,
        tokens: Sequence[Encoded],
        config: TrainConfig,
        *,
        pad_token_id: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.tokens, self.config, self.pad_token_id = tokens, config, pad_token_id
        self.rank, self.processes = rank, processes
        self.epoch, self.groups = -1, [[0]]

    def micro_batches(self, step: int) -> Iterator[tuple[Batch, int]]:
        """The micro-batches of a 0-based step, each with the seed of its blocks."""
        config = self.config
        for number in range(config.accumulate):
            place = (step * config.accumulate + number) * self.processes + self.rank
            group = self._group(place)
            some = [self.tokens[index] for index in group]
            if config.pack_length is None:
                batch = collate(some, self.pad_token_id)
            else:
                batch = pack(some, config.pack_length, self.pad_token_id)
            indices = torch.tensor([*group, -1])
            batch.chat_index.copy_(indices[batch.chat_index])
            yield batch, ((config.seed << 40) + place) % 2**63

    def _group(self, place: int) -> list[int]:
        per_epoch = len(self.tokens) // self.config.batch_size
        epoch, number = divmod(place, per_epoch)
        if epoch != self.epoch:
            self.epoch, self.groups = epoch, self._shuffled(epoch)
        return self.groups[number]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        """Conversations of similar length go together, so that little of a batch is padding.

        Each pool of at most sixteen batches is sorted by itself, so that batches differ from epoch
        to epoch.
        """
        size = self.config.batch_size
        rng = random.Random(f"{self.config.seed}/{epoch}")
        order = list(range(len(self.tokens)))
        rng.shuffle(order)
        groups = []
        batches = min(16, max(1, len(order) // (4 * size)))
        for first in range(0, len(order), batches * size):
            pool = order[first : first + batches * size]
            pool.sort(key=lambda index: len(self.tokens[index]))
            groups += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
        # A last, smaller pool may leave a few over; they have their turn in another epoch.
        rng.shuffle(groups)
        return groups[: len(order) // size]
