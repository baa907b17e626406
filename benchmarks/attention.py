"""Blockwise attention on the CPU against dense SDPA with the same mask, forward plus backward."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import compare, peak_bytes
from dspark_lab.attention import Backend, block_attention
from dspark_lab.common import sample_anchor_positions

SEQ_LEN, ANCHORS, BLOCK, HEADS, HEAD_DIM = 1024, 64, 7, 9, 64
BACKENDS: tuple[Backend, ...] = ("blockwise", "dense")


def run() -> Iterator[str]:
    torch.manual_seed(0)
    supervised = torch.ones(1, SEQ_LEN, dtype=torch.bool)
    anchors, keep = sample_anchor_positions(SEQ_LEN, supervised, ANCHORS, "cpu")
    queries = ANCHORS * BLOCK
    q = torch.randn(1, HEADS, queries, HEAD_DIM, requires_grad=True)
    k, v = (torch.randn(1, HEADS, SEQ_LEN + queries, HEAD_DIM, requires_grad=True) for _ in "kv")
    grad_out = torch.randn_like(q)

    def forward(backend: Backend) -> torch.Tensor:
        return block_attention(
            q, k, v, anchors, keep, seq_len=SEQ_LEN, block_size=BLOCK, backend=backend
        )

    def step(backend: Backend) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(backend), (q, k, v), grad_out)

    shape = f"S {SEQ_LEN}, N {ANCHORS}, K {BLOCK}, {HEADS} heads of {HEAD_DIM}"
    yield f"{shape}, against dense SDPA"
    yield compare("forward", lambda: forward("blockwise"), lambda: forward("dense"))
    yield compare(
        "forward plus backward", lambda: step("blockwise"), lambda: step("dense"), runs=21
    )
    results = sum(tensor.numel() * tensor.element_size() for tensor in (q, q, k, v))
    ours, dense = (peak_bytes(partial(step, b)) for b in BACKENDS)
    yield f"peak memory, of it {results / 1e6:.1f} MB output and gradients, which both must hold"
    yield f"  blockwise {ours / 1e6:.1f} MB, dense {dense / 1e6:.1f} MB"
    yield (
        f"  beyond them: {(ours - results) / 1e6:.2f} MB, {(dense - results) / 1e6:.2f} MB, "
        f"a share of {(ours - results) / (dense - results):.2f}"
    )
