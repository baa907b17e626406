"""Calls of the library on fake CUDA tensors, in a process of its own.

Fake tensors have shapes, dtypes and devices but no values. So what asks for a value raises
(.item(), a branch on a tensor, a shape that depends on data), and so does an operation on tensors
of two devices. What is made on the host and moved raises nothing, so it is recorded.

    python -m tests.fake_cuda FOLDER

compiles in FOLDER what CPU builds of torch lack for them, makes the calls of ``CALLS`` and
``PLANTED``, and prints what came of each as JSON.
"""

import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import load_inline

from dspark_lab.attention import ContextRanges, backends, block_mask
from dspark_lab.blocks import PER, Blocks, Layout, cut_blocks
from dspark_lab.chats import Batch
from dspark_lab.common import AcceptRatePredictor, DSparkForwardOutput
from dspark_lab.model import (
    MARKOV_HEADS,
    Drafter,
    DrafterConfig,
    MarkovHead,
    Slots,
    Sums,
    Yarn,
    build_markov_head,
)
from dspark_lab.training import Forward, Processes, TrainConfig
from tests.recorder import tensors

# Indexing needs a device guard: one that does nothing. The backward pass asks the hooks whether
# torch is built for CUDA, and draws from a seed ask them for a generator. As torch has its own
# hooks at hand since it was imported, these are put in their place.
GUARD = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct FakeGuard : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  Device getDevice() const override { return Device(kCUDA, 0); }
  Stream getStream(Device device) const noexcept override {
    return Stream(Stream::DEFAULT, device);
  }
};

struct FakeGenerator : CPUGeneratorImpl {
  FakeGenerator() { device_ = Device(kCUDA, 0); }
};

struct FakeHooks : CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  Generator getNewGenerator(DeviceIndex) const override {
    return make_generator<FakeGenerator>();
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
auto* hooks = new (const_cast<CUDAHooksInterface*>(&detail::getCUDAHooks())) FakeHooks;

} // namespace at
"""

ROWS, SEQ, ANCHORS, SLOTS = 2, 9, 2, 3
VOCAB, HIDDEN, RANK, HEAD = 13, 32, 6, 16
QUERIES = ANCHORS * SLOTS
TOKENS, BLOCKS, PLACES = (ROWS, SEQ), (ROWS, ANCHORS), (ROWS, ANCHORS, SLOTS)
CUDA = torch.device("cuda")

Given = tuple[tuple, dict[str, Any]]


def given(*args: Any, **options: Any) -> Given:
    return args, options


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device=CUDA)


def flags(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=CUDA)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that ask for a gradient."""
    return torch.ones(shape, dtype=dtype, device=CUDA, requires_grad=True)


def fixed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=CUDA)


def packing(packed: bool) -> dict[str, Tensor]:
    marks = {"doc_remaining": ints(*TOKENS), "position_ids": ints(*TOKENS)}
    return {**marks, "seq_lens": ints(ROWS, 3)} if packed else {}


def batch(packed: bool) -> Batch:
    return Batch.of_tokens(ints(*TOKENS), flags(*TOKENS), **packing(packed))


def blocks(packed: bool = True, layout: Layout = "anchor_predicts") -> Blocks:
    anchors = ints(*BLOCKS), flags(*BLOCKS)
    return cut_blocks(batch(packed), *anchors, SLOTS, mask_token_id=VOCAB - 1, layout=layout)


def ranges() -> ContextRanges:
    return ContextRanges.of(blocks())


def under_mask(packed: bool, **options: Any) -> Given:
    docs = {"doc_ids": ints(*TOKENS)} if packed else {}
    sizes = {"seq_len": SEQ, "block_size": SLOTS}
    return given(ints(*BLOCKS), flags(*BLOCKS), **sizes, **docs, **options)


def queries_keys_values(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    lengths = {4: QUERIES, 2: SEQ + QUERIES}
    return [floats(ROWS, heads, lengths[heads], HEAD, dtype=dtype) for heads in (4, 2, 2)]


def on_gpu(make: Callable[[], Any]) -> Any:
    with CUDA:
        return make()


def markov_head(kind: str) -> MarkovHead:
    return on_gpu(lambda: build_markov_head(kind, VOCAB, RANK, HIDDEN))


def drafter(kind: str = "vanilla", layers: int = 1, variant: str = "none") -> Drafter:
    """``VARIANTS`` has what other drafters than DSpark's may have."""
    config = DrafterConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        target_layer_ids=(0, 1),
        block_size=SLOTS,
        mask_token_id=VOCAB - 1,
        num_anchors=ANCHORS,
        markov_head_type=kind,
        markov_rank=RANK,
        confidence_head_with_markov=kind != "none",
        **VARIANTS[variant],
        layer_types=["sliding_attention" if variant == "window" else "full_attention"] * layers,
    )
    made = on_gpu(lambda: Drafter(config))
    if config.draft_vocab_size is not None:
        made.use_target_embeddings(fixed(VOCAB, HIDDEN), fixed(VOCAB, HIDDEN))
    return made


VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "anchor given": {"sample_from_anchor": False},
    "window": {"sliding_window": 3},
    "reduced vocabulary": {"draft_vocab_size": VOCAB // 2},
    "soft cap": {"final_logit_softcapping": 2.0, "logit_scale": 0.5},
    "yarn": {"yarn": Yarn(factor=2.0, original_max_position_embeddings=8)},
}


def features(teacher: bool = True) -> list[Tensor]:
    return [fixed(*TOKENS, width) for width in (2 * HIDDEN, HIDDEN)[: 1 + teacher]]


def slots(latent: bool = True, teacher: bool = True) -> Slots:
    return Slots(
        hidden=floats(*PLACES, HIDDEN),
        latent=floats(*PLACES, RANK) if latent else None,
        confidence_pred=floats(*PLACES),
        target_hidden=fixed(*PLACES, HIDDEN) if teacher else None,
        target_ids=ints(*PLACES),
        prev_ids=ints(*PLACES),
        eval_mask=flags(*PLACES),
        block_keep_mask=flags(*BLOCKS),
    )


def output(teacher: bool) -> DSparkForwardOutput:
    marks = ints(*PLACES), flags(*PLACES), flags(*BLOCKS)
    target = fixed(*PLACES, VOCAB) if teacher else None
    return DSparkForwardOutput(floats(*PLACES, VOCAB), *marks, floats(*PLACES), target)


def terms(teacher: bool, step: bool) -> dict[str, Any]:
    """Of an objective: ``step`` has the divisor of a whole step."""
    options = {} if teacher else {"l1_weight": 0.0, "confidence_weight": 0.0}
    return {**options, "normaliser": fixed()} if step else options


def objective(latent: bool, teacher: bool, step: bool) -> Given:
    w2 = floats(VOCAB, RANK) if latent else None
    return given(slots(latent, teacher), floats(VOCAB, HIDDEN), w2, **terms(teacher, step))


def objective_body(
    latent: bool = True,
    teacher: bool = True,
    asks: bool = True,
    dtype: torch.dtype = torch.float32,
    cap: float | None = None,
    reduced: bool = False,
) -> Given:
    """What ``dspark_objective`` hands to its operator, whose body fake tensors do not enter."""
    count, own = ROWS * QUERIES, VOCAB // 2 if reduced else VOCAB
    state, head = fixed(count, HIDDEN, dtype=dtype), fixed(own, HIDDEN, dtype=dtype)
    z, w2 = (fixed(n, RANK, dtype=dtype) if latent else None for n in (count, own))
    marks = ints(count), flags(count), fixed(count)
    whole = (fixed(VOCAB, HIDDEN, dtype=dtype), ints(own)) if reduced else (None, None)
    rules = cap, 0.5, cap, 0.5
    states = state, z, state if teacher else None
    return given(*states, *marks, head, w2, *whole, *rules, 0.1, 0.9, 5, asks, asks)


def training_forward(
    kind: str = "vanilla",
    packed: bool = True,
    precision: str = "fp32",
    vocabulary: str = "full",
    variant: str = "none",
) -> Given:
    config = TrainConfig(1, precision=precision, vocabulary=vocabulary)
    # Which tokens occur is counted on the host, before the training; fake ones cannot be counted.
    with mock.patch("dspark_lab.training.loop.seen_tokens", lambda *_: _Seen()):
        forward = Forward(drafter(kind, 2, variant), config, [])
    return given(forward, blocks(packed, layout_of(variant)), *features(), fixed(), 0)


def training_slots(variant: str) -> Given:
    (forward, *states, _, _), _ = training_forward(variant=variant)
    return given(forward, *states)


def training_objective(vocabulary: str) -> Given:
    (forward, *_), _ = training_forward(vocabulary=vocabulary)
    return given(forward, slots(), fixed(), 0)


class _Seen:
    """The tokens that occur: the first five."""

    def nonzero(self) -> Tensor:
        return torch.arange(5).unsqueeze(1)


def layout_of(variant: str) -> Layout:
    return "anchor_given" if variant == "anchor given" else "anchor_predicts"


def whole_forward(kind: str = "vanilla", packed: bool = True, variant: str = "none") -> Given:
    model, (context, last) = drafter(kind, variant=variant), features()
    return given(model, ints(*TOKENS), context, flags(*TOKENS), last, **packing(packed))


def backbone(
    kind: str = "vanilla",
    backend: str = "auto",
    packed: bool = True,
    teacher: bool = True,
    variant: str = "none",
) -> Given:
    model, drawn = drafter(kind, variant=variant), blocks(packed, layout_of(variant))
    return given(model, drawn, *features(teacher), backend=backend)


def drafting(
    kind: str = "vanilla", length: int | None = None, even: bool = True, variant: str = "none"
) -> Given:
    model, cache = cached(kind, even, variant)
    return given(model, ints(ROWS), cache, lambda logits: logits.argmax(dim=-1), length)


def reading(even: bool) -> Given:
    model, cache = cached("vanilla", even)
    return given(model, *features(teacher=False), cache, [3] * ROWS)


def cached(kind: str, even: bool, variant: str = "none") -> tuple[Drafter, Any]:
    """A drafter, and a cache whose rows are of one length or not."""
    model = drafter(kind, variant=variant).requires_grad_(False)
    cache = model.start_cache(ROWS, 2 * SEQ + SLOTS)
    model.read(*features(teacher=False), cache, [2, 2 if even else 1])
    return model, cache


def of(make: Callable[..., Given], **choices: Any) -> dict[str, Callable[[], Given]]:
    """Case -> what makes its arguments, for each combination of the choices."""
    cases: dict[str, Callable[[], Given]] = {}
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        label = "".join(f", {name} {value}" for name, value in chosen.items())
        cases[label] = partial(make, **chosen)
    return cases


BOTH = (True, False)
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("none", *MARKOV_HEADS)
BACK_ENDS = ("auto", "dense", "flex")
OTHERS = [variant for variant in VARIANTS if variant != "none"]

# Function -> its cases. A method's first argument is its object.
TABLE = {
    "attention.ContextRanges.of": of(lambda packed: given(blocks(packed)), packed=BOTH),
    "attention.attend": of(
        lambda backend, dtype: given(*queries_keys_values(dtype), ranges(), backend=backend),
        backend=BACK_ENDS,
        dtype=DTYPES,
    ),
    "attention.block_attention": of(
        lambda backend, packed: (
            (*queries_keys_values(), *under_mask(packed)[0]),
            under_mask(packed, backend=backend)[1],
        ),
        backend=BACK_ENDS,
        packed=BOTH,
    ),
    "attention.block_mask": of(lambda: given(ranges(), 4)),
    "attention.context_ranges": of(under_mask, packed=BOTH),
    "attention.dense_mask": of(lambda: given(ranges())),
    "attention.mask_form": of(lambda backend: given(ranges(), backend), backend=("dense", "flex")),
    "attention.mask_mod": of(lambda: given(ranges())),
    "attention.training_block_mask": of(under_mask, packed=BOTH),
    "attention.training_dense_mask": of(under_mask, packed=BOTH),
    "attention.training_mask_mod": of(under_mask, packed=BOTH),
    "blocks.Blocks.reordered": of(lambda: given(blocks(), ints(ANCHORS))),
    "blocks.Blocks.row": of(lambda: given(blocks(), 1)),
    "blocks.cut_blocks": of(
        lambda packed: given(batch(packed), ints(*BLOCKS), flags(*BLOCKS), SLOTS), packed=BOTH
    ),
    "blocks.draw_anchors": of(
        lambda packed, per: given(batch(packed), ANCHORS, per=per, seed=3), packed=BOTH, per=PER
    ),
    "blocks.draw_blocks": of(
        lambda packed, per, seed: given(batch(packed), ANCHORS, SLOTS, seed=seed, per=per),
        packed=BOTH,
        per=PER,
        seed=(None, 3),
    ),
    "blocks.times_supervised": of(lambda: given(blocks())),
    "blocks.Blocks.of": of(lambda packed: under_mask(packed), packed=BOTH),
    "chats.Batch.of_tokens": of(
        lambda packed: given(ints(*TOKENS), flags(*TOKENS), **packing(packed)), packed=BOTH
    ),
    "chats.Batch.row": of(lambda: given(batch(True), 1)),
    "chats.Batch.to": of(lambda: given(batch(True), CUDA)),
    "common.AcceptRatePredictor.forward": of(
        lambda: given(on_gpu(lambda: AcceptRatePredictor(HIDDEN)), floats(*PLACES, HIDDEN))
    ),
    "common.build_anchor_candidate_mask": of(
        lambda packed, dtype: given(
            SEQ, flags(*TOKENS).to(dtype), ints(*TOKENS) if packed else None
        ),
        packed=BOTH,
        dtype=(torch.bool, torch.bfloat16),
    ),
    "common.build_eval_mask": of(
        lambda packed: given(
            SEQ,
            flags(*TOKENS),
            ints(*PLACES),
            ints(*PLACES),
            flags(*BLOCKS),
            *((ints(*TOKENS), ints(*BLOCKS)) if packed else ()),
        ),
        packed=BOTH,
    ),
    "common.context_doc_ids": of(lambda: given(ints(ROWS, 3), SEQ, CUDA)),
    "common.create_noise_embed": of(
        lambda: given(
            on_gpu(lambda: nn.Embedding(VOCAB, HIDDEN)),
            ints(*TOKENS),
            ints(*BLOCKS),
            flags(*BLOCKS),
            VOCAB - 1,
            SLOTS,
        )
    ),
    "common.create_position_ids": of(
        lambda packed: given(ints(*BLOCKS), SLOTS, ints(*TOKENS) if packed else None), packed=BOTH
    ),
    "common.extract_context_feature": of(
        lambda: given([floats(*TOKENS, HIDDEN) for _ in range(4)], [-1, 0, 2])
    ),
    "common.sample_anchor_positions": of(
        lambda packed, seeded: given(
            SEQ,
            flags(*TOKENS),
            ANCHORS,
            CUDA,
            ints(*TOKENS) if packed else None,
            torch.Generator(CUDA) if seeded else None,
        ),
        packed=BOTH,
        seeded=BOTH,
    ),
    "decoding.distribution": of(
        lambda temperature, top_p: given(fixed(ROWS, SLOTS, VOCAB), temperature, top_p),
        temperature=(0, 1e-9, 0.7),
        top_p=(1, 0.9),
    ),
    "decoding.residual": of(lambda: given(fixed(ROWS, VOCAB), fixed(ROWS, VOCAB))),
    "decoding.verification.draw": of(lambda: given(fixed(ROWS, VOCAB), fixed(ROWS))),
    "decoding.verify": of(
        lambda: given(
            fixed(ROWS, SLOTS + 1, VOCAB),
            fixed(ROWS, SLOTS, VOCAB),
            ints(ROWS, SLOTS),
            ints(ROWS),
            fixed(ROWS, SLOTS),
            fixed(ROWS),
        )
    ),
    "explore.mask_regions": of(
        lambda documents: given(blocks(), documents=documents), documents=BOTH
    ),
    "explore.tile_states": of(lambda: given(block_mask(ranges(), 4))),
    "model.Drafter.confidence": of(
        lambda kind: given(drafter(kind), floats(*PLACES, HIDDEN), floats(*PLACES, RANK)),
        kind=KINDS,
    ),
    "model.Drafter.forward": of(whole_forward, kind=KINDS)
    | of(whole_forward, packed=(False,))
    | of(whole_forward, variant=OTHERS),
    "model.Drafter.mask_forms": of(
        lambda variant: given(drafter(variant=variant), blocks(), "flex"), variant=VARIANTS
    ),
    "model.Drafter.objective": of(
        lambda variant: given(drafter(variant=variant), slots()), variant=VARIANTS
    ),
    "model.Drafter.whole_vocabulary": of(
        lambda: given(drafter(variant="reduced vocabulary"), floats(ROWS, VOCAB // 2))
    ),
    "model.Drafter.output": of(
        lambda latent, teacher: given(drafter(), slots(latent, teacher)), latent=BOTH, teacher=BOTH
    ),
    "model.Drafter.propose": of(drafting, kind=KINDS)
    | of(drafting, length=(2,), even=BOTH)
    | of(drafting, variant=OTHERS),
    "model.Drafter.read": of(reading, even=BOTH),
    "model.Drafter.reset_parameters": of(lambda: given(drafter())),
    "model.Drafter.slots": of(backbone, kind=KINDS)
    | of(backbone, backend=("dense", "flex"))
    | of(backbone, packed=(False,), teacher=BOTH)
    | of(backbone, variant=OTHERS),
    "model.Drafter.start_cache": of(lambda: given(drafter(), ROWS, SEQ)),
    "model.Drafter.use_target_embeddings": of(
        lambda: given(drafter(), fixed(VOCAB, HIDDEN), fixed(VOCAB, HIDDEN))
    ),
    "model.MarkovHead.embed": of(
        lambda kind: given(markov_head(kind), ints(*PLACES)), kind=MARKOV_HEADS
    ),
    "model.MarkovHead.latent": of(
        lambda kind: given(markov_head(kind), ints(*PLACES), floats(*PLACES, HIDDEN)),
        kind=MARKOV_HEADS,
    ),
    "model.MarkovHead.step": of(
        lambda kind: given(markov_head(kind), None, floats(ROWS, RANK), floats(ROWS, HIDDEN)),
        kind=MARKOV_HEADS,
    ),
    "model.Sums.from_stacked": of(lambda: given(fixed(11, SLOTS))),
    "model.Sums.stacked": of(lambda: given(Sums.from_stacked(fixed(11, SLOTS)))),
    "model.dspark_objective": of(objective, latent=BOTH, teacher=BOTH, step=BOTH),
    "model.objective._chunked._init_fn": of(objective_body, latent=BOTH, teacher=BOTH)
    | of(objective_body, asks=BOTH, dtype=DTYPES)
    | of(objective_body, cap=(None, 2.0), reduced=BOTH, dtype=DTYPES),
    "model.output_objective": of(
        lambda teacher, step: given(output(teacher), **terms(teacher, step)),
        teacher=BOTH,
        step=BOTH,
    ),
    "model.slot_weights": of(lambda: given(flags(*PLACES), 4.0, torch.float32)),
    "model.survival": of(lambda: given(floats(*PLACES), flags(*PLACES))),
    "training.Processes.total": of(lambda: given(Processes("none"), fixed())),
    "training.Processes.wrap": of(lambda: given(Processes("none"), drafter(), drafter(), False)),
    "training.Forward.objective": of(training_objective, vocabulary=("full", "seen")),
    "training.Forward.read": of(training_slots, variant=VARIANTS),
    "training.Forward.forward": of(training_forward, kind=KINDS)
    | of(training_forward, packed=(False,))
    | of(training_forward, precision=("bf16",), vocabulary=("full", "seen"))
    | of(training_forward, vocabulary=("seen",))
    | of(training_forward, variant=OTHERS),
}

CALLS = {name + case: (name, make) for name, cases in TABLE.items() for case, make in cases.items()}


def moved(x: Tensor) -> Tensor:
    return torch.zeros(x.shape).to(x.device)


# Faults put on the confidences, half-way between the drafter's input and the loss.
PLANTED: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda x: None,
    "a question": lambda x: x.sum().item(),
    "a question in the backward pass": lambda x: x.register_hook(lambda d: d * d.sum().item()),
    "a tensor on the host": lambda x: x.add_(torch.zeros(x.shape)),
    "a tensor moved from the host": lambda x: x.add_(moved(x)),
    "a tensor moved from the host in the backward pass": lambda x: x.register_hook(
        lambda d: d + moved(d)
    ),
}


class Watch(TorchDispatchMode):
    """The operations that take or make a tensor on the host, and those that the host waits for."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.on_host: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return out
        devices = {device_of(x) for x in tensors((args, kwargs, out))}
        if "cpu" in devices:
            self.on_host.append(str(func))
            if len(devices) > 1 and not kwargs.get("non_blocking"):
                self.waits.append(str(func))
        return out


def device_of(x: Tensor) -> str:
    """Where a tensor is; asking a fake one for its device would be one more operation."""
    return (x.fake_device if isinstance(x, FakeTensor) else x.device).type


# The back ends of attention that the latest call ran, each with its block mask.
RAN: list[tuple[str, Any]] = []


def noted(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel of a back end, which notes each call in ``RAN``."""

    def run(*args: Any, **options: Any) -> Tensor:
        RAN.append((name, options.get("block_mask")))
        return kernel(*args, **options)

    run.failed = False
    return run


def held(result: Any) -> list[Tensor]:
    """The tensors of a result, those in its dataclasses too."""
    leaves = tree_leaves(result, is_leaf=is_dataclass)
    return [
        x for leaf in leaves for x in (held(vars(leaf)) if is_dataclass(leaf) else tensors(leaf))
    ]


def find(name: str, args: tuple) -> tuple[Callable[..., Any], tuple]:
    """The function of this name and its arguments; a method is that of its object."""
    owner, _, last = f"dspark_lab.{name}".rpartition(".")
    owner = pkgutil.resolve_name(owner)
    if inspect.isclass(owner) and args and isinstance(args[0], owner):
        return getattr(args[0], last), args[1:]
    return getattr(owner, last), args


def outcome(name: str, make: Callable[[], Given]) -> dict[str, Any]:
    """What came of a call and of the backward pass of all that it returns."""
    RAN.clear()
    watch, results, leaves, error = Watch(), [], [], None
    try:
        with FakeTensorMode():
            args, options = make()
            function, rest = find(name, args)
            modules = [x for x in args if isinstance(x, nn.Module)]
            leaves = [*held((args, options)), *(p for m in modules for p in m.parameters())]
            with watch:
                results = held(function(*rest, **options))
                losses = [x.sum() for x in results if x.requires_grad]
                if losses:
                    torch.stack(losses).sum().backward()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "error": error,
        "on_host": watch.on_host,
        "waits": watch.waits,
        "devices": sorted({x.device.type for x in results}),
        "gradients": sum(x.is_leaf and x.grad is not None for x in leaves),
        "back_ends": [kernel for kernel, _ in RAN],
        "block_masks": len({id(mask) for _, mask in RAN if mask is not None}),
    }


def outcome_of_fault(plant: Callable[[Tensor], Any]) -> dict[str, Any]:
    """What comes of the whole training forward where a fault is put on its confidences."""
    confidence = Drafter.confidence

    def faulty(*args: Any) -> Any:
        result = confidence(*args)
        plant(result)
        return result

    with mock.patch.object(Drafter, "confidence", faulty):
        return outcome("training.Forward.forward", training_forward)


def imitate_cuda(folder: str) -> None:
    """Give the process what fake CUDA tensors need of a GPU, and leave kernels uncompiled."""
    load_inline(
        "fake_cuda",
        GUARD,
        build_directory=folder,
        extra_cflags=["-O0"],
        is_python_module=False,
        no_implicit_headers=True,
    )
    # Autocast asks for a GPU, and fake tensors know no pinned memory.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    Tensor.pin_memory = pinned
    torch.compile = lambda function, **_: function
    torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    backends.flex = noted("flex", torch_flex.flex_attention)
    for name in ("flex_attention", "scaled_dot_product_attention", "blockwise_attention"):
        setattr(backends, name, noted(name, getattr(backends, name)))


def pinned(tensor: Tensor) -> Tensor:
    """The tensor itself; a real one of an expanded tensor fails."""
    assert tensor.is_contiguous()
    return tensor


def main(folder: str) -> None:
    imitate_cuda(folder)
    calls = {label: outcome(name, make) for label, (name, make) in CALLS.items()}
    planted = {fault: outcome_of_fault(plant) for fault, plant in PLANTED.items()}
    print(json.dumps({"calls": calls, "planted": planted}), flush=True)
    # Python's own way out now and then aborts on torch's thread for backward passes on the device.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
