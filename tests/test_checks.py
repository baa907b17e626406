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
    Within,
    checked,
    require,
)

if TYPE_CHECKING:
    from somewhere import Unknown


class Named(typing.Protocol):
    name: str

    def touch(self) -> None: ...


def long(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, **kwargs)


Vector, Either = Shaped[np.ndarray, "rows"], Bool[Tensor, "a"] | Int[Tensor, "a b"]
GOOD: list[tuple[Any, list[Any]]] = [
    (int, [0, -3, np.int64(4)]),
    (float, [1, 0.5, np.float32(1), float("nan")]),
    (bool, [True]),
    (str, ["", "a"]),
    (Count, [1, 9]),
    (Size, [0]),
    (Positive, [1, 1e-9]),
    (NonNegative, [0]),
    (Finite, [-1e300]),
    (Share, [0, 1.0]),
    (Literal["a", "b"], ["a"]),
    (Count | None, [None, 1]),
    (str | Path, ["a", Path("a")]),
    (Literal["auto"] | Count | None, ["auto", 4, None]),
    (Sequence[int], [[], (1, 2), range(3), [np.int64(2)]]),
    (Annotated[Sequence[int], NotEmpty()], [[1]]),
    (Iterable[str], [iter("ab"), {"a"}]),
    (tuple[int, str], [(1, "a")]),
    (Mapping[str, Positive], [{}, {"a": 1}]),
    (Callable[[int], int], [abs, nn.ReLU()]),
    (nn.Module, [nn.ReLU()]),
    (Named, [Path("a")]),
    (Device, ["cpu", torch.device("meta")]),
    (Vector, [np.zeros(3)]),
    (Float[np.ndarray, "*axes"], [np.zeros((1, 2))]),
    (Either, [torch.ones(2).bool(), long(1, 2), long(1, 2).to(torch.uint64)]),
]
BAD: list[tuple[Any, Any, type[Exception], str]] = [
    (int, 2.0, TypeError, "must be an int, got 2.0 (float)"),
    (int, True, TypeError, "must be an int, got True (bool)"),
    (int, None, TypeError, "must be an int, got None"),
    (float, Fraction(1, 2), TypeError, "must be a number, got Fraction"),
    (bool, 1, TypeError, "must be True or False, got 1 (int)"),
    (str, b"a", TypeError, "must be a string, got b'a' (bytes)"),
    (Count, 0, ValueError, "must be >= 1, got 0"),
    (Size, -1, ValueError, "must be >= 0, got -1"),
    (Positive, 0.0, ValueError, "must be > 0, got 0.0"),
    (Positive, float("nan"), ValueError, "must be finite, got nan"),
    (Positive, np.float32("inf"), ValueError, "must be finite, got inf"),
    (Finite, float("-inf"), ValueError, "must be finite, got -inf"),
    (Share, 1.5, ValueError, "must lie in [0, 1], got 1.5"),
    (Share, float("nan"), ValueError, "must lie in [0, 1], got nan"),
    (Annotated[float, Within(0, 1, above=True)], 0, ValueError, "must lie in (0, 1], got 0"),
    (Literal["a", "b"], "c", ValueError, "must be 'a' or 'b', got 'c'"),
    (Literal["a", "b"], 1, TypeError, "must be 'a' or 'b', got 1 (int)"),
    (Count | None, 0, ValueError, "must be >= 1, got 0"),
    (str | Path, 1, TypeError, "must be a string or a Path, got 1 (int)"),
    (Literal["auto"] | Count, "b", ValueError, "must be 'auto', got 'b'"),
    (Literal["auto"] | Count, 0.5, TypeError, "must be 'auto' or an int, got 0.5 (float)"),
    (Sequence[int], "12", TypeError, "must be a sequence, got '12' (str)"),
    (Sequence[int], 3, TypeError, "must be a sequence, got 3 (int)"),
    (Sequence[int], [1, 2.0], TypeError, "each of x must be an int, got 2.0 (float)"),
    (Sequence[Count], [1, 0], ValueError, "each of x must be >= 1, got 0"),
    (Annotated[Sequence[int], NotEmpty()], [], ValueError, "must not be empty"),
    (Iterable[str], "a", TypeError, "must be an Iterable, got 'a' (str)"),
    (tuple[int, str], (1,), ValueError, "must hold 2 values, got (1,) (tuple)"),
    (tuple[int, str], [1, "a"], TypeError, "must be a tuple, got [1, 'a'] (list)"),
    (Mapping[str, Positive], {"a": 0}, ValueError, "x['a'] must be > 0, got 0"),
    (Mapping[str, Positive], {1: 1}, TypeError, "each key of x must be a string, got 1 (int)"),
    (Callable[[int], int], 1, TypeError, "must be a function, got 1 (int)"),
    (nn.Module, "m", TypeError, "must be a Module, got 'm' (str)"),
    (Named, 1, TypeError, "must be a Named (with name, touch), got 1 (int)"),
    (Device, "nonsense", ValueError, "must be a device of this machine, such as 'cpu'"),
    (Device, 1.5, TypeError, "must be a device or a string, got 1.5 (float)"),
    (Vector, np.zeros((1, 3)), ValueError, "must be [rows], got shape (1, 3)"),
    (Float[np.ndarray, "*axes"], np.zeros(3, int), TypeError, "must hold floats, got int64"),
    (Either, torch.ones(2), TypeError, "must be bool, got torch.float32"),
]


def taking(annotation):
    def function(x):
        return x

    function.__annotations__["x"] = annotation
    return checked(function)


@pytest.mark.parametrize(("annotation", "values"), GOOD, ids=[str(case[0]) for case in GOOD])
def test_what_an_annotation_says_passes(annotation, values):
    for value in values:
        assert taking(annotation)(value) is value
        assert taking(annotation)(x=value) is value


@pytest.mark.parametrize(("annotation", "value", "error", "message"), BAD)
def test_anything_else_is_refused_in_one_line(annotation, value, error, message):
    message = f"x {message}" if message.startswith("must") else message
    with pytest.raises(error, match=re.escape(message)) as caught:
        taking(annotation)(value)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=re.escape(message)):
        require("x", value, annotation)


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
        ({"keep": KEEP[:, :2]}, ValueError, "with anchor = 3 as in anchors, got shape (2, 2)"),
        ({"query": QUERY[..., :3]}, ValueError, "must be [batch, query, 4], got shape (2, 6, 3)"),
        ({"seq_len": 5, "row": QUERY[..., 0]}, ValueError, "row must be [batch, seq] with seq = 5"),
        ({"states": [QUERY, QUERY[:, 0]]}, ValueError, "with *axes = (6, 4) as in each of states"),
        ({"keep": KEEP.to("meta")}, ValueError, "one device, got anchors on cpu, keep on meta"),
    ],
)
def test_tensors_of_a_call_agree(changed, error, message):
    good = {"anchors": ANCHORS, "keep": KEEP, "query": QUERY, "block_size": 2}
    assert attend(ANCHORS, KEEP, QUERY, block_size=2) == attend(**good) == 2
    with pytest.raises(error, match=re.escape(message)):
        attend(**(good | changed))


def test_a_number_must_be_its_axis_s_length():
    @checked
    def read(row: Shaped[Tensor, "batch seq"], seq_len: SeqLen, n: Annotated[int, Axis("batch")]):
        pass

    read(torch.zeros(2, 6), 6, 2)
    with pytest.raises(ValueError, match="seq_len must be 6, the seq of row, got 5"):
        read(torch.zeros(2, 6), 5, 2)
    with pytest.raises(ValueError, match="n must be 2, the batch of row, got 1"):
        read(torch.zeros(2, 6), 6, n=1)


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
