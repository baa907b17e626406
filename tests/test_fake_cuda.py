"""The library on fake CUDA tensors: nothing mixes devices, nothing asks the host.

``tests/fake_cuda.py`` has the calls and makes them, in a process of its own.
"""

import builtins
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from jaxtyping import AbstractArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.model import Target
from tests.fake_cuda import CALLS, PLANTED, TABLE

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dspark_lab"

# Functions that take tensors and are not called, beside those that take a target: fake tensors
# cannot run models of transformers.
EXCEPTIONS = {
    "makes batches of conversations, on the host": """
        chats.collate chats.describe chats.encode chats.encode_all chats.encode_answers
        chats.encode_rows chats.fill_rows chats.one_row chats.pack chats.rows_with_labels
        chats.seen_tokens chats.token_chunks chats.token_counts
        training.BatchOrder.micro_batches training.Run.advance training.Run.backward
        training.Run.blocks
        rates.whole_block_anchors
        training.encode_chats training.open_chats
    """,
    "counts in NumPy": """
        decoding.distribution_table decoding.distribution_tables
        model.Sums.summary
        serving.prefix_schedule serving.retrospective_schedule serving.schedule_table
        tuning.Spans.of tuning.anchors_needed tuning.choose_training tuning.coverage_advice
        tuning.coverage_table tuning.recorded_progress tuning.recorded_step_time
        tuning.never_table tuning.packing_table tuning.slot_supervision
        tuning.supervision tuning.supervision_table tuning.token_coverage
        tuning.token_supervision
    """,
    "reads masks and outputs on the host": """
        attention.check_forward attention.check_mask attention.visible_runs
    """,
    "makes a table or a picture": """
        explore.block_table explore.explore_anchors explore.explore_masks
        explore.RuleMask.kinds explore.RuleMask.tiles
        explore.count_differences explore.decoding_state explore.difference_table
        explore.explore_training_budget explore.mask_and_tiles explore.mask_row explore.mask_spans
        explore.mask_state explore.mask_table explore.plot_mask explore.plot_tiles
        explore.slot_inputs explore.sorting_table explore.tile_spans explore.tile_table
        explore.token_row explore.token_state explore.token_table
    """,
    "writes a file": "model.save_drafter",
    "runs once an evaluation, and compares two heads": "model.Drafter.vocabulary_of",
    "runs once, when a model is loaded, and computes on the host": "common.pin_rope_inv_freq_fp32",
    "counts sizes on the meta device": "model.MarkovHead.latent_kept",
}
EXCEPTED = {name for names in EXCEPTIONS.values() for name in names.split()}

# Decoding keeps the lengths of its rows on the host and sends them to the GPU without waiting.
DECODING = ("model.Drafter.propose", "model.Drafter.read")
# What runs attention, and how many layers do.
LAYERS = {
    "attention.attend": 1,
    "attention.block_attention": 1,
    "model.Drafter.forward": 1,
    "model.Drafter.slots": 1,
    "training.Forward.forward": 2,
}
TRAINED = [*LAYERS, "model.dspark_objective", "model.output_objective"]


def calls_of(names):
    return [call for call, (name, _) in CALLS.items() if name in names]


def require_compiler(cuda: str | None, compiler: str | None, ci: str | None) -> None:
    """Skip where the calls cannot be made or need not be; in CI a missing compiler fails."""
    if cuda is not None:
        pytest.skip("this torch is built for CUDA, whose own tests are tests/test_gpu.py")
    if compiler is None:
        sentence = "no C++ compiler is installed, so no function is called on fake CUDA tensors"
        if ci:
            pytest.fail(sentence)
        pytest.skip(sentence)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What came of each call."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    require_compiler(torch.version.cuda, compiler, os.environ.get("CI"))
    # Ninja, which torch compiles with, lies beside Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "tests.fake_cuda", str(tmp_path_factory.mktemp("fake_cuda"))]
    environment = os.environ | {"PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_asks_the_host_and_nothing_is_made_there(call, report):
    made = report["calls"][call]
    assert made["error"] is None and set(made["devices"]) <= {"cuda"}
    assert made["waits"] == []
    if CALLS[call][0] not in DECODING:
        assert made["on_host"] == []


@pytest.mark.parametrize("call", calls_of(TRAINED))
def test_the_backward_pass_runs_too(call, report):
    assert report["calls"][call]["gradients"] > 0


@pytest.mark.parametrize("call", calls_of(LAYERS))
def test_auto_runs_flex_alone_with_one_block_mask_and_dense_runs_sdpa_alone(call, report):
    made, dense = report["calls"][call], "backend dense" in call
    kernel = "scaled_dot_product_attention" if dense else "flex"
    assert made["back_ends"] == [kernel] * LAYERS[CALLS[call][0]]
    assert made["block_masks"] == (0 if dense else 1)


@pytest.mark.parametrize(
    "fault, part, finding",
    [
        ("a question", "error", "DataDependentOutputException"),
        ("a question in the backward pass", "error", "DataDependentOutputException"),
        ("a tensor on the host", "error", "same device"),
        ("a tensor moved from the host", "waits", "aten._to_copy"),
        ("a tensor moved from the host in the backward pass", "waits", "aten._to_copy"),
    ],
)
def test_a_planted_fault_is_caught(fault, part, finding, report):
    assert finding in str(report["planted"][fault][part])


def test_every_fault_is_planted_and_without_one_nothing_is_found(report):
    assert set(report["planted"]) == set(PLANTED)
    nothing = report["planted"]["nothing"]
    assert nothing["error"] is None and nothing["on_host"] == []


@pytest.mark.parametrize(
    "cuda, compiler, ci, outcome",
    [
        ("13.0", None, "1", pytest.skip.Exception),
        ("13.0", "/usr/bin/c++", None, pytest.skip.Exception),
        (None, None, None, pytest.skip.Exception),
        (None, None, "1", pytest.fail.Exception),
    ],
)
def test_without_a_compiler_it_is_skipped_but_fails_in_ci(cuda, compiler, ci, outcome):
    with pytest.raises(outcome, match="CUDA"):
        require_compiler(cuda, compiler, ci)


@pytest.mark.parametrize("ci", [None, "1"])
def test_with_a_compiler_and_a_cpu_build_it_runs(ci):
    require_compiler(None, "/usr/bin/c++", ci)


# What is public


class Names(dict):
    """The names that annotations of a module use; one for type checkers alone is anything."""

    def __init__(self, module: dict[str, Any]) -> None:
        super().__init__(vars(builtins) | module)

    def __missing__(self, name: str) -> Any:
        return Any


def kinds(annotation: Any, names: Names) -> set[type]:
    """The classes that an annotation is made of, and those that dataclasses among them hold."""
    if isinstance(annotation, str):
        return kinds(eval(annotation, {}, names), names)
    if isinstance(annotation, list):  # the arguments of a Callable
        return set().union(*(kinds(part, names) for part in annotation))
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return set()
    if origin is not None or parts:
        return kinds(list(parts[:1] if origin is Annotated else parts), names)
    if not inspect.isclass(annotation):
        return set()
    if issubclass(annotation, AbstractArray):
        return {annotation.array_type}
    held = set()
    if is_dataclass(annotation) and annotation is not Target:
        own = Names(vars(sys.modules[annotation.__module__]))
        held = kinds([field.type for field in fields(annotation)], own)
    return {annotation} | held


def offered() -> dict[str, tuple[Any, set[type]]]:
    """Name -> the public function or method, and the kinds of the object that a method is of."""
    found = {}
    for room in ["blocks", "common", "pairs", *(p.parent.name for p in PACKAGE.glob("*/*.pyi"))]:
        module = importlib.import_module(f"dspark_lab.{room}")
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if name[0] == "_" or not getattr(value, "__module__", "").startswith(module.__name__):
                continue
            if inspect.isfunction(value):
                found[f"{room}.{name}"] = value, set()
            # A protocol's methods have no body.
            if not inspect.isclass(value) or getattr(value, "_is_protocol", False):
                continue
            for method, function in vars(value).items():
                bound = inspect.isfunction(function)
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and method[0] != "_":
                    own = kinds(value, Names(vars(module))) if bound else set()
                    found[f"{room}.{name}.{method}"] = function, own
    return found


def taking_tensors() -> set[str]:
    """The public functions and methods that take tensors or what holds them, but no target."""
    found = set()
    for name, (function, own) in offered().items():
        function = inspect.unwrap(function)
        names = Names(function.__globals__)
        parameters = inspect.signature(function).parameters.values()
        taken = own | kinds([parameter.annotation for parameter in parameters], names)
        if Target not in taken and any(issubclass(kind, HOLDERS) for kind in taken):
            found.add(name)
    return found


HOLDERS = (Tensor, nn.Module, BlockMask)


def test_every_public_function_that_takes_tensors_is_called():
    public = taking_tensors()
    assert {"blocks.draw_blocks", "chats.Batch.row", "model.Drafter.slots"} <= public
    assert public - set(TABLE) - EXCEPTED == set()


def test_no_exception_is_out_of_date():
    assert EXCEPTED <= taking_tensors() and not EXCEPTED & set(TABLE)
