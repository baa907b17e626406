"""The settings of a training run."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from dspark_lab.blocks import Per
from dspark_lab.checks import Count, NonNegative, Share, Size, Within, checked
from dspark_lab.model import DecayGamma

Beta = Annotated[float, Within(0, math.nextafter(1, 0))]
Gamma = Annotated[DecayGamma, Within(0, sys.float_info.max)]  # finite, for the sake of JSON


@checked
@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run.

    Args:
        steps: of the optimiser.
        batch_size: rows of a micro-batch.
        accumulate: micro-batches of a step, on each process.
        num_anchors: blocks of a row, or of what anchors_per says.
        anchors_per: num_anchors counts for each row, for each document (conversation) of a packed
            row, or for all rows of a micro-batch together.
        max_length: tokens that a conversation is cut to.
        pack_length: tokens of a row that holds as many conversations as fit; where not given, each
            conversation has a row of its own.
        learning_rate: AdamW's highest, after the warm-up.
        warmup_steps: steps over which the learning rate rises from 0.
        schedule: how it falls afterwards.
        final_lr_ratio: what it falls to, one step after the last, as a share of the highest.
        weight_decay: of matrices; vectors have none.
        beta1: AdamW's first.
        beta2: AdamW's second.
        clip_norm: the largest norm of a gradient, 0 for no limit.
        seed: of the order of conversations and of the blocks.
        precision: bf16 has matrix products in bfloat16, weights and sums in fp32.
        ce_weight: of the cross-entropy in the loss.
        l1_weight: of the distance between drafter and target.
        confidence_weight: of the confidence head's cross-entropy.
        loss_decay_gamma: slot k weighs exp(-k / gamma).
        ce_only_fraction: over this first part of the run the three weights move from the
            cross-entropy alone to those given.
        vocabulary: seen has both softmaxes over the tokens that occur in the conversations: an
            approximation, the faster the fewer they are. Evaluations are over all tokens.
        checkpoint_every: steps from checkpoint to checkpoint, 0 for one at the end.
        keep_checkpoints: how many are kept.
        evaluate_every: steps from evaluation to evaluation, 0 for one at the end.
        evaluate_anchors: blocks of each held-out conversation that are evaluated.
    """

    steps: Count
    batch_size: Count = 8
    accumulate: Count = 1
    num_anchors: Count = 64
    anchors_per: Per = "row"
    max_length: Count = 2048
    pack_length: Count | None = None
    learning_rate: NonNegative = 6e-4
    warmup_steps: Size = 20
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_ratio: Share = 0.05
    weight_decay: NonNegative = 0.0
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    clip_norm: NonNegative = 1.0
    seed: Size = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    ce_weight: NonNegative = 0.1
    l1_weight: NonNegative = 0.9
    confidence_weight: NonNegative = 1.0
    loss_decay_gamma: Gamma = 4.0
    ce_only_fraction: Share = 0.0
    vocabulary: Literal["full", "seen"] = "full"
    checkpoint_every: Size = 0
    keep_checkpoints: Count = 2
    evaluate_every: Size = 0
    evaluate_anchors: Count = 32

    def __post_init__(self) -> None:
        length, most = self.pack_length, self.max_length
        if length is not None and length < most:
            raise ValueError(f"pack_length must be at least max_length, {most}, got {length}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate at 0-based ``step``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1}
        last = self.final_lr_ratio
        return self.learning_rate * (last + (1 - last) * left[self.schedule])

    def term_weights_at(self, step: int) -> dict[str, float]:
        """Weights of the three terms at 0-based ``step``."""
        turn = self.ce_only_fraction * self.steps
        share = 1.0 if turn == 0 else min(1.0, step / turn)
        return {
            "ce_weight": 1 - share + self.ce_weight * share,
            "l1_weight": self.l1_weight * share,
            "confidence_weight": self.confidence_weight * share,
        }
