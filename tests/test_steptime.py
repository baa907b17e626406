"""Step times: times made up by a rule are found again; no test says how long anything takes."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import Encoded, collate
from dspark_lab.tuning import Shape, fit_step_time, measure_steps, training_cost
from tests.samples import CHAT, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(operations: object, seconds: object) -> pd.DataFrame:
    return pd.DataFrame({"operations": operations, "seconds": seconds}, dtype=float)


def squares(table: pd.DataFrame, fixed: float, slope: float) -> float:
    """The sum of squared relative errors."""
    return sum(
        ((fixed + slope * operations) / seconds - 1) ** 2
        for operations, seconds in table[["operations", "seconds"]].to_numpy()
    )


@given(
    st.floats(1e-5, 10),
    st.floats(1e-15, 1e-8),
    st.lists(st.floats(1e6, 1e14), min_size=3, max_size=8, unique=True),
)
@settings(max_examples=50)
def test_times_of_two_numbers_are_found_again(fixed, slope, operations):
    operations = np.sort(operations)
    fit = fit_step_time(steps(operations, fixed + slope * operations))
    assert fit.predict(operations) == pytest.approx(fixed + slope * operations, rel=1e-6)
    assert fit.error <= fit.worst_error


def test_a_fit_says_its_two_numbers():
    operations = np.array([1e9, 2e9, 5e9, 2e10])
    fit = fit_step_time(steps(operations, 0.02 + operations / 5e10))
    assert (fit.error, fit.held_out) == (pytest.approx(0, abs=1e-9), 4)
    assert str(fit).startswith("20.0 ms a step and 50.0 billion operations a second; error on 4")
    assert "inf" not in str(fit_step_time(steps([1, 2, 3], [1.0, 4.0, 9.0])))


positive = st.floats(0.01, 100)


@given(
    st.lists(st.tuples(positive, positive), min_size=2, max_size=7, unique_by=lambda x: x[0]),
    st.floats(0, 2),
    st.floats(0, 2),
)
@settings(max_examples=60)
def test_no_other_two_numbers_from_0_up_fit_better(pairs, more, less):
    table = steps(*zip(*pairs, strict=True))
    fit = fit_step_time(table)
    assert fit.seconds_per_step >= 0 and fit.seconds_per_operation >= 0
    best = squares(table, fit.seconds_per_step, fit.seconds_per_operation)
    for fixed in (0.0, fit.seconds_per_step * more, table["seconds"].min() * more):
        for slope in (0.0, fit.seconds_per_operation * less, less):
            assert best <= squares(table, fixed, slope) + 1e-9 * (1 + best)


def test_the_error_is_that_on_the_steps_that_were_held_out():
    table = steps([1e9, 3e9], [0.3, 0.5])
    others = steps([2e9, 5e9], [0.5, 0.7])
    fit = fit_step_time(table, others)
    # The line through both is 0.2 s and 0.1 s a billion: 0.4 for 0.5, 0.7 for 0.7.
    assert (fit.error, fit.worst_error) == (pytest.approx(0.1), pytest.approx(0.2))
    assert fit.held_out == 2


def test_without_others_each_step_is_predicted_from_the_rest():
    table = steps([1.0, 2.0, 4.0], [1.0, 2.0, 5.0])
    errors = []
    for out in range(3):
        rest = fit_step_time(table.drop(index=out))
        step = table.loc[out]
        errors.append(abs(rest.predict(step["operations"]) / step["seconds"] - 1))
    fit = fit_step_time(table)
    assert fit.error == pytest.approx(np.mean(errors))
    assert fit.worst_error == pytest.approx(max(errors))
    # Two steps leave none to hold out.
    fit = fit_step_time(table[:2])
    assert math.isnan(fit.error) and fit.held_out == 0
    assert str(fit).endswith("unknown")


@pytest.mark.parametrize(
    "table, error, match",
    [
        (pd.DataFrame({"seconds": [1.0]}), ValueError, "must have a column 'operations'"),
        (steps([1, 1], [1.0, 2.0]), ValueError, "two different numbers of operations"),
        (steps([1, 2], [1.0, 0.0]), ValueError, "table's seconds must be finite numbers > 0"),
        (steps([1, math.nan], [1.0, 2.0]), ValueError, "table's operations must be finite"),
        (steps([], []), ValueError, "must be finite numbers > 0, got ..$"),
    ],
)
def test_what_is_no_table_of_steps_is_refused(table, error, match):
    with pytest.raises(error, match=match):
        fit_step_time(table)
    good = steps([1, 2], [1.0, 2.0])
    if "two different" not in match:
        with pytest.raises(error, match=match.replace("table", "held_out")):
            fit_step_time(good, held_out=table)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("live", [False, True], ids=["random", "live"])
def test_steps_are_measured_and_fitted_on_this_device(live, dtype):
    target = tiny_target() if live else None
    config = None if target is None else target.model.config.to_dict()
    shape = Shape.of(tiny_drafter().config, target=config)
    table = measure_steps(
        shape, (12, 24), (2, 5), (3, 4), batch_size=2, dtype=dtype, target=target, runs=2
    )
    sizes = [tuple(row) for row in table[["block_size", "seq_len", "num_anchors"]].to_numpy()]
    assert sizes == [(k, s, n) for k in (3, 4) for s in (12, 24) for n in (2, 5)]
    assert (table["fastest"] <= table["seconds"]).all()
    assert (table["seconds"] <= table["slowest"]).all()
    assert (table["fastest"] > 0).all()
    # Slots beyond the row's end have no label, and a CPU leaves them out.
    batch = collate([Encoded(torch.zeros(24).long(), torch.ones(24).bool(), CHAT)] * 2, 0)
    labelled = float(draw_blocks(batch, 5, 4, seed=0).eval_mask.double().mean())
    assert labelled < 1
    sizes = {"seq_len": 24, "num_anchors": 5, "block_size": 4, "batch_size": 2, "dtype": dtype}
    features = "live" if live else "cached"
    expected = training_cost(shape, **sizes, features=features, device="cpu", supervised=labelled)
    operations = float(table["operations"].iloc[-1])
    assert operations == expected["operations"].sum()
    fit = fit_step_time(table)
    assert fit.held_out == len(table) and fit.predict(operations) > 0


@pytest.mark.parametrize("live", [False, True], ids=["random", "live"])
def test_steps_of_a_reduced_vocabulary_of_either_layout_are_measured(live):
    target = tiny_target() if live else None
    config = None if target is None else target.model.config.to_dict()
    drafter = tiny_drafter(draft_vocab_size=20, sample_from_anchor=False)
    table = measure_steps(
        Shape.of(drafter.config, target=config), (12,), (2,), target=target, runs=1, warmup=0
    )
    assert (table["seconds"] > 0).all()


def test_a_measurement_leaves_the_random_numbers_as_they_are():
    shape = Shape.of(tiny_drafter().config)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure_steps(shape, (8,), (2,), runs=1, warmup=0)
    assert torch.equal(torch.rand(3), expected)
