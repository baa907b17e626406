"""Attention of every slot to what the training mask lets it see, and its three back ends."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from dspark_lab.attention.blockwise import blockwise_attention
from dspark_lab.attention.compiled import Compiled
from dspark_lab.attention.mask import ContextRanges, block_mask, context_ranges, dense_mask
from dspark_lab.checks import BlockSize, Count, Finite, SeqLen, checked

Backend = Literal["auto", "dense", "flex", "blockwise"]
MaskForm = BlockMask | Tensor


@checked
def block_attention(
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    v: Float[Tensor, "batch kv_heads key head_dim"],
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    *,
    seq_len: SeqLen,
    block_size: BlockSize,
    doc_ids: Int[Tensor, "batch seq"] | None = None,
    window: Count | None = None,
    causal: bool = False,
    scale: Finite | None = None,
    backend: Backend = "auto",
    block_mask: BlockMask | None = None,
) -> Float[Tensor, "batch heads query head_dim"]:
    """Attention of every slot to what the training mask lets it see, see :func:`context_ranges`.

    Three back ends give the same result and the same gradients, up to rounding:

    - ``dense``: torch's SDPA with the dense mask, on any device;
    - ``flex``: FlexAttention with the closed-form block mask; the choice for GPUs, where it runs
      compiled, or, if that fails, ``dense`` in its place with a warning. On the CPU it runs forward
      only, for inputs that need no gradient, and is compiled with the model around it alone;
    - ``blockwise``: for the CPU; forms no mask of size queries times keys. Computes in fp32 at
      least.

    Args:
        q: the slots of all blocks, block after block.
        k, v: those of the context's tokens, then of the slots; heads of ``q`` may share them.
        scale: factor on the scores; 1 / sqrt(head_dim) where None.
        backend: ``auto`` takes ``flex`` on CUDA, ``blockwise`` on the CPU, elsewhere ``dense``.
        block_mask: for ``flex``, that of the same blocks, where several calls share one.
    """
    sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size}
    sizes |= {"window": window, "causal": causal}
    ranges = context_ranges(anchor_positions, block_keep_mask, doc_ids=doc_ids, **sizes)
    backend = choose_backend(q.device) if backend == "auto" else backend
    form = block_mask if backend == "flex" else None
    return attend(q, k, v, ranges, scale=scale, backend=backend, form=form)


@checked
def attend(
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    v: Float[Tensor, "batch kv_heads key head_dim"],
    ranges: ContextRanges,
    *,
    scale: Finite | None = None,
    backend: Backend = "auto",
    form: MaskForm | None = None,
) -> Float[Tensor, "batch heads query head_dim"]:
    """:func:`block_attention` under the mask of ``ranges``, for layers that share one draw.

    ``form`` is what :func:`mask_form` makes for the same ``ranges`` and ``backend``, so that the
    layers share it, too.
    """
    _check_fit(q, k, v, ranges)
    backend = choose_backend(q.device) if backend == "auto" else backend
    on_cpu = q.device.type == "cpu"
    options: dict[str, Any] = {"scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale}
    # A branch, so that it is a constant to a compiler that does not know the numbers of heads.
    options["enable_gqa"] = True if q.shape[1] != k.shape[1] else False
    if backend == "flex":
        needs_gradient = q.requires_grad or k.requires_grad or v.requires_grad
        if on_cpu and torch.is_grad_enabled() and needs_gradient:
            raise ValueError("backend 'flex' has no backward pass on the CPU, 'blockwise' has one")
    if backend == "blockwise" and not on_cpu:
        raise ValueError(f"backend 'blockwise' runs on the CPU, got tensors on {q.device}")
    mask: Any = mask_form(ranges, backend) if form is None else form
    if backend == "flex":
        run = flex_attention if on_cpu else flex if _has_kernel(q) else dense_for_flex
        return run(q, k, v, block_mask=mask, **options)
    if backend == "dense":
        return _dense(q, k, v, mask, **options)
    sizes = ranges.seq_len, ranges.block_size, ranges.view.window, ranges.view.causal
    return blockwise_attention(q, k, v, mask, *sizes, float(options["scale"]))[0]


@checked
def mask_form(ranges: ContextRanges, backend: Backend) -> MaskForm:
    """The mask as a back end reads it: a ``BlockMask``, a dense mask, or starts and ends alone."""
    if backend == "flex":
        return block_mask(ranges)
    return dense_mask(ranges) if backend == "dense" else torch.stack([ranges.start, ranges.end])


@checked
def choose_backend(device: torch.device) -> Backend:
    """The back end that ``auto`` takes on a device."""
    if device.type == "cuda":
        return "dense" if flex.failed else "flex"
    return "blockwise" if device.type == "cpu" else "dense"


def _has_kernel(q: Tensor) -> bool:
    """Whether FlexAttention has kernels for such heads on a GPU."""
    return q.shape[-1] >= 16 and q.dtype != torch.float64


def _dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "batch query key"], **options: Any
) -> Tensor:
    if options["enable_gqa"] and q.is_cuda:
        # There a mask and shared heads together leave only the kernel that keeps all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        options["enable_gqa"] = False
    return scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), **options)


def dense_for_flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, enable_gqa: bool, **options: Any
) -> Tensor:
    """What ``flex`` computes, by the dense back end."""
    sizes = len(q), None, q.shape[2], k.shape[2]
    mask = create_mask(block_mask.mask_mod, *sizes, device=q.device)
    return _dense(q, k, v, mask.squeeze(1), enable_gqa=enable_gqa, **options)


# FlexAttention on a GPU.
flex = Compiled(flex_attention, dense_for_flex)


def _check_fit(q: Tensor, k: Tensor, v: Tensor, ranges: ContextRanges) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of k and v must divide those of q, got {kv_heads} and {heads}")
    for name, tensor, length in (("q", q, ranges.queries), ("k", k, ranges.keys)):
        if tensor.shape[2] != length:
            wanted = f"{length} positions at block_size {ranges.block_size}"
            raise ValueError(f"{name} must have {wanted}, got shape {tuple(tensor.shape)}")
    device = ranges.start.device
    if q.device != device:
        raise ValueError(f"q must be on the device of the blocks, {device}, got {q.device}")
