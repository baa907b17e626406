"""A hypothesis profile that never varies, and fixtures of many files.

Every test runs on the CPU, but for those marked `gpu`, most of them in `tests/test_gpu.py`.
"""

import gc
import shutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings

from tests.browsers import browser, lab, lab_server, open_page  # noqa: F401

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

# Garbage is not looked for among what imports make, which stays: that would take seconds.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture
def cpp_compiler() -> None:
    """For tests that compile for the CPU: a bare machine has nothing to compile with."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")


@pytest.fixture
def unplaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that save much and ask no file where things lie: finding that out takes longest."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    save = Figure.savefig

    def save_unplaced(figure: Figure, *args: Any, **options: Any) -> None:
        with mock.patch.object(ConstrainedLayoutEngine, "execute"):
            save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save_unplaced)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests on tiny tensors, where a second thread only waits and changes a sum's bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
