"""Calibration and cost files of engines, and the temperatures that are worth writing into them."""

import bisect
import csv
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dspark_lab.decoding import rounds_of
from dspark_lab.pairs import load_traces
from dspark_lab.rates import (
    SequentialTemperatures,
    calibration_report,
    fit_identifiable_slots,
    prefix_survival,
    split_prompts,
)
from dspark_lab.records import (
    compare_scalings,
    fit_joint_temperatures,
    load_scaling,
    load_shards,
    load_step_costs,
    read_engine,
    save_scaling,
    save_step_costs,
    scaling_advice,
)
from dspark_lab.serving import Engine, StepsPerSecond, load_engine
from tests.traces import RAGGED, TRACE, Made, ece_by_hand, made_trace, trace_of

FACTS: dict[str, Any] = {"block_size": 7, "context_length": 128, "device": "a GPU"}
STEPS = {
    "sample_batch_tokens": [8, 16, 32],
    "sample_steps_per_sec": [52.5, 50.0, 40.0],
    "max_batch_tokens": 64,
}
ADDITIVE = {
    "bias_seconds": 0.02,
    "bs_probes": [1, 8, 32],
    "alpha_seconds": [0.0, 0.004, -0.001],
    "m_probes": [0, 64, 128],
    "theta_seconds": [0.0, 0.0064, 0.02],
}
MILLISECONDS = {
    "token_counts": [8, 64],
    "step_time_ms": [1.0, 3.0],
    "fixed_overhead_ms": 10.0,
    "batch_sizes": [1, 8],
    "batch_overhead_ms": [0.0, 7.0],
    "_meta": {"encoding": "decomposed"},
}
SCALING = {"temperatures": [1.5, 0.5]}


def written(folder: Path, values: Any) -> Path:
    path = folder / "file.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def step_seconds(engine: Engine, requests: int, tokens: int) -> float:
    """Seconds of a whole step in which so many requests verify so many tokens."""
    own = engine.draft_seconds(requests, engine.longest) + engine.rest_seconds(requests)
    return own + engine.sps.seconds(tokens)


def between(points: list[int], values: list[float], at: float) -> float:
    """Linear between the points, constant beyond them."""
    if at <= points[0] or at >= points[-1]:
        return values[0] if at <= points[0] else values[-1]
    high = bisect.bisect_right(points, at)
    share = (at - points[high - 1]) / (points[high] - points[high - 1])
    return values[high - 1] + share * (values[high] - values[high - 1])


def of_server(path: Path, requests: int, tokens: int) -> float:
    """Seconds of a step as the server that the file is for takes them from it."""
    text = path.read_text()
    held = json.loads(text)
    if '"bias_seconds"' in text:
        assert set(held) == set(ADDITIVE) and held["bias_seconds"] > 0
        for points in (held["bs_probes"], held["m_probes"]):
            assert points == sorted(set(points)) and all(type(one) is int for one in points)
        alpha = between(held["bs_probes"], held["alpha_seconds"], requests)
        theta = between(held["m_probes"], held["theta_seconds"], tokens)
        return held["bias_seconds"] + alpha + theta
    if "token_counts" in held:
        place = max(bisect.bisect_right(held["token_counts"], tokens) - 1, 0)
        alpha = between(held["batch_sizes"], held["batch_overhead_ms"], requests)
        return (held["fixed_overhead_ms"] + alpha + held["step_time_ms"][place]) / 1000
    points = held["sample_batch_tokens"]
    assert set(held) == set(STEPS) and points == sorted(set(points))
    assert len(points) == len(held["sample_steps_per_sec"])
    assert held["max_batch_tokens"] >= points[-1]
    return 1 / held["sample_steps_per_sec"][max(bisect.bisect_right(points, tokens) - 1, 0)]


@given(
    temperatures=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=16),
    given_too=st.booleans(),
)
def test_a_scaling_file_comes_back_as_it_was(tmp_path_factory, temperatures, given_too):
    path = tmp_path_factory.mktemp("scaling") / "sts.json"
    errors = [0.25] * len(temperatures)
    facts = {"dataset": "a", "num_samples": 3, "ece_before": errors, "ece_after": errors}
    save_scaling(SequentialTemperatures(tuple(temperatures)), path, **facts if given_too else {})
    held = json.loads(path.read_text())
    assert held == {"temperatures": temperatures} | (facts if given_too else {})
    assert load_scaling(path, block_size=len(temperatures)).temperatures == tuple(temperatures)
    assert os.listdir(path.parent) == ["sts.json"]


def test_errors_must_be_of_as_many_slots_as_the_temperatures(tmp_path):
    with pytest.raises(ValueError, match="ece_after must be of 2 slots, .*, or of none, got 3"):
        save_scaling(SequentialTemperatures((1.0, 2.0)), tmp_path / "a", ece_after=[0.1] * 3)
    assert not os.listdir(tmp_path)


def test_either_name_of_the_temperatures_is_read(tmp_path):
    for held in ({"sts_temperatures": [1.5, 0.5]}, SCALING | {"sts_temperatures": [1.5, 0.5]}):
        assert load_scaling(written(tmp_path, held)).temperatures == (1.5, 0.5)
    path = written(tmp_path, SCALING | {"sts_temperatures": [1.5, 0.6]})
    with pytest.raises(ValueError, match="must hold one list of temperatures, got"):
        load_scaling(path)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"dataset": "a"}, r"must have temperatures, got the keys \['dataset'\]"),
        ({"temperatures": []}, "must hold one list of temperatures, got none"),
        ({"temperatures": 1.5}, "temperatures must be a list, got 1.5"),
        ({"temperatures": [1.0, "2"]}, "each of .*temperatures must be a number, got '2'"),
        ({"temperatures": [1.0, True]}, "each of .*temperatures must be a number, got True"),
        ({"temperatures": [1.0, 0.0]}, "each of .*temperatures must be > 0.*, got 0.0"),
        ({"temperatures": [1.0, -2]}, "each of .*temperatures must be > 0.*, got -2"),
        ('{"temperatures": [1.0, NaN]}', "each of .*temperatures must be finite, got nan"),
        ('{"temperatures": [1.0, 1e999]}', "each of .*temperatures must be finite, got inf"),
        ({"temperatures": [1.0, 10**400]}, "must be finite, got an int beyond any float"),
        ({"temperatures": [1.0] * 3}, "must hold 2 temperatures, .*, got 3"),
        ([1.0, 2.0], "must hold a JSON object, got list"),
        ('{"temperatures": [1.0, ', "must be a JSON file, but is not"),
    ],
)
def test_a_bad_scaling_file_is_refused_by_name(tmp_path, held, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_scaling(written(tmp_path, held), block_size=2)
    assert "file.json" in str(caught.value)


@pytest.mark.parametrize("load", [load_scaling, lambda path: load_step_costs(path, **FACTS)])
def test_junk_and_a_file_that_is_not_there_are_refused(tmp_path, load):
    (tmp_path / "junk").write_bytes(b"\x80\x02\xff\x00junk")
    with pytest.raises(ValueError, match="junk must be a JSON file"):
        load(tmp_path / "junk")
    with pytest.raises(FileNotFoundError, match="none must be in .*, but is not"):
        load(tmp_path / "none")


@pytest.mark.parametrize("pair", ["pocket", "smollm2"])
def test_a_server_takes_an_engines_own_seconds_from_its_file(tmp_path, pair):
    engine, path = load_engine(pair), tmp_path / "costs.json"
    points = list(itertools.product(engine.requests.tolist(), engine.sps.tokens.tolist()))
    for form in ("additive", "tensorrt-llm"):
        save_step_costs(engine, path, form=form)
        back = load_step_costs(path, **FACTS)
        for requests, tokens in points:
            seconds = pytest.approx(step_seconds(engine, requests, tokens), rel=1e-9)
            assert of_server(path, requests, tokens) == seconds
            assert step_seconds(back, requests, tokens) == seconds
    save_step_costs(engine, path)
    back = load_step_costs(path, **FACTS)
    for requests, tokens in ((1, 3), (3, 11), (9, 100)):
        seconds = pytest.approx(step_seconds(engine, requests, tokens), rel=1e-9)
        assert of_server(path, requests, tokens) == step_seconds(back, requests, tokens) == seconds


@given(
    alpha=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    theta=st.lists(st.floats(1e-3, 1), min_size=3, max_size=3),
    form=st.sampled_from(["additive", "tensorrt-llm"]),
    asked=st.tuples(st.integers(1, 40), st.integers(1, 400)),
)
def test_costs_come_back_wherever_they_are_asked(tmp_path_factory, alpha, theta, form, asked):
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    sps = StepsPerSecond(np.array([1, 9, 99]), 1 / np.array(theta), 128, "a GPU")
    engine = Engine.of(sps, 7, draft_seconds=dict(zip((1, 4, 32), alpha, strict=True)))
    save_step_costs(engine, path, form=form)
    back = load_step_costs(path, **FACTS)
    assert step_seconds(back, *asked) == pytest.approx(step_seconds(engine, *asked), abs=1e-9)


def test_steps_of_an_engine_are_those_of_whole_blocks(tmp_path):
    engine, path = load_engine(), tmp_path / "costs.json"
    save_step_costs(engine, path, form="steps", draft_length=3)
    held = json.loads(path.read_text())
    assert held["sample_batch_tokens"] == [4 * r for r in engine.requests]
    for requests in engine.requests.tolist():
        own = engine.draft_seconds(requests, 3) + engine.rest_seconds(requests)
        seconds = own + engine.sps.seconds(4 * requests)
        assert of_server(path, requests, 4 * requests) == pytest.approx(seconds)
        # SGLang takes the point below.
        assert of_server(path, requests, 4 * requests + 3) == pytest.approx(seconds)


@given(
    st.dictionaries(st.integers(1, 10**6), st.floats(1e-3, 1e6), min_size=2, max_size=9).map(
        lambda found: sorted(found.items())
    )
)
def test_steps_per_second_come_back_as_they_were(tmp_path_factory, points):
    path = tmp_path_factory.mktemp("steps") / "costs.json"
    tokens, speeds = map(np.array, zip(*points, strict=True))
    save_step_costs(StepsPerSecond(tokens, speeds, 128, "a GPU", "a target"), path)
    back = load_step_costs(path, **FACTS, target="a target")
    pd.testing.assert_frame_equal(
        back.sps.table, StepsPerSecond(tokens, speeds, 128, "a GPU", "a target").table
    )
    assert not back.draft.any() and not back.rest.any() and back.longest == 7


def test_known_files_mean_what_their_servers_take_them_for(tmp_path):
    additive = load_step_costs(written(tmp_path, ADDITIVE), **FACTS)
    # A bin of 0 tokens holds for 1: 0.0064 / 64 s more.
    assert additive.sps.tokens.tolist() == [1, 64, 128]
    for requests, tokens in itertools.product((1, 4, 8, 32), (1, 30, 64, 128)):
        seconds = of_server(tmp_path / "file.json", requests, tokens)
        assert step_seconds(additive, requests, tokens) == pytest.approx(seconds)
    assert step_seconds(additive, 8, 64) == pytest.approx(0.02 + 0.004 + 0.0064)
    only_zero = ADDITIVE | {"m_probes": [0], "theta_seconds": [0.001]}
    engine = load_step_costs(written(tmp_path, only_zero), **FACTS)
    assert step_seconds(engine, 1, 64) == pytest.approx(0.021)
    other = load_step_costs(written(tmp_path, MILLISECONDS), **FACTS)
    assert step_seconds(other, 8, 64) == pytest.approx(0.02)
    alone = {name: MILLISECONDS[name] for name in ("token_counts", "step_time_ms")}
    other = load_step_costs(written(tmp_path, alone), **FACTS)
    assert step_seconds(other, 8, 64) == pytest.approx(0.003)
    steps = load_step_costs(written(tmp_path, STEPS), **FACTS)
    assert step_seconds(steps, 2, 16) == pytest.approx(1 / 50)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"a": 1}, "must have bias_seconds, sample_batch_tokens or token_counts, got the keys"),
        ({"schema_version": 2, "cost_tables": {}}, r"got the keys \['cost_tables', 'schema_vers"),
        (ADDITIVE | {"bias_seconds": 0}, "bias_seconds must be > 0.*, got 0"),
        (ADDITIVE | {"bias_seconds": None}, "bias_seconds must be a number, got None"),
        (ADDITIVE | {"bs_probes": [0, 8, 32]}, r"bs_probes must lie in \[1, .*, got 0"),
        (ADDITIVE | {"bs_probes": [1, 8, 8]}, "bs_probes must rise from point to point"),
        (ADDITIVE | {"bs_probes": [1, 8.5, 9]}, "bs_probes must be an int, got 8.5"),
        (ADDITIVE | {"m_probes": [0, 64, 10**30]}, r"m_probes must lie in \[0, .*, got 1000"),
        (ADDITIVE | {"m_probes": [0, 64]}, "as many theta_seconds as m_probes.*got 3 and 2"),
        (ADDITIVE | {"m_probes": [], "theta_seconds": []}, "at least one, got 0 and 0"),
        (ADDITIVE | {"theta_seconds": [0, -0.03, 0]}, "must take more than 0 seconds, got -0.0"),
        (ADDITIVE | {"theta_seconds": [0, math.nan, 0]}, "must be finite, got nan"),
        (ADDITIVE | {"alpha_seconds": "0, 1, 2"}, "alpha_seconds must be a list, got '0, 1, 2'"),
        (STEPS | {"sample_steps_per_sec": [5.0, 5.0]}, "got 2 and 3"),
        (STEPS | {"sample_steps_per_sec": [5.0, 0.0, 5.0]}, "sec must be > 0.*, got 0.0"),
        (STEPS | {"sample_batch_tokens": [8, 32, 16]}, "tokens must rise from point to point"),
        (STEPS | {"max_batch_tokens": 31}, r"at most max_batch_tokens, got \[8, 16, 32\] and 31"),
        (STEPS | {"sample_batch_tokens": [8], "sample_steps_per_sec": [5.0]}, "two or more points"),
        ({"sample_batch_tokens": [8]}, "must have sample_steps_per_sec, got the keys"),
        (MILLISECONDS | {"step_time_ms": [0.0, 1.0]}, "step_time_ms must be > 0.*, got 0.0"),
        (MILLISECONDS | {"fixed_overhead_ms": -1.0}, "fixed_overhead_ms must be >= 0, got -1.0"),
        (MILLISECONDS | {"batch_sizes": [1]}, "as many batch_overhead_ms as batch_sizes"),
    ],
)
def test_a_bad_table_of_costs_is_refused_by_name(tmp_path, held, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_step_costs(written(tmp_path, held), **FACTS)
    assert "file.json" in str(caught.value)


@pytest.mark.parametrize("pair", ["pocket", "smollm2"])
def test_an_engines_csv_is_read_with_the_seconds_that_it_says(tmp_path, pair):
    path = tmp_path / "costs.json"  # the content counts, not the name
    load_engine(pair).save(path)
    engine, other = (read_engine(path, block_size=size) for size in (7, 3))
    for row in csv.DictReader(path.read_text().splitlines()):
        requests, tokens, length = (int(row[k]) for k in ("requests", "tokens", "draft_length"))
        if row["part"] == "target":
            seconds = engine.sps.seconds(tokens)
        elif row["part"] == "draft":
            seconds = engine.draft_seconds(requests, length)
        elif row["part"] == "rest":
            seconds = engine.rest_seconds(requests)
        else:
            seconds = engine.plain_rest_seconds(requests)
        assert seconds == pytest.approx(float(row["seconds"]), rel=1e-12)
    assert engine.plain_known and engine.longest == other.longest == 7


@pytest.mark.parametrize("held", [STEPS, ADDITIVE, MILLISECONDS], ids=lambda held: next(iter(held)))
def test_a_table_of_step_costs_is_an_engine_of_unknown_plain_steps(tmp_path, held):
    path = written(tmp_path, "\n  " + json.dumps(held))
    engine = read_engine(str(path), block_size=5)
    points = {
        "sample_batch_tokens": [(1, 8), (1, 16), (1, 32)],
        "bias_seconds": list(itertools.product((1, 8, 32), (64, 128))),
        "token_counts": list(itertools.product((1, 8), (8, 64))),
    }
    for requests, tokens in points[next(iter(held))]:
        seconds = pytest.approx(of_server(path, requests, tokens))
        assert step_seconds(engine, requests, tokens) == seconds
    assert not engine.plain_known and engine.longest == 5
    assert (engine.sps.context_length, engine.sps.device) == (0, "file.json")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("", "must be an engine's CSV file or a JSON step-cost table of SGLang or TensorRT-LLM"),
        ("part,seconds\ntarget,1\n", "CSV file or a JSON .* it has no requests, draft_length, tok"),
        (load_engine().sps.table.to_csv(), "CSV file or a JSON .* it has no part, requests"),
        (
            load_engine().table.query("part != 'rest'").to_csv(),
            r"CSV file or a JSON .* got no \['rest'\]",
        ),
        (
            load_engine().table.assign(seconds="quick").to_csv(),
            "CSV file or a JSON .* seconds must hold numbers",
        ),
        ({"a": 1}, "must have bias_seconds, sample_batch_tokens or token_counts, got the keys"),
        ("[1, 2]", "must hold a JSON object, got list"),
        ('{"bias_seconds": ', "must be a JSON file, but is not"),
    ],
)
def test_a_file_of_no_engine_is_refused_by_name(tmp_path, held, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_engine(written(tmp_path, held), block_size=7)
    assert "file.json" in str(caught.value)


def test_junk_is_no_engine_and_a_file_must_be_there(tmp_path):
    (tmp_path / "junk").write_bytes(b"\x80\x02\xff\x00junk")
    with pytest.raises(ValueError, match="junk must be an engine's CSV file or a JSON"):
        read_engine(tmp_path / "junk", block_size=7)
    with pytest.raises(FileNotFoundError, match="none must be in .*, but is not"):
        read_engine(tmp_path / "none", block_size=7)
    with pytest.raises(OSError, match="irectory|ermission"):
        read_engine(tmp_path, block_size=7)


def test_costs_that_a_form_cannot_hold_are_refused(tmp_path):
    sps = StepsPerSecond(np.array([1]), np.array([5.0]), 128, "a GPU")
    with pytest.raises(ValueError, match="two or more points, got 1"):
        save_step_costs(sps, tmp_path / "a")
    for options in ({"form": "additive"}, {"draft_length": 3}):
        with pytest.raises(ValueError, match="costs must be an Engine"):
            save_step_costs(sps, tmp_path / "a", **options)
    with pytest.raises(ValueError, match="draft_length must be at most 7, got 8"):
        save_step_costs(load_engine(), tmp_path / "a", draft_length=8)
    assert not os.listdir(tmp_path)


LOGITS = torch.tensor([[0.0, 2.0, -1.0], [4.0, 0.5, 50.0], [-800.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])


def shard(logits: Any = LOGITS, mask: Any = MASK, **others: Any) -> dict[str, Any]:
    return {"logits": logits, "prefix_mask": mask, **others}


def test_shards_are_rounds_whose_survival_is_the_mask(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    torch.save(shard(), folder / "a.0.pt")
    save_file(shard(mask=MASK.bool()), folder / "a.1.safetensors")
    torch.save(shard(LOGITS.bfloat16(), logits_at_draft=LOGITS), folder / "a.r0.2.pt")
    (folder / "notes.txt").write_text("of these shards")
    rounds = load_shards(folder)
    assert rounds.confidence.shape == (12, 3) and len(np.unique(rounds.prompt)) == 12
    expected = np.tile(MASK.numpy(), (3, 1))
    np.testing.assert_array_equal(prefix_survival(rounds.outcome()), expected)
    assert np.isnan(rounds.outcome()[3]).tolist() == [False, False, True]
    np.testing.assert_allclose(rounds.confidence[:4], torch.sigmoid(LOGITS.double()), atol=1e-15)
    assert ((rounds.confidence > 0) & (rounds.confidence < 1)).all()
    one = load_shards(folder / "a.0.pt")
    np.testing.assert_array_equal(one.confidence, rounds.confidence[:4])


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (LOGITS, "must hold logits and prefix_mask, got Tensor"),
        ({"logits": LOGITS}, r"must hold logits and prefix_mask, got \['logits'\]"),
        (shard(mask=MASK[:3]), r"both \[round, slot\], got shapes \(4, 3\) and \(3, 3\)"),
        (shard(LOGITS[0], MASK[0]), r"got shapes \(3,\) and \(3,\)"),
        (shard(LOGITS[:, :0], MASK[:, :0]), r"got shapes \(4, 0\) and \(4, 0\)"),
        (shard(LOGITS[:0], MASK[:0]), "must hold at least one round, got 0"),
        (shard(LOGITS / 0), "logits must be finite, got nan"),
        (shard(mask=MASK * 0.5), "prefix_mask must be 0 or 1, .*, got other rows"),
        (shard(mask=1 - MASK), "and 0 in every slot after a 0, got other rows"),
        (shard(LOGITS.tolist()), "logits must be a plain tensor of numbers, got <class 'list'>"),
        (shard(LOGITS.to_sparse()), "logits must be a plain tensor of numbers"),
        (shard(LOGITS.to("meta")), "logits must be a plain tensor of numbers"),
        (shard(LOGITS.to(torch.complex64)), "logits must be a plain tensor of numbers"),
    ],
)
def test_a_bad_shard_is_refused_by_name(tmp_path, held, message):
    torch.save(held, tmp_path / "a.0.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_shards(tmp_path / "a.0.pt")
    assert str(tmp_path) in str(caught.value)


def test_shards_of_other_lengths_do_not_mix(tmp_path):
    torch.save(shard(), tmp_path / "a.0.pt")
    torch.save(shard(LOGITS[:, :2], MASK[:, :2]), tmp_path / "a.1.pt")
    with pytest.raises(ValueError, match="all shards must have 3 slots, .*, got 2 in .*a.1.pt"):
        load_shards(tmp_path)


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_shard_with_code_is_refused_and_nothing_runs(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "a.0.pt"
    for held in (shard(others=Runs(mark)), Runs(mark)):
        for zipped in (True, False):
            torch.save(held, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match="could run code .* safetensors.torch.save_file"):
                load_shards(path)
            assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("junk", [b"", b"junk", b"PK\x03\x04" + b"0" * 50, b"\x80\x02.", b"8" * 99])
def test_a_damaged_shard_is_refused(tmp_path, junk):
    for name in ("a.0.pt", "a.0.safetensors"):
        (tmp_path / name).write_bytes(junk)
        with pytest.raises(ValueError, match="a.0.* but is damaged or holds other objects"):
            load_shards(tmp_path / name)
    torch.save(shard(), tmp_path / "a.0.pt")
    (tmp_path / "a.0.pt").write_bytes((tmp_path / "a.0.pt").read_bytes()[:-200])
    with pytest.raises(ValueError, match="is damaged"):
        load_shards(tmp_path / "a.0.pt")


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must have files .*, but has none"):
        load_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="none must be in"):
        load_shards(tmp_path / "none")


def loss_by_hand(trace: pd.DataFrame, temperatures: tuple[float, ...]) -> float:
    """The mean of -log of the survival that came, over all known slots."""
    rounds = rounds_of(trace)
    losses = []
    survivals = prefix_survival(rounds.outcome())
    for confidence, survival in zip(rounds.confidence, survivals, strict=True):
        product = 1.0
        for f, s, t in zip(confidence, survival, temperatures, strict=False):
            if math.isnan(f) or math.isnan(s):
                break
            product *= 1 / (1 + ((1 - f) / f) ** (1 / t))
            losses.append(-math.log(product if s else 1 - product))
    return sum(losses) / len(losses)


def two_slots(seed: int, rounds: int, distortion: tuple[float, float]) -> pd.DataFrame:
    """The first two slots of a made-up trace."""
    trace = made_trace(seed, range(rounds), 1, distortion=(*distortion, 1.0, 1.0))
    return trace[trace["slot"] < 2]


def test_the_joint_fit_is_the_best_of_a_grid():
    trace = two_slots(3, 150, (0.5, 2.0))
    found = fit_joint_temperatures(trace).temperatures
    grid = np.exp(np.linspace(-1.5, 1.5, 13))
    losses = {pair: loss_by_hand(trace, pair) for pair in itertools.product(grid, grid)}
    best = min(losses, key=losses.__getitem__)
    assert loss_by_hand(trace, found) <= losses[best]
    assert np.abs(np.log(found) - np.log(best)).max() < 3 / 12


@pytest.mark.parametrize("trace", [TRACE, RAGGED], ids=["whole", "ragged"])
def test_no_step_away_from_the_joint_fit_is_better(trace):
    found = fit_joint_temperatures(trace).temperatures
    least = loss_by_hand(trace, found)
    for slot, factor in itertools.product(range(4), (0.97, 1.03)):
        moved = tuple(t * factor if k == slot else t for k, t in enumerate(found))
        assert loss_by_hand(trace, moved) > least


def test_a_slot_that_tells_nothing_keeps_its_confidences():
    trace = TRACE.assign(accepted=TRACE["accepted"] & (TRACE["slot"] < 2))
    found = fit_joint_temperatures(trace).temperatures
    assert found[2:] == (1.0, 1.0) and found[0] != 1
    none = TRACE.assign(accepted=False)
    assert fit_joint_temperatures(none).temperatures == (1.0,) * 4


def test_certain_confidences_stay_and_do_no_harm():
    certain = [Made(k, [1.0, 0.0], [0.5, 0.5], 2, k % 2) for k in range(40)]
    unsure = [Made(k, [0.9, 0.9], [0.5, 0.5], 2, min(k % 4, 2)) for k in range(40, 340)]
    trace = trace_of(certain + unsure)
    found = fit_joint_temperatures(trace).temperatures
    alone = fit_joint_temperatures(trace_of(unsure)).temperatures
    assert found == pytest.approx(alone, rel=1e-3)
    # Three in four rounds pass the first slot, two of these three the second.
    expected = [math.log(9) / math.log(3), math.log(9) / math.log(2)]
    assert found == pytest.approx(expected, rel=1e-3)


def test_shards_are_fitted_as_the_trace_that_they_hold(tmp_path):
    rounds = rounds_of(TRACE)
    confidence, mask = rounds.confidence, prefix_survival(rounds.outcome())
    logits = torch.from_numpy(np.log(confidence / (1 - confidence)))
    torch.save(shard(logits, torch.from_numpy(mask)), tmp_path / "a.0.pt")
    shards = load_shards(tmp_path)
    for fit in (fit_joint_temperatures, SequentialTemperatures.fit_trace):
        assert fit(shards).temperatures == pytest.approx(fit(TRACE).temperatures, rel=1e-4)
    table = compare_scalings(shards, resamples=20)
    assert (table["conversations"] == table["rounds"]).all() and len(shards) == 480
    half = np.arange(480) < 240
    report = calibration_report(shards.take(half), shards.take(~half), resamples=3)
    assert report["samples"].iloc[-1] == shards.reached[~half].sum()


# 60 conversations of 20 rounds; the head is too bold in every slot, by a temperature of 2.
BOLD = made_trace(5, range(60), 20)
HONEST = made_trace(5, range(60), 20, distortion=(1.0,) * 4)


def test_both_fits_repair_a_head_that_is_planted_too_bold():
    table = compare_scalings(BOLD).set_index("scaling")
    assert table.index.tolist() == ["none", "greedy", "joint"]
    for name in ("greedy", "joint"):
        row = table.loc[name]
        assert row["error"] < 0.6 * table.loc["none", "error"]
        assert row["difference"] == pytest.approx(row["error"] - table.loc["none", "error"])
        assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    assert np.allclose(np.log2(table.loc["joint", "temperatures"]), 1, atol=0.5)
    assert table.loc["none", "temperatures"] == (1.0,) * 4
    assert math.isnan(table.loc["none", "difference"])
    assert (table["rounds"] == 1200).all() and (table["conversations"] == 60).all()
    best = table["error"].idxmin()
    assert scaling_advice(table.reset_index()).startswith(f"Use the {best} temperatures: on conv")


def test_an_honest_head_is_left_alone():
    table = compare_scalings(HONEST)
    assert (table["difference_high"].dropna() > 0).all()
    advice = scaling_advice(table)
    assert advice.startswith("Keep the confidences as they are: no temperatures surely lower")
    assert "greedy by" in advice and "joint by" in advice


def test_the_error_is_the_mean_of_each_slots_product_where_the_other_half_was_fitted():
    table = compare_scalings(RAGGED, bins=5, resamples=10, seed=2).set_index("scaling")
    same = compare_scalings(RAGGED, bins=5, resamples=10, seed=2).set_index("scaling")
    pd.testing.assert_frame_equal(table, same)
    fits = {
        "none": lambda trace: SequentialTemperatures((1.0,) * 4),
        "greedy": lambda trace: fit_identifiable_slots(rounds_of(trace), bins=5),
        "joint": lambda trace: fit_joint_temperatures(trace, bins=5),
    }
    halves = split_prompts(RAGGED, seed=2)
    for name, fit in fits.items():
        row, products, survivals = table.loc[name], [], []
        assert row["temperatures"] == fit(RAGGED).temperatures
        for seen, held in (halves, halves[::-1]):
            rounds = rounds_of(held)
            products.append(np.cumprod(fit(seen).apply(rounds.confidence), axis=1))
            survivals.append(prefix_survival(rounds.outcome()))
        errors = []
        for product, survived in zip(
            np.concatenate(products).T, np.concatenate(survivals).T, strict=True
        ):
            known = ~np.isnan(product) & ~np.isnan(survived)
            errors.append(ece_by_hand(product[known], survived[known], np.linspace(0, 1, 6)))
        assert row["slot_errors"] == pytest.approx(errors)
        assert row["error"] == pytest.approx(np.mean(errors))


def test_many_rounds_are_drawn_in_pieces(monkeypatch):
    whole = compare_scalings(BOLD, resamples=400)
    monkeypatch.setattr("dspark_lab.records.scalings._PIECE", 60 * 50)
    pieces = compare_scalings(BOLD, resamples=400)
    numbers = ["error", "low", "high", "difference_low", "difference_high"]
    np.testing.assert_allclose(pieces[numbers], whole[numbers], atol=0.02)
    assert not np.array_equal(pieces["low"], whole["low"])


def test_a_single_conversation_cannot_be_held_out():
    with pytest.raises(ValueError, match="of 1 conversations leaves one side empty"):
        compare_scalings(made_trace(1, range(1), 100))
    table = compare_scalings(made_trace(1, range(2), 100, domains=("all",)), resamples=10)
    assert table["low"].notna().all() and (table["conversations"] == 2).all()


def test_other_tables_are_refused():
    for call in (compare_scalings, fit_joint_temperatures, scaling_advice):
        with pytest.raises(ValueError, match="must have "):
            call(pd.DataFrame({"x": [1]}))
    table = compare_scalings(TRACE, resamples=10)
    for rows in (table[:1], table[1:], pd.concat([table, table])):
        with pytest.raises(ValueError, match="must have one row of 'none' and others, got"):
            scaling_advice(rows)


@pytest.mark.parametrize("pair", ["pocket", "smollm2"])
def test_shipped_traces_get_a_sentence(pair):
    traces = load_traces(pair)
    own = traces[(traces["drafter"] == "dspark-k7") & (traces["temperature"] == 1.0)]
    table = compare_scalings(own, resamples=100)
    assert table[["error", "low", "high"]].notna().all(axis=None)
    assert scaling_advice(table).startswith(("Keep the confidences as they are:", "Use the "))
