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
from dspark_lab import attention, blocks, chats, common, coverage, tables, widgets
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
    coverage.token_coverage(batch, 9, 5)
    coverage.coverage_table(batch, (4, 8), (5,))
    common.create_noise_embed(torch.nn.Embedding(50000, 8), batch.input_ids, *where, 0, 5)
states = [torch.zeros(2, 3, 4)] * 4
common.extract_context_feature(states, common.validate_target_layer_ids([0, 1], 4))
common.AcceptRatePredictor(4)(states[0])
coverage.packing_table(encoded, (700,), (4,))
coverage.anchors_needed(batch)
spans = coverage.Spans.of(encoded, row_length=700)
coverage.supervision(spans, 4, 5, per="document").weighted
coverage.supervision_table(spans, (4,), (5,), per=coverage.PER, by_domain=True)
coverage.slot_table(spans, 4, 5), coverage.never_table(spans)
coverage.token_supervision(spans, 4, 5)
widgets.explore_anchors(), widgets.explore_masks(packed=True, row_length=1024)
"""

# All that decoding needs but `objective`: torch reads the signature of its custom operator as text.
DECODE = """
import torch
from jaxtyping import install_import_hook
names = "acceptance calibration checkpoint claims decode decode_plots decode_widgets drafter "
names += "evaluate heads outcomes pairs replay rows speed target temperatures trace"
install_import_hook([f"dspark_lab.{name}" for name in names.split()], "beartype.beartype")
from dspark_lab import acceptance, calibration, chats, claims, decode, decode_widgets, evaluate
from dspark_lab import pairs, rows, speed

torch.set_num_threads(1)
pair = pairs.load_pair()
prompts = [pairs.question(chat) for chat in pair.held_out[:40:2]]
for name in ("rnn-k7", "gated-k7", "dflash-k7", "dspark-k7"):
    options = {"temperature": 1.0, "top_p": 0.9, "threshold": 0.2, "max_new_tokens": 12}
    drafter = pair.load_drafter(name)
    decode.decode(pair.target, drafter, prompts[:3], temperatures=[1.0] * 7, **options)
plain = decode.decode(pair.target, None, prompts[:3], max_new_tokens=12)
decoded = decode.decode(pair.target, pair.drafter, prompts, temperature=1.0, max_new_tokens=40)
decode.greedy_differences(pair.target, plain, plain, prompts[:3])
speed.speed_table([plain], [decoded], 7)
sums = [acceptance.trace_sums(decoded.trace)]
sums.append(evaluate.teacher_forced_answers(pair.drafter, pair.target, decoded, prompts))
encoded = [chats.encode(chat, pair.tokenizer) for chat in pair.held_out[:3]]
sums.append(evaluate.teacher_forced(pair.drafter, pair.target, encoded, num_anchors=4))
for table in sums:
    acceptance.rate_table(table, "domain"), acceptance.tau_table(table)
acceptance.token_rate_table(decoded.trace)
trace = pairs.load_traces()
trace = trace[(trace["drafter"] == "dspark-k7") & (trace["temperature"] == 1)]
fit, held = calibration.split_prompts(trace)
calibration.calibration_report(fit, held)
calibration.reliability_tables(fit, held)
calibration.study(trace, by=["domain"])
calibration.drift_table(fit, held, held, half_life=100.0)
costs = {"draft_seconds": 1.0, "verify_seconds": 1.0, "token_seconds": 0.1}
calibration.gain_table(fit, held, **costs)
calibration.threshold_sweep(trace, [0.0, 0.5])
rounds = calibration.rounds_of(held)
calibration.brier(*rounds.pairs()), calibration.auroc(*rounds.pairs())
calibration.expected_calibration_error(*rounds.pairs(slot=0, kind="analytic"), binning="mass")
claims.claims_table(trace, resamples=3)
for view in decode_widgets.VIEWS:
    decode_widgets.explore_acceptance(prompts=prompts, view=view, max_new_tokens=24)
decode_widgets.explore_decoding(prompts=prompts, max_new_tokens=12)
"""

LIE = """
try:
    {}  # floats where the signature says integers
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


def test_every_annotated_shape_of_decoding_holds():
    run(DECODE)


def test_a_wrong_shape_would_be_noticed():
    run(PREAMBLE + LIE.format("common.create_position_ids(torch.zeros(2, 3), 5)"))


def test_a_wrong_shape_in_decoding_would_be_noticed():
    imports, _, _ = DECODE.partition("pair = ")
    draw = "decode._draw(torch.zeros(2, 3), torch.zeros(2, 1).tolist())"
    run(imports + LIE.format(draw))
