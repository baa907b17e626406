"""The tests marked ``gpu``: a row for each function, and the reason of each failure.

In a dry run `tests/test_gpu.py` runs its tests on the CPU, as DSPARK_LAB_GPU_TESTS tells it.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from benchmarks.gpu.child import Report

FILES = ("tests/test_gpu.py", "tests/test_memory.py")


def run(report: Report) -> None:
    # Plugins that happen to be installed are not needed, and some ask for IPython.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if report.dry:
        os.environ["DSPARK_LAB_GPU_TESTS"] = "cpu"
        del os.environ["TORCHDYNAMO_DISABLE"]
    tally = Tally(report)
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    status = pytest.main([*options, *report.pick(FILES, FILES[:1])], plugins=[tally])
    tally.finish()
    report.note("all of them", counts(tally.total) or "none ran")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not report.failures:
        report.failures.append(f"pytest ended with {pytest.ExitCode(status).name}")


class Tally:
    """Collects the outcomes of a function's tests until those of another begin."""

    def __init__(self, report: Report) -> None:
        self.report, self.name = report, ""
        self.seconds: list[float] = []
        self.outcomes: list[str] = []
        self.total: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        test = report.nodeid.rpartition("::")[2]
        if test.partition("[")[0] != self.name:
            self.finish()
            self.name = test.partition("[")[0]
        self.seconds.append(report.duration)
        self.outcomes.append(report.outcome)
        self.total[report.outcome] += 1
        if report.failed:
            self.report.fail(test, last_line(report.longreprtext))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.report.fail(report.nodeid, last_line(report.longreprtext))

    def finish(self) -> None:
        """Report the tests of one function."""
        if self.name:
            self.report.figure(self.name, "s", self.seconds, counts(Counter(self.outcomes)))
        self.name, self.seconds, self.outcomes = "", [], []


def counts(outcomes: Counter[str]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())


def last_line(text: str) -> str:
    """The last line of the error itself, which pytest begins with an E, or of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines or ["no message"])[-1]
