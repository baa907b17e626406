"""Bad input to the utilities, the blocks and the attention: a sentence, never a bare error.

Every argument of one good call of each function is spoilt in every way that its kind allows; a
table holds what no annotation says. A second device is the meta device.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dspark_lab import attention, blocks, common
from dspark_lab.chats import Batch

B, S, N, K, H, HKV, D = 2, 6, 3, 2, 4, 2, 16


def long(*shape):
    return torch.zeros(shape, dtype=torch.long)


MASK, KEEP, LABELS = torch.ones(B, S), long(B, N).bool(), long(B, N, K)
WHERE = {"anchor_positions": long(B, N), "block_keep_mask": KEEP}
RULE = {**WHERE, "seq_len": S, "block_size": K, "doc_ids": long(B, S)}
ROW = {"seq_len": S, "loss_mask": MASK, "doc_remaining": long(B, S)}
KEYS = torch.zeros(B, HKV, S + N * K, D)
QKV = {"q": torch.zeros(B, H, N * K, D), "k": KEYS, "v": KEYS.clone()}
HIDDEN = [torch.zeros(B, S, 4) for _ in range(4)]
CALLS = {
    "candidates": (common.build_anchor_candidate_mask, ROW),
    "sample": (common.sample_anchor_positions, {**ROW, "num_anchors": N, "device": "cpu"}),
    "eval mask": (
        common.build_eval_mask,
        {**ROW, **WHERE, "label_indices": LABELS, "safe_label_indices": LABELS},
    ),
    "positions": (
        common.create_position_ids,
        {"anchor_positions": long(B, N), "block_size": K, "context_position_ids": long(B, S)},
    ),
    "noise": (
        common.create_noise_embed,
        {
            "embed_tokens": nn.Embedding(10, 4),
            "input_ids": long(B, S),
            **WHERE,
            "mask_token_id": 9,
            "block_size": K,
        },
    ),
    "features": (common.extract_context_feature, {"hidden_states": HIDDEN, "layer_ids": [0, 2]}),
    "layer ids": (common.validate_target_layer_ids, {"layer_ids": [0, 2], "num_target_layers": 8}),
    "documents": (common.context_doc_ids, {"seq_lens": long(B, 4), "seq_len": S, "device": "cpu"}),
    "head": (common.AcceptRatePredictor, {"input_dim": 4}),
    "logits": (common.AcceptRatePredictor(4), {"features": torch.zeros(B, 4)}),
    "draw": (
        blocks.draw_blocks,
        {
            "batch": Batch.of_tokens(long(B, S), MASK),
            "num_anchors": N,
            "block_size": K,
            "mask_token_id": 1,
        },
    ),
    "mask_mod": (attention.training_mask_mod, RULE),
    "dense mask": (attention.training_dense_mask, RULE),
    "block mask": (attention.training_block_mask, {**RULE, "tile_size": 128}),
    "attention": (attention.block_attention, {**QKV, **RULE}),
}
# What may be None, what may be 0, and what no other argument measures or fits.
OPTIONAL = {"doc_remaining", "context_position_ids", "doc_ids"}
SIZES = {"mask_token_id", "seq_len"}
ALONE = {
    ("eval mask", "anchor_positions", "none"),
    ("documents", "seq_lens", 0),
    ("documents", "seq_lens", 1),
    ("documents", "seq_lens", "device"),
    ("logits", "features", 0),
    ("logits", "features", "device"),
    ("logits", "features", "rank"),
    ("positions", "anchor_positions", 1),
    ("positions", "context_position_ids", 1),
    ("noise", "input_ids", 1),
}
OTHER_DTYPES = {"loss_mask": torch.complex64}


def longer(tensor, axis):
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)


def spoilt(call, name, value):
    """Bad values in the place of a good one, and the error of each."""
    if isinstance(value, Tensor):
        other = torch.long if value.dtype in (torch.bool, torch.float32) else torch.float32
        yield [[1, 1]], TypeError
        yield value.to(OTHER_DTYPES.get(name, other)), TypeError
        if (call, name, "rank") not in ALONE:
            yield value[None], ValueError
        yield value.flatten()[0], ValueError
        if (call, name, "device") not in ALONE:
            yield value.to("meta"), ValueError
        for axis in range(value.dim()):
            if (call, name, axis) not in ALONE:
                yield longer(value, axis), ValueError
    elif isinstance(value, int):
        for bad in (float(value), str(value), True, [value], torch.tensor(value)):
            yield bad, TypeError
        for bad in (-1, -100) if name in SIZES else (0, -1, -100):
            yield bad, ValueError
        if name == "seq_len" and call != "documents":
            yield value + 1, ValueError
            yield value - 1, ValueError
    elif isinstance(value, str):
        yield "nonsense", ValueError
        yield 1.5, TypeError
    else:
        yield 7, TypeError
        yield "12", TypeError
    if name not in OPTIONAL and (call, name, "none") not in ALONE:
        yield None, TypeError


def refused(function, arguments, error):
    """The message with which a call is refused: one line that names an argument."""
    with pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    named = any(
        name.replace("_", " ").rstrip("s") in message.replace("_", " ") for name in arguments
    )
    assert (named or "device" in message) and "\n" not in message, message
    return message


@pytest.mark.parametrize("call", CALLS)
def test_every_argument_is_checked(call):
    function, good = CALLS[call]
    function(**good)
    for name, value in good.items():
        for bad, error in spoilt(call, name, value):
            message = refused(function, {**good, name: bad}, error)
            if isinstance(bad, Tensor):
                assert isinstance(value, int) or error is ValueError or str(bad.dtype) in message
            else:
                assert str(bad) in message or repr(bad) in message or type(bad).__name__ in message


@pytest.mark.parametrize(
    ("call", "changed", "error", "message"),
    [
        ("sample", {"device": "meta"}, ValueError, "must be on the device of loss_mask, cpu, got"),
        ("eval mask", {"doc_remaining": None}, ValueError, "got anchor_positions alone"),
        ("eval mask", {"anchor_positions": None}, ValueError, "got doc_remaining alone"),
        ("noise", {"mask_token_id": 10}, ValueError, r"embedding, \[0, 9\], got 10"),
        ("noise", {"embed_tokens": nn.Embedding(10, 4, device="meta")}, ValueError, "got meta"),
        ("features", {"layer_ids": [0, 3]}, ValueError, "layer id 3 needs 5 hidden states, got 4"),
        ("features", {"hidden_states": []}, ValueError, "got 0, which reach id -2"),
        ("features", {"hidden_states": [torch.zeros(S, 4)] * 4}, ValueError, r"\(6, 4\)"),
        ("features", {"hidden_states": [*HIDDEN[:3], HIDDEN[3].to("meta")]}, ValueError, "meta"),
        ("layer ids", {"layer_ids": [3, 1]}, ValueError, r"strictly increasing, got \[3, 1\]"),
        ("layer ids", {"layer_ids": [0, 8]}, ValueError, r"lie in \[-1, 7\], got \[0, 8\]"),
        ("logits", {"features": torch.zeros(2, 5)}, ValueError, r"\[..., 4\], got shape \(2, 5\)"),
        ("attention", {"q": QKV["q"][:, :3]}, ValueError, "must divide those of q, got 2 and 3"),
        ("attention", {"q": QKV["q"].double()}, TypeError, "k must have the dtype of q"),
        ("attention", {"k": KEYS[:, :, :6]}, ValueError, r"key = 6 as in k, got shape \(2, 2, 12"),
        ("attention", {"seq_len": 5, "doc_ids": None}, ValueError, "k must have 11 positions"),
        ("attention", {"block_size": K + 1}, ValueError, "q must have 9 positions"),
        ("attention", {"backend": "cudnn"}, ValueError, "'flex' or 'blockwise', got 'cudnn'"),
    ],
)
def test_the_message_says_what_is_allowed(call, changed, error, message):
    function, good = CALLS[call]
    assert re.search(message, refused(function, {**good, **changed}, error))


@pytest.mark.parametrize("call", ["mask_mod", "dense mask", "block mask"])
def test_sizes_of_a_mask_are_given_by_keyword_only(call):
    with pytest.raises(TypeError):
        CALLS[call][0](*WHERE.values(), S, K)


@settings(max_examples=200)
@given(ids=st.lists(st.integers(-3, 9), max_size=6), num_layers=st.integers(1, 8))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layer_ids_pass_exactly_when_they_ascend_within_range(ids, num_layers):
    ascending = all(a < b for a, b in zip(ids, ids[1:], strict=False))
    if ids and ascending and all(-1 <= i < num_layers for i in ids):
        assert common.validate_target_layer_ids(ids, num_layers) == ids
    else:
        with pytest.raises(ValueError):
            common.validate_target_layer_ids(ids, num_layers)
