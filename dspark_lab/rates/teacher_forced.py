"""Teacher-forced accept rates: of held-out conversations, and of answers that were decoded.

Tau is here 1 + the expected number of a block's slots that survive verification at temperature 1,
from the analytic accept rates, averaged over blocks. Intervals are over conversations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dspark_lab.blocks import cut_blocks
from dspark_lab.chats import Batch, Encoded, collate
from dspark_lab.checks import Count, Size, checked, require_columns
from dspark_lab.common import build_anchor_candidate_mask
from dspark_lab.decoding import Decoded, Prompt, encode_prompt, slot_before
from dspark_lab.model import (
    Drafter,
    Features,
    FeatureSource,
    Target,
    live_features,
)
from dspark_lab.rates.acceptance import sums_by_conversation
from dspark_lab.rates.intervals import bootstrap, ratio_interval, resampled
from dspark_lab.rates.survival import prefix_survival


@checked
def evaluate(
    drafter: Drafter,
    target: Target,
    encoded: Sequence[Encoded],
    *,
    num_anchors: Count | None = None,
    slots: Count | None = None,
    seed: Size = 0,
    features: FeatureSource | None = None,
) -> pd.DataFrame:
    """Return tau and accept rates of each conversation in which a whole block fits into an answer.

    Blocks that an answer's end cuts are left out: their expected length says less of the drafter
    than of where the answer ends. ``num_anchors`` draws at most so many blocks of a conversation,
    from ``seed`` and its place alone: drafters of one block size meet the same blocks, and so do
    those of several where ``slots`` says how many must fit behind an anchor. A row has the means of
    a conversation's ``blocks``: ``tau``, and for each slot k the accept rate ``accept_k`` and
    ``survival_k``, the product of the rates up to it.
    """
    own = drafter.config.predicted
    if slots is not None and slots < own:
        raise ValueError(f"slots must be at least those of the drafter's block, {own}, got {slots}")
    rows = []
    found = _whole_blocks(drafter, target, encoded, num_anchors, seed, features, slots)
    for index, domain, rates in found:
        survival = prefix_survival(rates.accept).mean(axis=0)
        row: dict[str, Any] = {"conversation": encoded[index].id, "domain": domain}
        row |= {"blocks": len(rates.accept), "tau": 1 + survival.sum()}
        row |= {f"accept_{k}": rate for k, rate in enumerate(rates.accept.mean(axis=0))}
        rows.append(row | {f"survival_{k}": rate for k, rate in enumerate(survival)})
    return pd.DataFrame(rows)


@checked
def teacher_forced_sums(
    drafter: Drafter,
    target: Target,
    encoded: Sequence[Encoded],
    *,
    num_anchors: Count | None = None,
    seed: Size = 0,
    features: FeatureSource | None = None,
) -> pd.DataFrame:
    """Return the sums of the blocks of :func:`evaluate` for :func:`rate_table`, with predictions.

    Here each block weighs alike, not each conversation. A conversation is its place in ``encoded``.
    """
    return block_sums(_whole_blocks(drafter, target, encoded, num_anchors, seed, features))


@checked
def teacher_forced_answers(
    drafter: Drafter, target: Target, decoded: Decoded, prompts: Sequence[Prompt]
) -> pd.DataFrame:
    """Return the sums of texts that were decoded at temperature 1, by ``anchors``.

    A teacher-forced rate lets a block begin at *every token* alike. When decoding, a round begins
    where the one before ended, most often at a token that was hard to guess, and hard tokens come
    together. At slot 0 the rate *where rounds began* is the rate on policy; the further slots
    differ, because there the text and the draft may have parted. A conversation is a prompt.
    """
    first = decoded.trace[decoded.trace["slot"] == 0]
    vocabulary = drafter.vocabulary_of(target.head_weight, target.logit_rule)
    ways: dict[str, list] = {"every token": [], "where rounds began": []}
    for index, part in first.groupby("prompt"):
        ids, answer = encode_prompt(target, prompts[index]), decoded.tokens[index]
        rows = torch.tensor([ids + answer], device=target.device)
        batch = Batch.of_tokens(
            rows, torch.arange(rows.shape[1], device=rows.device)[None] >= len(ids)
        )
        features = target.features(rows, drafter.config.target_layer_ids)
        starts = (range(len(answer) - 1), part["position"] - 1)
        for blocks, start in zip(ways.values(), starts, strict=True):
            anchors = torch.tensor(list(start), device=target.device) + len(ids)
            rates = _block_rates(drafter, batch, features, anchors, vocabulary)
            blocks.append((index, part["domain"].iloc[0], rates))
    tables = [block_sums(blocks).assign(anchors=name) for name, blocks in ways.items()]
    return pd.concat(tables, ignore_index=True)


@checked
def compare_drafters(
    ours: pd.DataFrame,
    baseline: pd.DataFrame,
    *,
    by: str = "tau",
    resamples: Count = 10_000,
    seed: Size = 0,
) -> pd.Series:
    """Return by how many percent the mean of ``by`` exceeds the baseline's, with a 95 % interval.

    Both tables come from :func:`evaluate` on the same conversations, which are resampled together.
    """
    for name, table in {"ours": ours, "baseline": baseline}.items():
        require_columns(name, table, ["conversation", by])
    if ours["conversation"].tolist() != baseline["conversation"].tolist():
        raise ValueError("both tables must be of the same conversations, in the same order")
    own, theirs = ours[by].to_numpy(), baseline[by].to_numpy()
    drawn = resampled(len(own), resamples, seed, one_by_one=True)
    low, high = 100 * (ratio_interval(own, theirs, drawn) - 1)
    gain = 100 * (own.mean() / theirs.mean() - 1)
    figures = {"ours": own.mean(), "baseline": theirs.mean(), "gain_percent": gain}
    return pd.Series({**figures, "low": low, "high": high})


@checked
def slot_table(
    evaluations: Mapping[str, pd.DataFrame], *, resamples: Count = 2000, seed: Size = 0
) -> pd.DataFrame:
    """Return the acceptance along the block: a row for each ``drafter`` and ``slot``.

    ``accept``: the mean accept rate, whether the slot is reached or not. ``conditional``: the
    chance that it survives given that all before it did, ``low`` to ``high`` its 95 % interval.
    """
    tables = []
    for drafter, table in evaluations.items():
        slots = range(max(1, sum(name.startswith("accept_") for name in table.columns)))
        columns = [f"{rate}_{k}" for rate in ("accept", "survival") for k in slots]
        require_columns(f"evaluations[{drafter!r}]", table, columns)
        survival = table[[f"survival_{k}" for k in slots]].to_numpy()
        reach = slot_before(survival)
        drawn = resampled(len(table), resamples, seed, one_by_one=True)
        own = pd.DataFrame({"drafter": drafter, "slot": slots})
        own["accept"] = [table[f"accept_{k}"].mean() for k in slots]
        own["survival"] = survival.mean(axis=0)
        own["conditional"] = survival.mean(axis=0) / reach.mean(axis=0)
        own["low"], own["high"] = ratio_interval(survival.T, reach.T, drawn)
        tables.append(own)
    return pd.concat(tables, ignore_index=True)


@checked
def drafter_table(
    evaluations: Mapping[str, pd.DataFrame], *, resamples: Count = 10_000, seed: Size = 0
) -> pd.DataFrame:
    """Return tau of each drafter, over all and by domain, and its 95 % interval by conversation."""
    rows = []
    for drafter, table in evaluations.items():
        require_columns(f"evaluations[{drafter!r}]", table, ["domain", "tau", "blocks"])
        for domain, part in [("all", table), *table.groupby("domain", sort=False)]:
            figures = bootstrap(part["tau"], resamples=resamples, seed=seed)
            rows.append([drafter, domain, len(part), int(part["blocks"].sum()), *figures])
    columns = ["drafter", "domain", "conversations", "blocks", "tau", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


@checked
def whole_block_anchors(batch: Batch, slots: Count) -> Int[Tensor, " anchor"]:
    """Return the candidates of one document whose block is supervised to its last slot.

    ``slots`` are those of a block that predict.
    """
    seq_len = batch.input_ids.shape[1]
    candidates = build_anchor_candidate_mask(seq_len, batch.loss_mask)[0].nonzero()[:, 0]
    if len(candidates) == 0:
        return candidates
    keep = torch.ones(1, len(candidates), dtype=torch.bool)
    blocks = cut_blocks(batch, candidates.unsqueeze(0), keep, slots)
    return candidates[blocks.eval_mask[0].all(dim=-1)]


@dataclass(frozen=True, eq=False)
class BlockRates:
    """Accept rates c* and confidences (NaN without a head) of one document's blocks."""

    accept: Float[np.ndarray, "block slot"]
    confidence: Float[np.ndarray, "block slot"]
    supervised: Bool[np.ndarray, "block slot"]


@torch.no_grad()
def _block_rates(
    drafter: Drafter,
    batch: Batch,
    features: Features,
    anchors: Int[Tensor, " anchor"],
    vocabulary: dict[str, Any],
) -> BlockRates:
    c, keep = drafter.config, torch.ones_like(anchors[None], dtype=torch.bool)
    marks: dict[str, Any] = {"mask_token_id": c.mask_token_id, "layout": c.layout}
    blocks = cut_blocks(batch, anchors[None], keep, c.block_size, **marks)
    slots = drafter.slots(blocks, features.context, features.last)
    accept = drafter.objective(slots, vocabulary=vocabulary).accept
    confidence = torch.full_like(accept, torch.nan)
    if slots.confidence_pred is not None:
        confidence = slots.confidence_pred.double().sigmoid()
    columns = accept.double(), confidence.double(), slots.eval_mask
    return BlockRates(*(column[0].cpu().numpy() for column in columns))


def _whole_blocks(
    drafter: Drafter,
    target: Target,
    encoded: Sequence[Encoded],
    num_anchors: int | None,
    seed: int,
    features: FeatureSource | None,
    slots: int | None = None,
) -> Iterator[tuple[int, str, BlockRates]]:
    """Number, domain and block rates of each conversation that holds a whole block."""
    source = features or live_features(target, drafter.config.target_layer_ids)
    vocabulary = drafter.vocabulary_of(target.head_weight, target.logit_rule)
    size, found = slots or drafter.config.predicted, False
    for index, item in enumerate(encoded):
        batch = collate([item], pad_token_id=0)
        anchors = whole_block_anchors(batch, size)
        if num_anchors is not None and len(anchors) > num_anchors:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            drawn = torch.randperm(len(anchors), generator=generator)[:num_anchors]
            anchors = anchors[drawn.sort().values]
        if len(anchors) == 0:
            continue
        found = True
        batch.chat_index.fill_(index)
        batch = batch.to(target.device)
        places = anchors.to(target.device)
        rates = _block_rates(drafter, batch, source(batch), places, vocabulary)
        yield index, item.domain or "none", rates
    if not found:
        raise ValueError(f"no conversation holds a block: {size + 1} supervised tokens in a row")


@checked
def block_sums(found: Iterable[tuple[Any, str, BlockRates]]) -> pd.DataFrame:
    """Return the sums of conversations, each a label, a domain and its blocks' rates.

    ``reached`` is an expected number. A slot that is not supervised counts as not verified.
    """
    labels, domains, rates = zip(*found, strict=True)
    counts = [len(one.accept) for one in rates]
    accept, confidence, supervised = (
        np.concatenate([getattr(one, name) for one in rates])
        for name in ("accept", "confidence", "supervised")
    )
    survival = prefix_survival(np.where(supervised, accept, 0))
    reached = np.where(supervised, slot_before(survival), 0)
    predicted = prefix_survival(np.where(supervised, confidence, 0))
    kinds = {
        "teacher-forced": (survival, survival),
        "predicted, teacher-forced": (np.where(supervised, reached * confidence, 0), predicted),
    }
    conversation, domain = np.repeat(labels, counts), np.repeat(domains, counts)
    return sums_by_conversation(conversation, domain, reached, kinds)
