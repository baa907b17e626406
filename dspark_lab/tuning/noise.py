"""How gradients vary between conversations, and between anchors of one conversation.

The gradient of the block at anchor a of conversation r is that of the objective over this block
alone, divided by the block's own weights, and is modelled as

    g_ra = G + u_r + e_ra

with u_r and e_ra of mean zero. ``signal`` is |G|^2, ``between`` tr Var(u), ``within`` tr Var(e).
Two blocks of a conversation whose anchors are d tokens apart share labels, and their e have the
covariance within * rho(d), with the share that would be if a label's gradient were the same in any
block, times a number ``shared`` that is measured:

    rho(d) = shared * sum_k w_k w_(k+d) / sum_k w_k^2,    w_k = exp(-k / gamma), 0 from the block's
                                                          end on.

A step of so many rows, each with N anchors, has a gradient whose variance is

    between / rows + within / (rows * N_eff),    N_eff = N / (1 + (N - 1) * rho_mean).

1 + (N - 1) * rho_mean is the design effect (Kish, Survey Sampling, 1965, section 5.4); rho_mean is
the mean of rho over all pairs of different candidates of a row, since anchors are drawn without
replacement and all pairs are equally likely. Divided by |G|^2 it is the noise of a step: 1 where
the batch is as large as the noise scale (McCandlish et al. 2018, arXiv 1812.06162, equation 2.8).

Squares are sum_i x_i^2 / sqrt(v_i), with v_i the mean square of parameter i's gradient: along a
step of Adam, which divides by sqrt(v_i), the loss falls by so much at first, and the curvature that
ends the fall is taken to be that same sqrt(v_i). Plain squares would be those of the few parameters
with the largest gradients. What the confidence head alone owns is left out: no draft depends on it.

A block that the end of its answer cuts short counts as much as any other here, and less in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dspark_lab.blocks import cut_blocks
from dspark_lab.chats import Chat, Encoded, collate
from dspark_lab.checks import Count, NotEmpty, Size, checked
from dspark_lab.common import build_anchor_candidate_mask
from dspark_lab.model import (
    DecayGamma,
    Drafter,
    FeatureSource,
    Slots,
    Target,
    at_least_fp32,
    decay_weights,
    live_features,
    slot_weights,
)
from dspark_lab.rates import resampled
from dspark_lab.training import Forward, TrainConfig, encode_chats

# Numbers that stand for a gradient: random signs, summed over equally many parameters. Products of
# two are those of the gradients, but for a relative error of sqrt(2 / SKETCH), 1.6 %. A prime: no
# two parameters of a sum have the same place in a row of a weight.
SKETCH = 8191
# Gradients whose mean squares are v, each of the anchors of one more conversation.
SCALES = 16
# Candidates in a row of which a group of neighbours is made.
NEIGHBOURS = 4


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over each conversation's products of gradients, from which estimates follow.

    ``cross`` are products of the conversations' mean gradients, of which those of two different
    ones estimate |G|^2. A product of two of one conversation's groups of blocks has the expectation
    ``(|G|^2 + between) + within * same + within * shared * overlap``: ``same`` is the share of
    their pairs that are one block, ``overlap`` the mean of rho / shared over all others.
    ``design`` and ``products`` are the sums of its weighted least squares.
    """

    cross: Float[np.ndarray, "conversation conversation"]
    design: Float[np.ndarray, "conversation term term"]
    products: Float[np.ndarray, "conversation term"]
    overlap: Float[np.ndarray, " distance"]

    @property
    def conversations(self) -> int:
        return len(self.cross)

    def estimates(
        self, times: Float[np.ndarray, "resample conversation"] | None = None
    ) -> Float[np.ndarray, "resample moment"]:
        """Unbiased ``signal``, ``between``, ``within``, and ``within * shared``.

        Each may be below 0. ``times`` says how often each conversation is counted, once where None;
        a conversation is never multiplied with itself.
        """
        if times is None:
            times = np.ones((1, self.conversations))
        signal = _mean_of_pairs(self.cross, times)
        design = np.tensordot(times, self.design, axes=1)
        # Groups that share no label, or slots that cannot, leave ``shared`` at 0.
        solved = np.linalg.pinv(design, hermitian=True) @ (times @ self.products)[..., None]
        total, within, shared = solved[..., 0].T
        return np.stack([signal, total - signal, within, shared], axis=1)


def _mean_of_pairs(
    cross: Float[np.ndarray, "conversation conversation"],
    times: Float[np.ndarray, "resample conversation"],
) -> Float[np.ndarray, " resample"]:
    """The mean product of two different conversations, each counted so many times."""
    products = ((times @ cross) * times).sum(axis=1) - times**2 @ np.diag(cross)
    return products / (times.sum(axis=1) ** 2 - (times**2).sum(axis=1))


@dataclass(frozen=True, eq=False)
class GradientNoise:
    """What :func:`measure_noise` found.

    ``wholes`` has the moments of the objective of a block of so many slots, ``slots`` those of each
    slot's own where they were asked for.
    """

    wholes: Mapping[int, Moments]
    slots: Mapping[int, Moments]

    @property
    def block_sizes(self) -> list[int]:
        return sorted(self.wholes)

    def table(self, resamples: Count = 1000, seed: Size = 0) -> pd.DataFrame:
        """One line for each objective: moments and noise scales, with 95 % intervals.

        ``rows_scale`` is between / |G|^2: with so many rows of endlessly many anchors a step's
        noise would be 1; ``anchors_scale`` is within / |G|^2: so many blocks, each of its own
        conversation and beside those rows. Where |G|^2 is not told from 0 the upper ends are
        infinite; ``shared`` NaN: no label can be shared. ``signal_error`` is relative, the
        standard error of |G|^2.
        """
        kinds = [("block", self.wholes), ("slot", self.slots)]
        lines = []
        for kind, number, moments in ((k, n, m) for k, of in kinds for n, m in of.items()):
            drawn = resampled(moments.conversations, resamples, seed).astype(float)
            found = np.concatenate([moments.estimates(), moments.estimates(drawn)])
            signal, between, within, shared = found.T
            known = signal > 0
            scales = [
                np.where(known, x / np.where(known, signal, 1), np.inf).clip(0)
                for x in (between, within)
            ]
            line = {"objective": kind, "number": number, "conversations": moments.conversations}
            line |= {"signal": signal[0], "between": between[0], "within": within[0]}
            line |= {"shared": shared[0] / within[0] if moments.overlap.any() else np.nan}
            line |= {"signal_error": signal[1:].std() / abs(signal[0])}
            for name, scale in zip(("rows_scale", "anchors_scale"), scales, strict=True):
                low, high = np.quantile(scale[1:], [0.025, 0.975], method="nearest")
                line |= {name: scale[0], f"{name}_low": low, f"{name}_high": high}
            lines.append(line)
        return pd.DataFrame(lines)


@checked
def noise_table(noises: Mapping[int, GradientNoise]) -> pd.DataFrame:
    """:meth:`GradientNoise.table` of several, by the steps after which they were measured."""
    tables = [noise.table().assign(step=step) for step, noise in sorted(noises.items())]
    if not tables:
        raise ValueError("noises must hold a measurement, got none")
    table = pd.concat(tables, ignore_index=True)
    return table[["step", *table.columns.drop("step")]]


@checked
def label_overlap(block_size: Count, gamma: DecayGamma = 4.0) -> Float[np.ndarray, " distance"]:
    """rho / shared of two blocks 1, 2, ... tokens apart, as far as they share a label."""
    weights = decay_weights(block_size, gamma).numpy()
    return np.correlate(weights, weights, "full")[block_size:] / (weights**2).sum()


@checked
def gradient_moments(
    gradients: Float[np.ndarray, "group dim"],
    conversation: Int[np.ndarray, " group"],
    anchors: Sequence[Int[np.ndarray, " _anchor"]],
    overlap: Float[np.ndarray, " distance"],
) -> Moments:
    """The moments from gradients, each the mean over a group of blocks of one conversation.

    Args:
        gradients: in any coordinates in which squares are plain ones.
        conversation: of each group; two of them at least, and one with two groups.
        anchors: the tokens that the blocks of each group stand at, all different.
        overlap: as :func:`label_overlap` gives it; 0 beyond its end.
    """
    found = np.unique(conversation)
    if len(found) < 2:
        raise ValueError(f"conversation must name 2 conversations or more, got {len(found)}")
    if len(anchors) != len(gradients) or not all(len(np.unique(a)) == len(a) > 0 for a in anchors):
        wanted = f"different tokens, one or more, of each of the {len(gradients)} groups"
        raise ValueError(f"anchors must be {wanted}, got {len(anchors)} groups")
    counts = np.array([len(a) for a in anchors])
    means, designs, products = [], [], []
    for one in found:
        groups = np.flatnonzero(conversation == one).tolist()
        own = gradients[groups].astype(np.float64)
        means.append(counts[groups] @ own / counts[groups].sum())
        design, product = np.zeros((3, 3)), np.zeros(3)
        for i, first in enumerate(groups):
            for j, second in enumerate(groups[: i + 1]):
                terms = np.array([1.0, *_shares(anchors[first], anchors[second], overlap)])
                # About the inverse of a product's variance where blocks differ much.
                weight = counts[first] * counts[second]
                design += weight * np.outer(terms, terms)
                product += weight * (own[i] @ own[j]) * terms
        designs.append(design)
        products.append(product)
    mean = np.stack(means)
    return Moments(mean @ mean.T, np.stack(designs), np.stack(products), overlap)


def _shares(
    first: Int[np.ndarray, " anchor"],
    second: Int[np.ndarray, " other"],
    overlap: Float[np.ndarray, " distance"],
) -> tuple[float, float]:
    """``same`` and ``overlap`` of two groups, see :class:`Moments`."""
    apart = np.abs(first[:, None] - second)
    by_distance = np.concatenate([[0.0], overlap, [0.0]])
    return float((apart == 0).mean()), float(by_distance[apart.clip(max=len(overlap) + 1)].mean())


@checked
def measure_noise(
    drafter: Drafter,
    target: Target,
    chats: Sequence[Chat | Encoded],
    config: TrainConfig,
    *,
    conversations: Count = 64,
    anchors: Count = 8,
    block_sizes: Annotated[Sequence[Count], NotEmpty()] | None = None,
    by_slot: bool = False,
    features: FeatureSource | None = None,
    seed: Size = 0,
) -> GradientNoise:
    """Measures the noise of ``drafter``'s gradients as it is now, which trains nothing.

    Noise grows as a drafter learns. To choose settings for a run by one measurement, make it in the
    run's first tenth; by several, give them all to :func:`~dspark_lab.tuning.progress_table`.

    Args:
        drafter: at its start, or after a warm-up; its embedding and LM head become the target's.
        chats: to draw from; encoded already, or with the target's tokenizer here.
        config: of the training run: objective, precision, and the length conversations are cut to.
        conversations: so many are drawn, each a row of its own; all of them where there are fewer.
        anchors: blocks of each of two groups of theirs: one of neighbours, from which ``shared``
            follows, and one of any others; fewer of a short answer.
        block_sizes: of whose objectives the moments are asked for, none above the drafter's slots
            that predict (which are meant where None). A shorter block's gradient is that of the
            first slots of the drafter's block. Each takes two backward passes a conversation.
        by_slot: the moments of each slot's own objective, too: as much for every slot.
        features: of the target; asked for each conversation where None. A source that reads them
            from disk must be of these ``chats`` (:func:`dspark_lab.model.cached_features`).
        seed: of the conversations and anchors.
    """
    slots = drafter.config.predicted
    sizes = sorted(set(block_sizes or [slots]))
    if sizes[-1] > slots:
        wanted = f"at most the drafter's slots that predict, {slots}"
        raise ValueError(f"block_sizes must be {wanted}, got {sizes[-1]}")
    encoded = encode_chats(chats, target.tokenizer, config.max_length)
    drafter.to(target.device, at_least_fp32(drafter.dtype))
    drafter.use_target_embeddings(target.embed_weight, target.head_weight, target.logit_rule)
    if features is None:
        features = live_features(target, drafter.config.target_layer_ids)
    drawn = _drawn(encoded, anchors, conversations + SCALES, seed)
    if len(drawn) < 4:
        wanted = "4 conversations or more with two candidates for anchors"
        raise ValueError(f"chats must hold {wanted}, got {len(drawn)} of {len(encoded)}")
    scales = min(SCALES, len(drawn) // 4)
    rows = _Rows(drafter, Forward(drafter, config, encoded), features, encoded)
    sketch = rows.sketch(drawn[:scales], seed)

    edges = [0, *(range(1, slots + 1) if by_slot else sizes)]
    groups = []
    for index, of_row in drawn[scales : scales + conversations]:
        place = np.sort(np.concatenate(of_row))
        read = rows.read(index, place)
        for chosen in of_row:
            members = np.isin(place, chosen)
            inside = read.eval_mask & torch.from_numpy(members).to(drafter.device)[:, None]
            found = [rows.gradient(read, _between(inside, *ends)) for ends in pairwise(edges)]
            sums = torch.stack([sketch(gradient) for gradient, _ in found]).cpu().numpy()
            weights = np.array([weight for _, weight in found])
            labelled = inside[0, torch.from_numpy(members)].cpu().numpy()
            groups.append(_Group(index, place[members], labelled, sums, weights))

    gamma = config.loss_decay_gamma
    wholes = {
        size: _moments_of([g.whole(edges.index(size)) for g in groups], label_overlap(size, gamma))
        for size in sizes
    }
    own = range(slots) if by_slot else ()
    none = label_overlap(1)
    alone = {slot: [g.slot(slot) for g in groups if g.weights[slot]] for slot in own}
    return GradientNoise(wholes, {k: _moments_of(of, none) for k, of in alone.items() if of})


@dataclass(frozen=True, eq=False)
class _Group:
    """Blocks of one conversation, and the sketched sums of their gradients, part by part."""

    conversation: int
    anchors: Int[np.ndarray, " anchor"]
    labelled: Bool[np.ndarray, "anchor slot"]
    sums: Float[np.ndarray, "part dim"]
    weights: Float[np.ndarray, " part"]

    def whole(self, parts: int) -> _Gradient:
        """The mean gradient of the objective over the first so many parts of the blocks."""
        mean = self.sums[:parts].sum(axis=0) / self.weights[:parts].sum()
        return mean, self.conversation, self.anchors

    def slot(self, slot: int) -> _Gradient:
        """The same of one slot, over the blocks that have it."""
        mean = self.sums[slot] / self.weights[slot]
        return mean, self.conversation, self.anchors[self.labelled[:, slot]]


# A group's mean gradient, its conversation, and where its blocks stand.
_Gradient = tuple[Float[np.ndarray, " dim"], int, Int[np.ndarray, " anchor"]]


def _moments_of(groups: Sequence[_Gradient], overlap: Float[np.ndarray, " distance"]) -> Moments:
    gradients, conversation, anchors = zip(*groups, strict=True)
    return gradient_moments(np.stack(gradients), np.array(conversation), anchors, overlap)


def _drawn(
    encoded: Sequence[Encoded], anchors: int, conversations: int, seed: int
) -> list[tuple[int, list[Int[np.ndarray, " anchor"]]]]:
    """Conversations in random order, each with a group of neighbours and one of any candidates."""
    rng, drawn = np.random.default_rng(seed), []
    for index in rng.permutation(len(encoded)).tolist():
        mask = encoded[index].loss_mask[None]
        candidates = build_anchor_candidate_mask(mask.shape[1], mask)[0].nonzero().flatten().numpy()
        if len(candidates) < 2:
            continue
        # Runs from a random place on, so that all candidates are equally likely.
        first = int(rng.integers(NEIGHBOURS))
        runs = np.split(candidates, range(first, len(candidates), NEIGHBOURS))
        order = np.concatenate([runs[number] for number in rng.permutation(len(runs))])
        count = min(anchors, len(order) // 2)
        drawn.append((index, [order[:count], rng.permutation(order[count:])[:count]]))
        if len(drawn) == conversations:
            break
    return drawn


@dataclass(frozen=True, eq=False)
class _Rows:
    """Gradients on rows of one conversation, in the parameters that drafts depend on."""

    drafter: Drafter
    forward: Forward
    features: FeatureSource
    encoded: Sequence[Encoded]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        named = self.drafter.named_parameters()
        return [p for name, p in named if p.requires_grad and "confidence_head" not in name]

    def read(self, index: int, anchors: Int[np.ndarray, " anchor"]) -> Slots:
        """The slots of the blocks at these anchors of a conversation."""
        batch = collate([self.encoded[index]], 0)
        batch.chat_index.fill_(index)
        batch, own = batch.to(self.drafter.device), self.drafter.config
        place = torch.from_numpy(anchors).to(self.drafter.device)[None]
        marks: dict[str, Any] = {"mask_token_id": own.mask_token_id, "layout": own.layout}
        blocks = cut_blocks(batch, place, torch.ones_like(place).bool(), own.block_size, **marks)
        given = self.features(batch)
        return self.forward.read(blocks, given.context, given.last)

    def gradient(
        self, slots: Slots, chosen: Bool[Tensor, "1 anchor slot"]
    ) -> tuple[Float[Tensor, " parameter"], float]:
        """The gradient of the weighted sum over these slots, and their summed weight."""
        config = self.forward.config
        weights = slot_weights(chosen, config.loss_decay_gamma, at_least_fp32(slots.hidden.dtype))
        one = torch.ones_like(weights.sum())
        loss = self.forward.objective(replace(slots, eval_mask=chosen), one, config.steps).loss
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(loss, self.parameters, retain_graph=True, **options)
        return torch.cat([part.flatten() for part in found]), float(weights.sum())

    def sketch(
        self, drawn: Sequence[tuple[int, Sequence[Int[np.ndarray, " anchor"]]]], seed: int
    ) -> Callable[[Float[Tensor, " parameter"]], Float[Tensor, " dim"]]:
        """Maps gradients to few numbers, in the coordinates in which squares are plain ones.

        The mean squares v are those of the gradients of the rows ``drawn``.
        """
        sizes = [parameter.numel() for parameter in self.parameters]
        squares = torch.zeros(sum(sizes), device=self.drafter.device, dtype=self.drafter.dtype)
        for index, groups in drawn:
            slots = self.read(index, np.sort(np.concatenate(groups)))
            gradient, weight = self.gradient(slots, slots.eval_mask)
            squares += (gradient / weight) ** 2
        for part in squares.split(sizes):
            # As if each had had the mean of its tensor once: some are of tokens that no row holds.
            part.add_(part.mean() / len(drawn)).div_(len(drawn) + 1)
        generator = torch.Generator().manual_seed(seed)
        signs = 2 * torch.randint(0, 2, squares.shape, generator=generator).to(squares) - 1
        scale = signs * _unit(squares)
        if len(scale) <= SKETCH:
            return lambda gradient: gradient * scale

        def sketched(gradient: Tensor) -> Tensor:
            padded = F.pad(gradient * scale, (0, -len(scale) % SKETCH))
            return padded.view(-1, SKETCH).sum(dim=0)

        return sketched


def _unit(squares: Float[Tensor, " parameter"]) -> Float[Tensor, " parameter"]:
    """What a gradient is multiplied by, so that its squares are those of Adam's metric."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny) ** -0.25


def _between(
    supervised: Bool[Tensor, "1 anchor slot"], first: int, past: int
) -> Bool[Tensor, "1 anchor slot"]:
    """Of these slots, those of a block's part."""
    slot = torch.arange(supervised.shape[-1], device=supervised.device)
    return supervised & (slot >= first) & (slot < past)
