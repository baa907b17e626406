"""Planted faults: a function of the library and what replaces it, by name.

A fault wraps the right function and changes what goes in or what comes out, so that moving or
reformatting the right code breaks no fault. ``plant`` puts one in place for the rest of a test;
with ``DSPARK_LAB_FAULT`` set to a fault's name and ``tests/startup`` on the path, a new process has
it from the start (``environment_with``).
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TESTS = Path(__file__).resolve().parent

ANCHORS, MASKS = "01_anchors.ipynb", "02_block_masks.ipynb"
TRAIN, RATES, DECODE = "03_train_a_drafter.ipynb", "04_accept_rates.ipynb", "05_decode.ipynb"
TUNE, SERVE = "06_tune_training.ipynb", "07_tune_serving.ipynb"

Function = Callable[..., Any]


class Fault(NamedTuple):
    """``where`` is "package.module:function" or "package.module:Class.method"; ``wrong`` makes the
    faulty function from the right one; ``notebook`` is the one that must notice."""

    where: str
    wrong: Callable[[Function], Function]
    notebook: str = ""

    @property
    def module(self) -> str:
        return self.where.partition(":")[0]

    def owner(self, module: Any) -> tuple[Any, str]:
        """The module or class that holds the function, and the function's name there."""
        *classes, name = self.where.partition(":")[2].split(".")
        for part in classes:
            module = getattr(module, part)
        return module, name

    def faulty(self, right: Any) -> Any:
        """The faulty function; a static or class method stays one."""
        if isinstance(right, (staticmethod, classmethod)):
            return type(right)(self.wrong(right.__func__))
        return self.wrong(right)


def changed_result(change: Callable[..., Any]) -> Callable[[Function], Function]:
    """The fault that returns ``change(result)``."""

    def wrong(right: Function) -> Function:
        return lambda *args, **kwargs: change(right(*args, **kwargs))

    return wrong


FAULTS: dict[str, Fault] = {
    "dummy anchors are kept": Fault(
        "dspark_lab.common:sample_anchor_positions",
        changed_result(lambda drawn: (drawn[0], drawn[1] | True)),
        MASKS,
    ),
    "accept rates are those of a smaller distance": Fault(
        "dspark_lab.model.slotwise:rate_of_distance",
        lambda right: lambda l1: right(l1 * 2 / 3),
        TRAIN,
    ),
    "an evaluation counts blocks that are cut off": Fault(
        "dspark_lab.rates.teacher_forced:whole_block_anchors",
        lambda right: lambda batch, block_size: right(batch, 1),
        TRAIN,
    ),
    "teacher-forced slots are reached whatever came before": Fault(
        "dspark_lab.rates.survival:slot_before",
        lambda right: lambda values: np.ones_like(values),
        RATES,
    ),
    "a calibration error lets gaps cancel out": Fault(
        "dspark_lab.rates.scores:binned_error",
        lambda right: lambda f, o, bins, binning, weights=None: right(f, o, 1, binning, weights),
        RATES,
    ),
    "a temperature multiplies": Fault(
        "dspark_lab.rates.scaling:temperature_scale",
        lambda right: lambda confidence, temperatures: right(confidence, 1 / temperatures),
        RATES,
    ),
    "temperatures are searched slot by slot": Fault(
        "dspark_lab.rates.scaling:search",
        lambda right: (
            lambda f, survival, weights, start, fixed, *how: np.concatenate(
                [
                    right(
                        f[:, [k]], survival[:, [k]], weights, start[[k]], [0] * (k in fixed), *how
                    )
                    for k in range(f.shape[1])
                ]
            )
        ),
        RATES,
    ),
    "bias is upside down": Fault(
        "dspark_lab.rates.calibration:confidence_error",
        changed_result(lambda error: -error),
        RATES,
    ),
    "tau lacks the target's own token": Fault(
        "dspark_lab.rates.acceptance:with_own_token",
        lambda right: lambda accepted: accepted,
        RATES,
    ),
    "the Markov head reads the token after the previous one": Fault(
        "dspark_lab.blocks:previous_positions",
        lambda right: lambda anchors, **sizes: right(anchors + 1, **sizes),
        TRAIN,
    ),
    "the gate of the gated head stays open": Fault(
        "dspark_lab.model.heads:GatedHead.step",
        lambda right: lambda head, state, embedding, hidden: (None, embedding),
        TRAIN,
    ),
    "the RNN head forgets": Fault(
        "dspark_lab.model.heads:RnnHead.step",
        lambda right: lambda head, state, embedding, hidden: right(head, None, embedding, hidden),
        TRAIN,
    ),
}


def plant(monkeypatch: Any, fault: Fault) -> None:
    """Put a fault in place wherever the library holds the function, until the test ends."""
    owner, name = fault.owner(importlib.import_module(fault.module))
    right = vars(owner)[name]
    faulty = fault.faulty(right)
    monkeypatch.setattr(owner, name, faulty)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("dspark_lab"):
            for held, value in list(vars(module).items()):
                if value is right:
                    monkeypatch.setattr(module, held, faulty)


def environment_with(name: str) -> dict[str, str]:
    """The environment of a process in which the fault ``name`` is planted."""
    path = os.pathsep.join((str(TESTS / "startup"), str(TESTS), str(TESTS.parent)))
    return os.environ | {"PYTHONPATH": path, "DSPARK_LAB_FAULT": name}


class Planter(importlib.abc.MetaPathFinder):
    """Plants a fault in its module as soon as the module has been imported."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.fault.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_plant(module: Any) -> None:
            execute(module)
            owner, held = self.fault.owner(module)
            setattr(owner, held, self.fault.faulty(vars(owner)[held]))

        spec.loader.exec_module = execute_and_plant  # type: ignore[method-assign]
        return spec
