"""The shapes in the signatures are true of results too: a walk through the lab in debug mode.

Arguments are checked in every call of every test; results in debug mode alone, which has to be
switched on before the package is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WALK = """
import torch
import dspark_lab as lab
from dspark_lab import attention, blocks, chats, common, pairs, rates, serving, tuning

torch.set_num_threads(1)
tokenizer = lab.load_tokenizer()
encoded = [lab.encode(chat, tokenizer) for chat in lab.load_chats()[:12]]
for batch in (chats.collate(encoded, 0), chats.pack(encoded, 700, 0)):
    length = batch.input_ids.shape[1]
    drawn = blocks.draw_blocks(batch, 9, 5, seed=0)
    assert blocks.times_supervised(drawn).shape == (len(drawn.doc_ids), length)
    where = (drawn.anchor_positions, drawn.block_keep_mask)
    sizes = {"seq_len": length, "block_size": 5, "doc_ids": drawn.doc_ids}
    attention.training_dense_mask(*where, **sizes)
    q, k = (torch.randn(len(drawn.doc_ids), 2, n, 8) for n in (45, length + 45))
    attention.block_attention(q, k, k, *where, **sizes)
    common.create_noise_embed(torch.nn.Embedding(50000, 8), batch.input_ids, *where, 0, 5)
states = [torch.zeros(2, 3, 4)] * 4
common.extract_context_feature(states, common.validate_target_layer_ids([0, 1], 4))
common.AcceptRatePredictor(4)(states[0])
lab.explore_anchors(), lab.explore_masks(packed=True, row_length=1024)
shape = tuning.Shape.of("qwen3-4b")
lab.choose_training(encoded, shape, time="H100", num_anchors=(8,), block_sizes=(4,))
pair = lab.load_pair()
prompts = [pairs.question(chat) for chat in pair.held_out[:3]]
decoded = lab.decode(pair.target, pair.drafter, prompts, max_new_tokens=8, temperature=1.0)
rates.rate_table(rates.trace_sums(decoded.trace))
profile = serving.acceptance_profile(decoded.trace, resamples=3)
serving.speedup_table(profile, serving.load_engine().costs(1))
print("walked")
"""

LIE = """
import torch
from jaxtyping import Int
from dspark_lab.checks import checked

@checked
def longer(ids: Int[torch.Tensor, "batch"]) -> Int[torch.Tensor, "batch"]:
    return torch.cat([ids, ids])

longer(torch.zeros(2, dtype=torch.long))
"""


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess:
    """The walk, and behind it the lie."""
    environment = os.environ | {"DSPARK_LAB_DEBUG": "1"}
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", WALK + LIE]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_every_annotated_result_holds(done):
    assert done.stdout.endswith("walked\n"), done.stderr[-3000:]


def test_a_result_of_another_shape_would_be_noticed(done):
    assert "the result of longer must be [batch] with batch = 2 as in ids" in done.stderr
