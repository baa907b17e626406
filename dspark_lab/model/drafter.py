"""The drafter: a backbone that predicts whole blocks, a Markov head, a confidence head.

    blocks, features -> Slots (all that precedes the vocabulary) -> DSparkForwardOutput

Rules, in words (DSpark, section 3; DFlash for the backbone):

    input:   slot 0 of a block is its anchor's token, every other slot a mask token;
    context: the target's features of a row are projected and normed once, and each layer makes keys
             and values of them with the same projections as of the slots;
    mask:    a slot sees the context before its anchor and its own block; a layer may have a window
             or causal blocks instead (:class:`dspark_lab.attention.View`);
    labels:  the first slot that predicts, 0 or, where the anchor is given, 1, predicts token a + 1
             of the block at anchor a, and so on; its previous token is the one before that, and its
             teacher is the target's final hidden state there.

Embedding and LM head are the target's own, frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dspark_lab.attention import (
    FULL,
    Backend,
    ContextRanges,
    MaskForm,
    View,
    choose_backend,
    mask_form,
)
from dspark_lab.blocks import Blocks, cut_blocks
from dspark_lab.chats import Batch
from dspark_lab.checks import checked
from dspark_lab.common import AcceptRatePredictor, DSparkForwardOutput, sample_anchor_positions
from dspark_lab.model.config import DrafterConfig
from dspark_lab.model.heads import build_markov_head
from dspark_lab.model.layers import Layer, RMSNorm, rope
from dspark_lab.model.objective import Objective, dspark_objective
from dspark_lab.model.protocol import Choose, DrafterSizes, Proposal, Slots
from dspark_lab.model.rows import KeyValues, Rows
from dspark_lab.model.slotwise import DecayGamma, LogitRule, check_token_ids


@dataclass(frozen=True, eq=False)
class DraftCache:
    """The keys and values that each layer made of the context of each row."""

    states: list[KeyValues]
    rows: Rows

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other rows."""
        kept = self.rows.commit([0] * len(self.rows.lengths), rows)
        if kept is not None:
            for states in self.states:
                states.keep(kept)


@checked
class Drafter(nn.Module):
    """A DSpark drafter; its parameters have the names of the published checkpoints."""

    d2t: Tensor | None
    target_head: Tensor | None

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        c, d = config, config.hidden_size
        self.embed_tokens = nn.Embedding(c.vocab_size, d)
        self.fc = nn.Linear(c.context_size, d, bias=False)
        self.hidden_norm = RMSNorm(d, c.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(d, c.rms_norm_eps)
        self.lm_head = nn.Linear(d, c.output_size, bias=False)
        self.markov_head = build_markov_head(
            c.markov_head_type, c.vocab_size, c.markov_rank, d, c.draft_vocab_size
        )
        # The kinds of masks, and which of them is each layer's.
        self.views = list(dict.fromkeys(c.views))
        self._view_of = [self.views.index(view) for view in c.views]
        self.logit_rule = LogitRule(c.final_logit_softcapping, c.logit_scale or 1.0)
        # Of a reduced vocabulary: the target's id less the own of each token, until it is loaded
        # that of the first ones, and the target's LM head.
        reduced = c.draft_vocab_size
        offsets = None if reduced is None else torch.zeros(reduced, dtype=torch.long)
        self.register_buffer("d2t", offsets)
        self.register_buffer("target_head", None, persistent=False)
        # What the teacher's logits follow; a target that is given says.
        self.target_rule = self.logit_rule
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

    @checked
    def use_target_embeddings(
        self,
        embed_weight: Float[Tensor, "vocab hidden"],
        head_weight: Float[Tensor, "head_vocab hidden"],
        logit_rule: LogitRule | None = None,
    ) -> None:
        """Make the target's embedding and LM head the drafter's own, frozen, shared if alike.

        A drafter of a reduced vocabulary takes the rows of its tokens from the LM head.
        ``logit_rule`` is what the target makes of its LM head's product, where it is known.
        """
        for weight in (embed_weight, head_weight):
            self._check_table(weight)
        head = head_weight.detach().to(device=self.device, dtype=self.dtype)
        embedding = embed_weight.detach().to(device=self.device, dtype=self.dtype)
        self.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
        if self.draft_ids is not None:
            self.target_head, head = head, head[self.draft_ids]
        self.lm_head.weight = nn.Parameter(head, requires_grad=False)
        if logit_rule is not None:
            self.target_rule = logit_rule

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def sizes(self) -> DrafterSizes:
        return drafter_sizes(self.config)

    @property
    def draft_ids(self) -> Int[Tensor, " draft"] | None:
        """The target's ids of the tokens that the drafter predicts; None where these are all."""
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def markov_w2_weight(self) -> Float[Tensor, "vocab rank"] | None:
        """Maps the slots' ``latent`` to the Markov bias; None without a Markov head."""
        return None if self.markov_head is None else self.markov_head.markov_w2.weight

    @checked
    def slots(
        self,
        blocks: Blocks,
        target_hidden_states: Float[Tensor, "batch seq features"],
        target_last_hidden_states: Float[Tensor, "batch seq hidden"] | None = None,
        *,
        backend: Backend = "auto",
        forms: Sequence[MaskForm] | None = None,
    ) -> Slots:
        """Run the backbone and both heads on a draw of blocks; stop before the vocabulary.

        The slots are those that predict. ``blocks`` must have the drafter's block size, layout and
        mask token; ``forms`` are from :meth:`mask_forms`, for this back end, where they are made
        already; the others as :meth:`forward`.
        """
        last = target_last_hidden_states
        self._check_fit(blocks, target_hidden_states, last)
        hidden = self._backbone(blocks, target_hidden_states, backend, forms)
        hidden = hidden[:, :, blocks.block_size - blocks.predicted :]
        latent = embedding = None
        if self.markov_head is not None:
            latent = self.markov_head.latent(blocks.prev_ids, hidden)
            embedding = self.markov_head.embed(blocks.prev_ids)
        row = torch.arange(len(hidden), device=hidden.device).view(-1, 1, 1)
        teacher = None if last is None else last[row, blocks.prev_indices]
        marks = blocks.target_ids, blocks.prev_ids, blocks.eval_mask, blocks.block_keep_mask
        return Slots(hidden, latent, self.confidence(hidden, embedding), teacher, *marks)

    def mask_forms(self, blocks: Blocks, backend: Backend) -> list[MaskForm]:
        """The mask of the blocks for each of ``views`` (:func:`dspark_lab.attention.mask_form`)."""
        return [mask_form(ranges, backend) for ranges in self._ranges(blocks)]

    def _ranges(self, blocks: Blocks) -> list[ContextRanges]:
        return [ContextRanges.of(blocks, view) for view in self.views]

    @checked
    def forward(
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
    ) -> DSparkForwardOutput:
        """The training forward, with full logits of drafter and target (DSpark, section 3).

        The logits are batch x anchor x slot x vocab numbers each: to train, hand :meth:`slots` to
        :func:`dspark_lab.model.objective.dspark_objective`, which never holds them all.

        Args:
            target_hidden_states: context features of every token, of ``config.context_size``.
            target_last_hidden_states: the target's final hidden states, after its last norm;
                without them the slots have no teacher.
            doc_remaining, position_ids, seq_lens: of packed rows, all three or none; see
                :class:`dspark_lab.chats.Batch`.
            anchor_positions, block_keep_mask: the blocks, both or none; ``config.num_anchors`` are
                drawn with ``generator`` where None.
            backend: see :func:`dspark_lab.attention.block_attention`.
        """
        c = self.config
        check_token_ids(input_ids, c.vocab_size)
        packing = dict(doc_remaining=doc_remaining, position_ids=position_ids, seq_lens=seq_lens)
        batch = Batch.of_tokens(input_ids, loss_mask, **packing)
        if (anchor_positions is None) != (block_keep_mask is None):
            absent = "anchor_positions" if anchor_positions is None else "block_keep_mask"
            raise ValueError(f"anchor_positions and block_keep_mask go together, got no {absent}")
        if anchor_positions is None or block_keep_mask is None:
            seq_len, place, remaining = input_ids.shape[1], input_ids.device, batch.doc_remaining
            anchor_positions, block_keep_mask = sample_anchor_positions(
                seq_len, loss_mask, c.num_anchors, place, remaining, generator
            )
        marks: dict[str, Any] = {"mask_token_id": c.mask_token_id, "layout": c.layout}
        blocks = cut_blocks(batch, anchor_positions, block_keep_mask, c.block_size, **marks)
        features = target_hidden_states, target_last_hidden_states
        return self.output(self.slots(blocks, *features, backend=backend))

    def output(self, slots: Slots) -> DSparkForwardOutput:
        """The slots with full logits of drafter and target; -inf for tokens not predicted."""
        head, bias, target_logits = self.lm_head, None, None
        if slots.latent is not None and self.markov_head is not None:
            bias = self.markov_head.markov_w2(slots.latent)
        draft_logits = self.whole_vocabulary(self.logit_rule(head(slots.hidden), bias))
        if slots.target_hidden is not None:
            weight = head.weight if self.target_head is None else self.target_head
            product = F.linear(slots.target_hidden.to(weight.dtype), weight)
            target_logits = self.target_rule(product)
        marks = slots.target_ids, slots.eval_mask, slots.block_keep_mask
        return DSparkForwardOutput(draft_logits, *marks, slots.confidence_pred, target_logits)

    def objective(
        self,
        slots: Slots,
        *,
        ce_weight: float = 0.1,
        l1_weight: float = 0.9,
        confidence_weight: float = 1.0,
        loss_decay_gamma: DecayGamma = 4.0,
        vocabulary: dict[str, Any] | None = None,
    ) -> Objective:
        """:func:`dspark_lab.model.dspark_objective` with the drafter's and the target's heads.

        ``vocabulary`` is :meth:`vocabulary_of` another target, :attr:`vocabulary` where None.
        """
        terms: dict[str, Any] = {"ce_weight": ce_weight, "l1_weight": l1_weight}
        terms |= {"confidence_weight": confidence_weight, "loss_decay_gamma": loss_decay_gamma}
        own, w2 = self.lm_head.weight, self.markov_w2_weight
        return dspark_objective(slots, own, w2, **terms, **(vocabulary or self.vocabulary))

    @property
    def vocabulary(self) -> dict[str, Any]:
        """What :func:`dspark_lab.model.dspark_objective` must know of both models' logits."""
        return {
            "draft_rule": self.logit_rule,
            "target_rule": self.target_rule,
            "draft_ids": self.draft_ids,
            "target_head_weight": self.target_head,
        }

    @checked
    def vocabulary_of(
        self, head_weight: Float[Tensor, "head_vocab hidden"], logit_rule: LogitRule
    ) -> dict[str, Any]:
        """:attr:`vocabulary` with a target's LM head, whatever the drafter was loaded with."""
        self._check_table(head_weight)
        head, ids = head_weight.detach().to(self.device, self.dtype), self.draft_ids
        if ids is None and not torch.equal(head, self.lm_head.weight):
            ids = torch.arange(len(head), device=self.device)
        own = {"draft_ids": ids, "target_head_weight": None if ids is None else head}
        return self.vocabulary | own | {"target_rule": logit_rule}

    def whole_vocabulary(
        self, logits: Float[Tensor, "*axes draft"]
    ) -> Float[Tensor, "*axes vocab"]:
        """The logits of all of the target's tokens, -inf for those that are not predicted."""
        if self.draft_ids is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf)
        return whole.index_copy(-1, self.draft_ids, logits)

    def start_cache(self, batch: int, capacity: int) -> DraftCache:
        """An empty cache of the context's keys and values, for :meth:`read`.

        It has room for ``capacity`` tokens a row, a block's slots among them.
        """
        rows = Rows(batch, capacity, self.device)
        return DraftCache([KeyValues(rows) for _ in self.layers], rows)

    def read(
        self, context: Float[Tensor, "batch new features"], cache: DraftCache, counts: Sequence[int]
    ) -> None:
        """Append to ``cache`` the first ``counts[r]`` features of each row r."""
        states = self.hidden_norm(self.fc(context.to(self.dtype)))
        angles = rope(cache.rows.positions(context.shape[1]), self.config, states.dtype)
        for layer, past in zip(cast("list[Layer]", self.layers), cache.states, strict=True):
            past.write(*layer.self_attn.keys_values(states, angles))
        cache.rows.commit(counts)

    def propose(
        self,
        anchor_ids: Int[Tensor, " batch"],
        cache: DraftCache,
        choose: Choose,
        length: int | None = None,
    ) -> Proposal:
        """One block a row behind its context, left to right, of at most ``length`` slots.

        ``anchor_ids`` are the rows' last tokens, which are not in ``cache`` yet.
        """
        c, previous = self.config, anchor_ids.to(self.device)
        ids = previous.new_full((len(previous), c.block_size), c.mask_token_id)
        ids[:, 0] = previous
        x = self.embed_tokens(ids)
        angles = rope(cache.rows.positions(c.block_size), c, x.dtype)
        masks = [self._cached_mask(cache.rows, view) for view in self.views]
        layers = cast("list[Layer]", self.layers)
        for layer, view, past in zip(layers, self._view_of, cache.states, strict=True):
            mask = masks[view]
            attention = partial(layer.self_attn.cached, past=past, angles=angles, mask=mask)
            x = layer.around(x, attention)
        states = self.norm(x)[:, c.block_size - c.predicted :][:, :length]
        state, tokens, embeddings = None, [], []
        for hidden, product in zip(states.unbind(1), self.lm_head(states).unbind(1), strict=True):
            bias = None
            if self.markov_head is not None:
                embeddings.append(self.markov_head.embed(previous))
                state, latent = self.markov_head.step(state, embeddings[-1], hidden)
                bias = self.markov_head.markov_w2(latent)
            tokens.append(choose(self.whole_vocabulary(self.logit_rule(product, bias))))
            previous = tokens[-1].to(self.device)
        before = torch.stack(embeddings, dim=1) if embeddings else None
        return Proposal(torch.stack(tokens, dim=1), self.confidence(states, before))

    def _cached_mask(self, rows: Rows, view: View) -> Bool[Tensor, "batch 1 slot key"] | None:
        """What a block's slots see of the cached context and of one another; None: everything."""
        if view == FULL and rows.even:
            return None
        new = self.config.block_size
        mask = rows.mask(new, causal=view.causal)
        if view.window is not None:
            position = rows.positions(new).unsqueeze(2)
            key = torch.arange(mask.shape[2], device=mask.device)
            mask = mask & ((key > position - view.window) | (key >= position[:, :1]))
        return mask.unsqueeze(1)

    def _backbone(
        self,
        blocks: Blocks,
        context: Tensor,
        backend: Backend,
        forms: Sequence[MaskForm] | None,
    ) -> Tensor:
        x = self.embed_tokens(blocks.noise_ids.flatten(1))
        context = self.hidden_norm(self.fc(context.to(self.dtype)))
        positions = [blocks.context_position_ids, blocks.position_ids.flatten(1)]
        angles = rope(torch.cat(positions, dim=1), self.config, x.dtype)
        if backend == "auto":
            backend = choose_backend(x.device)
        ranges, forms = self._ranges(blocks), forms or self.mask_forms(blocks, backend)
        for layer, view in zip(self.layers, self._view_of, strict=True):
            mask = {"ranges": ranges[view], "form": forms[view], "backend": backend}
            x = layer(x, context, angles, **mask)
        return self.norm(x).unflatten(1, (-1, blocks.block_size))

    def confidence(
        self, hidden: Float[Tensor, "*axes hidden"], embedding: Float[Tensor, "*axes rank"] | None
    ) -> Float[Tensor, "*axes"] | None:
        """The confidence head's logits, None without it; ``embedding`` is the previous token's."""
        if self.confidence_head is None:
            return None
        if self.config.reads_markov:
            hidden = torch.cat([hidden, cast(Tensor, embedding).to(hidden.dtype)], dim=-1)
        return self.confidence_head(hidden)

    def _check_table(self, weight: Tensor) -> None:
        wanted = (self.config.vocab_size, self.config.hidden_size)
        if weight.shape != wanted:
            needs = f"embedding and LM head must be [vocab, hidden] = {wanted}"
            raise ValueError(f"the target's {needs}, got shape {tuple(weight.shape)}")

    def _check_fit(self, blocks: Blocks, features: Tensor, last: Tensor | None) -> None:
        c, rows = self.config, (len(blocks.doc_ids), blocks.seq_len)
        fits = [
            ("block_size of blocks", blocks.block_size, c.block_size),
            ("layout of blocks", blocks.layout, c.layout),
            ("mask_token_id of blocks", blocks.mask_token_id, c.mask_token_id),
            ("shape of target_hidden_states", tuple(features.shape), (*rows, c.context_size)),
            ("device of target_hidden_states", features.device, self.device),
        ]
        if last is not None:
            shape = "shape of target_last_hidden_states"
            fits.append((shape, tuple(last.shape), (*rows, c.hidden_size)))
        for name, given, wanted in fits:
            if given != wanted:
                raise ValueError(f"{name} must be the drafter's, {wanted}, got {given}")


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves parameters unset: on the meta device ``normal_`` imports torch's compiler, for 1 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.nn.init.normal_, torch.Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def meta_drafter(config: DrafterConfig) -> Drafter:
    """A drafter on the meta device: names and shapes of its parameters, and no numbers."""
    with torch.device("meta"), _NoRandomNumbers():
        return Drafter(config)


@checked
@lru_cache(maxsize=1024)
def drafter_sizes(config: DrafterConfig) -> DrafterSizes:
    drafter = meta_drafter(config)
    head, confidence = drafter.markov_head, drafter.confidence_head
    return DrafterSizes(
        trained_parameters=sum(p.numel() for p in drafter.parameters() if p.requires_grad),
        latent_weights=0 if head is None else head.latent_weights,
        latent_kept=0 if head is None else head.latent_kept(config.predicted),
        confidence_width=0 if confidence is None else confidence.proj.in_features,
    )
