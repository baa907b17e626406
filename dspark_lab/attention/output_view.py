"""A forward pass's output beside the rule, as arrays of predicting slots, [row, block, slot]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dspark_lab.attention.findings import Report
from dspark_lab.blocks import Blocks
from dspark_lab.chats import Batch

# Logits that are looked at together.
CHUNK = 2**24


class OutputView:
    """Which slots are supervised and which should be, and what their labels are."""

    def __init__(
        self,
        rule: Blocks,
        batch: Batch,
        given: dict[str, Tensor],
        to_text: Callable[[int], str] | None,
    ) -> None:
        self.rule, self.given = rule, given
        self.tokens, self.docs = batch.input_ids.numpy(), rule.doc_ids.numpy()
        self.loss = (batch.loss_mask.double() > 0.5).numpy()
        anchor = rule.anchor_positions.long().numpy()
        self.last = anchor + np.take_along_axis(batch.doc_remaining.numpy(), anchor, 1)
        self.labels, self.right = rule.label_indices.numpy(), rule.eval_mask.numpy()
        self.kept = np.broadcast_to(rule.block_keep_mask.numpy()[..., None], self.right.shape)
        self.mine = (given["eval_mask"].cpu().double() > 0.5).numpy()
        self.row = np.broadcast_to(np.arange(len(self.tokens))[:, None, None], self.right.shape)
        first, tokens = rule.block_size - rule.predicted, self.tokens
        shape = self.right.shape
        self.report = Report(shape, tokens, to_text, "slots", first, self.labels)

    def at(self, values: np.ndarray, places: np.ndarray) -> np.ndarray:
        """A row's values at places of it, those past its ends at its ends."""
        return values[self.row, places.clip(0, values.shape[1] - 1)]

    def in_row(self, places: np.ndarray) -> np.ndarray:
        return (places >= 0) & (places < self.tokens.shape[1])


def by_slot(
    values: Tensor, slots: np.ndarray, judge: Callable[[Tensor, np.ndarray], Tensor]
) -> np.ndarray:
    """The flags that ``judge`` gives logits of some slots and their places, a few at a time."""
    flags, found = np.zeros_like(slots), []
    for part in torch.from_numpy(np.argwhere(slots)).split(max(1, CHUNK // values.shape[-1])):
        chosen = values.detach()[tuple(axis.to(values.device) for axis in part.unbind(1))]
        found.append(judge(chosen, part.numpy()).cpu())
    flags[slots] = torch.cat(found).numpy()
    return flags
