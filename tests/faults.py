"""Planted faults: a function of the library and what replaces it, by name.

A fault wraps the right function and changes what goes in or what comes out, so that moving or
reformatting the right code breaks no fault. ``plant`` puts one in place for the rest of a test;
with ``DSPARK_LAB_FAULT`` set to a fault's name and ``tests/startup`` on the path, a new process has
it from the start (``environment_with``).
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

ANCHORS, MASKS = "01_anchors.ipynb", "02_block_masks.ipynb"
TRAIN, RATES, DECODE = "03_train_a_drafter.ipynb", "04_accept_rates.ipynb", "05_decode.ipynb"
TUNE, SERVE = "06_tune_training.ipynb", "07_tune_serving.ipynb"

Function = Callable[..., Any]


class Fault(NamedTuple):
    """``where`` is "package.module:function" or "package.module:Class.method"; ``wrong`` makes the
    faulty function from the right one; ``notebook`` is the one that must notice."""

    where: str
    wrong: Callable[[Function], Function]
    notebook: str = ""

    @property
    def module(self) -> str:
        return self.where.partition(":")[0]

    def owner(self, module: Any) -> tuple[Any, str]:
        """The module or class that holds the function, and the function's name there."""
        *classes, name = self.where.partition(":")[2].split(".")
        for part in classes:
            module = getattr(module, part)
        return module, name

    def faulty(self, right: Any) -> Any:
        """The faulty function; a static or class method stays one."""
        if isinstance(right, (staticmethod, classmethod)):
            return type(right)(self.wrong(right.__func__))
        return self.wrong(right)


def changed_result(change: Callable[..., Any]) -> Callable[[Function], Function]:
    """The fault that returns ``change(result)``."""

    def wrong(right: Function) -> Function:
        return lambda *args, **kwargs: change(right(*args, **kwargs))

    return wrong


def changed_argument(name: str, change: Callable[..., Any]) -> Callable[[Function], Function]:
    """The fault that changes an argument that is given by keyword."""

    def wrong(right: Function) -> Function:
        return lambda **given: right(**(given | {name: change(given[name])}))

    return wrong


def first_slot_last(query: Any, block_size: int) -> Any:
    """All slots, ``[batch, query, ...]``, with slot 0 of each block moved to the block's end."""
    return query.unflatten(1, (-1, block_size)).roll(-1, dims=2).flatten(1, 2)


def target_keeps_all(commit: Function) -> Function:
    """In a round, the target's cache keeps every token that was read."""

    def wrong(self: Any, counts: Any, kept: Any = None) -> None:
        if kept is not None:
            new = self.states.get_seq_length() - self.rows.width
            counts = [new if count else 0 for count in counts]
        commit(self, counts, kept)

    return wrong


def drafter_reads_the_token_before(read: Function) -> Function:
    """In a round, the drafter's context is that of the token before."""

    def wrong(self: Any, context: Any, cache: Any, counts: Any) -> None:
        read(self, context.roll(1, 1) if any(cache.rows.lengths) else context, cache, counts)

    return wrong


FAULTS: dict[str, Fault] = {
    "dummy anchors are kept": Fault(
        "dspark_lab.common:sample_anchor_positions",
        changed_result(lambda drawn: (drawn[0], drawn[1] | True)),
        MASKS,
    ),
    "labels are off by one": Fault(
        "dspark_lab.blocks:_label_positions",
        lambda right: lambda anchors, keep, **sizes: right(anchors - 1, keep, **sizes),
        ANCHORS,
    ),
    "supervision jumps over gaps": Fault(
        "dspark_lab.common:_contiguous_prefix",
        lambda right: lambda supervised: supervised,
        MASKS,
    ),
    "supervision ignores the keep mask": Fault(
        "dspark_lab.common:build_eval_mask",
        changed_argument("block_keep_mask", lambda keep: keep | True),
        MASKS,
    ),
    "supervision ignores the end of the document": Fault(
        "dspark_lab.common:build_eval_mask",
        changed_argument("doc_remaining", lambda remaining: remaining * 0 + 10**6),
        MASKS,
    ),
    "candidates need no second token": Fault(
        "dspark_lab.common:_pairs",
        lambda right: lambda supervised: supervised[:, :-1].clone(),
        ANCHORS,
    ),
    "candidates ignore the end of the document": Fault(
        "dspark_lab.common:build_anchor_candidate_mask",
        lambda right: lambda seq_len, loss_mask, doc_remaining=None: right(seq_len, loss_mask),
        MASKS,
    ),
    "the largest random numbers become anchors": Fault(
        "dspark_lab.common:_uniform", changed_result(lambda noise: 1 - noise), ANCHORS
    ),
    "positions are off by one": Fault(
        "dspark_lab.common:create_position_ids", changed_result(lambda ids: ids + 1), MASKS
    ),
    "positions do not restart in a document": Fault(
        "dspark_lab.common:create_position_ids",
        lambda right: lambda anchors, block_size, context_position_ids: right(anchors, block_size),
        MASKS,
    ),
    "the anchor's token is in the last slot": Fault(
        "dspark_lab.common:create_noise_embed",
        lambda right: lambda **given: first_slot_last(right(**given), given["block_size"]),
        MASKS,
    ),
    "dummy blocks read a token": Fault(
        "dspark_lab.common:create_noise_embed",
        changed_argument("block_keep_mask", lambda keep: keep | True),
        MASKS,
    ),
    "the context includes the anchor": Fault(
        "dspark_lab.attention.mask:in_context_prefix",
        lambda right: lambda key, start, end: right(key, start, end + 1),
        MASKS,
    ),
    "the context leaves the document": Fault(
        "dspark_lab.attention.mask:document_starts",
        changed_result(lambda start: start * 0),
        MASKS,
    ),
    "blocks see each other": Fault(
        "dspark_lab.attention.mask:in_own_block",
        lambda right: lambda query, key, seq_len, _: right(query, key, seq_len, 2**40),
        MASKS,
    ),
    "a block is causal": Fault(
        "dspark_lab.attention.mask:in_own_block",
        lambda right: (
            lambda query, key, seq_len, block_size: (
                right(query, key, seq_len, block_size) & (key <= seq_len + query)
            )
        ),
        MASKS,
    ),
    "dummy blocks do not see themselves": Fault(
        "dspark_lab.attention.mask:mask_mod",
        lambda right: (
            lambda ranges: (
                lambda batch, head, query, key: (
                    right(ranges)(batch, head, query, key)
                    & (ranges.end[batch, query // ranges.block_size] > 0)
                )
            )
        ),
        MASKS,
    ),
    "a tile is full where it is partial": Fault(
        "dspark_lab.attention.mask:tiles_of_ranges",
        changed_result(lambda tiles: (tiles[0], tiles[1][[0, 0]])),
        MASKS,
    ),
    "a tile is empty where it is partial": Fault(
        "dspark_lab.attention.mask:tiles_of_ranges",
        changed_result(lambda tiles: (tiles[0], tiles[1][[1, 1]].maximum(tiles[0]))),
        MASKS,
    ),
    "accept rates are those of a smaller distance": Fault(
        "dspark_lab.model.slotwise:rate_of_distance",
        lambda right: lambda l1: right(l1 * 2 / 3),
        TRAIN,
    ),
    "an evaluation counts blocks that are cut off": Fault(
        "dspark_lab.rates.teacher_forced:whole_block_anchors",
        lambda right: lambda batch, block_size: right(batch, 1),
        TRAIN,
    ),
    "teacher-forced slots are reached whatever came before": Fault(
        "dspark_lab.rates.survival:slot_before",
        lambda right: lambda values: np.ones_like(values),
        RATES,
    ),
    "a calibration error lets gaps cancel out": Fault(
        "dspark_lab.rates.scores:binned_error",
        lambda right: lambda f, o, bins, binning, weights=None: right(f, o, 1, binning, weights),
        RATES,
    ),
    "a temperature multiplies": Fault(
        "dspark_lab.rates.scaling:temperature_scale",
        lambda right: lambda confidence, temperatures: right(confidence, 1 / temperatures),
        RATES,
    ),
    "temperatures are searched slot by slot": Fault(
        "dspark_lab.rates.scaling:search",
        lambda right: (
            lambda f, survival, weights, start, fixed, *how: np.concatenate(
                [
                    right(
                        f[:, [k]], survival[:, [k]], weights, start[[k]], [0] * (k in fixed), *how
                    )
                    for k in range(f.shape[1])
                ]
            )
        ),
        RATES,
    ),
    "bias is upside down": Fault(
        "dspark_lab.rates.calibration:confidence_error",
        changed_result(lambda error: -error),
        RATES,
    ),
    "tau lacks the target's own token": Fault(
        "dspark_lab.rates.acceptance:with_own_token",
        lambda right: lambda accepted: accepted,
        RATES,
    ),
    "the Markov head reads the token after the previous one": Fault(
        "dspark_lab.blocks:_previous_positions",
        lambda right: lambda anchors, **sizes: right(anchors + 1, **sizes),
        TRAIN,
    ),
    "the gate of the gated head stays open": Fault(
        "dspark_lab.model.heads:GatedHead.step",
        lambda right: lambda head, state, embedding, hidden: (None, embedding),
        TRAIN,
    ),
    "the RNN head forgets": Fault(
        "dspark_lab.model.heads:RnnHead.step",
        lambda right: lambda head, state, embedding, hidden: right(head, None, embedding, hidden),
        TRAIN,
    ),
    "the acceptance ratio is inverted": Fault(
        "dspark_lab.decoding.verification:acceptance",
        lambda right: lambda target_prob, draft_prob: right(draft_prob, target_prob),
        DECODE,
    ),
    "a rejected token is drawn from p": Fault(
        "dspark_lab.decoding.verification:next_distribution",
        lambda right: lambda p, q, accepted, lengths: right(p, 0 * q, accepted, lengths),
        DECODE,
    ),
    "the bonus token is drawn one slot early": Fault(
        "dspark_lab.decoding.verification:next_distribution",
        lambda right: lambda p, *rest: right(p[:, [0, *range(p.shape[1] - 1)]], *rest),
        DECODE,
    ),
    "the target keeps what was rejected": Fault(
        "dspark_lab.model.target:TargetCache.commit", target_keeps_all, DECODE
    ),
    "the drafter's context is that of the token before": Fault(
        "dspark_lab.model.drafter:Drafter.read", drafter_reads_the_token_before, DECODE
    ),
    "the threshold reads the confidence behind the token": Fault(
        "dspark_lab.decoding.settings:confident_prefix",
        lambda right: lambda confidence, threshold: right(confidence.roll(-1, 1), threshold),
        DECODE,
    ),
    "a slot behind a rejected one is reached": Fault(
        "dspark_lab.decoding.trace:reached_slots",
        lambda right: lambda verified, accepted: right(verified, accepted | True),
        RATES,
    ),
    "a rejection costs nothing": Fault(
        "dspark_lab.serving.costs:expected_replay_seconds",
        changed_result(lambda seconds: 0 * seconds),
        SERVE,
    ),
    "a profile is of the highest temperature": Fault(
        "dspark_lab.serving.profile:rows_of",
        lambda right: (
            lambda trace, drafter, temperature: (
                right(trace, drafter, trace["temperature"].max())[0],
                drafter,
                temperature,
            )
        ),
        SERVE,
    ),
    "verifying costs as much as plain decoding": Fault(
        "dspark_lab.serving.costs:expected_verify_seconds",
        lambda right: lambda verify, verified: right(verify, 0 * verified),
        SERVE,
    ),
    "a threshold lets its own slot through": Fault(
        "dspark_lab.serving.thresholds:thresholds_at",
        changed_result(lambda own_and_before: (own_and_before[1], own_and_before[1])),
        SERVE,
    ),
    "drafting is as quick for many as for one": Fault(
        "dspark_lab.serving.engine:Engine.draft_seconds",
        lambda right: lambda engine, requests, length: right(engine, 0 * requests + 1, length),
        SERVE,
    ),
    "the scheduler looks back": Fault(
        "dspark_lab.serving.schedule:prefix_schedule",
        lambda right: (
            lambda *args: importlib.import_module(
                "dspark_lab.serving.schedule"
            ).retrospective_schedule(*args)
        ),
        SERVE,
    ),
    "a round has no token of the target's own": Fault(
        "dspark_lab.serving.load:answer_growth",
        lambda right: lambda accepted, left: right(max(accepted - 1, 0), left),
        SERVE,
    ),
    "acceptance does not depend on the block": Fault(
        "dspark_lab.serving.requests:accepted_slots",
        lambda right: (
            lambda survival, block, uniform: right(
                0 * survival + survival.mean(axis=0), block, uniform
            )
        ),
        SERVE,
    ),
    "coverage forgets that anchors differ": Fault(
        "dspark_lab.tuning.coverage:_left_out",
        lambda right: lambda candidates, spared, before: right(candidates, spared, 0 * before),
        ANCHORS,
    ),
    "what is covered counts twice": Fault(
        "dspark_lab.tuning.coverage:_covered", changed_result(lambda covered: 2 * covered), TUNE
    ),
    "slots have the same weight": Fault(
        "dspark_lab.model.slotwise:decay_weights",
        changed_result(lambda weights: 0 * weights + 1),
        TUNE,
    ),
    "every token of an answer can be a label": Fault(
        "dspark_lab.tuning.coverage:_first_tokens", changed_result(lambda counts: 0 * counts), TUNE
    ),
    "the target is read backward too": Fault(
        "dspark_lab.tuning.cost:_backward",
        lambda right: (
            lambda products, *, input_needs_gradient: right(products, input_needs_gradient=True)
        ),
        TUNE,
    ),
    "the optimiser keeps one moment": Fault(
        "dspark_lab.tuning.moments:StepBytes.always",
        changed_result(lambda held: held | {"optimiser": held["optimiser"] // 2}),
        TUNE,
    ),
    "a card's memory is all for tensors": Fault(
        "dspark_lab.tuning.memory:usable_bytes",
        lambda right: lambda memory, usable=1.0: right(memory, 1.0),
        TUNE,
    ),
    "the best gains most a byte": Fault(
        "dspark_lab.tuning.choice:_ranked",
        lambda right: (
            lambda table: table.loc[
                right(table.assign(gain_per_second=table["gain_per_byte"])).index
            ]
        ),
        TUNE,
    ),
    "training starts without a warm-up": Fault(
        "dspark_lab.training.config:TrainConfig.learning_rate_at",
        lambda right: lambda config, step: right(replace(config, warmup_steps=0), step),
        TRAIN,
    ),
    "each cell's interval is of one drafter": Fault(
        "dspark_lab.tuning.cells:standard_error",
        lambda right: lambda spread, seeds: right(spread, 1),
        TUNE,
    ),
    "all trainers count a block alike": Fault(
        "dspark_lab.tuning.settings:slots_with_anchor",
        lambda right: lambda block_size: block_size,
        TUNE,
    ),
}


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
