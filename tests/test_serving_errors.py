"""What `dspark_lab.serving` refuses by its annotations: a call, the error and part of its text."""

import math

import numpy as np
import pytest

from dspark_lab.serving import (
    AcceptanceProfile,
    Engine,
    FixedLength,
    Geometric,
    RoundCosts,
    StaticThreshold,
    StepsPerSecond,
    acceptance_profile,
    answers_of,
    best_length,
    best_threshold,
    break_even,
    break_even_rate,
    decode_check,
    draw_requests,
    gain_table,
    load_table,
    measure_engine,
    measure_steps_per_second,
    simulate,
    speed_table,
    speedup_table,
    temperature_table,
    threshold_table,
)
from tests.samples import tiny_drafter, tiny_target
from tests.traces import TRACE

pytestmark = pytest.mark.usefixtures("one_thread")

SPS = StepsPerSecond(np.array([1, 8]), np.array([2.0, 1.0]), 0, "imaginary")
ENGINE = Engine.of(SPS, 4, draft_seconds=0.5)
COSTS = ENGINE.costs()
PROFILE = AcceptanceProfile.of([0.5] * 3)
ANSWERS = answers_of(TRACE.assign(accept_prob=TRACE["accept_rate"]))
REQUESTS = draw_requests(ANSWERS, 3)
MODELS = (tiny_target(max_position_embeddings=32), tiny_drafter())


def costs(**changes) -> RoundCosts:
    seconds = {"plain_seconds": 1, "draft_seconds": (1, 1), "verify_seconds": (1, 1, 1)}
    return RoundCosts(**(seconds | changes))


def served(**changes):
    given = {"engine": ENGINE, "policy": FixedLength(2), "concurrency": 2}
    return simulate(**({"requests": REQUESTS} | given | changes))


def measured(**changes):
    return measure_engine(*MODELS, **({"context_length": 2, "repeats": 1, "warm_up": 0} | changes))


BAD_VALUES = [
    (lambda: costs(plain_seconds=0), "plain_seconds must be > 0, got 0"),
    (lambda: costs(draft_seconds=(-1.0, 1)), "each of draft_seconds must be >= 0, got -1.0"),
    (lambda: costs(overhead_seconds=math.nan), "overhead_seconds must be finite, got nan"),
    (lambda: break_even(COSTS, 0), "draft_length must be >= 1, got 0"),
    (lambda: break_even_rate(2.0, 0), "block_size must be >= 1, got 0"),
    (lambda: break_even_rate(math.nan, 7), "tau must be a number, got nan"),
    (lambda: speedup_table(PROFILE, COSTS, [0]), "each of draft_lengths must be >= 1, got 0"),
    (lambda: PROFILE.tau(1, 0), "tokens must be >= 1, got 0"),
    (lambda: acceptance_profile(TRACE, resamples=0), "resamples must be >= 1, got 0"),
    (lambda: gain_table(TRACE, TRACE, COSTS, on="block"), "on must be 'slot' or 'product', got"),
    (lambda: Engine.of(SPS, 0, draft_seconds=1.0), "longest must be >= 1, got 0"),
    (lambda: ENGINE.costs(0), "requests must be >= 1, got 0"),
    (lambda: ENGINE.draft_seconds(1, 0), "draft_lengths must be >= 1, got 0"),
    (lambda: FixedLength(-1), "slots must be >= 0, got -1"),
    (lambda: StaticThreshold(1.5), r"threshold must lie in \[0, 1\], got 1.5"),
    (lambda: Geometric(0.5), "mean must be >= 1, got 0.5"),
    (lambda: draw_requests(ANSWERS, 0), "requests must be >= 1, got 0"),
    (lambda: draw_requests(ANSWERS, 5, domains={"code": -1}), r"domains\['code'\] must be >= 0"),
    (lambda: draw_requests(ANSWERS, 5, within="round"), "within must be 'conversation' or"),
    (lambda: served(concurrency=0), "concurrency must be >= 1, got 0"),
    (lambda: served(rate=0.0), "rate must be > 0, got 0"),
    (lambda: served(warm_up=-1), "warm_up must be >= 0, got -1"),
    (lambda: measured(requests=(4, 1)), r"requests must rise .*, got \[4, 1\]"),
    (lambda: measured(temperature=-1.0), "temperature must be"),
    (lambda: measured(repeats=0), "repeats must be >= 1, got 0"),
    (lambda: measure_steps_per_second(MODELS[0], (4, 2)), "tokens must rise"),
    (lambda: measure_steps_per_second(MODELS[0], tokens_per_row=0), "tokens_per_row must be >= 1"),
    (lambda: measure_steps_per_second(MODELS[0], context_length=25), "at most 32 together .* 33"),
]

WRONG_KINDS = [
    (lambda: costs(rollback_seconds="1"), "rollback_seconds must be a number"),
    (lambda: costs(draft_seconds=None), "draft_seconds must be a sequence"),
    (lambda: break_even_rate(True, 7), "tau must be a number, got True"),
    (lambda: break_even(None, 1), "costs must be a RoundCosts, got None"),
    (lambda: acceptance_profile([]), "trace must be a DataFrame, got"),
    (lambda: best_length(PROFILE, ENGINE), "costs must be a RoundCosts, got Engine"),
    (lambda: temperature_table("trace.csv", COSTS), "trace must be a DataFrame or a sequence"),
    (lambda: threshold_table(None, COSTS), "trace must be a DataFrame or a Rounds, got None"),
    (lambda: best_threshold(TRACE, 1.0), "costs must be a RoundCosts, got 1.0"),
    (lambda: gain_table(TRACE, TRACE, {"draft": 1}), "costs must be a RoundCosts, got"),
    (lambda: speed_table(None, [], 7), "plain must be a sequence, got None"),
    (lambda: decode_check("target", MODELS[1], [], TRACE), "target must be a Target, got"),
    (lambda: measure_engine(MODELS[0], None), "drafter must be a Drafter, got None"),
    (lambda: Engine.of("sps.csv", 2, draft_seconds=1.0), "sps must be a StepsPerSecond, got"),
    (lambda: answers_of("trace.csv"), "trace must be a DataFrame or an Answers, got"),
    (lambda: draw_requests(ANSWERS, 5, answer_tokens=2.5), "answer_tokens must be an int"),
    (lambda: served(engine=SPS), "engine must be an Engine, got StepsPerSecond"),
    (lambda: served(policy=3), "policy must be a function, got 3"),
    (lambda: load_table(ANSWERS, None, [FixedLength(0)]), "engine must be an Engine, got None"),
]


@pytest.mark.parametrize("call, message", BAD_VALUES)
def test_a_value_out_of_range_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call, message", WRONG_KINDS)
def test_an_argument_of_another_kind_is_refused(call, message) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("content", ["", "a,b\n1,2,3\n", "\0\1\n\2"], ids=["empty", "torn", "junk"])
@pytest.mark.parametrize("kind", [Engine, StepsPerSecond])
def test_a_file_that_is_no_table_is_refused_by_name(kind, content, tmp_path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.csv must be a CSV file|must have the columns"):
        kind.read(path)
