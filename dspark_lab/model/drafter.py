"""The drafter: a backbone that predicts whole blocks, a Markov head, a confidence head.

    features, tokens, anchors -> Slots (all that precedes the vocabulary) -> DSparkForwardOutput

Rules, in words (DSpark, section 3; DFlash for the backbone):

    input:   slot 0 of a block is its anchor's token, every other slot a mask token;
    context: the target's features of a row are projected and normed once, and each layer makes keys
             and values of them with the same projections as of the slots;
    mask:    a slot sees the context before its anchor and its own block, see
             ``dspark_lab.attention.mask``;
    labels:  slot k of the block at anchor a predicts token a + k + 1; its previous token is a + k,
             and its teacher is the target's final hidden state at a + k.

Embedding and LM head are the target's own, frozen. This file knows tensors of tokens and features;
it knows nothing about text, about where features come from, about losses or about files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from dspark_lab.attention import Backend, block_attention, training_block_mask
from dspark_lab.blocks import label_positions
from dspark_lab.checks import (
    require_int,
    require_integers,
    require_number,
    require_same_device,
    require_shape,
    require_tensor,
)
from dspark_lab.common import (
    AcceptRatePredictor,
    DSparkForwardOutput,
    build_eval_mask,
    context_doc_ids,
    create_noise_embed,
    create_position_ids,
    sample_anchor_positions,
)
from dspark_lab.model.heads import MarkovKind, build_markov_head
from dspark_lab.model.rows import Rows, take

__all__ = ["ARCHITECTURE", "Drafter", "DrafterConfig", "Slots"]

# What a config.json may say of this drafter, or leave out; anything else is another model's.
ARCHITECTURE = "Qwen3DSparkModel"
_FIXED = {
    "architectures": [ARCHITECTURE],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


@dataclass(frozen=True)
class DrafterConfig:
    """The shape of a drafter; names and defaults are those of the published checkpoints.

    ``target_layer_ids`` are the target's layers whose states are the context feature (see
    :func:`dspark_lab.common.extract_context_feature`), each ``target_hidden_size`` wide, which is
    ``hidden_size`` where None. ``num_anchors`` is what a training forward draws for each row.
    ``markov_rank`` 0 or ``markov_head_type`` "none" leaves the Markov head out.
    ``num_target_layers`` is there for other readers of a checkpoint.

    Raises TypeError or ValueError where sizes are not whole numbers of at least 1, where heads do
    not divide, or where the confidence head asks for a Markov embedding that is not there.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    num_anchors: int = 512
    markov_rank: int = 256
    markov_head_type: MarkovKind = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    target_hidden_size: int | None = None
    num_target_layers: int | None = None
    attention_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "block_size",
            "num_anchors",
            "max_position_embeddings",
        ):
            require_int(name, getattr(self, name), 1)
        require_int("markov_rank", self.markov_rank, 0)
        for name in ("target_hidden_size", "num_target_layers"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        require_int("mask_token_id", self.mask_token_id, 0)
        if self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"mask_token_id must lie in the vocabulary, [0, {self.vocab_size - 1}], "
                f"got {self.mask_token_id}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads must divide num_attention_heads, "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        ids = tuple(self.target_layer_ids)
        for layer_id in ids:
            require_int("each of target_layer_ids", layer_id, -1)
        if not ids or list(ids) != sorted(set(ids)):
            raise ValueError(
                f"target_layer_ids must be one or more ids, strictly increasing, got {ids}"
            )
        object.__setattr__(self, "target_layer_ids", ids)
        if self.reads_markov and not self.has_markov_head:
            raise ValueError(
                "confidence_head_with_markov needs a Markov head, got markov_rank "
                f"{self.markov_rank} and markov_head_type {self.markov_head_type!r}"
            )

    @property
    def has_markov_head(self) -> bool:
        return self.markov_rank > 0 and self.markov_head_type != "none"

    @property
    def reads_markov(self) -> bool:
        """Whether the confidence head reads the previous token's Markov embedding."""
        return self.enable_confidence_head and self.confidence_head_with_markov

    @property
    def context_size(self) -> int:
        """The width of a context feature."""
        return len(self.target_layer_ids) * (self.target_hidden_size or self.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """The content of a published ``config.json``."""
        values: dict[str, Any] = {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            # Where transformers looks for it from version 5 on; before, it is a field of its own.
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }
        values |= {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["target_layer_ids"] = list(self.target_layer_ids)
        for name in ("target_hidden_size", "num_target_layers"):
            if values[name] is None:
                del values[name]
        if not self.has_markov_head:
            # Rank 0 is how published checkpoints say so.
            values["markov_rank"] = 0
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DrafterConfig:
        """Reads the content of a ``config.json``; unknown keys are metadata.

        ``rope_theta`` may stand by itself or in ``rope_parameters`` or ``rope_scaling``. What
        concerns training alone, as ``attention_dropout``, is not read.

        Raises:
            TypeError, ValueError: a field that is missing or of the wrong kind, or one that asks
                for what this drafter does not do: another architecture or activation, sliding
                windows, scaled or partial RoPE, quantised weights.
        """
        _refuse_unsupported(values)
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["rope_theta"] = _read_rope_theta(values)
        missing = [
            name
            for name, field in cls.__dataclass_fields__.items()
            if name not in known and field.default is field.default_factory
        ]
        if missing:
            raise ValueError(f"config must hold {', '.join(missing)}, which it does not")
        for name in ("attention_bias", "enable_confidence_head", "confidence_head_with_markov"):
            if not isinstance(known.get(name, False), bool):
                raise TypeError(f"{name} must be true or false, got {known[name]!r}")
        for name in ("rms_norm_eps", "initializer_range"):
            if name in known:
                _require_positive(name, known[name])
        if not isinstance(known["target_layer_ids"], (list, tuple)):
            raise TypeError(f"target_layer_ids must be a list, got {known['target_layer_ids']!r}")
        known["target_layer_ids"] = tuple(known["target_layer_ids"])
        return cls(**known)


@dataclass
class Slots:
    """Every slot of a training forward, just before the vocabulary.

    A slot's logits are ``lm_head(hidden) + markov_w2(latent)``, its teacher's
    ``lm_head(target_hidden)``. ``latent`` is None without a Markov head, ``confidence_pred``
    (logits) without a confidence head, ``target_hidden`` where no teacher was given. ``prev_ids``
    are the tokens before those to predict; what slots past the row's end hold has no meaning.
    """

    hidden: Float[Tensor, "batch anchor slot hidden"]
    latent: Float[Tensor, "batch anchor slot rank"] | None
    confidence_pred: Float[Tensor, "batch anchor slot"] | None
    target_hidden: Float[Tensor, "batch anchor slot hidden"] | None
    target_ids: Int[Tensor, "batch anchor slot"]
    prev_ids: Int[Tensor, "batch anchor slot"]
    eval_mask: Bool[Tensor, "batch anchor slot"]
    block_keep_mask: Bool[Tensor, "batch anchor"]


@dataclass(frozen=True, eq=False)
class DraftCache:
    """The keys and values that each layer made of the context of each row."""

    states: list[tuple[Tensor, Tensor]]
    rows: Rows

    def keep(self, rows: Sequence[int]) -> None:
        """The other rows leave."""
        cut = self.rows.commit([0] * len(self.rows.lengths), rows)
        for index, (keys, values) in enumerate(self.states):
            self.states[index] = take(keys, cut), take(values, cut)


class Drafter(nn.Module):
    """A DSpark drafter; its parameters have the names of the published checkpoints.

    Embedding and LM head are frozen. :meth:`use_target_embeddings` makes them the target's.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        c, d = config, config.hidden_size
        self.embed_tokens = nn.Embedding(c.vocab_size, d)
        self.fc = nn.Linear(c.context_size, d, bias=False)
        self.hidden_norm = RMSNorm(d, c.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(d, c.rms_norm_eps)
        self.lm_head = nn.Linear(d, c.vocab_size, bias=False)
        self.markov_head = build_markov_head(c.markov_head_type, c.vocab_size, c.markov_rank, d)
        self.confidence_head = None
        if c.enable_confidence_head:
            self.confidence_head = AcceptRatePredictor(d + c.markov_rank * c.reads_markov)
        self.reset_parameters()
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights of a fresh drafter: Markov bias and confidence logit begin at zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        if self.markov_head is not None:
            self.markov_head.markov_w1.weight.normal_()
            self.markov_head.markov_w2.weight.zero_()
        if self.confidence_head is not None:
            self.confidence_head.proj.weight.zero_()

    def use_target_embeddings(
        self,
        embed_weight: Float[Tensor, "vocab hidden"],
        head_weight: Float[Tensor, "vocab hidden"],
    ) -> None:
        """Make the target's embedding and LM head the drafter's own, frozen.

        They share memory where dtype and device are the drafter's.

        Raises:
            TypeError, ValueError: not tensors of ``[vocab_size, hidden_size]``.
        """
        shape = (self.config.vocab_size, self.config.hidden_size)
        like = self.fc.weight
        for name, module, weight in (
            ("embed_weight", self.embed_tokens, embed_weight),
            ("head_weight", self.lm_head, head_weight),
        ):
            require_shape(name, weight, ("vocab", "hidden"), shape)
            shared = weight.detach().to(device=like.device, dtype=like.dtype)
            module.weight = nn.Parameter(shared, requires_grad=False)

    @property
    def markov_w2_weight(self) -> Float[Tensor, "vocab rank"] | None:
        """What maps the slots' ``latent`` to the Markov bias; None without a Markov head."""
        return None if self.markov_head is None else self.markov_head.markov_w2.weight

    def slots(
        self,
        input_ids: Int[Tensor, "batch seq"],
        target_hidden_states: Float[Tensor, "batch seq features"],
        loss_mask: Shaped[Tensor, "batch seq"],
        target_last_hidden_states: Float[Tensor, "batch seq hidden"] | None = None,
        *,
        doc_remaining: Int[Tensor, "batch seq"] | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        seq_lens: Int[Tensor, "batch docs"] | None = None,
        anchor_positions: Int[Tensor, "batch anchor"] | None = None,
        block_keep_mask: Bool[Tensor, "batch anchor"] | None = None,
        generator: torch.Generator | None = None,
        backend: Backend = "auto",
    ) -> Slots:
        """Draw anchors, run the backbone and both heads; stop before the vocabulary.

        Args:
            input_ids: the rows' tokens.
            target_hidden_states: context features of every token, of ``config.context_size``.
            loss_mask: which tokens are supervised, see
                :func:`dspark_lab.common.build_anchor_candidate_mask`.
            target_last_hidden_states: the target's final hidden states, after its last norm.
            doc_remaining, position_ids, seq_lens: of packed rows, all three or none; see
                :class:`dspark_lab.chats.conversations.Batch`.
            anchor_positions, block_keep_mask: the blocks, both or none; drawn where None.
            generator: for the draw, see :func:`dspark_lab.common.sample_anchor_positions`.
            backend: see :func:`dspark_lab.attention.mask.block_attention`.

        Raises:
            TypeError, ValueError: wrong kind, rank, shape or device, or only a part of what goes
                together.
        """
        c = self.config
        self._require_inputs(
            input_ids, target_hidden_states, loss_mask, target_last_hidden_states, seq_lens
        )
        _require_together(doc_remaining=doc_remaining, position_ids=position_ids, seq_lens=seq_lens)
        _require_together(anchor_positions=anchor_positions, block_keep_mask=block_keep_mask)
        seq_len = input_ids.shape[1]
        if anchor_positions is None or block_keep_mask is None:
            anchor_positions, block_keep_mask = sample_anchor_positions(
                seq_len, loss_mask, c.num_anchors, input_ids.device, doc_remaining, generator
            )
        labels, safe_labels = label_positions(
            anchor_positions, block_keep_mask, seq_len=seq_len, block_size=c.block_size
        )
        eval_mask = build_eval_mask(
            seq_len,
            loss_mask,
            labels,
            safe_labels,
            block_keep_mask,
            doc_remaining,
            None if doc_remaining is None else anchor_positions,
        )
        hidden = self._backbone(
            input_ids,
            target_hidden_states,
            anchor_positions,
            block_keep_mask,
            position_ids,
            seq_lens,
            backend,
        )
        hidden = hidden.unflatten(1, (-1, c.block_size))
        previous = (labels - 1).clamp(max=seq_len - 1)
        row = torch.arange(len(input_ids), device=input_ids.device).view(-1, 1, 1)
        prev_ids = input_ids[row, previous]
        latent = embedding = None
        if self.markov_head is not None:
            latent = self.markov_head.latent(prev_ids, hidden)
            embedding = self.markov_head.embed(prev_ids)
        return Slots(
            hidden=hidden,
            latent=latent,
            confidence_pred=self.confidence(hidden, embedding),
            target_hidden=(
                None
                if target_last_hidden_states is None
                else target_last_hidden_states[row, previous]
            ),
            target_ids=input_ids[row, safe_labels],
            prev_ids=prev_ids,
            eval_mask=eval_mask,
            block_keep_mask=block_keep_mask,
        )

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        target_hidden_states: Float[Tensor, "batch seq features"],
        loss_mask: Shaped[Tensor, "batch seq"],
        target_last_hidden_states: Float[Tensor, "batch seq hidden"] | None = None,
        **options: Any,
    ) -> DSparkForwardOutput:
        """The training forward, with full logits of drafter and target (DSpark, section 3).

        Arguments, options and errors are those of :meth:`slots`. The logits are batch x anchor x
        slot x vocab numbers each: to train, hand :meth:`slots` to
        :func:`dspark_lab.model.objective.dspark_objective`, which never holds them all.
        """
        slots = self.slots(
            input_ids, target_hidden_states, loss_mask, target_last_hidden_states, **options
        )
        target_logits = None
        if slots.target_hidden is not None:
            target_logits = self.lm_head(slots.target_hidden.to(self.lm_head.weight.dtype))
        return DSparkForwardOutput(
            draft_logits=self.logits(slots.hidden, slots.latent),
            target_ids=slots.target_ids,
            eval_mask=slots.eval_mask,
            block_keep_mask=slots.block_keep_mask,
            confidence_pred=slots.confidence_pred,
            aligned_target_logits=target_logits,
        )

    def start_cache(self, batch: int) -> DraftCache:
        """An empty cache of the context's keys and values, for :meth:`read` and :meth:`draft`."""
        c, like = self.config, self.fc.weight
        empty = like.new_empty(batch, c.num_key_value_heads, 0, c.head_dim)
        states = [(empty, empty) for _ in self.layers]
        return DraftCache(states, Rows([0] * batch, like.device))

    def read(
        self,
        context: Float[Tensor, "batch new features"],
        cache: DraftCache,
        counts: Sequence[int],
    ) -> None:
        """Takes further context into ``cache``: of row r the first ``counts[r]`` features.

        They stand right behind those that the row has there already.
        """
        new = context.shape[1]
        states = self.hidden_norm(self.fc(context.to(self.fc.weight.dtype)))
        angles = _rope(cache.rows.positions(new), self.config, states.dtype)
        cut = cache.rows.commit(counts)
        for index, layer in enumerate(cast("list[_Layer]", self.layers)):
            old = cache.states[index]
            more = layer.self_attn.keys_values(states, angles)
            k, v = (torch.cat(pair, dim=2) for pair in zip(old, more, strict=True))
            cache.states[index] = take(k, cut), take(v, cut)

    def draft(
        self, anchor_ids: Int[Tensor, " batch"], cache: DraftCache
    ) -> Float[Tensor, "batch slot hidden"]:
        """The backbone's states of one block a row, its anchor right behind the row's context.

        The same as in a training forward, for one anchor, up to rounding. What a slot's token is
        drawn from follows with :meth:`logits` and the Markov head, slot after slot.
        """
        c = self.config
        ids = anchor_ids.new_full((len(anchor_ids), c.block_size), c.mask_token_id)
        ids[:, 0] = anchor_ids
        x = self.embed_tokens(ids)
        angles = _rope(cache.rows.positions(c.block_size), c, x.dtype)
        mask = None
        if not cache.rows.even:
            mask = cache.rows.mask(c.block_size, causal=False).unsqueeze(1)
        for layer, old in zip(cast("list[_Layer]", self.layers), cache.states, strict=True):
            x = layer.around(x, partial(layer.self_attn.cached, old=old, angles=angles, mask=mask))
        return self.norm(x)

    def logits(
        self,
        hidden: Float[Tensor, "*axes hidden"],
        latent: Float[Tensor, "*axes rank"] | None = None,
    ) -> Float[Tensor, "*axes vocab"]:
        """The LM head's logits, with the Markov bias of ``latent`` where it is given."""
        logits = self.lm_head(hidden)
        if latent is not None and self.markov_head is not None:
            logits = logits + self.markov_head.markov_w2(latent)
        return logits

    def _backbone(
        self,
        input_ids: Tensor,
        target_hidden_states: Tensor,
        anchor_positions: Tensor,
        block_keep_mask: Tensor,
        position_ids: Tensor | None,
        seq_lens: Tensor | None,
        backend: Backend,
    ) -> Float[Tensor, "batch query hidden"]:
        c = self.config
        batch, seq_len = input_ids.shape
        x = create_noise_embed(
            self.embed_tokens,
            input_ids,
            anchor_positions,
            block_keep_mask,
            c.mask_token_id,
            c.block_size,
        )
        context = self.hidden_norm(self.fc(target_hidden_states.to(self.fc.weight.dtype)))
        slot_positions = create_position_ids(anchor_positions, c.block_size, position_ids)
        if position_ids is None:
            position_ids = torch.arange(seq_len, device=x.device).expand(batch, -1)
        angles = _rope(torch.cat([position_ids, slot_positions], dim=1), c, x.dtype)
        blocks: dict[str, Any] = {
            "anchor_positions": anchor_positions,
            "block_keep_mask": block_keep_mask,
            "seq_len": seq_len,
            "block_size": c.block_size,
            "doc_ids": None if seq_lens is None else context_doc_ids(seq_lens, seq_len, x.device),
        }
        # One mask for all layers.
        mask = None
        if backend == "flex" or (backend == "auto" and x.is_cuda):
            mask = training_block_mask(**blocks)
        for layer in self.layers:
            x = layer(x, context, angles, backend=backend, block_mask=mask, **blocks)
        return self.norm(x)

    def confidence(
        self,
        hidden: Float[Tensor, "*axes hidden"],
        embedding: Float[Tensor, "*axes rank"] | None,
    ) -> Float[Tensor, "*axes"] | None:
        """The confidence head's logits; None without such a head.

        ``embedding`` is the Markov head's, of the previous token, or None where there is none.
        """
        if self.confidence_head is None:
            return None
        if self.config.reads_markov:
            hidden = torch.cat([hidden, cast(Tensor, embedding).to(hidden.dtype)], dim=-1)
        return self.confidence_head(hidden)

    def _require_inputs(
        self,
        input_ids: Tensor,
        features: Tensor,
        loss_mask: Tensor,
        last: Tensor | None,
        seq_lens: Tensor | None,
    ) -> None:
        require_tensor("input_ids", input_ids, ("batch", "seq"))
        require_integers("input_ids", input_ids)
        rows = tuple(input_ids.shape)
        if rows[1] == 0:
            raise ValueError(f"input_ids must hold at least one token a row, got shape {rows}")
        require_shape("loss_mask", loss_mask, ("batch", "seq"), rows)
        if seq_lens is not None:
            require_tensor("seq_lens", seq_lens, ("batch", "docs"))
            require_shape("seq_lens", seq_lens, ("batch", "docs"), (rows[0], seq_lens.shape[1]))
        size = self.config.context_size
        axes = ("batch", "seq", "features")
        require_shape("target_hidden_states", features, axes, (*rows, size))
        if last is not None:
            axes = ("batch", "seq", "hidden")
            size = self.config.hidden_size
            require_shape("target_last_hidden_states", last, axes, (*rows, size))
        require_same_device(
            input_ids=input_ids,
            target_hidden_states=features,
            target_last_hidden_states=last,
            drafter=self.fc.weight,
        )


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, computed in fp32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*axes size"]) -> Float[Tensor, "*axes size"]:
        """The normed input, in its own dtype."""
        wide = _at_least_fp32(x.dtype)
        normed = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return normed.to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor], **blocks: Any
    ) -> Tensor:
        return self.around(x, partial(self.self_attn, context=context, angles=angles, **blocks))

    def around(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer with this attention in its place."""
        x = x + attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        d, width, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = width
        self.q_proj = nn.Linear(d, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, d, bias=bias)
        self.q_norm = RMSNorm(width, config.rms_norm_eps)
        self.k_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(
        self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor], **blocks: Any
    ) -> Tensor:
        # Under autocast the two come in different dtypes.
        k, v = self.keys_values(torch.cat([context.to(x.dtype), x], dim=1), angles)
        of_slots = (angles[0][:, :, -x.shape[1] :], angles[1][:, :, -x.shape[1] :])
        q = self.queries(x, of_slots)
        return self.o_proj(block_attention(q, k, v, **blocks).transpose(1, 2).flatten(2))

    def cached(
        self,
        x: Tensor,
        old: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Of one block a row, whose context's keys and values are ``old``."""
        q, own = self.queries(x, angles), self.keys_values(x, angles)
        k, v = (torch.cat(pair, dim=2) for pair in zip(old, own, strict=True))
        seen = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(seen.transpose(1, 2).flatten(2))

    def queries(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        q = self._heads(self.q_proj(x))
        return _rotate(self.q_norm(q), angles).to(q.dtype)

    def keys_values(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return _rotate(self.k_norm(k), angles).to(v.dtype), v

    def _heads(self, x: Tensor) -> Float[Tensor, "batch heads seq head_dim"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class _MLP(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _rope(
    positions: Int[Tensor, "batch seq"], config: DrafterConfig, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch 1 seq half"], Float[Tensor, "batch 1 seq half"]]:
    """Cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864), in fp32 at least."""
    wide = _at_least_fp32(dtype)
    pair = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=wide)
    frequency = config.rope_theta ** (-pair / config.head_dim)
    angle = positions.to(wide).unsqueeze(-1) * frequency
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def _rotate(
    x: Float[Tensor, "batch heads seq head_dim"], angles: tuple[Tensor, Tensor]
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turns each pair (i, i + head_dim / 2) by its angle."""
    cos, sin = angles
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _require_together(**given: Tensor | None) -> None:
    if len({value is None for value in given.values()}) > 1:
        missing = [name for name, value in given.items() if value is None]
        raise ValueError(f"{', '.join(given)} go together, got no {', '.join(missing)}")


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    for name, allowed in _FIXED.items():
        if values.get(name) not in (None, allowed):
            raise ValueError(f"{name} must be {allowed!r} or absent, got {values[name]!r}")
    kinds = values.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"layer_types must all be 'full_attention', got {kinds!r}")


def _read_rope_theta(values: Mapping[str, Any]) -> float:
    found: dict[str, Any] = {"rope_theta": values.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        if not isinstance(rope, Mapping):
            raise TypeError(f"{name} must be an object, got {rope!r}")
        for key, value in rope.items():
            if key != "rope_theta" and value not in (None, _PLAIN_ROPE.get(key)):
                raise ValueError(f"{name} must be of rope_type 'default' alone, got {dict(rope)!r}")
        found[f"{name}.rope_theta"] = rope.get("rope_theta")
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        raise ValueError("config must hold rope_theta, by itself or in rope_parameters")
    for name, value in found.items():
        _require_positive(name, value)
    if len(set(found.values())) > 1:
        raise ValueError(f"rope_theta must be one number, got {found}")
    return float(next(iter(found.values())))


def _require_positive(name: str, value: Any) -> None:
    require_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
