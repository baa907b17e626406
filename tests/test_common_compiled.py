"""The utilities and the mask under torch.compile, without host synchronisation, on one device.

Fake tensors show synchronisation: they have no values, so what asks for one (.item(), a branch on a
tensor, a shape that depends on data) raises. The meta device shows stray devices: a tensor made
anywhere else is recorded. Both detectors are first shown to detect.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from dspark_lab import common
from dspark_lab.attention import block_attention, training_block_mask, training_dense_mask
from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import pack
from tests.draws import label_positions, tile_lists
from tests.recorder import Recorder, tensors
from tests.samples import documents

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]

Size = tuple[int, int, int, int]
VOCAB = 13


def tiled(anchors, keep, seq_len, block_size, docs):
    sizes = {"seq_len": seq_len, "block_size": block_size, "tile_size": 4}
    return tile_lists(training_block_mask(anchors, keep, doc_ids=docs, **sizes))


def dense(anchors, keep, seq_len, block_size, docs):
    return training_dense_mask(anchors, keep, seq_len=seq_len, block_size=block_size, doc_ids=docs)


def attend(q, k, v, anchors, keep, seq_len, block_size, docs):
    sizes = {"seq_len": seq_len, "block_size": block_size, "doc_ids": docs}
    return block_attention(q, k, v, anchors, keep, **sizes, backend="dense")


def accept(head, features):
    return head(features)


def arguments(device, size: Size) -> dict[str, tuple]:
    """Name -> (function, arguments): one call or more of every function."""
    batch, seq_len, num_anchors, block_size = size
    if device != "meta":
        torch.manual_seed(0)
    mask = torch.rand(batch, seq_len, device=device) < 0.8
    anchors = torch.randint(max(seq_len, 1), (batch, num_anchors), device=device)
    keep = torch.rand(batch, num_anchors, device=device) < 0.7
    remaining = torch.randint(4, (batch, seq_len), device=device)
    positions = torch.randint(99, (batch, seq_len), device=device)
    ids = torch.randint(VOCAB, (batch, seq_len), device=device)
    lens = torch.randint(3, (batch, 4), device=device)
    label, safe = label_positions(anchors, keep, block_size, seq_len)
    docs = (torch.arange(seq_len, device=device) // 4).repeat(batch, 1)
    slots = num_anchors * block_size
    q, k, v = (torch.rand(batch, 2, n, 4, device=device) for n in (slots, *[seq_len + slots] * 2))
    where = anchors, keep, seq_len, block_size
    with torch.device(device):
        embed, head = nn.Embedding(VOCAB, 6), common.AcceptRatePredictor(6)
    hidden = [torch.rand(batch, seq_len, 6, device=device) for _ in range(4)]
    candidates, sample = common.build_anchor_candidate_mask, common.sample_anchor_positions
    supervise, place = common.build_eval_mask, common.create_position_ids
    calls = {
        "candidates": (candidates, seq_len, mask),
        "candidates, float mask": (candidates, seq_len, mask.to(torch.bfloat16)),
        "candidates, packed": (candidates, seq_len, mask, remaining),
        "sample": (sample, seq_len, mask, num_anchors, device),
        "sample, packed": (sample, seq_len, mask, num_anchors, device, remaining),
        "supervise": (supervise, seq_len, mask, label, safe, keep),
        "supervise, packed": (supervise, seq_len, mask, label, safe, keep, remaining, anchors),
        "positions": (place, anchors, block_size),
        "positions, packed": (place, anchors, block_size, positions),
        "noise": (common.create_noise_embed, embed, ids, anchors, keep, VOCAB - 1, block_size),
        "features": (common.extract_context_feature, hidden, [-1, 0, 2]),
        "documents": (common.context_doc_ids, lens, seq_len, device),
        "accept rate": (accept, head, torch.rand(batch, num_anchors, block_size, 6, device=device)),
        "dense mask": (dense, *where, None),
        "dense mask, packed": (dense, *where, docs),
        "tile lists": (tiled, *where, None),
        "tile lists, packed": (tiled, *where, docs),
        "attention": (attend, q, k, v, *where, None),
        "attention, packed": (attend, q, k, v, *where, docs),
    }
    if seq_len == 0:
        del calls["positions, packed"]
    return calls


NAMES = list(arguments("cpu", (1, 3, 1, 1)))
SIZE = (2, 9, 3, 4)
SIZES = [SIZE, (3, 12, 4, 3), (2, 40, 7, 5)]
CORNERS = [(1, 0, 2, 3), (1, 1, 1, 1), (2, 5, 9, 2)]


def outcome(function, *args):
    """Tensors of the result, from a fixed seed."""
    torch.manual_seed(42)
    with torch.no_grad():
        result = function(*args)
        return tensors(vars(result) if isinstance(result, Blocks) else result)


def assert_same(got, expected):
    assert expected
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# No host synchronisation


def branch(x):
    return x + 1 if x.any() else x


@pytest.mark.parametrize("ask", [branch, torch.Tensor.item, torch.nonzero, lambda x: x[x > 0]])
def test_fake_tensors_detect_a_question_to_the_host(ask):
    refused = (DataDependentOutputException, DynamicOutputShapeException)
    with FakeTensorMode(), pytest.raises(refused):
        ask(torch.zeros(1))


@pytest.mark.parametrize("name", NAMES)
def test_no_function_changes_its_arguments(name):
    function, *args = arguments("cpu", SIZE)[name]
    before = [tensor.clone() for tensor in tensors(args)]
    outcome(function, *args)
    assert all(old.equal(new) for old, new in zip(before, tensors(args), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_no_function_asks_a_tensor_for_its_values(name):
    with FakeTensorMode():
        function, *args = arguments("cpu", SIZE)[name]
        fake = tensors(function(*args))
    expected = outcome(*arguments("cpu", SIZE)[name])
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in expected]


# One device


def test_the_device_recorder_sees_a_stray_range():
    x = torch.zeros(3, device="meta")
    with Recorder() as recorder:
        x[torch.arange(2)]
    assert recorder.devices == {"cpu", "meta"}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_made_on_the_device_of_the_input(name):
    function, *args = arguments("meta", SIZE)[name]
    with Recorder() as recorder:
        result = function(*args)
    assert recorder.devices <= {"meta"}
    assert {t.device.type for t in tensors(result)} == {"meta"}


# Compiled


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [name for name in NAMES if not name.startswith("attention")]
# Tiles take longest.
TILES = [pytest.param(name, marks=pytest.mark.slow) for name in COMPILED[-2:]]


@pytest.mark.parametrize("name", [*COMPILED[:-2], *TILES])
def test_compiled_whole_and_dynamic_it_gives_the_same(name, fresh_compiler):
    function = arguments("cpu", SIZE)[name][0]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, size in enumerate(SIZES):
        _, *args = arguments("cpu", size)[name]
        expected = outcome(function, *args)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(outcome(compiled, *args), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_gives_the_same_at_the_corners(name, fresh_compiler):
    function = arguments("cpu", SIZE)[name][0]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in CORNERS:
        calls = arguments("cpu", size)
        if name in calls:
            _, *args = calls[name]
            assert_same(outcome(compiled, *args), outcome(function, *args))


def test_layer_ids_are_checked_and_the_output_is_built_inside_a_compiled_function(fresh_compiler):
    def build(x, layer_ids):
        logits = x[..., common.validate_target_layer_ids(layer_ids, 9)]
        ids = logits.argmax(-1)
        keep = ids[..., 0] >= 0
        return common.DSparkForwardOutput(logits, ids, eval_mask=ids > 0, block_keep_mask=keep)

    x = torch.rand(1, 2, 3, 9)
    got = torch.compile(build, fullgraph=True, backend="aot_eager")(x, [0, 2, 4])
    assert isinstance(got, common.DSparkForwardOutput) and got.confidence_pred is None
    assert torch.equal(got.draft_logits, x[..., [0, 2, 4]])
    assert torch.equal(got.target_ids, got.draft_logits.argmax(-1))


# Inductor looks for vector instructions, which takes long, or makes do without. It compiles draws
# anew for each length.
@pytest.mark.parametrize(
    "vectors, lengths", [(False, [14]), pytest.param(None, [14, 20], marks=pytest.mark.slow)]
)
def test_the_default_compiler_draws_the_same_blocks(vectors, lengths, fresh_compiler, cpp_compiler):
    """Inductor has a random stream of its own; the anchors still come from torch.rand's."""
    options = {"cpp.vec_isa_ok": vectors}
    compiled = torch.compile(draw_blocks, fullgraph=True, dynamic=True, options=options)
    for length in lengths:
        batch = pack(documents("..aaaaaaaaaaa", "aaa.aaaa", "a.aaa"), length, 0)
        expected = outcome(draw_blocks, batch, 5, 4)
        following = torch.rand(3)
        assert_same(outcome(compiled, batch, 5, 4), expected)
        assert torch.equal(torch.rand(3), following)
