"""The block mask in closed form against ``create_block_mask`` on the same rule."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.measure import compare, median_seconds
from dspark_lab.attention import training_block_mask, training_mask_mod
from dspark_lab.common import sample_anchor_positions

SEQ_LEN, ANCHORS, BLOCK = 4096, 512, 7


def run() -> Iterator[str]:
    yield from _against_create_block_mask("cpu")
    if torch.cuda.is_available():
        yield from _against_create_block_mask("cuda")
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


def _against_create_block_mask(device: str) -> Iterator[str]:
    anchors, keep = _anchors(SEQ_LEN, ANCHORS, device)
    sizes: dict[str, Any] = {"seq_len": SEQ_LEN, "block_size": BLOCK}
    queries = ANCHORS * BLOCK

    def closed_form(make=training_block_mask):
        return make(anchors, keep, **sizes)

    def from_rule(make=create_block_mask):
        rule = training_mask_mod(anchors, keep, **sizes)
        return make(rule, 1, None, queries, SEQ_LEN + queries, device=device)

    shape = f"{device}: S {SEQ_LEN}, N {ANCHORS}, K {BLOCK}"
    yield compare(f"{shape}, against create_block_mask", closed_form, from_rule)
    ours, theirs = torch.compile(training_block_mask), torch.compile(create_block_mask)
    yield compare(f"{shape}, both compiled", lambda: closed_form(ours), lambda: from_rule(theirs))


def _anchors(seq_len: int, num_anchors: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    supervised = torch.ones(1, seq_len, dtype=torch.bool, device=device)
    return sample_anchor_positions(seq_len, supervised, num_anchors, device)
