"""What a drafter's training forward promises: who sees what, packed or not, at every dtype."""

from dataclasses import replace

import oracle
import pytest
import torch
from samples import documents, slots_of
from torch import Tensor

from dspark_lab.chats import collate, pack
from dspark_lab.common import sample_anchor_positions
from dspark_lab.model import Drafter, DrafterConfig, accept_rates, build_markov_head, layers

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DrafterConfig(
    vocab_size=23,
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    target_layer_ids=(0, 3),
    block_size=4,
    mask_token_id=22,
    num_anchors=5,
    markov_rank=3,
)
BACKENDS = ["blockwise", "dense"]
HEADS = ["vanilla", "gated", "rnn"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


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


def cut(given: dict, first: int, past: int) -> dict:
    return {name: value[:, first:past] for name, value in given.items()}


def assert_same(got, expected, **tolerance) -> None:
    """Two outputs agree in every field, bit by bit unless a tolerance is given."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, name), value, **tolerance)


def changed(got: Tensor, expected: Tensor) -> list[list[bool]]:
    """Which slots of row 0 hold another vector, [anchor][slot]."""
    return ((got - expected).abs().amax(-1) > 1e-6)[0].tolist()


def test_config_sizes_follow_from_the_fields():
    assert CONFIG.context_size == 24
    assert replace(CONFIG, target_hidden_size=7).context_size == 14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["none", *HEADS])
def test_the_output_is_complete(head, dtype):
    model = drafter(dtype, markov_head_type=head, confidence_head_with_markov=head != "none")
    output = model(**row(9, dtype, batch=2))
    batch, anchors, slots, vocab = 2, 5, 4, 23
    for field, shape, kind in [
        ("draft_logits", (batch, anchors, slots, vocab), dtype),
        ("aligned_target_logits", (batch, anchors, slots, vocab), dtype),
        ("confidence_pred", (batch, anchors, slots), dtype),
        ("target_ids", (batch, anchors, slots), torch.long),
        ("eval_mask", (batch, anchors, slots), torch.bool),
        ("block_keep_mask", (batch, anchors), torch.bool),
    ]:
        value = getattr(output, field)
        assert value.shape == shape and value.dtype == kind, field
        assert value.isfinite().all(), field


def test_without_a_teacher_there_are_no_aligned_logits():
    given = row(9)
    del given["target_last_hidden_states"]
    assert drafter()(**given).aligned_target_logits is None
    assert slots_of(drafter(), **given).target_hidden is None


def test_without_a_confidence_head_there_is_no_confidence():
    assert drafter(enable_confidence_head=False)(**row(9)).confidence_pred is None


def test_without_a_markov_head_there_is_no_latent():
    for changes in ({"markov_rank": 0}, {"markov_head_type": "none"}):
        model = drafter(confidence_head_with_markov=False, **changes)
        assert model.markov_head is None and slots_of(model, **row(9)).latent is None


def test_labels_previous_tokens_and_teachers_stand_where_they_should():
    model, given = drafter(), row(12)
    slots = slots_of(model, **given, **blocks(0, 3, 7))
    output = model(**given, **blocks(0, 3, 7))
    for n, anchor in enumerate((0, 3, 7)):
        for k in range(4):
            assert slots.prev_ids[0, n, k] == given["input_ids"][0, anchor + k]
            assert slots.target_ids[0, n, k] == given["input_ids"][0, anchor + k + 1]
            last = given["target_last_hidden_states"][0, anchor + k]
            assert torch.equal(slots.target_hidden[0, n, k], last)
            torch.testing.assert_close(
                output.aligned_target_logits[0, n, k], model.lm_head.weight @ last
            )


def test_forward_is_slots_and_logits():
    model, given = drafter(markov_head_type="rnn"), row(9) | blocks(1, 5)
    slots, output = slots_of(model, **given), model(**given)
    expected = model.lm_head(slots.hidden) + model.markov_head.markov_w2(slots.latent)
    torch.testing.assert_close(output.draft_logits, expected)
    torch.testing.assert_close(model.logits(slots.hidden, slots.latent), expected)
    torch.testing.assert_close(model.logits(slots.hidden), model.lm_head(slots.hidden))


def test_parameters_have_the_published_names():
    expected = {"embed_tokens.weight", "norm.weight", "fc.weight", "hidden_norm.weight"}
    expected |= {"lm_head.weight", "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
    expected |= {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    for i in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            expected.add(f"layers.{i}.self_attn.{name}.weight")
        for name in ("gate_proj", "up_proj", "down_proj"):
            expected.add(f"layers.{i}.mlp.{name}.weight")
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected.add(f"layers.{i}.{name}.weight")
    assert set(drafter().state_dict()) == expected
    biases = {f"layers.{i}.self_attn.{x}_proj.bias" for i in range(2) for x in "qkvo"}
    assert set(drafter(attention_bias=True).state_dict()) == expected | biases
    gate = {f"markov_head.gate_proj.{name}" for name in ("weight", "bias")}
    assert set(drafter(markov_head_type="gated").state_dict()) == expected | gate
    joint = {f"markov_head.joint_proj.{name}" for name in ("weight", "bias")}
    assert set(drafter(markov_head_type="rnn").state_dict()) == expected | joint


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_packed_document_is_the_same_as_unpacked(backend):
    model, given = drafter(), row(9) | blocks(0, 2, 5, 7, dummies=1) | {"backend": backend}
    assert_same(model(**given, **packing(9, seq_len=9)), model(**given))


def test_one_packed_document_before_padding_is_the_same_as_unpacked():
    """The token after the document is another one's; it is not supervised either way."""
    model, given = drafter(), row(12)
    given["loss_mask"][:, 9:] = False
    given |= blocks(0, 2, 5, 7)
    assert_same(model(**given, **packing(9, seq_len=12)), model(**given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
def test_a_document_among_others_is_the_same_as_alone(head, backend):
    """Up to the document's end: later slots have no meaning, and none of them is supervised."""
    model, given = drafter(markov_head_type=head), row(17)
    together = model(
        **given, **blocks(1, 3, 6, 9, 13), **packing(5, 6, 4, seq_len=17), backend=backend
    )
    n = 0
    for first, past, anchors in [(0, 5, (1, 3)), (5, 11, (6, 9)), (11, 15, (13,))]:
        alone = model(
            **cut(given, first, past), **blocks(*(a - first for a in anchors)), backend=backend
        )
        for own, anchor in enumerate(anchors):
            known = min(past - anchor, 4)
            assert torch.equal(together.eval_mask[0, n], alone.eval_mask[0, own])
            assert alone.eval_mask[0, own].sum() == min(past - anchor - 1, 4)
            for name in ("draft_logits", "confidence_pred", "aligned_target_logits"):
                got = getattr(together, name)[0, n, :known]
                torch.testing.assert_close(got, getattr(alone, name)[0, own, :known])
            n += 1


def test_a_packed_batch_goes_straight_in():
    """Two conversations in one row give the accept rates that they give in rows of their own.

    There are anchors enough for every candidate, so both ways have the same blocks.
    """
    encoded = documents("paaaa", "ppaaaaa")
    torch.manual_seed(3)
    features, last = torch.randn(12, 24).double(), torch.randn(12, 12).double()
    model = drafter(num_anchors=7)
    outputs = []
    for batch in (collate(encoded, 22), pack(encoded, 14, 22)):
        # No two tokens are alike, so each finds its own features.
        place = batch.input_ids.clamp(max=11)
        packed = {name: getattr(batch, name) for name in ("doc_remaining", "position_ids")}
        outputs.append(
            model(
                batch.input_ids,
                features[place],
                batch.loss_mask,
                last[place],
                seq_lens=batch.seq_lens,
                **packed,
            )
        )
    rates = []
    for output in outputs:
        supervised = output.eval_mask
        labels, values = output.target_ids[supervised], accept_rates(output)[supervised]
        rates.append(sorted(zip(labels.tolist(), values.tolist(), strict=True)))
    assert len(rates[0]) == (3 + 2 + 1) + (4 + 3 + 2 + 1)
    torch.testing.assert_close(*(torch.tensor(pairs) for pairs in rates))


def test_anchors_of_packed_rows_leave_room_in_their_document():
    """Each drawn block has a supervised slot, although documents end everywhere."""
    model, given = drafter(num_anchors=12), row(12) | packing(1, 4, 1, 1, 5, seq_len=12)
    output = model(**given)
    assert output.block_keep_mask.sum() == 3 + 4
    assert torch.equal(output.eval_mask[..., 0], output.block_keep_mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_sees_nothing_of_its_anchors_features_and_later_ones(backend):
    model, given = drafter(), row(9) | {"backend": backend}
    expected = model(**given, **blocks(4))
    for position in range(4, 9):
        features = given["target_hidden_states"].clone()
        features[0, position] += 1
        assert_same(model(**given | {"target_hidden_states": features}, **blocks(4)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_slot_sees_the_features_of_every_position_before_the_anchor(backend):
    model, given = drafter(), row(9) | blocks(2, 6) | {"backend": backend}
    expected = slots_of(model, **given).hidden
    for position in range(6):
        features = given["target_hidden_states"].clone()
        features[0, position] += 1
        got = slots_of(model, **given | {"target_hidden_states": features}).hidden
        assert changed(got, expected) == [[position < 2] * 4, [True] * 4], position


def test_the_backbone_sees_no_token_but_the_anchors():
    model, given = drafter(), row(9) | blocks(4)
    expected = slots_of(model, **given).hidden
    for position in range(9):
        tokens = given["input_ids"].clone()
        tokens[0, position] = (tokens[0, position] + 1) % CONFIG.mask_token_id
        got = slots_of(model, **given | {"input_ids": tokens}).hidden
        assert changed(got, expected) == [[position == 4] * 4], position


@pytest.mark.parametrize("head", HEADS)
def test_a_slots_logits_see_no_token_from_its_label_on(head):
    """The Markov head reads the token before the label, the RNN all of the block's before it."""
    model, given = drafter(markov_head_type=head), row(9) | blocks(3)
    expected = model(**given)
    for position in range(4, 9):
        tokens = given["input_ids"].clone()
        tokens[0, position] = (tokens[0, position] + 1) % CONFIG.mask_token_id
        got = model(**given | {"input_ids": tokens})
        reads = [3 + k >= position if head == "rnn" else 3 + k == position for k in range(4)]
        assert changed(got.draft_logits, expected.draft_logits) == [reads], position
        confidence = (got.confidence_pred, expected.confidence_pred)
        own = [[3 + k == position for k in range(4)]]
        assert changed(*(value.unsqueeze(-1) for value in confidence)) == own, position


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_see_their_own_block_in_both_directions_and_no_other_block(backend):
    """Also a dummy block, which sees itself alone."""
    model, given = drafter(), row(9) | blocks(2, 5, dummies=1) | {"backend": backend}
    expected = slots_of(model, **given).hidden
    for n in range(3):
        for k in range(4):

            def nudge(module, args, output, place=4 * n + k):
                output = output.clone()
                output[0, place] += 1
                return output

            hook = model.embed_tokens.register_forward_hook(nudge)
            got = slots_of(model, **given).hidden
            hook.remove()
            assert changed(got, expected) == [[block == n] * 4 for block in range(3)], (n, k)


def test_dummy_blocks_are_finite_and_unsupervised_and_matter_to_no_other_block():
    model, given = drafter(), row(9)
    output = model(**given, **blocks(3, dummies=2))
    assert not output.eval_mask[0, 1:].any()
    assert output.draft_logits.isfinite().all() and output.confidence_pred.isfinite().all()
    alone = model(**given, **blocks(3))
    torch.testing.assert_close(output.draft_logits[:, :1], alone.draft_logits)


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


def test_the_targets_weights_are_what_the_drafter_computes_with():
    model, given = drafter(), row(9) | blocks(3)
    embed, head = torch.randn(2, 23, 12, dtype=torch.float64)
    expected = drafter()
    with torch.no_grad():
        expected.embed_tokens.weight.copy_(embed)
        expected.lm_head.weight.copy_(head)
    before = model(**given).draft_logits
    model.use_target_embeddings(embed, head)
    assert_same(model(**given), expected(**given))
    assert not torch.allclose(model(**given).draft_logits, before)


def test_a_tied_target_stays_tied():
    model, weight = drafter(), torch.randn(23, 12, dtype=torch.float64)
    model.use_target_embeddings(weight, weight)
    assert model.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_a_seed_draws_the_anchors_of_sample_anchor_positions():
    model, given = drafter(), row(20, batch=3)
    given["loss_mask"] = torch.rand(3, 20) < 0.7
    for seed in range(3):
        expected = sample_anchor_positions(
            20, given["loss_mask"], 5, "cpu", generator=torch.Generator().manual_seed(seed)
        )
        drawn = model(**given, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        assert_same(model(**given), drawn)
        anchors, keep = expected
        told = model(**given, anchor_positions=anchors, block_keep_mask=keep)
        assert_same(drawn, told)


@pytest.mark.parametrize(("dtype", "first"), [(torch.bfloat16, 30000), (torch.float16, 3000)])
def test_rope_is_computed_in_fp32_at_every_dtype(dtype, first, monkeypatch):
    """Queries and keys far into a document are the exact rotation, rounded once.

    In half precision itself, the angles would be off by whole turns, and a rotation by rounded
    sines would err about twice as much. fp16 rounds finely enough to tell the angles of fp32 from
    exact ones further out.
    """
    seen, normed = {}, {}
    attention = layers.attend

    def watch(q, k, *args, **options):
        seen.update(q=q, k=k)
        return attention(q, k, *args, **options)

    monkeypatch.setattr(layers, "attend", watch)
    theta, size = 1e6, 32
    model = drafter(dtype, num_hidden_layers=1, head_dim=size, rope_theta=theta)
    layer = model.layers[0].self_attn
    layer.q_norm.register_forward_hook(lambda module, args, output: normed.update(q=output))
    layer.k_norm.register_forward_hook(lambda module, args, output: normed.update(k=output))
    where = packing(40, seq_len=40)
    where["position_ids"] = where["position_ids"] + first
    slots_of(model, **row(40, dtype), **where, **blocks(3, 17, 30))

    slots = [first + anchor + k for anchor in (3, 17, 30) for k in range(4)]
    for name, positions in (("q", slots), ("k", [*range(first, first + 40), *slots])):
        turned, before = seen[name], normed[name]
        if before.shape != turned.shape:
            before = before.transpose(1, 2)
        assert before.shape == turned.shape and turned.shape[2] == len(positions)
        before = before.double()
        i = torch.arange(size // 2, dtype=torch.float64)
        angle = torch.tensor(positions).unsqueeze(-1) * theta ** (-2 * i / size)
        low, high = before.chunk(2, -1)
        exact = torch.cat(
            [
                low * angle.cos() - high * angle.sin(),
                high * angle.cos() + low * angle.sin(),
            ],
            -1,
        )
        error = (turned.double() - exact).square().mean().sqrt()
        rounding = (exact.to(dtype).double() - exact).square().mean().sqrt()
        assert error < 1.25 * rounding, f"{name}: {error / rounding:.2f} times the rounding"


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-3), (torch.bfloat16, 0.2)]
)
def test_a_document_far_from_position_zero_is_the_same(dtype, bound):
    """Only distances count: every position may be shifted by one number."""
    model, given = drafter(dtype, rope_theta=1e4), row(12, dtype) | blocks(2, 6, 9)
    where = packing(12, seq_len=12)
    near = slots_of(model, **given, **where).hidden
    where["position_ids"] = where["position_ids"] + 30000
    far = slots_of(model, **given, **where).hidden
    assert (far - near).abs().max() < bound
    where["position_ids"] = where["position_ids"] * 2
    assert (slots_of(model, **given, **where).hidden - near).abs().max() > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_are_one_graph(backend):
    torch.compiler.reset()
    model = drafter(num_hidden_layers=1)
    given = row(9) | blocks(2, 5, dummies=1) | packing(6, 3, seq_len=9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (compiled, model):
        output = function(**given, backend=backend)
        loss = output.draft_logits.square().sum() + output.confidence_pred.square().sum()
        trained = [value for value in model.parameters() if value.requires_grad]
        gradients.append(torch.autograd.grad(loss, trained))
    assert_same(compiled(**given, backend=backend), model(**given, backend=backend), **CLOSE)
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()


@pytest.mark.slow
def test_the_default_compiler_gives_the_same(cpp_compiler):
    torch.compiler.reset()
    model = drafter(num_hidden_layers=1, markov_head_type="rnn", block_size=2)
    given = row(9) | blocks(2, 5, dummies=1) | packing(6, 3, seq_len=9)
    with torch.no_grad():
        assert_same(torch.compile(model, fullgraph=True)(**given), model(**given), **CLOSE)
    torch.compiler.reset()


def test_a_config_comes_back_from_its_dictionary():
    for config in (
        CONFIG,
        replace(CONFIG, target_hidden_size=7, attention_bias=True, rope_theta=5e4),
        replace(CONFIG, markov_rank=0, markov_head_type="none", enable_confidence_head=False),
        replace(CONFIG, confidence_head_with_markov=False, rms_norm_eps=1e-5, num_anchors=3),
        replace(CONFIG, max_position_embeddings=99, initializer_range=0.1, block_size=15),
    ):
        assert DrafterConfig.from_dict(config.to_dict()) == config


def test_a_config_dictionary_has_the_published_fields():
    values = CONFIG.to_dict()
    assert values["architectures"] == ["Qwen3DSparkModel"] and values["model_type"] == "qwen3"
    for name in (
        "block_size mask_token_id num_anchors markov_rank markov_head_type "
        "enable_confidence_head confidence_head_with_markov vocab_size hidden_size "
        "intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps rope_theta max_position_embeddings"
    ).split():
        assert values[name] == getattr(CONFIG, name), name
    assert list(values["target_layer_ids"]) == [0, 3]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size"),
        ({"hidden_size": 12.0}, TypeError, "hidden_size"),
        ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"block_size": True}, TypeError, "block_size"),
        ({"num_key_value_heads": 3}, ValueError, "num_key_value_heads"),
        ({"head_dim": 5}, ValueError, "head_dim"),
        ({"markov_head_type": "lstm"}, ValueError, "lstm"),
        ({"markov_rank": -1}, ValueError, "markov_rank"),
        ({"mask_token_id": 23}, ValueError, "mask_token_id"),
        ({"mask_token_id": -1}, ValueError, "mask_token_id"),
        ({"target_layer_ids": ()}, ValueError, "target_layer_ids"),
        ({"target_hidden_size": 0}, ValueError, "target_hidden_size"),
        ({"num_anchors": 0}, ValueError, "num_anchors"),
        ({"markov_rank": 0}, ValueError, "confidence_head_with_markov"),
    ],
    ids=str,
)
def test_a_bad_config_is_refused(changes, error, said):
    with pytest.raises(error, match=said):
        Drafter(replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"input_ids": torch.zeros(1, 9)}, TypeError, "input_ids"),
        ({"input_ids": torch.zeros(9, dtype=torch.long)}, ValueError, "input_ids"),
        ({"input_ids": [[1] * 9]}, TypeError, "input_ids"),
        ({"target_hidden_states": torch.zeros(1, 9, 23)}, ValueError, "target_hidden_states"),
        ({"target_hidden_states": torch.zeros(1, 8, 24)}, ValueError, "target_hidden_states"),
        ({"target_hidden_states": torch.zeros(2, 9, 24)}, ValueError, "target_hidden_states"),
        ({"target_hidden_states": None}, TypeError, "target_hidden_states"),
        ({"loss_mask": torch.ones(1, 8)}, ValueError, "loss_mask|seq_len"),
        ({"loss_mask": torch.ones(2, 9)}, ValueError, "loss_mask"),
        ({"loss_mask": None}, TypeError, "loss_mask"),
        ({"target_last_hidden_states": torch.zeros(1, 9, 11)}, ValueError, "target_last_hidden"),
        ({"target_last_hidden_states": torch.zeros(1, 8, 12)}, ValueError, "target_last_hidden"),
        ({"anchor_positions": torch.tensor([[2]])}, ValueError, "block_keep_mask"),
        ({"block_keep_mask": torch.tensor([[True]])}, ValueError, "anchor_positions"),
        (blocks(1) | {"block_keep_mask": torch.ones(1, 1)}, TypeError, "block_keep_mask"),
        (blocks(1) | {"anchor_positions": torch.ones(1, 2).long()}, ValueError, "block_keep_mask"),
        ({"doc_remaining": torch.zeros(1, 9).long()}, ValueError, "seq_lens"),
        ({"seq_lens": torch.tensor([[9]])}, ValueError, "doc_remaining"),
        (packing(9, seq_len=9) | {"seq_lens": torch.tensor([[9], [9]])}, ValueError, "seq_lens"),
        (packing(9, seq_len=9) | {"position_ids": torch.zeros(1, 9)}, TypeError, "position_ids"),
        (packing(8, seq_len=8), ValueError, "doc_remaining|position_ids"),
        ({"backend": "fast"}, ValueError, "fast"),
        ({"generator": 3}, TypeError, "generator"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_bad_arguments_are_refused(changes, error, said):
    with pytest.raises(error, match=said):
        drafter(torch.float32)(**row(9, torch.float32) | changes)


def test_target_weights_of_another_shape_are_refused():
    model, fits = drafter(), torch.zeros(23, 12)
    for weights in ((torch.zeros(22, 12), fits), (fits, torch.zeros(23, 11))):
        with pytest.raises(ValueError, match="23.*12|vocab"):
            model.use_target_embeddings(*weights)
    with pytest.raises(TypeError, match="tensor"):
        model.use_target_embeddings(fits, None)


def head_and_inputs(kind: str):
    """A random head, previous tokens and hidden states of 2 rows, 3 blocks, 5 slots."""
    torch.manual_seed(2)
    head = build_markov_head(kind, 23, 3, 12).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head, torch.randint(23, (2, 3, 5)), torch.randn(2, 3, 5, 12, dtype=torch.float64)


def test_the_vanilla_latent_is_the_previous_tokens_embedding_alone():
    head, previous, hidden = head_and_inputs("vanilla")
    latent = head.latent(previous, hidden)
    assert torch.equal(latent, head.markov_w1.weight[previous])
    assert torch.equal(latent, head.latent(previous, torch.zeros_like(hidden)))
    assert torch.equal(latent, head.embed(previous))


def test_a_gate_that_is_wide_open_is_the_vanilla_head():
    head, previous, hidden = head_and_inputs("gated")
    assert not torch.allclose(head.latent(previous, hidden), head.embed(previous))
    with torch.no_grad():
        head.gate_proj.bias.fill_(1e4)
    torch.testing.assert_close(head.latent(previous, hidden), head.embed(previous))
    with torch.no_grad():
        head.gate_proj.bias.fill_(-1e4)
    assert head.latent(previous, hidden).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["gated", "rnn"])
@pytest.mark.parametrize("changing", ["token", "hidden"])
def test_what_a_slots_latent_depends_on(kind, changing):
    """Gated: its own token and state. RNN: those of its block so far, and of no other block."""
    head, previous, hidden = head_and_inputs(kind)
    expected = head.latent(previous, hidden)
    for n in range(3):
        for k in range(5):
            tokens, states = previous.clone(), hidden.clone()
            if changing == "token":
                tokens[0, n, k] = (tokens[0, n, k] + 1) % 23
            else:
                states[0, n, k] += 1
            got = head.latent(tokens, states)
            reads = [
                [b == n and (s >= k if kind == "rnn" else s == k) for s in range(5)]
                for b in range(3)
            ]
            assert changed(got, expected) == reads, (n, k)
            assert torch.equal(got[1], expected[1])


def test_an_rnn_whose_gate_stays_open_keeps_its_zero_state():
    """Each slot's latent is then that of a first slot."""
    head, previous, hidden = head_and_inputs("rnn")
    with torch.no_grad():
        head.joint_proj.bias[:3] = 1e4
    latent = head.latent(previous, hidden)
    for k in range(5):
        first = head.latent(previous[:, :, k : k + 1], hidden[:, :, k : k + 1])
        torch.testing.assert_close(latent[:, :, k : k + 1], first)


def test_the_rnn_steps_as_it_reads_a_whole_block():
    """Decoding goes one slot at a time, from a state of zeros."""
    head, previous, hidden = head_and_inputs("rnn")
    state = torch.zeros(2, 3, 3, dtype=torch.float64)
    expected = head.latent(previous, hidden)
    for k in range(5):
        state, latent = head.step(state, head.embed(previous[:, :, k]), hidden[:, :, k])
        torch.testing.assert_close(latent, expected[:, :, k])


@pytest.mark.parametrize("kind", ["none", "vanilla"])
def test_rank_zero_or_none_builds_no_head(kind):
    assert build_markov_head(kind, 23, 0 if kind == "vanilla" else 3, 12) is None


def test_a_bad_head_is_refused():
    for arguments, error, said in [
        (("lstm", 23, 3, 12), ValueError, "lstm"),
        (("gated", 23, -1, 12), ValueError, "rank"),
        (("gated", 0, 3, 12), ValueError, "vocab_size"),
        (("rnn", 23, 3, 0), ValueError, "hidden_size"),
        (("rnn", 23, 2.5, 12), TypeError, "rank"),
    ]:
        with pytest.raises(error, match=said):
            build_markov_head(*arguments)


def test_a_fresh_drafter_adds_no_bias_and_gives_even_odds():
    """Markov bias and confidence logit begin at zero, whatever the head."""
    for head in HEADS:
        model, given = Drafter(replace(CONFIG, markov_head_type=head)), row(9, torch.float32)
        slots, output = slots_of(model, **given | blocks(2, 5)), model(**given | blocks(2, 5))
        assert torch.equal(output.draft_logits, model.lm_head(slots.hidden))
        assert not output.confidence_pred.any()
        assert output.draft_logits.detach().std() > 0
