"""What `dspark_lab.serving` refuses by its annotations: a call, the error and part of its text."""

import math

import numpy as np
import pytest

from dspark_lab import serving
from tests.samples import tiny_drafter, tiny_target
from tests.traces import TRACE

pytestmark = pytest.mark.usefixtures("one_thread")

SPS = serving.StepsPerSecond(np.array([1, 8]), np.array([2.0, 1.0]), 0, "imaginary")
ENGINE = serving.Engine.of(SPS, 4, draft_seconds=0.5)
COSTS = ENGINE.costs()
PROFILE = serving.AcceptanceProfile.of([0.5] * 3)
ANSWERS = serving.answers_of(TRACE.assign(accept_prob=TRACE["accept_rate"]))
REQUESTS = serving.draw_requests(ANSWERS, 3)
MODELS = (tiny_target(max_position_embeddings=32), tiny_drafter())


def costs(**changes) -> serving.RoundCosts:
    seconds = {"plain_seconds": 1, "draft_seconds": (1, 1), "verify_seconds": (1, 1, 1)}
    return serving.RoundCosts(**(seconds | changes))


def served(**changes):
    given = {"engine": ENGINE, "policy": serving.FixedLength(2), "concurrency": 2}
    return serving.simulate(**({"requests": REQUESTS} | given | changes))


def measured(**changes):
    given = {"context_length": 2, "repeats": 1, "warm_up": 0}
    return serving.measure_engine(*MODELS, **(given | changes))


REFUSED = [
    (lambda: costs(plain_seconds=0), "plain_seconds must be > 0, got 0"),
    (lambda: costs(draft_seconds=(-1.0, 1)), "each of draft_seconds must be >= 0, got -1.0"),
    (lambda: serving.break_even(COSTS, 0), "draft_length must be >= 1, got 0"),
    (lambda: serving.break_even_rate(math.nan, 7), "tau must be a number, got nan"),
    (lambda: serving.gain_table(TRACE, TRACE, COSTS, on="block"), "on must be 'slot' or 'product'"),
    (lambda: serving.Engine.of(SPS, 0, draft_seconds=1.0), "longest must be >= 1, got 0"),
    (lambda: serving.FixedLength(-1), "slots must be >= 0, got -1"),
    (lambda: serving.StaticThreshold(1.5), r"threshold must lie in \[0, 1\], got 1.5"),
    (lambda: serving.Geometric(0.5), "mean must be >= 1, got 0.5"),
    (lambda: serving.draw_requests(ANSWERS, 5, domains={"code": -1}), "must be >= 0, got -1"),
    (lambda: serving.draw_requests(ANSWERS, 5, within="round"), "within must be 'conversation' or"),
    (lambda: served(rate=0.0), "rate must be > 0, got 0"),
    (lambda: measured(requests=(4, 1)), r"requests must rise .*, got \[4, 1\]"),
    (lambda: measured(temperature=-1.0), "temperature must be"),
    (lambda: serving.measure_steps_per_second(MODELS[0], context_length=25), "at most 32 together"),
    (lambda: costs(rollback_seconds="1"), "rollback_seconds must be a number"),
    (lambda: serving.temperature_table("trace.csv", COSTS), "must be a DataFrame or a sequence"),
    (lambda: serving.threshold_table(None, COSTS), "must be a DataFrame or a Rounds"),
    (lambda: serving.decode_check("target", MODELS[1], [], TRACE), "target must be a Target, got"),
    (lambda: serving.draw_requests(ANSWERS, 5, answer_tokens=2.5), "answer_tokens must be an int"),
    (lambda: served(engine=SPS), "engine must be an Engine, got StepsPerSecond"),
    (lambda: served(policy=3), "policy must be a function, got 3"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_values_out_of_range_and_arguments_of_another_kind_are_refused(call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("content", ["", "a,b\n1,2,3\n", "\0\1\n\2"], ids=["empty", "torn", "junk"])
@pytest.mark.parametrize("kind", [serving.Engine, serving.StepsPerSecond])
def test_a_file_that_is_no_table_is_refused_by_name(kind, content, tmp_path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.csv must be a CSV file|must have the columns"):
        kind.read(path)
