"""Planted faults: a function of the library and what replaces it, by name.

A fault wraps the right function and changes its arguments or result, so moving or reformatting the
right code breaks none. ``plant`` puts one in place for the rest of a test; a new process with the
environment of ``environment_with`` has it from the start.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TESTS = Path(__file__).resolve().parent

Function = Callable[..., Any]


class Fault(NamedTuple):
    """``where`` is "package.module:function" or "package.module:Class.method", in the library;
    ``wrong`` is called instead, with the right function before its arguments."""

    where: str
    wrong: Function

    @property
    def module(self) -> str:
        return f"dspark_lab.{self.where.partition(':')[0]}"

    def owner(self, module: Any) -> tuple[Any, str]:
        """The module or class that holds the function, and the function's name there."""
        *classes, name = self.where.partition(":")[2].split(".")
        for part in classes:
            module = getattr(module, part)
        return module, name

    def faulty(self, right: Any) -> Any:
        """The faulty function; a static or class method stays one."""
        if isinstance(right, (staticmethod, classmethod)):
            return type(right)(self.faulty(right.__func__))
        wrong = self.wrong
        return lambda *args, **kwargs: wrong(right, *args, **kwargs)


def changed_result(change: Function) -> Function:
    """Return ``change(result)``."""
    return lambda right, *args, **kwargs: change(right(*args, **kwargs))


def changed_argument(name: str, change: Function) -> Function:
    """Change an argument that is given by keyword."""
    return lambda right, **given: right(**(given | {name: change(given[name])}))


def first_slot_last(query: Any, block_size: int) -> Any:
    """All slots, ``[batch, query, ...]``, with slot 0 of each block moved to the block's end."""
    return query.unflatten(1, (-1, block_size)).roll(-1, dims=2).flatten(1, 2)


def target_keeps_all(commit: Function, cache: Any, counts: Any, kept: Any = None) -> None:
    """In a round, the target's cache keeps every token that was read."""
    if kept is not None:
        new = cache.states.get_seq_length() - cache.rows.width
        counts = [new if count else 0 for count in counts]
    commit(cache, counts, kept)


def drafter_reads_the_token_before(
    read: Function, drafter: Any, context: Any, cache: Any, counts: Any
) -> None:
    """In a round, the drafter's context is that of the token before."""
    read(drafter, context.roll(1, 1) if any(cache.rows.lengths) else context, cache, counts)


ANCHORS: dict[str, Fault] = {
    "labels are off by one": Fault(
        "blocks:_label_positions",
        lambda right, anchors, keep, **sizes: right(anchors - 1, keep, **sizes),
    ),
    "candidates need no second token": Fault(
        "common:_pairs", lambda right, supervised: supervised[:, :-1].clone()
    ),
    "the largest random numbers become anchors": Fault(
        "common:_uniform", changed_result(lambda noise: 1 - noise)
    ),
    "the marker that ends a turn is not generated": Fault(
        "chats.answers:_turn",
        changed_result(lambda turn: (turn[0], turn[1] - len("<|im_end|>"), turn[2])),
    ),
    "trainers leave out the line break behind an answer": Fault(
        "chats.trainers:_answers",
        lambda right, text, family: right(text, replace(family, end=family.end.rstrip())),
    ),
    "coverage forgets that anchors differ": Fault(
        "tuning.coverage:_left_out",
        lambda right, candidates, spared, before: right(candidates, spared, 0 * before),
    ),
}
MASKS: dict[str, Fault] = {
    "dummy anchors are kept": Fault(
        "common:sample_anchor_positions", changed_result(lambda drawn: (drawn[0], drawn[1] | True))
    ),
    "supervision jumps over gaps": Fault(
        "common:_contiguous_prefix", lambda right, supervised: supervised
    ),
    "supervision ignores the keep mask": Fault(
        "common:build_eval_mask", changed_argument("block_keep_mask", lambda keep: keep | True)
    ),
    "supervision ignores the end of the document": Fault(
        "common:build_eval_mask",
        changed_argument("doc_remaining", lambda remaining: remaining * 0 + 10**6),
    ),
    "candidates ignore the end of the document": Fault(
        "common:build_anchor_candidate_mask",
        lambda right, seq_len, loss_mask, doc_remaining=None: right(seq_len, loss_mask),
    ),
    "positions are off by one": Fault(
        "common:create_position_ids", changed_result(lambda ids: ids + 1)
    ),
    "positions do not restart in a document": Fault(
        "common:create_position_ids",
        lambda right, anchors, block_size, context_position_ids: right(anchors, block_size),
    ),
    "the anchor's token is in the last slot": Fault(
        "common:create_noise_embed",
        lambda right, **given: first_slot_last(right(**given), given["block_size"]),
    ),
    "dummy blocks read a token": Fault(
        "common:create_noise_embed", changed_argument("block_keep_mask", lambda keep: keep | True)
    ),
    "the context includes the anchor": Fault(
        "attention.mask:in_context_prefix",
        lambda right, key, start, end: right(key, start, end + 1),
    ),
    "the context leaves the document": Fault(
        "attention.mask:document_starts", changed_result(lambda start: start * 0)
    ),
    "blocks see each other": Fault(
        "attention.mask:in_own_block",
        lambda right, key, first, past: right(key, first, past + 2**40),
    ),
    "a block is causal": Fault(
        "attention.mask:mask_mod",
        lambda right, ranges: (
            lambda batch, head, query, key: (
                right(ranges)(batch, head, query, key) & (key <= ranges.seq_len + query)
            )
        ),
    ),
    "dummy blocks do not see themselves": Fault(
        "attention.mask:mask_mod",
        lambda right, ranges: (
            lambda batch, head, query, key: (
                right(ranges)(batch, head, query, key)
                & (ranges.end[batch, query // ranges.block_size] > 0)
            )
        ),
    ),
    "a check takes no notice of other documents": Fault(
        "attention.mask_rules:_intervals", lambda right, *args, **kwargs: iter(())
    ),
    "a check takes no notice of a window": Fault(
        "attention.mask_rules:_context", lambda right, *args, **kwargs: iter(())
    ),
    "a tile is full where it is partial": Fault(
        "attention.mask:tiles_of_ranges", changed_result(lambda tiles: (tiles[0], tiles[1][[0, 0]]))
    ),
    "a tile is empty where it is partial": Fault(
        "attention.mask:tiles_of_ranges",
        changed_result(lambda tiles: (tiles[0], tiles[1][[1, 1]].maximum(tiles[0]))),
    ),
}
TRAIN: dict[str, Fault] = {
    "accept rates are those of a smaller distance": Fault(
        "model.slotwise:rate_of_distance", lambda right, l1: right(l1 * 2 / 3)
    ),
    "an evaluation counts blocks that are cut off": Fault(
        "rates.teacher_forced:whole_block_anchors", lambda right, batch, block_size: right(batch, 1)
    ),
    "the Markov head reads the token after the previous one": Fault(
        "blocks:_previous_positions", lambda right, anchors, **sizes: right(anchors + 1, **sizes)
    ),
    "the gate of the gated head stays open": Fault(
        "model.heads:GatedHead.step",
        lambda right, head, state, embedding, hidden: (None, embedding),
    ),
    "the RNN head forgets": Fault(
        "model.heads:RnnHead.step",
        lambda right, head, state, embedding, hidden: right(head, None, embedding, hidden),
    ),
    "training starts without a warm-up": Fault(
        "training.config:TrainConfig.learning_rate_at",
        lambda right, config, step: right(replace(config, warmup_steps=0), step),
    ),
}
RATES: dict[str, Fault] = {
    "teacher-forced slots are reached whatever came before": Fault(
        "decoding.trace:slot_before", lambda right, values: np.ones_like(values)
    ),
    "a calibration error lets gaps cancel out": Fault(
        "rates.scores:binned_error",
        lambda right, f, o, bins, binning, weights=None: right(f, o, 1, binning, weights),
    ),
    "a temperature multiplies": Fault(
        "rates.scaling:temperature_scale",
        lambda right, confidence, temperatures: right(confidence, 1 / temperatures),
    ),
    "temperatures are searched slot by slot": Fault(
        "rates.scaling:search",
        lambda right, f, survival, weights, start, fixed, *how: np.concatenate(
            [
                right(f[:, [k]], survival[:, [k]], weights, start[[k]], [0] * (k in fixed), *how)
                for k in range(f.shape[1])
            ]
        ),
    ),
    "bias is upside down": Fault(
        "rates.calibration:confidence_error", changed_result(lambda error: -error)
    ),
    "tau lacks the target's own token": Fault(
        "rates.acceptance:with_own_token", lambda right, accepted: accepted
    ),
    "what is learned of margins is judged where it was learned": Fault(
        "rates.margins:signals",
        lambda right, fit, test: {name: (own, own) for name, (own, _) in right(fit, test).items()},
    ),
    "a slot behind a rejected one is reached": Fault(
        "decoding.trace:reached_slots",
        lambda right, verified, accepted: right(verified, accepted | True),
    ),
}
DECODE: dict[str, Fault] = {
    "the acceptance ratio is inverted": Fault(
        "decoding.verification:acceptance",
        lambda right, target_prob, draft_prob: right(draft_prob, target_prob),
    ),
    "a rejected token is drawn from p": Fault(
        "decoding.verification:next_distribution",
        lambda right, p, q, accepted, lengths: right(p, 0 * q, accepted, lengths),
    ),
    "the bonus token is drawn one slot early": Fault(
        "decoding.verification:next_distribution",
        lambda right, p, *rest: right(p[:, [0, *range(p.shape[1] - 1)]], *rest),
    ),
    "the target keeps what was rejected": Fault(
        "model.target:TargetCache.commit", target_keeps_all
    ),
    "the drafter's context is that of the token before": Fault(
        "model.drafter:Drafter.read", drafter_reads_the_token_before
    ),
    "the threshold reads the confidence behind the token": Fault(
        "decoding.settings:confident_prefix",
        lambda right, confidence, threshold: right(confidence.roll(-1, 1), threshold),
    ),
}
# Of estimates of gradient noise and progress; `tests/test_progress.py` notices them.
ESTIMATES: dict[str, Fault] = {
    "a conversation is a pair with itself": Fault(
        "tuning.noise:_mean_of_pairs",
        lambda right, cross, times: ((times @ cross) * times).sum(axis=1) / times.sum(axis=1) ** 2,
    ),
    "what all gradients share is what sets conversations apart": Fault(
        "tuning.noise:Moments.estimates",
        changed_result(lambda found: found + found[:, :1] * np.array([0, 1, 0, 0])),
    ),
    "neighbours share no label": Fault(
        "tuning.noise:label_overlap", changed_result(lambda overlap: 0 * overlap)
    ),
    "squares are those of the largest gradients": Fault(
        "tuning.noise:_unit", changed_result(lambda unit: 0 * unit + 1)
    ),
    "a short answer has as many anchors as a long one": Fault(
        "tuning.progress:_anchors_drawn",
        lambda right, num_anchors, candidates: 0 * candidates + num_anchors,
    ),
    "anchors are drawn with replacement": Fault(
        "tuning.progress:_pair_chance", lambda right, drawn, candidates: (drawn / candidates) ** 2
    ),
    "each block is of another conversation": Fault(
        "tuning.progress:dilution", changed_result(lambda found: replace(found, rows=found.alone))
    ),
    "noise stays as it was at first": Fault(
        "tuning.progress:_Course.noises", changed_result(lambda noises: 0 * noises + noises[0])
    ),
    "step times have no error": Fault(
        "tuning.progress:_step_seconds", changed_result(lambda times: times.assign(error=0.0))
    ),
}
TUNE: dict[str, Fault] = {
    "what is covered counts twice": Fault(
        "tuning.coverage:_covered", changed_result(lambda covered: 2 * covered)
    ),
    "slots have the same weight": Fault(
        "model.slotwise:decay_weights", changed_result(lambda weights: 0 * weights + 1)
    ),
    "the target is read backward too": Fault(
        "tuning.cost:_backward",
        lambda right, products, *, input_needs_gradient: right(products, input_needs_gradient=True),
    ),
    "the optimiser keeps one moment": Fault(
        "tuning.moments:StepBytes.always",
        changed_result(lambda held: held | {"optimiser": held["optimiser"] // 2}),
    ),
    "a card's memory is all for tensors": Fault(
        "tuning.memory:usable_bytes", lambda right, memory, usable=1.0: right(memory, 1.0)
    ),
    "the best gains most a byte": Fault(
        "tuning.choice:_ranked",
        lambda right, table: table.loc[
            right(table.assign(gain_per_second=table["gain_per_byte"])).index
        ],
    ),
    "every trainer packs as the lab does": Fault(
        "tuning.settings:_require_rows", lambda right, settings, program: None
    ),
    "a pilot's own time is free": Fault("tuning.judging:_kept", lambda right, table, one, by: 1.0),
    "a run never wanders from its curve": Fault(
        "tuning.extrapolation:_wander", changed_result(lambda covariance: 0 * covariance)
    ),
}
# Those of the estimates that the notebook's stored measurements can show, too.
TUNE |= {
    name: ESTIMATES[name]
    for name in (
        "a conversation is a pair with itself",
        "what all gradients share is what sets conversations apart",
        "a short answer has as many anchors as a long one",
        "anchors are drawn with replacement",
        "each block is of another conversation",
        "step times have no error",
    )
}
SERVE: dict[str, Fault] = {
    "a rejection costs nothing": Fault(
        "serving.costs:expected_replay_seconds", changed_result(lambda seconds: 0 * seconds)
    ),
    "a profile is of the highest temperature": Fault(
        "serving.profile:rows_of",
        lambda right, trace, drafter, temperature: (
            right(trace, drafter, trace["temperature"].max())[0],
            drafter,
            temperature,
        ),
    ),
    "verifying costs as much as plain decoding": Fault(
        "serving.costs:expected_verify_seconds",
        lambda right, verify, verified: right(verify, 0 * verified),
    ),
    "a threshold lets its own slot through": Fault(
        "serving.thresholds:thresholds_at",
        changed_result(lambda own_and_before: (own_and_before[1], own_and_before[1])),
    ),
    "drafting is as quick for many as for one": Fault(
        "serving.engine:Engine.draft_seconds",
        lambda right, engine, requests, length: right(engine, 0 * requests + 1, length),
    ),
    "the scheduler looks back": Fault(
        "serving.schedule:prefix_schedule",
        lambda right, *args: importlib.import_module(
            "dspark_lab.serving.schedule"
        ).retrospective_schedule(*args),
    ),
    "a round has no token of the target's own": Fault(
        "serving.load:answer_growth",
        lambda right, accepted, left: right(max(accepted - 1, 0), left),
    ),
    "acceptance does not depend on the block": Fault(
        "serving.requests:accepted_slots",
        lambda right, survival, block, uniform: right(
            0 * survival + survival.mean(axis=0), block, uniform
        ),
    ),
}
READ: dict[str, Fault] = {
    "a server's tau leaves out the target's own token": Fault(
        "records.record:AcceptanceRecord.tau_table",
        changed_result(lambda table: table.assign(tau=table["tau"] - 1)),
    ),
    "survival is taken for the accept rate": Fault(
        "records.record:AcceptanceRecord.sums",
        changed_result(lambda sums: sums.assign(reached=sums["rounds"])),
    ),
    "whatever writes a line, it is a request": Fault(
        "records.record:Tally.record",
        changed_result(lambda record: replace(record, unit="request")),
    ),
    "rounds of a log are never exact": Fault(
        "records.logs:_rounds", changed_result(lambda found: (found[0], False))
    ),
    "ids of requests are not looked at": Fault(
        "records.compare:_pairs", lambda right, before, after: None
    ),
    "depth counts rounds": Fault(
        "rates.stretches:depth_table",
        lambda right, trace: right(trace.assign(position=trace["round"])),
    ),
    "records have hardly any chance": Fault(
        "records.causes:_covariance", changed_result(lambda covariance: covariance / 100)
    ),
    "of each cause one case is known": Fault(
        "records.causes:likelihoods",
        lambda right, difference, noise, signatures: right(
            difference, noise, signatures.drop_duplicates("cause")
        ),
    ),
    "a label's requests are all requests": Fault(
        "records.record:AcceptanceRecord.part", lambda right, record, **about: record
    ),
    "confidences belong to the slot before": Fault(
        "records.dump:dump_trace",
        changed_result(
            lambda trace: trace.assign(confidence=trace["confidence"].shift(-1, fill_value=0.5))
        ),
    ),
    "gains are over a draft of one token": Fault(
        "serving.speedup:gain_by_length",
        lambda right, profile, costs, served: right(profile, costs, 1),
    ),
    "a threshold loses what it gains": Fault(
        "records.decision:_threshold",
        changed_result(lambda row: row | {"gain_percent": -row["gain_percent"]}),
    ),
}
NOTEBOOKS = {
    "01_anchors.ipynb": ANCHORS,
    "02_block_masks.ipynb": MASKS,
    "03_train_a_drafter.ipynb": TRAIN,
    "04_accept_rates.ipynb": RATES,
    "05_decode.ipynb": DECODE,
    "06_tune_training.ipynb": TUNE,
    "07_tune_serving.ipynb": SERVE,
    "08_read_a_server.ipynb": READ,
}
FAULTS = {name: fault for faults in NOTEBOOKS.values() for name, fault in faults.items()}


def plant(monkeypatch: Any, fault: Fault) -> None:
    """Put a fault in place wherever the library holds the function, until the test ends."""
    owner, name = fault.owner(importlib.import_module(fault.module))
    right = vars(owner)[name]
    faulty = fault.faulty(right)
    monkeypatch.setattr(owner, name, faulty)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("dspark_lab"):
            for held, value in list(vars(module).items()):
                if value is right:
                    monkeypatch.setattr(module, held, faulty)


def environment_with(name: str) -> dict[str, str]:
    """The environment of a process in which the fault ``name`` is planted."""
    path = os.pathsep.join((str(TESTS / "startup"), str(TESTS), str(TESTS.parent)))
    return os.environ | {"PYTHONPATH": path, "DSPARK_LAB_FAULT": name}


class Planter(importlib.abc.MetaPathFinder):
    """Plants a fault in its module as soon as the module has been imported."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.fault.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_plant(module: Any) -> None:
            execute(module)
            owner, held = self.fault.owner(module)
            setattr(owner, held, self.fault.faulty(vars(owner)[held]))

        spec.loader.exec_module = execute_and_plant
        return spec
