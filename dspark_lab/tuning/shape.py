"""Sizes of a target and its drafter, read from configurations, and of common cards.

Shape.of("qwen3-4b")                              a published configuration, see TARGETS
Shape.of("config.json", block_size=15)            any dense model's, as Hugging Face has it
Shape.of(drafter.config, target="config.json")    an existing drafter and its target
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dspark_lab.blocks import Layout
from dspark_lab.checks import Count, Size, checked
from dspark_lab.files import read_json
from dspark_lab.model import (
    ARCHITECTURES,
    MARKOV_HEADS,
    DrafterConfig,
    DrafterSizes,
    drafter_sizes,
    family_of,
)


@dataclass(frozen=True)
class Card:
    """An accelerator, by its vendor's data sheet.

    ``operations_per_second`` is the peak of dense bf16 matrix products with fp32 sums, where one
    multiplication and one addition are two operations.
    """

    name: str
    memory_bytes: int
    operations_per_second: float
    bytes_per_second: float


# Gigabytes of memory (2**30 bytes, but for 141 and 180), bf16 tensor peak without sparsity in 10^12
# operations and memory bandwidth in gigabytes, both a second.
CARDS = {
    name: Card(name, memory * (10**9 if memory > 100 else 2**30), peak * 1e12, bandwidth * 1e9)
    for name, memory, peak, bandwidth in (
        ("T4", 16, 65, 300),  # fp16; it has no bf16
        ("L4", 24, 121, 300),
        ("A10G", 24, 70, 600),
        ("RTX 3090", 24, 71, 936),
        ("RTX 4090", 24, 165, 1008),
        ("RTX 5090", 32, 209, 1792),
        ("A100 40GB", 40, 312, 1555),
        ("L40S", 48, 362, 864),
        ("A100 80GB", 80, 312, 2039),
        ("H100", 80, 989, 3350),
        ("H200", 141, 989, 4800),
        ("B200", 180, 2250, 8000),
    )
}


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers with a gated MLP; biases, if any, in attention alone.

    ``sliding`` of the ``count`` layers see only the last ``window`` tokens.
    """

    count: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool = True
    attention_bias: bool = False
    window: int | None = None
    sliding: int = 0

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """The width of the keys, which is that of the values."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's four attention projections, without biases."""
        return 2 * self.hidden_size * (self.query_width + self.kv_width)

    @property
    def mlp_weights(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_parameters(self) -> int:
        biases = self.query_width + 2 * self.kv_width + self.hidden_size
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        return self.attention_weights + biases * self.attention_bias + self.mlp_weights + norms

    @property
    def parameters(self) -> int:
        """Those of the layers and of the norm behind the last one."""
        return self.count * self.layer_parameters + self.hidden_size


@checked
@dataclass(frozen=True)
class Shape:
    """All sizes of a target and a drafter that determine a cost; see :meth:`of`.

    ``target`` is None where only the drafter is known; then the target costs nothing, and a step
    that runs it is refused. ``tied``: the target's LM head is its embedding. ``context_size`` is
    the width of a context feature. ``sample_from_anchor``, ``draft_vocab_size`` and ``is_causal``
    are the drafter's, see :class:`~dspark_lab.model.DrafterConfig`.
    """

    name: str
    vocab_size: Count
    drafter: Layers
    target: Layers | None
    context_layers: Count
    context_size: Count
    block_size: Count = 7
    num_anchors: Count = 512
    seq_len: Count = 4096
    markov_rank: Size = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    tied: bool = False
    sample_from_anchor: bool = True
    draft_vocab_size: Count | None = None
    is_causal: bool | None = None

    @classmethod
    @checked
    def of(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | DrafterConfig,
        *,
        target: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        num_hidden_layers: Count | None = None,
        context_layers: Count | None = None,
        block_size: Count | None = None,
        num_anchors: Count | None = None,
        seq_len: Count | None = None,
        markov_rank: Size | None = None,
        markov_head_type: str | None = None,
        enable_confidence_head: bool | None = None,
    ) -> Shape:
        """The shape of a preset, of a target's ``config.json``, or of a drafter.

        A drafter for a given target gets layers of the target's own sizes, as published drafters
        have: by default five layers and five context layers, or fewer if the target has fewer.

        Args:
            source: a name in :data:`TARGETS`; a ``config.json``, its folder or its content; a
                :class:`~dspark_lab.model.DrafterConfig`. Layers must be dense (no mixtures of
                experts, no recurrent states).
            target: the target's ``config.json`` or its content, where ``source`` is a drafter.
            num_hidden_layers: layers of the drafter.
            context_layers: target layers that a context feature consists of.
        """
        shape = _shape_of(source)
        if target is not None:
            shape = shape._with_target(_shape_of(target))
        changes: dict[str, Any] = {
            "block_size": block_size,
            "num_anchors": num_anchors,
            "seq_len": seq_len,
            "markov_rank": markov_rank,
            "markov_head_type": markov_head_type,
            "enable_confidence_head": enable_confidence_head,
        }
        if num_hidden_layers is not None:
            changes["drafter"] = replace(shape.drafter, count=num_hidden_layers)
        if context_layers is not None:
            width = shape.context_size // shape.context_layers
            changes |= {"context_layers": context_layers, "context_size": context_layers * width}
        return replace(shape, **{name: v for name, v in changes.items() if v is not None})

    def __post_init__(self) -> None:
        kind, kinds = self.markov_head_type, ("none", *MARKOV_HEADS)
        if kind not in kinds:
            raise ValueError(f"markov_head_type must be one of {kinds}, got {kind!r}")
        if self.markov_rank == 0 or kind == "none":
            # Make both say that there is no Markov head.
            object.__setattr__(self, "markov_rank", 0)
            object.__setattr__(self, "markov_head_type", "none")

    @property
    def layout(self) -> Layout:
        return "anchor_predicts" if self.sample_from_anchor else "anchor_given"

    @property
    def output_size(self) -> int:
        """Tokens that the drafter can predict."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def reads_markov(self) -> bool:
        """Whether the confidence head reads the previous token's Markov embedding."""
        has_markov = self.markov_rank > 0
        return has_markov and self.enable_confidence_head and self.confidence_head_with_markov

    @cached_property
    def sizes(self) -> DrafterSizes:
        """Sizes of the drafter, counted on the module itself."""
        return drafter_sizes(self.drafter_config())

    @property
    def target_parameters(self) -> int:
        """Embedding and LM head included; 0 where the target is not known."""
        if self.target is None:
            return 0
        table = self.vocab_size * self.target.hidden_size
        return self.target.parameters + table * (1 if self.tied else 2)

    def drafter_config(self) -> DrafterConfig:
        """A drafter of this shape; its layer ids and its mask token are made up."""
        layers = {theirs: getattr(self.drafter, ours) for ours, theirs in _OF_LAYERS.items()}
        shared = {name: getattr(self, name) for name in _SHARED}
        if self.drafter.sliding:
            full = self.drafter.count - self.drafter.sliding
            kinds = ("sliding_attention",) * self.drafter.sliding + ("full_attention",) * full
            shared |= {"layer_types": kinds, "sliding_window": self.drafter.window}
        return DrafterConfig(
            **layers | shared | {"confidence_head_with_markov": self.reads_markov},
            target_layer_ids=tuple(range(self.context_layers)),
            mask_token_id=0,
            target_hidden_size=self.context_size // self.context_layers,
        )

    def _with_target(self, other: Shape) -> Shape:
        if self.target is not None:
            raise ValueError("target goes with a drafter's configuration, got one of a target")
        if other.target is None:
            raise ValueError("target must be the configuration of a target, got a drafter's")
        if other.vocab_size != self.vocab_size:
            sizes = f"{self.vocab_size} and {other.vocab_size} tokens"
            raise ValueError(f"drafter and target must have one vocabulary, got {sizes}")
        return replace(self, name=other.name, target=other.target, tied=other.tied)


# The names that a drafter's configuration has for its layers, and those that a shape shares.
_OF_LAYERS = {
    "count": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "attention_bias": "attention_bias",
}
_SHARED = {field.name for field in fields(Shape)} & {field.name for field in fields(DrafterConfig)}


def _shape_of(source: str | os.PathLike[str] | Mapping[str, Any] | DrafterConfig) -> Shape:
    if isinstance(source, DrafterConfig):
        return _of_drafter(source)
    if isinstance(source, Mapping):
        return _of_config(source, "in memory")
    if isinstance(source, str) and source.lower() in TARGETS:
        return TARGETS[source.lower()]
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists() and path.suffix != ".json":
        raise ValueError(f"a shape must be one of {list(TARGETS)} or a config.json, got {source!r}")
    return _of_config(read_json(path), path.parent.name or "config")


def _of_config(config: Mapping[str, Any], name: str) -> Shape:
    named = config.get("architectures") or config.get("speculators_model_type")
    if named and family_of(config) in ARCHITECTURES.values():
        return _of_drafter(DrafterConfig.from_dict(config))
    # The outer configuration may say what the inner one leaves out.
    text = {**config, **(config.get("text_config") or {})}
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if text.get(key):
            raise ValueError(f"layers must be dense, got {key}={text[key]}")
    kinds = list(text.get("layer_types") or [])
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers must be of attention alone, got {sorted(set(kinds))}")
    heads = _number(text, "num_attention_heads")
    hidden, count = _number(text, "hidden_size"), _number(text, "num_hidden_layers")
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    sliding = kinds.count("sliding_attention") if kinds else _sliding(text, count)
    kind = str(text.get("model_type", ""))
    layers = Layers(
        count,
        hidden,
        _number(text, "intermediate_size"),
        heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        qk_norm=kind.startswith(("qwen3", "gemma3", "gemma4")),
        attention_bias=bool(text.get("attention_bias")),
        window=window,
        sliding=sliding if window else 0,
    )
    # Where a configuration says nothing, transformers ties nothing; Gemma's always do.
    tied = bool(text.get("tie_word_embeddings", kind.startswith("gemma")))
    return _for_target(name, layers, _number(text, "vocab_size"), tied)


def _sliding(text: Mapping[str, Any], count: int) -> int:
    """How many layers have a window, for configurations that do not list them."""
    pattern = text.get("sliding_window_pattern")
    if pattern:
        # Every so many layers, one sees everything.
        return count - count // int(pattern)
    return count if text.get("sliding_window") else 0


def _of_drafter(config: DrafterConfig) -> Shape:
    return Shape(
        "drafter",
        drafter=Layers(
            **{ours: getattr(config, theirs) for ours, theirs in _OF_LAYERS.items()},
            window=config.sliding_window,
            sliding=(config.layer_types or ()).count("sliding_attention"),
        ),
        target=None,
        context_layers=len(config.target_layer_ids),
        context_size=config.context_size,
        **{name: getattr(config, name) for name in _SHARED},
    )


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config must hold {name}, an int >= 1, got {value!r}")
    return value


def _for_target(
    name: str, target: Layers, vocab_size: int, tied: bool, layers: int = 5, **sizes: Any
) -> Shape:
    """With a drafter of some such layers, and features of five, or of all but the last."""
    drafter = replace(target, count=min(layers, target.count), qk_norm=True, window=None, sliding=0)
    depth = min(5, max(1, target.count - 1))
    size = depth * target.hidden_size
    return Shape(name, vocab_size, drafter, target, depth, size, tied=tied, **sizes)


# The targets of the published drafters, as their own config.json have them, with drafters of five
# layers, five context layers, block 7, Markov rank 256, 512 anchors, 4,096 tokens. Of Gemma 4 12B's
# 48 layers, the eight that see everything have wider heads that share keys and values; here they
# are like the other forty, with 16 heads of 256. The last two are the pairs that ship here.
_GEMMA4 = Layers(48, 3840, 15360, 16, 8, 256, window=1024, sliding=40)
_SMALL = {"layers": 2, "seq_len": 512, "markov_rank": 64}
_SMOLLM2, _POCKET = _SMALL | {"num_anchors": 32}, _SMALL | {"num_anchors": 16}
TARGETS = {
    name: _for_target(name, layers, vocab_size, tied, **sizes)
    for name, layers, vocab_size, tied, sizes in (
        ("qwen3-4b", Layers(36, 2560, 9728, 32, 8, 128), 151936, True, {}),
        ("qwen3-8b", Layers(36, 4096, 12288, 32, 8, 128), 151936, False, {}),
        ("qwen3-14b", Layers(40, 5120, 17408, 40, 8, 128), 151936, False, {}),
        ("gemma4-12b", _GEMMA4, 262144, True, {}),
        ("smollm2", Layers(30, 576, 1536, 9, 3, 64, qk_norm=False), 49152, True, _SMOLLM2),
        ("pocket", Layers(4, 256, 704, 4, 2, 64, qk_norm=False), 2048, True, _POCKET),
    )
}
