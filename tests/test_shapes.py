"""The shapes in the signatures are true: checked by beartype on a walk through the whole lab.

In a process of its own, since the check has to be switched on before the package is imported, and
since it would answer bad input before the package's own sentences do.
"""

import subprocess
import sys

PREAMBLE = """
from jaxtyping import install_import_hook
hook = install_import_hook("dspark_lab", "beartype.beartype")
import torch
from dspark_lab import attention, blocks, chats, common, tables, tune, widgets
"""

WALK = """
tokenizer = chats.load_tokenizer()
encoded = [chats.encode(chat, tokenizer) for chat in chats.load_chats()[:12]]
for batch in (chats.collate(encoded, 0), chats.pack(encoded, 700, 0)):
    length = batch.input_ids.shape[1]
    drawn = blocks.draw_blocks(batch, 9, 5, seed=0)
    docs = common.context_doc_ids(batch.seq_lens, length, "cpu")
    where = (drawn.anchor_positions, drawn.block_keep_mask)
    sizes = {"seq_len": length, "block_size": 5, "doc_ids": docs}
    tables.token_table(batch, drawn, str)
    tables.block_table(batch, drawn, str)
    tables.mask_table(tables.mask_regions(drawn, seq_len=length, doc_ids=docs))
    tables.tile_table(tables.tile_states(attention.training_block_mask(*where, **sizes)))
    tables.sorting_table(drawn, seq_len=length, doc_ids=docs)
    attention.training_dense_mask(*where, **sizes)
    q = torch.randn(len(docs), 4, 45, 8)
    k = torch.randn(len(docs), 2, length + 45, 8)
    attention.block_attention(q, k, k, *where, **sizes)
    tune.token_coverage(batch, 9, 5)
    tune.coverage_table(batch, (4, 8), (5,))
    common.create_noise_embed(torch.nn.Embedding(50000, 8), batch.input_ids, *where, 0, 5)
states = [torch.zeros(2, 3, 4)] * 4
common.extract_context_feature(states, common.validate_target_layer_ids([0, 1], 4))
common.AcceptRatePredictor(4)(states[0])
tune.packing_table(encoded, (700,), (4,))
tune.anchors_needed(batch)
widgets.explore_anchors(), widgets.explore_masks(packed=True, row_length=1024)
"""

LIE = """
try:
    common.create_position_ids(torch.zeros(2, 3), 5)  # floats where the signature says integers
except Exception as error:
    assert "jaxtyping" in type(error).__module__ + str(error), error
else:
    raise SystemExit("the check is not on")
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_annotated_shape_holds():
    run(PREAMBLE + WALK)


def test_a_wrong_shape_would_be_noticed():
    run(PREAMBLE + LIE)
