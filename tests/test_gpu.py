"""A GPU gives what the CPU gives, keeps the host waiting for nothing, and compiles few graphs.

A few cases each of what can differ on a device; all others run on the CPU alone. Without a GPU the
tests are skipped. DSPARK_LAB_GPU_TESTS=cpu runs them on the CPU in its place, where nothing notices
a synchronisation and the compiler makes no code.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspark_lab.attention import block_attention, choose_backend
from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import Batch, collate, pack
from dspark_lab.common import sample_anchor_positions
from dspark_lab.decoding import decode, decode_rounds, distribution, verify
from dspark_lab.decoding.verification import draw
from dspark_lab.model import Drafter, Target, dspark_objective, live_features
from dspark_lab.pairs import Pair, load_pair, question
from dspark_lab.training import Processes, Run, TrainConfig
from tests import runs, test_attention, test_common_compiled, test_drafter, test_objective
from tests.recorder import tensors
from tests.samples import random_chats, slots_of, tiny_drafter, tiny_target

DRY = os.environ.get("DSPARK_LAB_GPU_TESTS") == "cpu"
CPU, DEVICE = torch.device("cpu"), torch.device("cpu" if DRY else "cuda")
LAYERS = (0, 1)
# With blocks of three more than 128 slots; for fewer the compiler makes another kernel.
ANCHORS = 43
each_dtype = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:torch.compile does not work here"),
]


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The compiler's; code for the CPU would take long to make."""
    from torch._dynamo import utils  # takes a second

    if DRY:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    return utils.counters


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    choose = (lambda mode: None) if DRY else torch.cuda.set_sync_debug_mode
    choose(mode)
    try:
        yield
    finally:
        choose("default")


@contextmanager
def counted_synchronisations() -> Iterator[list[str]]:
    """Why the host waited for the GPU, complete at the end."""
    found: list[str] = []

    def noted(wait: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (found.append("an explicit wait"), wait(*args, **options))

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for owner in (torch.cuda, torch.cuda.Event):  # overlooked by the debug mode
            patch.setattr(owner, "synchronize", noted(owner.synchronize))
        with sync_debug_mode("warn"):
            yield found
    messages = [str(warning.message) for warning in caught]
    found += [message for message in messages if "called a synchronizing" in message]


def moved(value: Any, device: torch.device = DEVICE) -> Any:
    """The value, or all that it holds, on the device."""
    if isinstance(value, (Tensor, nn.Module)):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(x, device) for x in value)
    return device if isinstance(value, str) and value == "cpu" else value


def assert_close(got: Any, expected: Any, bound: float = 2e-5) -> None:
    """To fp32's rounding or to a bound, wherever the two lie; whole numbers are the same."""
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        exact = not one.is_floating_point()
        test_objective.assert_near(one, other, 0 if exact else bound, f"{tuple(one.shape)}")


def ramp(like: Tensor) -> Tensor:
    """Weights for a sum, all different."""
    return torch.linspace(-1, 1, like.numel(), device=like.device).view_as(like)


def models() -> tuple[Target, Drafter]:
    """A tiny pair on the device, with heads as wide as a kernel needs and no weight at zero."""
    target = Target(tiny_target().model.to(DEVICE))
    drafter = tiny_drafter(head_dim=16, num_hidden_layers=1)
    nn.init.normal_(drafter.markov_head.markov_w2.weight, std=0.3)
    nn.init.normal_(drafter.confidence_head.proj.weight, std=0.3)
    drafter.to(DEVICE).use_target_embeddings(target.embed_weight, target.head_weight)
    return target, drafter


def batch_of(packed: bool, chats: int = 5, **options: int) -> Batch:
    """Several rows, of one conversation each or of several."""
    encoded = random_chats(chats, **options)
    longest = max(map(len, encoded))
    return pack(encoded, longest + longest // 2, 0) if packed else collate(encoded, 0)


@cache
def pocket(device: torch.device) -> Pair:
    """The shipped pair, in float64: no two tokens are equally likely."""
    return load_pair("pocket", device=device, dtype=torch.float64)


# The same numbers


@pytest.mark.parametrize("name", test_common_compiled.NAMES)
def test_a_function_gives_what_it_gives_on_the_cpu_and_waits_for_nothing(name: str) -> None:
    outcome, size = test_common_compiled.outcome, test_common_compiled.SIZE
    expected = outcome(*test_common_compiled.arguments("cpu", size)[name])
    call = moved(test_common_compiled.arguments("cpu", size)[name])
    outcome(*call)
    with sync_debug_mode("error"):
        got = outcome(*call)
    assert {x.device.type for x in got} == {DEVICE.type}
    # Anchors follow from the device's own random numbers.
    if not name.startswith("sample"):
        assert_close(got, expected)


@pytest.mark.parametrize(
    ("way", "seq_len", "num_anchors"),
    [("a generator", 65_536, 1536), ("a seed", 300, 40), ("compiled", 300, 40)],
)
def test_anchors_have_the_smallest_numbers_of_the_devices_stream(
    way: str, seq_len: int, num_anchors: int, counters: dict[str, Any]
) -> None:
    def stream() -> dict[str, Any]:
        own = {"generator": torch.Generator(DEVICE).manual_seed(7)}
        torch.manual_seed(7)
        return own if way == "a generator" else {}

    mask = torch.rand(3, seq_len, generator=torch.Generator().manual_seed(0)) < 0.7
    sample = sample_anchor_positions
    if way == "compiled":
        sample = torch.compile(sample, fullgraph=True)
    anchors, keep = sample(seq_len, mask.to(DEVICE), num_anchors, DEVICE, **stream())
    numbers = torch.rand(3, seq_len - 1, device=DEVICE, **stream()).tolist()
    assert keep.all()
    for row, drawn, found in zip(mask.tolist(), numbers, anchors.tolist(), strict=True):
        candidates = [p for p in range(seq_len - 1) if row[p] and row[p + 1]]
        assert found == sorted(sorted(candidates, key=drawn.__getitem__)[:num_anchors])


@each_dtype
@pytest.mark.parametrize("backend", ["dense", "auto"])
def test_attention_is_that_of_the_definition(
    backend: str, dtype: torch.dtype, bound: float
) -> None:
    """`auto` is FlexAttention, compiled; several tiles each way."""
    assert DRY or choose_backend(DEVICE) == "flex"
    shape = {"heads": 4, "kv_heads": 2, "seq_len": 200, "num_anchors": 50, "packed": True}
    qkv, options, mask = test_attention.Problem("on a GPU", **shape).tensors(dtype, DEVICE)
    attend = partial(block_attention, **options, backend=backend)
    reference = partial(test_attention.reference, mask=mask, scale=None)
    got = test_attention.with_gradients(attend, *qkv, ramp(qkv[0]))
    expected = test_attention.with_gradients(reference, *(x.double() for x in qkv), ramp(qkv[0]))
    assert {x.dtype for x in got} == {dtype}
    assert_close(got, expected, bound)


@pytest.mark.parametrize("head", ["none", *test_drafter.HEADS])
def test_a_drafter_is_that_of_the_cpu(head: str) -> None:
    given = test_drafter.row(40, torch.float32) | test_drafter.blocks(2, 5, 20, 31, dummies=1)
    given |= test_drafter.packing(24, 16, seq_len=40)
    options = {"markov_head_type": head, "confidence_head_with_markov": head != "none"}
    found = []
    for device in (CPU, DEVICE):
        model = test_drafter.drafter(torch.float32, head_dim=16, **options).to(device)
        slots = slots_of(model, **{name: x.to(device) for name, x in given.items()})
        outputs = tensors([slots.hidden, slots.latent, slots.confidence_pred])
        sum((ramp(x) * x).sum() for x in outputs).backward()
        found.append([list(vars(slots).values()), list(runs.gradients(model).values())])
    assert_close(found[1], found[0])


@each_dtype
@test_objective.both_forms
def test_the_objective_is_the_textbooks(form: Any, dtype: torch.dtype, bound: float) -> None:
    made = test_objective.case(size=(2, 8, 4), vocab=60, width=16, supervised=0.9)
    given, truth = made.to(dtype).to(DEVICE), made.to(torch.float64)
    got = form(given, **({"chunk": 9} if form is test_objective.chunked else {}))
    expected = test_objective.textbook(truth)
    test_objective.assert_same(got, expected, bound)
    found = test_objective.gradients(given, got.loss)
    wanted = test_objective.gradients(truth, expected.loss)
    test_objective.assert_same_gradients(found, wanted, 2.5 * bound)


@pytest.mark.parametrize("packed", [False, True])
def test_the_targets_features_are_those_of_the_cpu(packed: bool) -> None:
    batch = batch_of(packed)
    expected = tiny_target().batch_features(batch, LAYERS)
    got = models()[0].batch_features(batch.to(DEVICE), LAYERS)
    for one, other in zip(vars(got).values(), vars(expected).values(), strict=True):
        assert_close(one.cpu()[batch.attention_mask], other[batch.attention_mask])


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 1.0), (1.3, 0.9)])
def test_blocks_are_verified_as_on_the_cpu(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    target = 2 * torch.randn(32, 6, 50, generator=generator)
    draft = target[:, :5] + 0.5 * torch.randn(32, 5, 50, generator=generator)
    lengths = torch.randint(6, (32,), generator=generator)
    numbers = torch.rand(3, 32, 5, generator=generator, dtype=torch.float64)
    found = []
    for device in (CPU, DEVICE):
        logits, own, many = moved([[target, draft], numbers, lengths], device)
        p, q = (distribution(x, temperature, top_p) for x in logits)
        tokens = torch.stack([draw(q[:, k], own[0, :, k]) for k in range(5)], dim=1)
        verdict = verify(p, q, tokens, many, own[1], own[2, :, 0])
        found.append([p, q, tokens, *vars(verdict).values()])
    assert len(verdict.accepted.unique()) > 3
    assert_close(found[1], found[0])


def test_greedy_answers_are_those_of_the_cpu() -> None:
    answers = []
    for pair in (pocket(CPU), pocket(DEVICE)):
        prompts = [question(chat) for chat in pair.held_out[:4]]
        decoded = decode(pair.target, pair.drafter, prompts, max_new_tokens=20)
        answers.append((decoded.tokens, decoded.rounds["accepted"].tolist()))
    assert answers[0] == answers[1] and len(set(answers[0][1])) > 3


# No synchronisation


def test_a_question_to_the_gpu_is_noticed() -> None:
    x = torch.ones(3, device=DEVICE)
    with counted_synchronisations() as found:
        x.sum().item(), x.tolist()
    assert DRY or len(found) >= 2


@pytest.mark.parametrize("packed", [False, True])
def test_no_part_of_a_training_step_synchronises(packed: bool) -> None:
    target, drafter = models()
    on_host = batch_of(packed)

    def step() -> None:
        batch = on_host.to(DEVICE)
        blocks = draw_blocks(batch, ANCHORS, 3, mask_token_id=63, seed=1)
        features = target.batch_features(batch, LAYERS)
        slots = drafter.slots(blocks, features.context, features.last)
        heads = drafter.lm_head.weight, drafter.markov_w2_weight
        dspark_objective(slots, *heads, chunk=9).loss.backward()
        assert {x.device.type for x in tensors(vars(batch))} == {DEVICE.type}

    step()
    with sync_debug_mode("error"):
        step()


def run_of(out: Path, compile: bool = False, **settings: Any) -> Run:
    """A run that has not taken a step."""
    config = TrainConfig(9, batch_size=4, num_anchors=ANCHORS, **settings)
    return Run(models()[1], config, random_chats(16), out, Processes(), compile=compile)


def test_a_runs_gradients_do_not_wait(tmp_path: Path) -> None:
    """Of several micro-batches, in bfloat16, whose kernels are others."""
    run = run_of(tmp_path, accumulate=2, max_length=60, pack_length=60, precision="bf16")
    source = live_features(models()[0], LAYERS)
    run.advance(source)
    run.backward(source)
    with sync_debug_mode("error"):
        loss, stacked, _ = run.backward(source)
    assert loss.isfinite() and stacked.isfinite().all()


SAMPLED = {"temperature": 0.8, "top_p": 0.95}
SETTINGS = {"plain": {}, "greedy": {}, "sampled": SAMPLED, "by confidence": {"threshold": 0.5}}


@pytest.mark.parametrize("way", SETTINGS)
def test_a_round_of_decoding_synchronises_once(way: str) -> None:
    """To know what was accepted; rows accept unequal numbers of tokens, and end one by one."""
    settings, drafted = SETTINGS[way], way != "plain"
    pair = pocket(DEVICE)
    prompts = [question(chat) for chat in pair.held_out[:4]]
    given = pair.target, pair.drafter if drafted else None, prompts
    decode(*given, max_new_tokens=24, **settings)
    decoding = decode_rounds(*given, max_new_tokens=24, **settings)
    next(decoding)
    with counted_synchronisations() as found:
        rounds = list(decoding)
    assert (len({r.accepted for r in rounds}) > 3) == drafted
    assert len(found) <= max(r.number for r in rounds), found


# Compiled steps


def test_a_run_goes_on_from_its_checkpoint_compiled_or_not(
    counters: dict[str, Any], tmp_path: Path
) -> None:
    def losses(out: str, **options: Any) -> list[float]:
        target, drafter = models()
        config = replace(runs.CONFIG, num_anchors=ANCHORS, evaluate_anchors=ANCHORS)
        return runs.losses(tmp_path / out, config, target=target, drafter=drafter, **options)

    whole = losses("whole")
    assert len(set(whole)) == runs.STEPS
    assert len(losses("parts", on_metrics=runs.interrupt_at(4))) == 4
    assert losses("parts", compile=True) == pytest.approx(whole, rel=1e-3)


def steps_over_shapes(run: Run) -> list[list[Tensor]]:
    """Loss and gradients of a step for twenty sizes of rows, numbers of anchors and layouts."""
    source, shapes, found = live_features(models()[0], LAYERS), set(), []
    for i in range(20):
        batch = batch_of(i % 2 == 1, chats=4 + i % 3, seed=i, low=20 + 3 * i, high=40 + 4 * i)
        run.order = SimpleNamespace(micro_batches=lambda step, batch=batch: [(batch, 3)])
        run.config = replace(run.config, num_anchors=ANCHORS + 2 * i)
        loss, *_ = run.backward(source)
        found.append([loss, *runs.gradients(run.drafter).values()])
        run.drafter.zero_grad()
        shapes.add((*batch.input_ids.shape, *batch.seq_lens.shape))
    assert len(shapes) == 20
    return found


def test_a_compiled_step_is_the_eager_one_and_few_graphs_serve_all_shapes(
    counters: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for compile in (False, True):
        torch._dynamo.reset()
        counters.clear()
        found.append(steps_over_shapes(run_of(tmp_path, compile)))
        # An eager step compiles its attention alone, and on a GPU alone.
        least = 0 if DRY and not compile else 1
        assert least <= counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]
    # A sign(p - q) that rounding turns moves a gradient more than rounding itself.
    assert_close(found[1], found[0], 1e-3)
