"""The forward utilities of DSpark: which tokens are anchors, what each block holds and predicts.

Everything here works around token positions and two masks; it knows nothing about models, attention
or losses, and imports torch alone. Names, arguments, shapes and dtypes are those of the published
trainers (module ``nemo_automodel.components.speculative.dspark.common``), so code written for them
runs here unchanged. The method is DSpark, arXiv 2607.05147, on top of DFlash, arXiv 2602.06036.

Axes, everywhere: ``batch`` rows, ``seq`` tokens in a row, ``anchor`` blocks in a row
(``num_anchors``), ``slot`` predictions in a block (``block_size``), ``query`` the slots of all
blocks one after the other, ``hidden`` model width.

A row may hold several documents one after the other (*packing*). ``doc_remaining`` then says how
many tokens of its document follow each token, and every function that needs to know takes it as an
optional argument; without it a row is one document.

No function synchronises with the host, and each compiles with ``fullgraph=True``. Shapes and Python
values are always checked; the contents of tensors only with ``DSPARK_LAB_DEBUG=1``.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from dspark_lab.checks import (
    debug_range,
    require_bool,
    require_int,
    require_integers,
    require_same_device,
    require_shape,
    require_tensor,
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
    "sample_anchor_positions",
    "validate_target_layer_ids",
]


@dataclass
class DSparkForwardOutput:
    """What one training forward of a drafter returns (DSpark, section 3).

    ``draft_logits`` are the drafter's, Markov bias included; ``target_ids`` are the tokens that the
    slots should predict; ``eval_mask`` says which slots are supervised and ``block_keep_mask``
    which blocks stand on a real anchor. ``confidence_pred`` are logits whose sigmoid predicts the
    accept rate. ``aligned_target_logits`` are the target's own logits for the same tokens.
    """

    draft_logits: Float[Tensor, "batch anchor slot vocab"]
    target_ids: Int[Tensor, "batch anchor slot"]
    eval_mask: Bool[Tensor, "batch anchor slot"]
    block_keep_mask: Bool[Tensor, "batch anchor"]
    confidence_pred: Float[Tensor, "batch anchor slot"] | None = None
    aligned_target_logits: Float[Tensor, "batch anchor slot vocab"] | None = None


class AcceptRatePredictor(nn.Module):
    """The confidence head: one linear map to a logit (DSpark, section 3.3).

    The logit's sigmoid predicts the probability that a slot survives verification, given that all
    slots before it did. Its weights are named ``proj``.

    Raises:
        TypeError, ValueError: ``input_dim`` is not an int of at least 1.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        require_int("input_dim", input_dim, 1)
        self.proj = nn.Linear(int(input_dim), 1)

    def forward(self, features: Float[Tensor, "*axes features"]) -> Float[Tensor, "*axes"]:
        """One logit, not a probability, for each vector along the last axis.

        Raises:
            TypeError, ValueError: not a tensor, or a last axis that is not ``input_dim`` long.
        """
        if not isinstance(features, Tensor):
            raise TypeError(f"features must be a tensor, got {type(features).__name__}")
        width = self.proj.in_features
        if features.dim() == 0 or features.shape[-1] != width:
            raise ValueError(f"features must be [..., {width}], got shape {tuple(features.shape)}")
        return self.proj(features).squeeze(-1)


def build_anchor_candidate_mask(
    seq_len: int,
    loss_mask: Shaped[Tensor, "batch seq"],
    doc_remaining: Int[Tensor, "batch seq"] | None = None,
) -> Bool[Tensor, "batch candidate"]:
    """Which positions may be anchors, for positions 0 to ``seq_len - 2``.

    Position p is a candidate where p and p + 1 are both supervised, and, in a packed row, p + 1
    still belongs to p's document (``doc_remaining >= 1``).

    Args:
        seq_len: tokens in a row.
        loss_mask: bool, any integer or any float dtype; a token is supervised where it is > 0.5.
        doc_remaining: tokens of the same document after each token.

    Returns:
        bool ``[batch, max(seq_len - 1, 0)]``.

    Raises:
        TypeError, ValueError: wrong kind, rank or shape, or a ``seq_len`` that is not the mask's.
    """
    _require_row("loss_mask", loss_mask, seq_len)
    supervised = _supervised(loss_mask)
    candidates = supervised[:, :-1] & supervised[:, 1:]
    if doc_remaining is not None:
        _require_doc_remaining(doc_remaining, loss_mask)
        candidates = candidates & (doc_remaining[:, :-1] >= 1)
    return candidates


def sample_anchor_positions(
    seq_len: int,
    loss_mask: Shaped[Tensor, "batch seq"],
    num_anchors: int,
    device: torch.device | str,
    doc_remaining: Int[Tensor, "batch seq"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "batch anchor"], Bool[Tensor, "batch anchor"]]:
    """Draw anchors uniformly without replacement from each row's candidates.

    One ``torch.rand(batch, seq_len - 1)`` on ``device`` gives every position a number; the
    candidates with the smallest numbers become anchors, of equal numbers the earlier position, just
    as if all had been sorted. So one seed gives here the very anchors that it gives in the
    published trainers, compiled or not.

    Args:
        seq_len: tokens in a row.
        loss_mask: see :func:`build_anchor_candidate_mask`.
        num_anchors: blocks per row.
        device: where the random numbers are drawn; must be the device of ``loss_mask``.
        doc_remaining: tokens of the same document after each token.
        generator: source of randomness instead of the device's default one; torch compiles no graph
            that takes a generator, so pass one only outside ``torch.compile``.

    Returns:
        ``anchor_positions``, long, ascending; and ``block_keep_mask``, bool. A row with fewer
        candidates than ``num_anchors`` ends in *dummy anchors*: position 0, keep False.

    Raises:
        TypeError, ValueError: wrong kind, rank or shape, ``num_anchors`` below 1, or ``device`` or
            ``generator`` not where ``loss_mask`` is.
    """
    require_int("num_anchors", num_anchors, 1)
    candidates = build_anchor_candidate_mask(seq_len, loss_mask, doc_remaining)
    _require_device("device", device, candidates.device)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            kind = type(generator).__name__
            raise TypeError(f"generator must be a torch.Generator or None, got {kind}")
        _require_device("generator", generator.device, candidates.device)

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


def build_eval_mask(
    seq_len: int,
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

    Args:
        seq_len: tokens in a row.
        loss_mask: see :func:`build_anchor_candidate_mask`.
        label_indices: anchor + 1 to anchor + block_size; may point past the row's end.
        safe_label_indices: the same clamped into the row, 0 for dummy anchors.
        block_keep_mask: False for dummy anchors.
        doc_remaining: tokens of the same document after each token; needs ``anchor_positions``.
        anchor_positions: the blocks' anchors; read only together with ``doc_remaining``.

    Raises:
        TypeError, ValueError: wrong kind, rank, shape or device, or only one of ``doc_remaining``
            and ``anchor_positions``.
    """
    _require_row("loss_mask", loss_mask, seq_len)
    require_tensor("label_indices", label_indices, ("batch", "anchor", "slot"))
    require_integers("label_indices", label_indices)
    batch, anchors, slots = label_indices.shape
    require_shape("loss_mask", loss_mask, ("batch", "seq"), (batch, seq_len))
    require_shape(
        "safe_label_indices",
        safe_label_indices,
        ("batch", "anchor", "slot"),
        (batch, anchors, slots),
    )
    require_integers("safe_label_indices", safe_label_indices)
    _require_blocks(block_keep_mask, (batch, anchors))
    if (doc_remaining is None) != (anchor_positions is None):
        given = "anchor_positions" if doc_remaining is None else "doc_remaining"
        raise ValueError(
            f"doc_remaining and anchor_positions go together, got {given} without the other"
        )
    require_same_device(
        loss_mask=loss_mask,
        label_indices=label_indices,
        safe_label_indices=safe_label_indices,
        block_keep_mask=block_keep_mask,
    )
    if seq_len == 0:
        return torch.zeros_like(label_indices, dtype=torch.bool)
    debug_range("safe_label_indices", safe_label_indices, 0, seq_len)

    label_supervised = _take(_supervised(loss_mask), safe_label_indices)
    supervised = block_keep_mask.unsqueeze(-1) & (label_indices < seq_len) & label_supervised
    if doc_remaining is not None and anchor_positions is not None:
        _require_doc_remaining(doc_remaining, loss_mask)
        _require_anchors(anchor_positions, (batch, anchors), seq_len)
        require_same_device(loss_mask=loss_mask, anchor_positions=anchor_positions)
        distance = torch.arange(1, slots + 1, device=loss_mask.device)
        supervised &= distance <= _take(doc_remaining, anchor_positions).unsqueeze(-1)
    return supervised.cumprod(dim=-1).bool()


def create_position_ids(
    anchor_positions: Int[Tensor, "batch anchor"],
    block_size: int,
    position_ids: Int[Tensor, "batch seq"] | None = None,
) -> Int[Tensor, "batch query"]:
    """Positions of the blocks' slots: anchor + 0 to anchor + block_size - 1, block after block.

    Args:
        anchor_positions: integers.
        block_size: slots per block.
        position_ids: in a packed row, each token's position within its own document; the blocks
            then count from their anchor's.

    Returns:
        long ``[batch, anchor * slot]``.

    Raises:
        TypeError, ValueError: wrong kind, rank, shape or device, or ``block_size`` below 1.
    """
    require_tensor("anchor_positions", anchor_positions, ("batch", "anchor"))
    require_integers("anchor_positions", anchor_positions)
    require_int("block_size", block_size, 1)
    base = anchor_positions.long()
    if position_ids is not None:
        require_tensor("position_ids", position_ids, ("batch", "seq"))
        require_integers("position_ids", position_ids)
        _require_same_batch("position_ids", position_ids, "anchor_positions", anchor_positions)
        require_same_device(anchor_positions=anchor_positions, position_ids=position_ids)
        debug_range("anchor_positions", anchor_positions, 0, position_ids.shape[1])
        if position_ids.shape[1] > 0:
            base = _take(position_ids.long(), base)
    offset = torch.arange(block_size, device=base.device)
    return (base.unsqueeze(-1) + offset).flatten(1)


def create_noise_embed(
    embed_tokens: Callable[[Tensor], Tensor],
    input_ids: Int[Tensor, "batch seq"],
    anchor_positions: Int[Tensor, "batch anchor"],
    block_keep_mask: Bool[Tensor, "batch anchor"],
    mask_token_id: int,
    block_size: int,
) -> Shaped[Tensor, "batch query hidden"]:
    """The drafter's input: the anchor's own token in slot 0 of kept blocks, mask tokens elsewhere.

    Args:
        embed_tokens: the target's embedding, token ids to vectors.
        input_ids: the row's tokens.
        anchor_positions: the blocks' anchors, each inside the row.
        block_keep_mask: False for dummy anchors, whose slot 0 is a mask token too.
        mask_token_id: token that stands for "to be predicted".
        block_size: slots per block.

    Returns:
        whatever dtype ``embed_tokens`` gives.

    Raises:
        TypeError, ValueError: wrong kind, rank, shape or device, ``block_size`` below 1, or a
            ``mask_token_id`` outside the embedding.
    """
    require_tensor("input_ids", input_ids, ("batch", "seq"))
    require_integers("input_ids", input_ids)
    batch, seq_len = input_ids.shape
    require_tensor("anchor_positions", anchor_positions, ("batch", "anchor"))
    anchors = anchor_positions.shape[1]
    _require_anchors(anchor_positions, (batch, anchors), seq_len)
    _require_blocks(block_keep_mask, (batch, anchors))
    require_int("block_size", block_size, 1)
    require_int("mask_token_id", mask_token_id, 0)
    weight = getattr(embed_tokens, "weight", None)
    if isinstance(weight, Tensor):
        if mask_token_id >= weight.shape[0]:
            raise ValueError(
                f"mask_token_id must lie in the embedding, [0, {weight.shape[0] - 1}], "
                f"got {mask_token_id}"
            )
    else:
        weight = None
    require_same_device(
        input_ids=input_ids,
        anchor_positions=anchor_positions,
        block_keep_mask=block_keep_mask,
        embed_tokens=weight,
    )

    noise_ids = input_ids.new_full((batch, anchors, block_size), mask_token_id)
    if seq_len > 0:
        anchor_ids = _take(input_ids, anchor_positions)
        noise_ids[:, :, 0] = torch.where(block_keep_mask, anchor_ids, mask_token_id)
    return embed_tokens(noise_ids.flatten(1))


def extract_context_feature(
    hidden_states: Sequence[Float[Tensor, "batch seq hidden"]], layer_ids: Sequence[int]
) -> Float[Tensor, "batch seq features"]:
    """The target's hidden states of a few layers, side by side along the last axis.

    Args:
        hidden_states: as Hugging Face models return them with ``output_hidden_states``: the
            embedding's output, then each layer's.
        layer_ids: id -1 is ``hidden_states[0]``, id i is ``hidden_states[i + 1]``.

    Returns:
        ``[batch, seq, len(layer_ids) * hidden]``.

    Raises:
        TypeError, ValueError: ids that are not ints, none at all, or one that ``hidden_states``
            does not reach; states whose shapes differ.
    """
    for layer_id in _layer_ids(layer_ids):
        if layer_id + 1 >= len(hidden_states):
            raise ValueError(
                f"layer id {layer_id} needs {layer_id + 2} hidden states, "
                f"got {len(hidden_states)}, which reach id {len(hidden_states) - 2}"
            )
    states = [hidden_states[layer_id + 1] for layer_id in layer_ids]
    for state in states:
        require_tensor("each of hidden_states", state, ("batch", "seq", "hidden"))
        if state.shape != states[0].shape:
            raise ValueError(
                f"hidden_states must have one shape, got {tuple(states[0].shape)} "
                f"and {tuple(state.shape)}"
            )
        if state.device != states[0].device:
            raise ValueError(
                f"hidden_states must be on one device, got {states[0].device} and {state.device}"
            )
    return torch.cat(states, dim=-1)


def validate_target_layer_ids(layer_ids: Sequence[int], num_target_layers: int) -> list[int]:
    """The ids as a list, if a target of ``num_target_layers`` layers has them all.

    Each must be -1 (the embedding's output) or a layer, 0 to ``num_target_layers - 1``, in strictly
    increasing order. Ids -1 and ``num_target_layers - 1`` are allowed with a warning: common
    serving engines cannot capture the embedding's output or the state after the last layer.

    Raises:
        TypeError, ValueError: not ints, none at all, unsorted, repeated or out of range.
    """
    require_int("num_target_layers", num_target_layers, 1)
    ids = _layer_ids(layer_ids)
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
            stacklevel=2,
        )
    return ids


def context_doc_ids(
    seq_lens: Int[Tensor, "batch docs"], seq_len: int, device: torch.device | str
) -> Int[Tensor, "batch seq"]:
    """Which document of a packed row each token belongs to: 0 for the first, and so on.

    The id is the number of documents that end at or before the token, so entries of length 0 at the
    end of ``seq_lens`` split nothing, and padding after the last document has an id of its own.

    Args:
        seq_lens: lengths of the documents of each row, 0 where there are fewer.
        seq_len: tokens in a row.
        device: where the result lives.

    Returns:
        long ``[batch, seq_len]``.

    Raises:
        TypeError, ValueError: wrong kind or rank, or ``seq_len`` below 0.
    """
    require_tensor("seq_lens", seq_lens, ("batch", "docs"))
    require_integers("seq_lens", seq_lens)
    require_int("seq_len", seq_len, 0)
    debug_range("seq_lens", seq_lens, 0, seq_len + 1)
    ends = seq_lens.to(device).long().cumsum(dim=1)
    position = torch.arange(seq_len, device=ends.device)
    return (ends.unsqueeze(1) <= position.view(1, -1, 1)).sum(dim=2)


def _supervised(loss_mask: Shaped[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """``loss_mask > 0.5``, exactly, for every dtype a mask can have."""
    if loss_mask.dtype == torch.bool:
        return loss_mask
    if not loss_mask.is_floating_point():
        # Unsigned types wider than a byte have no comparisons in torch; all of them fit but the
        # upper half of uint64, whose values turn negative and so stay different from zero.
        return loss_mask.long() > 0 if loss_mask.dtype.is_signed else loss_mask.long() != 0
    if loss_mask.dtype.itemsize == 1:
        loss_mask = loss_mask.float()
    return loss_mask > 0.5


def _take(row: Tensor, index: Int[Tensor, "batch *axes"]) -> Tensor:
    """``row[b, index[b, ...]]`` for each batch row b."""
    return row.gather(1, index.long().flatten(1)).view(index.shape)


def _uniform(
    like: Bool[Tensor, "batch candidate"], generator: torch.Generator | None
) -> Float[Tensor, "batch candidate"]:
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


def _layer_ids(layer_ids: Sequence[int]) -> list[int]:
    """The ids as a list of ints of at least -1, and at least one of them."""
    if not isinstance(layer_ids, Iterable):
        raise TypeError(f"layer_ids must be a sequence of ints, got {layer_ids!r}")
    ids = list(layer_ids)
    if not ids:
        raise ValueError("layer_ids must not be empty")
    for layer_id in ids:
        require_int("each of layer_ids", layer_id, -1)
    return [int(layer_id) for layer_id in ids]


def _require_row(name: str, value: Tensor, seq_len: int) -> None:
    require_int("seq_len", seq_len, 0)
    require_tensor(name, value, ("batch", "seq"))
    if value.is_complex():
        raise TypeError(f"{name} must be bool, integer or float, got {value.dtype}")
    if value.shape[1] != seq_len:
        raise ValueError(
            f"seq_len must be the row length of {name}, {value.shape[1]}, got {seq_len}"
        )


def _require_doc_remaining(doc_remaining: Tensor, loss_mask: Tensor) -> None:
    require_shape("doc_remaining", doc_remaining, ("batch", "seq"), tuple(loss_mask.shape))
    require_integers("doc_remaining", doc_remaining)
    require_same_device(loss_mask=loss_mask, doc_remaining=doc_remaining)


def _require_blocks(block_keep_mask: Tensor, shape: tuple[int, int]) -> None:
    require_shape("block_keep_mask", block_keep_mask, ("batch", "anchor"), shape)
    require_bool("block_keep_mask", block_keep_mask)


def _require_anchors(anchor_positions: Tensor, shape: tuple[int, int], seq_len: int) -> None:
    require_shape("anchor_positions", anchor_positions, ("batch", "anchor"), shape)
    require_integers("anchor_positions", anchor_positions)
    debug_range("anchor_positions", anchor_positions, 0, max(seq_len, 1))


def _require_same_batch(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have the batch of {other_name}, {other.shape[0]}, got {value.shape[0]}"
        )


def _require_device(name: str, given: torch.device | str, wanted: torch.device) -> None:
    """Refuse a device that is not ``wanted``; one without an index means any of its type."""
    if not isinstance(given, (str, torch.device)):
        raise TypeError(f"{name} must be a torch.device or its name, got {given!r}")
    given = torch.device(given)
    if given.type != wanted.type or given.index not in (None, wanted.index):
        raise ValueError(f"{name} must be on the device of loss_mask, {wanted}, got {given}")
