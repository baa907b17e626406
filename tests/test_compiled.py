"""What runs compiled on a GPU, shown on the CPU: few graphs, the same results, and a way out.

The quick tests have the compiler capture graphs and no more (``eager``).
"""

import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.exc import GPUTooOldForTriton, TritonMissing
from torch.nn.attention.flex_attention import flex_attention

from dspark_lab.attention import (
    Compiled,
    attend,
    backends,
    block_attention,
    block_mask,
    choose_backend,
    context_ranges,
)
from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import Batch
from dspark_lab.training import Processes, Run, TrainConfig, loop
from tests import runs
from tests.samples import random_chats, tiny_drafter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]

# Lengths of a row and numbers of anchors: of one tile and of many, twenty of them.
SHAPES = [(40 + 37 * i, 3 + 2 * i) for i in range(20)]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """A compiler that knows nothing, captures graphs alone, and has not warned yet."""
    compile_ = torch.compile
    monkeypatch.setattr(Compiled, "_warned", False)
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_(f, **{"backend": "eager"} | options)
    )
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def case(seq_len, num_anchors, seed, packed, block_size=7):
    """q, k, v, and where the blocks are."""
    torch.manual_seed(seed)
    anchors = torch.randint(seq_len, (2, num_anchors))
    docs = (torch.rand(2, seq_len) < 0.1).long().cumsum(1) if packed else None
    where = {"anchor_positions": anchors, "block_keep_mask": torch.rand(2, num_anchors) < 0.8}
    where |= {"seq_len": seq_len, "block_size": block_size, "doc_ids": docs}
    queries = num_anchors * block_size
    q, k, v = (torch.randn(2, h, n, 8) for h, n in [(4, queries), *[(2, seq_len + queries)] * 2])
    return (q, k, v), where


def at_most_three_graphs():
    return 1 <= counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


def test_flex_attention_takes_at_most_three_graphs_over_twenty_shapes():
    run = Compiled(flex_attention, flex_attention)
    for seed, shape in enumerate(SHAPES):
        qkv, where = case(*shape, seed, packed=seed % 3 == 0)
        ranges = context_ranges(**where)
        with torch.no_grad():
            got = run(*qkv, block_mask=block_mask(ranges), enable_gqa=True)
            expected = attend(*qkv, ranges, backend="dense")
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)
    assert not run.failed and at_most_three_graphs()


@pytest.mark.parametrize(
    "backend", [pytest.param("flex", marks=pytest.mark.slow), "dense", "blockwise"]
)
def test_block_attention_compiles_whole_and_for_shapes_of_every_size(backend):
    compiled = torch.compile(block_attention, fullgraph=True, dynamic=True)
    for seed, shape in enumerate(SHAPES):
        qkv, where = case(*shape, seed, packed=True)
        with torch.no_grad():
            got = compiled(*qkv, **where, backend=backend)
            expected = block_attention(*qkv, **where, backend="dense")
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)
    assert at_most_three_graphs()


def packed_batch(length, documents):
    """Two rows of as many documents."""
    lengths = [length // documents] * (documents - 1)
    lengths.append(length - sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packing = {
        "position_ids": positions,
        "doc_remaining": torch.cat([torch.arange(n).flip(0) for n in lengths]).expand(2, -1),
        "seq_lens": torch.tensor([lengths] * 2),
    }
    ids = positions % 60
    return Batch.of_tokens(ids, torch.ones_like(ids, dtype=torch.bool), **packing)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_the_drafter_with_flex_takes_at_most_three_graphs_over_twenty_shapes(head):
    drafter = tiny_drafter(1, markov_head_type=head, num_hidden_layers=1)
    c = drafter.config
    compiled = torch.compile(drafter.slots, fullgraph=True, dynamic=True)
    for seed, (length, anchors) in enumerate(SHAPES):
        batch = packed_batch(length, documents=1 + seed % 4)
        blocks = draw_blocks(batch, anchors, c.block_size, mask_token_id=c.mask_token_id, seed=seed)
        features = torch.randn(2, length, c.context_size), torch.randn(2, length, c.hidden_size)
        with torch.no_grad():
            forms = drafter.mask_forms(blocks, "flex")
            got = compiled(blocks, *features, backend="flex", forms=forms)
            expected = drafter.slots(blocks, *features, backend="dense")
        torch.testing.assert_close(got.hidden, expected.hidden, rtol=0, atol=1e-5)
    assert at_most_three_graphs()


# The training step

STEP = TrainConfig(20, batch_size=2, accumulate=2, num_anchors=5, ce_only_fraction=0.5)


def steps(out, compile_, features=(0, 1)):
    """Loss and gradients of some steps, each with its own weights of the terms."""
    target, drafter = runs.double_pair()
    run = Run(drafter, STEP, random_chats(12), out, Processes(), compile=compile_)
    found = []
    for run.step in range(4):
        loss, *_ = run.backward(loop.live_features(target, features))
        found.append((loss, runs.gradients(drafter)))
        run.optimizer.zero_grad()
    return found


@pytest.fixture(scope="module")
def plain_steps(tmp_path_factory):
    return steps(tmp_path_factory.mktemp("plain"), False)


def test_a_compiled_step_has_the_gradients_of_the_plain_one_in_one_graph(tmp_path, plain_steps):
    assert counters["stats"]["unique_graphs"] == 0
    got = steps(tmp_path, True)
    torch.testing.assert_close(got, plain_steps, rtol=1e-9, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
def test_a_step_by_the_default_compiler_agrees_to_rounding(
    tmp_path, cpp_compiler, monkeypatch, plain_steps
):
    monkeypatch.undo()
    torch.testing.assert_close(steps(tmp_path, True), plain_steps, rtol=1e-7, atol=1e-10)


def test_training_compiled_is_training_to_rounding_stopped_or_not(tmp_path):
    plain, parts = runs.losses(tmp_path / "plain"), tmp_path / "parts"
    assert counters["stats"]["unique_graphs"] == 0
    assert len(runs.losses(parts, compile=True, on_metrics=runs.interrupt_at(4))) == 4
    assert runs.losses(parts, compile=True) == pytest.approx(plain, rel=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def test_a_process_may_hold_many_kinds_of_graphs():
    run = Compiled(torch.neg, lambda x: None)
    for rank in (*range(1, 20), *range(1, 20)):
        assert run(torch.ones([2] * rank)).sum() == -(2**rank)
    assert counters["stats"]["unique_graphs"] == 19 and not run.failed


# Where nothing can be compiled


def no_triton(*_):
    raise TritonMissing(None)


def too_old(*_):
    raise GPUTooOldForTriton(type("Card", (), {"name": "old", "major": 3, "minor": 5}), None)


def broken(*_, **__):
    raise RuntimeError("no assembler")


@pytest.mark.parametrize("compiler", [no_triton, too_old, broken])
def test_where_compilation_fails_attention_is_dense_after_one_warning(compiler, monkeypatch):
    flex = Compiled(flex_attention, backends.dense_for_flex, backend=compiler)
    monkeypatch.setattr(backends, "flex", flex)
    cuda = torch.device("cuda")
    assert choose_backend(cuda) == "flex"
    qkv, where = case(90, 12, 0, packed=True)
    ranges = context_ranges(**where)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        leaves = [x.requires_grad_() for x in qkv]
        for _ in range(3):
            got = flex(*leaves, block_mask=block_mask(ranges), scale=0.3, enable_gqa=True)
    told = [str(warning.message) for warning in caught if "compile" in str(warning.message)]
    assert len(told) == 1 and "dense" in told[0] and "\n" not in told[0]
    assert choose_backend(cuda) == "dense"
    expected = attend(*leaves, ranges, scale=0.3, backend="dense")
    pairs = [torch.autograd.grad(x.square().sum(), leaves) for x in (got, expected)]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(*pairs, rtol=0, atol=0)


def test_where_compilation_fails_training_goes_on_without_it_after_one_warning(
    tmp_path, monkeypatch, plain_steps
):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile_(f, **o | {"backend": broken}))
    expected = plain_steps
    with pytest.warns(UserWarning, match="torch.compile does not work here") as caught:
        got = steps(tmp_path, True)
    assert len([w for w in caught if "torch.compile does not" in str(w.message)]) == 1
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_process_warns_once_whatever_fails():
    functions = [Compiled(torch.neg, torch.abs, backend=broken) for _ in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [run(torch.ones(2)).sum() for run in functions] == [2, 2, 2]
    assert len([w for w in caught if "torch.compile does not" in str(w.message)]) == 1


def test_a_backward_pass_that_cannot_be_compiled_fails_with_the_forward_pass():
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=broken)
    run, x = Compiled(lambda x: x.sin() * 2, lambda x: x * 3, backend=backend), torch.ones(5)
    with pytest.warns(UserWarning, match="does not work here.*no assembler"):
        run(x.requires_grad_()).sum().backward()
    assert run.failed and x.grad.tolist() == [3] * 5


def test_a_python_that_the_compiler_does_not_know_is_no_crash(monkeypatch):
    monkeypatch.setattr(torch, "compile", broken)
    run = Compiled(lambda x: x + 1, lambda x: x + 2)
    with pytest.warns(UserWarning, match="RuntimeError: no assembler"):
        assert run(1) == 3
    assert run(1) == 3


def test_an_error_of_what_runs_is_no_failure_to_compile():
    def exhausted(*_):
        raise torch.OutOfMemoryError("no memory is left")

    run = Compiled(lambda x: x + 1, lambda x: x, backend=lambda graph, inputs: exhausted)
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        run(torch.ones(2))
    assert not run.failed
