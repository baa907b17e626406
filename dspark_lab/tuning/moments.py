"""The bytes that a training step holds at each moment that may be its fullest.

A step's memory rises and falls. It is fullest at one of a few moments: while the target reads the
batch, inside the objective, in the backward pass through the last or the first layer, or once all
gradients are there. For each of these, :class:`StepBytes` adds up the tensors that are alive then,
from what every operation saves for its backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dspark_lab.checks import checked
from dspark_lab.model import chunk_sizes, most_slots
from dspark_lab.tuning.shape import Shape
from dspark_lab.tuning.step import Step

# The lines of a table of memory: those held throughout, then those that come and go.
_ALWAYS = ("weights", "optimiser", "embedding and LM head", "target")
_IN_DRAFTER = ("activations", "bf16 weights", "gradients", "objective", "backward pass")
PARTS = (*_ALWAYS, "features", *_IN_DRAFTER, "target's activations")


@checked
class StepBytes:
    """Bytes of one step; arrays where the step has an array of anchor counts.

    Norms, RoPE and softmaxes are in fp32, the input of a matrix product under autocast is a bf16
    copy of its own.
    """

    def __init__(self, shape: Shape, step: Step) -> None:
        step.require_fit(shape)
        self.shape, self.step, self.layers = shape, step, shape.drafter
        self.sizes = shape.sizes
        self.hidden, self.rank = shape.drafter.hidden_size, shape.markov_rank
        self.query, self.key = shape.drafter.query_width, shape.drafter.kv_width
        self.vocab = step.vocabulary or shape.vocab_size
        self.output = min(self.vocab, shape.output_size)
        self.tokens, self.slots = step.tokens, step.slots
        self.predicting = step.predicting_slots(shape)
        self.keys = step.tokens + step.slots
        # Bytes of a number in a matrix product, and whether weights and inputs are copied for it.
        self.number = step.product_bytes
        self.autocast = step.dtype == "bf16"
        # A norm of single operations, as on a CPU, saves the scaled input beside the input.
        self.norm = 8 if step.device == "cpu" else 4

    @property
    def peak(self) -> Any:
        """The most bytes that are held at one time."""
        fullest: Any = 0
        for held in self.moments().values():
            fullest = np.maximum(fullest, sum(held.values()))
        return sum(self.always().values()) + fullest

    def always(self) -> dict[str, int]:
        """The bytes that the step holds throughout, by part."""
        shape, step = self.shape, self.step
        shared = step.target_bytes == 4
        own = 4 * shape.vocab_size * self.hidden * (1 if shared and shape.tied else 2)
        target = 0
        if step.features == "live":
            target = shape.target_parameters * step.target_bytes
            own = 0 if shared else own
        copied = self.autocast or step.vocabulary is not None
        head = self.number * self.vocab * self.hidden * copied
        if shape.draft_vocab_size is not None:
            # The rows of the target's LM head that it predicts with, and where these stand.
            head = (4 + self.number * copied) * self.output * self.hidden + 8 * self.output
        # Which token has which place in the softmaxes, and back.
        places = 8 * (self.vocab + shape.vocab_size)
        return {
            "weights": 4 * self.sizes.trained_parameters,
            "optimiser": 8 * self.sizes.trained_parameters,
            "embedding and LM head": own + head + places,
            "target": target,
        }

    def kept(self) -> dict[str, Any]:
        """The bytes that the drafter's forward pass saves for the backward pass, by part."""
        number, shape, width = self.number, self.shape, self.sizes.confidence_width
        saved = {part: self.layers.count * held for part, held in self._layer().items()}
        # Cosines and sines; the first layer's input is frozen and needs no gradient.
        around = 4 * self.keys * self.layers.head_dim - self._frozen_input()
        saved["attention projections"] = saved["attention projections"] + around
        # Features that have the products' dtype are not copied.
        copied = 0 if self.step.feature_bytes == number == 4 else number
        context = self.tokens * (copied * shape.context_size + self.norm * self.hidden + 4)
        latent, confidence = number * self.sizes.latent_kept, number * width + 4 * 8 * (width > 0)
        heads = self.slots * (self.norm * self.hidden + 4)
        heads = heads + self.predicting * (4 + latent + confidence)
        return {"context projection": context, **saved, "heads": heads}

    def logits(self) -> Any:
        """The logits of drafter and target that exist at one time, and their softmaxes in fp32."""
        if self.step.objective == "full":
            # In fp32: a logarithmic softmax, two softmaxes, their difference and its modulus.
            return self.predicting * self.vocab * (2 * self.number + 5 * 4)
        chunk, tile = self._chunk()
        if self.shape.draft_vocab_size is not None:
            # The target's, those without the drafter's tokens, and both in fp32 over these tokens.
            wide = 4 * self.autocast
            whole = self.vocab * (self.number + wide + 4)
            return chunk * (whole + self.output * (2 * self.number + 8)) + 4 * self.output * tile
        return self.vocab * (2 * self.number * chunk + 4 * (3 if self.autocast else 1) * tile)

    def moments(self) -> dict[str, dict[str, Any]]:
        """The moments that may be the fullest, and what each holds beside :meth:`always`."""
        moments: dict[str, dict[str, Any]] = {}
        if self.step.features == "live":
            moments["the target reads"] = {"target's activations": self._target_activations()}
        rows = self._around_objective() | self._layers_backward() | self._context_backward()
        moments |= {name: dict(zip(_IN_DRAFTER, row, strict=True)) for name, row in rows.items()}
        features = self.step.feature_bytes * self.tokens * (self.shape.context_size + self.hidden)
        for held in moments.values():
            held["features"] = features
        return moments | {"optimiser": {"gradients": 4 * self.sizes.trained_parameters}}

    def _around_objective(self) -> dict[str, tuple[Any, ...]]:
        output, rank = self.output, self.rank
        inside, after = self._objective()
        embedding = 4 * self.shape.vocab_size * rank
        # One gradient of the embedding comes from the bias, one from the confidence head.
        gradients = embedding * (2 + self.shape.reads_markov)
        kept, copies = sum(self.kept().values()), self._weight_copies()["all"]
        moments: dict[str, tuple[Any, ...]] = {
            "objective": (kept, copies, 0, inside, 0),
            "heads backward": (kept, copies, gradients, after, self._norm_backward() // 2),
        }
        if self.step.objective == "chunked":
            # Those that it made, the same again times the loss's own gradient, and zeros that
            # autograd makes up for the outputs that nothing depends on.
            leaving = 3 * (after + 4 * output * rank) + 2 * self.autocast * output * rank
            moments["gradients leave the objective"] = (kept, copies, 0, leaving, 0)
        return moments

    def _layers_backward(self) -> dict[str, tuple[Any, ...]]:
        """The backward pass through the last and through the first layer, at three places."""
        layers, saved, kept, copies = self.layers, self._layer(), self.kept(), self._weight_copies()
        layer, mlp = sum(saved.values()), 4 * layers.mlp_weights
        every = sum(kept.values()) - kept["heads"]
        weights = self.sizes.trained_parameters - self.shape.context_size * self.hidden
        attention, keys_kept, keys_values = self._attention_backward()
        moments: dict[str, tuple[Any, ...]] = {}
        for name, left in (("last layer", layers.count), ("first layer", 1)):
            held = every - (layers.count - left) * layer
            # The first layer saves less than the others.
            before = held - layer + (self._frozen_input() if left == 1 else 0)
            below = copies["fc"] + (left - 1) * copies["layer"]
            done = 4 * (weights - left * layers.layer_parameters)
            # The gradient of the context, which the layers behind this one have begun.
            begun = 0 if left == layers.count else 4 * self.tokens * self.hidden
            for place, activations, copied, gradient, work in (
                ("MLP", held, "layer", 0, self._mlp_backward()),
                ("attention", held - saved["MLP"], "attention", mlp, attention),
                ("keys and values", before + keys_kept, "keys and values", mlp, keys_values),
            ):
                row = (activations, below + copies[copied], done + gradient, 0, work + begun)
                moments[f"{name} backward, {place}"] = row
        return moments

    def _context_backward(self) -> dict[str, tuple[Any, ...]]:
        saved, copies = self.kept()["context projection"], self._weight_copies()["fc"]
        every, states = 4 * self.sizes.trained_parameters, self.tokens * self.hidden
        fc = 4 * self.shape.context_size * self.hidden
        work = self.number * states + self.autocast * fc // 2
        return {
            "context backward, norm": (saved, copies, every - fc, 0, 12 * states),
            "context backward, projection": (saved - 8 * states, copies, every, 0, work),
        }

    def _frozen_input(self) -> Any:
        """The bytes by which the first layer saves less: its input is the frozen embedding's."""
        return 4 * self.slots * self.hidden

    def _layer(self) -> dict[str, Any]:
        """The bytes that one layer saves: inputs of its products, norms and attention."""
        layers, number, norm = self.layers, self.number, self.norm
        slots, keys, hidden, query, key = self.slots, self.keys, self.hidden, self.query, self.key
        return {
            "attention projections": (
                norm * slots * hidden
                + 4 * keys * hidden  # one fp32 input of both products, or two in bf16
                + number * slots * hidden
                + norm * (slots * query + keys * key)
                + number * slots * query  # the last product's
                + 4 * (slots * (1 + layers.heads) + keys * layers.kv_heads)
            ),
            "attention": number * (2 * slots * query + 2 * keys * key) + 4 * slots * layers.heads,
            "MLP": slots * ((norm + 4) * hidden + 4 + 4 * number * layers.intermediate_size),
        }

    def _weight_copies(self) -> dict[str, int]:
        """The bf16 copies of weights that autocast makes and autograd saves."""
        layers, size = self.layers, 2 * self.autocast
        fc = size * self.shape.context_size * self.hidden
        layer = size * (layers.attention_weights + layers.mlp_weights)
        heads = size * (self.sizes.latent_weights + self.sizes.confidence_width)
        return {
            "fc": fc,
            "layer": layer,
            "attention": size * layers.attention_weights,
            "keys and values": size * 2 * self.hidden * self.key,
            "all": fc + layers.count * layer + heads,
        }

    def _objective(self) -> tuple[Any, Any]:
        """The bytes of the objective at its fullest, and those left for the backward pass."""
        number, hidden, rank, output = self.number, self.hidden, self.rank, self.output
        slots, feature = self.predicting, self.step.feature_bytes
        # The results of the forward pass live as long as the objective runs.
        results = slots * (4 * hidden + 4 * rank + feature * hidden + 64)
        head_copies = 2 * output * rank * self.autocast
        if self.step.objective == "full":
            head_copies = head_copies + 2 * output * hidden * self.autocast
            return results + head_copies + self.logits(), slots * hidden * number
        chunk, _ = self._chunk()
        after = number * slots * (hidden + rank)
        copies = number * slots * hidden * (feature != number) + head_copies
        copies = copies + self.autocast * slots * number * (hidden + 3 * rank)
        # A chunk's inputs, both in one, and the gradient before and after it is scaled; or, in
        # bf16, the gradient of the bias's matrix, and it in fp32, before it is added.
        scaled = chunk * hidden * (6 if self.autocast else 2 * number)
        work = chunk * number * (3 * hidden + rank)
        work = work + np.maximum(scaled, 6 * output * rank * self.autocast)
        return results + copies + after + 4 * output * rank + self.logits() + work, after

    def _chunk(self) -> tuple[Any, Any]:
        """Slots of a chunk and of a tile of it, whose logits exist at one time."""
        vocab, on_gpu = self.vocab, self.step.device == "cuda"
        counted = self.step.counted_slots(self.shape)
        chunks, chunk, tile = chunk_sizes(counted, vocab, on_gpu)
        if not on_gpu:
            # A draw with more blocks at the row's end may need one chunk fewer, a full one then.
            fewest = np.maximum(counted - self.step.labels_beyond_rows(self.shape), 1)
            fuller = chunk_sizes(fewest, vocab, on_gpu)[0] < chunks
            chunk = np.where(fuller, most_slots(vocab, on_gpu), chunk)
        return chunk, np.minimum(tile, chunk)

    def _norm_backward(self) -> Any:
        """The gradients of a norm's output, of what it scaled, of a square, and their sum."""
        return 16 * self.slots * self.hidden

    def _mlp_backward(self) -> Any:
        wide = self.layers.intermediate_size
        work = 2 * self.number * self.slots * wide + 8 * self.slots * self.hidden
        work = work + (4 + 2 * self.autocast) * self.hidden * wide
        return np.maximum(work, self._norm_backward())

    def _attention_backward(self) -> tuple[Any, Any, Any]:
        """Backward through attention, what keys and values still hold then, and through these."""
        number, slots, keys, hidden = self.number, self.slots, self.keys, self.hidden
        queries, both = slots * self.query, keys * self.key
        work = number * queries  # the gradient that comes in
        if self.step.device == "cpu":
            # In fp32: results, and where the inputs are bf16 copies of all of them.
            work = work + 4 * (queries + 2 * both)
            work = work + self.autocast * 4 * (3 * queries + 2 * both)
        else:
            work = work + number * (queries + 2 * both) + 4 * slots * self.layers.heads
        # While the keys' norm goes back, or while both gradients of its input are summed.
        keys_values = np.maximum((16 + self.norm) * both, 8 * keys * hidden)
        return (
            work + 8 * slots * hidden,
            4 * keys * hidden + self.norm * slots * hidden,
            number * both + keys_values + 8 * slots * hidden,
        )

    def _target_activations(self) -> int:
        """The most that the target's forward pass holds beside its weights and the features."""
        layers = self.shape.target
        assert layers is not None
        attention = 4 * layers.query_width + 2 * layers.kv_width
        wide = max(3 * layers.intermediate_size, attention)
        return self.step.target_bytes * self.tokens * (2 * layers.hidden_size + wide)
