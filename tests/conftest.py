"""The device that a test runs on, and a hypothesis profile that never varies.

The `device` fixture repeats a test on the CPU and, where there is one, on a CUDA GPU; the
repetition carries the marker `gpu`.
"""

import gc
import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

# Garbage is not looked for among what imports make, which stays: that would take seconds.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that every tensor of the test lives on."""
    return torch.device(request.param)


@pytest.fixture
def cpp_compiler() -> None:
    """For tests that compile for the CPU: a bare machine has nothing to compile with."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests on tiny tensors, where a second thread only waits and changes a sum's bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
