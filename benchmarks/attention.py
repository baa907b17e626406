"""Blockwise attention on the CPU against dense SDPA with the same mask, forward plus backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import compare, peak_bytes
from dspark_lab.attention import Backend, block_attention
from dspark_lab.common import sample_anchor_positions

SEQ_LEN, ANCHORS, BLOCK, HEADS, HEAD_DIM = 1024, 64, 7, 9, 64
BACKENDS: tuple[Backend, ...] = ("blockwise", "dense")


@dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    anchors: Tensor
    keep: Tensor
    sizes: dict[str, int]

    def forward(self, backend: Backend, block_mask: Any = None) -> Tensor:
        options: dict[str, Any] = {"backend": backend, "block_mask": block_mask} | self.sizes
        return block_attention(self.q, self.k, self.v, self.anchors, self.keep, **options)

    def step(self, backend: Backend, block_mask: Any = None) -> tuple[Tensor, ...]:
        inputs = self.q, self.k, self.v
        return torch.autograd.grad(self.forward(backend, block_mask), inputs, self.grad_out)


def problem(
    seq_len: int = SEQ_LEN,
    anchors: int = ANCHORS,
    block: int = BLOCK,
    heads: int = HEADS,
    kv_heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Problem:
    torch.manual_seed(0)
    supervised = torch.ones(1, seq_len, dtype=torch.bool, device=device)
    drawn = sample_anchor_positions(seq_len, supervised, anchors, device)
    queries = anchors * block
    options: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    q = torch.randn(1, heads, queries, head_dim, **options)
    k, v = (torch.randn(1, kv_heads, seq_len + queries, head_dim, **options) for _ in "kv")
    return Problem(q, k, v, torch.randn_like(q), *drawn, {"seq_len": seq_len, "block_size": block})


def run() -> Iterator[str]:
    p = problem()
    yield f"S {SEQ_LEN}, N {ANCHORS}, K {BLOCK}, {HEADS} heads of {HEAD_DIM}, against dense SDPA"
    yield compare("forward", lambda: p.forward("blockwise"), lambda: p.forward("dense"))
    yield compare(
        "forward plus backward", lambda: p.step("blockwise"), lambda: p.step("dense"), runs=21
    )
    results = sum(tensor.nbytes for tensor in (p.q, p.q, p.k, p.v))
    ours, dense = (peak_bytes(partial(p.step, b)) for b in BACKENDS)
    yield f"peak memory, of it {results / 1e6:.1f} MB output and gradients, which both must hold"
    yield f"  blockwise {ours / 1e6:.1f} MB, dense {dense / 1e6:.1f} MB"
    yield (
        f"  beyond them: {(ours - results) / 1e6:.2f} MB, {(dense - results) / 1e6:.2f} MB, "
        f"a share of {(ours - results) / (dense - results):.2f}"
    )
