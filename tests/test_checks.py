"""`checked`: annotations that check arguments, in tables of what passes and what does not."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from dspark_lab.checks import (
    Axis,
    BlockSize,
    Count,
    Device,
    Finite,
    NonNegative,
    NotEmpty,
    Positive,
    SeqLen,
    Share,
    Size,
    checked,
)

if TYPE_CHECKING:
    from somewhere import Unknown


class Named(typing.Protocol):
    name: str

    def speak(self) -> str: ...


class Speaker:
    name = "me"

    def speak(self) -> str:
        return "hello"


def long(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, **kwargs)


SCALARS: list[tuple[Any, list[Any], list[tuple[Any, type, str]]]] = [
    (
        int,
        [0, -3, np.int64(4)],
        [
            (2.0, TypeError, "x must be an int, got 2.0 (float)"),
            (True, TypeError, "x must be an int, got True (bool)"),
            ("2", TypeError, "x must be an int, got '2' (str)"),
            (None, TypeError, "x must be an int, got None"),
            (torch.tensor(2), TypeError, "x must be an int, got Tensor"),
        ],
    ),
    (
        float,
        [1, 0.5, np.float32(1), float("nan")],
        [
            ("1", TypeError, "x must be a number, got '1' (str)"),
            (True, TypeError, "x must be a number, got True (bool)"),
            (Fraction(1, 2), TypeError, "x must be a number, got Fraction"),
        ],
    ),
    (bool, [True], [(1, TypeError, "x must be True or False, got 1 (int)")]),
    (str, ["", "a"], [(b"a", TypeError, "x must be a string, got b'a' (bytes)")]),
    (Count, [1, 9], [(0, ValueError, "x must be >= 1, got 0")]),
    (Size, [0], [(-1, ValueError, "x must be >= 0, got -1")]),
    (
        Positive,
        [1, 1e-9],
        [
            (0.0, ValueError, "x must be > 0, got 0.0"),
            (float("inf"), ValueError, "x must be finite, got inf"),
            (float("nan"), ValueError, "x must be finite, got nan"),
            (np.float32("inf"), ValueError, "x must be finite, got inf"),
        ],
    ),
    (NonNegative, [0], [(-0.5, ValueError, "x must be >= 0, got -0.5")]),
    (Finite, [-1e300], [(float("-inf"), ValueError, "x must be finite, got -inf")]),
    (
        Share,
        [0, 1.0],
        [
            (1.5, ValueError, "x must lie in [0, 1], got 1.5"),
            (float("nan"), ValueError, "x must lie in [0, 1], got nan"),
        ],
    ),
    (
        Literal["a", "b"],
        ["a"],
        [
            ("c", ValueError, "x must be 'a' or 'b', got 'c'"),
            (1, TypeError, "x must be 'a' or 'b', got 1 (int)"),
        ],
    ),
    (Count | None, [None, 1], [(0, ValueError, "x must be >= 1, got 0")]),
    (str | Path, ["a", Path("a")], [(1, TypeError, "x must be a string or a Path, got 1 (int)")]),
    (
        Literal["auto"] | Count | None,
        ["auto", 4, None],
        [
            ("b", ValueError, "x must be 'auto', got 'b'"),
            (0.5, TypeError, "x must be 'auto' or an int or None, got 0.5 (float)"),
        ],
    ),
    (
        Sequence[int],
        [[], (1, 2), range(3), [np.int64(2)]],
        [
            ("12", TypeError, "x must be a sequence, got '12' (str)"),
            (3, TypeError, "x must be a sequence, got 3 (int)"),
            ([1, 2.0], TypeError, "each of x must be an int, got 2.0 (float)"),
            ([True], TypeError, "each of x must be an int, got True (bool)"),
        ],
    ),
    (Sequence[Count], [[1]], [([1, 0], ValueError, "each of x must be >= 1, got 0")]),
    (Annotated[Sequence[int], NotEmpty()], [[1]], [([], ValueError, "x must not be empty")]),
    (
        Iterable[str],
        [iter("ab"), {"a"}],
        [("a", TypeError, "x must be an Iterable, got 'a' (str)")],
    ),
    (
        tuple[int, str],
        [(1, "a")],
        [
            ((1,), ValueError, "x must hold 2 values, got (1,) (tuple)"),
            ([1, "a"], TypeError, "x must be a tuple, got [1, 'a'] (list)"),
        ],
    ),
    (
        Mapping[str, Positive],
        [{}, {"a": 1}],
        [
            ({"a": 0}, ValueError, "x['a'] must be > 0, got 0"),
            ({1: 1}, TypeError, "each key of x must be a string, got 1 (int)"),
        ],
    ),
    (Callable[[int], int], [abs, nn.ReLU()], [(1, TypeError, "x must be a function, got 1 (int)")]),
    (nn.Module, [nn.ReLU()], [("m", TypeError, "x must be a Module, got 'm' (str)")]),
    (Named, [Speaker()], [(1, TypeError, "x must be a Named (with name, speak), got 1 (int)")]),
    (
        Device,
        ["cpu", torch.device("meta")],
        [
            ("nonsense", ValueError, "x must be a device of this machine, such as 'cpu'"),
            (1.5, TypeError, "x must be a device or a string, got 1.5 (float)"),
        ],
    ),
    (
        Shaped[np.ndarray, "rows"],
        [np.zeros(3)],
        [(np.zeros((1, 3)), ValueError, "x must be [rows], got shape (1, 3)")],
    ),
    (
        Float[np.ndarray, "*axes"],
        [np.zeros((1, 2))],
        [(np.zeros(3, int), TypeError, "x must hold floats, got int64")],
    ),
    (
        Bool[Tensor, "a"] | Int[Tensor, "a b"],
        [torch.ones(2).bool(), long(1, 2)],
        [(torch.ones(2), TypeError, "x must be bool, got torch.float32")],
    ),
]


@pytest.mark.parametrize(("annotation", "good", "bad"), SCALARS, ids=[str(c[0]) for c in SCALARS])
def test_one_argument_is_what_its_annotation_says(annotation, good, bad):
    def function(x):
        return x

    function.__annotations__["x"] = annotation
    function = checked(function)
    for value in good:
        assert function(value) is value
        assert function(x=value) is value
    for value, error, message in bad:
        with pytest.raises(error, match=re.escape(message)) as caught:
            function(value)
        assert "\n" not in str(caught.value)


@checked
def attend(
    anchors: Int[Tensor, "batch anchor"],
    keep: Bool[Tensor, "batch anchor"],
    query: Float[Tensor, "batch query 4"],
    *,
    block_size: BlockSize = 2,
    seq_len: SeqLen | None = None,
    row: Shaped[Tensor, "batch seq"] | None = None,
    states: Sequence[Float[Tensor, "batch *axes"]] = (),
) -> int:
    return block_size


ANCHORS, KEEP, QUERY = long(2, 3), torch.ones(2, 3).bool(), torch.zeros(2, 6, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"anchors": [[1]]}, TypeError, "anchors must be a tensor, got [[1]] (list)"),
        ({"anchors": KEEP}, TypeError, "anchors must hold integers, got torch.bool"),
        ({"keep": ANCHORS}, TypeError, "keep must be bool, got torch.int64"),
        ({"query": long(2, 6, 4)}, TypeError, "query must hold floats, got torch.int64"),
        ({"anchors": long(2)}, ValueError, "anchors must be [batch, anchor], got shape (2,)"),
        (
            {"keep": KEEP[:, :2]},
            ValueError,
            "keep must be [batch, anchor] with anchor = 3 as in anchors, got shape (2, 2)",
        ),
        (
            {"query": QUERY[..., :3]},
            ValueError,
            "query must be [batch, query, 4], got shape (2, 6, 3)",
        ),
        (
            {"seq_len": 5, "row": torch.zeros(2, 6)},
            ValueError,
            "row must be [batch, seq] with seq = 5 as in seq_len, got shape (2, 6)",
        ),
        (
            {"states": [torch.zeros(2, 5), torch.zeros(2, 6)]},
            ValueError,
            "each of states must be [batch, *axes] with *axes = (5,) as in each of states",
        ),
        (
            {"keep": KEEP.to("meta")},
            ValueError,
            "all tensors must be on one device, got anchors on cpu, keep on meta",
        ),
    ],
)
def test_tensors_of_a_call_agree(changed, error, message):
    good = {"anchors": ANCHORS, "keep": KEEP, "query": QUERY, "block_size": 2}
    assert attend(ANCHORS, KEEP, QUERY, block_size=2) == attend(**good) == 2
    with pytest.raises(error, match=re.escape(message)):
        attend(**(good | changed))


def test_a_number_must_be_its_axis_s_length():
    @checked
    def function(
        row: Shaped[Tensor, "batch seq"], seq_len: SeqLen, n: Annotated[int, Axis("batch")]
    ):
        pass

    function(torch.zeros(2, 6), 6, 2)
    with pytest.raises(ValueError, match="seq_len must be 6, the seq of row, got 5"):
        function(torch.zeros(2, 6), 5, 2)
    with pytest.raises(ValueError, match="n must be 2, the batch of row, got 1"):
        function(torch.zeros(2, 6), 6, n=1)


def test_whole_numbers_of_every_width_are_integers():
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint64):
        attend(ANCHORS.to(dtype), KEEP, QUERY, block_size=2)


@checked
@dataclass(frozen=True)
class Sizes:
    count: Count
    names: list[str] = field(default_factory=list)
    later: Sizes | None = None


def test_a_dataclass_checks_what_it_is_built_from():
    sizes = Sizes(1, later=Sizes(2))
    assert replace(sizes, count=3).count == 3
    for build in (lambda: Sizes(0), lambda: replace(sizes, count=0)):
        with pytest.raises(ValueError, match="count must be >= 1, got 0"):
            build()
    with pytest.raises(TypeError, match="later must be a Sizes or None, got 2"):
        Sizes(1, later=2)


def test_methods_check_and_keep_what_python_knows_of_them():
    class Counter:
        @checked
        def add(self, count: Count, *more: int, note: str = "", **others: Any) -> int:
            """Doc."""
            return count

        @staticmethod
        @checked
        def twice(count: Count) -> int:
            return 2 * count

    assert Counter().add(2, 3, note="a", other=1) == 2 and Counter.twice(2) == 4
    assert Counter.add.__doc__ == "Doc."
    with pytest.raises(ValueError, match="count must be >= 1"):
        Counter().add(0)
    with pytest.raises(TypeError, match="note must be a string, got 1"):
        Counter().add(1, note=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Counter().add()


def test_names_that_only_type_checkers_import_stand_for_anything():
    @checked
    def function(x: Unknown, y: Unknown | Count, z: Unknown.Part, count: list[Unknown] | None):
        return count

    assert function(1, 0, None, [3]) == [3]
    with pytest.raises(TypeError, match="count must be a list or None, got 3"):
        function(1, 0, None, 3)


def test_a_compiled_graph_has_no_checks_and_no_breaks():
    @checked
    def double(x: Float[Tensor, "batch"], times: Count) -> Tensor:
        return x * times

    double(torch.ones(2), 1)  # reads the annotations before the compiler meets the function
    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2), 2), torch.full((2,), 2.0))
    assert torch.equal(compiled(torch.ones(2), 0), torch.zeros(2))
    with pytest.raises(ValueError):
        double(torch.ones(2), 0)


def test_a_check_takes_microseconds():
    import timeit

    seconds = min(timeit.repeat(lambda: attend(ANCHORS, KEEP, QUERY), number=200, repeat=5)) / 200
    assert seconds < 1e-3
