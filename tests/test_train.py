"""The loop in one process: its order, its gradient, its files, and the ways in which it ends."""

import json
import math
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import tyro
from safetensors.torch import load_file

from dspark_lab.chats import Batch, Encoded, pack
from dspark_lab.model import Target, Yarn, load_drafter, load_target, output_objective
from dspark_lab.rates import evaluate
from dspark_lab.training import (
    BatchOrder,
    History,
    Processes,
    Run,
    TrainConfig,
    checkpoints,
    init_from_target,
    loop,
    mask_token_id,
    new_drafter,
    read_run,
    state,
    train,
)
from dspark_lab.training.__main__ import Options, main
from dspark_lab.training.start import spread_layers
from tests import runs
from tests.runs import CONFIG, STEPS, ending, in_processes, interrupt_at, small_run
from tests.samples import CHAT, random_chats, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    small_run(out)
    return out


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that was stopped after its fourth step, with a checkpoint."""
    out = tmp_path / "begun"
    small_run(out, on_metrics=interrupt_at(4))
    return out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be >= 1, got 0"),
        ("seed", -1, "seed must be >= 0"),
        ("pack_length", 100, "pack_length must be at least max_length, 2048, got 100"),
        ("schedule", "step", "schedule must be .*'linear'.* got 'step'"),
        ("learning_rate", math.nan, "learning_rate must be finite, got nan"),
        ("beta2", 1, r"beta2 must lie in \[0, 0.99"),
        ("ce_only_fraction", 1.5, r"ce_only_fraction must lie in \[0, 1\], got 1.5"),
        ("loss_decay_gamma", 1e-300, "loss_decay_gamma must .*, got 1e-300"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**({"steps": 1} | {name: value}))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1, 1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)]),
    ],
)
def test_learning_rate_rises_and_falls(schedule: Any, rates: list[float]) -> None:
    config = TrainConfig(
        6, schedule=schedule, warmup_steps=2, learning_rate=3.0, final_lr_ratio=0.2
    )
    found = [config.learning_rate_at(step) / 3 for step in range(6)]
    assert found == pytest.approx(rates)


def test_terms_move_from_cross_entropy_to_the_given_weights() -> None:
    config = TrainConfig(10, ce_only_fraction=0.4)
    found = [list(config.term_weights_at(step).values()) for step in (0, 1, 4, 9)]
    expected = [[1, 0, 0], [0.775, 0.225, 0.25], [0.1, 0.9, 1], [0.1, 0.9, 1]]
    assert found == [pytest.approx(weights) for weights in expected]
    assert list(TrainConfig(10).term_weights_at(0).values()) == [0.1, 0.9, 1.0]


def batches(order: BatchOrder, step: int) -> list[tuple[list[int], int]]:
    """For each micro-batch of a step the conversations in it and the seed of its blocks."""
    found = order.micro_batches(step)
    return [(sorted(batch.chat_index.flatten().tolist()), seed) for batch, seed in found]


def order_of(config: TrainConfig) -> BatchOrder:
    return BatchOrder(random_chats(20), config)


def test_an_epoch_holds_every_conversation_once_in_an_order_of_its_own() -> None:
    order = order_of(TrainConfig(8, batch_size=5))
    epochs = [[batches(order, step)[0][0] for step in range(e, e + 4)] for e in (0, 4)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(20))
    assert epochs[0] != epochs[1]
    other = order_of(TrainConfig(8, batch_size=5, seed=1))
    assert [batches(other, step)[0][0] for step in range(4)] != epochs[0]


def test_a_batch_holds_conversations_of_similar_length() -> None:
    chats = random_chats(300)
    order = BatchOrder(chats, TrainConfig(60, batch_size=5))
    spread = 0
    for step in range(60):
        [(indices, _)] = batches(order, step)
        lengths = [len(chats[index]) for index in indices]
        spread += max(lengths) - min(lengths)
    # Five conversations drawn at random are 18 tokens apart in the mean.
    assert spread / 60 < 5


@pytest.mark.parametrize("pack_length", [None, 90])
def test_a_row_holds_one_conversation_or_as_many_as_fit(pack_length: int | None) -> None:
    chats = random_chats(20)
    config = TrainConfig(4, batch_size=3, max_length=80, pack_length=pack_length)
    [(batch, _)] = BatchOrder(chats, config, pad_token_id=7).micro_batches(0)
    longest = max(len(chats[index]) for index in batch.chat_index.flatten() if index >= 0)
    assert batch.input_ids.shape == (3, pack_length or longest)
    assert (batch.seq_lens.shape[1] > 1) == (pack_length is not None)
    assert (batch.input_ids[~batch.attention_mask] == 7).all()
    for indices, lengths, ids in zip(
        batch.chat_index, batch.seq_lens, batch.input_ids, strict=True
    ):
        here = [chats[index].input_ids for index in indices if index >= 0]
        assert torch.equal(torch.cat(here), ids[: int(lengths.sum())])


def held_together(batch: Batch) -> list[tuple[int, ...]]:
    """The conversations of each row."""
    return [tuple(i for i in row if i >= 0) for row in batch.chat_index.tolist()]


def test_an_epoch_holds_every_packed_row_once_whatever_the_processes() -> None:
    chats = random_chats(40)
    settings: dict[str, Any] = {"batch_size": 3, "max_length": 60, "pack_length": 60}
    config = TrainConfig(99, accumulate=2, **settings)
    packed = held_together(pack(chats, 60, 0))
    seen: dict[int, list[tuple[int, ...]]] = {}
    for rank, step in product((0, 1), range(9)):
        order = BatchOrder(chats, config, rank=rank, processes=2)
        for batch, place in order.micro_batches(step):
            assert place not in seen
            seen[place] = held_together(batch)
    per_epoch = len(packed) // 3
    assert sorted(seen) == list(range(36)) and 36 > 2 * per_epoch and len(packed) % 3
    for first in (0, per_epoch):
        epoch = sum((seen[place] for place in range(first, first + per_epoch)), [])
        assert len(set(epoch)) == 3 * per_epoch and set(epoch) <= set(packed)


def test_a_step_follows_from_seed_and_number_alone() -> None:
    config = TrainConfig(9, batch_size=3, accumulate=2)
    order = order_of(config)
    for step in (7, 0, 3, 8, 1):
        assert batches(order, step) == batches(order_of(config), step)
    seeds = [seed for step in range(9) for _, seed in batches(order, step)]
    assert len(set(seeds)) == 18


def double_run(
    config: TrainConfig, out: Path, chats: list[Encoded], **shape: Any
) -> tuple[Run, Target]:
    """A run that has not taken a step, in float64, and its target."""
    target, drafter = runs.double_pair(**shape)
    return Run(drafter, config, chats, out, Processes()), target


PACKED = {"accumulate": 2, "pack_length": 60, "max_length": 60, "batch_size": 1}


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"accumulate": 3}, {}),
        ({"accumulate": 2, "pack_length": 60, "max_length": 60}, {"markov_head_type": "rnn"}),
        (PACKED | {"anchors_per": "document", "num_anchors": 2}, {}),
        (PACKED | {"anchors_per": "batch"}, {}),
        ({"accumulate": 4, "batch_size": 1, "ce_only_fraction": 1.0}, {}),
    ],
)
def test_gradient_of_an_accumulated_step_is_that_of_the_joined_batch(
    settings: dict[str, Any], shape: dict[str, Any], tmp_path: Path
) -> None:
    config = TrainConfig(4, **({"batch_size": 2, "num_anchors": 5} | settings))
    chats = runs.uneven_chats(8)
    run, target = double_run(config, tmp_path, chats, **shape)
    slots: list[int] = []
    for step in range(2):
        run.step = step
        loss, stacked, tokens = run.backward(loop.live_features(target, (0, 1)))
        found = runs.gradients(run.drafter)
        run.drafter.zero_grad()
        parts = runs.parts_of_step(chats, config, run.drafter, step)
        output = runs.joined_output(run.drafter, target, parts)
        joined = output_objective(output, **config.term_weights_at(step))
        joined.loss.backward()
        expected = runs.gradients(run.drafter)
        run.drafter.zero_grad()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss, joined.loss.detach(), rtol=1e-9, atol=1e-12)
        counted = torch.tensor([0, 1, 8])  # count, weight, survival
        torch.testing.assert_close(stacked[counted], joined.sums.stacked()[counted])
        assert tokens == sum(int(batch.seq_lens.sum()) for batch, _ in parts)
        slots += [int(blocks.eval_mask.sum()) for _, blocks in parts]
    assert len(set(slots)) > 1
    if config.batch_size == 1:
        assert 0 in slots


def test_a_step_without_any_supervised_slot_changes_no_weight(tmp_path: Path) -> None:
    silent = [Encoded(c.input_ids, torch.zeros_like(c.loss_mask), CHAT) for c in random_chats(2)]
    run, target = double_run(TrainConfig(1, batch_size=2), tmp_path, silent)
    before = {name: p.detach().clone() for name, p in run.trained.items()}
    row, _ = run.advance(loop.live_features(target, (0, 1)))
    assert row["loss"] == 0 and math.isnan(row["tau"])
    assert all(torch.equal(p, before[name]) for name, p in run.trained.items())


@pytest.mark.parametrize("progress", [True, False])
def test_conversations_without_a_label_are_counted(
    progress: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # An answer of one token is no label: its anchor would be a token of the prompt.
    lone = Encoded(torch.arange(9), torch.arange(9) == 7, CHAT)
    config, chats = TrainConfig(1, batch_size=1), [*random_chats(2), lone]
    history = small_run(tmp_path, config, chats=chats, progress=progress)
    assert history.unlabelled == 1
    assert ("1 of 3 conversations have no label" in capsys.readouterr().err) == progress


def test_vocabulary_of_seen_tokens_is_a_softmax_over_them(tmp_path: Path) -> None:
    config = TrainConfig(1, batch_size=2, num_anchors=5, vocabulary="seen")
    chats = [Encoded(c.input_ids % 17 + 2, c.loss_mask, CHAT) for c in random_chats(2)]
    run, target = double_run(config, tmp_path, chats)
    loss, *_ = run.backward(loop.live_features(target, (0, 1)))
    found = runs.gradients(run.drafter)
    run.drafter.zero_grad()
    seen = torch.cat([c.input_ids for c in chats]).unique()
    [part] = runs.parts_of_step(chats, config, run.drafter, 0)
    output = runs.joined_output(run.drafter, target, [part])
    restricted = replace(
        output,
        draft_logits=output.draft_logits[..., seen],
        aligned_target_logits=output.aligned_target_logits[..., seen],
        target_ids=torch.searchsorted(seen, output.target_ids),
    )
    expected = output_objective(restricted).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, runs.gradients(run.drafter))


def test_weight_decay_is_for_matrices_alone(tmp_path: Path) -> None:
    after = {}
    for decay in (0.0, 0.5):
        drafter = tiny_drafter(4)
        config = replace(CONFIG, steps=1, weight_decay=decay)
        small_run(tmp_path / str(decay), config, drafter=drafter, held_out=())
        after[decay] = {n: p.detach() for n, p in drafter.named_parameters() if p.requires_grad}
    for name, start in tiny_drafter(4).named_parameters():
        if name in after[0.0]:
            # The first of two steps of warm-up.
            shrunk = 0.5 * config.learning_rate / 2 * start.detach() * (start.dim() > 1)
            torch.testing.assert_close(after[0.5][name], after[0.0][name] - shrunk)
    assert any(p.dim() == 1 for p in after[0.0].values())


def test_clipping_bounds_the_gradient_that_the_optimiser_sees(tmp_path: Path) -> None:
    seen: list[float] = []
    for clip in (0.0, 0.01):
        config = TrainConfig(1, batch_size=2, clip_norm=clip)
        run, target = double_run(config, tmp_path, random_chats(4))

        def look(*_: Any, run: Any = run) -> None:
            grads = [p.grad.flatten() for p in run.trained.values() if p.grad is not None]
            seen.append(float(torch.cat(grads).norm()))

        run.optimizer.register_step_pre_hook(look)
        row, _ = run.advance(loop.live_features(target, (0, 1)))
        # The norm that is reported is that before clipping.
        assert row["grad_norm"] == pytest.approx(seen[0], abs=1e-5)
    assert seen == [pytest.approx(row["grad_norm"], abs=1e-5), pytest.approx(0.01, rel=1e-3)]
    assert seen[0] > 0.05


@pytest.mark.parametrize("better", [True, False])
def test_the_signs_of_a_run_weigh_its_ends(better: bool) -> None:
    # Of 20 steps the first and last two count; what lies between pulls the other way.
    values = [0.0, 1.0, *[3.0] * 8, *[0.0] * 8, 1.0, 2.0]
    rows = [
        {"step": step, "loss": -value, "accept_rate": value, "tau": value}
        for step, value in enumerate(values if better else values[::-1], start=1)
    ]
    history = History(Path("run"), [*rows, {"step": 20, "held_out_tau": 0.0}])
    assert history.signs() == dict.fromkeys(("loss fell", "accept rate rose", "tau rose"), better)
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        History(Path("run"), rows[:1]).signs()


def test_target_and_its_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    target, drafter = tiny_target(), tiny_drafter()
    small_run(tmp_path, target=target, drafter=drafter)
    assert drafter.embed_tokens.weight.data_ptr() == target.embed_weight.data_ptr()
    assert drafter.lm_head.weight.data_ptr() == target.head_weight.data_ptr()
    before = dict(tiny_target().model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in target.model.named_parameters())


def test_bfloat16_is_for_products_and_weights_stay_wide(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        drafter = tiny_drafter(4).bfloat16()
        config = replace(CONFIG, steps=2, precision=precision)
        history = small_run(tmp_path / precision, config, drafter=drafter, held_out=())
        trained = [p for p in drafter.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        # A step of 1e-2 x warm-up moves weights by less than bfloat16 could tell.
        assert any(not torch.equal(p, p.bfloat16().float()) for p in trained)
        losses[precision] = history.rows[1]["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_used(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Any, batch: Any) -> Any:
        given = source(batch)
        return SimpleNamespace(context=given.context / 0, last=given.last)

    monkeypatch.setattr(loop, "live_features", runs.on_batch(4, broken))
    drafter = tiny_drafter(4)
    with pytest.raises(FloatingPointError, match="step 4 is not finite .*lower learning_rate"):
        small_run(tmp_path, drafter=drafter)
    assert all(bool(p.isfinite().all()) for p in drafter.parameters())
    monkeypatch.undo()
    small_run(tmp_path)
    assert ending(tmp_path) == ending(whole)


@pytest.mark.parametrize("pack_length", [None, 80])
def test_cached_features_make_the_same_run(pack_length: int | None, tmp_path: Path) -> None:
    target, _ = runs.double_pair()
    config = replace(CONFIG, steps=3, max_length=40, pack_length=pack_length)
    losses = {}
    for features in ("live", "cached"):
        options: dict[str, Any] = {"target": target, "drafter": tiny_drafter(4).double()}
        history = small_run(tmp_path / features, config, features=features, **options)
        losses[features] = history.table()["loss"].tolist()
    assert losses["live"] == pytest.approx(losses["cached"], abs=2e-5)
    assert len(set(losses["live"])) == 3
    assert list((tmp_path / "cached" / "features").glob("*.safetensors"))


def test_every_step_has_a_line_that_any_json_reader_reads(whole: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (whole / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    names = "step loss ce l1 confidence accept_rate tau slots tokens lr grad_norm seconds"
    assert all(list(row) == names.split() for row in steps)
    evaluations = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6, 7]
    names = "step held_out_tau low high accept_by_slot"
    assert all(list(row) == names.split() for row in evaluations)
    assert all(row["low"] <= row["held_out_tau"] <= row["high"] for row in evaluations)


def test_metrics_are_those_of_the_joined_batch(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1, accumulate=2)
    history = small_run(tmp_path, config, held_out=())
    drafter, target, chats = tiny_drafter(4), tiny_target(), random_chats(11)
    drafter.use_target_embeddings(target.embed_weight, target.head_weight)
    parts = runs.parts_of_step(chats, config, drafter, 0)
    joined = output_objective(runs.joined_output(drafter, target, parts))
    expected = joined.sums.summary() | {"loss": joined.loss.item()}
    [row] = history.rows
    for name in ("loss", "ce", "l1", "confidence", "accept_rate", "tau"):
        assert row[name] == pytest.approx(expected[name], abs=2e-5), name
    assert row["slots"] == expected["slots"]
    assert row["lr"] == pytest.approx(config.learning_rate / 2)


def test_what_has_no_value_is_null_on_disk_and_nan_in_the_table(tmp_path: Path) -> None:
    plain = {"enable_confidence_head": False, "confidence_head_with_markov": False}
    config = replace(CONFIG, steps=2)
    small_run(tmp_path, config, drafter=tiny_drafter(**plain), held_out=())
    assert '"confidence": null' in (tmp_path / "metrics.jsonl").read_text()
    found = History.read(tmp_path).table()["confidence"]
    assert found.isna().all() and found.dtype == float


def test_history_and_callback_have_every_line(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        seen.append(row)
        assert runs.count_lines(tmp_path) == len(seen)

    history = small_run(tmp_path, replace(CONFIG, steps=3), on_metrics=note)
    assert seen == history.rows and not history.interrupted
    assert history.table()["step"].tolist() == [1, 2, 3]
    assert history.evaluations()["step"].tolist() == [2, 3]


def test_evaluation_line_is_that_of_the_checkpoint(whole: Path) -> None:
    target = tiny_target()
    drafter = load_drafter(checkpoints(whole)[-1], target=target)
    table = evaluate(drafter, target, random_chats(3, seed=9), num_anchors=4)
    last = ending(whole)[2][-1]
    assert last["held_out_tau"] == pytest.approx(table["tau"].mean(), abs=1e-4)
    rates = [table[f"accept_{k}"].mean() for k in range(3)]
    assert last["accept_by_slot"] == pytest.approx(rates, abs=1e-4)


@pytest.mark.parametrize("moment", runs.MOMENTS)
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    moment: str, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    assert in_processes(1, runs.killed_run, out, moment, folder=tmp_path) == [-signal.SIGKILL]
    assert checkpoints(out)
    for checkpoint in checkpoints(out):
        load_drafter(checkpoint, target=tiny_target())
    small_run(out)
    assert ending(out) == ending(whole)
    left = {checkpoints(out)[-1].name, "metrics.jsonl", "run.json"}
    assert {path.name for path in out.iterdir()} == left


def test_a_run_killed_at_any_time_and_again_ends_with_the_same_bits(
    whole: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    out = tmp_path / "killed"
    for step in (1, 3, 5):
        assert runs.kill_when(step, out, delay=0.03 * rng.random()) == -signal.SIGKILL
        assert runs.count_lines(out) >= step
    small_run(out)
    assert ending(out) == ending(whole)


# A checkpoint is due after the fourth step, none after the third.
@pytest.mark.parametrize("step", [3, 4])
def test_an_interrupt_finishes_the_step_and_leaves_a_checkpoint(
    step: int, whole: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    history = small_run(tmp_path, on_metrics=interrupt_at(step))
    assert history.interrupted and history.rows[-1]["step"] == step
    assert signal.getsignal(signal.SIGINT) is before
    [checkpoint] = checkpoints(tmp_path)
    assert checkpoint.name == f"checkpoint-00000{step}"
    load_drafter(checkpoint, target=tiny_target())
    again = small_run(tmp_path)
    assert not again.interrupted
    assert ending(tmp_path) == ending(whole)


# A checkpoint is due after the fourth step, none after the third.
@pytest.mark.parametrize("stops", [[3], [4], [1, 6, 9]])
def test_a_run_that_stops_where_it_was_told_ends_with_the_same_bits(
    stops: list[int], whole: Path, tmp_path: Path
) -> None:
    for step in stops:
        history = small_run(tmp_path, until=step)
        reached = min(step, CONFIG.steps)
        assert history.interrupted == (reached < CONFIG.steps)
        assert history.table()["step"].max() == reached
        [checkpoint] = checkpoints(tmp_path)
        assert checkpoint.name == f"checkpoint-00000{reached}"
        # It is there already, and a step before it is, too.
        assert small_run(tmp_path, until=step).rows == history.rows
        assert small_run(tmp_path, until=1).rows == history.rows
    small_run(tmp_path)
    assert ending(tmp_path) == ending(whole)


def test_a_second_interrupt_is_as_always(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*given: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(state, "save_file", runs.on_call(2, state.save_file, impatient))
    # A process in the background may have begun with Ctrl-C switched off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            small_run(tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-000002"]
    small_run(tmp_path)
    assert ending(tmp_path) == ending(whole)


def run_with_small_files(rank: int, out: Path, most: int) -> str:
    """Under the kernel's limit to the size of files, which is as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        small_run(out)
    except OSError as error:
        return str(error)
    return "all was written"


def test_a_full_disk_is_said_and_the_earlier_checkpoint_goes_on(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    small_run(out, on_metrics=interrupt_at(2))
    most = (out / "checkpoint-000002" / "optimizer.safetensors").stat().st_size - 1000
    [said] = in_processes(1, run_with_small_files, out, most, folder=tmp_path)
    assert f"could not write {out}/checkpoint-000004" in said
    assert "what was saved before is intact: " in said
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-000002"]
    small_run(out)
    assert ending(out) == ending(whole)


def test_metrics_that_cannot_be_written_are_named(whole: Path, tmp_path: Path) -> None:
    metrics, kept = tmp_path / "metrics.jsonl", tmp_path / "kept"

    def fill_the_disk(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            metrics.rename(kept)
            metrics.symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"could not write .*metrics.jsonl, .*: No space left"):
        small_run(tmp_path, on_metrics=fill_the_disk)
    kept.replace(metrics)
    small_run(tmp_path)
    assert ending(tmp_path) == ending(whole)


def test_a_place_that_is_no_folder_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(NotADirectoryError, match=f"out must be a folder, got the file {file}"):
        small_run(file)
    with pytest.raises(OSError, match=f"could not write {file}/run.*Not a directory"):
        small_run(file / "run")
    assert file.read_text() == "mine"


def test_a_finished_run_is_read_and_not_repeated(whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    drafter = tiny_drafter(8)
    history = small_run(whole, drafter=drafter)
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert len(history.rows) == STEPS + 4
    assert history.rows == History.read(whole).rows
    stored = load_drafter(checkpoints(whole)[-1], target=tiny_target())
    for name, p in drafter.named_parameters():
        assert torch.equal(p, stored.get_parameter(name)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(CONFIG, seed=1)}, "seed must be as in the run .*, 0, got 1"),
        ({"drafter": tiny_drafter(block_size=4)}, "block_size must be as in .*, 3, got 4"),
        ({"chats": random_chats(11, seed=1)}, "data must be as in the run"),
        ({"resume": False}, "holds a run already"),
    ],
)
def test_a_run_is_not_gone_on_with_by_another(
    change: dict[str, Any], message: str, whole: Path
) -> None:
    before = ending(whole)
    with pytest.raises(ValueError, match=message):
        small_run(whole, **change)
    assert ending(whole) == before


def test_a_run_from_before_anchors_per_goes_on_per_row(whole: Path, begun: Path) -> None:
    [path] = begun.glob("*/state.json")
    state = json.loads(path.read_text())
    assert state["config"].pop("anchors_per") == "row"
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="anchors_per must be as in .*, 'row', got 'batch'"):
        small_run(begun, replace(CONFIG, anchors_per="batch"))
    small_run(begun)
    assert ending(begun) == ending(whole)
    # Packed runs from then had other batches.
    state["config"] |= {"pack_length": 64, "max_length": 64}
    [path] = begun.glob("*/state.json")
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="anchors_per must be as in .*, None, got 'row'"):
        small_run(begun, replace(CONFIG, pack_length=64, max_length=64))


def without_step_4(metrics: bytes) -> bytes:
    lines = metrics.splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(b'{"step": 4'))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("*/optimizer.safetensors", lambda data: data[:1000], "must be a whole safetensors file"),
        ("*/state.json", lambda data: data[:20], "must be a JSON file"),
        ("*/state.json", lambda data: b"{}", "must hold step, got None"),
        ("metrics.jsonl", without_step_4, "must have a line .* 4 steps .* none for step 4"),
        ("metrics.jsonl", lambda data: data[:9] + b"\n" + data, "must hold a step's metrics in"),
        ("metrics.jsonl", lambda data: b"[1]\n" + data, "must hold a step's metrics in each"),
    ],
)
def test_a_damaged_file_is_named(
    name: str, damage: Callable[[bytes], bytes], message: str, begun: Path
) -> None:
    [path] = begun.glob(name)
    path.write_bytes(damage(path.read_bytes()))
    readers: list[Callable[[Path], History]] = [small_run, History.read]
    for read in readers[: 1 if path.suffix == ".safetensors" else 2]:
        with pytest.raises(ValueError, match=f"{path} {message}"):
            read(begun)


def test_a_history_is_read_from_disk(whole: Path, begun: Path, tmp_path: Path) -> None:
    stopped = History.read(begun)
    assert stopped.interrupted and stopped.table()["step"].tolist() == [1, 2, 3, 4]
    assert not History.read(whole).interrupted
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint of a run, got none"):
        History.read(tmp_path)


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint_every=1, keep_checkpoints=3, steps=5)
    small_run(tmp_path, config, held_out=())
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-000003", "checkpoint-000004", "checkpoint-000005"]
    for name in ("checkpoint-1000000", "checkpoint-999999"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path)[-1].name == "checkpoint-1000000"


def test_a_checkpoint_has_the_files_and_names_that_earlier_runs_have(whole: Path) -> None:
    [folder] = checkpoints(whole)
    files = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    trained = {n for n, p in tiny_drafter().named_parameters() if p.requires_grad}
    assert set(load_file(folder / "model.safetensors")) == trained
    assert set(load_file(folder / "optimizer.safetensors")) == {
        f"{name}/{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert json.loads((folder / "state.json").read_text()) == {
        "step": STEPS,
        "config": asdict(CONFIG),
        "data": "3e99d084e71f36258faf1d66efc21b94",
        "processes": 1,
    }


def test_a_run_says_its_configuration_from_its_first_step_on(whole: Path, tmp_path: Path) -> None:
    found = []

    def read(row: dict[str, Any]) -> None:
        found.append(read_run(tmp_path))

    history = small_run(tmp_path, on_metrics=read)
    assert all(config == CONFIG for _, config in found)
    assert [rows for rows, _ in found] == [history.rows[:i] for i in range(1, len(found) + 1)]
    (tmp_path / "run.json").unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert read_run(tmp_path / "metrics.jsonl") == (history.rows, CONFIG)
    for folder in checkpoints(tmp_path):
        shutil.rmtree(folder)
    assert read_run(tmp_path) == (history.rows, None)
    (tmp_path / "run.json").write_text('{"steps": 0}')
    with pytest.raises(ValueError, match="must hold a configuration .* steps must be >= 1, got 0"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be the metrics of a run"):
        read_run(tmp_path / "other")


def test_what_the_caller_has_frozen_stays_so_and_comes_back(tmp_path: Path) -> None:
    def partly_frozen(seed: int) -> Any:
        drafter = tiny_drafter(seed)
        drafter.layers.requires_grad_(False)
        return drafter

    ended = {}
    for name, stop in (("whole", 0), ("stopped", 3)):
        small_run(tmp_path / name, drafter=partly_frozen(4), on_metrics=interrupt_at(stop))
        small_run(tmp_path / name, drafter=(drafter := partly_frozen(5)))
        ended[name] = drafter.state_dict()
        start = partly_frozen(4).layers.state_dict()
        torch.testing.assert_close(drafter.layers.state_dict(), start, rtol=0, atol=0)
    torch.testing.assert_close(ended["whole"], ended["stopped"], rtol=0, atol=0)


ONE_STEP = TrainConfig(1, batch_size=1, max_length=64)
SHORT = [Encoded(torch.arange(9), torch.arange(9) > 5, CHAT)]
CUT_OFF = [Encoded(torch.arange(70), torch.arange(70) > 62, CHAT)] * 4


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"drafter": None}, TypeError, "drafter must be .*Drafter.*, got None"),
        ({"chats": ["hello"]}, TypeError, "chats.* must be .*Chat.*Encoded.*, got .*'hello'"),
        ({"features": "disk"}, ValueError, "features must be .*'live'.*'cached'.*, got 'disk'"),
        ({"parallel": "ddp"}, ValueError, "'ddp' needs torch.distributed to be initialised"),
        ({"config": TrainConfig(1, 3)}, ValueError, "batch_size must be at most .*, 2, got 3"),
        ({"chats": [CHAT]}, ValueError, "target has no tokenizer"),
        ({"chats": CUT_OFF}, ValueError, "two supervised tokens .* max_length 64, got none in 4"),
        ({"held_out": SHORT}, ValueError, "held_out must have .* 4 supervised tokens in a row"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_done(
    change: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    given = {"drafter": tiny_drafter(), "target": tiny_target(), "chats": random_chats(2)}
    given |= {"config": ONE_STEP, "out": tmp_path / "run"}
    with pytest.raises(kind, match=message):
        train(**(given | change))
    assert not (tmp_path / "run").exists()


def test_a_drafter_starts_from_the_targets_last_layers() -> None:
    target, drafter = tiny_target(), tiny_drafter()
    queries = drafter.layers[0].self_attn.q_norm.weight.clone()
    init_from_target(drafter, target)
    layers = target.model.model.layers
    for own, theirs in zip(drafter.layers, layers[-2:], strict=True):
        for name, weight in theirs.named_parameters():
            assert torch.equal(own.get_parameter(name), weight), name
    assert torch.equal(drafter.norm.weight, target.model.model.norm.weight)
    features = torch.randn(5, 2, 32)
    torch.testing.assert_close(drafter.fc(features.flatten(1)), features.mean(dim=1))
    assert torch.equal(drafter.layers[0].self_attn.q_norm.weight, queries)


@pytest.mark.parametrize("sees_images", [False, True])
def test_a_drafter_starts_from_a_gemma(sees_images: bool) -> None:
    """Its norms multiply by 1 + weight, it has two RoPEs, and may be a part of another model."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config: Any = transformers.Gemma3TextConfig(**sizes)
    if sees_images:
        eye = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 28}
        eye |= {"num_attention_heads": 2, "patch_size": 14}
        config = transformers.Gemma3Config(text_config=sizes, vision_config=eye)
    target = Target(transformers.AutoModelForCausalLM.from_config(config))
    layers = target.model.get_decoder().layers
    layers[1].input_layernorm.weight.fill_(0.5)
    drafter = new_drafter(target, mask_token_id=0, num_hidden_layers=2)
    assert drafter.config.rope_theta == 1e6
    assert drafter.layers[0].input_layernorm.weight.unique().tolist() == [1.5]
    assert drafter.norm.weight.unique().tolist() == [1.0]
    assert torch.equal(drafter.layers[1].mlp.up_proj.weight, layers[2].mlp.up_proj.weight)


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="older transformers")
def test_a_drafter_starts_from_a_target_whose_layers_differ() -> None:
    config = transformers.Gemma4TextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=32,
        hidden_size_per_layer_input=0,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        final_logit_softcapping=30.0,
    )
    target = Target(transformers.AutoModelForCausalLM.from_config(config))
    found = new_drafter(target, mask_token_id=0).config
    assert (found.head_dim, found.num_key_value_heads, found.intermediate_size) == (8, 2, 48)
    assert found.final_logit_softcapping == 30.0 and found.rope_theta == 1e6


def test_a_drafter_starts_with_a_window_and_some_of_the_tokens(tmp_path: Path) -> None:
    target = tiny_target()
    kept = [9, 2, 31, 2, *range(40, 60)]
    made = new_drafter(target, mask_token_id=0, sliding_window=8, draft_ids=kept)
    assert made.config.layer_types == ("sliding_attention",) * 2 and made.config.sliding_window == 8
    assert made.draft_ids is not None and made.draft_ids.tolist() == sorted(set(kept))
    config = TrainConfig(steps=1, batch_size=2, num_anchors=2)
    train(made, target, random_chats(2), config, out=tmp_path / "run", progress=False)
    assert torch.equal(made.lm_head.weight, target.head_weight[sorted(set(kept))])
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None}
    target.model.config.rope_parameters = rope | {"original_max_position_embeddings": 16}
    longest = target.model.config.max_position_embeddings
    assert new_drafter(target, mask_token_id=0).config.yarn == Yarn(longest / 16, 16)
    with pytest.raises(ValueError, match=r"draft_ids must lie in \[0, 63\], got 1 to 64"):
        new_drafter(target, mask_token_id=0, draft_ids=[1, 64])


def test_what_does_not_fit_the_target_stays_random() -> None:
    drafter = tiny_drafter(intermediate_size=40, num_hidden_layers=4, target_hidden_size=16)
    before = {name: p.clone() for name, p in drafter.named_parameters()}
    init_from_target(drafter, tiny_target())
    for name, p in drafter.named_parameters():
        # Norm weights of an untrained target are ones, as a fresh drafter's.
        projection = ".self_attn." in name and "_norm" not in name
        taken = projection and not name.startswith("layers.0.")
        assert torch.equal(p, before[name]) != taken, name


def test_layers_to_read_are_spread_and_leave_the_last_out() -> None:
    for count in range(1, 41):
        ids = spread_layers(count)
        assert ids == sorted(set(ids)) and len(ids) == max(1, min(5, count - 1))
        assert -1 <= ids[0] and ids[-1] == count - 2
        gaps = {b - a for a, b in zip(ids, ids[1:], strict=False)}
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny target on disk, and conversations."""
    return runs.target_on_disk(tmp_path_factory.mktemp("files"))


def test_a_mask_token_is_one_that_no_conversation_has(files: tuple[Path, Path]) -> None:
    def holding(*tokens: int) -> list[Encoded]:
        return [Encoded(torch.tensor(tokens), torch.ones(len(tokens)) > 0, CHAT)]

    target = load_target(files[0], local_files_only=True)
    vocabulary = target.tokenizer.get_vocab()
    assert mask_token_id("<|im_start|>", target, []) == vocabulary["<|im_start|>"]
    assert mask_token_id(None, target, []) == target.tokenizer.mask_token_id
    assert mask_token_id(None, tiny_target(), holding(5, 63, 62)) == 61
    with pytest.raises(ValueError, match="mask_token must name one"):
        mask_token_id(None, tiny_target(), holding(*range(64)))


def test_the_command_line_trains_goes_on_and_starts_from_a_drafter(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    target, chats = map(str, files)
    data = ["--target", target, "--data", chats, "--device", "cpu"]
    command = [*data, "--out", str(tmp_path / "a"), "--held-out", chats, "--steps", "2"]
    command += "--batch-size 2 --num-anchors 2 --layers 1 --block-size 3 --markov-rank 4".split()
    command += "--markov-head gated --layer-ids 0,1 --l1-weight 0.8 --schedule linear".split()
    main(command)
    [folder] = checkpoints(tmp_path / "a")
    shape = json.loads((folder / "config.json").read_text())
    expected = {"num_hidden_layers": 1, "block_size": 3, "markov_rank": 4}
    expected |= {"markov_head_type": "gated", "target_layer_ids": [0, 1], "rope_theta": 10000.0}
    assert {name: shape[name] for name in expected} == expected
    state = json.loads((folder / "state.json").read_text())
    assert state["config"]["l1_weight"] == 0.8 and state["config"]["schedule"] == "linear"
    ended = ending(tmp_path / "a")
    assert "held_out_tau" in ended[2][-1]
    main(command)
    assert ending(tmp_path / "a") == ended

    further = [*data, "--out", str(tmp_path / "b"), "--drafter", str(folder), "--steps", "1"]
    further += "--batch-size 2 --num-anchors 2 --learning-rate 0".split()
    main(further)
    assert ending(tmp_path / "b")[0] == ended[0]
    with pytest.raises(SystemExit) as refused:
        main([*command, "--seed", "3"])
    assert "python -m dspark_lab.training: seed must be as in the run" in str(refused.value)


def test_a_large_file_trains_from_the_cache_and_a_small_one_leaves_nothing(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, chats = map(str, files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = f"--target {target} --data {chats} --held-out {chats} --device cpu --steps 2"
    command += " --batch-size 2 --num-anchors 2 --layers 1 --markov-rank 4 --max-length 35"
    for sets, like in enumerate((None, "automodel", "speculators")):
        chosen = [*command.split(), *(["--like", like] if like else [])]
        main([*chosen, "--out", str(tmp_path / f"small-{like}")])
        assert len(list(tmp_path.glob("cache/dspark_lab/*"))) == sets
        with monkeypatch.context() as context:
            context.setattr("dspark_lab.training.data.LARGE_FILE", 0)
            main([*chosen, "--out", str(tmp_path / f"large-{like}")])
        assert ending(tmp_path / f"large-{like}") == ending(tmp_path / f"small-{like}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data none.jsonl", "none.jsonl must be in .*, but is not"),
        ("--target /none/there", "no folder /none/there"),
        ("--learning-rate -1", "learning_rate must be >= 0, got -1"),
        ("--mask-token <nothing>", "mask_token must be a token .*'<nothing>'"),
        ("--layer-ids 1,a", "layer_ids must be integers with commas between, got '1,a'"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    more: str, message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    command = f"--out {tmp_path} --target {files[0]} --data {files[1]} --steps 1 {more}"
    with pytest.raises(SystemExit, match=f"^python -m dspark_lab.training: .*{message}"):
        main(command.split())


def test_the_command_line_names_a_flag_that_it_does_not_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        main("--out run --steps 1 --step-size 3".split())
    assert refused.value.code == 2
    said = " ".join(re.sub("[│╭╰╮╯─]", "", capsys.readouterr().err).split())
    assert "Unrecognized options: --step-size" in said


FLAGS = """
--target smollm2 --data None --held-out None --features live --cache None --target-dtype float32
--parallel None --drafter None --layers 2 --block-size 7 --sample-from-anchor --markov-rank 64
--markov-head vanilla --layer-ids None --mask-token None --no-compile --like None
--batch-size 8 --accumulate 1 --num-anchors 64 --anchors-per row --max-length 2048
--pack-length None --learning-rate 0.0006 --warmup-steps 20 --schedule cosine
--final-lr-ratio 0.05 --weight-decay 0.0 --beta1 0.9 --beta2 0.95 --clip-norm 1.0 --seed 0
--precision fp32 --ce-weight 0.1 --l1-weight 0.9
--confidence-weight 1.0 --loss-decay-gamma 4.0 --ce-only-fraction 0.0 --vocabulary full
--checkpoint-every 0 --keep-checkpoints 2 --evaluate-every 0 --evaluate-anchors 32
"""


def test_the_command_line_has_the_flags_and_defaults_that_it_always_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = ["--out", "run", "--steps", "3"]
    device = ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    given = [*needed, *device, *FLAGS.split()]
    assert tyro.cli(Options, args=needed) == tyro.cli(Options, args=given)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m dspark_lab.training ")
    flags = {word.replace("--no-", "--") for word in given if word.startswith("--")}
    assert set(re.findall(r"^\W*(--\w[\w-]*)", shown, re.M)) == flags
