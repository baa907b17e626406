"""How good a drafter is on conversations it has not seen, and how sure that is.

The measure is tau, teacher-forced at temperature 1: 1 + the expected number of a block's slots that
survive verification, from the analytic accept rates, averaged over the blocks of a conversation.
Intervals are bootstrapped over conversations: the blocks of one conversation resemble each other,
so slots are no independent sample.

This file knows tables of conversations; it does not know how the drafter was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from dspark_lab.blocks import cut_blocks
from dspark_lab.chats import Batch, Encoded, collate
from dspark_lab.checks import require_int
from dspark_lab.common import build_anchor_candidate_mask
from dspark_lab.decoding import Decoded, Prompt, encode_prompt
from dspark_lab.model import (
    Drafter,
    FeatureSource,
    Target,
    dspark_objective,
    live_features,
    survival,
)
from dspark_lab.rates.acceptance import teacher_forced_sums
from dspark_lab.rates.intervals import ratio_interval, resampled

__all__ = [
    "bootstrap",
    "compare_drafters",
    "drafter_table",
    "evaluate",
    "slot_table",
    "teacher_forced",
    "teacher_forced_answers",
    "whole_block_anchors",
]


@torch.no_grad()
def evaluate(
    drafter: Drafter,
    target: Target,
    encoded: Sequence[Encoded],
    *,
    num_anchors: int | None = None,
    seed: int = 0,
    features: FeatureSource | None = None,
) -> pd.DataFrame:
    """One row for each conversation in which a whole block fits into an answer.

    Blocks that an answer's end cuts are left out: their expected length says less of the drafter
    than of where the answer ends. The anchors follow from ``seed`` and the conversation alone, not
    from the drafter, so drafters of one block size meet the same blocks.

    Args:
        drafter: in eval or training mode, which makes no difference.
        target: whose distributions are the teacher's.
        encoded: conversations.
        num_anchors: at most so many blocks a conversation, drawn at random; all where None.
        seed: of that draw.
        features: where the target's features come from; computed where None.

    Returns:
        a table with ``conversation``, ``domain``, ``blocks``, ``tau`` (mean of the blocks), and for
        each slot k ``accept_k`` (mean accept rate) and ``survival_k`` (mean of their product up to
        it).

    Raises:
        TypeError, ValueError: ``num_anchors`` is not an int of at least 1, or no conversation holds
            a whole block.
    """
    rows = []
    for index, blocks in _whole_blocks(drafter, target, encoded, num_anchors, seed, features):
        slots, chat = drafter.slots(**blocks), encoded[index].chat
        accept = dspark_objective(slots, drafter.lm_head.weight, drafter.markov_w2_weight).accept[0]
        lived = survival(accept, torch.ones_like(accept, dtype=torch.bool))
        rows.append(
            {
                "conversation": chat.id,
                "domain": chat.domain or "none",
                "blocks": len(accept),
                "tau": 1 + lived.sum(dim=-1).mean().item(),
                **{f"accept_{k}": rate for k, rate in enumerate(accept.mean(dim=0).tolist())},
                **{f"survival_{k}": rate for k, rate in enumerate(lived.mean(dim=0).tolist())},
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def teacher_forced(
    drafter: Drafter,
    target: Target,
    encoded: Sequence[Encoded],
    *,
    num_anchors: int | None = None,
    seed: int = 0,
    features: FeatureSource | None = None,
) -> pd.DataFrame:
    """The sums of the same blocks for :func:`dspark_lab.rates.acceptance.rate_table`, confidence too.

    Where :func:`evaluate` averages over the blocks of a conversation first, these sums weigh each
    block alike.

    Args:
        drafter, target, encoded, num_anchors, seed, features: see :func:`evaluate`.

    Returns:
        as :func:`dspark_lab.rates.acceptance.teacher_forced_sums`, a conversation's label its place in
        ``encoded``.

    Raises:
        TypeError, ValueError: see :func:`evaluate`.
    """
    tables = []
    for index, blocks in _whole_blocks(drafter, target, encoded, num_anchors, seed, features):
        domain = encoded[index].chat.domain or "none"
        tables.append(teacher_forced_sums(drafter(**blocks), [index], [domain]))
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def teacher_forced_answers(
    drafter: Drafter, target: Target, decoded: Decoded, prompts: Sequence[Prompt]
) -> pd.DataFrame:
    """The sums of texts that were decoded: from every token of an answer, and from real rounds.

    A teacher-forced rate lets a block begin at every token alike. When decoding, a round begins
    where the one before ended, most often at a token that was hard to guess, and hard tokens come
    together: easy stretches are crossed in few rounds, hard ones in many. At slot 0 the rate where
    rounds began is the rate on policy; the further slots differ, because there the text and the
    draft may have parted.

    Args:
        drafter, target, prompts: that the answers were decoded with, at temperature 1.
        decoded: from :func:`dspark_lab.decoding.loop.decode`.

    Returns:
        as :func:`dspark_lab.rates.acceptance.teacher_forced_sums`, with one more column, ``anchors``:
        ``"every token"`` or ``"where rounds began"``. A conversation's label is its prompt.
    """
    first = decoded.trace[decoded.trace["slot"] == 0]
    tables = []
    for index, part in first.groupby("prompt"):
        ids = encode_prompt(target, prompts[index])
        answer = decoded.tokens[index]
        rows = torch.tensor([ids + answer], device=target.device)
        loss_mask = torch.zeros_like(rows, dtype=torch.bool)
        loss_mask[:, len(ids) :] = True
        features = target.features(rows, drafter.config.target_layer_ids)
        places = {
            "every token": range(len(answer) - 1),
            "where rounds began": part["position"] - 1,
        }
        for name, anchors in places.items():
            positions = torch.tensor([list(anchors)], device=target.device) + len(ids)
            output = drafter(
                rows,
                features.context,
                loss_mask,
                features.last,
                anchor_positions=positions,
                block_keep_mask=torch.ones_like(positions, dtype=torch.bool),
            )
            sums = teacher_forced_sums(output, [index], [part["domain"].iloc[0]])
            tables.append(sums.assign(anchors=name))
    return pd.concat(tables, ignore_index=True)


def bootstrap(
    values: Sequence[float] | pd.Series | np.ndarray,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of the values, and its 95 % interval by resampling them (percentile bootstrap)."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) == 0:
        raise ValueError(f"values must be one or more numbers, got shape {sample.shape}")
    drawn = resampled(len(sample), resamples, seed, one_by_one=True)
    low, high = ratio_interval(sample, np.ones_like(sample), drawn)
    return float(sample.mean()), float(low), float(high)


def compare_drafters(
    ours: pd.DataFrame,
    baseline: pd.DataFrame,
    *,
    by: str = "tau",
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.Series:
    """How much larger the mean of ``by`` is than the baseline's, in percent, with a 95 % interval.

    Both tables must come from :func:`evaluate` on the same conversations, which are resampled
    together.

    Raises:
        ValueError: the tables are of different conversations.
    """
    if ours["conversation"].tolist() != baseline["conversation"].tolist():
        raise ValueError("both tables must be of the same conversations, in the same order")
    own, theirs = ours[by].to_numpy(), baseline[by].to_numpy()
    drawn = resampled(len(own), resamples, seed, one_by_one=True)
    low, high = 100 * (ratio_interval(own, theirs, drawn) - 1)
    return pd.Series(
        {
            "ours": own.mean(),
            "baseline": theirs.mean(),
            "gain_percent": 100 * (own.mean() / theirs.mean() - 1),
            "low": low,
            "high": high,
        }
    )


def slot_table(
    evaluations: Mapping[str, pd.DataFrame], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Acceptance along the block: one row for each drafter and slot, slots counted from 0.

    ``accept``: the mean accept rate of the slot, wherever it is reached or not. ``survival``: the
    chance that the slot and all before it survive. ``conditional``: the chance that it survives
    given that all before it did, which is survival divided by the survival of the slot before.
    ``low`` and ``high``: the 95 % interval of ``conditional`` over conversations.
    """
    rows = []
    for drafter, table in evaluations.items():
        slots = sum(name.startswith("accept_") for name in table.columns)
        lived = table[[f"survival_{k}" for k in range(slots)]].to_numpy()
        lived = np.concatenate([np.ones((len(lived), 1)), lived], axis=1)
        drawn = resampled(len(lived), resamples, seed, one_by_one=True)
        low, high = ratio_interval(lived[:, 1:].T, lived[:, :-1].T, drawn)
        mean = lived.mean(axis=0)
        for k in range(slots):
            rows.append(
                {
                    "drafter": drafter,
                    "slot": k,
                    "accept": table[f"accept_{k}"].mean(),
                    "survival": mean[k + 1],
                    "conditional": mean[k + 1] / mean[k],
                    "low": low[k],
                    "high": high[k],
                }
            )
    return pd.DataFrame(rows)


def drafter_table(
    evaluations: Mapping[str, pd.DataFrame], *, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Tau of each drafter with its 95 % interval over conversations, over all and by domain."""
    rows = []
    for drafter, table in evaluations.items():
        parts = {"all": table, **dict(tuple(table.groupby("domain", sort=False)))}
        for domain, part in parts.items():
            tau, low, high = bootstrap(part["tau"], resamples=resamples, seed=seed)
            rows.append(
                {
                    "drafter": drafter,
                    "domain": domain,
                    "conversations": len(part),
                    "blocks": int(part["blocks"].sum()),
                    "tau": tau,
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows)


def whole_block_anchors(batch: Batch, block_size: int) -> Int[Tensor, " anchor"]:
    """Of a batch of one document, the candidates whose block is supervised to its last slot."""
    seq_len = batch.input_ids.shape[1]
    candidates = build_anchor_candidate_mask(seq_len, batch.loss_mask)[0].nonzero()[:, 0]
    if len(candidates) == 0:
        return candidates
    keep = torch.ones(1, len(candidates), dtype=torch.bool)
    blocks = cut_blocks(batch, candidates.unsqueeze(0), keep, block_size)
    return candidates[blocks.eval_mask[0].all(dim=-1)]


def _whole_blocks(
    drafter: Drafter,
    target: Target,
    encoded: Sequence[Encoded],
    num_anchors: int | None,
    seed: int,
    features: FeatureSource | None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each conversation that holds any, and the arguments of a drafter's forward."""
    if num_anchors is not None:
        require_int("num_anchors", num_anchors, 1)
    source = features or live_features(target, drafter.config.target_layer_ids)
    found = False
    for index, item in enumerate(encoded):
        batch = collate([item], pad_token_id=0)
        anchors = whole_block_anchors(batch, drafter.config.block_size)
        if num_anchors is not None and len(anchors) > num_anchors:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            drawn = torch.randperm(len(anchors), generator=generator)[:num_anchors]
            anchors = anchors[drawn.sort().values]
        if len(anchors) == 0:
            continue
        found = True
        batch.chat_index.fill_(index)
        batch = batch.to(target.device)
        given = source(batch)
        keep = torch.ones(1, len(anchors), dtype=torch.bool, device=target.device)
        yield (
            index,
            {
                "input_ids": batch.input_ids,
                "target_hidden_states": given.context,
                "loss_mask": batch.loss_mask,
                "target_last_hidden_states": given.last,
                "anchor_positions": anchors.unsqueeze(0).to(target.device),
                "block_keep_mask": keep,
            },
        )
    if not found:
        raise ValueError(
            f"no conversation holds {drafter.config.block_size + 1} supervised tokens in a row, "
            "which a whole block needs"
        )
