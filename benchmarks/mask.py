"""The block mask in closed form against ``create_block_mask`` on the same rule."""

from collections.abc import Iterator

import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.measure import compare, median_seconds
from dspark_lab.attention import training_block_mask, training_mask_mod
from dspark_lab.common import sample_anchor_positions

SEQ_LEN, ANCHORS, BLOCK = 4096, 512, 7


def run() -> Iterator[str]:
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        anchors, keep = _anchors(SEQ_LEN, ANCHORS, device)
        sizes = {"seq_len": SEQ_LEN, "block_size": BLOCK}
        queries = ANCHORS * BLOCK

        def ours(anchors=anchors, keep=keep, sizes=sizes):
            return training_block_mask(anchors, keep, **sizes)

        def theirs(make, anchors=anchors, keep=keep, sizes=sizes, device=device, queries=queries):
            rule = training_mask_mod(anchors, keep, **sizes)
            return make(rule, 1, None, queries, SEQ_LEN + queries, device=device)

        shape = f"S {SEQ_LEN}, N {ANCHORS}, K {BLOCK}"
        yield compare(
            f"{device}: {shape}, against create_block_mask", ours, lambda: theirs(create_block_mask)
        )
        compiled = torch.compile(create_block_mask)
        yield compare(
            f"{device}: {shape}, both compiled",
            lambda: torch.compile(training_block_mask)(anchors, keep, **sizes),
            lambda: theirs(compiled),
        )
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


def _anchors(seq_len: int, num_anchors: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    supervised = torch.ones(1, seq_len, dtype=torch.bool, device=device)
    return sample_anchor_positions(seq_len, supervised, num_anchors, device)
