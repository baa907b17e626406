"""Arithmetic of the slots of a block: loss weights, accept rates, survival (DSpark, section 3)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dspark_lab.checks import require_bool, require_tensor
from dspark_lab.common import DSparkForwardOutput

__all__ = [
    "accept_rates",
    "at_least_fp32",
    "decay_weights",
    "distance",
    "rate_of_distance",
    "slot_weights",
    "survival",
]


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and softmaxes: fp32 for narrower numbers, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def decay_weights(
    block_size: int,
    loss_decay_gamma: float,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Float[Tensor, " slot"]:
    """w_k = exp(-k / gamma), the loss weight of slot k (DSpark, section 3.4); gamma may be inf.

    Raises:
        TypeError, ValueError: a gamma that is no number, or too small for fp32 to divide by.
    """
    if isinstance(loss_decay_gamma, bool) or not isinstance(loss_decay_gamma, (int, float)):
        raise TypeError(f"loss_decay_gamma must be a number, got {loss_decay_gamma!r}")
    smallest = torch.finfo(torch.float32).tiny
    if not loss_decay_gamma >= smallest:
        raise ValueError(f"loss_decay_gamma must be > 0, got {loss_decay_gamma}")
    slot = torch.arange(block_size, device=device, dtype=dtype)
    return torch.exp(-slot / loss_decay_gamma)


def slot_weights(
    eval_mask: Bool[Tensor, "batch anchor slot"], loss_decay_gamma: float, dtype: torch.dtype
) -> Float[Tensor, "batch anchor slot"]:
    """:func:`decay_weights` on supervised slots, 0 elsewhere."""
    require_tensor("eval_mask", eval_mask, ("batch", "anchor", "slot"))
    require_bool("eval_mask", eval_mask)
    decay = decay_weights(eval_mask.shape[-1], loss_decay_gamma, dtype, eval_mask.device)
    return decay * eval_mask


def survival(
    rates: Float[Tensor, "*axes slot"], eval_mask: Bool[Tensor, "*axes slot"]
) -> Float[Tensor, "*axes slot"]:
    """The product of a block's rates up to each supervised slot; 0 on slots that are not."""
    return torch.where(eval_mask, rates, 0).cumprod(dim=-1)


def accept_rates(output: DSparkForwardOutput) -> Float[Tensor, "batch anchor slot"]:
    """c* = 1 - ||p - q||_1 / 2 of every slot, supervised or not, in fp32 at least (section 3.3).

    Raises:
        ValueError: the output has no ``aligned_target_logits``.
    """
    if output.aligned_target_logits is None:
        raise ValueError("accept rates need aligned_target_logits, which the output does not have")
    return rate_of_distance(distance(output.draft_logits, output.aligned_target_logits))


def distance(
    draft_logits: Float[Tensor, "*axes vocab"], target_logits: Float[Tensor, "*axes vocab"]
) -> Float[Tensor, "*axes"]:
    """||p - q||_1 of two softmaxes."""
    wide = at_least_fp32(draft_logits.dtype)
    draft, target = (x.to(wide).softmax(dim=-1) for x in (draft_logits, target_logits))
    return (draft - target).abs().sum(dim=-1)


def rate_of_distance(l1: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """c* from l1 = ||p - q||_1, which rounding may take a little above 2."""
    return (1 - l1 / 2).clamp(min=0)
