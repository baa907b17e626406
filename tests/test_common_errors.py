"""Bad input to `dspark_lab.common`: each a ValueError or TypeError that names what was given.

The table holds one call that is good, and the ways to spoil one argument of it. A value that
is wrong is a ValueError, a kind that is wrong a TypeError; the message names an argument and
shows the value, the shape or the device that was given. Where two arguments contradict each
other, the message may blame either. A second device is the meta device.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dspark_lab import common

B, S, N, K = 2, 6, 3, 2


def zeros(*shape, dtype=torch.long, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def bools(*shape):
    return zeros(*shape, dtype=torch.bool)


def good() -> dict[str, dict]:
    """One good call of every function, by keyword."""
    mask = torch.ones(B, S)
    anchors, keep, embed = zeros(B, N), bools(B, N), nn.Embedding(10, 4)
    hidden = [torch.zeros(B, S, 4) for _ in range(4)]
    return {
        "build_anchor_candidate_mask": dict(seq_len=S, loss_mask=mask, doc_remaining=zeros(B, S)),
        "sample_anchor_positions": dict(
            seq_len=S,
            loss_mask=mask,
            num_anchors=N,
            device="cpu",
            doc_remaining=zeros(B, S),
            generator=None,
        ),
        "build_eval_mask": dict(
            seq_len=S,
            loss_mask=mask,
            label_indices=zeros(B, N, K),
            safe_label_indices=zeros(B, N, K),
            block_keep_mask=keep,
            doc_remaining=zeros(B, S),
            anchor_positions=anchors,
        ),
        "create_position_ids": dict(
            anchor_positions=anchors, block_size=K, context_position_ids=zeros(B, S)
        ),
        "create_noise_embed": dict(
            embed_tokens=embed,
            input_ids=zeros(B, S),
            anchor_positions=anchors,
            block_keep_mask=keep,
            mask_token_id=9,
            block_size=K,
        ),
        "extract_context_feature": dict(hidden_states=hidden, layer_ids=[0, 2]),
        "validate_target_layer_ids": dict(layer_ids=[0, 2], num_target_layers=8),
        "context_doc_ids": dict(seq_lens=zeros(B, 4), seq_len=S, device="cpu"),
        "AcceptRatePredictor": dict(input_dim=4),
    }


HIDDEN = good()["extract_context_feature"]["hidden_states"]


def counts(name: str, function: str) -> list[tuple]:
    """The ways to spoil an argument that counts something."""
    values = [(value, ValueError, repr(value)) for value in (0, -1, -100)]
    kinds = [(value, TypeError, repr(value)) for value in (2.0, 2.5, "2", None, True, [2])]
    kinds.append((torch.tensor(2), TypeError, ""))
    return [(function, {name: value}, kind, shown) for value, kind, shown in values + kinds]


def lengths(function: str) -> list[tuple]:
    """The ways to spoil seq_len where a tensor says what it must be."""
    values = [(value, ValueError, str(value)) for value in (S - 1, S + 1, 0, -1)]
    kinds = [(value, TypeError, repr(value)) for value in (6.0, "6", None, True)]
    return [(function, {"seq_len": value}, kind, shown) for value, kind, shown in values + kinds]


def shapes(function: str, name: str, *wrong: tuple, make=zeros) -> list[tuple]:
    """Tensors of the wrong shape."""
    return [(function, {name: make(*shape)}, ValueError, str(shape)) for shape in wrong]


def mismatches(function: str, name: str, *wrong: tuple) -> list[tuple]:
    """Tensors of a good rank that another argument contradicts; both sizes are shown."""
    right = good()[function][name].shape
    cases = []
    for shape in wrong:
        differ = {
            str(n) for pair in zip(shape, right, strict=True) if len(set(pair)) > 1 for n in pair
        }
        shown = "(?s)" + "".join(f"(?=.*{n})" for n in sorted(differ)) + "\\d*"
        cases.append((function, {name: zeros(*shape)}, ValueError, shown))
    return cases


def not_tensors(function: str, *names: str) -> list[tuple]:
    """Lists where tensors belong."""
    return [(function, {name: [[1, 1]]}, TypeError, "list") for name in names]


def wrong_kinds(function: str, *names: str) -> list[tuple]:
    """Floats where positions or ids belong."""
    given = good()[function]
    return [(function, {n: given[n].float()}, TypeError, "float32") for n in names]


def strays(function: str, *names: str) -> list[tuple]:
    """One tensor on another device."""
    given = good()[function]
    return [(function, {n: given[n].to("meta")}, ValueError, "meta") for n in names]


CASES = [
    *lengths("build_anchor_candidate_mask"),
    *shapes("build_anchor_candidate_mask", "loss_mask", (S,), (B, S, 1), ()),
    *mismatches("build_anchor_candidate_mask", "loss_mask", (B, S + 1), (B, 0)),
    *shapes("build_anchor_candidate_mask", "doc_remaining", (S,), (B + 1, S), (B, S - 1)),
    *not_tensors("build_anchor_candidate_mask", "loss_mask", "doc_remaining"),
    *wrong_kinds("build_anchor_candidate_mask", "doc_remaining"),
    *strays("build_anchor_candidate_mask", "doc_remaining"),
    *lengths("sample_anchor_positions"),
    *counts("num_anchors", "sample_anchor_positions"),
    *shapes("sample_anchor_positions", "loss_mask", (S,), (B, S, 1)),
    *mismatches("sample_anchor_positions", "loss_mask", (B, S + 1), (B + 1, S)),
    *shapes("sample_anchor_positions", "doc_remaining", (S,), (B + 1, S), (B, S - 1)),
    *not_tensors("sample_anchor_positions", "loss_mask", "doc_remaining"),
    *strays("sample_anchor_positions", "doc_remaining", "loss_mask"),
    ("sample_anchor_positions", {"device": "meta"}, ValueError, "meta"),
    ("sample_anchor_positions", {"device": 1.5}, TypeError, "1.5"),
    ("sample_anchor_positions", {"generator": 7}, TypeError, "7|int"),
    *lengths("build_eval_mask"),
    *shapes("build_eval_mask", "loss_mask", (S,), (B, S, 1)),
    *mismatches("build_eval_mask", "loss_mask", (B, S + 1), (B + 1, S)),
    *shapes("build_eval_mask", "label_indices", (N, K), (B, N)),
    *mismatches("build_eval_mask", "label_indices", (B + 1, N, K), (B, N + 1, K)),
    *shapes("build_eval_mask", "safe_label_indices", (B, N, K + 1), (B, N * K), (B + 1, N, K)),
    *shapes("build_eval_mask", "block_keep_mask", (N,), (B, N + 1), (B + 1, N), make=bools),
    *shapes("build_eval_mask", "doc_remaining", (S,), (B, S + 1), (B + 1, S)),
    *shapes("build_eval_mask", "anchor_positions", (N,), (B, N + 1), (B + 1, N)),
    *not_tensors("build_eval_mask", "loss_mask", "label_indices", "safe_label_indices"),
    *not_tensors("build_eval_mask", "block_keep_mask", "doc_remaining", "anchor_positions"),
    *wrong_kinds("build_eval_mask", "label_indices", "safe_label_indices", "block_keep_mask"),
    *wrong_kinds("build_eval_mask", "anchor_positions"),
    *strays("build_eval_mask", "label_indices", "safe_label_indices", "block_keep_mask"),
    *strays("build_eval_mask", "doc_remaining", "anchor_positions", "loss_mask"),
    ("build_eval_mask", {"doc_remaining": None}, ValueError, "doc_remaining"),
    ("build_eval_mask", {"anchor_positions": None}, ValueError, "anchor_positions"),
    *counts("block_size", "create_position_ids"),
    *shapes("create_position_ids", "anchor_positions", (N,), (B, N, 1)),
    *shapes("create_position_ids", "context_position_ids", (S,), (B, S, 1)),
    *mismatches("create_position_ids", "context_position_ids", (B + 1, S)),
    *not_tensors("create_position_ids", "anchor_positions", "context_position_ids"),
    *wrong_kinds("create_position_ids", "anchor_positions", "context_position_ids"),
    *strays("create_position_ids", "anchor_positions", "context_position_ids"),
    *counts("block_size", "create_noise_embed"),
    *[
        ("create_noise_embed", {"mask_token_id": value}, kind, repr(value))
        for value, kind in [
            (10, ValueError),
            (-1, ValueError),
            (2.0, TypeError),
            (True, TypeError),
            (None, TypeError),
        ]
    ],
    *shapes("create_noise_embed", "input_ids", (S,), (B, S, 1)),
    *mismatches("create_noise_embed", "input_ids", (B + 1, S)),
    *shapes("create_noise_embed", "anchor_positions", (N,), (B + 1, N), (B, N, 1)),
    *shapes("create_noise_embed", "block_keep_mask", (N,), (B, N + 1), (B + 1, N), make=bools),
    *not_tensors("create_noise_embed", "input_ids", "anchor_positions", "block_keep_mask"),
    *wrong_kinds("create_noise_embed", "input_ids", "anchor_positions", "block_keep_mask"),
    *strays("create_noise_embed", "input_ids", "anchor_positions", "block_keep_mask"),
    (
        "create_noise_embed",
        {"embed_tokens": nn.Embedding(10, 4, device="meta")},
        ValueError,
        "meta",
    ),
    ("extract_context_feature", {"layer_ids": []}, ValueError, r"\[\]|empty"),
    ("extract_context_feature", {"layer_ids": [0, 3]}, ValueError, "3"),
    ("extract_context_feature", {"layer_ids": [0, 99]}, ValueError, "99"),
    ("extract_context_feature", {"layer_ids": [-2, 0]}, ValueError, "-2"),
    ("extract_context_feature", {"layer_ids": [0, 1.0]}, TypeError, "1.0"),
    ("extract_context_feature", {"layer_ids": [0, True]}, TypeError, "True"),
    ("extract_context_feature", {"layer_ids": ["0"]}, TypeError, "'0'"),
    ("extract_context_feature", {"layer_ids": 0}, TypeError, "0|int"),
    ("extract_context_feature", {"hidden_states": []}, ValueError, "0|empty"),
    ("extract_context_feature", {"hidden_states": HIDDEN[:3]}, ValueError, "3"),
    ("extract_context_feature", {"hidden_states": [*HIDDEN[:3], None]}, TypeError, "None"),
    (
        "extract_context_feature",
        {"hidden_states": [*HIDDEN[:3], torch.zeros(B, S + 1, 4)]},
        ValueError,
        r"\(2, 7, 4\)",
    ),
    (
        "extract_context_feature",
        {"hidden_states": [torch.zeros(S, 4)] * 4},
        ValueError,
        r"\(6, 4\)",
    ),
    (
        "extract_context_feature",
        {"hidden_states": [*HIDDEN[:3], HIDDEN[3].to("meta")]},
        ValueError,
        "meta",
    ),
    ("validate_target_layer_ids", {"layer_ids": []}, ValueError, r"\[\]|empty"),
    ("validate_target_layer_ids", {"layer_ids": [3, 1]}, ValueError, "3, 1"),
    ("validate_target_layer_ids", {"layer_ids": [2, 2]}, ValueError, "2, 2"),
    ("validate_target_layer_ids", {"layer_ids": [0, -1]}, ValueError, "0, -1"),
    ("validate_target_layer_ids", {"layer_ids": [0, 8]}, ValueError, "8"),
    ("validate_target_layer_ids", {"layer_ids": [-2, 0]}, ValueError, "-2"),
    ("validate_target_layer_ids", {"layer_ids": [0, 1.0]}, TypeError, "1.0"),
    ("validate_target_layer_ids", {"layer_ids": [False, 2]}, TypeError, "False"),
    ("validate_target_layer_ids", {"layer_ids": ["1"]}, TypeError, "'1'"),
    ("validate_target_layer_ids", {"layer_ids": "12"}, TypeError, "12|str"),
    ("validate_target_layer_ids", {"layer_ids": 3}, TypeError, "3|int"),
    ("validate_target_layer_ids", {"layer_ids": None}, TypeError, "None"),
    *counts("num_target_layers", "validate_target_layer_ids"),
    *shapes("context_doc_ids", "seq_lens", (4,), (B, 4, 1)),
    *not_tensors("context_doc_ids", "seq_lens"),
    *wrong_kinds("context_doc_ids", "seq_lens"),
    ("context_doc_ids", {"seq_len": -1}, ValueError, "-1"),
    ("context_doc_ids", {"seq_len": 2.0}, TypeError, "2.0"),
    ("context_doc_ids", {"seq_len": True}, TypeError, "True"),
    *counts("input_dim", "AcceptRatePredictor"),
]


def describe(case) -> str:
    function, changed, kind, shown = case
    return f"{function}-{'-'.join(changed)}-{kind.__name__}-{shown}"


@pytest.mark.parametrize("function", good())
def test_the_call_that_the_table_spoils_is_good(function):
    getattr(common, function)(**good()[function])


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_bad_input_is_named_and_shown(case):
    function, changed, kind, shown = case
    arguments = {**good()[function], **changed}
    with pytest.raises(kind) as caught:
        getattr(common, function)(**arguments)
    message = str(caught.value)
    pattern = shown if "|" in shown or "\\" in shown else re.escape(shown)
    assert re.search(pattern, message), message
    named = any(words(name) in words(message) for name in arguments)
    assert named or "device" in message, message
    assert "\n" not in message, message


def words(text: str) -> str:
    """layer_ids, layer ids and layer id are one name."""
    return text.replace("_", " ").rstrip("s")


def test_the_message_says_what_is_allowed():
    mask = torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"num_anchors must be >= 1, got 0"):
        common.sample_anchor_positions(4, mask, 0, "cpu")
    with pytest.raises(ValueError, match=r"loss_mask must be \[.*\], got shape \(4,\)"):
        common.build_anchor_candidate_mask(4, mask[0])


def test_a_head_refuses_features_of_another_width():
    head = common.AcceptRatePredictor(4)
    with pytest.raises(ValueError, match=r"(?s)(?=.*4)(?=.*5)"):
        head(torch.zeros(2, 5))
    with pytest.raises(TypeError):
        head([1.0, 2.0, 3.0, 4.0])


@settings(max_examples=200)
@given(
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.floats(),
        st.text(max_size=3),
        st.integers(max_value=0),
        st.complex_numbers(),
        st.lists(st.integers(), max_size=2),
    )
)
def test_nothing_but_a_positive_integer_counts(value):
    kind = ValueError if type(value) is int else TypeError
    with pytest.raises(kind):
        common.sample_anchor_positions(4, torch.ones(1, 4), value, "cpu")
    with pytest.raises(kind):
        common.create_position_ids(torch.zeros(1, 2, dtype=torch.long), value)


@settings(max_examples=200)
@given(
    ids=st.lists(st.integers(-3, 9), max_size=6),
    num_layers=st.integers(1, 8),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layer_ids_pass_exactly_when_they_ascend_within_range(ids, num_layers):
    ascending = all(a < b for a, b in zip(ids, ids[1:], strict=False))
    if ids and ascending and all(-1 <= i < num_layers for i in ids):
        assert common.validate_target_layer_ids(ids, num_layers) == ids
    else:
        with pytest.raises(ValueError):
            common.validate_target_layer_ids(ids, num_layers)
