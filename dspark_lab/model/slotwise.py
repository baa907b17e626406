"""Arithmetic of the slots of a block: logits, loss weights, accept rates, survival."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dspark_lab.checks import Count, Device, Positive, checked, may_be_read


class _Divisor:
    """A number > 0 that fp32 can divide by; infinity is one."""

    def check(self, name: str, value: float) -> None:
        smallest = torch.finfo(torch.float32).tiny
        if not value >= smallest:
            raise ValueError(f"{name} must be > 0, at least {smallest:.3g}, got {value}")


DecayGamma = Annotated[float, _Divisor()]


@checked
@dataclass(frozen=True)
class LogitRule:
    """What a model makes of its LM head's product: ``scale * (soft cap of it + bias)``.

    The soft cap, c tanh(x / c) with c = ``cap``, is Gemma's (arXiv 2408.00118, section 2); the
    factor is Cohere's or Granite's. A Markov bias stands behind the cap.
    """

    cap: Positive | None = None
    scale: Positive = 1.0

    def __call__(
        self,
        product: Float[Tensor, "*axes vocab"],
        bias: Float[Tensor, "*axes vocab"] | None = None,
    ) -> Float[Tensor, "*axes vocab"]:
        if self.cap is not None:
            product = self.cap * (product / self.cap).tanh()
        if bias is not None:
            product = product + bias
        return product if self.scale == 1 else self.scale * product


PLAIN = LogitRule()


def check_token_ids(ids: Int[Tensor, "batch seq"], vocab_size: int) -> None:
    """Refuse an empty tensor, and ids outside the vocabulary (on a GPU in debug mode alone)."""
    if ids.numel() == 0:
        raise ValueError(f"input_ids must hold tokens, got shape {tuple(ids.shape)}")
    if may_be_read(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wanted = f"in the vocabulary, [0, {vocab_size - 1}]"
        found = f"ids from {int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"input_ids must lie {wanted}, got {found}")


@checked
def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and softmaxes: fp32 for narrower numbers, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@checked
def decay_weights(
    block_size: Count,
    loss_decay_gamma: DecayGamma,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
) -> Float[Tensor, " slot"]:
    """w_k = exp(-k / gamma), the loss weight of slot k (DSpark, section 3.4); gamma may be inf.

    Slots are counted from 0 among those that predict.
    """
    return torch.exp(-torch.arange(block_size, device=device, dtype=dtype) / loss_decay_gamma)


@checked
def slot_weights(
    eval_mask: Bool[Tensor, "batch anchor slot"], loss_decay_gamma: DecayGamma, dtype: torch.dtype
) -> Float[Tensor, "batch anchor slot"]:
    """:func:`decay_weights` on supervised slots, 0 elsewhere."""
    decay = decay_weights(eval_mask.shape[-1], loss_decay_gamma, dtype, eval_mask.device)
    return decay * eval_mask


@checked
def survival(
    rates: Float[Tensor, "*axes slot"], eval_mask: Bool[Tensor, "*axes slot"]
) -> Float[Tensor, "*axes slot"]:
    """The product of a block's rates up to each supervised slot; 0 on slots that are not."""
    return torch.where(eval_mask, rates, 0).cumprod(dim=-1)


def distance(
    draft_logits: Float[Tensor, "*axes vocab"], target_logits: Float[Tensor, "*axes vocab"]
) -> Float[Tensor, "*axes"]:
    """||p - q||_1 of two softmaxes."""
    wide = at_least_fp32(draft_logits.dtype)
    draft, target = (x.to(wide).softmax(dim=-1) for x in (draft_logits, target_logits))
    return (draft - target).abs().sum(dim=-1)


def rate_of_distance(l1: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """c* = 1 - l1 / 2 (section 3.3) from l1 = ||p - q||_1, which may end a rounding above 2."""
    return (1 - l1 / 2).clamp(min=0)
