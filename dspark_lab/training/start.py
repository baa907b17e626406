"""New drafters, started from the target's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch

from dspark_lab.chats import Encoded, seen_tokens
from dspark_lab.checks import Count, NotEmpty, Size, checked
from dspark_lab.model import Drafter, DrafterConfig, MarkovKind, Target, read_scaling


@checked
def new_drafter(
    target: Target,
    *,
    mask_token_id: Size,
    num_hidden_layers: Count = 2,
    block_size: Count = 7,
    markov_rank: Size = 64,
    markov_head_type: MarkovKind = "vanilla",
    target_layer_ids: Sequence[int] | None = None,
    num_anchors: Count = 64,
    sample_from_anchor: bool = True,
    sliding_window: Count | None = None,
    draft_ids: Annotated[Sequence[int], NotEmpty()] | None = None,
) -> Drafter:
    """A new drafter of the target's shape, started with :func:`init_from_target`.

    ``target_layer_ids`` None reads up to five layers, spread evenly. YaRN, soft cap and logit scale
    are the target's. ``sample_from_anchor`` False: a block's first slot is the anchor's own.
    ``sliding_window`` is that of all layers. ``draft_ids`` are the tokens that the drafter can
    predict, all where None.
    """
    c = target.model.config.get_text_config()
    said = c.to_dict()  # where layers differ, as Gemma 4's, the attributes cannot be read
    heads = c.num_attention_heads
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    rope = rope.get("full_attention") or rope  # of each kind of layer, as Gemma's have it
    scaled = rope.get("rope_type") == "yarn"
    has_markov_head = markov_rank > 0 and markov_head_type != "none"
    ids = None if draft_ids is None else sorted(set(draft_ids))
    if ids is not None and not 0 <= ids[0] <= ids[-1] < target.vocab_size:
        wanted = f"draft_ids must lie in [0, {target.vocab_size - 1}]"
        raise ValueError(f"{wanted}, got {ids[0]} to {ids[-1]}")
    drafter = Drafter(
        DrafterConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            intermediate_size=said.get("intermediate_size") or 4 * target.hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=said.get("num_key_value_heads") or heads,
            head_dim=said.get("head_dim") or target.hidden_size // heads,
            target_layer_ids=tuple(target_layer_ids or spread_layers(target.num_layers)),
            block_size=block_size,
            mask_token_id=mask_token_id,
            num_anchors=num_anchors,
            num_target_layers=target.num_layers,
            markov_rank=markov_rank,
            markov_head_type=markov_head_type,
            confidence_head_with_markov=has_markov_head,
            rms_norm_eps=said.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or said.get("rope_theta") or 10000),
            max_position_embeddings=c.max_position_embeddings,
            yarn=read_scaling("rope", said | {"rope": rope}) if scaled else None,
            sample_from_anchor=sample_from_anchor,
            sliding_window=sliding_window,
            layer_types=["sliding_attention"] * num_hidden_layers if sliding_window else None,
            draft_vocab_size=None if ids is None else len(ids),
            final_logit_softcapping=target.logit_rule.cap,
            logit_scale=None if target.logit_rule.scale == 1 else target.logit_rule.scale,
        )
    )
    if ids is not None and drafter.d2t is not None:
        drafter.d2t.copy_(torch.tensor(ids) - torch.arange(len(ids)))
    init_from_target(drafter, target)
    return drafter


@checked
@torch.no_grad()
def init_from_target(drafter: Drafter, target: Target) -> None:
    """Copy the target's weights into a drafter where shapes agree, to start training from.

    The drafter's layers take the weights of the target's last ones, its final norm that of the
    target, and ``fc`` begins as the mean of the context layers where widths agree.
    """
    own = dict(drafter.named_parameters())
    count, layers = drafter.config.num_hidden_layers, target.num_layers
    decoder = target.model.get_decoder()
    for name, weight in decoder.named_parameters():
        parts = name.split(".")
        if name.endswith("norm.weight"):
            weight = _norm_factor(decoder.get_submodule(name.removesuffix(".weight")))
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) - layers + count)
        elif parts[0] != "norm":
            continue
        found = own.get(".".join(parts))
        if found is not None and found.shape == weight.shape:
            found.copy_(weight)
    hidden, depth = drafter.config.hidden_size, len(drafter.config.target_layer_ids)
    if drafter.config.context_size == depth * hidden:
        drafter.fc.weight.copy_(torch.eye(hidden).repeat(1, depth) / depth)


def _norm_factor(norm: torch.nn.Module) -> torch.Tensor:
    """What a norm multiplies by: its weight, or, in some of Gemma's, 1 + weight."""
    weight = norm.get_parameter("weight")
    off_by_one = torch.allclose(norm(torch.ones_like(weight)), 1 + weight, rtol=0.01)
    return 1 + weight if off_by_one else weight


def spread_layers(num_layers: int) -> list[int]:
    """Up to five layers, spread evenly from the second to the last but one of ``num_layers``."""
    last = num_layers - 2
    count = min(5, max(1, num_layers - 1))
    first = min(1, last - count + 1)
    return np.linspace(first, last, count).round().astype(int).tolist()


@checked
def mask_token_id(name: str | None, target: Target, chats: Sequence[Encoded]) -> int:
    """The token called ``name``; else the tokenizer's own, else the last that no chat contains."""
    vocabulary = target.tokenizer.get_vocab() if target.tokenizer is not None else {}
    if name is not None:
        if name not in vocabulary:
            raise ValueError(f"mask_token must be a token of the target's vocabulary, got {name!r}")
        return vocabulary[name]
    own = getattr(target.tokenizer, "mask_token_id", None)
    if own is not None:
        return own
    unused = (~seen_tokens(chats, target.vocab_size)).nonzero()
    if not len(unused):
        raise ValueError("the conversations contain every token: mask_token must name one")
    return int(unused[-1])
