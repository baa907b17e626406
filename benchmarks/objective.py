"""The chunked objective against the textbook one, forward plus backward, and what each must hold.

The textbook form makes the logits of all slots, then their softmaxes in fp32, and leaves the
gradient to autograd.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import compare, median_seconds, peak_bytes
from dspark_lab.common import DSparkForwardOutput
from dspark_lab.model import Slots, dspark_objective, output_objective

BATCH, ANCHORS, BLOCK, VOCAB, HIDDEN, RANK = 2, 32, 7, 49152, 576, 64
TEXTBOOK_FITS = 128


@dataclass
class Problem:
    slots: Slots
    head: Tensor
    w2: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that need a gradient; the head is frozen."""
        s = self.slots
        assert s.latent is not None and s.confidence_pred is not None
        return s.hidden, s.latent, s.confidence_pred, self.w2

    def chunked(self, chunk: int | None = None) -> tuple[Tensor, ...]:
        loss = dspark_objective(self.slots, self.head, self.w2, chunk=chunk).loss
        return torch.autograd.grad(loss, self.inputs)

    def textbook(self, loss: Callable[..., Tensor] | None = None) -> tuple[Tensor, ...]:
        """The gradients of the textbook loss, or of what stands for it."""
        loss = loss or textbook_loss
        return torch.autograd.grad(loss(self.slots, self.head, self.w2), self.inputs)


def textbook_loss(slots: Slots, head: Tensor, w2: Tensor) -> Tensor:
    assert slots.latent is not None and slots.target_hidden is not None
    output = DSparkForwardOutput(
        draft_logits=F.linear(slots.hidden, head) + F.linear(slots.latent, w2),
        target_ids=slots.target_ids,
        eval_mask=slots.eval_mask,
        block_keep_mask=slots.block_keep_mask,
        confidence_pred=slots.confidence_pred,
        aligned_target_logits=F.linear(slots.target_hidden, head),
    )
    return output_objective(output).loss


def problem(
    batch: int = BATCH,
    anchors: int = ANCHORS,
    vocab: int = VOCAB,
    hidden: int = HIDDEN,
    rank: int = RANK,
    block: int = BLOCK,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Problem:
    size = (batch, anchors, block)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    supervised = torch.ones(size, dtype=torch.bool, device=device)
    ids = torch.randint(vocab, size, device=device)
    slots = Slots(
        hidden=normal(*size, hidden).requires_grad_(),
        latent=normal(*size, rank).requires_grad_(),
        confidence_pred=normal(*size).requires_grad_(),
        target_hidden=normal(*size, hidden),
        target_ids=ids,
        prev_ids=ids,
        eval_mask=supervised,
        block_keep_mask=supervised[..., 0],
    )
    w2 = normal(vocab, rank, scale=0.02).requires_grad_()
    return Problem(slots, normal(vocab, hidden, scale=0.04), w2)


def run() -> Iterator[str]:
    torch.manual_seed(0)
    p = problem()
    bf16 = under_bf16(p.chunked)
    yield (
        f"{BATCH} x {ANCHORS} x {BLOCK} slots, V {VOCAB}, d {HIDDEN}, rank {RANK}, all supervised; "
        "bf16: fp32 weights under autocast"
    )
    yield compare("fp32 against textbook fp32", p.chunked, p.textbook, runs=5)
    yield compare("bf16 products against textbook fp32", bf16, p.textbook, runs=5)
    yield compare("bf16 products against textbook bf16", bf16, under_bf16(p.textbook), runs=3)
    yield f"the fp32 matrix products alone, all slots at once: {products(p) * 1e3:.2f} ms"
    yield "peak memory in MB for one row; the gradients, which every form must hold, are part of it"
    yield f"{'anchors':>9} {'gradients':>10} {'fp32':>8} {'bf16':>8} {'textbook fp32':>14}   share"
    for anchors in (32, 64, 128, 256, 512, 1024):
        yield memory(anchors)


def under_bf16(call: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return inside


def products(p: Problem) -> float:
    """Seconds of the products that every form needs: three logits and three gradients."""
    s = p.slots
    assert s.latent is not None and s.target_hidden is not None
    hidden, teacher, latent = (
        x.detach().flatten(0, 2) for x in (s.hidden, s.target_hidden, s.latent)
    )
    w2 = p.w2.detach()

    def call() -> None:
        torch.mm(teacher, p.head.T)
        logits = torch.mm(hidden, p.head.T).addmm_(latent, w2.T)
        torch.mm(logits, p.head), torch.mm(logits, w2), torch.mm(logits.T, latent)

    return median_seconds(call, runs=5)


def memory(anchors: int) -> str:
    p = problem(batch=1, anchors=anchors)
    gradients = sum(x.nbytes for x in p.inputs)
    fp32 = peak_bytes(p.chunked)
    line = f"{anchors:>9} {gradients / 1e6:>10.0f} {fp32 / 1e6:>8.0f}"
    if anchors > TEXTBOOK_FITS:
        return line
    bf16, textbook = peak_bytes(under_bf16(p.chunked)), peak_bytes(p.textbook)
    line += f" {bf16 / 1e6:>8.0f} {textbook / 1e6:>14.0f}"
    return line + f"   {fp32 / textbook:.2f}, {bf16 / textbook:.2f}"
