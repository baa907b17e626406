"""How many anchors, which block size: what a choice covers, in closed form and by drawing.

A supervised token is *covered* when at least one drawn block has a supervised slot for it. With
``n = min(num_anchors, candidates)`` anchors drawn from a row's C candidates without replacement, a
token that c of them reach is missed with the hypergeometric probability

    P(missed) = C(C - c, n) / C(C, n)

and c follows from the row alone: supervision is a contiguous prefix, so the token at offset o of a
run of supervised tokens is reached from the ``min(o, block_size)`` candidates just before it. The
first token of a run has none: it is never a label.

This file knows batches and counts; it knows nothing about models, text or plots.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dspark_lab.blocks import draw_blocks, times_supervised
from dspark_lab.chats import Batch, Encoded, collate, pack
from dspark_lab.checks import require_int
from dspark_lab.common import build_anchor_candidate_mask

__all__ = [
    "anchors_needed",
    "coverage_table",
    "packing_table",
    "reaching_anchors",
    "token_coverage",
]


def reaching_anchors(batch: Batch, block_size: int) -> Int[Tensor, "batch seq"]:
    """From how many candidate anchors a block of ``block_size`` slots supervises each token.

    Raises:
        TypeError, ValueError: ``block_size`` is not an int of at least 1.
    """
    require_int("block_size", block_size, 1)
    seq_len = batch.input_ids.shape[1]
    candidates = build_anchor_candidate_mask(seq_len, batch.loss_mask, batch.doc_remaining)
    # A token goes on a run exactly where its predecessor is a candidate.
    goes_on = torch.nn.functional.pad(candidates, (1, 0))[:, :seq_len]
    position = torch.arange(seq_len, device=goes_on.device).expand_as(goes_on)
    run_start = torch.where(goes_on, 0, position).cummax(dim=1).values
    return (position - run_start).clamp(max=block_size)


def token_coverage(batch: Batch, num_anchors: int, block_size: int) -> Float[Tensor, "batch seq"]:
    """The probability that a token is covered by one draw of ``num_anchors`` anchors in its row.

    Returns:
        float64 in [0, 1]; 0 on tokens that are not supervised or never a label.

    Raises:
        TypeError, ValueError: ``num_anchors`` or ``block_size`` is not an int of at least 1.
    """
    reach = reaching_anchors(batch, block_size)
    covered = _covered_by_reach(_candidate_counts(batch), num_anchors, block_size)
    return covered.gather(1, reach)


def coverage_table(
    batch: Batch,
    num_anchors: Sequence[int] = (4, 8, 16, 32, 64, 128),
    block_sizes: Sequence[int] = (4, 7, 15),
    *,
    draws: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of supervised tokens that one pass over ``batch`` covers, for each choice.

    Returns:
        one line per block size and anchor count: ``block_size``, ``num_anchors``, ``blocks`` (kept
        blocks per row, mean), ``expected`` (closed form), ``sampled`` (mean over ``draws`` draws),
        and ``supervisions`` (expected number of supervised slots per supervised token).

    Raises:
        TypeError, ValueError: a count that is not an int of at least 1; no supervised token at all.
    """
    require_int("draws", draws, 1)
    seq_len = batch.input_ids.shape[1]
    lines = []
    for block_size in block_sizes:
        reach = _Reach.of(batch, block_size)
        for anchors in num_anchors:
            covered = sum(
                int((times_supervised(blocks, seq_len) > 0).sum())
                for blocks in (
                    draw_blocks(batch, anchors, block_size, seed=seed + draw)
                    for draw in range(draws)
                )
            )
            lines.append(
                {
                    "block_size": block_size,
                    "num_anchors": anchors,
                    "blocks": reach.blocks(anchors),
                    "expected": reach.expected_coverage(anchors),
                    "sampled": covered / draws / reach.supervised,
                    "supervisions": reach.supervisions(anchors),
                }
            )
    return pd.DataFrame(lines)


def packing_table(
    encoded: Sequence[Encoded],
    row_lengths: Sequence[int] = (1024, 4096),
    num_anchors: Sequence[int] = (16, 32, 64, 128, 256, 512),
    *,
    block_size: int = 7,
) -> pd.DataFrame:
    """What packing does to coverage when ``num_anchors`` counts per row, and when per document.

    Per document, coverage is that of unpacked rows, whatever the row's length.

    Returns:
        one line per kind of row and anchor count: ``row`` (as text), ``anchors per`` (``document``
        or ``row``), ``documents`` (per row, mean), ``num_anchors`` and ``expected``.

    Raises:
        TypeError, ValueError: what :func:`dspark_lab.chats.pack` and :func:`coverage_table` refuse.
    """
    # What fills the rows' ends is never looked at.
    batches = {"unpacked": (collate(encoded, pad_token_id=0), "document")}
    batches |= {f"packed, {n}": (pack(encoded, n, pad_token_id=0), "row") for n in row_lengths}
    lines = []
    for row, (batch, per) in batches.items():
        reach = _Reach.of(batch, block_size)
        documents = float((batch.seq_lens > 0).sum(dim=1).double().mean())
        for anchors in num_anchors:
            lines.append(
                {
                    "row": row,
                    "anchors per": per,
                    "documents": documents,
                    "num_anchors": anchors,
                    "expected": reach.expected_coverage(anchors),
                }
            )
    return pd.DataFrame(lines)


def anchors_needed(
    batch: Batch,
    goals: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    block_sizes: Sequence[int] = (4, 7, 15),
) -> pd.DataFrame:
    """The smallest ``num_anchors`` whose expected coverage reaches a goal.

    Returns:
        one line per block size and goal: ``block_size``, ``goal``, ``num_anchors`` (missing where
        no number reaches it), ``expected`` at that number, and ``ceiling``, the coverage when every
        candidate is an anchor.

    Raises:
        ValueError: a goal outside (0, 1]; no supervised token at all.
    """
    lines = []
    for block_size in block_sizes:
        reach = _Reach.of(batch, block_size)
        most = max(1, int(reach.candidates.max()))
        ceiling = reach.expected_coverage(most)
        for goal in goals:
            if not 0 < goal <= 1:
                raise ValueError(f"each goal must lie in (0, 1], got {goal}")
            enough = None
            if goal <= ceiling:
                enough = 1 + bisect_left(range(1, most), goal, key=reach.expected_coverage)
            lines.append(
                {
                    "block_size": block_size,
                    "goal": goal,
                    "num_anchors": enough,
                    "expected": reach.expected_coverage(enough) if enough else np.nan,
                    "ceiling": ceiling,
                }
            )
    return pd.DataFrame(lines).astype({"num_anchors": "Int64"})


@dataclass(frozen=True)
class _Reach:
    """A batch as coverage sees it: ``tokens[row, c]`` supervised tokens that c candidates reach."""

    candidates: Int[Tensor, " batch"]
    tokens: Float[Tensor, "batch reach"]
    supervised: int

    @classmethod
    def of(cls, batch: Batch, block_size: int) -> "_Reach":
        reach = reaching_anchors(batch, block_size)
        tokens = batch.loss_mask.new_zeros((len(reach), block_size + 1), dtype=torch.float64)
        tokens.scatter_add_(1, reach, batch.loss_mask.double())
        supervised = int(batch.loss_mask.sum())
        if supervised == 0:
            raise ValueError("coverage needs a supervised token, got a batch without one")
        return cls(_candidate_counts(batch), tokens, supervised)

    def expected_coverage(self, num_anchors: int) -> float:
        most = self.tokens.shape[1] - 1
        covered = self.tokens * _covered_by_reach(self.candidates, num_anchors, most)
        return float(covered.sum()) / self.supervised

    def blocks(self, num_anchors: int) -> float:
        return float(self.candidates.clamp(max=num_anchors).double().mean())

    def supervisions(self, num_anchors: int) -> float:
        reach = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        slots = self.tokens @ reach.double()
        chosen = self.candidates.clamp(max=num_anchors) / self.candidates.clamp(min=1)
        return float((slots * chosen).sum()) / self.supervised


def _candidate_counts(batch: Batch) -> Int[Tensor, " batch"]:
    seq_len = batch.input_ids.shape[1]
    return build_anchor_candidate_mask(seq_len, batch.loss_mask, batch.doc_remaining).sum(dim=1)


def _covered_by_reach(
    candidates: Int[Tensor, " batch"], num_anchors: int, block_size: int
) -> Float[Tensor, "batch reach"]:
    """P(covered) of a token that 0, 1, ..., ``block_size`` candidates reach, for each row."""
    require_int("num_anchors", num_anchors, 1)
    total = candidates.double().unsqueeze(1)
    drawn = total.clamp(max=num_anchors)
    already = torch.arange(block_size, dtype=torch.float64, device=candidates.device)
    # Missing c candidates in turn: each is left out of what the earlier ones left over.
    left_out = ((total - drawn - already) / (total - already).clamp(min=1)).clamp(min=0)
    missed = torch.nn.functional.pad(left_out.cumprod(dim=1), (1, 0), value=1.0)
    return 1 - missed
