"""`choose_training`: gains and costs of every option, and the best that fits."""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dspark_lab.blocks import PER, draw_blocks, times_supervised
from dspark_lab.model import load_target
from dspark_lab.training import BatchOrder, History, Run, TrainConfig, encode_chats, row_groups
from dspark_lab.training.__main__ import main
from dspark_lab.tuning import (
    CARDS,
    Shape,
    Spans,
    StepTime,
    card_time,
    choose_training,
    export,
    in_training_batches,
    row_blocks,
    supervision,
    training_memory,
)
from tests import runs
from tests.samples import random_chats

SHAPE = Shape.of("pocket")
CHATS = random_chats(12)
TIME = StepTime(0.01, 1e-11, 0.1, 0.2, 4)


def chosen(**options):
    given = {"num_anchors": (2, 4, 8), "block_sizes": (3, 5), "time": TIME}
    return choose_training(CHATS, SHAPE, **(given | options))


def test_an_option_gains_its_different_tokens_times_what_a_block_is_worth():
    table = chosen(batch_size=3).table
    spans = Spans.of(CHATS)
    for line in table.itertuples():
        found = supervision(spans, line.num_anchors, line.block_size)
        worth = sum(math.exp(-k / 4.0) for k in range(line.block_size))
        assert line.covered == pytest.approx(found.covered * 3 / 12)
        assert line.gain == pytest.approx(found.covered * 3 / 12 * worth)
        assert line.seconds == pytest.approx(0.01 + 1e-11 * line.operations)
        assert line.gain_per_second == pytest.approx(line.gain / line.seconds)


def test_the_best_gains_most_a_second_and_the_next_is_the_runner_up():
    choice = chosen()
    rates = sorted(choice.table["gain_per_second"], reverse=True)
    assert choice.best["gain_per_second"] == rates[0]
    assert choice.runner_up["gain_per_second"] == rates[1]
    settings = choice.settings
    assert settings.num_anchors == choice.best["num_anchors"]
    assert settings.block_size == choice.best["block_size"]
    assert f"N {settings.num_anchors}, K {settings.block_size} gains most" in choice.reason


def test_only_what_fits_is_chosen_and_what_does_not_is_named():
    free = chosen(num_anchors=(64, 256), block_sizes=(15,), batch_size=12)
    sizes = sorted(free.table["memory_bytes"])
    assert sizes[0] < sizes[1]
    room = (sizes[0] + 1) / 0.92
    tight = chosen(num_anchors=(64, 256), block_sizes=(15,), batch_size=12, memory=room)
    assert tight.table["fits"].tolist() == [True, False]
    assert tight.best["num_anchors"] == 64 and tight.runner_up is None
    nothing = chosen(memory=1000.0)
    assert nothing.best is None and nothing.reason.startswith("Nothing fits")
    with pytest.raises(ValueError, match="Nothing fits"):
        _ = nothing.settings


def test_memory_is_that_of_a_step_of_longest_rows():
    sizes = {"seq_len": max(map(len, CHATS)), "num_anchors": 2, "block_size": 3}
    assert chosen().table["memory_bytes"].iloc[0] == training_memory(SHAPE, **sizes)


def test_a_larger_error_of_times_makes_the_choice_less_sure():
    sure = [chosen(time=StepTime(0.01, 1e-11, error, error, 4)).sure for error in (0.0, 0.05, 0.5)]
    assert sure[0] == 1.0 > sure[1] > sure[2] > 0.5


def test_a_card_is_taken_at_a_share_of_its_peak_and_says_that_it_is_assumed():
    choice = chosen(time="H100")
    speed = CARDS["H100"].operations_per_second * 0.4
    assert np.allclose(choice.table["seconds"], choice.table["operations"] / speed)
    assert math.isnan(choice.sure) and "speed assumed, not measured" in choice.reason
    with pytest.raises(ValueError, match="utilisation must lie in"):
        card_time("H100", 0)


def test_packed_rows_are_as_long_as_asked_and_spans_keep_theirs():
    table = chosen(seq_lens=(64, 128), packed=True).table
    assert (table["row_tokens"] == table["seq_len"]).all()
    assert table["seq_len"].unique().tolist() == [64, 128]
    with pytest.raises(ValueError, match="have their rows already"):
        choose_training(Spans.of(CHATS), SHAPE, time=TIME, seq_lens=(64,))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny target on disk, and 60 conversations of 20 to 120 tokens."""
    folder = tmp_path_factory.mktemp("files")
    target, data = runs.target_on_disk(folder)
    words = ("yes", "no", "green", "hello", "one", "two")
    lines = [
        {"prompt": f"Say {word}.", "response": f"{word} " * count}
        for word, count in product(words, range(3, 13))
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    return target, data


def counting(seen: list[dict[str, int]]) -> Callable[..., Any]:
    """``Run.blocks``, which notes what each micro-batch holds."""
    draw = Run.blocks

    def noted(run: Run, batch: Any, seed: int) -> Any:
        batch, blocks = draw(run, batch, seed)
        covered = int((times_supervised(blocks) > 0).sum())
        held = {"places": batch.input_ids.numel(), "tokens": int(batch.seq_lens.sum())}
        held |= {"anchors": int(blocks.block_keep_mask.sum()), "covered": covered}
        seen.append(held | {"width": blocks.num_anchors})
        return batch, blocks

    return noted


@pytest.mark.parametrize(
    ("packed", "per", "given", "block_size", "like"),
    [
        (False, "row", False, 3, "automodel"),
        (True, "row", True, 3, None),
        (True, "document", False, 1, "speculators"),
        (True, "batch", False, 3, None),
    ],
)
def test_the_exported_line_trains_with_what_was_predicted_for_a_step(
    packed, per, given, block_size, like, files, tmp_path, monkeypatch
):
    target, data = files
    tokenizer = load_target(str(target), local_files_only=True).tokenizer
    encoded = encode_chats(data, tokenizer, like=like)
    length = 150 if packed else max(map(len, encoded))
    rows = Spans.of(encoded, row_length=length).rows if packed else len(encoded)
    batch_size = next(size for size in (3, 2, 5, 7) if rows % size == 0)
    choice = choose_training(
        *(encoded, replace(SHAPE, sample_from_anchor=not given)),
        **{"time": TIME, "num_anchors": (5,), "seq_lens": (length,)},
        **{"block_sizes": (block_size,)},
        **{"packed": packed, "per": per, "batch_size": batch_size},
    )
    line = choice.table.iloc[0]
    epochs = -(-60 * batch_size // rows)
    steps = epochs * rows // batch_size
    command = f"--out {tmp_path} --target {target} --data {data} --steps {steps} --device cpu"
    command += " --layers 1 --markov-rank 4 --learning-rate 0 "
    command += f"--like {like} " if like else ""
    seen: list[dict[str, int]] = []
    monkeypatch.setattr(Run, "blocks", counting(seen))
    main(shlex.split(command + export(choice.settings, "dspark-lab"), comments=True))

    found = pd.DataFrame(seen)
    assert len(found) == steps and History.read(tmp_path).table()["tokens"].sum() > 0
    assert History.read(tmp_path).table()["tokens"].tolist() == found["tokens"].tolist()
    # Whole epochs, in which every row is seen as often: no luck in these.
    assert found["tokens"].mean() == pytest.approx(line["tokens"])
    assert found["anchors"].mean() == pytest.approx(line["anchors"])
    if packed:
        assert (found["places"] == batch_size * line["row_tokens"]).all()
    # Seed fixed; fewer than one of ten thousand seeds is four standard errors off.
    error = found["covered"].std() / math.sqrt(steps)
    assert abs(found["covered"].mean() - line["covered"]) < 4 * error
    assert error < 0.05 * line["covered"]


@pytest.mark.parametrize("per", PER)
def test_blocks_of_a_row_are_those_that_training_draws(per):
    chats = random_chats(60)
    spans = Spans.of(chats, row_length=100)
    order = BatchOrder(chats, TrainConfig(99, batch_size=4, max_length=100, pack_length=100))
    epoch = range(spans.rows // 4)
    assert spans.rows % 4 == 0
    widths = [
        draw_blocks(batch, 7, 3, per=per, seed=seed).num_anchors
        for batch, _ in (next(order.micro_batches(step)) for step in epoch)
        for seed in range(30)
    ]
    blocks, most = row_blocks(in_training_batches(spans, 4), 7, per)
    assert blocks == pytest.approx(np.mean(widths), abs=0.6)
    assert most == max(widths) >= 7 * (per != "batch")
    assert row_blocks(Spans.of(chats), 7, per) == (7, 7)


@pytest.mark.parametrize("per", PER)
def test_a_batch_needs_as_many_rows_as_it_has_in_training_too(per):
    with pytest.raises(
        ValueError, match="batch_size must be at most the number of rows, 12, got 13"
    ):
        chosen(per=per, batch_size=13)


def test_a_total_is_counted_in_whole_batches():
    # Two of the twelve are left over,
    # of which training makes no step.
    table = chosen(per="batch", batch_size=5, num_anchors=(2, 4), block_sizes=(3,)).table
    assert table["anchors"].tolist() == [2, 4]
    groups = row_groups(np.array([len(chat) for chat in CHATS]), 5)
    assert [len(group) for group in groups] == [5, 5]
    for line in table.itertuples():
        steps = [
            supervision(
                Spans.of([CHATS[row] for row in group]).in_batches(5),
                *(line.num_anchors, line.block_size),
                per="batch",
            )
            for group in groups
        ]
        assert line.covered == pytest.approx(sum(step.covered for step in steps) / 2)
        assert line.weighted == pytest.approx(sum(step.weighted for step in steps) / 2)


def test_packed_spans_that_were_cut_are_exported_with_their_cut():
    whole = choose_training(Spans.of(CHATS, row_length=150), SHAPE, time=TIME).settings
    assert (whole.seq_len, whole.pack_length) == (150, 150)
    cut = choose_training(Spans.of(CHATS, seq_len=20, row_length=150), SHAPE, time=TIME).settings
    assert (cut.seq_len, cut.pack_length) == (20, 150)


def test_the_layout_of_the_shape_is_part_of_the_choice():
    given = replace(SHAPE, sample_from_anchor=False)
    assert choose_training(CHATS, given, time=TIME).settings.layout == "anchor_given"
    assert choose_training(CHATS, SHAPE, time=TIME).settings.layout == "anchor_predicts"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_anchors": ()}, "num_anchors must not be empty"),
        ({"time": "H1000"}, "card must be one of .*got 'H1000'"),
        ({"memory": "H1000"}, "memory must be bytes or one of .*got 'H1000'"),
        ({"gamma": 1e-300}, "^gamma must be > 0.*got 1e-300"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        chosen(**options)
