"""Facts about `dspark_lab.common`, each one small enough to check by hand."""

import dataclasses
import inspect
import warnings

import pytest
import torch
from torch import nn

from dspark_lab import common
from tests import oracle

pytestmark = pytest.mark.usefixtures("one_thread")

FUNCTIONS = {
    "build_anchor_candidate_mask": ["seq_len", "loss_mask", "doc_remaining"],
    "sample_anchor_positions": [
        "seq_len",
        "loss_mask",
        "num_anchors",
        "device",
        "doc_remaining",
        "generator",
    ],
    "build_eval_mask": [
        "seq_len",
        "loss_mask",
        "label_indices",
        "safe_label_indices",
        "block_keep_mask",
        "doc_remaining",
        "anchor_positions",
    ],
    "create_position_ids": ["anchor_positions", "block_size", "context_position_ids"],
    "create_noise_embed": [
        "embed_tokens",
        "input_ids",
        "anchor_positions",
        "block_keep_mask",
        "mask_token_id",
        "block_size",
    ],
    "extract_context_feature": ["hidden_states", "layer_ids"],
    "validate_target_layer_ids": ["layer_ids", "num_target_layers"],
    "context_doc_ids": ["seq_lens", "seq_len", "device"],
    "pin_rope_inv_freq_fp32": ["rotary_emb"],
}
OPTIONAL = {"doc_remaining", "generator", "anchor_positions", "context_position_ids"}
FLOATS = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
INTEGERS = [
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]


def eval_mask(loss_mask, anchors, keep, block_size, **packed):
    """build_eval_mask with the labels that belong to these anchors."""
    seq_len = loss_mask.shape[1]
    label = anchors[:, :, None] + 1 + torch.arange(block_size, device=anchors.device)
    safe = label.clamp(max=seq_len - 1).clamp(min=0) * keep[:, :, None]
    if packed:
        packed["anchor_positions"] = anchors
    return common.build_eval_mask(seq_len, loss_mask, label, safe, keep, **packed)


# The names


def test_the_eleven_public_names_are_all_there_and_nothing_else():
    expected = {*FUNCTIONS, "AcceptRatePredictor", "DSparkForwardOutput"}
    assert len(common.__all__) == len(set(common.__all__)) == 11
    assert set(common.__all__) == expected
    assert all(hasattr(common, name) for name in expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_taken_by_position_and_by_keyword(name):
    parameters = list(inspect.signature(getattr(common, name)).parameters.values())
    assert [p.name for p in parameters] == FUNCTIONS[name]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
    optional = OPTIONAL - ({"anchor_positions"} if name != "build_eval_mask" else set())
    assert required == set(FUNCTIONS[name]) - optional


def test_positions_and_keywords_give_the_same_result(device):
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1]], device=device)
    remaining = torch.tensor([[3, 2, 1, 0, 1, 0], [5, 4, 3, 2, 1, 0]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]], device=device)
    anchors = torch.tensor([[0, 4], [2, 0]], device=device)
    keep = torch.tensor([[True, True], [True, False]], device=device)
    label = anchors[:, :, None] + 1 + torch.arange(2, device=device)
    embed = nn.Embedding(9, 4, device=device)
    hidden = tuple(torch.randn(2, 6, 3, device=device) for _ in range(4))
    calls = {
        "build_anchor_candidate_mask": (6, mask, remaining),
        "build_eval_mask": (6, mask, label, label.clamp(max=5), keep, remaining, anchors),
        "create_position_ids": (anchors, 2, positions),
        "create_noise_embed": (embed, mask.long(), anchors, keep, 8, 2),
        "extract_context_feature": (hidden, [0, 2]),
        "validate_target_layer_ids": ([0, 2], 5),
        "context_doc_ids": (torch.tensor([[4, 2], [6, 0]], device=device), 6, device),
    }
    for name, values in calls.items():
        function = getattr(common, name)
        by_keyword = function(**dict(zip(FUNCTIONS[name], values, strict=True)))
        by_position = function(*values)
        if name == "validate_target_layer_ids":
            assert by_position == by_keyword
        else:
            assert torch.equal(by_position, by_keyword), name
            assert by_position.device.type == device.type, name

    generator = torch.Generator(device)
    values = (6, mask, 2, device, remaining, generator)
    by_position = common.sample_anchor_positions(*values[:5], generator.manual_seed(1))
    generator.manual_seed(1)
    names = FUNCTIONS["sample_anchor_positions"]
    by_keyword = common.sample_anchor_positions(**dict(zip(names, values, strict=True)))
    assert torch.equal(by_position[0], by_keyword[0])
    assert torch.equal(by_position[1], by_keyword[1])


def test_no_function_changes_its_arguments(device):
    mask = torch.tensor([[1.0, 0.7, 0.2, 1.0, 1.0]], device=device)
    remaining = torch.tensor([[2, 1, 0, 1, 0]], device=device)
    anchors = torch.tensor([[3, 0]], device=device)
    keep = torch.tensor([[True, False]], device=device)
    label = anchors[:, :, None] + 1 + torch.arange(2, device=device)
    lens = torch.tensor([[3, 2]], device=device)
    inputs = [mask, remaining, anchors, keep, label, lens]
    before = [t.clone() for t in inputs]
    common.build_anchor_candidate_mask(5, mask, remaining)
    common.sample_anchor_positions(5, mask, 2, device, remaining)
    common.build_eval_mask(5, mask, label, label.clamp(max=4), keep, remaining, anchors)
    common.create_position_ids(anchors, 2, remaining)
    common.create_noise_embed(nn.Embedding(5, 2, device=device), remaining, anchors, keep, 4, 2)
    common.context_doc_ids(lens, 5, device)
    assert all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))


# Which tokens are supervised


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS], ids=str)
def test_every_loss_mask_dtype_means_the_same(dtype, device):
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).to(dtype).to(device)
    got = common.build_anchor_candidate_mask(6, mask)
    assert got.dtype == torch.bool
    assert got.tolist() == [[True, False, False, True, True]]
    anchors, keep = common.sample_anchor_positions(6, mask, 4, device)
    assert anchors.tolist() == [[0, 3, 4, 0]]
    assert keep.tolist() == [[True, True, True, False]]
    assert eval_mask(mask, anchors, keep, 2).tolist() == [
        [[True, False], [True, True], [True, False], [False, False]]
    ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exactly_one_half_is_not_supervised_and_the_next_float_is(dtype, device):
    half = torch.tensor([0.5]).to(dtype)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[half.itemsize]
    above, below = (half.view(bits) + 1).view(dtype), (half.view(bits) - 1).view(dtype)
    one = torch.ones(1).to(dtype)
    for value, expected in [(half, False), (above, True), (below, False), (one, True)]:
        row = torch.cat([one.view(bits), value.view(bits), one.view(bits)]).view(dtype)
        row = row[None].to(device)
        assert common.build_anchor_candidate_mask(3, row).tolist() == [[expected, expected]]
        anchors, keep = common.sample_anchor_positions(3, row, 1, device)
        assert keep.tolist() == [[expected]]
        start = torch.zeros(1, 1, dtype=torch.long, device=device)
        kept = torch.ones(1, 1, dtype=torch.bool, device=device)
        assert eval_mask(row, start, kept, 1).tolist() == [[[expected]]]


def test_nan_and_minus_one_are_not_supervised_and_infinity_is(device):
    row = torch.tensor([[1.0, float("nan"), 1.0, -1.0, 1.0, float("inf")]], device=device)
    got = common.build_anchor_candidate_mask(6, row)
    assert got.tolist() == [[False, False, False, False, True]]


def test_the_largest_integers_are_supervised_and_the_smallest_are_not(device):
    info = torch.iinfo(torch.int64)
    row = torch.tensor([[info.max, info.max, info.min, info.max]], device=device)
    assert common.build_anchor_candidate_mask(4, row).tolist() == [[True, False, False]]


# Candidates


def test_anchor_needs_two_supervised_tokens(device):
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 0, 1]], device=device)
    got = common.build_anchor_candidate_mask(8, mask)
    assert got.tolist() == [[False, True, True, False, False, False, False]]


def test_the_last_token_is_never_a_candidate(device):
    mask = torch.ones(2, 5, device=device)
    assert common.build_anchor_candidate_mask(5, mask).shape == (2, 4)


@pytest.mark.parametrize("seq_len", [0, 1])
def test_a_row_shorter_than_two_has_no_candidates(seq_len, device):
    mask = torch.ones(3, seq_len, dtype=torch.bool, device=device)
    got = common.build_anchor_candidate_mask(seq_len, mask)
    assert got.shape == (3, 0)
    assert got.dtype == torch.bool


def test_the_last_token_of_a_document_is_not_a_candidate(device):
    mask = torch.ones(1, 6, device=device)
    remaining = torch.tensor([[2, 1, 0, 1, 0, 0]], device=device)
    got = common.build_anchor_candidate_mask(6, mask, remaining)
    assert got.tolist() == [[True, True, False, True, False]]


# The sampler


def test_kept_anchors_come_first_and_ascend(device):
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1, 1]], device=device)
    anchors, keep = common.sample_anchor_positions(10, mask, 6, device)
    assert anchors.tolist() == [[0, 3, 4, 8, 0, 0]]
    assert keep.tolist() == [[True, True, True, True, False, False]]
    assert anchors.dtype == torch.long
    assert keep.dtype == torch.bool


def test_more_anchors_than_positions_are_dummies(device):
    anchors, keep = common.sample_anchor_positions(3, torch.ones(1, 3, device=device), 5, device)
    assert anchors.tolist() == [[0, 1, 0, 0, 0]]
    assert keep.tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("seq_len", [0, 1, 2, 7])
def test_a_row_without_candidates_gives_only_dummies(seq_len, device):
    mask = torch.zeros(2, seq_len, device=device)
    anchors, keep = common.sample_anchor_positions(seq_len, mask, 3, device)
    assert anchors.tolist() == [[0, 0, 0]] * 2
    assert keep.tolist() == [[False] * 3] * 2


def test_rows_with_different_candidates_do_not_mix(device):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], device=device)
    anchors, keep = common.sample_anchor_positions(4, mask, 2, device)
    assert anchors.tolist() == [[0, 0], [0, 0], [2, 0]]
    assert keep.tolist() == [[True, False], [False, False], [True, False]]


def test_the_device_may_be_given_as_a_string():
    anchors, _ = common.sample_anchor_positions(3, torch.ones(1, 3), 1, "cpu")
    assert anchors.device.type == "cpu"
    assert common.context_doc_ids(torch.tensor([[1, 2]]), 3, "cpu").tolist() == [[0, 1, 1]]


# Supervision


def test_a_block_stops_at_the_first_unsupervised_token(device):
    mask = torch.tensor([[1, 1, 1, 0, 1, 1]], device=device)
    anchors = torch.tensor([[0, 3]], device=device)
    keep = torch.tensor([[True, True]], device=device)
    assert eval_mask(mask, anchors, keep, 4).tolist() == [
        [[True, True, False, False], [True, True, False, False]]
    ]


def test_a_block_stops_at_the_end_of_the_row(device):
    mask = torch.ones(1, 4, device=device)
    anchors = torch.tensor([[2, 3]], device=device)
    keep = torch.tensor([[True, True]], device=device)
    assert eval_mask(mask, anchors, keep, 3).tolist() == [
        [[True, False, False], [False, False, False]]
    ]


def test_a_dropped_block_has_no_supervision(device):
    mask = torch.ones(1, 6, device=device)
    anchors = torch.tensor([[1, 2]], device=device)
    keep = torch.tensor([[False, True]], device=device)
    assert eval_mask(mask, anchors, keep, 2).tolist() == [[[False, False], [True, True]]]


def test_a_block_stops_at_the_end_of_its_document(device):
    mask = torch.ones(1, 6, device=device)
    remaining = torch.tensor([[3, 2, 1, 0, 1, 0]], device=device)
    anchors = torch.tensor([[1, 3, 4]], device=device)
    keep = torch.ones(1, 3, dtype=torch.bool, device=device)
    got = eval_mask(mask, anchors, keep, 3, doc_remaining=remaining)
    assert got.tolist() == [[[True, True, False], [False, False, False], [True, False, False]]]


# Positions, noise, features


def test_positions_run_on_from_the_anchor(device):
    anchors = torch.tensor([[4, 9], [0, 0]], device=device)
    got = common.create_position_ids(anchors, 3)
    assert got.dtype == torch.long
    assert got.tolist() == [[4, 5, 6, 9, 10, 11], [0, 1, 2, 0, 1, 2]]


def test_positions_restart_in_each_document(device):
    anchors = torch.tensor([[1, 4]], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    assert common.create_position_ids(anchors, 2, positions).tolist() == [[1, 2, 1, 2]]


def test_positions_of_an_empty_packed_row_are_those_of_its_dummies(device):
    anchors = torch.zeros(2, 2, dtype=torch.long, device=device)
    positions = torch.zeros(2, 0, dtype=torch.long, device=device)
    assert common.create_position_ids(anchors, 3, positions).tolist() == [[0, 1, 2, 0, 1, 2]] * 2


def test_only_slot_zero_of_a_kept_block_carries_its_anchor(device):
    embed = nn.Embedding(10, 3, device=device)
    input_ids = torch.tensor([[5, 6, 7], [1, 2, 3]], device=device)
    anchors = torch.tensor([[2, 0], [1, 2]], device=device)
    keep = torch.tensor([[True, False], [True, True]], device=device)
    got = common.create_noise_embed(embed, input_ids, anchors, keep, 9, 2)
    expected = embed(torch.tensor([[7, 9, 9, 9], [2, 9, 3, 9]], device=device))
    assert torch.equal(got, expected)


def test_noise_for_an_empty_row_is_all_mask_tokens(device):
    embed = nn.Embedding(4, 2, device=device)
    input_ids = torch.zeros(2, 0, dtype=torch.long, device=device)
    anchors = torch.zeros(2, 3, dtype=torch.long, device=device)
    got = common.create_noise_embed(embed, input_ids, anchors, anchors.bool(), 3, 2)
    assert torch.equal(got, embed.weight[3].expand(2, 6, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_noise_has_the_dtype_of_the_embedding(dtype, device):
    embed = nn.Embedding(4, 2, device=device, dtype=dtype)
    ids = torch.zeros(1, 3, dtype=torch.long, device=device)
    got = common.create_noise_embed(embed, ids, ids[:, :2], ids[:, :2].bool(), 3, 2)
    assert got.dtype == dtype


def test_noise_goes_through_the_forward_of_the_embedding(device):
    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 3

    embed = Scaled(4, 2, device=device)
    ids = torch.tensor([[1, 2]], device=device)
    keep = torch.ones(1, 1, dtype=torch.bool, device=device)
    got = common.create_noise_embed(embed, ids, ids[:, :1], keep, 0, 2)
    assert torch.equal(got, 3 * embed.weight[torch.tensor([[2, 0]], device=device)])


def test_context_features_count_from_the_embedding_output(device):
    hidden = [torch.full((1, 2, 2), float(i), device=device) for i in range(4)]
    got = common.extract_context_feature(hidden, [-1, 0, 2])
    assert got.tolist() == [[[0.0, 0.0, 1.0, 1.0, 3.0, 3.0]] * 2]
    assert common.extract_context_feature(tuple(hidden), [1]).tolist() == [[[2.0, 2.0]] * 2]


def test_context_features_keep_dtype_and_gradient(device):
    hidden = [torch.randn(1, 2, 3, device=device, dtype=torch.bfloat16) for _ in range(3)]
    hidden[2].requires_grad_()
    got = common.extract_context_feature(hidden, [0, 1])
    assert got.dtype == torch.bfloat16
    assert got.shape == (1, 2, 6)
    got.sum().backward()
    assert torch.equal(hidden[2].grad, torch.ones_like(hidden[2]))


# Layer ids


def test_good_layer_ids_come_back_as_a_new_list_without_warning():
    given = (0, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = common.validate_target_layer_ids(given, 8)
    assert got == [0, 3, 5]
    assert type(got) is list
    ids = [1, 2]
    assert common.validate_target_layer_ids(ids, 8) is not ids


@pytest.mark.parametrize("ids", [[-1, 2], [2, 7], [-1], [7], [-1, 7]])
def test_the_embedding_and_the_last_layer_warn_but_pass(ids):
    with pytest.warns(UserWarning) as caught:
        assert common.validate_target_layer_ids(ids, 8) == ids
    text = " ".join(str(w.message) for w in caught)
    assert all(str(i) in text for i in ids if i in (-1, 7))


# Packing


def test_a_position_belongs_to_the_document_whose_end_lies_ahead(device):
    lens = torch.tensor([[3, 2, 1], [6, 0, 0], [1, 1, 4]], device=device)
    got = common.context_doc_ids(lens, 6, device)
    assert got.dtype == torch.long
    assert got.tolist() == [[0, 0, 0, 1, 1, 2], [0] * 6, [0, 1, 2, 2, 2, 2]]


def test_empty_entries_at_the_end_do_not_split_the_tail(device):
    lens = torch.tensor([[3, 2, 0, 0]], device=device)
    got = common.context_doc_ids(lens, 8, device)
    assert got.tolist() == [[0, 0, 0, 1, 1, 4, 4, 4]]


def test_packing_facts_agree_with_each_other(device):
    lens = [[3, 2], [5, 0]]
    remaining, positions = oracle.packed_rows(lens, 6)
    assert remaining == [[2, 1, 0, 1, 0, 0], [4, 3, 2, 1, 0, 0]]
    assert positions == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]]
    got = common.context_doc_ids(torch.tensor(lens, device=device), 6, device)
    assert got.tolist() == oracle.doc_ids(lens, 6) == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 2]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_document_lengths_may_be_any_integer(dtype, device):
    lens = torch.tensor([[1, 2]], dtype=dtype, device=device)
    got = common.context_doc_ids(lens, 4, device)
    assert got.dtype == torch.long
    assert got.tolist() == [[0, 1, 1, 2]]


def test_an_empty_row_has_no_documents(device):
    lens = torch.zeros(2, 3, dtype=torch.long, device=device)
    assert common.context_doc_ids(lens, 0, device).shape == (2, 0)


# RoPE


def rotary(kind: str) -> nn.Module:
    """A rotary module of transformers: one frequency buffer and its original, or one of each layer
    type."""
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


# The two classes


def test_forward_output_holds_six_fields_two_of_them_optional():
    fields = dataclasses.fields(common.DSparkForwardOutput)
    assert [field.name for field in fields] == [
        "draft_logits",
        "target_ids",
        "eval_mask",
        "block_keep_mask",
        "confidence_pred",
        "aligned_target_logits",
    ]
    logits, ids = torch.zeros(1, 2, 3, 9), torch.zeros(1, 2, 3, dtype=torch.long)
    output = common.DSparkForwardOutput(logits, ids, ids.bool(), ids[..., 0].bool())
    assert output.draft_logits is logits
    assert output.target_ids is ids
    assert output.confidence_pred is None
    assert output.aligned_target_logits is None


def test_accept_rate_is_one_linear_map_and_stays_a_logit(device):
    head = common.AcceptRatePredictor(3).to(device)
    assert isinstance(head.proj, nn.Linear)
    assert set(head.state_dict()) == {"proj.weight", "proj.bias"}
    with torch.no_grad():
        head.proj.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        head.proj.bias.fill_(10.0)
    features = torch.tensor([[[2.0, 1.0, 4.0], [0.0, 10.0, 0.0]]], device=device)
    got = head(features)
    assert got.tolist() == [[12.0, -10.0]]
    assert got.device.type == device.type
    assert head(features=features[0, 0]).tolist() == 12.0
