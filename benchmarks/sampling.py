"""Drawing anchors by selection against sorting the whole row, as published trainers do."""

from collections.abc import Iterator

import torch

from benchmarks.measure import compare
from dspark_lab.common import build_anchor_candidate_mask, sample_anchor_positions


def run() -> Iterator[str]:
    for seq_len, num_anchors in ((4096, 512), (65536, 1536)):
        supervised = torch.ones(1, seq_len, dtype=torch.bool)

        def ours(seq_len=seq_len, num_anchors=num_anchors, supervised=supervised):
            return sample_anchor_positions(seq_len, supervised, num_anchors, "cpu")

        def full_sort(seq_len=seq_len, num_anchors=num_anchors, supervised=supervised):
            candidates = build_anchor_candidate_mask(seq_len, supervised)
            noise = torch.rand(candidates.shape).masked_fill(~candidates, 2.0)
            chosen = noise.sort(dim=1, stable=True).indices[:, :num_anchors]
            return chosen.sort(dim=1).values

        name = f"S {seq_len}, N {num_anchors}, against a full sort"
        yield compare(name, ours, full_sort, runs=51)
