"""The training mask of `dspark_lab.attention.mask`: one rule, three forms, all equal.

The oracle's rule is compared with the dense form and with the mask function; the tile lists of the
closed form with those counted from the oracle's mask, and with those that PyTorch's
create_block_mask makes of the mask function.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from dspark_lab import checks
from dspark_lab.attention import training_block_mask, training_dense_mask, training_mask_mod
from tests import oracle
from tests.draws import Draw, cuts, tile_lists
from tests.recorder import Recorder

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]


def where(draw: Draw) -> tuple[tuple, dict]:
    """The arguments of the three forms."""
    blocks = draw.blocks
    sizes = {"seq_len": blocks.seq_len, "block_size": blocks.block_size, "doc_ids": blocks.doc_ids}
    return (blocks.anchor_positions, blocks.block_keep_mask), sizes


def every_pair(mask_mod, batch, queries, keys):
    """The mask function asked about every pair at once."""
    b, q, kv = (torch.arange(n) for n in (batch, queries, keys))
    zero = torch.zeros((), dtype=torch.long)
    answer = mask_mod(b[:, None, None], zero, q[None, :, None], kv[None, None, :])
    return answer.expand(batch, queries, keys)


def read(numbers, indices):
    """Tile lists as Python lists, [batch][tile row][columns in use]."""
    numbers, indices = numbers[:, 0].tolist(), indices[:, 0].tolist()
    return [
        [row[:count] for row, count in zip(rows, counts, strict=True)]
        for rows, counts in zip(indices, numbers, strict=True)
    ]


# By hand


def picture(mask):
    return ["".join("1" if seen else "." for seen in row) for row in mask]


# What a block sees: anchors, kept ones, tokens of the row, slots of a block, documents; the mask.
BY_HAND = {
    "the context before its anchor and all of itself, a dummy itself": (
        [2, 0], "10", 4, 2, None, ["11..11..", "11..11..", "......11", "......11"]
    ),
    "all before its anchor, not the anchor": (
        [0, 1, 3], "111", 4, 1, None, ["....1..", "1....1.", "111...1"]
    ),
    "no context from a dummy wherever it is": ([3], "0", 4, 2, None, ["....11", "....11"]),
    "its own document only": (
        [2, 3, 5], "111", 6, 1, "000111", ["11....1..", ".......1.", "...11...1"]
    ),
    "itself without context": ([0, 0], "00", 0, 2, None, ["11..", "11..", "..11", "..11"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND)
def test_a_block_sees(case):
    anchors, kept, seq_len, block_size, documents, expected = case
    where = torch.tensor([anchors]), torch.tensor([[k == "1" for k in kept]])
    docs = None if documents is None else torch.tensor([list(map(int, documents))])
    sizes = {"seq_len": seq_len, "block_size": block_size, "doc_ids": docs}
    mask = training_dense_mask(*where, **sizes)
    assert mask.dtype == torch.bool
    assert picture(mask[0].tolist()) == expected


# The three forms


@given(cuts())
def test_the_dense_form_and_the_mask_function_match_the_oracle(draw):
    args, sizes = where(draw)
    expected = draw.dense_mask()
    assert training_dense_mask(*args, **sizes).tolist() == expected
    mask_mod, shape = training_mask_mod(*args, **sizes), torch.tensor(expected).shape
    assert every_pair(mask_mod, *shape).tolist() == expected
    # As under vmap, with indices that are tensors without axes.
    batch, queries, keys = shape
    assert create_mask(mask_mod, batch, 1, queries, keys, device="cpu")[:, 0].tolist() == expected


@given(cuts(), st.integers(1, 40))
def test_the_tile_lists_are_those_counted_from_the_oracle(draw, tile_size):
    args, sizes = where(draw)
    got = training_block_mask(*args, **sizes, tile_size=tile_size)
    expected = draw.dense_mask()
    assert got.seq_lengths == torch.tensor(expected).shape[1:]
    assert got.BLOCK_SIZE == (tile_size, tile_size)
    kinds = [oracle.tile_kinds(mask, tile_size) for mask in expected]
    columns = [list(zip(*rows, strict=True)) for rows in kinds]
    for numbers, indices, tiles, kind in [
        (got.kv_num_blocks, got.kv_indices, kinds, "partial"),
        (got.full_kv_num_blocks, got.full_kv_indices, kinds, "full"),
        (got.q_num_blocks, got.q_indices, columns, "partial"),
        (got.full_q_num_blocks, got.full_q_indices, columns, "full"),
    ]:
        assert read(numbers, indices) == [oracle.tile_lists(rows, kind) for rows in tiles]


# Against PyTorch's own tiles


def random_blocks(batch, seq_len, num_anchors, block_size, packed):
    """Anchors in any order, the last one at the row's end, most of them kept."""
    torch.manual_seed(seq_len * block_size)
    anchors = torch.randint(seq_len, (batch, num_anchors))
    anchors[:, -1] = seq_len - 1
    keep = torch.rand(batch, num_anchors) < 0.9
    docs = (torch.arange(seq_len) // 50).repeat(batch, 1) if packed else None
    return (anchors, keep), {"seq_len": seq_len, "block_size": block_size, "doc_ids": docs}


def assert_same_lists(got: BlockMask, expected: BlockMask):
    assert (got.shape, got.seq_lengths) == (expected.shape, expected.seq_lengths)
    torch.testing.assert_close(tile_lists(got), tile_lists(expected), rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seq_len", [1, 127, 128, 129, 256, 700])
@pytest.mark.parametrize("block_size", [1, 7, 16, 130])
def test_the_closed_form_makes_the_lists_that_pytorch_makes(block_size, seq_len, packed):
    num_anchors = -(-300 // block_size)
    args, sizes = random_blocks(2, seq_len, num_anchors, block_size, packed)
    queries = num_anchors * block_size
    shape = 2, 1, queries, seq_len + queries
    for tile in (16, 17, 128, 255):
        got = training_block_mask(*args, **sizes, tile_size=tile)
        mask_mod = training_mask_mod(*args, **sizes)
        assert_same_lists(got, create_block_mask(mask_mod, *shape, device="cpu", BLOCK_SIZE=tile))
    dense = training_dense_mask(*args, **sizes)
    assert every_pair(training_mask_mod(*args, **sizes), 2, *shape[2:]).equal(dense)


def test_the_block_mask_itself_can_be_compiled():
    torch._dynamo.reset()
    args, sizes = random_blocks(2, 70, 9, 5, packed=True)
    got = torch.compile(training_block_mask, fullgraph=True, backend="aot_eager")(*args, **sizes)
    assert_same_lists(got, training_block_mask(*args, **sizes))
    dense = training_dense_mask(*args, **sizes)
    assert every_pair(got.mask_mod, *dense.shape).equal(dense)


# Cost

S, N, K = 4096, 512, 7
PAIRS = N * K * (S + N * K)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tile_size", [128, 64])
def test_the_closed_form_makes_nothing_of_size_queries_by_keys(tile_size, packed):
    args, sizes = random_blocks(1, S, N, K, packed)
    with Recorder() as recorder:
        got = training_block_mask(*args, **sizes, tile_size=tile_size)
    with Recorder() as of_the_dense_mask:
        training_dense_mask(*args, **sizes)
    assert 0 < recorder.largest < PAIRS / 200 and of_the_dense_mask.largest >= PAIRS
    assert (training_block_mask(*args, **sizes).BLOCK_SIZE == got.BLOCK_SIZE) == (tile_size == 128)


@pytest.mark.parametrize("form", [training_dense_mask, training_block_mask])
@pytest.mark.parametrize("anchor", [5, -1])
def test_debug_mode_refuses_an_anchor_outside_the_row(anchor, form, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)
    keep, sizes = torch.ones(1, 2, dtype=torch.bool), {"seq_len": 5, "block_size": 2}
    form(torch.tensor([[0, 4]]), keep, **sizes)
    with pytest.raises(ValueError, match=rf"anchor_positions must lie in \[0, 4\], got .*{anchor}"):
        form(torch.tensor([[1, anchor]]), keep, **sizes)
