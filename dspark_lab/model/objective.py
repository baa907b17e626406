"""The training objective of DSpark, and the sums from which its figures follow.

Three terms for each supervised slot k, with p the drafter's and q the target's distribution:

    ce:         -log p[label];
    l1:         ||p - q||_1, and with it the accept rate c* = 1 - l1 / 2;
    confidence: the binary cross-entropy of the confidence head's logit against c*, a constant.

Each is weighted by w_k = exp(-k / gamma), summed over the supervised slots and divided by the sum
of the weights; the loss is 0.1 ce + 0.9 l1 + 1.0 confidence (DSpark, section 3.4).

:func:`output_objective` is this definition on full logits. :func:`dspark_objective` is the same
from hidden states: logits exist for a chunk of slots at a time, and their gradient is formed in the
same pass, so that memory does not grow with the number of anchors.

A drafter of a reduced vocabulary is compared with the target's whole distribution, as in
verification: l1 and c* count what it cannot predict. A label that it cannot predict has no ce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from dspark_lab.checks import Count, NonNegative, checked, debug_range
from dspark_lab.common import DSparkForwardOutput
from dspark_lab.model.protocol import Slots
from dspark_lab.model.slotwise import (
    PLAIN,
    DecayGamma,
    LogitRule,
    at_least_fp32,
    distance,
    rate_of_distance,
    slot_weights,
    survival,
)

# What is enough for fast matrix products: on a CPU so many logits of a chunk, on a GPU so many
# slots, if two fp32 logits of each take no more than a share of the memory that is free.
_CHUNK = 192 * 49152
_GPU_SLOTS, _FREE_SHARE = 512, 1 / 8
# Logits on CPU and GPU of a tile of a chunk, which goes through softmax and gradient together: few
# enough to stay in the cache.
_TILE = 16 * 49152, 2**23


@dataclass
class Sums:
    """Unreduced sums of a batch, so that ratios can be formed over many batches and processes.

    Supervised slots (``count``), their summed ``weight``, the weighted ``ce``, ``l1`` and
    ``confidence`` terms, and unweighted sums over supervised slots: ``accept`` of c*,
    ``confidence_error`` of |sigmoid - c*|, ``confidence_bias`` of sigmoid - c*, ``survival`` of the
    product of c* up to the slot, ``cumulative_bias`` of the same product of sigmoids less that of
    c*. ``blocks`` counts blocks with a supervised slot. Without teacher or confidence head, sums
    that need it are NaN.
    """

    count: Float[Tensor, " slot"]
    weight: Float[Tensor, " slot"]
    ce: Float[Tensor, " slot"]
    l1: Float[Tensor, " slot"]
    confidence: Float[Tensor, " slot"]
    accept: Float[Tensor, " slot"]
    confidence_error: Float[Tensor, " slot"]
    confidence_bias: Float[Tensor, " slot"]
    survival: Float[Tensor, " slot"]
    cumulative_bias: Float[Tensor, " slot"]
    blocks: Float[Tensor, ""]

    def stacked(self) -> Float[Tensor, "field slot"]:
        """All fields in one tensor, ``blocks`` spread over a row, to add or transfer at once."""
        return torch.stack([getattr(self, f.name).expand_as(self.count) for f in fields(self)])

    @classmethod
    def from_stacked(cls, rows: Float[Tensor, "field slot"]) -> Sums:
        values = {field.name: row for field, row in zip(fields(cls), rows, strict=True)}
        values["blocks"] = values["blocks"][0]
        return cls(**values)

    def summary(self) -> dict[str, Any]:
        """Figures as Python numbers; one that is undefined (0 / 0, no teacher) is NaN.

        ``ce``, ``l1``, ``confidence`` are weighted means, the others means over supervised slots;
        ``tau`` is 1 + summed survival / blocks, the expected accepted length.
        """
        s = Sums.from_stacked(self.stacked().double().cpu())
        weight, count = s.weight.sum(), s.count.sum()
        return {
            "ce": float(s.ce.sum() / weight),
            "l1": float(s.l1.sum() / weight),
            "confidence": float(s.confidence.sum() / weight),
            "accept_rate": float(s.accept.sum() / count),
            "tau": float(1 + s.survival.sum() / s.blocks),
            "confidence_error": float(s.confidence_error.sum() / count),
            "confidence_bias": float(s.confidence_bias.sum() / count),
            "accept_by_slot": (s.accept / s.count).tolist(),
            "survival_by_slot": (s.survival / s.blocks).tolist(),
            "confidence_error_by_slot": (s.confidence_error / s.count).tolist(),
            "confidence_bias_by_slot": (s.confidence_bias / s.count).tolist(),
            "cumulative_bias_by_slot": (s.cumulative_bias / s.count).tolist(),
            "slots": int(count),
            "blocks": int(s.blocks),
        }


@dataclass
class Objective:
    """The loss, a scalar to call ``backward`` on, the accept rates, and the sums (no gradient).

    ``accept`` is c*; NaN on slots that are not supervised, and throughout without a teacher.
    """

    loss: Float[Tensor, ""]
    accept: Float[Tensor, "batch anchor slot"]
    sums: Sums


@checked
def output_objective(
    output: DSparkForwardOutput,
    *,
    ce_weight: NonNegative = 0.1,
    l1_weight: NonNegative = 0.9,
    confidence_weight: NonNegative = 1.0,
    loss_decay_gamma: DecayGamma = 4.0,
    normaliser: Float[Tensor, ""] | None = None,
) -> Objective:
    """The objective by its definition, from full logits, with the gradient left to autograd.

    The target's logits are constants. Arguments and errors as :func:`dspark_objective`.
    """
    _require_teacher(output.aligned_target_logits, l1_weight, confidence_weight)
    debug_range("target_ids", output.target_ids, 0, output.draft_logits.shape[-1])
    weights, share = _weigh(
        output.eval_mask, loss_decay_gamma, output.draft_logits.dtype, normaliser
    )
    log_probs = output.draft_logits.to(share.dtype).log_softmax(dim=-1)
    ce = -log_probs.gather(-1, output.target_ids.long().unsqueeze(-1)).squeeze(-1)
    ce = torch.where(ce.isposinf(), 0, ce)
    l1 = torch.full_like(ce, torch.nan)
    loss = ce_weight * (share * ce).sum()
    if output.aligned_target_logits is not None:
        l1 = distance(output.draft_logits, output.aligned_target_logits.detach())
        loss = loss + l1_weight * (share * l1).sum()
    return _finish(loss, share, weights, ce, l1, output, confidence_weight)


@checked
def dspark_objective(
    slots: Slots,
    lm_head_weight: Float[Tensor, "vocab hidden"],
    markov_w2_weight: Float[Tensor, "vocab rank"] | None = None,
    *,
    ce_weight: NonNegative = 0.1,
    l1_weight: NonNegative = 0.9,
    confidence_weight: NonNegative = 1.0,
    loss_decay_gamma: DecayGamma = 4.0,
    normaliser: Float[Tensor, ""] | None = None,
    chunk: Count | None = None,
    draft_rule: LogitRule = PLAIN,
    target_rule: LogitRule = PLAIN,
    draft_ids: Int[Tensor, " vocab"] | None = None,
    target_head_weight: Float[Tensor, "target_vocab hidden"] | None = None,
) -> Objective:
    """The objective from hidden states, ``chunk`` slots at a time (:func:`most_slots` where None).

    Softmaxes and sums are in fp32 at least. The matrix products are in the dtype of
    ``slots.hidden``, or in autocast's where that is on; weights of another dtype are converted once
    a call. Unsupervised slots have no influence, even if they hold NaN or labels outside the
    vocabulary. Compiles with ``fullgraph=True``; gradients of gradients are not available.

    Args:
        lm_head_weight: of drafter and target; gets the drafter's gradient if it asks for one.
        markov_w2_weight: given iff ``slots.latent`` is.
        ce_weight, l1_weight, confidence_weight: of the three terms. Without a teacher
            (``slots.target_hidden`` None) the last two must be 0.
        loss_decay_gamma: in slots; the larger, the more late slots count.
        normaliser: the divisor in place of this batch's summed weights: over several batches or
            processes, theirs together.
        draft_rule, target_rule: what each model makes of its LM head's product.
        draft_ids: of a reduced vocabulary, the target's id of each of its tokens, all different.
            ``target_head_weight`` is then the target's LM head, ``lm_head_weight`` the drafter's.
    """
    if (draft_ids is None) != (target_head_weight is None):
        alone = "target_head_weight" if draft_ids is None else "draft_ids"
        raise ValueError(f"draft_ids and target_head_weight go together, got {alone} alone")
    _require_teacher(slots.target_hidden, l1_weight, confidence_weight)
    inputs = (slots.hidden, slots.latent, lm_head_weight, markov_w2_weight)
    _check_weights(*inputs)
    device, dtype = slots.hidden.device.type, slots.hidden.dtype
    weights, share = _weigh(slots.eval_mask, loss_decay_gamma, dtype, normaliser)
    asks = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    head_asks = torch.is_grad_enabled() and lm_head_weight.requires_grad
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)

    states = [
        None if x is None else x.flatten(0, 2).to(dtype)
        for x in (slots.hidden, slots.latent, slots.target_hidden)
    ]
    marks = slots.target_ids.flatten().long(), slots.eval_mask.flatten(), share.flatten()
    weights_of = lm_head_weight, markov_w2_weight, target_head_weight
    heads = [None if x is None else x.to(dtype) for x in weights_of]
    rules = draft_rule.cap, draft_rule.scale, target_rule.cap, target_rule.scale
    settings = float(ce_weight), float(l1_weight), chunk, asks, head_asks
    # The products are in `dtype` already, and everything else stays wide.
    with torch.autocast(device, enabled=False):
        loss, ce, l1, *_ = _chunked(*states, *marks, *heads, draft_ids, *rules, *settings)
    ce, l1 = (x.detach().view(slots.eval_mask.shape) for x in (ce, l1))
    if slots.target_hidden is None:
        l1 = torch.full_like(l1, torch.nan)
    return _finish(loss, share, weights, ce, l1, slots, confidence_weight)


@checked
def most_slots(vocab_size: Count, on_gpu: bool, free_bytes: float = math.inf) -> int:
    """The most slots whose logits :func:`dspark_objective` makes at one time by default.

    ``free_bytes``: of a GPU's memory; the more is free, the larger the chunks, up to a limit.
    """
    if not on_gpu:
        return max(1, _CHUNK // vocab_size)
    return max(1, int(min(_GPU_SLOTS, free_bytes * _FREE_SHARE / (8 * vocab_size))))


@checked
def chunk_sizes(
    slots: float | Shaped[np.ndarray, "*axes"],
    vocab_size: Count,
    on_gpu: bool,
    chunk: Count | None = None,
) -> tuple[Any, Any, Any]:
    """How :func:`dspark_objective` divides its slots: even chunks, each gone through by tiles.

    ``slots`` are those whose logits are computed: on a GPU all, on a CPU the supervised ones.
    Returns the number of chunks, the slots of the largest, and those of a tile; arrays for arrays.
    """
    most = most_slots(vocab_size, on_gpu) if chunk is None else chunk
    chunks = np.maximum(1, -(-slots // most))
    largest = -(-slots // chunks)
    return chunks, largest, np.minimum(largest, max(1, _TILE[on_gpu] // vocab_size))


@torch.library.custom_op("dspark_lab::chunked_objective", mutates_args=())
def _chunked(
    hidden: Tensor,
    latent: Tensor | None,
    teacher: Tensor | None,
    labels: Tensor,
    supervised: Tensor,
    share: Tensor,
    head: Tensor,
    w2: Tensor | None,
    target_head: Tensor | None,
    draft_ids: Tensor | None,
    draft_cap: float | None,
    draft_scale: float,
    target_cap: float | None,
    target_scale: float,
    ce_weight: float,
    l1_weight: float,
    chunk: int | None,
    asks: bool,
    head_asks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of ce and l1, both per slot, and its gradients in hidden, latent, w2 and head, in
    one pass; a gradient is empty where nobody asks."""
    rules = LogitRule(draft_cap, draft_scale), LogitRule(target_cap, target_scale)
    heads = _Heads(head, w2, target_head, draft_ids, *rules)
    count, vocab, whole = hidden.shape[0], head.shape[0], heads.whole.shape[0]
    ce, l1 = share.new_zeros(count), share.new_zeros(count)
    d_hidden, d_latent, d_w2, d_head = _gradients(hidden, latent, head, w2, asks, head_asks)
    chosen, on_gpu = _chosen(supervised), hidden.device.type != "cpu"
    if chunk is None and hidden.is_cuda:
        chunk = most_slots(whole, on_gpu, _free_bytes(hidden.device))
    chunks, most, few = map(int, chunk_sizes(len(chosen), whole, on_gpu, chunk))
    of_both = teacher is not None and target_head is None
    logits = hidden.new_empty(2 * most if of_both else most, vocab)
    narrow = hidden.dtype != share.dtype and draft_ids is None
    columns = vocab if draft_ids is None else vocab + 1
    spare = share.new_empty(3 if narrow else 1, few, columns)
    # The gradients of logits are divided by the weight of l1, or of ce where there is no l1.
    unit = l1_weight if teacher is not None and l1_weight != 0 else ce_weight

    for part in chosen.tensor_split(chunks):
        n = len(part)
        # Nothing that an unsupervised slot holds reaches a sum.
        idle = ~supervised[part].unsqueeze(1)
        x, label = hidden[part].masked_fill_(idle, 0), labels[part].unsqueeze(1)
        label.masked_fill_(idle, 0)
        z = None if latent is None else latent[part].masked_fill_(idle, 0)
        taught = None if teacher is None else teacher[part].masked_fill_(idle, 0)
        draft, target, slope = heads.logits(x, z, taught, logits)
        if draft_ids is not None:
            draft, target = _with_the_rest(draft, target, draft_ids)
            label = _places(draft_ids, whole)[label]
        losses = []
        for first in range(0, max(n, 1), max(few, 1)):
            some = slice(first, min(first + few, n))
            p, q = draft[some], None if target is None else target[some]
            scratch = spare[:, : len(p)]
            if narrow:
                p = scratch[1].copy_(p)
                q = None if q is None else scratch[2].copy_(q)
            terms = label[some], ce_weight, l1_weight, asks
            losses.append(_losses_(p, q, scratch[0], *terms, reduced=draft_ids is not None))
            if narrow and asks:
                draft[some] = p
        ce[part], l1[part], size = (torch.cat(x) for x in zip(*losses, strict=True))
        if not asks:
            continue
        draft = draft[:, :vocab].to(head.dtype)
        scale = (share[part] * (unit * draft_scale) / size).unsqueeze(1)
        if z is not None and w2 is not None:
            d_latent[part] = (scale * (draft @ w2)).to(hidden.dtype)
            _add_product_(d_w2, draft, (scale * z).to(z.dtype))
        if slope is not None:
            draft.mul_(slope)
        d_hidden[part] = (scale * (draft @ head)).to(hidden.dtype)
        if head_asks:
            _add_product_(d_head, draft, (scale * x).to(x.dtype))
    loss = (share * (ce_weight * ce + l1_weight * l1)).sum()
    return loss, ce, l1, d_hidden, d_latent, d_w2, d_head


@dataclass(frozen=True, eq=False)
class _Heads:
    """From hidden states to logits; a reduced vocabulary has ``target_head`` and ``draft_ids``."""

    head: Tensor
    w2: Tensor | None
    target_head: Tensor | None
    draft_ids: Tensor | None
    draft_rule: LogitRule
    target_rule: LogitRule

    @property
    def whole(self) -> Tensor:
        return self.head if self.target_head is None else self.target_head

    def logits(
        self, x: Tensor, z: Tensor | None, teacher: Tensor | None, room: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of drafter and target, and the slope of the drafter's soft cap; in ``room``."""
        n, target, slope = len(x), None, None
        draft = room[:n]
        if teacher is None or self.target_head is not None:
            torch.mm(x, self.head.T, out=draft)
            target = None if teacher is None else teacher @ self.whole.T
        else:
            # One product for both reads the head once.
            target = room[n : 2 * n]
            torch.mm(torch.cat([x, teacher]), self.head.T, out=room[: 2 * n])
        cap, scale = self.draft_rule.cap, self.draft_rule.scale
        if cap is not None:
            draft.div_(cap).tanh_()
            slope = 1 - draft.square()
            draft.mul_(cap)
        if z is not None and self.w2 is not None:
            draft.addmm_(z, self.w2.T)
        if scale != 1:
            draft.mul_(scale)
        if target is not None and self.target_rule != PLAIN:
            target.copy_(self.target_rule(target))
        return draft, target, slope


def _with_the_rest(
    draft: Tensor, target: Tensor | None, draft_ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits of the drafter's tokens, and of all others together, which the drafter never says."""
    wide = at_least_fp32(draft.dtype)
    draft = F.pad(draft.to(wide), (0, 1), value=-torch.inf)
    if target is None:
        return draft, None
    target = target.to(wide)
    rest = target.index_fill(1, draft_ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    return draft, torch.cat([target[:, draft_ids], rest], dim=1)


def _places(draft_ids: Tensor, vocab_size: int) -> Tensor:
    """The drafter's place of each of the target's tokens, the last one for all that it lacks."""
    places = torch.full((vocab_size,), len(draft_ids), device=draft_ids.device)
    places[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
    return places


def _chosen(supervised: Tensor) -> Tensor:
    """Which slots to compute: on a CPU the supervised ones; a GPU would have to stop to count."""
    if supervised.device.type == "cpu":
        return supervised.nonzero().squeeze(1)
    return torch.arange(len(supervised), device=supervised.device)


def _free_bytes(device: torch.device) -> int:
    """What a CUDA device can still give, with what torch has taken of it and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _losses_(
    draft: Tensor,
    target: Tensor | None,
    scratch: Tensor,
    label: Tensor,
    ce_weight: float,
    l1_weight: float,
    asks: bool,
    reduced: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce and l1 of some rows of logits, which become their own gradients where asked for.

    With s = sign(p - q) the gradient of a slot's logits is
    ``ce_weight (p - onehot) + l1_weight p (s - sum(p s))``; ``draft`` ends as that divided by
    l1_weight, or by ce_weight where there is no l1, and times the third thing returned.
    ``target`` is overwritten. ``reduced``: the last column is what the drafter cannot predict, and
    a label there has no ce.
    """
    known = label < draft.shape[1] - reduced
    top = draft.amax(dim=-1)
    of_label = draft.gather(1, label).squeeze(1)
    torch.softmax(draft, dim=-1, out=draft)
    # Over a large vocabulary fp32 softmax divides by a sum that is off by some millionths. By how
    # much, a better sum tells; to divide by that as well waits until it concerns few numbers.
    size = draft.sum(dim=-1)
    # The largest probability is at least 1 / vocab, so its logarithm is safe where p[label] is 0.
    ce = top - (draft.amax(dim=-1) / size).log_() - of_label
    if reduced:
        ce = torch.where(known.squeeze(1), ce, 0)
    l1 = torch.zeros_like(ce)
    if target is not None:
        torch.softmax(target, dim=-1, out=target)
        ratio = (size / target.sum(dim=-1)).neg_().unsqueeze(1)
        torch.addcmul(draft, target, ratio, out=target)
        l1 = torch.abs(target, out=scratch).sum(dim=-1) / size
    if asks:
        with_l1 = target is not None and l1_weight != 0
        pull = known.to(draft.dtype) * (ce_weight / l1_weight if with_l1 else 1.0)
        if target is not None and l1_weight != 0:
            signed = target.sign_().mul_(draft)
            mean = signed.sum(dim=-1) / size
            torch.addcmul(signed, draft, pull - mean.unsqueeze(1), out=draft)
        elif reduced:
            draft.mul_(known)
        draft.scatter_add_(1, label, -pull * size.unsqueeze(1))
    return ce, l1, size


def _add_product_(total: Tensor, draft: Tensor, x: Tensor) -> None:
    """Add draft.T @ x, in place where the dtypes are the same."""
    if total.dtype == x.dtype:
        total.addmm_(draft.T, x)
    else:
        total += draft.T @ x


def _gradients(
    hidden: Tensor,
    latent: Tensor | None,
    head: Tensor,
    w2: Tensor | None,
    asks: bool,
    head_asks: bool,
) -> list[Tensor]:
    """Zeros to gather the gradients in: hidden's, latent's, w2's and head's."""
    narrow, wide = hidden.dtype, at_least_fp32(hidden.dtype)
    wanted = [(hidden, asks, narrow), (latent, asks, narrow), (w2, asks, wide)]
    return [
        hidden.new_zeros(like.shape if like is not None and needed else (0,), dtype=dtype)
        for like, needed, dtype in [*wanted, (head, head_asks, wide)]
    ]


@_chunked.register_fake
def _(hidden, latent, teacher, labels, supervised, share, head, w2, *settings):
    gradients = _gradients(hidden, latent, head, w2, *settings[-2:])
    per_slot = share.new_empty(hidden.shape[0])
    return (share.new_empty(()), per_slot, torch.empty_like(per_slot), *gradients)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.dtype = inputs[0].dtype


def _differentiate(ctx: Any, d_loss: Tensor, *_: Any) -> tuple:
    d_hidden, d_latent, d_w2, d_head = (
        (d_loss * x).to(ctx.dtype) if x.numel() else None for x in ctx.saved_tensors
    )
    return (d_hidden, d_latent, *(None,) * 4, d_head, d_w2, *(None,) * 11)


_chunked.register_autograd(_differentiate, setup_context=_save)


def _finish(
    loss: Tensor,
    share: Tensor,
    weights: Tensor,
    ce: Tensor,
    l1: Tensor,
    slots: Slots | DSparkForwardOutput,
    confidence_weight: float,
) -> Objective:
    """Add the confidence term and form the sums."""
    confidence_pred, eval_mask = slots.confidence_pred, slots.eval_mask
    accept = torch.where(eval_mask, rate_of_distance(l1.detach()), torch.nan)
    confidence = error = bias = cumulative = torch.full_like(accept, torch.nan)
    survives = survival(accept, eval_mask)
    if confidence_pred is not None:
        logit = torch.where(eval_mask, confidence_pred.to(share.dtype), 0)
        soft = torch.where(eval_mask, accept, 0)
        confidence = F.binary_cross_entropy_with_logits(logit, soft, reduction="none")
        if confidence_weight != 0:
            loss = loss + confidence_weight * (share * confidence).sum()
        predicted = logit.detach().sigmoid()
        bias = predicted - accept
        error = bias.abs()
        cumulative = survival(predicted, eval_mask) - survives

    def total(x: Tensor, by: Tensor = eval_mask) -> Tensor:
        return torch.where(eval_mask, x.detach() * by, 0).sum(dim=(0, 1))

    sums = Sums(
        count=eval_mask.sum(dim=(0, 1)).to(share.dtype),
        weight=weights.sum(dim=(0, 1)),
        ce=total(ce, weights),
        l1=total(l1, weights),
        confidence=total(confidence, weights),
        accept=total(accept),
        confidence_error=total(error),
        confidence_bias=total(bias),
        survival=total(survives),
        cumulative_bias=total(cumulative),
        blocks=eval_mask.any(dim=-1).sum().to(share.dtype),
    )
    return Objective(loss, accept, sums)


def _weigh(
    eval_mask: Tensor, gamma: float, dtype: torch.dtype, normaliser: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weights of the slots, and the same divided; all zero stays zero."""
    weights = slot_weights(eval_mask, gamma, at_least_fp32(dtype))
    total = weights.sum() if normaliser is None else normaliser.to(weights.dtype)
    return weights, weights / total.clamp(min=torch.finfo(weights.dtype).tiny)


def _require_teacher(teacher: Tensor | None, l1_weight: float, confidence_weight: float) -> None:
    if teacher is None and (l1_weight != 0 or confidence_weight != 0):
        wanted = "without the target's states l1_weight and confidence_weight must be 0"
        raise ValueError(f"{wanted}, got {l1_weight} and {confidence_weight}")


@checked
def _check_weights(
    hidden: Float[Tensor, "batch anchor slot hidden"],
    latent: Float[Tensor, "batch anchor slot rank"] | None,
    lm_head_weight: Float[Tensor, "vocab hidden"],
    markov_w2_weight: Float[Tensor, "vocab rank"] | None,
) -> None:
    if (latent is None) != (markov_w2_weight is None):
        given = "markov_w2_weight" if latent is None else "slots.latent"
        raise ValueError(f"slots.latent and markov_w2_weight go together, got {given} alone")
