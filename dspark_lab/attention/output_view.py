"""A forward pass's output beside the rule, and how findings are made from its slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark_lab.attention.findings import Finding, Mark, token_shown
from dspark_lab.blocks import Blocks
from dspark_lab.chats import Batch

# Logits that are looked at together.
CHUNK = 2**24


class OutputView:
    """The output and the rule as arrays, and how a finding is made from slots."""

    def __init__(
        self,
        rule: Blocks,
        batch: Batch,
        given: dict[str, Tensor],
        to_text: Callable[[int], str] | None,
    ) -> None:
        self.rule, self.given, self.to_text = rule, given, to_text
        self.tokens, self.docs = batch.input_ids.numpy(), rule.doc_ids.numpy()
        self.loss = (batch.loss_mask.double() > 0.5).numpy()
        anchor = rule.anchor_positions.long().numpy()
        self.last = anchor + np.take_along_axis(batch.doc_remaining.numpy(), anchor, 1)
        self.labels, self.right = rule.label_indices.numpy(), rule.eval_mask.numpy()
        self.kept = np.broadcast_to(rule.block_keep_mask.numpy()[..., None], self.right.shape)
        self.mine = (given["eval_mask"].cpu().double() > 0.5).numpy()
        self.row = np.broadcast_to(np.arange(len(self.tokens))[:, None, None], self.right.shape)

    def at(self, values: np.ndarray, places: np.ndarray) -> np.ndarray:
        """A row's values at places of it, those past its ends at its ends."""
        return values[self.row, places.clip(0, values.shape[1] - 1)]

    def in_row(self, places: np.ndarray) -> np.ndarray:
        return (places >= 0) & (places < self.tokens.shape[1])

    def found(
        self,
        rule: str,
        finding: str,
        slots: np.ndarray,
        among: np.ndarray,
        verdict: Mark = "broken",
    ) -> Finding:
        row, block, slot = map(int, np.argwhere(slots)[0])
        key, token, text = int(self.labels[row, block, slot]), None, ""
        if key < self.tokens.shape[1]:
            token, text = token_shown(int(self.tokens[row, key]), self.to_text)
        words = [f"row {row}"] if len(self.tokens) > 1 else []
        first = self.rule.block_size - self.rule.predicted
        words += [f"block {block}", f"slot {slot + first}", f"label {key}{text}"]
        counted = int(slots.sum()), int(among.sum()), "slots"
        place: dict[str, Any] = {"row": row, "block": block, "slot": slot + first, "key": key}
        place |= {"token": token, "place": ", ".join(words)}
        return Finding(rule, verdict, finding, *counted, **place)

    def held(self, rule: str, among: Any) -> Finding:
        of = int(np.sum(among))
        return Finding(rule, "held" if of else "no case", of=of, unit="slots")


def chunks(values: Tensor, slots: np.ndarray) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Logits of chosen slots, a few slots at a time, with their places."""
    places = torch.from_numpy(np.argwhere(slots))
    for part in places.split(max(1, CHUNK // values.shape[-1])):
        chosen = part.unbind(1)
        yield values.detach()[tuple(axis.to(values.device) for axis in chosen)], chosen
