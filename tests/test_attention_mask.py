"""The training mask of `dspark_lab.attention.mask`: one rule, three forms, all equal.

The oracle's rule is compared with the dense form, with the mask function, and with what the
tile lists of the closed form and its mask function say together. The lists are compared with
those counted from the oracle's mask and with those that PyTorch's create_block_mask makes.
"""

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dspark_lab
from dspark_lab.attention import training_block_mask, training_dense_mask, training_mask_mod
from tests import oracle

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]

NUM_CASES = 3000
NUM_LARGER = 500
LISTS = ["kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"]
TRANSPOSED_LISTS = ["q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"]


@dataclass
class Case:
    """Anchors in rows, perhaps documents, and a tile size."""

    seq_len: int
    block_size: int
    anchors: list
    keep: list
    docs: list | None
    tile_size: int

    def __call__(self, function, device, **extra):
        """function's answer to this case."""
        return function(
            torch.tensor(self.anchors, device=device),
            torch.tensor(self.keep, device=device),
            seq_len=self.seq_len,
            block_size=self.block_size,
            doc_ids=self.doc_ids(device),
            **extra,
        )

    def doc_ids(self, device):
        if self.docs is None:
            return None
        return torch.tensor(self.docs, dtype=torch.long, device=device)

    @property
    def queries(self) -> int:
        return len(self.anchors[0]) * self.block_size

    @property
    def keys(self) -> int:
        return self.seq_len + self.queries

    def expected(self):
        return oracle.dense_mask(self.anchors, self.keep, self.seq_len, self.block_size, self.docs)


def draw_docs(rng, seq_len):
    """Document ids along a row: never falling, sometimes skipping a number."""
    ids, current, breaks = [], 0, rng.choice([0.02, 0.1, 0.4])
    for _ in range(seq_len):
        current += rng.choice([1, 1, 3]) if rng.random() < breaks else 0
        ids.append(current)
    return ids


def draw_case(rng, max_seq=40, max_anchors=6, max_block=7, tiles=(16, 24, 32, 40, 64)):
    seq_len = rng.choice([0, 1] + [rng.randint(0, max_seq) for _ in range(10)])
    batch, num_anchors = rng.randint(1, 2), rng.randint(1, max_anchors)
    block_size = rng.randint(1, max_block)
    anchors, keep = [], []
    order = rng.choice(["sorted", "any", "equal"])
    for _ in range(batch):
        row = [rng.randrange(seq_len) if seq_len else 0 for _ in range(num_anchors)]
        row = (
            sorted(row)
            if order == "sorted"
            else [row[0]] * num_anchors
            if order == "equal"
            else row
        )
        chance = rng.choice([0.0, 0.5, 0.8, 1.0, 1.0, 1.0]) if seq_len else 0.0
        flags = [rng.random() < chance for _ in row]
        if order == "sorted":
            flags.sort(reverse=True)
            row = [a if kept else 0 for a, kept in zip(row, flags, strict=True)]
        anchors.append(row)
        keep.append(flags)
    docs = [draw_docs(rng, seq_len) for _ in range(batch)] if rng.random() < 0.5 else None
    return Case(seq_len, block_size, anchors, keep, docs, rng.choice(tiles))


@cache
def cases():
    """Small cases, each with the oracle's mask."""
    rng = random.Random(2607)
    small = [draw_case(rng) for _ in range(NUM_CASES - NUM_LARGER)]
    larger = [draw_case(rng, 120, 3, 36, (16, 17, 20)) for _ in range(NUM_LARGER)]
    drawn = small + larger
    return [(case, case.expected()) for case in drawn]


def every_pair(mask_mod, batch, queries, keys, device):
    """The mask function asked about every pair at once."""
    b, q, kv = (torch.arange(n, device=device) for n in (batch, queries, keys))
    zero = torch.zeros((), dtype=torch.long, device=device)
    answer = mask_mod(b[:, None, None], zero, q[None, :, None], kv[None, None, :])
    return answer.expand(batch, queries, keys)


def read(numbers, indices):
    """Tile lists as Python lists, [batch][tile row][columns in use]."""
    numbers, indices = numbers[:, 0].tolist(), indices[:, 0].tolist()
    return [
        [row[:count] for row, count in zip(rows, counts, strict=True)]
        for rows, counts in zip(indices, numbers, strict=True)
    ]


def mask_from_tiles(block_mask: BlockMask):
    """What a kernel sees: nothing, the mask function's answer, or everything, tile by tile."""
    queries, keys = block_mask.seq_lengths
    tile = block_mask.BLOCK_SIZE[0]
    batch = block_mask.kv_num_blocks.shape[0]
    device = block_mask.kv_num_blocks.device
    asked = every_pair(block_mask.mask_mod, batch, queries, keys, device)
    seen = torch.zeros_like(asked)
    partial = read(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = read(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    for b in range(batch):
        for i in range(len(partial[b])):
            rows = slice(i * tile, (i + 1) * tile)
            for j in partial[b][i]:
                columns = slice(j * tile, (j + 1) * tile)
                seen[b, rows, columns] = asked[b, rows, columns]
            for j in full[b][i]:
                seen[b, rows, j * tile : (j + 1) * tile] = True
    return seen


# By hand

HAND = {
    "anchor_positions": [[2, 0]],
    "block_keep_mask": [[True, False]],
    "seq_len": 4,
    "block_size": 2,
}
HAND_MASK = [
    "11..11..",
    "11..11..",
    "......11",
    "......11",
]


def hand(device):
    return (
        torch.tensor(HAND["anchor_positions"], device=device),
        torch.tensor(HAND["block_keep_mask"], device=device),
    ), {"seq_len": HAND["seq_len"], "block_size": HAND["block_size"]}


def test_a_block_sees_the_context_before_its_anchor_and_all_of_itself(device):
    args, sizes = hand(device)
    mask = training_dense_mask(*args, **sizes)
    assert mask.dtype == torch.bool
    assert mask.device.type == device.type
    drawn = ["".join("1" if seen else "." for seen in row) for row in mask[0].tolist()]
    assert drawn == HAND_MASK


def test_the_oracle_draws_the_same_picture():
    mask = oracle.dense_mask(*HAND.values())
    assert ["".join("1" if seen else "." for seen in row) for row in mask[0]] == HAND_MASK


def test_the_anchor_does_not_see_its_own_context_position(device):
    anchors = torch.arange(5, device=device)[None]
    keep = torch.ones(1, 5, dtype=torch.bool, device=device)
    mask = training_dense_mask(anchors, keep, seq_len=5, block_size=1)
    context = mask[0, :, :5]
    assert not context.diagonal().any()
    assert context.sum(1).tolist() == [0, 1, 2, 3, 4]


def test_a_dummy_block_sees_itself_and_no_context_wherever_its_anchor_is(device):
    anchors = torch.tensor([[0, 3, 2]], device=device)
    keep = torch.zeros(1, 3, dtype=torch.bool, device=device)
    mask = training_dense_mask(anchors, keep, seq_len=4, block_size=2)
    assert not mask[:, :, :4].any()
    assert mask[0, :, 4:].sum(1).tolist() == [2] * 6


def test_context_is_the_same_document_only(device):
    anchors = torch.tensor([[2, 3, 5]], device=device)
    keep = torch.ones(1, 3, dtype=torch.bool, device=device)
    docs = torch.tensor([[0, 0, 0, 1, 1, 1]], device=device)
    mask = training_dense_mask(anchors, keep, seq_len=6, block_size=1, doc_ids=docs)
    assert mask[0, :, :6].int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0],
    ]


# The three forms


def test_the_random_cases_hold_every_corner():
    drawn = [case for case, _ in cases()]
    tiles = [oracle.tile_kinds(mask[0], case.tile_size) for case, mask in cases()]
    corners = {
        "no context": [c.seq_len == 0 for c in drawn],
        "documents": [c.docs is not None and len(set(c.docs[0])) > 1 for c in drawn],
        "unsorted anchors": [c.anchors[0] != sorted(c.anchors[0]) for c in drawn],
        "kept and dummy blocks": [len(set(c.keep[0])) == 2 for c in drawn],
        "no kept block": [not any(c.keep[0]) for c in drawn],
        "one slot": [c.block_size == 1 for c in drawn],
        "one anchor": [len(c.anchors[0]) == 1 for c in drawn],
        "tiles that straddle blocks": [
            c.queries > c.tile_size and c.tile_size % c.block_size > 0 for c in drawn
        ],
        "a tile that straddles the end of the context": [
            c.seq_len > c.tile_size and c.seq_len % c.tile_size > 0 for c in drawn
        ],
        "several query tiles": [c.queries > c.tile_size for c in drawn],
        "full tiles of context": [
            any("full" in row[: c.seq_len // c.tile_size] for row in kinds)
            for c, kinds in zip(drawn, tiles, strict=True)
        ],
        "full tiles inside a block": [
            any("full" in row[c.seq_len // c.tile_size + 1 :] for row in kinds)
            for c, kinds in zip(drawn, tiles, strict=True)
        ],
    }
    rare = {name: sum(flags) for name, flags in corners.items() if sum(flags) < 20}
    assert not rare


def test_the_dense_form_matches_the_oracle(device):
    for index, (case, expected) in enumerate(cases()):
        assert case(training_dense_mask, device).tolist() == expected, f"case {index}: {case}"


def test_the_mask_function_matches_the_oracle(device):
    for index, (case, expected) in enumerate(cases()):
        mask_mod = case(training_mask_mod, device)
        got = every_pair(mask_mod, len(case.anchors), case.queries, case.keys, device)
        assert got.tolist() == expected, f"case {index}: {case}"


def test_the_mask_function_can_be_asked_one_pair_at_a_time(device):
    """As create_mask does, under vmap, with indices that are tensors without axes."""
    for index, (case, expected) in enumerate(cases()[:60]):
        mask_mod, batch = case(training_mask_mod, device), len(case.anchors)
        got = create_mask(mask_mod, batch, 1, case.queries, case.keys, device=device)
        assert got[:, 0].tolist() == expected, f"case {index}: {case}"


def test_the_tiles_and_their_mask_function_match_the_oracle(device):
    for index, (case, expected) in enumerate(cases()):
        block_mask = case(training_block_mask, device, tile_size=case.tile_size)
        assert block_mask.seq_lengths == (case.queries, case.keys)
        assert block_mask.BLOCK_SIZE == (case.tile_size, case.tile_size)
        assert mask_from_tiles(block_mask).tolist() == expected, f"case {index}: {case}"


def test_the_tile_lists_are_those_counted_from_the_oracle(device):
    for index, (case, expected) in enumerate(cases()):
        got = case(training_block_mask, device, tile_size=case.tile_size)
        kinds = [oracle.tile_kinds(mask, case.tile_size) for mask in expected]
        columns = [oracle.transposed(rows) for rows in kinds]
        where = f"case {index}: {case}"
        for numbers, indices, tiles, kind in [
            (got.kv_num_blocks, got.kv_indices, kinds, "partial"),
            (got.full_kv_num_blocks, got.full_kv_indices, kinds, "full"),
            (got.q_num_blocks, got.q_indices, columns, "partial"),
            (got.full_q_num_blocks, got.full_q_indices, columns, "full"),
        ]:
            assert read(numbers, indices) == [oracle.tile_lists(t, kind) for t in tiles], where


# Against PyTorch's own tiles


def assert_same_lists(got: BlockMask, expected: BlockMask, where: str):
    for name in LISTS + TRANSPOSED_LISTS:
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, (name, where)
        assert ours.device == theirs.device, (name, where)
        assert ours.shape == theirs.shape, (name, where)
        assert torch.equal(ours, theirs), (name, where)


def compare_with_pytorch(case: Case, device):
    got = case(training_block_mask, device, tile_size=case.tile_size)
    expected = create_block_mask(
        case(training_mask_mod, device),
        len(case.anchors),
        1,
        case.queries,
        case.keys,
        device=device,
        BLOCK_SIZE=case.tile_size,
    )
    assert got.shape == expected.shape
    assert got.seq_lengths == expected.seq_lengths
    assert_same_lists(got, expected, str(case))


def test_the_closed_form_makes_the_lists_that_pytorch_makes(device):
    rng = random.Random(7)
    for _ in range(150):
        tiles = [16, 17, 32, 64, 100, 128, 255, 256, rng.randint(16, 256)]
        compare_with_pytorch(draw_case(rng, 700, 40, 9, tiles), device)


def test_the_default_tile_is_128(device):
    case = draw_case(random.Random(1), 500, 30, 7)
    assert case(training_block_mask, device).BLOCK_SIZE == (128, 128)


@pytest.mark.parametrize("seq_len", [127, 128, 129, 256])
@pytest.mark.parametrize("block_size", [1, 7, 16, 130])
def test_lists_agree_where_context_and_blocks_meet_the_tile_border(seq_len, block_size, device):
    rng = random.Random(seq_len * block_size)
    num_anchors = -(-300 // block_size)
    anchors = [sorted(rng.choices(range(seq_len), k=num_anchors)), [seq_len - 1] * num_anchors]
    keep = [[True] * num_anchors, [True] * num_anchors]
    case = Case(seq_len, block_size, anchors, keep, None, 128)
    compare_with_pytorch(case, device)
    compare_with_pytorch(Case(seq_len, block_size, anchors, keep, None, 16), device)


@settings(max_examples=60)
@given(
    data=st.data(),
    seq_len=st.integers(1, 60),
    block_size=st.integers(1, 20),
    num_anchors=st.integers(1, 6),
    tile_size=st.integers(16, 256),
)
def test_lists_agree_on_cases_that_hypothesis_can_shrink(
    data, seq_len, block_size, num_anchors, tile_size
):
    def row(values):
        return data.draw(st.lists(values, min_size=num_anchors, max_size=num_anchors))

    starts = data.draw(st.lists(st.booleans(), min_size=seq_len, max_size=seq_len))
    docs = [[sum(starts[: p + 1]) for p in range(seq_len)]]
    anchors, keep = [row(st.integers(0, seq_len - 1))], [row(st.booleans())]
    case = Case(seq_len, block_size, anchors, keep, docs, tile_size)
    compare_with_pytorch(case, torch.device("cpu"))


# Cost


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


S, N, K = 4096, 512, 7
PAIRS = N * K * (S + N * K)


def big(device, batch=1, packed=False):
    torch.manual_seed(0)
    anchors = torch.randint(S, (batch, N), device=device).sort(1).values
    keep = torch.ones(batch, N, dtype=torch.bool, device=device)
    docs = (torch.arange(S, device=device) // 500).expand(batch, S) if packed else None
    return (anchors, keep), {"seq_len": S, "block_size": K, "doc_ids": docs}


def test_the_recorder_sees_the_dense_mask(device):
    args, sizes = big(device)
    with Largest() as largest:
        training_dense_mask(*args, **sizes)
    assert largest.numel >= PAIRS


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tile_size", [128, 64])
def test_the_closed_form_makes_nothing_of_size_queries_by_keys(tile_size, packed, device):
    args, sizes = big(device, packed=packed)
    with Largest() as largest:
        training_block_mask(*args, **sizes, tile_size=tile_size)
    assert 0 < largest.numel < PAIRS / 200


def test_the_big_lists_are_right(device):
    """The size at which the memory was watched, and there against PyTorch."""
    args, sizes = big(device, packed=True)
    expected = create_block_mask(
        training_mask_mod(*args, **sizes), 1, 1, N * K, S + N * K, device=device
    )
    assert_same_lists(training_block_mask(*args, **sizes), expected, "big")


# Compiled, without host synchronisation, on one device


def lists_of(anchors, keep, docs, seq_len, block_size, tile_size):
    block_mask = training_block_mask(
        anchors, keep, seq_len=seq_len, block_size=block_size, doc_ids=docs, tile_size=tile_size
    )
    return [getattr(block_mask, name) for name in LISTS + TRANSPOSED_LISTS]


def dense_of(anchors, keep, docs, seq_len, block_size, tile_size):
    return [
        training_dense_mask(anchors, keep, seq_len=seq_len, block_size=block_size, doc_ids=docs)
    ]


def inputs(device, batch, seq_len, num_anchors, packed=True):
    anchors = torch.randint(seq_len, (batch, num_anchors), device=device)
    keep = torch.rand(batch, num_anchors, device=device) < 0.7
    docs = (torch.arange(seq_len, device=device) // 20).repeat(batch, 1) if packed else None
    return anchors, keep, docs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", [lists_of, dense_of])
def test_compiled_whole_and_dynamic_it_gives_the_same(form, packed, device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(form, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, seq_len, num_anchors, block_size in [(2, 70, 9, 5), (3, 130, 12, 4)]:
        args = inputs(device, batch, seq_len, num_anchors, packed)
        with torch._dynamo.config.patch(error_on_recompile=batch == 3):
            got = compiled(*args, seq_len, block_size, 16)
        expected = form(*args, seq_len, block_size, 16)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_block_mask_itself_can_be_compiled(device):
    torch._dynamo.reset()
    anchors, keep, docs = inputs(device, 2, 70, 9)
    compiled = torch.compile(training_block_mask, fullgraph=True, backend="aot_eager")
    sizes = {"seq_len": 70, "block_size": 5, "doc_ids": docs, "tile_size": 16}
    got, expected = compiled(anchors, keep, **sizes), training_block_mask(anchors, keep, **sizes)
    assert_same_lists(got, expected, "compiled")
    assert torch.equal(
        mask_from_tiles(got),
        training_dense_mask(anchors, keep, seq_len=70, block_size=5, doc_ids=docs),
    )


@pytest.mark.parametrize("form", [lists_of, dense_of])
def test_no_form_asks_a_tensor_for_its_values(form):
    expected = form(*inputs("cpu", 2, 50, 4), 50, 3, 16)
    with FakeTensorMode():
        got = form(*inputs("cpu", 2, 50, 4), 50, 3, 16)
    assert [t.shape for t in got] == [t.shape for t in expected]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", [lists_of, dense_of])
def test_no_form_synchronises_with_the_gpu(form):
    args = inputs(torch.device("cuda"), 2, 50, 4)
    form(*args, 50, 3, 16)
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = form(*args, 50, 3, 16)
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    assert {t.device.type for t in got} == {"cuda"}


class Devices(TorchDispatchMode):
    """The devices of every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.update(t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", [lists_of, dense_of])
def test_every_tensor_is_made_on_the_device_of_the_anchors(form, packed):
    args = inputs("meta", 2, 50, 4, packed)
    with Devices() as devices:
        form(*args, 50, 3, 16)
    assert devices.seen == {"meta"}


# Debug mode

OUTSIDE = """
import torch
from dspark_lab.attention import training_block_mask, training_dense_mask

keep = torch.ones(1, 2, dtype=torch.bool)
for form in (training_dense_mask, training_block_mask):
    for anchor in (0, 4, 5, -1):
        try:
            form(torch.tensor([[1, anchor]]), keep, seq_len=5, block_size=2)
            print("passed")
        except ValueError as error:
            print("refused", str(anchor) in str(error))
"""


def run(debug: str) -> list[str]:
    root = str(Path(dspark_lab.__file__).parents[1])
    environment = {**os.environ, "DSPARK_LAB_DEBUG": debug, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_debug_mode_refuses_an_anchor_outside_the_row():
    assert run("1") == ["passed", "passed", "refused True", "refused True"] * 2
