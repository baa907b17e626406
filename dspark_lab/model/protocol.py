"""The interface of a drafter, and what goes into one and comes out.

    target features, blocks -> slots          a training forward, just before the vocabulary
    anchor, cache           -> proposal       a block drafted for decoding

:class:`dspark_lab.model.drafter.Drafter` is such a drafter; another family is another class with
these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dspark_lab.attention import Backend
from dspark_lab.blocks import Blocks
from dspark_lab.checks import checked

# Takes one token of each row from its logits.
Choose = Callable[[Float[Tensor, "batch vocab"]], Int[Tensor, " batch"]]


@dataclass(frozen=True, eq=False)
class Features:
    """The target's states that a drafter reads, in the target's dtype.

    ``context`` is as :func:`dspark_lab.common.extract_context_feature` gives it; ``last`` is the
    final hidden state after the last norm, which the LM head maps to the target's logits.
    """

    context: Float[Tensor, "batch seq features"]
    last: Float[Tensor, "batch seq hidden"]


@checked
@dataclass
class Slots:
    """Every slot of a training forward that predicts, just before the vocabulary.

    A slot's logits are ``lm_head(hidden) + markov_w2(latent)``, its teacher's
    ``lm_head(target_hidden)``, each under its model's :class:`~dspark_lab.model.LogitRule`.
    ``latent`` is None without a Markov head, ``confidence_pred`` (logits) without a confidence
    head, ``target_hidden`` where no teacher was given. ``prev_ids`` are the tokens before those to
    predict; what slots past the row's end hold has no meaning.
    """

    hidden: Float[Tensor, "batch anchor slot hidden"]
    latent: Float[Tensor, "batch anchor slot rank"] | None
    confidence_pred: Float[Tensor, "batch anchor slot"] | None
    target_hidden: Float[Tensor, "batch anchor slot hidden"] | None
    target_ids: Int[Tensor, "batch anchor slot"]
    prev_ids: Int[Tensor, "batch anchor slot"]
    eval_mask: Bool[Tensor, "batch anchor slot"]
    block_keep_mask: Bool[Tensor, "batch anchor"]


@dataclass
class Proposal:
    """A block of each row: its tokens, and the confidence head's logits where there is one."""

    tokens: Int[Tensor, "batch slot"]
    confidence: Float[Tensor, "batch slot"] | None


@dataclass(frozen=True)
class DrafterSizes:
    """The sizes that a drafter's cost and memory follow from, counted on the module itself.

    ``latent_weights`` are in the matrices that make a slot's latent, ``latent_kept`` numbers a slot
    stay for the backward pass; the confidence head reads ``confidence_width`` numbers of a slot.
    """

    trained_parameters: int
    latent_weights: int
    latent_kept: float
    confidence_width: int


class BlockDrafter(Protocol):
    """All that decoding and the counting of costs ask of a drafter.

    Its ``config`` has ``block_size``, ``layout``, ``predicted`` (slots of a block that predict),
    ``mask_token_id``, ``vocab_size``, ``target_layer_ids``, ``context_size`` and
    ``enable_confidence_head``.
    """

    @property
    def config(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def sizes(self) -> DrafterSizes: ...

    def slots(
        self,
        blocks: Blocks,
        target_hidden_states: Tensor,
        target_last_hidden_states: Tensor | None = None,
        *,
        backend: Backend = "auto",
    ) -> Slots: ...
    def start_cache(self, batch: int, capacity: int) -> Any: ...
    def read(self, context: Tensor, cache: Any, counts: Sequence[int]) -> None: ...
    def propose(
        self, anchor_ids: Tensor, cache: Any, choose: Choose, length: int | None = None
    ) -> Proposal: ...


class TargetWeights(Protocol):
    """All that loading a drafter asks of a target."""

    @property
    def embed_weight(self) -> Float[Tensor, "vocab hidden"]: ...
    @property
    def head_weight(self) -> Float[Tensor, "vocab hidden"]: ...
    @property
    def num_layers(self) -> int: ...
