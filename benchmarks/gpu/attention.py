"""FlexAttention with either block mask against dense SDPA, forward and backward, in bf16."""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from benchmarks.attention import BLOCK, problem
from benchmarks.gpu.child import Report
from benchmarks.gpu.sides import compare, require_flex
from benchmarks.mask import forms
from dspark_lab.attention import attend, context_ranges, mask_form

CARD = {"seq_len": 4096, "anchors": 512, "heads": 32, "kv_heads": 8, "head_dim": 128}
DRY = {"seq_len": 256, "anchors": 16, "heads": 4, "kv_heads": 2, "head_dim": 16}


def run(report: Report) -> None:
    sizes = report.pick(CARD, DRY)
    p = problem(**sizes, device=report.device, dtype=torch.bfloat16)
    closed_form, from_rule = forms(sizes["seq_len"], sizes["anchors"], report.device)
    # On a CPU, FlexAttention has no backward pass.
    frozen = replace(p, q=p.q.detach(), k=p.k.detach(), v=p.v.detach())

    def flex(mask: BlockMask) -> object:
        result = frozen.forward("flex", mask) if report.dry else p.step("flex", mask)
        require_flex()
        return result

    where: dict[str, Any] = p.sizes
    ranges = context_ranges(p.anchors, p.keep, **where)
    mask = mask_form(ranges, "dense")

    def dense() -> object:
        out = attend(p.q, p.k, p.v, ranges, backend="dense", form=mask)
        return torch.autograd.grad(out, (p.q, p.k, p.v), p.grad_out)

    ours, theirs = closed_form(), from_rule()
    sides = {
        "flex, closed-form mask": lambda: flex(ours),
        "flex, create_block_mask's": lambda: flex(theirs),
        "dense SDPA": dense,
    }
    results = sum(tensor.nbytes for tensor in (p.q, p.q, p.k, p.v)) / 1e9
    report.figure("output and gradients, part of every peak", "GB", [results])
    compare(report, f"S {sizes['seq_len']}, N {sizes['anchors']}, K {BLOCK}", sides)
