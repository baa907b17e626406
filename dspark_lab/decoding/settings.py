"""The settings of a decoding run, and whether target and drafter can do what they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dspark_lab.model import BlockDrafter, Target

# How many slots of each row to verify, from the confidences of them all.
Scheduler = Callable[[Float[Tensor, "batch slot"]], Int[Tensor, " batch"]]


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`dspark_lab.decoding.decode_rounds` that say how to decode."""

    temperature: float
    top_p: float
    threshold: float | None
    scheduler: Scheduler | None
    draft_length: int | None
    confidence_temperatures: Sequence[float] | None

    def check_models(self, target: Target, drafter: BlockDrafter | None) -> None:
        """Refuse settings that these models cannot follow, and a drafter of another target."""
        if drafter is None:
            for name in ("threshold", "scheduler", "draft_length", "confidence_temperatures"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs a drafter, got none")
            return
        c = drafter.config
        own, theirs = c.vocab_size, target.vocab_size
        if own != theirs:
            raise ValueError(f"drafter and target must share a vocabulary, got {own} and {theirs}")
        width = len(c.target_layer_ids) * target.hidden_size
        if c.context_size != width or max(c.target_layer_ids) >= target.num_layers:
            raise ValueError(
                f"drafter must read layers {list(c.target_layer_ids)} as {c.context_size} numbers, "
                f"got a target with {target.num_layers} layers of {target.hidden_size}"
            )
        most = c.predicted
        slots, given = self.draft_length or most, self.confidence_temperatures
        if slots > most:
            block = "block_size" if most == c.block_size else "block_size less the anchor,"
            raise ValueError(f"draft_length must be at most {block} {most}, got {slots}")
        by_confidence = (self.threshold, self.scheduler, given)
        if not c.enable_confidence_head and by_confidence != (None, None, None):
            names = "threshold, scheduler and confidence_temperatures"
            raise ValueError(f"{names} need a drafter with a confidence head")
        if given is not None and len(given) < slots:
            words = f"one for each of {slots} slots"
            raise ValueError(f"confidence_temperatures must be {words}, got {len(given)}")


def confident_prefix(
    confidence: Float[Tensor, "batch slot"], threshold: float
) -> Int[Tensor, " batch"]:
    """How many slots of each row come before the first whose confidence is below."""
    return (confidence >= threshold).cumprod(dim=1).sum(dim=1)


def scheduled(
    scheduler: Scheduler, confidence: Float[Tensor, "batch slot"], room: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """How many slots of each row the scheduler wants to verify.

    It sees slots behind a row's ``room`` with confidence 0: they take nothing from other rows.
    """
    slot = torch.arange(confidence.shape[1], device=confidence.device)
    outside = slot >= room.to(confidence.device).unsqueeze(1)
    given = scheduler(confidence.masked_fill(outside, 0))
    try:
        wanted = torch.as_tensor(given).to(room.device)
    except (TypeError, ValueError, RuntimeError):
        wanted = torch.empty(0)
    if wanted.shape != room.shape or wanted.dtype.is_floating_point or (wanted < 0).any():
        found = given.tolist() if isinstance(given, Tensor) else repr(given)
        rule = f"scheduler must return {len(room)} whole numbers of slots, at least 0"
        raise ValueError(f"{rule}, got {found}")
    return wanted.minimum(room)
