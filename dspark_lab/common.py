"""The forward utilities of DSpark: which tokens are anchors, what each block holds and predicts.

Names, arguments, shapes and dtypes are those of the published trainers (module
``nemo_automodel.components.speculative.dspark.common``), so code written for them runs here
unchanged. The method is DSpark, arXiv 2607.05147, on top of DFlash, arXiv 2602.06036.

Axes, everywhere: ``batch`` rows, ``seq`` tokens in a row, ``anchor`` blocks in a row
(``num_anchors``), ``slot`` predictions in a block (``block_size``), ``query`` the slots of all
blocks one after the other, ``hidden`` model width.

A row may hold several documents one after the other (*packing*). ``doc_remaining`` then says how
many tokens of its document follow each token; without it a row is one document. ``loss_mask`` has
any bool, integer or float dtype; a token is supervised where it is > 0.5. ``block_keep_mask`` is
False for dummy anchors, which fill the rows that have too few candidates.

No function synchronises with the host, and each compiles with ``fullgraph=True``. The contents of
tensors are checked only with ``DSPARK_LAB_DEBUG=1``.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from dspark_lab.checks import (
    BlockSize,
    Count,
    Device,
    NotEmpty,
    SeqLen,
    Size,
    Within,
    checked,
    debug_range,
)

__all__ = [
    "AcceptRatePredictor",
    "DSparkForwardOutput",
    "build_anchor_candidate_mask",
    "build_eval_mask",
    "context_doc_ids",
    "create_noise_embed",
    "create_position_ids",
    "extract_context_feature",
    "pin_rope_inv_freq_fp32",
    "sample_anchor_positions",
    "validate_target_layer_ids",
]

LayerIds = Annotated[Sequence[Annotated[int, Within(-1)]], NotEmpty()]


@checked
@dataclass
class DSparkForwardOutput:
    """The result of one training forward of a drafter (DSpark, section 3).

    ``draft_logits`` include the Markov bias, the sigmoid of ``confidence_pred`` predicts the accept
    rate, and ``aligned_target_logits`` are the target's own for the same tokens.
    """

    draft_logits: Float[Tensor, "batch anchor slot vocab"]
    target_ids: Int[Tensor, "batch anchor slot"]
    eval_mask: Bool[Tensor, "batch anchor slot"]
    block_keep_mask: Bool[Tensor, "batch anchor"]
    confidence_pred: Float[Tensor, "batch anchor slot"] | None = None
    aligned_target_logits: Float[Tensor, "batch anchor slot vocab"] | None = None


class AcceptRatePredictor(nn.Module):
    """The confidence head: one linear map ``proj`` to a logit (DSpark, section 3.3).

    The logit's sigmoid predicts the probability that a slot survives verification, given that all
    slots before it did.
    """

    @checked
    def __init__(self, input_dim: Count) -> None:
        super().__init__()
        self.proj = nn.Linear(int(input_dim), 1)

    @checked
    def forward(self, features: Float[Tensor, "*axes features"]) -> Float[Tensor, "*axes"]:
        """One logit, not a probability, for each vector along the last axis."""
        if features.shape[-1] != self.proj.in_features:
            wanted, shape = self.proj.in_features, tuple(features.shape)
            raise ValueError(f"features must be [..., {wanted}], got shape {shape}")
        return self.proj(features).squeeze(-1)


@checked
def build_anchor_candidate_mask(
    seq_len: SeqLen,
    loss_mask: Shaped[Tensor, "batch seq"],
    doc_remaining: Int[Tensor, "batch seq"] | None = None,
) -> Bool[Tensor, "batch candidate"]:
    """Which positions may be anchors, for positions 0 to ``seq_len - 2``.

    Position p is a candidate where p and p + 1 are both supervised (``loss_mask > 0.5``), and, in
    a packed row, p + 1 still belongs to p's document (``doc_remaining >= 1``).
    """
    candidates = _pairs(_supervised(loss_mask))
    if doc_remaining is not None:
        candidates = candidates & (doc_remaining[:, :-1] >= 1)
    return candidates


@checked
def sample_anchor_positions(
    seq_len: SeqLen,
    loss_mask: Shaped[Tensor, "batch seq"],
    num_anchors: Count,
    device: Device,
    doc_remaining: Int[Tensor, "batch seq"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "batch anchor"], Bool[Tensor, "batch anchor"]]:
    """Draw anchors uniformly without replacement from each row's candidates.

    One ``torch.rand(batch, seq_len - 1)`` gives every position a number; the candidates with the
    smallest numbers become anchors; ties go to the earlier position. So one seed gives here
    the very anchors that it gives in the published trainers, compiled or not.

    Args:
        device: that of ``loss_mask``.
        generator: instead of the device's default one, outside ``torch.compile`` alone.

    Returns:
        ``anchor_positions``, long, and ``block_keep_mask``. The kept ones ascend; a row with fewer
        candidates than ``num_anchors`` ends in *dummy anchors*: position 0, keep False.
    """
    candidates = build_anchor_candidate_mask(seq_len, loss_mask, doc_remaining)
    _require_device("device", torch.device(device), "loss_mask", candidates.device)
    if generator is not None:
        _require_device("generator", generator.device, "loss_mask", candidates.device)

    width = candidates.shape[1]
    noise = _uniform(candidates, generator)
    # A non-negative float orders like its bit pattern, so (bits, position) is one whole number that
    # no other position shares: the smallest ones are those that a stable full sort puts first.
    position = torch.arange(width, device=candidates.device)
    rank = noise.view(torch.int32).long() * width + position
    never = torch.iinfo(torch.int64).max
    rank = rank.masked_fill(~candidates, never)
    chosen = rank.topk(min(num_anchors, width), largest=False, sorted=False).values

    # Sorting with the dummies beyond the row's end puts the kept anchors first.
    past_end = max(seq_len, 1)
    anchors = torch.where(chosen == never, past_end, chosen % max(width, 1)).sort().values
    missing = num_anchors - anchors.shape[1]
    if missing > 0:
        anchors = nn.functional.pad(anchors, (0, missing), value=past_end)
    block_keep_mask = anchors < past_end
    return anchors * block_keep_mask, block_keep_mask


@checked
def build_eval_mask(
    seq_len: SeqLen,
    loss_mask: Shaped[Tensor, "batch seq"],
    label_indices: Int[Tensor, "batch anchor slot"],
    safe_label_indices: Int[Tensor, "batch anchor slot"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    doc_remaining: Int[Tensor, "batch seq"] | None = None,
    anchor_positions: Int[Tensor, "batch anchor"] | None = None,
) -> Bool[Tensor, "batch anchor slot"]:
    """Which slots are supervised.

    A slot is supervised where its block is kept, its label lies inside the row, its label is
    supervised, in a packed row its label belongs to the anchor's document, and all of this holds
    for every earlier slot of the block: supervision is a contiguous prefix.

    ``label_indices`` are anchor + 1 to anchor + block_size and may point past the row's end;
    ``safe_label_indices`` are the same clamped into the row, 0 for dummy anchors. A packed row
    needs both ``doc_remaining`` and ``anchor_positions``.
    """
    if (doc_remaining is None) != (anchor_positions is None):
        given = "anchor_positions" if doc_remaining is None else "doc_remaining"
        raise ValueError(f"doc_remaining and anchor_positions go together, got {given} alone")
    if seq_len == 0:
        return torch.zeros_like(label_indices, dtype=torch.bool)
    debug_range("safe_label_indices", safe_label_indices, 0, seq_len)

    label_supervised = _take(_supervised(loss_mask), safe_label_indices)
    supervised = block_keep_mask.unsqueeze(-1) & (label_indices < seq_len) & label_supervised
    if doc_remaining is not None and anchor_positions is not None:
        debug_range("anchor_positions", anchor_positions, 0, seq_len)
        distance = torch.arange(1, label_indices.shape[2] + 1, device=loss_mask.device)
        supervised &= distance <= _take(doc_remaining, anchor_positions).unsqueeze(-1)
    return _contiguous_prefix(supervised)


@checked
def create_position_ids(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_size: BlockSize,
    context_position_ids: Int[Tensor, "batch seq"] | None = None,
) -> Int[Tensor, "batch query"]:
    """Positions of the blocks' slots: anchor + 0 to anchor + block_size - 1, block after block.

    In a packed row, ``context_position_ids`` are the tokens' positions within their documents, and
    the blocks count from those of their anchors.
    """
    base = anchor_positions.long()
    if context_position_ids is not None:
        debug_range("anchor_positions", anchor_positions, 0, context_position_ids.shape[1])
        if context_position_ids.shape[1] > 0:
            base = _take(context_position_ids.long(), base)
    offset = torch.arange(block_size, device=base.device)
    return (base.unsqueeze(-1) + offset).flatten(1)


@checked
def create_noise_embed(
    embed_tokens: Callable[[Tensor], Tensor],
    input_ids: Int[Tensor, "batch seq"],
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    mask_token_id: Size,
    block_size: BlockSize,
) -> Shaped[Tensor, "batch query hidden"]:
    """The drafter's input: the anchor's own token in slot 0 of kept blocks, mask tokens elsewhere.

    ``embed_tokens`` is the target's embedding; ``mask_token_id`` stands for "to be predicted".
    """
    weight = getattr(embed_tokens, "weight", None)
    if isinstance(weight, Tensor):
        if mask_token_id >= weight.shape[0]:
            embedding = f"the embedding, [0, {weight.shape[0] - 1}]"
            raise ValueError(f"mask_token_id must lie in {embedding}, got {mask_token_id}")
        _require_device("embed_tokens", weight.device, "input_ids", input_ids.device)
    batch, seq_len = input_ids.shape
    debug_range("anchor_positions", anchor_positions, 0, max(seq_len, 1))

    noise_ids = input_ids.new_full((batch, anchor_positions.shape[1], block_size), mask_token_id)
    if seq_len > 0:
        anchor_ids = _take(input_ids, anchor_positions)
        noise_ids[:, :, 0] = torch.where(block_keep_mask, anchor_ids, mask_token_id)
    return embed_tokens(noise_ids.flatten(1))


@checked
def extract_context_feature(
    hidden_states: Sequence[Tensor], layer_ids: LayerIds
) -> Float[Tensor, "batch seq features"]:
    """The target's hidden states of a few layers, side by side along the last axis.

    ``hidden_states`` are ``[batch, seq, hidden]`` each, as Hugging Face models return them with
    ``output_hidden_states``: the embedding's output, whose id is -1, then that of layers 0, 1, ...
    """
    given = len(hidden_states)
    for layer_id in layer_ids:
        if layer_id + 1 >= given:
            wanted = f"layer id {layer_id} needs {layer_id + 2} hidden states"
            raise ValueError(f"{wanted}, got {given}, which reach id {given - 2}")
    return _side_by_side([hidden_states[layer_id + 1] for layer_id in layer_ids])


@checked
def validate_target_layer_ids(layer_ids: LayerIds, num_target_layers: Count) -> list[int]:
    """The ids as a list, if a target of ``num_target_layers`` layers has them all.

    Each must be -1 (the embedding's output) or a layer, 0 to ``num_target_layers - 1``, in strictly
    increasing order. -1 and the last layer pass with a warning.
    """
    ids = [int(layer_id) for layer_id in layer_ids]
    last = num_target_layers - 1
    if max(ids) > last:
        raise ValueError(f"each of layer_ids must lie in [-1, {last}], got {ids}")
    if any(later <= earlier for earlier, later in zip(ids, ids[1:], strict=False)):
        raise ValueError(f"layer_ids must be strictly increasing, got {ids}")
    uncapturable = [layer_id for layer_id in ids if layer_id in (-1, last)]
    if uncapturable and not torch.compiler.is_compiling():
        warnings.warn(
            f"layer_ids {uncapturable} are the embedding's output or the last layer's, which "
            f"common serving engines cannot capture; ids from 0 to {last - 1} serve everywhere",
            stacklevel=3,
        )
    return ids


@checked
def context_doc_ids(
    seq_lens: Int[Tensor, "batch docs"], seq_len: Size, device: Device
) -> Int[Tensor, "batch seq"]:
    """Which document of a packed row each token belongs to: 0 for the first, and so on.

    The id counts the documents that end at or before the token, so padding after the last one has
    an id of its own.
    """
    debug_range("seq_lens", seq_lens, 0, seq_len + 1)
    ends = seq_lens.to(device).long().cumsum(dim=1)
    position = torch.arange(seq_len, device=ends.device)
    return (ends.unsqueeze(1) <= position.view(1, -1, 1)).sum(dim=2)


@checked
def pin_rope_inv_freq_fp32(rotary_emb: nn.Module | None) -> None:
    """Give a RoPE module that was cast to a narrower float its fp32 frequencies back, in place.

    No cast back undoes the rounding: the buffers ``inv_freq``, ``original_inv_freq`` and ``<layer
    type>_inv_freq`` are taken from a fresh module of the same class and ``config``. Buffers that
    are not narrower than fp32 or on the meta device stay as they are.
    """
    if rotary_emb is None:
        return
    narrow = {
        name: buffer
        for name, buffer in rotary_emb.named_buffers(recurse=False)
        if name.endswith("inv_freq")
        and buffer.is_floating_point()
        and buffer.dtype.itemsize < 4
        and not buffer.is_meta
    }
    if not narrow:
        return
    if not hasattr(rotary_emb, "config"):
        kind = type(rotary_emb).__name__
        raise ValueError(f"rotary_emb must have a config to compute frequencies from, got {kind}")
    with torch.device("cpu"):
        fresh = dict(type(rotary_emb)(rotary_emb.config).named_buffers(recurse=False))
    for name, buffer in narrow.items():
        setattr(rotary_emb, name, fresh[name].to(buffer.device, torch.float32))


def _supervised(loss_mask: Shaped[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """``loss_mask > 0.5``, exactly, for every dtype a mask can have."""
    if loss_mask.is_complex():
        raise TypeError(f"loss_mask must be bool, integer or float, got {loss_mask.dtype}")
    if loss_mask.dtype == torch.bool:
        return loss_mask
    if not loss_mask.is_floating_point():
        # Unsigned types wider than a byte have no comparisons in torch; all of them fit but the
        # upper half of uint64, whose values turn negative and so stay different from zero.
        return loss_mask.long() > 0 if loss_mask.dtype.is_signed else loss_mask.long() != 0
    if loss_mask.dtype.itemsize == 1:
        loss_mask = loss_mask.float()
    return loss_mask > 0.5


def _pairs(supervised: Tensor) -> Tensor:
    """Where a token and the one after it are both supervised."""
    return supervised[:, :-1] & supervised[:, 1:]


def _contiguous_prefix(flags: Tensor) -> Tensor:
    """True up to the first False of the last axis."""
    return flags.cumprod(dim=-1).bool()


def _take(row: Tensor, index: Int[Tensor, "batch *axes"]) -> Tensor:
    """``row[b, index[b, ...]]`` for each batch row b."""
    return row.gather(1, index.long().flatten(1)).view(index.shape)


@checked
def _side_by_side(hidden_states: Sequence[Float[Tensor, "batch seq hidden"]]) -> Tensor:
    return torch.cat(list(hidden_states), dim=-1)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform random numbers from torch's own stream, inside a compiled graph too."""
    if torch.compiler.is_compiling() and generator is None:
        return _eager_rand(like)
    return torch.rand(like.shape, dtype=torch.float32, device=like.device, generator=generator)


@torch.library.custom_op("dspark_lab::eager_rand", mutates_args=())
def _eager_rand(like: Tensor) -> Tensor:
    """``torch.rand`` as an operator that the compiler calls but does not replace by its own."""
    return torch.rand(like.shape, dtype=torch.float32, device=like.device)


@_eager_rand.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


def _require_device(name: str, given: torch.device, other: str, wanted: torch.device) -> None:
    """Refuse a device that is not ``wanted``; one without an index means any of its type."""
    if given.type != wanted.type or given.index not in (None, wanted.index):
        raise ValueError(f"{name} must be on the device of {other}, {wanted}, got {given}")
