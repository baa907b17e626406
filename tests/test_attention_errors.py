"""Bad input to `dspark_lab.attention`: each a ValueError or TypeError that names what was given.

As for `dspark_lab.common`: one good call, and the ways to spoil one argument of it. Where two
arguments contradict each other, the message may blame either. A second device is the meta
device.
"""

import re

import pytest
import torch

from dspark_lab import attention

B, S, N, K, H, HKV, D = 2, 6, 3, 2, 4, 2, 16
FORMS = ["training_mask_mod", "training_dense_mask", "training_block_mask"]


def zeros(*shape, dtype=torch.long):
    return torch.zeros(shape, dtype=dtype)


def floats(*shape):
    return zeros(*shape, dtype=torch.float32)


def bools(*shape):
    return zeros(*shape, dtype=torch.bool)


def good() -> dict[str, dict]:
    """One good call of every function, by keyword."""
    where = dict(
        anchor_positions=zeros(B, N),
        block_keep_mask=bools(B, N),
        seq_len=S,
        block_size=K,
        doc_ids=zeros(B, S),
    )
    qkv = dict(q=floats(B, H, N * K, D), k=floats(B, HKV, S + N * K, D))
    qkv["v"] = qkv["k"].clone()
    return {
        "training_mask_mod": dict(where),
        "training_dense_mask": dict(where),
        "training_block_mask": dict(where, tile_size=128),
        "block_attention": dict(qkv, **where, scale=None, backend="auto"),
    }


def counts(function: str, name: str) -> list[tuple]:
    values = [(value, ValueError, repr(value)) for value in (0, -1)]
    kinds = [(value, TypeError, repr(value)) for value in (2.0, "2", None, True)]
    return [(function, {name: value}, kind, shown) for value, kind, shown in values + kinds]


def placement(function: str) -> list[tuple]:
    """What every function of the module must refuse about anchors, sizes and documents."""
    changes = [
        ({"anchor_positions": zeros(N)}, ValueError, "(3,)"),
        ({"anchor_positions": zeros(B, N, 1)}, ValueError, "(2, 3, 1)"),
        ({"anchor_positions": zeros(B + 1, N)}, ValueError, "3"),
        ({"anchor_positions": floats(B, N)}, TypeError, "float32"),
        ({"anchor_positions": [[1, 2, 3]]}, TypeError, "list"),
        ({"anchor_positions": zeros(B, N).to("meta")}, ValueError, "meta"),
        ({"block_keep_mask": bools(N)}, ValueError, "(3,)"),
        ({"block_keep_mask": bools(B, N + 1)}, ValueError, "4"),
        ({"block_keep_mask": bools(B + 1, N)}, ValueError, "3"),
        ({"block_keep_mask": zeros(B, N)}, TypeError, "int64"),
        ({"block_keep_mask": [[True]]}, TypeError, "list"),
        ({"block_keep_mask": bools(B, N).to("meta")}, ValueError, "meta"),
        ({"doc_ids": zeros(S)}, ValueError, "(6,)"),
        ({"doc_ids": zeros(B, S + 1)}, ValueError, "7"),
        ({"doc_ids": zeros(B + 1, S)}, ValueError, "3"),
        ({"doc_ids": floats(B, S)}, TypeError, "float32"),
        ({"doc_ids": [[0]]}, TypeError, "list"),
        ({"doc_ids": zeros(B, S).to("meta")}, ValueError, "meta"),
        ({"seq_len": -1}, ValueError, "-1"),
        ({"seq_len": S + 1}, ValueError, "7"),
        ({"seq_len": 6.0}, TypeError, "6.0"),
        ({"seq_len": None}, TypeError, "None"),
        ({"seq_len": True}, TypeError, "True"),
    ]
    return counts(function, "block_size") + [(function, *change) for change in changes]


QKV = [
    ({"q": floats(H, N * K, D)}, ValueError, "(4, 6, 16)"),
    ({"q": floats(B + 1, H, N * K, D)}, ValueError, "3"),
    ({"q": floats(B, H, N * K + 1, D)}, ValueError, "7"),
    ({"q": floats(B, H, N * K, D * 2)}, ValueError, "32"),
    ({"q": floats(B, 3, N * K, D)}, ValueError, "3"),
    ({"q": [1.0]}, TypeError, "list"),
    ({"q": zeros(B, H, N * K, D)}, TypeError, "int64"),
    ({"q": floats(B, H, N * K, D).to("meta")}, ValueError, "meta"),
    ({"q": floats(B, H, N * K, D).double()}, TypeError, "float64"),
    ({"k": floats(HKV, S + N * K, D)}, ValueError, "(2, 12, 16)"),
    ({"k": floats(B, HKV, S + N * K + 1, D)}, ValueError, "13"),
    ({"k": floats(B, HKV, N * K, D)}, ValueError, "6"),
    ({"k": floats(B, H, S + N * K, D)}, ValueError, "4"),
    ({"k": floats(B, HKV, S + N * K, D).to("meta")}, ValueError, "meta"),
    ({"k": None}, TypeError, "None"),
    ({"v": floats(B, HKV, S + N * K)}, ValueError, "(2, 2, 12)"),
    ({"v": floats(B, HKV, S + N * K - 1, D)}, ValueError, "11"),
    ({"v": floats(B + 1, HKV, S + N * K, D)}, ValueError, "3"),
    ({"v": floats(B, H, S + N * K, D)}, ValueError, "4"),
    ({"v": floats(B, HKV, S + N * K, D).to("meta")}, ValueError, "meta"),
    ({"block_size": K + 1}, ValueError, "6|9"),
    ({"scale": "1"}, TypeError, "'1'"),
    ({"backend": "cudnn"}, ValueError, "cudnn"),
    ({"backend": None}, ValueError, "None"),
    ({"backend": 3}, ValueError, "3"),
]

CASES = [
    *(case for function in [*FORMS, "block_attention"] for case in placement(function)),
    *counts("training_block_mask", "tile_size"),
    *(("block_attention", *change) for change in QKV),
]


def describe(case) -> str:
    function, changed, kind, shown = case
    return f"{function}-{'-'.join(changed)}-{kind.__name__}-{shown}"


def refused(kind, case):
    """An unknown backend is a ValueError or, if it is no string, a TypeError."""
    return (ValueError, TypeError) if "backend" in case[1] else kind


@pytest.mark.parametrize("function", good())
def test_the_call_that_the_table_spoils_is_good(function):
    getattr(attention, function)(**good()[function])


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_bad_input_is_named_and_shown(case):
    function, changed, kind, shown = case
    arguments = {**good()[function], **changed}
    with pytest.raises(refused(kind, case)) as caught:
        getattr(attention, function)(**arguments)
    message = str(caught.value)
    pattern = shown if "|" in shown else re.escape(shown)
    assert re.search(pattern, message), message
    assert any(re.search(rf"\b{name}\b", message) for name in arguments), message
    assert "\n" not in message, message


def test_an_unknown_backend_is_told_the_known_ones():
    arguments = {**good()["block_attention"], "backend": "math"}
    with pytest.raises(ValueError) as caught:
        attention.block_attention(**arguments)
    for name in ("auto", "dense", "flex", "blockwise", "math"):
        assert name in str(caught.value)


@pytest.mark.parametrize("function", FORMS)
def test_sizes_are_given_by_keyword_only(function):
    with pytest.raises(TypeError):
        getattr(attention, function)(zeros(B, N), bools(B, N), S, K)
