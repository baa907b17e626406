"""The block mask in closed form against ``create_block_mask`` on the same rule, on the CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.measure import compare, median_seconds
from dspark_lab.attention import training_block_mask, training_mask_mod
from dspark_lab.common import sample_anchor_positions

SEQ_LEN, ANCHORS, BLOCK = 4096, 512, 7


def run() -> Iterator[str]:
    closed_form, from_rule = forms(SEQ_LEN, ANCHORS, "cpu")
    shape = f"S {SEQ_LEN}, N {ANCHORS}, K {BLOCK}"
    yield compare(f"{shape}, against create_block_mask", closed_form, from_rule)
    ours, theirs = torch.compile(training_block_mask), torch.compile(create_block_mask)
    yield compare(f"{shape}, both compiled", lambda: closed_form(ours), lambda: from_rule(theirs))
    for scale in (1, 2, 4, 8):
        anchors, keep = _anchors(1024 * scale, 128 * scale, "cpu")

        def grown(anchors=anchors, keep=keep, scale=scale):
            return training_block_mask(anchors, keep, seq_len=1024 * scale, block_size=BLOCK)

        tiles = grown().kv_indices.numel()
        milliseconds = median_seconds(grown) * 1e3
        yield (
            f"S {1024 * scale:>5}, N {128 * scale:>4}: {tiles:>6} tiles {milliseconds:7.2f} ms, "
            f"{milliseconds * 1e6 / tiles:7.0f} ns per tile"
        )


def forms(
    seq_len: int, num_anchors: int, device: str, block_size: int = BLOCK
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The mask of one draw in closed form and by ``create_block_mask``, or what stands for it."""
    anchors, keep = _anchors(seq_len, num_anchors, device)
    sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size}
    queries = num_anchors * block_size

    def closed_form(make=training_block_mask):
        return make(anchors, keep, **sizes)

    def from_rule(make=create_block_mask):
        rule = training_mask_mod(anchors, keep, **sizes)
        return make(rule, 1, None, queries, seq_len + queries, device=device)

    return closed_form, from_rule


def _anchors(seq_len: int, num_anchors: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    supervised = torch.ones(1, seq_len, dtype=torch.bool, device=device)
    return sample_anchor_positions(seq_len, supervised, num_anchors, device)
