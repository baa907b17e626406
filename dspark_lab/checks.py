"""Argument checks derived from annotations.

``@checked`` reads the annotations of a function, a method or a class's constructor once, at the
first call, and checks every call outside compiled graphs. It reads Python values and the shapes,
dtypes and devices of tensors, which waits for no device. The contents of tensors are read only in
debug mode, which the environment variable ``DSPARK_LAB_DEBUG=1`` switches on.
"""

import builtins
import functools
import inspect
import math
import numbers
import os
import reprlib
import sys
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import torch
from jaxtyping import AbstractArray, Bool, Float, Int, Shaped
from torch import Tensor

DEBUG = os.environ.get("DSPARK_LAB_DEBUG", "0") not in ("", "0")

T = TypeVar("T")


@dataclass(frozen=True)
class Within:
    """The range of a number: finite, ``low`` (allowed unless ``above``) to ``high``."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def check(self, name: str, value: Any) -> None:
        fits = value > self.low if self.above else value >= self.low
        if self.high < math.inf:
            if not fits or value > self.high:
                limits = f"{'(' if self.above else '['}{self.low}, {self.high}]"
                raise ValueError(f"{name} must lie in {limits}, got {value}")
        elif value != value or value in (math.inf, -math.inf):
            raise ValueError(f"{name} must be finite, got {value}")
        elif not fits:
            sign = ">" if self.above else ">="
            raise ValueError(f"{name} must be {sign} {self.low}, got {value}")


@dataclass(frozen=True)
class NotEmpty:
    """At least one element."""

    def check(self, name: str, value: Any) -> None:
        if len(value) == 0:
            raise ValueError(f"{name} must not be empty")


@dataclass(frozen=True)
class OfThisMachine:
    """A device on which tensors can be made here."""

    def check(self, name: str, value: Any) -> None:
        try:
            torch.empty(0, device=value)
        except Exception:  # torch has no common class for the ways that a device can be missing
            wanted = "a device of this machine, such as 'cpu'"
            raise ValueError(f"{name} must be {wanted}, got {str(value)!r}") from None


@dataclass(frozen=True)
class Axis:
    """The number is the length of this axis of the call's tensors."""

    axis: str


Count = Annotated[int, Within(1)]
Size = Annotated[int, Within(0)]
SeqLen = Annotated[int, Within(0), Axis("seq")]
BlockSize = Annotated[int, Within(1), Axis("slot")]
Finite = Annotated[float, Within()]
Positive = Annotated[float, Within(0, above=True)]
NonNegative = Annotated[float, Within(0)]
Share = Annotated[float, Within(0, 1)]
Device = Annotated[torch.device | str, OfThisMachine()]


def checked(target: T) -> T:
    """The function, or the class with its constructor, that checks its arguments.

    - ``Int[Tensor, "batch anchor"]`` and the like: a tensor (TypeError) of that kind of number
      (TypeError; ``Int`` is any whole number) and rank, whose named axes agree with those of the
      call's other arguments (ValueError). All tensors of a call are on one device (ValueError).
    - classes, unions, sequences and the like: an object of that kind (TypeError); a bool is no
      number. A value that a ``Literal`` does not list is a ValueError.
    - ``Annotated``: each rule's ``check(name, value)``, and ``Axis``.

    Defaults are not checked, and nothing in a compiled graph; debug mode checks results as well.
    """
    if inspect.isclass(target):
        setattr(target, "__init__", checked(target.__init__))  # noqa: B010 (mypy: no assignment)
        return target
    function: Callable[..., Any] = target  # type: ignore[assignment]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        seen: Call = {}
        given = len(args)
        for position, name, check in _read_signature(function):
            if position < given:
                check(name, args[position], seen)
            elif name in kwargs:
                check(name, kwargs[name], seen)
        result = function(*args, **kwargs)
        if DEBUG:
            seen.pop(_DEVICE, None)  # a result may be elsewhere
            check = _Names(function).read(inspect.signature(function).return_annotation)
            check(f"the result of {function.__name__}", result, seen)
        return result

    return call  # type: ignore[return-value]


def shown(value: Any) -> str:
    """A value as error messages show it: on one line, never long."""
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, (bool, int, float, complex, str, bytes, list, tuple, dict, set, range)):
        return " ".join(f"{reprlib.repr(value)} ({kind})".split())
    return kind


def require(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value that ``annotation`` does not allow."""
    _Names(require).read(annotation)(name, value, {})


def require_columns(name: str, table: abc.Container[str], columns: Iterable[str]) -> None:
    """Refuse a table that lacks one of ``columns``."""
    columns = list(columns)
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{name} must have the columns {columns}, got no {missing}")


def may_be_read(value: Tensor) -> bool:
    """Whether a check may ask for values: of a device's tensors, which waits, in debug mode."""
    known = (DEBUG or value.device.type == "cpu") and not value.is_meta
    return known and not torch.compiler.is_compiling()


def debug_range(name: str, value: Tensor, low: int, high: int) -> None:
    """In debug mode, refuse a tensor with a value outside ``low`` to ``high - 1``."""
    if not DEBUG or torch.compiler.is_compiling() or value.numel() == 0 or value.is_meta:
        return
    smallest, largest = int(value.min()), int(value.max())
    if smallest < low or largest >= high:
        raise ValueError(f"{name} must lie in [{low}, {high - 1}], got {smallest} to {largest}")


# What the arguments of one call that were checked so far agree on: the sizes of named axes and the
# device, each with the name of the argument that had it first.
Call = dict[str, tuple[Any, str]]
_DEVICE = "the device"


class Check(NamedTuple):
    """A check of one annotation: of the kind by itself, then of all else."""

    allowed: str
    is_kind: Callable[[Any], bool]
    rest: Callable[[str, Any, Call], None] | None = None
    exact: frozenset[type] = frozenset()  # types whose objects need no look

    def __call__(self, name: str, value: Any, call: Call) -> None:
        if not self.is_kind(value):
            raise TypeError(f"{name} must be {self.allowed}, got {shown(value)}")
        if self.rest is not None:
            self.rest(name, value, call)


ANYTHING = Check("anything", lambda value: True)


@functools.cache
def _read_signature(function: Callable[..., Any]) -> list[tuple[int, str, Check]]:
    """Position, name and check of each parameter whose annotation says something."""
    names, checks = _Names(inspect.unwrap(function)), []
    for position, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            position = sys.maxsize
        check = names.read(parameter.annotation)
        if check is not ANYTHING:
            checks.append((position, parameter.name, check))
    return checks


class _Names(dict[str, Any]):
    """The names that a function's annotations may use; an unknown one stands for anything."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(vars(builtins) | getattr(function, "__globals__", {}))

    def __missing__(self, name: str) -> Any:
        return Any

    def read(self, annotation: Any) -> Check:
        if isinstance(annotation, typing.ForwardRef):
            annotation = annotation.__forward_arg__
        if isinstance(annotation, str):
            try:
                return self.read(eval(annotation, {}, self))
            except (AttributeError, TypeError):  # of a name imported for type checkers alone
                return ANYTHING
        if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
            return _array(annotation)
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return _annotated(self.read(arguments[0]), annotation.__metadata__)
        if origin is Literal:
            return _literal(arguments)
        if origin in (Union, types.UnionType):
            return _union([self.read(argument) for argument in arguments])
        kind = type(None) if annotation is None else origin or annotation
        if not inspect.isclass(kind) or kind in (Any, object, inspect.Parameter.empty):
            return ANYTHING
        if issubclass(kind, abc.Iterable) and arguments:
            fixed = kind is tuple and Ellipsis not in arguments
            return _container(kind, [self.read(argument) for argument in arguments], fixed)
        return _kind(kind)


def _is_int(value: Any) -> bool:
    whole = isinstance(value, (int, torch.SymInt, numbers.Integral))
    return whole and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    real = isinstance(value, (torch.SymInt, torch.SymFloat, numbers.Real))
    exact = isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral)
    return real and not exact and not isinstance(value, bool)


_PLAIN: dict[Any, Check] = {
    int: Check("an int", _is_int, exact=frozenset({int})),
    float: Check("a number", _is_number, exact=frozenset({int, float})),
    bool: Check("True or False", lambda value: isinstance(value, bool), exact=frozenset({bool})),
    type(None): Check("None", lambda value: value is None, exact=frozenset({type(None)})),
    abc.Callable: Check("a function", callable),
}


def _kind(kind: type) -> Check:
    """An object of a class; of a protocol, one that has its members."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if getattr(kind, "_is_protocol", False):
        members = {
            member
            for base in kind.__mro__
            if getattr(base, "_is_protocol", False)
            for member in (*getattr(base, "__annotations__", ()), *vars(base))
            if not member.startswith("_") or member == "__call__"
        }
        return Check(
            f"a {kind.__name__} (with {', '.join(sorted(members))})",
            lambda value: all(hasattr(value, member) for member in members),
        )
    plain = {"str": "string", "Tensor": "tensor", "Sequence": "sequence", "ndarray": "NumPy array"}
    name = plain.get(kind.__name__, kind.__name__)
    article = "an" if name[0] in "AEIOUaeiou" else "a"
    # A string is a sequence, too, but never meant as one.
    unwanted = () if issubclass(kind, (str, bytes)) else (str, bytes)

    def is_kind(value: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, unwanted)

    return Check(f"{article} {name}", is_kind, exact=frozenset({kind}))


def _literal(allowed: tuple[Any, ...]) -> Check:
    kinds = tuple({type(value) for value in allowed})
    *first, last = map(repr, allowed)
    listed = f"{', '.join(first)} or {last}" if first else last

    def rest(name: str, value: Any, call: Call) -> None:
        if value not in allowed:
            raise ValueError(f"{name} must be {listed}, got {value!r}")

    return Check(listed, lambda value: type(value) in kinds, rest)


def _annotated(base: Check, rules: Iterable[Any]) -> Check:
    def rest(name: str, value: Any, call: Call) -> None:
        if base.rest is not None:
            base.rest(name, value, call)
        for rule in rules:
            if not isinstance(rule, Axis):
                rule.check(name, value)
                continue
            length, origin = call.setdefault(rule.axis, (value, name))
            if value != length:
                wanted = f"{length}, the {rule.axis} of {origin}"
                raise ValueError(f"{name} must be {wanted}, got {value}")

    return Check(base.allowed, base.is_kind, rest)


def _union(checks: list[Check]) -> Check:
    """One of several annotations; the first whose kind fits says what else is wrong."""
    if ANYTHING in checks:
        return ANYTHING

    def rest(name: str, value: Any, call: Call) -> None:
        error = None
        for check in checks:
            if check.is_kind(value):
                try:
                    return check(name, value, call)
                except (TypeError, ValueError) as refused:
                    error = error or refused
        if error is not None:
            raise error

    return Check(
        " or ".join(check.allowed for check in checks),
        lambda value: any(check.is_kind(value) for check in checks),
        rest if any(check.rest for check in checks) else None,
        frozenset().union(*(check.exact for check in checks)),
    )


def _container(kind: type, checks: list[Check], fixed: bool) -> Check:
    """An iterable and its elements (if they can be read twice), ``fixed``: one for each check."""
    outer, first = _kind(kind), checks[0]

    def rest(name: str, value: Any, call: Call) -> None:
        if fixed:
            if len(value) != len(checks):
                raise ValueError(f"{name} must hold {len(checks)} values, got {shown(value)}")
            for check, part in zip(checks, value, strict=True):
                check(f"each of {name}", part, call)
        elif issubclass(kind, abc.Mapping):
            for key, part in value.items():
                first(f"each key of {name}", key, call)
                checks[-1](f"{name}[{key!r}]", part, call)
        elif isinstance(value, abc.Collection) and not _all_exact(value, first.exact):
            for part in value:
                first(f"each of {name}", part, call)

    return Check(outer.allowed, outer.is_kind, None if checks == [ANYTHING] else rest)


def _all_exact(value: abc.Collection[Any], exact: frozenset[type]) -> bool:
    """Whether no element needs a look; a class may say of what type its ``elements`` are."""
    kind = getattr(type(value), "elements", None)
    return kind in exact if isinstance(kind, type) else exact.issuperset(map(type, value))


# What the elements of an array must be, in words and as a part of its dtype's name.
_NUMBERS = {
    Shaped: ("hold numbers", ""),
    Bool: ("be bool", "bool"),
    Int: ("hold integers", "int"),
    Float: ("hold floats", "float"),
}
_dtype_name = functools.cache(str)  # NumPy makes the name anew, which takes longer than a check


def _array(annotation: Any) -> Check:
    """A tensor, or another array, of some kind of number and with named axes."""
    outer = _kind(annotation.array_type)
    wanted, dtype_part = _NUMBERS[annotation.dtype]
    axes = annotation.dim_str.split()
    listed = ", ".join(axis.lstrip("_") or "_" for axis in axes)
    lengths = [(place, int(axis)) for place, axis in enumerate(axes) if axis.isdigit()]
    named = [
        (place, axis)
        for place, axis in enumerate(axes)
        if not (axis.isdigit() or axis.startswith("_") or axis == "...")
    ]
    variadic = next((i for i, axis in enumerate(axes) if axis[0] == "*" or axis == "..."), None)

    def rest(name: str, value: Any, call: Call) -> None:
        if dtype_part not in _dtype_name(value.dtype):
            raise TypeError(f"{name} must {wanted}, got {value.dtype}")
        shape = tuple(value.shape)
        sizes: tuple[Any, ...] = shape
        if variadic is not None and len(shape) >= len(axes) - 1:
            past = variadic + len(shape) - (len(axes) - 1)
            sizes = (*shape[:variadic], shape[variadic:past], *shape[past:])
        if len(sizes) != len(axes) or any(sizes[place] != length for place, length in lengths):
            raise ValueError(f"{name} must be [{listed}], got shape {shape}")
        for place, axis in named:
            length, origin = call.setdefault(axis, (sizes[place], name))
            if sizes[place] != length:
                agreed = f"{axis} = {length} as in {origin}"
                raise ValueError(f"{name} must be [{listed}] with {agreed}, got shape {shape}")
        if isinstance(value, Tensor):
            device, origin = call.setdefault(_DEVICE, (value.device, name))
            if value.device != device:
                got = f"{origin} on {device}, {name} on {value.device}"
                raise ValueError(f"all tensors must be on one device, got {got}")

    return Check(outer.allowed, outer.is_kind, rest)
