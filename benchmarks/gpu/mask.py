"""The block mask in closed form against ``create_block_mask`` compiled."""

import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.gpu.child import Report
from benchmarks.gpu.sides import compare
from benchmarks.mask import BLOCK, forms

SHAPES = [(4096, 512), (16384, 1024), (65536, 1536)]


def run(report: Report) -> None:
    theirs = torch.compile(create_block_mask, dynamic=False)
    for seq_len, anchors in report.pick(SHAPES, [(256, 16)]):
        closed_form, from_rule = forms(seq_len, anchors, report.device)
        sides = {
            "closed form": closed_form,
            "create_block_mask compiled": lambda make=from_rule: make(theirs),
        }
        compare(report, f"S {seq_len}, N {anchors}, K {BLOCK}", sides, memory=False)
