"""Markov heads: what the previous token says about the next one, as a bias on a slot's logits.

The backbone predicts the slots of a block side by side, none knowing what the others hold. A Markov
head adds to each slot's logits a bias of rank r that depends on the token before it (DSpark,
section 3.2):

    bias = markov_w2(latent),   latent of width r, made from e = markov_w1[previous token]

and the three kinds differ in the latent alone, where h is the slot's hidden state:

    vanilla: e;
    gated:   sigmoid(gate_proj [h; e]) * e;
    rnn:     tanh(o), with a state s over the block, zero at its first slot:
             g, c, o = joint_proj [s; e; h], and the next slot's s is
             sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c).

This file knows previous tokens and hidden states; it knows nothing about attention or losses. The
latent is kept apart from the bias so that an objective can form the bias for a few slots at a time.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dspark_lab.checks import require_int

__all__ = ["MarkovHead", "MarkovKind", "build_markov_head"]

MarkovKind = Literal["none", "vanilla", "gated", "rnn"]


class MarkovHead(nn.Module):
    """A head of one of the three kinds. See :func:`build_markov_head`, which checks the arguments.

    ``gate_proj`` is there for ``gated`` alone, ``joint_proj`` for ``rnn`` alone.
    """

    def __init__(self, kind: MarkovKind, vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        if kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def embed(self, prev_ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes rank"]:
        """The previous token's embedding, which the confidence head reads too."""
        return self.markov_w1(prev_ids)

    def latent(
        self,
        prev_ids: Int[Tensor, "batch anchor slot"],
        hidden: Float[Tensor, "batch anchor slot hidden"],
    ) -> Float[Tensor, "batch anchor slot rank"]:
        """What ``markov_w2`` maps to the bias."""
        embeddings = self.embed(prev_ids)
        if self.kind != "rnn":
            return self.step(None, embeddings, hidden)[1]
        state, outputs = None, []
        for embedding, h in zip(embeddings.unbind(-2), hidden.unbind(-2), strict=True):
            state, output = self.step(state, embedding, h)
            outputs.append(output)
        return torch.stack(outputs, dim=-2)

    def step(
        self,
        state: Float[Tensor, "*axes rank"] | None,
        embedding: Float[Tensor, "*axes rank"],
        hidden: Float[Tensor, "*axes hidden"],
    ) -> tuple[Float[Tensor, "*axes rank"] | None, Float[Tensor, "*axes rank"]]:
        """One slot: the next slot's state, and this slot's latent. A block begins with None."""
        if self.kind == "vanilla":
            return None, embedding
        embedding = embedding.to(hidden.dtype)
        if self.kind == "gated":
            gate = self.gate_proj(torch.cat([hidden, embedding], dim=-1))
            return None, gate.sigmoid() * embedding
        if state is None:
            state = torch.zeros_like(embedding)
        joint = self.joint_proj(torch.cat([state, embedding, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        keep = gate.sigmoid()
        return keep * state + (1 - keep) * candidate.tanh(), output.tanh()


def build_markov_head(
    kind: MarkovKind, vocab_size: int, rank: int, hidden_size: int
) -> MarkovHead | None:
    """The head of a kind, or None for ``none`` or rank 0, which leaves the drafter of DFlash.

    Args:
        kind: ``vanilla``, ``gated``, ``rnn`` or ``none``.
        vocab_size: tokens, both those that are read and those that get a bias.
        rank: width of the latent.
        hidden_size: width of the slots' hidden states.

    Raises:
        TypeError, ValueError: an unknown kind, a negative rank, or a size below 1.
    """
    if kind not in get_args(MarkovKind):
        raise ValueError(f"markov_head_type must be one of {get_args(MarkovKind)}, got {kind!r}")
    require_int("markov_rank", rank, 0)
    require_int("vocab_size", vocab_size, 1)
    require_int("hidden_size", hidden_size, 1)
    if kind == "none" or rank == 0:
        return None
    return MarkovHead(kind, vocab_size, rank, hidden_size)
