"""How many bytes a training step holds at its fullest moment, and what therefore fits.

A step's memory rises and falls. Its fullest moment is one of a few: while the target reads the
batch, inside the objective, in the backward pass through the last or the first layer, or with all
gradients there. For each of these the tensors that are alive then are added up, from what every
operation keeps for its backward pass; the largest sum is the peak.

The step is that of ``dspark_lab.training`` from its second on: weights, gradients and AdamW's state in
fp32, products in fp32 or, under autocast, in bf16, nothing compiled but, on CUDA, the attention.
Not in it: what an allocator rounds up or loses between tensors, and what a driver takes for itself.

This file knows sizes; it knows neither operations (``dspark_lab.tuning.cost``) nor time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from dspark_lab.checks import require_int, require_number
from dspark_lab.model.objective import _CHUNK, _TILE
from dspark_lab.tuning.shape import CARDS, TARGETS, Card, Shape

__all__ = [
    "WIDTH",
    "Dtype",
    "Step",
    "card_table",
    "fit_table",
    "kept_bytes",
    "logit_bytes",
    "memory_table",
    "training_memory",
    "usable_bytes",
]

Dtype = Literal["bf16", "fp32"]
# Bytes of a number.
WIDTH = {"bf16": 2, "fp32": 4}
_CHOICES = {
    "dtype": get_args(Dtype),
    "target_dtype": (*get_args(Dtype), None),
    "features": ("live", "cached"),
    "objective": ("chunked", "full"),
    "device": ("cuda", "cpu"),
}


@dataclass(frozen=True)
class Step:
    """What a training step works on, beside the :class:`~dspark_lab.tuning.shape.Shape` of its models.

    Attributes:
        seq_len, num_anchors, block_size, batch_size: of a micro-batch: rows, tokens, blocks a row,
            slots a block.
        dtype: of the matrix products.
        features: "live" asks the target for every batch; "cached" has them in bf16 on disk, and the
            target may leave the memory but for its embedding and LM head.
        target_dtype: of the target's weights, as ``dtype`` where None. From bf16, the drafter makes
            fp32 copies of embedding and LM head.
        objective: "chunked" of ``dspark_lab.model.objective``, or the "full" logits of all slots with the
            gradient left to autograd.
        supervised: the share of slots that have a label. A CPU computes logits for these alone.
        vocabulary: over how many tokens the softmaxes are taken; all where None.
        device: "cuda" or "cpu", which differ in how many logits a chunk has.

    Raises TypeError or ValueError for a value that cannot be.
    """

    seq_len: int
    num_anchors: int
    block_size: int
    batch_size: int = 1
    dtype: Dtype = "bf16"
    features: Literal["live", "cached"] = "live"
    target_dtype: Dtype | None = None
    objective: Literal["chunked", "full"] = "chunked"
    supervised: float = 1.0
    vocabulary: int | None = None
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        for name in ("seq_len", "num_anchors", "block_size", "batch_size"):
            require_int(name, getattr(self, name), 1)
        if self.vocabulary is not None:
            require_int("vocabulary", self.vocabulary, 1)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        require_number("supervised", self.supervised)
        if not 0 <= self.supervised <= 1:
            raise ValueError(f"supervised must lie in [0, 1], got {self.supervised}")

    @classmethod
    def of(
        cls, shape: Shape, seq_len: int, num_anchors: int, block_size: int | None, **options: Any
    ) -> Step:
        """The step, checked against the shape, whose block size it has where None.

        Raises:
            ValueError: "live" features of a target that the shape does not know, or a vocabulary
                larger than its own.
        """
        step = cls(seq_len, num_anchors, block_size or shape.block_size, **options)
        if step.features == "live" and shape.target is None:
            raise ValueError(
                "features 'live' need the target's shape: give Shape.of its target, or say 'cached'"
            )
        if step.vocabulary is not None and step.vocabulary > shape.vocab_size:
            raise ValueError(
                f"vocabulary must be at most the model's, {shape.vocab_size}, got {step.vocabulary}"
            )
        return step

    @property
    def tokens(self) -> int:
        """Of the context, all rows together."""
        return self.batch_size * self.seq_len

    @property
    def slots(self) -> Any:
        """Of all blocks of all rows."""
        return self.batch_size * self.num_anchors * self.block_size

    @property
    def counted_slots(self) -> Any:
        """Whose logits are computed."""
        if self.device == "cuda" or self.objective == "full":
            return self.slots
        return np.ceil(self.slots * self.supervised)

    @property
    def product_bytes(self) -> int:
        """Of a number that goes through a matrix product."""
        return WIDTH[self.dtype]

    @property
    def target_bytes(self) -> int:
        return WIDTH[self.target_dtype or self.dtype]

    @property
    def feature_bytes(self) -> int:
        """Of a number of the features; on disk they are bf16."""
        return self.target_bytes if self.features == "live" else 2


def training_memory(
    shape: Shape,
    *,
    seq_len: int,
    num_anchors: int,
    block_size: int | None = None,
    batch_size: int = 1,
    dtype: Dtype = "bf16",
    **options: Any,
) -> int:
    """The most bytes that a training step holds at one time, weights and optimiser included.

    ``options`` are the other fields of :class:`Step`. Within 15 % of the measured peak of
    ``dspark_lab.training`` on a CPU, see ``benchmarks/cost.py``.

    Raises:
        TypeError, ValueError: as :class:`Step` and :meth:`Step.of`.
    """
    step = Step.of(
        shape, seq_len, num_anchors, block_size, batch_size=batch_size, dtype=dtype, **options
    )
    return int(_peak(shape, step))


def memory_table(
    shape: Shape,
    *,
    seq_len: int,
    num_anchors: int,
    block_size: int | None = None,
    batch_size: int = 1,
    dtype: Dtype = "bf16",
    **options: Any,
) -> pd.DataFrame:
    """What the bytes of :func:`training_memory` are, at the fullest moment.

    Returns:
        a line per part, in a fixed order: ``part``, ``held`` (bytes then), ``moment`` (when that
        is, the same in all lines). The lines add up to the peak.

    Raises:
        TypeError, ValueError: as :func:`training_memory`.
    """
    step = Step.of(
        shape, seq_len, num_anchors, block_size, batch_size=batch_size, dtype=dtype, **options
    )
    moments = _moments(shape, step)
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    held = {**_always(shape, step), **dict.fromkeys(_PARTS, 0), **moments[name]}
    return pd.DataFrame(
        {"part": list(held), "held": [int(x) for x in held.values()], "moment": name}
    )


def usable_bytes(memory: int | float | str | Card, usable: float = 0.92) -> float:
    """The part of a memory, in bytes or a card's, that tensors may take; see :func:`fit_table`.

    Raises:
        TypeError, ValueError: a memory that is neither a number > 0 nor a card, or ``usable`` not
            in (0, 1].
    """
    if isinstance(memory, str):
        if memory not in CARDS:
            raise ValueError(f"memory must be bytes or one of {list(CARDS)}, got {memory!r}")
        memory = CARDS[memory]
    size = memory.memory_bytes if isinstance(memory, Card) else memory
    require_number("memory", size)
    require_number("usable", usable)
    if not size > 0 or not 0 < usable <= 1:
        raise ValueError(f"memory must be > 0 and usable in (0, 1], got {memory!r} and {usable}")
    return size * usable


def fit_table(
    shape: Shape,
    memory: int | float | str | Card,
    seq_lens: Sequence[int] = (1024, 2048, 4096, 8192),
    block_sizes: Sequence[int] = (4, 7, 11, 15),
    *,
    usable: float = 0.92,
    batch_size: int = 1,
    dtype: Dtype = "bf16",
    **options: Any,
) -> pd.DataFrame:
    """The largest number of anchors that fits into a memory, for each row length and block size.

    Args:
        memory: bytes, or a card of :data:`~dspark_lab.tuning.shape.CARDS`.
        seq_lens, block_sizes: what to try.
        usable: the share of the memory that tensors may take; the rest is the driver's, the
            kernels' and what lies idle between tensors.
        batch_size, dtype, options: see :class:`Step`.

    Returns:
        a line per row length and block size: ``seq_len``, ``block_size``, ``num_anchors`` (0 where
        not even one fits; at most ``seq_len - 1``, all that a row has), ``held`` (bytes of that
        many, or of one where none fits), ``full`` (whether memory, not the row, is the limit).

    Raises:
        TypeError, ValueError: as :func:`training_memory`, or a memory that is not a number > 0.
    """
    limit = usable_bytes(memory, usable)
    lines = []
    for seq_len in seq_lens:
        for block_size in block_sizes:
            step = Step.of(
                shape, seq_len, 1, block_size, batch_size=batch_size, dtype=dtype, **options
            )
            most, held = _largest(shape, step, max(1, seq_len - 1), limit)
            lines.append(
                {
                    "seq_len": seq_len,
                    "block_size": block_size,
                    "num_anchors": most,
                    "held": held,
                    "full": most < max(1, seq_len - 1),
                }
            )
    return pd.DataFrame(lines)


def card_table(
    targets: Sequence[str | Shape] = tuple(TARGETS),
    cards: Sequence[str | Card] = tuple(CARDS),
    *,
    seq_len: int = 4096,
    block_size: int = 7,
    num_anchors: int = 512,
    usable: float = 0.92,
    batch_size: int = 1,
    dtype: Dtype = "bf16",
    **options: Any,
) -> pd.DataFrame:
    """Which drafter trains on which card: published configurations and common cards by default.

    Args:
        targets: names in :data:`~dspark_lab.tuning.shape.TARGETS`, or shapes.
        cards: names in :data:`~dspark_lab.tuning.shape.CARDS`, or cards.
        num_anchors: of the step whose bytes are told.
        seq_len, block_size, usable, batch_size, dtype, options: see :func:`fit_table`.

    Returns:
        a line per target and card: ``target``, ``held_gb`` (10^9 bytes of a step of
        ``num_anchors``), ``card``, ``memory_gb`` (of the card), ``fits``, and ``most_anchors``, the
        largest number that fits.

    Raises:
        TypeError, ValueError: as :func:`fit_table`, or a name that there is none of.
    """
    lines = []
    for target in targets:
        shape = target if isinstance(target, Shape) else Shape.of(target)
        sizes: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, **options}
        held = training_memory(
            shape, seq_len=seq_len, num_anchors=num_anchors, block_size=block_size, **sizes
        )
        for card in cards:
            limit, name = usable_bytes(card, usable), getattr(card, "name", card)
            fit = fit_table(shape, card, [seq_len], [block_size], usable=usable, **sizes)
            lines.append(
                {
                    "target": shape.name,
                    "held_gb": held / 1e9,
                    "card": name,
                    "memory_gb": limit / usable / 1e9,
                    "fits": held <= limit,
                    "most_anchors": int(fit["num_anchors"].iloc[0]),
                }
            )
    return pd.DataFrame(lines)


def _largest(shape: Shape, step: Step, candidates: int, limit: float) -> tuple[int, int]:
    """The largest number of anchors that fits, or 0, and what it, or 1, holds."""

    def peak(anchors: np.ndarray) -> np.ndarray:
        many: Any = replace(step)
        object.__setattr__(many, "num_anchors", anchors)
        return np.broadcast_to(_peak(shape, many), anchors.shape)

    # More anchors hold more, except that their chunks of logits may be smaller, by no more than a
    # whole chunk holds. So a few numbers tell between which the answer lies.
    vocab = step.vocabulary or shape.vocab_size
    chunk = max(1, _CHUNK[step.device == "cuda"] // vocab)
    chunk_bytes = 20 * chunk * (vocab + shape.drafter.hidden_size + shape.markov_rank)
    few = np.unique(np.linspace(1, candidates, 65).astype(int))
    held = peak(few)
    if held[-1] <= limit:
        return candidates, int(held[-1])
    low = few[held <= limit][-1] if (held <= limit).any() else 1
    beyond = few[held > limit + chunk_bytes]
    tried = np.arange(low, (beyond[0] if len(beyond) else candidates) + 1)
    held = peak(tried)
    fits = np.flatnonzero(held <= limit)
    if not len(fits):
        return 0, int(_peak(shape, step))
    return int(tried[fits[-1]]), int(held[fits[-1]])


def kept_bytes(shape: Shape, step: Step) -> dict[str, Any]:
    """What the forward pass of the drafter keeps for the backward pass, by part."""
    parts = ("context projection", "attention projections", "attention", "MLP", "heads")
    first, later = _of_layer(shape, step, first=True), _of_layer(shape, step, first=False)
    kept = {
        part: first.get(part, 0) + (shape.drafter.count - 1) * later.get(part, 0) for part in parts
    }
    for part, size in _beside_layers(shape, step).items():
        kept[part] = kept[part] + size
    return kept


def logit_bytes(step: Step, vocab: int) -> Any:
    """The logits of drafter and target that exist at one time, and their softmaxes in fp32."""
    c = step.product_bytes
    if step.objective == "full":
        # In fp32: a logarithm of a softmax, two softmaxes, their difference and its absolute value.
        return step.slots * vocab * (2 * c + 4 * 5)
    slots = _chunk(step, vocab)
    tile = np.minimum(max(1, _TILE[step.device == "cuda"] // vocab), slots)
    return vocab * (2 * c * slots + 4 * (3 if c == 2 else 1) * tile)


# The lines of a table that come and go.
_PARTS = (
    "features",
    "activations",
    "bf16 weights",
    "gradients",
    "objective",
    "backward pass",
    "target's activations",
)


def _peak(shape: Shape, step: Step) -> Any:
    always = sum(_always(shape, step).values())
    peak: Any = 0
    for moment in _moments(shape, step).values():
        peak = np.maximum(peak, sum(moment.values()))
    return always + peak


def _always(shape: Shape, step: Step) -> dict[str, int]:
    """What is there throughout."""
    table = shape.vocab_size * shape.drafter.hidden_size
    trained = shape.trained_parameters
    target = 0
    if step.features == "live":
        target = shape.target_parameters * step.target_bytes
    shared = step.target_bytes == 4
    if shared and step.features == "live":
        own = 0
    else:
        own = 4 * table * (1 if shared and shape.tied else 2)
    head = 0
    vocab = step.vocabulary or shape.vocab_size
    if step.dtype == "bf16" or step.vocabulary is not None:
        head = step.product_bytes * vocab * shape.drafter.hidden_size
    # Which token has which place in the softmaxes, and back.
    places = 8 * (vocab + shape.vocab_size)
    return {
        "weights": 4 * trained,
        "optimiser": 8 * trained,
        "embedding and LM head": own + head + places,
        "target": target,
    }


def _moments(shape: Shape, step: Step) -> dict[str, dict[str, Any]]:
    """The moments that may be the fullest, and what each holds beside what is always there."""
    layers, c = shape.drafter, step.product_bytes
    d, r, vocab = layers.hidden_size, shape.markov_rank, step.vocabulary or shape.vocab_size
    tokens, slots = step.tokens, step.slots
    features = step.feature_bytes * tokens * (shape.context_size + d)
    kept = sum(kept_bytes(shape, step).values())
    copies = _weight_copies(shape, step)
    first, last = (_of_layer(shape, step, first=one) for one in (True, layers.count == 1))
    markov = 4 * shape.vocab_size * r
    layer_gradient = 4 * layers.layer_parameters
    late = 4 * (shape.trained_parameters - layers.count * layers.layer_parameters)
    late -= 4 * shape.context_size * d
    moments: dict[str, dict[str, Any]] = {}
    if step.features == "live":
        moments["the target reads"] = {
            "features": features,
            "target's activations": _target_activations(shape, step),
        }
    objective = _objective(shape, step)
    moments["objective"] = {
        "features": features,
        "activations": kept,
        "bf16 weights": copies["all"],
        "objective": objective["inside"],
    }
    # The gradient of a norm: of its output, of what it scaled, of a square, and their sum.
    norm = 16 * slots * d
    moments["heads backward"] = {
        "features": features,
        "activations": kept,
        "bf16 weights": copies["all"],
        # One gradient of the embedding comes from the bias, one from the confidence head.
        "gradients": markov * (2 + shape.reads_markov),
        "objective": objective["after"],
        "backward pass": norm / 2,
    }
    moments["gradients leave the objective"] = {
        "features": features,
        "activations": kept,
        "bf16 weights": copies["all"],
        # Those that it made, the same again times the loss's own gradient, and zeros that autograd
        # makes up for the outputs that nobody asked about.
        "objective": 3 * (objective["after"] + 4 * vocab * r) + 2 * (c == 2) * vocab * r,
    }
    mlp = 2 * c * slots * layers.intermediate_size + 8 * slots * d
    mlp += (4 + 2 * (c == 2)) * d * layers.intermediate_size
    own = _attention_backward(shape, step)
    for name, layer, left, gradients in (
        ("last layer", last, layers.count, late),
        ("first layer", first, 1, late + (layers.count - 1) * layer_gradient),
    ):
        later = _of_layer(shape, step, first=False)
        before = sum(_beside_layers(shape, step, heads=False).values())
        before = before + (sum(first.values()) if left > 1 else 0)
        before = before + max(0, left - 2) * sum(later.values())
        weights = copies["fc"] + (left - 1) * copies["layer"]
        for part, there, its_weights, work in (
            ("MLP", sum(layer.values()), copies["layer"], np.maximum(mlp, norm)),
            (
                "attention",
                layer["attention projections"] + layer["attention"],
                copies["attention"],
                own["attention"] + 8 * slots * d,
            ),
            (
                "keys and values",
                own["keys kept"],
                copies["keys and values"],
                own["keys and values"],
            ),
        ):
            moments[f"{name} backward, {part}"] = {
                "features": features,
                "activations": before + there,
                "bf16 weights": weights + its_weights,
                "gradients": gradients + (part != "MLP") * 4 * layers.mlp_weights,
                "backward pass": work + (0 if left == layers.count else 4 * tokens * d),
            }
    context = _beside_layers(shape, step, heads=False)["context projection"]
    fc = 4 * shape.context_size * d
    for name, gradients, work in (
        ("norm", 4 * shape.trained_parameters - fc, 12 * tokens * d),
        ("projection", 4 * shape.trained_parameters, c * tokens * d + (c == 2) * fc // 2),
    ):
        moments[f"context backward, {name}"] = {
            "features": features,
            "activations": context - (name == "projection") * 8 * tokens * d,
            "bf16 weights": copies["fc"],
            "gradients": gradients,
            "backward pass": work,
        }
    moments["optimiser"] = {"gradients": 4 * shape.trained_parameters}
    return moments


def _of_layer(shape: Shape, step: Step, first: bool) -> dict[str, Any]:
    """What one layer keeps: the inputs of its products, of its norms and of its attention.

    Norms and RoPE are in fp32. A product's input under autocast is a bf16 copy of its own.
    """
    layers, c = shape.drafter, step.product_bytes
    d, slots, both = layers.hidden_size, step.slots, step.tokens + step.slots
    q, kv = layers.query_width, layers.kv_width
    # A norm made of single operations, as on a CPU, keeps what it scales beside its input.
    norm = 8 if step.device == "cpu" else 4
    return {
        "attention projections": (
            # The first layer's input is the frozen embedding's and asks for no gradient.
            (norm - 4 * first) * slots * d
            + 4 * both * d  # one fp32 input of both products, or two in bf16
            + c * slots * d
            + norm * (slots * q + both * kv)
            + c * slots * q  # the last product's
            + 4 * (slots * (1 + layers.heads) + both * layers.kv_heads)
        ),
        "attention": c * (2 * slots * q + 2 * both * kv) + 4 * slots * layers.heads,
        "MLP": (norm + 4) * slots * d + 4 * slots + 4 * c * slots * layers.intermediate_size,
    }


def _beside_layers(shape: Shape, step: Step, heads: bool = True) -> dict[str, Any]:
    """What is kept outside the layers, by part."""
    layers, c = shape.drafter, step.product_bytes
    d, r, tokens, slots = layers.hidden_size, shape.markov_rank, step.tokens, step.slots
    norm = 8 if step.device == "cpu" else 4
    # Features that have the products' dtype are not copied.
    copy = 0 if step.feature_bytes == c == 4 else c * tokens * shape.context_size
    kept: dict[str, Any] = {
        "context projection": copy + norm * tokens * d + 4 * tokens,
        # Cosines and sines.
        "attention projections": 4 * (tokens + slots) * layers.head_dim,
    }
    if heads:
        latent = {"gated": c * (d + 3 * r), "rnn": c * (d + 6.5 * r)}.get(shape.markov_head_type, 0)
        kept["heads"] = slots * (
            norm * d
            + 8
            + latent
            + c * shape.confidence_width
            + 4 * 8 * (shape.confidence_width > 0)
        )
    return kept


def _weight_copies(shape: Shape, step: Step) -> dict[str, int]:
    """The weights that autocast made bf16 copies of, which autograd keeps."""
    if step.dtype != "bf16":
        return dict.fromkeys(("fc", "layer", "attention", "keys and values", "all"), 0)
    layers = shape.drafter
    fc = 2 * shape.context_size * layers.hidden_size
    layer = 2 * (layers.attention_weights + layers.mlp_weights)
    heads = 2 * (shape.latent_weights + shape.confidence_width)
    return {
        "fc": fc,
        "layer": layer,
        "attention": 2 * layers.attention_weights,
        "keys and values": 4 * layers.hidden_size * layers.kv_width,
        "all": fc + layers.count * layer + heads,
    }


def _objective(shape: Shape, step: Step) -> dict[str, Any]:
    """What the objective holds at its fullest, and what it leaves for the backward pass."""
    c, d, r = step.product_bytes, shape.drafter.hidden_size, shape.markov_rank
    slots, vocab = step.slots, step.vocabulary or shape.vocab_size
    narrow = c == 2
    # The forward's own results are alive as long as the objective runs.
    results = slots * (4 * d + 4 * r + step.feature_bytes * d + 64)
    if step.objective == "full":
        copies = 2 * vocab * (d + r) * narrow
        return {"inside": results + copies + logit_bytes(step, vocab), "after": slots * d * c}
    most = _chunk(step, vocab)
    gradients = c * slots * (d + r) + 4 * vocab * r
    copies = slots * (c * d * (step.feature_bytes != c) + (c * (d + r) + 2 * c * r) * narrow)
    copies = copies + 2 * vocab * r * narrow
    logits = logit_bytes(step, vocab)
    # A chunk's inputs, both in one, and the gradient before and after it is scaled; or, in bf16,
    # the gradient of the bias's matrix, and it in fp32, before it is added.
    work = most * c * (3 * d + r)
    work = work + np.maximum(most * d * (2 * c if not narrow else 6), 6 * vocab * r * narrow)
    return {
        "inside": results + copies + gradients + logits + work,
        "after": gradients - 4 * vocab * r,
    }


def _chunk(step: Step, vocab: int) -> Any:
    """Slots whose logits exist at one time."""
    most = max(1, _CHUNK[step.device == "cuda"] // vocab)
    slots = step.counted_slots
    parts = np.maximum(1, np.ceil(slots / most))
    evenly = np.ceil(slots / parts)
    if step.device == "cuda":
        return evenly
    # A draw in which more blocks reach the row's end may need one chunk less, and a full one.
    fewest = np.maximum(slots - _labels_beyond_rows(step), 1)
    return np.where(np.ceil(fewest / most) < parts, most, evenly)


def _labels_beyond_rows(step: Step) -> Any:
    """Slots whose label lies beyond the row's end: three standard deviations above their mean.

    With anchors drawn uniformly from a row of one document, a block lacks 1, 2, ..., or
    ``block_size - 1`` labels with probability 1 / candidates each.
    """
    candidates, block = max(step.seq_len - 1, 1), step.block_size
    kept = np.minimum(step.num_anchors, candidates)
    lacking = np.minimum(np.arange(block), candidates)
    drawn = step.batch_size * kept / candidates
    mean, square = drawn * lacking.sum(), drawn * (lacking**2).sum()
    return mean + 3 * np.sqrt(square)


def _attention_backward(shape: Shape, step: Step) -> dict[str, Any]:
    """What the backward pass through attention and its projections makes and gives back."""
    layers, c = shape.drafter, step.product_bytes
    d, q, kv = layers.hidden_size, layers.query_width, layers.kv_width
    slots, both = step.slots, step.tokens + step.slots
    attention = c * slots * q  # the gradient that comes in
    if step.device == "cpu":
        # In fp32: results, and where the inputs are bf16 copies of all of them.
        attention = attention + 4 * (slots * q + 2 * both * kv)
        if c == 2:
            attention = attention + 4 * (3 * slots * q + 2 * both * kv)
    else:
        attention = attention + c * (slots * q + 2 * both * kv) + 4 * slots * layers.heads
    norm = 8 if step.device == "cpu" else 4
    return {
        "attention": attention,
        "keys kept": 4 * both * d + norm * slots * d,
        # While the keys' norm goes back, or while both gradients of its input are summed.
        "keys and values": (
            c * both * kv + np.maximum((16 + norm) * both * kv, 8 * both * d) + 8 * slots * d
        ),
    }


def _target_activations(shape: Shape, step: Step) -> int:
    """The most that the target's own forward pass holds beside its weights and the features."""
    assert shape.target is not None
    layers, tokens = shape.target, step.tokens
    wide = max(3 * layers.intermediate_size, 4 * layers.query_width + 2 * layers.kv_width)
    return step.target_bytes * tokens * (2 * layers.hidden_size + wide)
