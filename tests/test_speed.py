"""Decoded speed from runs made by hand, with chosen seconds; break-even rates from added yields."""

import math
from collections.abc import Sequence

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_lab.decoding import Decoded, decode
from dspark_lab.serving import break_even_rate, repeated_speeds, speed_table
from tests.samples import tiny_drafter, tiny_target


def a_run(
    tokens: Sequence[int], draft: float, verify: float, rest: float, prompt: float = 0.0
) -> Decoded:
    """A run of one answer that grew by so many tokens in each round."""
    answer = list(range(1 + sum(tokens)))
    rounds = pd.DataFrame({"prompt": 0, "round": range(len(tokens)), "tokens": list(tokens)})
    seconds = {"prompt": prompt, "draft": draft, "verify": verify, "rest": rest}
    return Decoded([answer], [""], pd.DataFrame(), rounds, seconds)


def yielded(rate: float, block_size: int) -> float:
    """Tokens of a round when every slot is accepted at this rate, given all before it."""
    return sum(rate**slots for slots in range(block_size + 1))


def test_the_figures_are_those_of_hand_made_runs():
    # Eight tokens in two rounds and 4 s against six tokens in six steps and 12 s.
    plain = [a_run([1] * 4, 0.0, 7.0, 1.0, prompt=50.0), a_run([1] * 2, 0.0, 4.0, 0.0)]
    drafted = [a_run([5], 0.5, 1.0, 0.5, prompt=90.0), a_run([3], 0.5, 1.25, 0.25)]
    table = speed_table(plain, drafted, block_size=2)
    expected = {
        "tokens_per_second": 2.0,
        "plain_tokens_per_second": 0.5,
        "speedup": 4.0,
        "tau": 4.0,
        "draft": 0.25,
        "verify": 0.5625,
        "rest": 0.1875,
        # A round takes 2 s, in which plain decoding says one token.
        "break_even_tau": 1.0,
        "break_even_rate": 0.0,
    }
    assert list(table.index) == list(expected)
    assert table.to_dict() == pytest.approx(expected, abs=1e-12)


def test_a_dear_round_breaks_even_at_the_rate_that_pays_for_it():
    # A round takes 3 s and a plain step 1 s; 1 + a + a * a is 3 where a is 1, 1.75 where it is 1/2.
    plain = [a_run([1, 1], 0.0, 2.0, 0.0)]
    for seconds, rate in ((3.0, 1.0), (1.75, 0.5), (3.01, math.inf)):
        table = speed_table(plain, [a_run([2], seconds / 2, seconds / 2, 0.0)], block_size=2)
        assert table["break_even_tau"] == pytest.approx(seconds)
        assert table["break_even_rate"] == pytest.approx(rate)


seconds = st.floats(0.001, 100)


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.integers(1, 9),
    st.tuples(seconds, seconds, seconds),
    st.tuples(seconds, seconds),
)
def test_the_speedup_is_tau_over_the_tau_that_breaks_even(tokens, steps, parts, plain_parts):
    plain = [a_run([1] * steps, 0.0, *plain_parts)]
    table = speed_table(plain, [a_run(tokens, *parts)], block_size=7)
    assert table["speedup"] == pytest.approx(table["tau"] / table["break_even_tau"])
    assert table[["draft", "verify", "rest"]].sum() == pytest.approx(1)
    assert table["draft"] / table["rest"] == pytest.approx(parts[0] / parts[2])


@given(st.lists(st.tuples(st.integers(1, 8), seconds), min_size=2, max_size=5))
def test_several_runs_count_like_one_that_holds_them_all(runs):
    plain = [a_run([1] * 3, 0.0, 1.0, 0.5)]
    apart = [a_run([tokens], 0.1, time, 0.2) for tokens, time in runs]
    count, time = len(runs), sum(time for _, time in runs)
    together = a_run([tokens for tokens, _ in runs], 0.1 * count, time, 0.2 * count)
    one, other = speed_table(plain, apart, 7), speed_table(plain, [together], 7)
    assert one.to_dict() == pytest.approx(other.to_dict())


def test_repeated_runs_have_the_median_and_the_range_of_each_figure():
    # Speed-ups of 2, 4 and 1: run by run, a plain token takes 1 s.
    plain = [a_run([1], 0.0, 1.0, 0.0)] * 3
    drafted = [a_run([4], 0.5, 0.5 + more, 0.0) for more in (1.0, 0.0, 3.0)]
    table = repeated_speeds(plain, drafted, block_size=7)
    assert table["of_runs"].tolist() == ["median", "lowest", "highest"]
    assert table["runs"].tolist() == [3] * 3
    assert table["speedup"].tolist() == [2.0, 1.0, 4.0]
    assert table["break_even_tau"].tolist() == [2.0, 1.0, 4.0]
    assert table["draft"].tolist() == [0.25, 0.125, 0.5]
    assert list(table)[2:] == list(speed_table(plain, drafted, block_size=7).index)
    [middle] = set(repeated_speeds(plain[:1], drafted[:1], block_size=7)["speedup"])
    assert middle == 2.0


@pytest.mark.parametrize("counts", [(0, 0), (1, 2)])
def test_repeated_runs_are_pairs(counts):
    plain, drafted = ([a_run([1], 0, 1, 0)] * count for count in counts)
    with pytest.raises(ValueError, match=rf"as many runs, one or more, got \({counts[0]}, "):
        repeated_speeds(plain, drafted, block_size=7)


def test_a_real_run_has_every_figure():
    target, drafter = tiny_target(), tiny_drafter(1).eval()
    drafter.use_target_embeddings(target.embed_weight, target.head_weight)
    settings = {"temperature": 1.0, "max_new_tokens": 9, "end_ids": []}
    prompts = [[1, 2], [3]]
    drafted = decode(target, drafter, prompts, **settings)
    plain = decode(target, None, prompts, **settings)
    table = speed_table([plain], [drafted], drafter.config.block_size)
    assert table["tau"] == drafted.tau > 1
    assert table["tokens_per_second"] == pytest.approx(drafted.tokens_per_second)
    assert table["plain_tokens_per_second"] == pytest.approx(plain.tokens_per_second)


@pytest.mark.parametrize("name", ["plain", "drafted"])
@pytest.mark.parametrize("nothing", [[], [a_run([], 0.0, 0.0, 0.0, prompt=1.0)]], ids=["no", "one"])
def test_a_run_without_a_round_has_no_speed(name, nothing):
    runs = {"plain": [a_run([1], 0, 1, 0)], "drafted": [a_run([2], 1, 1, 1)]} | {name: nothing}
    with pytest.raises(ValueError, match=f"{name} must hold at least one round, got none"):
        speed_table(runs["plain"], runs["drafted"], 7)


@given(st.floats(0, 1), st.integers(1, 20))
def test_the_break_even_rate_yields_tau(rate, block_size):
    assert break_even_rate(yielded(rate, block_size), block_size) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize("block_size", [1, 7, 15])
def test_dearer_rounds_than_a_block_and_one_never_pay_and_those_of_a_step_always(block_size):
    for tau in (block_size + 1.0001, 1e9, math.inf):
        assert break_even_rate(tau, block_size) == math.inf
    for tau in (1, 0.3, 0, -2.0, -math.inf):
        assert break_even_rate(tau, block_size) == 0
