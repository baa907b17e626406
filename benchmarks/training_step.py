"""A whole training step on SmolLM2's shapes: forward, backward and optimiser, after the features.

The baseline is the plain composition: a dense mask, SDPA, logits of all slots, the textbook
objective by autograd. Both use the same drafter, blocks and fused AdamW.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import compare, peak_bytes
from dspark_lab.blocks import cut_blocks
from dspark_lab.chats import Batch
from dspark_lab.common import sample_anchor_positions
from dspark_lab.model import Drafter, DrafterConfig, output_objective

BATCH, SEQ_LEN, ANCHORS, BLOCK, RANK = 2, 384, 32, 7, 64
LAYER_IDS = (1, 8, 15, 22, 28)


def smollm2_drafter() -> Drafter:
    config = DrafterConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        target_layer_ids=LAYER_IDS,
        block_size=BLOCK,
        mask_token_id=0,
        num_anchors=ANCHORS,
        markov_rank=RANK,
    )
    return Drafter(config)


def run() -> Iterator[str]:
    torch.manual_seed(0)
    drafter = smollm2_drafter()
    trained = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    ids = torch.randint(0, 49152, (BATCH, SEQ_LEN))
    mask = torch.ones(BATCH, SEQ_LEN, dtype=torch.bool)
    anchors, keep = sample_anchor_positions(SEQ_LEN, mask, ANCHORS, "cpu")
    blocks = cut_blocks(Batch.of_tokens(ids, mask), anchors, keep, BLOCK)
    features = torch.randn(BATCH, SEQ_LEN, len(LAYER_IDS) * 576), torch.randn(BATCH, SEQ_LEN, 576)

    def lab(bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            slots = drafter.slots(blocks, *features)
            loss = drafter.objective(slots).loss
        update(loss)

    def plain(bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = drafter.output(drafter.slots(blocks, *features, backend="dense"))
        update(output_objective(output).loss)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    yield f"{BATCH} x {SEQ_LEN} tokens, N {ANCHORS}, K {BLOCK}, 2 layers, rank {RANK}, V 49152"
    yield compare("fp32 against plain fp32", lambda: lab(False), lambda: plain(False), runs=7)
    yield compare("bf16 products against plain fp32", lambda: lab(True), lambda: plain(False), 7)
    yield compare("bf16 products against plain bf16", lambda: lab(True), lambda: plain(True), 7)
    for name, bf16 in (("fp32", False), ("bf16", True)):
        ours, theirs = peak_bytes(partial(lab, bf16)), peak_bytes(partial(plain, bf16))
        yield (
            f"peak memory, {name}: {ours / 1e6:.0f} MB, plain {theirs / 1e6:.0f} MB: "
            f"{ours / theirs:.2f}"
        )
