"""The sizes and choices of one training step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from dspark_lab.blocks import predicted_slots
from dspark_lab.checks import Count, Share, checked
from dspark_lab.tuning.shape import Shape

Dtype = Literal["bf16", "fp32"]
# Bytes of a number.
WIDTH = {"bf16": 2, "fp32": 4}


@checked
@dataclass(frozen=True)
class Step:
    """A training step on one micro-batch, for models of a :class:`~dspark_lab.tuning.Shape`.

    Attributes:
        dtype: of the matrix products.
        features: "live" runs the target on every batch; "cached" reads features in bf16 from disk,
            so that only the target's embedding and LM head stay in memory.
        target_dtype: of the target's weights; ``dtype`` where None. From bf16, the drafter makes
            fp32 copies of embedding and LM head.
        objective: "chunked" as :func:`~dspark_lab.model.dspark_objective`, or the "full" logits of
            all slots with the gradient left to autograd.
        supervised: share of the slots that have a label. A CPU computes logits for these alone.
        vocabulary: size of the vocabulary in the softmaxes; all tokens where None.
        device: decides the chunks of logits, the slots counted and what is saved.
    """

    seq_len: Count
    num_anchors: Count
    block_size: Count
    batch_size: Count = 1
    dtype: Dtype = "bf16"
    features: Literal["live", "cached"] = "live"
    target_dtype: Dtype | None = None
    objective: Literal["chunked", "full"] = "chunked"
    supervised: Share = 1.0
    vocabulary: Count | None = None
    device: Literal["cuda", "cpu"] = "cuda"

    def require_fit(self, shape: Shape) -> None:
        """Refuse "live" features without the target's shape, or a vocabulary above the model's."""
        if self.features == "live" and shape.target is None:
            wanted = "give Shape.of its target, or say 'cached'"
            raise ValueError(f"features 'live' need the target's shape: {wanted}")
        most, vocabulary = shape.vocab_size, self.vocabulary
        if vocabulary is not None and vocabulary > most:
            raise ValueError(f"vocabulary must be at most the model's, {most}, got {vocabulary}")

    def with_each(self, num_anchors: Int[np.ndarray, " choice"]) -> Step:
        """The same step for many numbers of anchors at once; counts of slots are then arrays."""
        step = copy.copy(self)
        object.__setattr__(step, "num_anchors", num_anchors)
        return step

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def slots(self) -> Any:
        return self.batch_size * self.num_anchors * self.block_size

    def predicting_slots(self, shape: Shape) -> Any:
        """Slots that predict a token."""
        return self.batch_size * self.num_anchors * predicted_slots(self.block_size, shape.layout)

    def counted_slots(self, shape: Shape) -> Any:
        """Slots whose logits are computed."""
        slots = self.predicting_slots(shape)
        if self.device == "cuda" or self.objective == "full":
            return slots
        return np.ceil(slots * self.supervised)

    def labels_beyond_rows(self, shape: Shape) -> Any:
        """Slots whose label lies beyond the row's end: three standard deviations above their mean.

        A block of n predicting slots lacks 1, 2, ..., or n - 1 labels with probability
        1 / candidates each.
        """
        candidates = max(self.seq_len - 1, 1)
        labels = predicted_slots(self.block_size, shape.layout)
        lacking = np.minimum(np.arange(labels), candidates)
        drawn = self.batch_size * np.minimum(self.num_anchors, candidates) / candidates
        return drawn * lacking.sum() + 3 * np.sqrt(drawn * (lacking**2).sum())

    @property
    def product_bytes(self) -> int:
        return WIDTH[self.dtype]

    @property
    def target_bytes(self) -> int:
        return WIDTH[self.target_dtype or self.dtype]

    @property
    def feature_bytes(self) -> int:
        """Bytes of a number of the features; on disk they are bf16."""
        return self.target_bytes if self.features == "live" else 2
