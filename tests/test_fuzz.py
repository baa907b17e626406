"""Bad input to the whole public surface: a result or a sentence, never a bare error.

Each call is a public function with one argument spoilt and the others, where known by name here, as
a user would pass them. An error must be a ValueError, TypeError or OSError that a line of the
library itself raises, with a sentence: what comes up from torch, pandas or Python is a bare one.
"""

import importlib
import inspect
import os
import random
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dspark_lab
from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import collate, encode
from dspark_lab.decoding import decode
from dspark_lab.pairs import load_pair, load_traces, question
from dspark_lab.serving import acceptance_profile, load_engine
from dspark_lab.tuning import Shape, Spans
from tests.test_progress import noise_of

LIBRARY = str(Path(dspark_lab.__file__).parent)
# Calls in each room.
ROOMS = {"blocks": 20, "common": 80, "attention": 40, "chats": 60, "model": 60, "decoding": 40}
ROOMS |= {"rates": 60, "training": 30, "pairs": 10, "tuning": 60, "serving": 60, "explore": 60}
# Commands, downloads, a clock, sums of a run, and pictures and texts of the tables.
LEFT_OUT = ("_", "main", "fetch_smollm2", "load_smollm2", "now", "from_stacked", "png", "plot_")
LEFT_OUT += ("new_figure",)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def public_functions(room: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    module = importlib.import_module(f"dspark_lab.{room}")
    for name in getattr(module, "__all__", vars(module)):
        found = getattr(module, name)
        called = isinstance(found, types.FunctionType) or inspect.isclass(found)
        protocol = getattr(found, "_is_protocol", False)
        own = getattr(found, "__module__", "").startswith(module.__name__)
        if called and own and not protocol and not name.startswith(LEFT_OUT):
            yield f"{room}.{name}", found
            for way, made in inspect.getmembers(found, inspect.ismethod):
                if made.__module__.startswith("dspark_lab") and not way.startswith(LEFT_OUT):
                    yield f"{room}.{name}.{way}", made


@pytest.fixture(scope="module")
def right() -> dict[str, Any]:
    """Values that a user might pass, by the name of the argument."""
    pair = load_pair()
    chats = pair.held_out[:4]
    encoded = [encode(chat, pair.tokenizer) for chat in chats]
    batch = collate(encoded, 0)
    blocks = draw_blocks(batch, 4, 7, seed=0)
    prompts = [question(chat) for chat in chats]
    trace = load_traces()
    trace = trace[(trace["drafter"] == "dspark-k7") & (trace["temperature"] == 1.0)]
    engine = load_engine()
    values: dict[str, Any] = {"target": pair.target, "drafter": pair.drafter}
    values |= {"tokenizer": pair.tokenizer, "config": pair.drafter.config}
    values |= {"chat": chats[0], "chats": chats, "conversations": chats, "encoded": encoded}
    values |= dict.fromkeys(("data", "spans"), Spans.of(encoded)) | {"batch": batch}
    values |= {"input_ids": batch.input_ids, "loss_mask": batch.loss_mask, "blocks": blocks}
    values |= {"seq_len": batch.input_ids.shape[1], "anchor_positions": blocks.anchor_positions}
    values |= {"block_keep_mask": blocks.block_keep_mask, "num_anchors": 4, "block_size": 7}
    values |= {"prompts": prompts, "max_new_tokens": 2, "resamples": 3, "temperature": 1.0}
    values |= {"decoded": decode(pair.target, pair.drafter, prompts, max_new_tokens=4)}
    values |= dict.fromkeys(("trace", "fit", "test", "before", "after"), trace)
    values |= {"sps": engine.sps, "engine": engine, "costs": engine.costs(2)}
    values["profile"] = acceptance_profile(trace, resamples=3)
    values |= {"shape": Shape.of("qwen3-4b"), "memory": "H100", "time": "H100", "by": "domain"}
    values |= {"length": 256, "pad_token_id": 0, "device": "cpu"}
    values |= {"noise": noise_of(block_sizes=(3, 7))}
    values |= {"confidence": np.full((2, 3), 0.5), "outcome": np.ones((2, 3))}
    values |= dict.fromkeys(("steps", "repeats", "runs"), 1)
    return values | {name: Path(name) for name in ("out", "folder", "work", "path")}


@pytest.fixture
def bad_values(tmp_path: Path) -> list[Any]:
    """What nobody means: wrong kinds, empty ones, numbers out of range, broken files."""
    (tmp_path / "empty.json").touch()
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    return [
        *(None, "", "nonsense", -1, 0, 5, 0.5, 1e-300, -1e9, float("nan"), float("inf"), True),
        *([], (), {}, ["x"], [None], [-5], {"x": 1}, object(), b"bytes", Path("not/there")),
        *(tmp_path / name for name in ("empty.json", "junk.parquet", "folder", "loop")),
        *(torch.zeros(0), torch.zeros(2, 3), torch.full((2, 3), float("nan"))),
        *(torch.full((2, 3), -7), torch.zeros(2, 3, dtype=torch.complex64)),
        *(np.zeros((0, 3)), np.full((2, 3), np.nan), np.array(["x"])),
        *(pd.DataFrame(), pd.DataFrame({"x": [1]})),
    ]


def spoilt_calls(
    room: str, right: dict[str, Any], bad_values: list[Any]
) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Calls without end: a function, and its arguments with one of them spoilt."""
    rng = random.Random(0)
    functions = list(public_functions(room))
    while True:
        name, function = rng.choice(functions)
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not named:
            continue
        spoilt = rng.choice(named)
        value = rng.choice(bad_values)
        if value is None and spoilt.default is None:
            continue  # that is no spoilt argument
        given = {p.name: right[p.name] for p in named if p.name in right}
        missing = [p for p in named if p.default is p.empty and p.name not in given]
        given |= {p.name: rng.choice(bad_values) for p in missing}
        yield name, function, given | {spoilt.name: value}


def call(function: Callable[..., Any], given: dict[str, Any]) -> None:
    positional = [
        given.pop(p.name)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_ONLY
    ]
    result = function(*positional, **given)
    if isinstance(result, typing.Generator):
        next(result, None)


def bare(error: BaseException) -> bool:
    """Whether an error is no sentence of the library, or of a system call with its path."""
    if not isinstance(error, (ValueError, TypeError, OSError)) or isinstance(error, UnicodeError):
        return True
    if isinstance(error, OSError):
        return len(str(error).split()) < 4
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = last.filename.startswith(LIBRARY) and (last.line or "").startswith("raise ")
    return not own or len(str(error).split()) < 4


@pytest.mark.parametrize("room", ROOMS)
def test_no_bad_argument_ends_in_a_bare_error(
    room: str, right: dict[str, Any], bad_values: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {}
    calls = spoilt_calls(room, right, bad_values)
    for _ in range(ROOMS[room]):
        name, function, given = next(calls)
        text = ", ".join(f"{key}={value!r:.60}" for key, value in given.items())
        try:
            call(function, given)
        except (KeyboardInterrupt, pytest.fail.Exception):
            raise
        except BaseException as error:
            if bare(error):
                where = traceback.extract_tb(error.__traceback__)[-1]
                found[f"{name}({text})"] = f"{error!r:.200} in {where.filename}:{where.lineno}"
    assert not found, "\n\n".join(f"{call}\n  {error}" for call, error in found.items())
