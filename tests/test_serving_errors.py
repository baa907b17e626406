"""What `dspark_lab.serving` refuses by its annotations: a call, the error and part of its text."""

import math

import numpy as np
import pytest

from dspark_lab import serving
from tests.samples import tiny_target
from tests.traces import TRACE

pytestmark = pytest.mark.usefixtures("one_thread")

SPS = serving.StepsPerSecond(np.array([1, 8]), np.array([2.0, 1.0]), 0, "imaginary")
COSTS = serving.Engine.of(SPS, 4, draft_seconds=0.5).costs()
TARGET = tiny_target(max_position_embeddings=32)
ANSWERS = serving.answers_of(TRACE.assign(accept_prob=TRACE["accept_rate"]))

REFUSED = [
    (lambda: serving.RoundCosts(0, (1,), (1, 1)), "plain_seconds must be > 0, got 0"),
    (lambda: serving.RoundCosts(1, (-1.0,), (1, 1)), "each of draft_seconds must be >= 0, got -1"),
    (lambda: serving.break_even(COSTS, 0), "draft_length must be >= 1, got 0"),
    (lambda: serving.break_even_rate(math.nan, 7), "tau must be a number, got nan"),
    (lambda: serving.gain_table(TRACE, TRACE, COSTS, on="block"), "on must be 'slot' or 'product'"),
    (lambda: serving.StaticThreshold(1.5), r"threshold must lie in \[0, 1\], got 1.5"),
    (lambda: serving.Geometric(0.5), "mean must be >= 1, got 0.5"),
    (lambda: serving.draw_requests(ANSWERS, 5, domains={"code": -1}), "must be >= 0, got -1"),
    (lambda: serving.measure_steps_per_second(TARGET, context_length=25), "at most 32 tokens"),
    (lambda: serving.threshold_table(None, COSTS), "must be a DataFrame or a Rounds"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_values_out_of_range_and_arguments_of_another_kind_are_refused(call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("content", ["", "a,b\n1,2,3\n", "\0\1\n\2"], ids=["empty", "torn", "junk"])
@pytest.mark.parametrize("read", [serving.Engine.read, serving.StepsPerSecond.read])
def test_a_file_that_is_no_table_is_refused_by_name(read, content, tmp_path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.csv must be a CSV file with the columns .*: "):
        read(path)
