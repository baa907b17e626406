"""Faults planted between training and serving: each is felt, and the lab's diagnosis finds it."""

import pandas as pd
import pytest

from benchmarks import diagnose as report
from data.make.planted import FAULTS, Case, decode_case, possible
from dspark_lab.pairs import load_pair
from dspark_lab.records import CAUSES, HEALTHY

pytestmark = pytest.mark.usefixtures("one_thread")


def accepted(cause: str, drafter: str = "dspark-k7", temperature: float = 1.0) -> list[int]:
    """Of each round, on the same six questions with the same draws."""
    case = Case(cause, drafter, temperature, 3)
    return decode_case(load_pair(), case, requests=6).rounds["accepted"].tolist()


@pytest.fixture(scope="module")
def healthy() -> list[int]:
    return accepted("")


def test_every_fault_is_a_cause_that_can_be_named() -> None:
    assert set(FAULTS) == set(CAUSES)


@pytest.mark.parametrize("cause", FAULTS)
def test_a_fault_changes_what_is_accepted_and_leaves_no_trace(
    healthy: list[int], cause: str
) -> None:
    assert accepted(cause) != healthy
    # Patches and changed weights are gone with the case.
    assert accepted("") == healthy


def test_what_a_drafter_cannot_have_is_not_planted() -> None:
    pair = load_pair()
    dspark, dflash = (pair.load_drafter(name) for name in ("dspark-k7", "dflash-k7"))
    impossible = {
        (cause, drafter.config.has_markov_head, temperature)
        for cause in FAULTS
        for drafter in (dspark, dflash)
        for temperature in (0.0, 1.0)
        if not possible(cause, drafter, temperature)
    }
    expected = {("greedy drafts", head, 0.0) for head in (True, False)}
    assert impossible == expected | {("no Markov head", False, t) for t in (0.0, 1.0)}


def test_a_report_counts_places_and_what_was_taken_for_what() -> None:
    rows = [
        ("window", "window", 1, "window", 1, -0.3),
        ("window", "tokenizer", 2, "tokenizer", 4, -0.05),
        (HEALTHY, HEALTHY, 1, "window", 2, 0.01),
    ]
    columns = ["cause", "requests", "requests_place", "sums", "sums_place", "effect"]
    lines = list(report.report(pd.DataFrame(rows, columns=columns)))
    assert lines[0].startswith("from requests: right cause first 1 of 2 (1.3% to 98.7%)")
    assert "among three 2 of 2" in lines[0] and "nothing wrong 1 of 1" in lines[0]
    assert "right cause first 1 of 2" in lines[1] and "among three 1 of 2" in lines[1]
    assert lines[2].startswith("accept length changed by a tenth in 1 of 2")
    assert lines[3] == (
        "  window: first 1, among three 2 of 2, from sums 1; tau -18%; taken for tokenizer 1"
    )


@pytest.mark.slow
def test_planted_faults_are_found() -> None:
    """26 faults and four healthy servers, learned and reported on different questions and drafters.

    Where 95 % are among three, fewer than 21 of 26 are so with a probability of 0.0015, and
    fewer than two of four healthy ones with one of 0.0005.
    """
    found = pd.DataFrame([report.diagnosed(case) for case in report.planned(2, 4)])
    sick = found["cause"] != HEALTHY
    assert sick.sum() == 26
    assert (found.loc[sick, "requests_place"] <= 3).sum() >= 21
    assert (found.loc[sick, "requests_place"] == 1).sum() >= 9
    assert (found.loc[~sick, "requests"] == HEALTHY).sum() >= 2
