"""Markov heads: a bias on a slot's logits that depends on the token before it.

The backbone predicts the slots of a block side by side, none knowing the others' tokens. A Markov
head adds to each slot's logits a bias of rank r (DSpark, section 3.2):

    bias = markov_w2(latent),   latent of width r, made from e = markov_w1[previous token]

and the kinds differ in the latent alone, where h is the slot's hidden state:

    vanilla: e;
    gated:   sigmoid(gate_proj [h; e]) * e;
    rnn:     tanh(o), with a state s over the block, zero at its first slot:
             g, c, o = joint_proj [s; e; h], and the next slot's s is
             sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c).

A new kind is a subclass of :class:`MarkovHead`, its line in :data:`MARKOV_HEADS` and its name in
:data:`MarkovKind`; drafter, checkpoint, decoding, cost and memory follow from the module.
"""

import copy
import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dspark_lab.checks import Count, Size, checked

MarkovKind = Literal["none", "vanilla", "gated", "rnn"]
Latent = Float[Tensor, "*axes rank"]
Hidden = Float[Tensor, "*axes hidden"]
Stepped = tuple[Latent | None, Latent]


@dataclass(eq=False)
class _Kept:
    """A tensor that autograd keeps."""

    tensor: Tensor


@checked
class MarkovHead(nn.Module):
    """The vanilla head, and the base of the others."""

    # Whether a slot's latent depends on earlier slots of its block.
    recurrent = False

    def __init__(self, vocab_size: Count, rank: Count, hidden_size: Count) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)

    def embed(self, prev_ids: Int[Tensor, "*axes"]) -> Latent:
        """The previous token's embedding, which the confidence head reads too."""
        return self.markov_w1(prev_ids)

    def latent(
        self,
        prev_ids: Int[Tensor, "batch anchor slot"],
        hidden: Float[Tensor, "batch anchor slot hidden"],
    ) -> Float[Tensor, "batch anchor slot rank"]:
        """The latent of every slot, teacher-forced."""
        embeddings = self.embed(prev_ids)
        if not self.recurrent:
            return self.step(None, embeddings, hidden)[1]
        state, outputs = None, []
        for embedding, h in zip(embeddings.unbind(-2), hidden.unbind(-2), strict=True):
            state, output = self.step(state, embedding, h)
            outputs.append(output)
        return torch.stack(outputs, dim=-2)

    def step(self, state: Latent | None, embedding: Latent, hidden: Hidden) -> Stepped:
        """The next slot's state and this slot's latent. A block begins with the state None."""
        return None, embedding

    @property
    def latent_weights(self) -> int:
        """Numbers in the matrices that make a slot's latent, markov_w1 and markov_w2 aside."""
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return sum(module.weight.numel() for module in linear if module is not self.markov_w2)

    def latent_kept(self, block_size: int) -> float:
        """Numbers a slot that :meth:`latent` keeps for the backward pass beside its inputs."""
        head, shape = copy.deepcopy(self).to("meta"), (1, 1, block_size)
        hidden = torch.empty(*shape, self.hidden_size, device="meta", requires_grad=True)
        ids = torch.empty(shape, dtype=torch.long, device="meta")
        alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

        def pack(tensor: Tensor) -> _Kept:
            kept = _Kept(tensor)
            alive.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            latent = head.latent(ids, hidden)
        inputs = {x.untyped_storage()._cdata for x in (hidden, *head.parameters())}
        stored = {
            kept.tensor.untyped_storage()._cdata: kept.tensor.untyped_storage().nbytes()
            for kept in alive
            if kept.tensor.is_floating_point()
        }
        numbers = sum(size for place, size in stored.items() if place not in inputs)
        return numbers / latent.itemsize / block_size


class GatedHead(MarkovHead):
    """The embedding, each number gated by what the slot's hidden state makes of it."""

    def __init__(self, vocab_size: Count, rank: Count, hidden_size: Count) -> None:
        super().__init__(vocab_size, rank, hidden_size)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(self, state: Latent | None, embedding: Latent, hidden: Hidden) -> Stepped:
        embedding = embedding.to(hidden.dtype)
        gate = self.gate_proj(torch.cat([hidden, embedding], dim=-1))
        return None, gate.sigmoid() * embedding


class RnnHead(MarkovHead):
    """A gated recurrent state over the block's previous tokens."""

    recurrent = True

    def __init__(self, vocab_size: Count, rank: Count, hidden_size: Count) -> None:
        super().__init__(vocab_size, rank, hidden_size)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def step(self, state: Latent | None, embedding: Latent, hidden: Hidden) -> Stepped:
        embedding = embedding.to(hidden.dtype)
        if state is None:
            state = torch.zeros_like(embedding)
        joint = self.joint_proj(torch.cat([state, embedding, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        keep = gate.sigmoid()
        return keep * state + (1 - keep) * candidate.tanh(), output.tanh()


MARKOV_HEADS: dict[str, type[MarkovHead]]
MARKOV_HEADS = {"vanilla": MarkovHead, "gated": GatedHead, "rnn": RnnHead}


def check_kind(markov_head_type: str) -> None:
    kinds = ("none", *MARKOV_HEADS)
    if markov_head_type not in kinds:
        raise ValueError(f"markov_head_type must be one of {kinds}, got {markov_head_type!r}")


@checked
def build_markov_head(
    markov_head_type: str,
    vocab_size: Count,
    markov_rank: Size,
    hidden_size: Count,
    draft_vocab_size: Count | None = None,
) -> MarkovHead | None:
    """The head of a kind in :data:`MARKOV_HEADS`; None, as in DFlash, for ``none`` or rank 0.

    Its bias is for the ``draft_vocab_size`` tokens that the drafter predicts, where these are few.
    """
    check_kind(markov_head_type)
    if markov_head_type == "none" or markov_rank == 0:
        return None
    head = MARKOV_HEADS[markov_head_type](vocab_size, markov_rank, hidden_size)
    if draft_vocab_size is not None:
        head.markov_w2 = nn.Linear(markov_rank, draft_vocab_size, bias=False)
    return head
