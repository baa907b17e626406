"""The shapes in the signatures are true: checked by beartype on a walk through the whole lab.

In a process of its own, since the check has to be switched on before the package is imported, and
since it would answer bad input before the package's own sentences do.
"""

import subprocess
import sys

import pytest

WALK = """
from jaxtyping import install_import_hook
hook = install_import_hook("dspark_lab", "beartype.beartype")
import torch
from dspark_lab import attention, blocks, chats, common, coverage, tables, widgets

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
    decode.decode(pair.target, drafter, prompts[:3], confidence_temperatures=[1.0] * 7, **options)
plain = decode.decode(pair.target, None, prompts[:3], max_new_tokens=12)
decoded = decode.decode(pair.target, pair.drafter, prompts, temperature=1.0, max_new_tokens=40)
decode.greedy_differences(pair.target, plain, plain, prompts[:3])
speed.speed_table([plain], [decoded], 7)
sums = [acceptance.trace_sums(decoded.trace)]
sums.append(evaluate.teacher_forced_answers(pair.drafter, pair.target, decoded, prompts))
encoded = [chats.encode(chat, pair.tokenizer) for chat in pair.held_out[:3]]
sums.append(evaluate.teacher_forced_sums(pair.drafter, pair.target, encoded, num_anchors=4))
for table in sums:
    acceptance.rate_table(table, "domain"), acceptance.tau_table(table)
trace = pairs.load_traces()
trace = trace[(trace["drafter"] == "dspark-k7") & (trace["temperature"] == 1)]
fit, held = calibration.split_prompts(trace)
calibration.calibration_report(fit, held)
calibration.reliability_tables(fit, held)
calibration.study(trace, by=["domain"])
calibration.drift_table(fit, held, held, half_life=100.0)
costs = {"draft_seconds": 1.0, "verify_seconds": 1.0, "token_seconds": 0.1}
serving.gain_table(fit, held, **costs)
calibration.threshold_sweep(trace, [0.0, 0.5])
rounds = calibration.rounds_of(held)
calibration.brier(*rounds.pairs()), calibration.auroc(*rounds.pairs())
calibration.expected_calibration_error(*rounds.pairs(slot=0, kind="analytic"), binning="mass")
claims.claims_table(trace, resamples=3)
for view in decode_widgets.VIEWS:
    decode_widgets.explore_acceptance(prompts=prompts, view=view, max_new_tokens=24)
decode_widgets.explore_decoding(prompts=prompts, max_new_tokens=12)
"""

# All that choosing needs but `objective`, likewise. An int will do where a float is asked for.
CHOOSE = """
import beartype
from jaxtyping import install_import_hook
beartype.tower = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
names = "cost coverage engine export load memory schedule serving shape steptime sweep tune"
install_import_hook([f"dspark_lab.{name}" for name in names.split()], "beartype.tower")
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from dspark_lab import chats, cost, engine, export, load, memory, pairs, schedule, serving, shape
from dspark_lab import steptime, sweep, temperatures, tune

torch.set_num_threads(1)
pair = pairs.load_pair()
own = shape.Shape.of(pair.drafter.config, target=pair.target.model.config.to_dict())
own.drafter_config(block_size=3), own.trained_parameters, own.target_parameters
step = {"seq_len": 256, "num_anchors": 8, "block_size": 4, "batch_size": 2}
for one in (own, *map(shape.Shape.of, shape.TARGETS)):
    for options in ({"features": "live"}, {"features": "cached", "supervised": 0.5}):
        memory.training_memory(one, **step, **options), memory.memory_table(one, **step, **options)
        cost.training_cost(one, **step, **options)
    cost.drafting_cost(one, context_length=64), cost.verify_cost(one, context_length=64, tokens=4)
memory.fit_table(own, "T4", (256, 512), (4, 7)), memory.fit_table(own, 8e9)
memory.card_table(["qwen3-4b", own], ["H100", shape.CARDS["L4"]])
anchors = np.array([[1, 4, 9], [2, 3, 0]])
sizes = {"seq_len": 16, "block_size": 4}
work = cost.anchored_work(anchors, anchors > 0, doc_starts=anchors // 3, **sizes)
cost.training_cost(own, num_anchors=3, work=work, **sizes)
cost.expected_work(64, 5, 4, 2)
timed = steptime.measure_steps(own, (32, 64), (4, 8), runs=1)
steptime.measure_steps(own, (32,), (4,), runs=1, target=pair.target, dtype="bf16")
fit = steptime.fit_step_time(timed)
str(steptime.fit_step_time(timed[:2], timed[2:])), fit.predict(timed["operations"])
encoded = [chats.encode(chat, pair.tokenizer) for chat in pair.held_out[:20]]
choice = tune.choose_training(encoded, own, time=fit, memory=8e9, num_anchors=(4, 16), block_sizes=(3, 7))
tune.choose_training(chats.collate(encoded, 0), own, time="H100")
for per in ("row", "document"):
    options = {"time": "T4", "seq_lens": (256, 512), "packed": True, "per": per}
    tune.choose_training(encoded, own, num_anchors=(8,), **options)
swept = sweep.load_sweep()
tune.sweep_check(tune.predict_sweep(swept, encoded, own).table, sweep.cell_table(swept))
sweep.SweepConfig(seeds=(0,)).cells()

trace = pairs.load_traces()
trace = trace[trace["drafter"] == "dspark-k7"]
hot = trace[trace["temperature"] == 1]
sps = schedule.measure_steps_per_second(pair.target, (1, 4, 9), context_length=8)
few = {"requests": (1, 2), "repeats": 2, "warm_up": 1}
measured = engine.measure_engine(pair.target, pair.drafter, **few)
with TemporaryDirectory() as folder:
    for each in (sps, measured):
        each.save(Path(folder, "curve.csv"))
        type(each).read(Path(folder, "curve.csv"))
    for settings, kinds in (
        (choice.settings, export.TRAINERS),
        (export.ServingSettings(3), export.SERVERS),
    ):
        for kind in ("json", *kinds):
            export.export(settings, kind), export.export(settings, kind, Path(folder, "settings"))
sps = sps.smoothed()
sps(3), sps(np.arange(4)), sps.seconds(2.5), sps.smooth
for confidence in (np.full((3, 4), 0.7), torch.full((3, 4), 0.7)):
    schedule.prefix_schedule(confidence, sps), schedule.retrospective_schedule(confidence, sps)
    schedule.schedule_table(confidence, sps)
schedule.prefix_scheduler(sps)(torch.full((2, 3), 0.9))
schedule.worked_example(), schedule.simulate_worked_example(100)
profile = serving.acceptance_profile(hot, resamples=20)
profile.tau(3), profile.tau(3, 20), profile.table()
given = engine.Engine.of(sps, 7, draft_seconds={1: 0.5, 4: 1})
for each in (measured, engine.load_engine(), given):
    costs = each.costs(3, replay=True)
    serving.speedup_table(profile, costs), serving.advice(profile, costs, [1, 7])
serving.threshold_table(hot, costs, thresholds=[0.0, 0.5], resamples=5)
scaling = temperatures.SequentialTemperatures((1.5,) * 7)
serving.best_threshold(hot, costs, test=hot, draft_lengths=[3], calibrated=scaling, resamples=5)
serving.break_even(costs, 7), serving.best_length(profile, costs)
serving.temperature_table(trace, {0.0: costs, 1.0: costs.cutting()}, resamples=5)
serving.RoundCosts.of(3, plain_seconds=1, draft_seconds=[1, 2, 3], verify_seconds=lambda n: 1 + n)
serving.measure_costs(pair.target, pair.drafter, draft_lengths=[1, 7], replay=True, repeats=2)
prompts = [pairs.question(chat) for chat in pair.held_out[:2]]
options = {"draft_lengths": [3], "max_new_tokens": 8, "repeats": 1, "resamples": 5}
for replay in (False, True):
    serving.decode_check(pair.target, pair.drafter, prompts, trace, replay=replay, **options)
answers = load.answers_of(hot, scaling)
policies = [load.FixedLength(0), load.FixedLength(7), load.StaticThreshold(0.5)]
policies.append(load.PrefixScheduler())
for options in ({"answer_tokens": load.Geometric(9.0)}, {"within": "domain", "rate": 50.0}):
    options = {"requests": 9, **options, **measured.beside(7)}
    load.load_table(answers, measured.sps, policies, (1, 3), **options)
drawn = load.draw_requests(hot, 9, domains={"math": 1}, answer_tokens=5)
load.simulate(drawn, lambda n: 1 / n, policies[0], concurrency=2, draft_seconds=lambda n: n)
"""

LIE = """
try:
    {}  # floats where the signature says integers
except Exception as error:
    assert "jaxtyping" in type(error).__module__ + str(error), error
else:
    raise SystemExit("the check is not on")
"""


@pytest.mark.parametrize(
    "walk, lie",
    [
        (WALK, "common.create_position_ids(torch.zeros(2, 3), 5)"),
        (DECODE, "decode._draw(torch.zeros(2, 3), torch.zeros(2, 1).tolist())"),
        (CHOOSE, "cost.anchored_work(np.zeros((2, 3)), seq_len=9, block_size=4)"),
    ],
    ids=["masks", "decoding", "choosing"],
)
def test_every_annotated_shape_holds_and_a_wrong_one_would_be_noticed(walk, lie):
    code = walk + LIE.format(lie)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
