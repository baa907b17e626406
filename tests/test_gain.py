"""What calibration gains, counted again by a loop over the trace."""

import math

import pytest

from dspark_lab.rates import SequentialTemperatures, split_prompts, temperature_scale
from dspark_lab.serving import RoundCosts, gain_table
from tests.traces import SLOTS, TRACE, made_trace, rounds_by_hand, unlucky

DRAFT, VERIFY, TOKEN = 0.3, 1.0, 0.25


def costs_of(draft: float, verify: float, token: float, overhead: float = 0.0) -> RoundCosts:
    """Of a round whose target pass takes ``verify``, and ``token`` for each of its tokens."""
    return RoundCosts.of(
        SLOTS,
        plain_seconds=verify + token,
        draft_seconds=draft,
        verify_seconds=lambda n: verify + token * n,
        overhead_seconds=overhead,
    )


COSTS = costs_of(DRAFT - 0.1, VERIFY, TOKEN, overhead=0.1)


def speed_by_hand(trace, value, threshold, on="slot") -> tuple[float, float, float]:
    """Verified and accepted slots per round, and tokens per second; ``value`` reads a row."""
    verified = accepted = seconds = 0.0
    blocks = rounds_by_hand(trace).values()
    for block in blocks:
        reached, asked, product = True, 0, 1.0
        for row in block:
            product *= value(row)
            if not row.verified or (value(row) if on == "slot" else product) < threshold:
                break
            asked += 1
            accepted += row.accept_rate if reached else 0
            reached = reached and row.accepted
        verified += asked
        seconds += DRAFT + VERIFY + TOKEN * (asked + 1)
    count = len(blocks)
    return verified / count, accepted / count, (accepted + count) / seconds


@pytest.mark.parametrize("on", ["slot", "product"])
@pytest.mark.parametrize(
    "trace",
    [made_trace(4, noise=0.5), made_trace(5, whole=False, noise=0.5), unlucky(made_trace(4))],
    ids=["whole", "ragged", "unlucky"],
)
def test_gains_are_those_of_the_thresholds_that_were_fastest_on_the_other_part(on, trace) -> None:
    fit, test = split_prompts(trace)
    scaling = SequentialTemperatures.fit_trace(fit, otherwise=1.0)
    thresholds = [0.0, 0.35, 0.5, 0.65, 0.8, 0.95]
    table = gain_table(fit, test, COSTS, thresholds=thresholds, on=on, resamples=50)
    assert table["values"].tolist() == ["everything", "raw", "scaled", "oracle"]
    values = {
        "everything": lambda row: 1.0,
        "raw": lambda row: row.confidence,
        "scaled": lambda row: float(
            temperature_scale(row.confidence, scaling.temperatures[row.slot])
        ),
        "oracle": lambda row: row.accept_rate if row.verified else 0.0,
    }
    raw = table.set_index("values").loc["raw", "speed"]
    for row in table.itertuples():
        value = values[row.values]
        best = max(thresholds, key=lambda t: speed_by_hand(fit, value, t, on)[2])
        if row.values == "everything":
            assert math.isnan(row.threshold)
        else:
            assert row.threshold == best
        verified, accepted, speed = speed_by_hand(test, value, best, on)
        assert row.verified == pytest.approx(verified)
        assert row.accepted == pytest.approx(accepted)
        assert row.speed == pytest.approx(speed)
        assert row.gain_percent == pytest.approx(100 * (speed / raw - 1))
        assert row.speed_low <= row.speed <= row.speed_high
        assert row.gain_low <= row.gain_high


def test_the_oracle_is_fastest_and_scaling_lies_between() -> None:
    # Slots distorted differently, so that no threshold on their raw product fits them all. Over
    # five seeds the oracle gains 1.9 to 3.4 % and scaling 0.3 to 0.8 %.
    trace = made_trace(6, range(40), 60, distortion=(0.3, 3.0, 0.3, 3.0), noise=0.7)
    costs = costs_of(DRAFT, VERIFY, 0.7)
    table = gain_table(*split_prompts(trace), costs, on="product", resamples=100)
    table = table.set_index("values")
    speeds = table["speed"]
    assert speeds["oracle"] > speeds["scaled"] > speeds["raw"] > speeds["everything"]
    assert table.loc["oracle", "gain_low"] > 0
    assert table.loc["raw", "gain_percent"] == 0 and table.loc["raw", "gain_high"] == 0


def test_free_tokens_leave_nothing_to_gain() -> None:
    table = gain_table(*split_prompts(TRACE), costs_of(0.0, 1.0, 0.0), resamples=20)
    assert table["verified"].tolist() == [SLOTS] * 4
    assert table["gain_percent"].tolist() == [0] * 4


def test_costs_of_shorter_blocks_are_refused() -> None:
    short = RoundCosts.of(SLOTS - 1, plain_seconds=1, draft_seconds=1, verify_seconds=1)
    with pytest.raises(ValueError, match=f"draft_length must be at most {SLOTS - 1}, got {SLOTS}"):
        gain_table(*split_prompts(TRACE), short)
