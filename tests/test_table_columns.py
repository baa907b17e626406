"""A table without the needed columns is refused in a sentence, by every public function of one."""

import importlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dspark_lab import explore
from dspark_lab.rates import compare_drafters
from dspark_lab.serving import FixedLength, load_engine
from dspark_lab.training import TrainConfig
from dspark_lab.tuning import Shape, Spans, forecast
from tests import gallery
from tests.samples import documents
from tests.test_fuzz import bare
from tests.test_progress import noise_of

OTHER = pd.DataFrame({"x": [1]})
# These take any table.
ANY_TABLE = {"explore.readable", "serving.rows_of"}


def functions() -> dict[str, Callable[..., Any]]:
    """The public functions whose first parameter is a table, or tables by name."""
    found: dict[str, Callable[..., Any]] = {}
    for room in ("explore", "rates", "serving", "records", "tuning"):
        module = importlib.import_module(f"dspark_lab.{room}")
        for name in module.__all__:
            function = getattr(module, name)
            if isinstance(function, types.FunctionType):
                first = next(iter(inspect.signature(function).parameters.values()), None)
                if first is not None and "DataFrame" in str(first.annotation):
                    found[f"{room}.{name}"] = function
    return found


FUNCTIONS = functions()


@pytest.fixture(scope="module")
def right() -> dict[str, Any]:
    """Good values of required arguments other than tables, by name."""
    engine = load_engine()
    values: dict[str, Any] = {"engine": engine, "costs": engine.costs(2), "requests": 1}
    values |= {"policies": [FixedLength(1)], "advised": 1, "half_life": 100.0}
    values |= {"bold": "a", "draft_length": 1, "num_anchors": 4, "at": (256, 4), "by": "x"}
    values |= {"data": {"all": Spans.of(documents("..aa"))}, "noise": {"all": noise_of()}}
    values |= {"shape": Shape.of("pocket"), "training": TrainConfig(steps=2)}
    values |= {"kind": "seconds", "amount": 20, "amounts": [20], "path": Path("not/there")}
    return values | {"learning_rates": np.array([1e-3, 1e-4])}


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - ANY_TABLE))
def test_a_table_of_other_columns_is_refused(name: str, right: dict[str, Any]) -> None:
    first, *others = inspect.signature(FUNCTIONS[name]).parameters.values()
    required = [p for p in others if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    given = {p.name: OTHER if "DataFrame" in str(p.annotation) else right[p.name] for p in required}
    by_name = "Mapping" in str(first.annotation)
    for table in (OTHER, {"a": OTHER}) if by_name else (OTHER,):
        with pytest.raises((ValueError, TypeError)) as caught:
            FUNCTIONS[name](table, **given)
        assert not bare(caught.value), repr(caught.value)


@pytest.mark.parametrize("name", sorted(ANY_TABLE))
def test_a_function_of_any_table_takes_one_of_other_columns(name: str) -> None:
    FUNCTIONS[name](OTHER)


OTHER_ARGUMENTS: dict[str, Callable[[], Any]] = {
    "memory": lambda: explore.plot_parts(gallery.COST, OTHER),
    "found": lambda: explore.plot_advice(gallery.advice(), OTHER),
    "progress": lambda: forecast(
        gallery.TRAINING.assign(lr=1e-3), config=TrainConfig(steps=9), progress=OTHER
    ),
    "baseline": lambda: compare_drafters(
        pd.DataFrame({"conversation": [0], "tau": [1.0]}), OTHER, resamples=1
    ),
}


@pytest.mark.parametrize("argument", OTHER_ARGUMENTS)
def test_so_is_a_table_that_is_not_the_first_argument(argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must have the columns .*, got no"):
        OTHER_ARGUMENTS[argument]()


def test_one_of_several_tables_is_named() -> None:
    tables = {"raw": gallery.sweep(), "scaled": gallery.sweep().drop(columns="verified")}
    with pytest.raises(ValueError, match=r"^tables\['scaled'\] must .*, got no \['verified'\]$"):
        explore.plot_thresholds(tables)
