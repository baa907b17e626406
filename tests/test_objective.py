"""The objective: its chunked form against the textbook one on full logits.

`test_parity` holds the textbook form to plain loops; its gradients are autograd's, and in float64
they are the truth that the chunked form must reach. A case is random and exact in fp32; supervision
is a prefix of each block.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import peak_bytes
from dspark_lab.common import DSparkForwardOutput
from dspark_lab.model import (
    Objective,
    Slots,
    Sums,
    dspark_objective,
    most_slots,
    objective,
    output_objective,
    slot_weights,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]

TRAINED = ["hidden", "latent", "confidence_pred", "head", "w2"]
OF_SLOTS = ["hidden", "latent", "confidence_pred", "target_hidden", "target_ids", "eval_mask"]


@dataclass(frozen=True)
class Case:
    """What both forms of the objective are computed from; None where the part is absent."""

    hidden: Tensor
    latent: Tensor | None
    confidence_pred: Tensor | None
    target_hidden: Tensor
    target_ids: Tensor
    eval_mask: Tensor
    head: Tensor
    w2: Tensor | None

    def to(self, *args) -> "Case":
        """Numbers in another dtype or everything on another device, ready for a gradient."""
        values = {}
        for name, x in vars(self).items():
            if x is not None:
                moved = x.detach().clone().to(*args)
                x = moved if x.is_floating_point() else x.to(moved.device)
            values[name] = x.requires_grad_() if x is not None and name in TRAINED else x
        return Case(**values)


def case(
    seed: int = 0,
    size: tuple[int, int, int] = (2, 3, 4),
    vocab: int = 11,
    width: int = 5,
    rank: int = 3,
    confident: bool = True,
    supervised: float = 0.7,
) -> Case:
    """Rank 0 leaves out the Markov head; ``supervised`` is the chance to go on to the next slot."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    go_on = torch.rand(size, generator=g) < supervised
    return Case(
        hidden=normal(*size, width),
        latent=normal(*size, rank) if rank else None,
        confidence_pred=normal(*size) if confident else None,
        target_hidden=normal(*size, width),
        target_ids=torch.randint(vocab, size, generator=g),
        eval_mask=go_on.cumprod(dim=-1).bool(),
        head=normal(vocab, width),
        w2=normal(vocab, rank) if rank else None,
    )


def of_slots(given: Case) -> dict[str, Tensor | None]:
    """All but the weights."""
    return {name: getattr(given, name) for name in OF_SLOTS}


def chunked(given: Case, **options) -> Objective:
    keep = given.eval_mask.any(dim=-1)
    slots = Slots(**of_slots(given), prev_ids=given.target_ids, block_keep_mask=keep)
    return dspark_objective(slots, given.head, given.w2, **options)


def full_logits(given: Case) -> DSparkForwardOutput:
    draft, target = (F.linear(x, given.head) for x in (given.hidden, given.target_hidden))
    if given.latent is not None:
        draft = draft + F.linear(given.latent, given.w2)
    keep = given.eval_mask.any(dim=-1)
    return DSparkForwardOutput(
        draft, given.target_ids, given.eval_mask, keep, given.confidence_pred, target
    )


def textbook(given: Case, **options) -> Objective:
    return output_objective(full_logits(given), **options)


both_forms = pytest.mark.parametrize("form", [textbook, chunked])


def gradients(given: Case, loss: Tensor) -> dict[str, Tensor]:
    """Of all that asks for one; zeros where the loss does not reach."""
    values = {name: x for name, x in vars(given).items() if x is not None and x.requires_grad}
    found = torch.autograd.grad(loss, list(values.values()), materialize_grads=True)
    return dict(zip(values, found, strict=True))


def assert_near(got: Tensor, expected: Tensor, bound: float, what: str, scale=1e-3) -> None:
    """The norm of the difference is at most the bound times the expected norm, or the scale."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert got.shape == expected.shape, what
    assert torch.equal(got.isnan(), expected.isnan()), what
    got, expected = got.nan_to_num(0), expected.nan_to_num(0)
    error, size = float((got - expected).norm()), float(expected.norm())
    assert error <= bound * max(size, scale), f"{what}: off by {error:.2e} of {size:.2e}"


def assert_same(got: Objective, expected: Objective, bound: float) -> None:
    """Accept rates are 1 - l1 / 2, so they and what follows from them are exact relative to 1."""
    assert_near(got.loss, expected.loss, bound, "loss")
    assert_near(got.accept, expected.accept, bound, "accept", float(expected.sums.count.norm()))
    for field in fields(Sums):
        one, other = (getattr(x.sums, field.name) for x in (got, expected))
        assert not one.requires_grad
        terms = ("weight", "ce", "l1", "confidence")
        scale = 1e-3 if field.name in terms else float(expected.sums.count.norm())
        assert_near(one, other, bound, field.name, scale)


def assert_same_gradients(got: dict, expected: dict, bound: float) -> None:
    """A confidence's is a share of a difference of rates: exact relative to the shares."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.numel() ** -0.5 if name == "confidence_pred" else 1e-3
        assert_near(got[name], value, bound, f"gradient of {name}", scale)


def assert_as_in_float64(
    given: Case, bound: float = 1e-6, **options
) -> tuple[Objective, Objective]:
    """The chunked form has the textbook's values, and gradients, sums over words, to twice that."""
    given, truth = given.to(torch.float32), given.to(torch.float64)
    got, expected = chunked(given, **options), textbook(truth)
    assert_same(got, expected, bound)
    found = gradients(given, got.loss)
    assert all(x.isfinite().all() for x in found.values())
    assert_same_gradients(found, gradients(truth, expected.loss), 2 * bound)
    return got, expected


def smallest_distance(given: Case) -> float:
    """The least |log p / q| of any token: at 0, rounding decides the gradient's sign(p - q)."""
    output = full_logits(given.to(torch.float64))
    p, q = output.draft_logits.softmax(-1), output.aligned_target_logits.softmax(-1)
    return float((p / q).log().abs().min())


sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
cases = st.builds(
    case,
    seed=st.integers(0, 9999),
    size=sizes,
    vocab=st.integers(2, 40),
    width=st.integers(1, 6),
    rank=st.sampled_from([0, 1, 4]),
    confident=st.booleans(),
    supervised=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
terms = st.fixed_dictionaries(
    {
        "ce_weight": st.sampled_from([0.1, 0.0, 2.0]),
        "l1_weight": st.sampled_from([0.9, 0.0, 0.3]),
        "confidence_weight": st.sampled_from([1.0, 0.0, 0.4]),
        # With the last, weights underflow; a slot without weight counts all the same.
        "loss_decay_gamma": st.sampled_from([4.0, 1.5, math.inf, 0.001]),
    }
)


@both_forms
def test_a_worked_example(form) -> None:
    """Draft (1/2, 1/2), target (0.7, 0.3) and a confidence of 1/2, twice; the third block idles."""
    head = torch.eye(2, dtype=torch.float64)
    mask = torch.tensor([[[True, True], [True, False], [False, False]]])
    target = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    zeros = torch.zeros(1, 3, 2, dtype=torch.float64)
    hidden = zeros.unsqueeze(-1).expand(1, 3, 2, 2)
    given = Case(hidden, None, zeros, target.expand(1, 3, 2, 2), zeros.long(), mask, head, None)
    got = form(given, loss_decay_gamma=1.0)
    half, late = math.log(2), math.exp(-1)
    assert got.loss.item() == pytest.approx(0.1 * half + 0.9 * 0.4 + half)
    assert got.sums.summary() == pytest.approx(
        {
            "ce": half,
            "l1": 0.4,
            "confidence": half,
            "accept_rate": 0.8,
            "tau": 1 + (0.8 + 0.8 + 0.64) / 2,
            "confidence_error": 0.3,
            "confidence_bias": -0.3,
            "accept_by_slot": pytest.approx([0.8, 0.8]),
            "survival_by_slot": pytest.approx([0.8, 0.32]),
            "confidence_error_by_slot": pytest.approx([0.3, 0.3]),
            "confidence_bias_by_slot": pytest.approx([-0.3, -0.3]),
            "cumulative_bias_by_slot": pytest.approx([-0.3, 0.25 - 0.64]),
            "slots": 3,
            "blocks": 2,
        }
    )
    assert got.sums.weight.tolist() == pytest.approx([2, late])
    assert got.sums.ce.tolist() == pytest.approx([2 * half, late * half])
    assert got.sums.count.tolist() == [2, 1]


def test_the_form_from_hidden_states_is_the_textbook_in_float64() -> None:
    @settings(max_examples=80)
    @given(given=cases, terms=terms, chunk=st.integers(1, 20), tile=st.integers(1, 5))
    def check(given, terms, chunk, tile):
        given = given.to(torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objective, "_TILE", 2 * (tile * len(given.head),))
            got = chunked(given, chunk=chunk, **terms)
        expected = textbook(given, **terms)
        assert_same(got, expected, 1e-11)
        assert_same_gradients(gradients(given, got.loss), gradients(given, expected.loss), 1e-11)

    check()


def test_fp32_is_the_float64_textbook_to_a_millionth() -> None:
    @settings(max_examples=40)
    @given(seed=st.integers(0, 9999), size=sizes, vocab=st.sampled_from([7, 90, 500]))
    def check(seed, size, vocab):
        given = case(seed, size, vocab, supervised=0.9)
        assume(given.eval_mask.any() and smallest_distance(given) > 1e-5)
        assert_as_in_float64(given, chunk=7)

    check()


def test_sums_over_a_large_vocabulary_stay_exact() -> None:
    """A millionth still, where fp32 softmax itself is off by several."""
    given = case(size=(1, 4, 4), vocab=49_152, width=64, rank=16, supervised=1.0)
    given = replace(given, head=given.head * 0.35, w2=given.w2 * 0.35)
    assert smallest_distance(given) > 1e-6
    logits = full_logits(given.to(torch.float64)).draft_logits
    off = logits.float().softmax(-1).double() / logits.softmax(-1) - 1
    assert off.mean().abs().item() > 1e-6
    assert_as_in_float64(given, chunk=11)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_extreme_logits_give_finite_values_and_true_gradients(scale, chunk) -> None:
    """Logits to +-1e4 and beyond: p[label] is 0 in every float, its cross-entropy is not."""
    given = case(seed=1, supervised=1.0)
    larger = ("hidden", "target_hidden", "confidence_pred")
    given = replace(given, **{name: getattr(given, name) * scale for name in larger})
    got, expected = assert_as_in_float64(given, chunk=chunk)
    assert expected.loss.item() > scale / 10
    assert ((got.accept >= 0) & (got.accept <= 1)).all()


@both_forms
@pytest.mark.parametrize("normaliser", [None, 0.0, 3.0])
def test_without_supervised_slots_loss_and_gradients_are_zero(form, normaliser) -> None:
    given = case(supervised=0.0).to(torch.float32)
    total = None if normaliser is None else torch.tensor(normaliser)
    got = form(given, normaliser=total)
    assert got.loss.item() == 0
    for name, value in gradients(given, got.loss).items():
        assert torch.equal(value, torch.zeros_like(value)), name
    assert not got.sums.stacked().any()
    summary = got.sums.summary()
    assert summary["slots"] == 0 and summary["blocks"] == 0
    assert math.isnan(summary["tau"]) and math.isnan(summary["ce"])
    assert all(map(math.isnan, summary["accept_by_slot"]))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("way", ["its own way", "as on a GPU"])
def test_what_unsupervised_slots_hold_has_no_influence(poison, way, monkeypatch) -> None:
    """On a GPU unsupervised slots are computed as well."""
    if way == "as on a GPU":
        monkeypatch.setattr(objective, "_chosen", lambda supervised: torch.arange(len(supervised)))
    given = case(size=(2, 5, 4)).to(torch.float32)
    idle = ~given.eval_mask
    assert idle.any() and given.eval_mask.any()
    with torch.no_grad():
        bad = {"target_ids": given.target_ids.masked_fill(idle, -1)}
        for name in ("hidden", "latent", "target_hidden"):
            bad[name] = getattr(given, name).masked_fill(idle.unsqueeze(-1), poison)
        bad["confidence_pred"] = given.confidence_pred.masked_fill(idle, poison)
    spoiled = replace(given, **bad).to(torch.float32)
    got, expected = chunked(spoiled, chunk=6), chunked(given, chunk=6)
    assert_same(got, expected, 0)
    found = gradients(spoiled, got.loss)
    assert_same_gradients(found, gradients(given, expected.loss), 0)
    for name in ("hidden", "latent", "confidence_pred"):
        assert not found[name][idle].any(), name


@both_forms
def test_a_draft_equal_to_its_target_is_always_accepted(form) -> None:
    given = case(rank=0, supervised=1.0).to(torch.float64)
    given = replace(given, target_hidden=given.hidden.detach())
    got = form(given, ce_weight=0.0, confidence_weight=0.0)
    assert got.loss.item() == 0
    assert got.sums.summary()["tau"] == pytest.approx(5)
    for name, value in gradients(given, got.loss).items():
        assert not value.any(), name


@both_forms
def test_rates_are_never_below_zero_where_nothing_is_shared(form) -> None:
    """In fp32 the distance of such distributions is as often a little above 2 as below."""
    given = case(size=(1, 40, 4), vocab=1000, width=8, rank=0, supervised=1.0)
    side = torch.tensor([100.0, -100.0]).repeat(500)
    head = torch.cat([given.head[:, :7], side.unsqueeze(1)], dim=1)
    ones = torch.ones(1, 40, 4, 1)
    hidden = torch.cat([given.hidden[..., :7], ones], dim=-1)
    target = torch.cat([given.target_hidden[..., :7], -ones], dim=-1)
    given = replace(given, hidden=hidden, target_hidden=target, head=head)
    accept = form(given).accept
    assert (accept >= 0).all() and (accept < 1e-5).all()


@both_forms
def test_parts_with_one_normaliser_add_up_to_the_whole(form) -> None:
    """Unequal parts, as over processes or accumulated batches: losses, gradients and sums add."""
    whole = case(size=(3, 4, 4)).to(torch.float64)
    expected = form(whole)
    normaliser = slot_weights(whole.eval_mask, 4.0, torch.float64).sum()
    loss, sums, parts = 0.0, [], []
    for rows in (slice(0, 1), slice(1, 3)):
        part = replace(whole, **{name: x[rows] for name, x in of_slots(whole).items()})
        got = form(part, normaliser=normaliser)
        loss, sums = loss + got.loss, [*sums, got.sums]
        parts.append(float(part.eval_mask.sum()))
    assert parts[0] != parts[1] and min(parts) > 0
    together = Sums.from_stacked(sums[0].stacked() + sums[1].stacked())
    assert together.blocks.shape == ()
    assert_same(Objective(loss, expected.accept, together), expected, 1e-12)
    assert_same_gradients(gradients(whole, loss), gradients(whole, expected.loss), 1e-12)


@both_forms
def test_the_target_and_a_reported_confidence_without_weight_train_nothing(form) -> None:
    given = case().to(torch.float64)
    given.target_hidden.requires_grad_()
    weighed, got = form(given), form(given, confidence_weight=0.0)
    assert torch.equal(got.sums.confidence, weighed.sums.confidence)
    assert math.isfinite(got.sums.summary()["confidence"])
    assert not gradients(given, got.loss)["confidence_pred"].any()
    assert not gradients(given, weighed.loss)["target_hidden"].any()


def test_a_frozen_head_gets_no_gradient_and_no_grad_no_graph() -> None:
    """The other gradients and all values stay the same; backward scales with what comes in."""
    given = case().to(torch.float64)
    expected = chunked(given)
    frozen = replace(given, head=given.head.detach())
    found = gradients(frozen, chunked(frozen).loss)
    assert "head" not in found
    thrice = gradients(given, 3 * expected.loss)
    for name, value in found.items():
        torch.testing.assert_close(3 * value, thrice[name])
    with torch.no_grad():
        got = chunked(given)
    assert not got.loss.requires_grad
    assert_same(got, expected, 0)


def test_autocast_means_bf16_products_and_nothing_else() -> None:
    """The same numbers as from bf16 inputs; sums, and gradients of fp32 weights, stay fp32."""
    given = case(size=(2, 8, 4), vocab=60, width=16).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = chunked(given, chunk=9)
    assert got.loss.dtype == torch.float32
    assert {getattr(got.sums, f.name).dtype for f in fields(Sums)} == {torch.float32}
    found = gradients(given, got.loss)
    assert {x.dtype for x in found.values()} == {torch.float32}

    half = given.to(torch.bfloat16)
    half = replace(half, confidence_pred=given.confidence_pred)
    same = chunked(half, chunk=9)
    assert torch.equal(same.loss, got.loss)
    bf16 = gradients(half, same.loss)
    for name in ("hidden", "latent", "head", "w2"):
        assert bf16[name].dtype == torch.bfloat16
        assert torch.equal(found[name].bfloat16(), bf16[name]), name

    truth = given.to(torch.float64)
    expected = textbook(truth)
    assert_same(got, expected, 2e-2)
    assert_same_gradients(found, gradients(truth, expected.loss), 5e-2)
    assert (got.loss - chunked(given).loss).abs().item() > 1e-6


def test_bf16_does_not_round_the_weights_of_slots() -> None:
    """A power of two would pass through bf16 unharmed, a third would not."""
    given = case(size=(4, 16, 1), vocab=30, width=32, supervised=1.0).to(torch.bfloat16)
    found = []
    for normaliser in (1.0, 3.0):
        loss = chunked(given, normaliser=torch.tensor(normaliser)).loss
        found.append(gradients(given, loss)["hidden"].double())
    lost = ((3 * found[1] - found[0]) * found[0].sign()).sum() / found[0].abs().sum()
    assert abs(float(lost)) < 4e-4


def test_int32_labels_and_float16_products() -> None:
    given = case().to(torch.float64)
    expected = chunked(given)
    assert_same(chunked(replace(given, target_ids=given.target_ids.int())), expected, 0)
    assert_same(textbook(replace(given, target_ids=given.target_ids.int())), expected, 1e-12)
    half = given.to(torch.float16)
    got = chunked(half)
    assert_same(got, expected, 1e-2)
    assert_same_gradients(gradients(half, got.loss), gradients(given, expected.loss), 2e-2)


def test_memory_does_not_grow_with_the_number_of_anchors() -> None:
    """Beyond what a slot's own inputs and gradients take; the textbook's does."""
    vocab, width, rank = 3000, 8, 4

    def peak(form, anchors: int) -> int:
        given = case(size=(1, anchors, 4), vocab=vocab, width=width, rank=rank, supervised=1.0)
        given = given.to(torch.float32)
        return peak_bytes(lambda: gradients(given, form(given).loss))

    slots, in_chunks = 4 * (96 - 24), partial(chunked, chunk=16)
    inputs = slots * (width + rank) * 4
    assert peak(in_chunks, 96) - peak(in_chunks, 24) < 10 * inputs
    assert peak(textbook, 96) - peak(textbook, 24) > 3 * slots * vocab * 4


def test_the_gradient_is_formed_only_where_it_is_asked_for() -> None:
    """Evaluation holds no buffers for gradients, and a frozen head has none."""
    given = case(size=(1, 2, 2), vocab=20_000, width=16, rank=8).to(torch.float32)
    frozen = replace(given, head=given.head.detach())
    with torch.no_grad():
        evaluated = peak_bytes(lambda: chunked(given))
    trained = peak_bytes(lambda: gradients(given, chunked(given).loss))
    without = peak_bytes(lambda: gradients(frozen, chunked(frozen).loss))
    assert without - evaluated >= given.w2.nbytes
    assert trained - without >= given.head.nbytes


def test_the_operator_is_declared_as_it_is() -> None:
    """Shapes and dtypes for the compiler, and the gradient's registration."""
    given = case().to(torch.float32)
    flat = given.hidden.flatten(0, 2), given.latent.flatten(0, 2), given.target_hidden.flatten(0, 2)
    mask = given.eval_mask.flatten()
    rest = (given.target_ids.flatten(), mask, mask / 7.0, given.head.detach(), given.w2)
    settings = (None, None, None, 1.0, None, 1.0, 0.1, 0.9, 5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for asks in (True, False):
        inputs = (*flat, *rest, *settings, asks, False)
        torch.library.opcheck(objective._chunked, inputs, test_utils=checks)
    bare = (flat[0], None, None, *rest[:-1], None, *settings, True, True)
    torch.library.opcheck(objective._chunked, bare, test_utils=checks)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_one_graph_for_any_number_of_anchors(backend, request) -> None:
    if backend == "inductor":
        request.getfixturevalue("cpp_compiler")
    torch._dynamo.reset()
    compiled = torch.compile(chunked, fullgraph=True, dynamic=True, backend=backend)
    for seed, anchors in enumerate((3, 5)):
        given = case(seed, size=(2, anchors, 3), supervised=0.9).to(torch.float32)
        got, expected = compiled(given, chunk=4), chunked(given, chunk=4)
        assert_same(got, expected, 1e-6)
        assert_same_gradients(gradients(given, got.loss), gradients(given, expected.loss), 1e-6)


def test_on_a_gpu_chunks_grow_with_the_memory_that_is_free_up_to_a_limit():
    free = [10**6, 10**9, 10**10, 10**11]
    sizes = [most_slots(151936, True, n) for n in free]
    assert sizes == sorted(sizes) and sizes[0] == 1
    # Two fp32 logits of each slot take an eighth of it at most.
    assert all(8 * 151936 * n <= left / 8 for n, left in zip(sizes[1:], free[1:], strict=True))
    assert sizes[-1] == most_slots(151936, True) == most_slots(64, True)
    # On a CPU they have one size.
    assert most_slots(151936, False, 10**6) == most_slots(151936, False)
