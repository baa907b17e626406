"""Facts about `dspark_lab.common`, each one small enough to check by hand."""

import inspect
import math
import warnings

import pytest
import torch
from torch import nn

from dspark_lab import common
from tests import oracle
from tests.draws import label_positions

pytestmark = pytest.mark.usefixtures("one_thread")

CALLS = {
    "build_anchor_candidate_mask": "seq_len loss_mask doc_remaining",
    "sample_anchor_positions": "seq_len loss_mask num_anchors device doc_remaining generator",
    "build_eval_mask": (
        "seq_len loss_mask label_indices safe_label_indices block_keep_mask doc_remaining "
        "anchor_positions"
    ),
    "create_position_ids": "anchor_positions block_size context_position_ids",
    "create_noise_embed": (
        "embed_tokens input_ids anchor_positions block_keep_mask mask_token_id block_size"
    ),
    "extract_context_feature": "hidden_states layer_ids",
    "validate_target_layer_ids": "layer_ids num_target_layers",
    "context_doc_ids": "seq_lens seq_len device",
    "pin_rope_inv_freq_fp32": "rotary_emb",
    "AcceptRatePredictor": "input_dim",
    "DSparkForwardOutput": (
        "draft_logits target_ids eval_mask block_keep_mask confidence_pred aligned_target_logits"
    ),
}
OPTIONAL = {"doc_remaining", "generator", "anchor_positions", "context_position_ids"}
OPTIONAL |= {"confidence_pred", "aligned_target_logits"}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOATS += [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
INTEGERS += [torch.int8, torch.int16, torch.int32, torch.int64]


def eval_mask(loss_mask, anchors, keep, block_size, **packed):
    """build_eval_mask with the labels that belong to these anchors."""
    seq_len = loss_mask.shape[1]
    labels = label_positions(anchors, keep, block_size, seq_len)
    if packed:
        packed["anchor_positions"] = anchors
    return common.build_eval_mask(seq_len, loss_mask, *labels, keep, **packed)


# The names


def test_the_eleven_public_names_are_all_there_and_nothing_else():
    assert sorted(common.__all__) == sorted(CALLS) and len(CALLS) == 11


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_taken_by_position_and_by_keyword(name):
    parameters = list(inspect.signature(getattr(common, name)).parameters.values())
    names = CALLS[name].split()
    assert [p.name for p in parameters] == names
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
    optional = OPTIONAL - ({"anchor_positions"} if name != "build_eval_mask" else set())
    assert required == set(names) - optional
    assert all(p.default is None for p in parameters if p.name not in required)


# Which tokens are supervised


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS], ids=str)
def test_every_loss_mask_dtype_means_the_same(dtype):
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).to(dtype)
    got = common.build_anchor_candidate_mask(6, mask)
    assert got.dtype == torch.bool
    assert got.tolist() == [[True, False, False, True, True]]
    anchors, keep = common.sample_anchor_positions(6, mask, 4, "cpu")
    assert anchors.tolist() == [[0, 3, 4, 0]]
    assert keep.tolist() == [[True, True, True, False]]
    assert eval_mask(mask, anchors, keep, 2).tolist() == [
        [[True, False], [True, True], [True, False], [False, False]]
    ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exactly_one_half_is_not_supervised_and_the_next_float_is(dtype):
    half = torch.tensor([0.5]).to(dtype)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[half.itemsize]
    above, below = (half.view(bits) + 1).view(dtype), (half.view(bits) - 1).view(dtype)
    one = torch.ones(1).to(dtype)
    for value, expected in [(half, False), (above, True), (below, False), (one, True)]:
        row = torch.cat([one.view(bits), value.view(bits), one.view(bits)]).view(dtype)
        got = common.build_anchor_candidate_mask(3, row[None])
        assert got.tolist() == [[expected, expected]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([math.inf, 1.0, math.nan, 1.0, -1.0, 1.0], [True, False, False, False, False]),
        ([2**63 - 1, 2**63 - 1, -(2**63), 1], [True, False, False]),
    ],
)
def test_the_largest_values_are_supervised_and_nan_and_the_smallest_are_not(values, expected):
    row = torch.tensor([values])
    assert common.build_anchor_candidate_mask(len(values), row).tolist() == [expected]


# Candidates


@pytest.mark.parametrize(
    ("loss_mask", "doc_remaining", "expected"),
    [
        ([0, 1, 1, 1, 0, 1, 0, 1], None, [False, True, True, False, False, False, False]),
        # The last token is never a candidate, nor is the last one of a document.
        ([1, 1, 1], None, [True, True]),
        ([1, 1, 1, 1, 1, 1], [2, 1, 0, 1, 0, 0], [True, True, False, True, False]),
        ([1], None, []),
        ([], None, []),
    ],
)
def test_anchor_needs_two_supervised_tokens_of_one_document(loss_mask, doc_remaining, expected):
    mask = torch.tensor([loss_mask])
    remaining = None if doc_remaining is None else torch.tensor([doc_remaining])
    got = common.build_anchor_candidate_mask(len(loss_mask), mask, remaining)
    assert got.dtype == torch.bool and got.tolist() == [expected]


# The sampler


@pytest.mark.parametrize(
    ("loss_mask", "num_anchors", "expected"),
    [
        # Kept anchors come first and ascend; dummies follow.
        ([1, 1, 0, 1, 1, 1, 0, 0, 1, 1], 6, [0, 3, 4, 8]),
        ([1, 1, 1], 5, [0, 1]),
        ([0, 0, 1, 1], 2, [2]),
        ([0, 0, 0, 0, 0, 0, 0], 3, []),
        ([1, 0], 3, []),
        ([1], 3, []),
        ([], 3, []),
    ],
)
def test_all_candidates_become_anchors_where_they_are_few(loss_mask, num_anchors, expected):
    mask = torch.tensor([loss_mask, [0] * len(loss_mask)])
    anchors, keep = common.sample_anchor_positions(len(loss_mask), mask, num_anchors, "cpu")
    dummies = num_anchors - len(expected)
    assert anchors.dtype == torch.long and keep.dtype == torch.bool
    assert anchors.tolist() == [expected + [0] * dummies, [0] * num_anchors]
    assert keep.tolist() == [[True] * len(expected) + [False] * dummies, [False] * num_anchors]


# Supervision


@pytest.mark.parametrize(
    ("stops_at", "loss_mask", "doc_remaining", "anchors", "keep", "expected"),
    [
        ("an unsupervised token", [1, 1, 1, 0, 1, 1], None, [0, 3], [1, 1], ["110", "110"]),
        ("the end of the row", [1, 1, 1, 1], None, [2, 3], [1, 1], ["100", "000"]),
        ("a dropped block", [1, 1, 1, 1, 1, 1], None, [1, 2], [0, 1], ["000", "111"]),
        (
            "the end of its document",
            *([1, 1, 1, 1, 1, 1], [3, 2, 1, 0, 1, 0]),
            *([1, 3, 4], [1, 1, 1], ["110", "000", "100"]),
        ),
        ("an empty row", [], None, [0], [0], ["000"]),
    ],
)
def test_supervision_stops_at(stops_at, loss_mask, doc_remaining, anchors, keep, expected):
    mask, anchors = (torch.tensor([row]) for row in (loss_mask, anchors))
    packed = {}
    if doc_remaining is not None:
        packed["doc_remaining"] = torch.tensor([doc_remaining])
    got = eval_mask(mask, anchors, torch.tensor([keep]).bool(), 3, **packed)
    assert ["".join(str(int(flag)) for flag in block) for block in got[0].tolist()] == expected


# Positions, noise, features


@pytest.mark.parametrize(
    ("anchors", "positions", "expected"),
    [
        ([4, 9], None, [4, 5, 6, 9, 10, 11]),
        ([1, 4], [0, 1, 2, 0, 1, 2], [1, 2, 3, 1, 2, 3]),
        ([0, 0], [], [0, 1, 2, 0, 1, 2]),
    ],
)
def test_positions_run_on_from_the_anchors_within_its_document(anchors, positions, expected):
    if positions is not None:
        positions = torch.tensor([positions], dtype=torch.long)
    got = common.create_position_ids(torch.tensor([anchors]), 3, positions)
    assert got.dtype == torch.long and got.tolist() == [expected]


def test_noise_for_an_empty_row_is_all_mask_tokens():
    embed = nn.Embedding(4, 2)
    input_ids = torch.zeros(2, 0, dtype=torch.long)
    anchors = torch.zeros(2, 3, dtype=torch.long)
    got = common.create_noise_embed(embed, input_ids, anchors, anchors.bool(), 3, 2)
    assert torch.equal(got, embed.weight[3].expand(2, 6, 2))


def test_noise_goes_through_the_forward_of_the_embedding():
    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 3

    embed = Scaled(4, 2, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 2]])
    keep = torch.ones(1, 1, dtype=torch.bool)
    got = common.create_noise_embed(embed, ids, ids[:, :1], keep, 0, 2)
    assert torch.equal(got, 3 * embed.weight[torch.tensor([[2, 0]])])


def test_context_features_count_from_the_embedding_output():
    hidden = [torch.full((1, 2, 2), float(i)) for i in range(4)]
    got = common.extract_context_feature(hidden, [-1, 0, 2])
    assert got.tolist() == [[[0.0, 0.0, 1.0, 1.0, 3.0, 3.0]] * 2]
    assert common.extract_context_feature(tuple(hidden), [1]).tolist() == [[[2.0, 2.0]] * 2]


def test_context_features_keep_dtype_and_gradient():
    hidden = [torch.randn(1, 2, 3, dtype=torch.bfloat16) for _ in range(3)]
    hidden[2].requires_grad_()
    got = common.extract_context_feature(hidden, [0, 1])
    assert got.dtype == torch.bfloat16
    assert got.shape == (1, 2, 6)
    got.sum().backward()
    assert torch.equal(hidden[2].grad, torch.ones_like(hidden[2]))


# Layer ids


def test_good_layer_ids_come_back_as_a_new_list_without_warning():
    given = [0, 3, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = common.validate_target_layer_ids(given, 8)
    assert got == [0, 3, 5] and got is not given


@pytest.mark.parametrize("ids", [[-1, 2], [2, 7], [-1], [7], [-1, 7]])
def test_the_embedding_and_the_last_layer_warn_but_pass(ids):
    with pytest.warns(UserWarning) as caught:
        assert common.validate_target_layer_ids(ids, 8) == ids
    text = " ".join(str(w.message) for w in caught)
    assert all(str(i) in text for i in ids if i in (-1, 7))


# Packing


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("lengths", "seq_len", "expected"),
    [
        ([3, 2, 1], 6, [0, 0, 0, 1, 1, 2]),
        ([6, 0, 0], 6, [0] * 6),
        # Empty entries at the end do not split the tail.
        ([3, 2, 0, 0], 8, [0, 0, 0, 1, 1, 4, 4, 4]),
        ([0, 0, 0], 0, []),
    ],
)
def test_a_position_belongs_to_the_document_whose_end_lies_ahead(lengths, seq_len, expected, dtype):
    lens = torch.tensor([lengths], dtype=dtype)
    got = common.context_doc_ids(lens, seq_len, "cpu")
    assert got.dtype == torch.long
    assert got.tolist() == [expected] == oracle.doc_ids([lengths], seq_len)


# RoPE


def rotary(kind: str) -> nn.Module:
    """With one frequency buffer and its original, or one of each layer type."""
    if kind == "gemma3":
        from transformers.models.gemma3 import modeling_gemma3 as gemma3

        config = gemma3.Gemma3TextConfig(num_hidden_layers=6, rope_parameters=None)
        return gemma3.Gemma3RotaryEmbedding(config)
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    config = qwen3.Qwen3Config(rope_parameters=scaled if kind == "yarn" else None)
    return qwen3.Qwen3RotaryEmbedding(config)


@pytest.mark.parametrize("kind", ["plain", "yarn", "gemma3"])
def test_frequencies_rounded_to_bf16_become_those_of_a_fresh_module(kind):
    fresh = dict(rotary(kind).named_buffers())
    module = rotary(kind).to(torch.bfloat16)
    assert not any(torch.equal(b.float(), fresh[n]) for n, b in module.named_buffers())
    common.pin_rope_inv_freq_fp32(module)
    cast = dict(module.named_buffers())
    assert cast.keys() == fresh.keys()
    for name, buffer in cast.items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, fresh[name]), name


def test_frequencies_in_fp32_or_on_the_meta_device_stay_as_they_are():
    common.pin_rope_inv_freq_fp32(None)
    module = rotary("plain")
    module.inv_freq.mul_(2)
    before = module.inv_freq
    common.pin_rope_inv_freq_fp32(module)
    assert module.inv_freq is before
    for narrow in (module.to("meta", torch.bfloat16), nn.Linear(2, 2).to(torch.bfloat16)):
        kept = {name: id(tensor) for name, tensor in narrow.named_buffers()}
        common.pin_rope_inv_freq_fp32(narrow)
        assert kept == {name: id(tensor) for name, tensor in narrow.named_buffers()}


def test_rounded_frequencies_without_a_config_are_refused():
    module = nn.Module()
    module.register_buffer("inv_freq", torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="rotary_emb must have a config"):
        common.pin_rope_inv_freq_fp32(module)


# The confidence head


def test_accept_rate_is_one_linear_map_and_stays_a_logit():
    head = common.AcceptRatePredictor(3)
    assert isinstance(head.proj, nn.Linear)
    assert set(head.state_dict()) == {"proj.weight", "proj.bias"}
    with torch.no_grad():
        head.proj.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        head.proj.bias.fill_(10.0)
    features = torch.tensor([[[2.0, 1.0, 4.0], [0.0, 10.0, 0.0]]])
    got = head(features)
    assert got.tolist() == [[12.0, -10.0]]
    assert head(features=features[0, 0]).tolist() == 12.0
