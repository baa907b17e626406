"""`block_attention`: every back end against one reference, forward and gradient.

The reference is softmax attention in float64 under the oracle's mask. On the CPU FlexAttention has
no backward pass, so there it is compared forward only.
"""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from dspark_lab.attention import block_attention, choose_backend, training_block_mask
from tests import oracle

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]

EAGER = ["dense", "blockwise"]
BACKENDS = [*EAGER, "flex"]


@dataclass
class Problem:
    """Shapes of one attention call."""

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    seq_len: int = 37
    num_anchors: int = 5
    block_size: int = 3
    dim: int = 16
    packed: bool = False
    dummies: str = "some"
    order: str = "sorted"
    scale: float | None = None
    loudness: float = 1.0

    def tensors(self, dtype=torch.float32, device="cpu"):
        """q, k, v; the other arguments; the oracle's mask as a tensor."""
        rng = torch.Generator().manual_seed(sum(map(ord, self.name)))
        queries = self.num_anchors * self.block_size
        keys = self.seq_len + queries

        def normal(heads, length):
            shape = (self.batch, heads, length, self.dim)
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        q = normal(self.heads, queries) * self.loudness
        k, v = normal(self.kv_heads, keys), normal(self.kv_heads, keys)
        shape = (self.batch, self.num_anchors)
        anchors = torch.randint(max(self.seq_len, 1), shape, generator=rng)
        if self.order == "sorted":
            anchors = anchors.sort(dim=1).values
        kept = {"none": 1.1, "some": 0.6, "all": 0.0}[self.dummies]
        keep = torch.rand(shape, generator=rng) < kept
        starts = torch.rand(self.batch, self.seq_len, generator=rng) < 0.15
        docs = starts.long().cumsum(1) if self.packed else None
        rule = self.seq_len, self.block_size, None if docs is None else docs.tolist()
        mask = oracle.dense_mask(anchors.tolist(), keep.tolist(), *rule)
        mask = torch.tensor(mask, device=device)
        q, k, v = (t.to(device, dtype) for t in (q, k, v))
        options = {"anchor_positions": anchors.to(device), "block_keep_mask": keep.to(device)}
        options |= {"seq_len": self.seq_len, "block_size": self.block_size, "scale": self.scale}
        options["doc_ids"] = None if docs is None else docs.to(device)
        return (q, k, v), options, mask


PROBLEMS = [
    Problem("plain", dummies="none"),
    Problem("dummies"),
    Problem("only dummies", dummies="all"),
    Problem("packed", packed=True, seq_len=60),
    Problem("unsorted", order="any", packed=True),
    Problem("grouped heads", heads=6, kv_heads=2),
    Problem("one kv head", heads=3, kv_heads=1),
    Problem("no context", seq_len=0, dummies="all"),
    Problem("one token", seq_len=1),
    Problem("one anchor", num_anchors=1),
    Problem("one slot", block_size=1),
    Problem("one of all", batch=1, heads=1, kv_heads=1, num_anchors=1, block_size=1),
    Problem("a block longer than the row", seq_len=4, block_size=11),
    Problem("a given scale", scale=0.7),
    Problem("loud scores", loudness=60.0),
    Problem("long", batch=1, seq_len=300, num_anchors=40, block_size=7, packed=True),
]


def reference(q, k, v, mask, scale):
    """Softmax attention in float64; key head h serves a group of query heads."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    return scores.masked_fill(~mask[:, None], -math.inf).softmax(3) @ v


def with_gradients(function, q, k, v, weight):
    """The output, and the gradients of a weighted sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    grads = torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)
    return out.detach(), *grads


def close(got, expected, tolerance):
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


# How far outputs and gradients may be off. In double precision nothing is rounded to a narrower
# type on the way, and no small term is left out.
TOLERANCES = {torch.float32: (3e-6, 2e-5), torch.float64: (1e-10, 1e-10)}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, dtype) for name in EAGER for dtype in TOLERANCES] + [("flex", torch.float32)],
)
def test_every_backend_agrees_to_rounding(backend, dtype, problem):
    qkv, options, mask = problem.tensors(dtype)
    tolerances = TOLERANCES[dtype]
    if problem.loudness > 1 and dtype == torch.float32:
        tolerances = 2e-5, 3e-4
    with torch.no_grad():
        got = block_attention(*qkv, **options, backend=backend)
    assert (got.shape, got.dtype, got.device) == (qkv[0].shape, dtype, qkv[0].device)
    close(got, reference(*qkv, mask, problem.scale), tolerances[0])
    if backend == "flex":
        return
    torch.manual_seed(0)
    weight = torch.randn(qkv[0].shape, dtype=torch.float64)
    attend = partial(block_attention, **options, backend=backend)
    got = with_gradients(attend, *qkv, weight)
    doubles = [t.double() for t in qkv]
    expected = with_gradients(partial(reference, mask=mask, scale=problem.scale), *doubles, weight)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        close(a, b, tolerances[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", EAGER)
def test_half_precision_stays_half_and_close(backend, dtype):
    problem = Problem("half", packed=True)
    qkv, options, mask = problem.tensors(dtype)
    got = block_attention(*qkv, **options, backend=backend)
    assert got.dtype == dtype
    close(got, reference(*qkv, mask, None), 2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_positions_may_lie_the_other_way_round_in_memory(backend):
    problem = Problem("strided", heads=4, kv_heads=2)
    qkv, options, mask = problem.tensors()
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv]
    assert not any(t.is_contiguous() for t in strided)
    got = block_attention(*strided, **options, backend=backend)
    close(got, reference(*qkv, mask, None), 3e-6)


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gradient_for_one_input_alone_is_the_same(backend, which):
    problem = Problem("one gradient", heads=4, kv_heads=2, packed=True)
    qkv, options, mask = problem.tensors()
    grads = []
    attend = partial(block_attention, **options, backend=backend)
    for function in (attend, partial(reference, mask=mask, scale=None)):
        leaves = [t.clone().requires_grad_(i == which) for i, t in enumerate(qkv)]
        function(*leaves).square().sum().backward()
        assert [t.grad is not None for t in leaves] == [i == which for i in range(3)]
        grads.append(leaves[which].grad)
    close(*grads, 2e-5)


@pytest.mark.parametrize("backend", EAGER)
def test_an_unseen_key_has_no_gradient_at_all(backend):
    problem = Problem("unseen", packed=True)
    qkv, options, mask = problem.tensors()
    attend = partial(block_attention, **options, backend=backend)
    _, _, k_grad, v_grad = with_gradients(attend, *qkv, torch.ones_like(qkv[0]))
    unseen = ~mask.any(dim=1)
    assert unseen.any()
    for grad in (k_grad, v_grad):
        assert (grad.movedim(1, 2)[unseen] == 0).all()


def test_the_default_is_flex_on_cuda_and_blockwise_on_the_cpu():
    qkv, options, _ = Problem("default").tensors()
    expected = block_attention(*qkv, **options, backend="blockwise")
    for given in ({}, {"backend": "auto"}):
        assert torch.equal(block_attention(*qkv, **options, **given), expected)
    chosen = {"cpu": "blockwise", "cuda": "flex", "meta": "dense"}
    assert {name: choose_backend(torch.device(name)) for name in chosen} == chosen


def test_flex_says_that_it_has_no_gradient_on_the_cpu():
    qkv, options, _ = Problem("no gradient").tensors()
    for which in range(3):
        leaves = [t.clone().requires_grad_(i == which) for i, t in enumerate(qkv)]
        with pytest.raises((ValueError, NotImplementedError), match="(?i)flex") as caught:
            block_attention(*leaves, **options, backend="flex")
        assert "dense" in str(caught.value) or "blockwise" in str(caught.value)


def test_blockwise_refuses_a_device_that_is_not_the_cpu():
    qkv, options, _ = Problem("meta").tensors(device="meta")
    with pytest.raises(ValueError, match="(?s)(?=.*blockwise)(?=.*(?i:cpu))(?=.*meta)"):
        block_attention(*qkv, **options, backend="blockwise")


@pytest.mark.parametrize("backend", EAGER)
def test_compiled_whole_it_gives_the_same_with_gradients(backend):
    torch._dynamo.reset()
    qkv, options, _ = Problem("compiled", heads=4, packed=True).tensors()
    weight = torch.randn_like(qkv[0])
    attend = partial(block_attention, **options, backend=backend)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, *qkv, weight)
    for a, b in zip(got, with_gradients(attend, *qkv, weight), strict=True):
        close(a, b, 1e-6)


@pytest.mark.slow
def test_the_compiled_kernel_reads_tiles_made_before(cpp_compiler):
    """Not compiled, FlexAttention asks the mask function about every pair; the kernel does not."""
    torch._dynamo.reset()
    # Several tiles of each kind, and a last one that hangs over the edge.
    problem = Problem("tiles", heads=4, seq_len=700, num_anchors=50, block_size=7, dummies="none")
    qkv, options, mask = problem.tensors()
    del options["scale"]
    tiles = training_block_mask(**options)
    assert tiles.kv_num_blocks.any() and tiles.full_kv_num_blocks.any()
    compiled = torch.compile(block_attention, fullgraph=True)
    with torch.no_grad():
        got = compiled(*qkv, **options, backend="flex", block_mask=tiles)
    close(got, reference(*qkv, mask, None), 3e-6)


def test_the_number_of_threads_does_not_matter():
    qkv, options, _ = Problem("long", num_anchors=60, block_size=7).tensors()
    weight = torch.ones_like(qkv[0])
    attend = partial(block_attention, **options, backend="blockwise")
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(with_gradients(attend, *qkv, weight))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(a, b, 1e-5)
