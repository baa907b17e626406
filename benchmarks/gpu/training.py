"""Three minutes of training a new drafter for SmolLM2, or for the pocket target without it."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.gpu.child import Report
from benchmarks.gpu.decoding import load
from benchmarks.measure import seconds
from dspark_lab.model import live_features
from dspark_lab.training import Processes, Run, TrainConfig, encode_chats, new_drafter

SECONDS, HELD_OUT = 180, 40


def run(report: Report) -> None:
    pair = load(report, "smollm2") or load(report, "pocket")
    if pair is None:
        return
    config = TrainConfig(
        steps=10**6,
        batch_size=report.pick(16, 2),
        max_length=report.pick(1024, 64),
        schedule="constant",
        precision=report.pick("bf16", "fp32"),
        evaluate_anchors=report.pick(32, 2),
    )
    target, mask = pair.target, pair.drafter.config.mask_token_id
    drafter = new_drafter(target, mask_token_id=mask).to(target.device)
    drafter.use_target_embeddings(target.embed_weight, target.head_weight, target.logit_rule)
    tokens = encode_chats(pair.chats[: report.pick(None, 8)], target.tokenizer, config.max_length)
    held_out = pair.held_out[: report.pick(HELD_OUT, 2)]
    others = encode_chats(held_out, target.tokenizer, 1024)
    training = Run(drafter.train(), config, tokens, Path("nowhere"), Processes())
    source = live_features(target, drafter.config.target_layer_ids)
    times: list[float] = []
    end = time.perf_counter() + report.pick(SECONDS, 0)
    while len(times) < report.runs or time.perf_counter() < end:
        times.append(seconds(lambda: training.advance(source)))
    report.figure(f"{pair.name}: steps a second", "1/s", [1 / value for value in times])
    line = training.evaluate(target, others)
    note = f"{len(times)} steps, {len(others)} conversations; low to high is the 95 % interval"
    tau, low, high = line["held_out_tau"], line["low"], line["high"]
    report.figure(f"{pair.name}: tau", "", [tau], note, {"low": low, "high": high})
