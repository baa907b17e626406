"""What a drafter's training forward promises beside its numbers, which `test_parity` checks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dspark_lab.common import sample_anchor_positions
from dspark_lab.decoding import decode
from dspark_lab.model import (
    MARKOV_HEADS,
    Drafter,
    DrafterConfig,
    MarkovHead,
    build_markov_head,
    load_drafter,
    save_drafter,
)
from dspark_lab.model.layers import rope
from dspark_lab.tuning import Shape, training_cost, training_memory
from tests import oracle
from tests.samples import slots_of, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
SIZES |= {"vocab_size": 23, "hidden_size": 12, "intermediate_size": 16, "markov_rank": 3}
CONFIG = DrafterConfig(
    **SIZES, target_layer_ids=(0, 3), block_size=4, mask_token_id=22, num_anchors=5
)
HEADS = ["vanilla", "gated", "rnn"]


def drafter(dtype: torch.dtype = torch.float64, **changes) -> Drafter:
    """Random in every parameter: a fresh drafter's Markov bias and confidence are zero."""
    torch.manual_seed(0)
    model = Drafter(replace(CONFIG, **changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith(("norm.weight", "layernorm.weight"))
            parameter.copy_(norm + 0.5 * torch.randn(parameter.shape))
    return model


def row(seq_len: int, dtype: torch.dtype = torch.float64, batch: int = 1, seed: int = 1) -> dict:
    """Tokens, features and the target's last states, all supervised. No mask token occurs."""
    torch.manual_seed(seed)
    return {
        "input_ids": torch.randint(CONFIG.mask_token_id, (batch, seq_len)),
        "target_hidden_states": torch.randn(batch, seq_len, CONFIG.context_size, dtype=dtype),
        "loss_mask": torch.ones(batch, seq_len, dtype=torch.bool),
        "target_last_hidden_states": torch.randn(batch, seq_len, CONFIG.hidden_size, dtype=dtype),
    }


def blocks(*anchors: int, dummies: int = 0) -> dict[str, Tensor]:
    return {
        "anchor_positions": torch.tensor([[*anchors, *[0] * dummies]]),
        "block_keep_mask": torch.tensor([[True] * len(anchors) + [False] * dummies]),
    }


def packing(*lengths: int, seq_len: int) -> dict[str, Tensor]:
    remaining, positions = oracle.packed_rows([list(lengths)], seq_len)
    return {
        "doc_remaining": torch.tensor(remaining),
        "position_ids": torch.tensor(positions),
        "seq_lens": torch.tensor([lengths]),
    }


def assert_same(got, expected, **tolerance) -> None:
    """Two outputs agree in every field, bit by bit unless a tolerance is given."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, name), value, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["none", *HEADS])
def test_the_output_is_complete(head, dtype):
    model = drafter(dtype, markov_head_type=head, confidence_head_with_markov=head != "none")
    output = model(**row(9, dtype, batch=2))
    assert output.draft_logits.shape == output.aligned_target_logits.shape == (2, 5, 4, 23)
    assert output.target_ids.dtype == torch.long
    numbers = (output.draft_logits, output.aligned_target_logits, output.confidence_pred)
    assert all(value.dtype == dtype and value.isfinite().all() for value in numbers)


def test_a_row_without_candidates_has_dummy_blocks_alone():
    given = row(9)
    given["loss_mask"][:] = False
    output = drafter()(**given)
    assert not output.block_keep_mask.any() and not output.eval_mask.any()
    assert output.draft_logits.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_embedding_and_head_are_the_targets_own_and_frozen(head):
    model = drafter(torch.float32, markov_head_type=head)
    target = torch.nn.Embedding(23, 12), torch.nn.Linear(12, 23, bias=False)
    model.use_target_embeddings(target[0].weight, target[1].weight)
    assert model.embed_tokens.weight.data_ptr() == target[0].weight.data_ptr()
    assert model.lm_head.weight.data_ptr() == target[1].weight.data_ptr()
    output = model(**row(9, torch.float32))
    (output.draft_logits.square().sum() + output.confidence_pred.sum()).backward()
    for module in (model.embed_tokens, model.lm_head, *target):
        assert module.weight.grad is None
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"embed_tokens.weight", "lm_head.weight"}
    for name, parameter in model.named_parameters():
        assert name in frozen or parameter.grad.abs().max() > 0, name


def test_a_seed_draws_the_anchors_of_sample_anchor_positions():
    model, given = drafter(), row(20, batch=3)
    given["loss_mask"] = torch.rand(3, 20) < 0.7
    for seed in range(3):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        drawn = model(**given, generator=generators[0])
        torch.manual_seed(seed)
        assert_same(model(**given), drawn)
        anchors, keep = sample_anchor_positions(
            20, given["loss_mask"], 5, "cpu", generator=generators[1]
        )
        assert_same(drawn, model(**given, anchor_positions=anchors, block_keep_mask=keep))


@pytest.mark.parametrize(("dtype", "first"), [(torch.bfloat16, 30000), (torch.float16, 3000)])
def test_rope_is_computed_in_fp32_at_every_dtype(dtype, first):
    """Queries and keys far into a document are the exact rotation, rounded once.

    In half precision itself, the angles would be off by whole turns, and a rotation by rounded
    sines would err about twice as much. fp16 rounds finely enough to tell the angles of fp32 from
    exact ones further out.
    """
    theta, size, normed = 1e6, 32, []
    model = drafter(dtype, num_hidden_layers=1, head_dim=size, rope_theta=theta)
    layer, positions = model.layers[0].self_attn, torch.arange(first, first + 40)
    for norm in (layer.q_norm, layer.k_norm):
        norm.register_forward_hook(lambda module, args, output: normed.append(output.double()))
    x, angles = torch.randn(1, 40, 12).to(dtype), rope(positions[None], model.config, dtype)
    rotated = layer.queries(x, angles), layer.keys_values(x, angles)[0]

    i = torch.arange(size // 2, dtype=torch.float64)
    angle = positions.unsqueeze(-1) * theta ** (-2 * i / size)
    cos, sin = angle.cos(), angle.sin()
    for turned, before in zip(rotated, normed, strict=True):
        low, high = before.chunk(2, -1)
        exact = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        error = (turned.double() - exact).square().mean().sqrt()
        rounding = (exact.to(dtype).double() - exact).square().mean().sqrt()
        assert turned.dtype == dtype and error < 1.25 * rounding


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        ("blockwise", "eager"),
        ("dense", "eager"),
        pytest.param("auto", "inductor", marks=pytest.mark.slow),
    ],
)
def test_forward_and_backward_are_one_graph(backend, compiler, request):
    if compiler == "inductor":
        request.getfixturevalue("cpp_compiler")
    torch.compiler.reset()
    model = drafter(num_hidden_layers=1, markov_head_type="rnn", block_size=2)
    given = row(9) | blocks(2, 5, dummies=1) | packing(6, 3, seq_len=9) | {"backend": backend}
    gradients, outputs = [], []
    for function in (torch.compile(model, fullgraph=True, backend=compiler), model):
        outputs.append(function(**given))
        loss = outputs[-1].draft_logits.square().sum()
        loss = loss + outputs[-1].confidence_pred.square().sum()
        trained = [value for value in model.parameters() if value.requires_grad]
        gradients.append(torch.autograd.grad(loss, trained))
    assert_same(*outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "changes",
    [
        {"target_hidden_size": 7, "attention_bias": True, "rope_theta": 5e4, "rms_norm_eps": 1e-5},
        {"markov_rank": 0, "markov_head_type": "none", "enable_confidence_head": False},
        {"max_position_embeddings": 99, "initializer_range": 0.1, "num_target_layers": 6},
    ],
    ids=", ".join,
)
def test_a_config_comes_back_from_its_dictionary(changes):
    config = replace(CONFIG, **changes)
    assert DrafterConfig.from_dict(config.to_dict()) == config


class HalfHead(MarkovHead):
    """A new kind: half of the embedding, plus a projection of the slot's hidden state."""

    def __init__(self, vocab_size, rank, hidden_size):
        super().__init__(vocab_size, rank, hidden_size)
        self.half_proj = torch.nn.Linear(hidden_size, rank)

    def step(self, state, embedding, hidden):
        return None, 0.5 * embedding.to(hidden.dtype) + self.half_proj(hidden)


def test_a_new_markov_head_is_one_class_and_its_name(monkeypatch, tmp_path):
    """Drafter, checkpoint, decoding, cost and memory follow."""
    monkeypatch.setitem(MARKOV_HEADS, "half", HalfHead)
    model = tiny_drafter(markov_head_type="half")
    torch.nn.init.normal_(model.markov_head.markov_w2.weight)
    save_drafter(model, tmp_path / "half")
    target = tiny_target(max_position_embeddings=64)
    loaded = load_drafter(tmp_path / "half", target=target)
    assert isinstance(loaded.markov_head, HalfHead)
    plain = decode(target, None, [[1, 2, 3]], max_new_tokens=9)
    assert decode(target, loaded, [[1, 2, 3]], max_new_tokens=9).tokens == plain.tokens

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.sizes.trained_parameters == trained
    assert model.sizes.latent_weights == model.markov_head.half_proj.weight.numel() == 32 * 8
    vanilla, half = (
        Shape.of(tiny_drafter(markov_head_type=kind).config) for kind in ("vanilla", "half")
    )
    step = {"seq_len": 20, "num_anchors": 4, "features": "cached"}
    operations = [
        cost.set_index("part").loc["heads", "forward"]
        for cost in (training_cost(vanilla, **step), training_cost(half, **step))
    ]
    assert operations[1] - operations[0] == 2 * 4 * 3 * 32 * 8
    assert training_memory(half, **step) > training_memory(vanilla, **step)


@pytest.mark.parametrize("kind", ["none", "vanilla"])
def test_rank_zero_or_none_builds_no_head(kind):
    rank = 0 if kind == "vanilla" else 3
    assert build_markov_head(kind, 23, rank, 12) is None
    config = replace(
        CONFIG, markov_head_type=kind, markov_rank=rank, confidence_head_with_markov=False
    )
    assert (config.markov_head_type, config.markov_rank) == ("none", 0)


def test_a_fresh_drafter_adds_no_bias_and_gives_even_odds():
    """Markov bias and confidence logit begin at zero, whatever the head."""
    for head in HEADS:
        model, given = Drafter(replace(CONFIG, markov_head_type=head)), row(9, torch.float32)
        slots, output = slots_of(model, **given | blocks(2, 5)), model(**given | blocks(2, 5))
        assert torch.equal(output.draft_logits, model.lm_head(slots.hidden))
        assert not output.confidence_pred.any()
        assert output.draft_logits.detach().std() > 0
