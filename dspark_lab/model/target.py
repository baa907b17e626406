"""The target: a frozen causal language model of transformers, and the features a drafter reads."""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import transformers
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dspark_lab.chats import Batch
from dspark_lab.checks import Device, checked, may_be_read
from dspark_lab.common import context_doc_ids, validate_target_layer_ids
from dspark_lab.files import not_in_folder, read_json, upload
from dspark_lab.model.checkpoint import checkpoints_inside
from dspark_lab.model.protocol import Features
from dspark_lab.model.rows import KeyValues, Rows
from dspark_lab.model.slotwise import LogitRule, check_token_ids
from dspark_lab.model.smollm2 import load_smollm2

# What models call a soft cap on their logits, and a factor, in their config.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "lm_head_multiplier", "logits_scaling")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
# A module calls the hooks of every thread: an explorer's must not see the user's forward pass.
_forward_lock = threading.RLock()
_MASKED_FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


class _Layer(transformers.cache_utils.DynamicLayer):
    """What transformers asks of one layer's cache."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows, self.states = rows, KeyValues(rows)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.states.write(keys, values)

    def get_seq_length(self) -> int:
        return self.rows.width


class _Passing(transformers.cache_utils.DynamicLayer):
    """Keeps nothing. Without a cache, transformers asks the device whether rows are packed."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class TargetCache:
    """The keys and values of every layer for the tokens that each row has read."""

    states: transformers.Cache
    rows: Rows

    def commit(self, counts: Sequence[int], kept: Sequence[int] | None = None) -> None:
        """Row r keeps the first ``counts[r]`` of its new tokens; rows not in ``kept`` leave."""
        rows = self.rows.commit(counts, kept)
        if rows is not None:
            layer: Any
            for layer in self.states.layers:
                layer.states.keep(rows)


@checked
@dataclass(frozen=True, eq=False)
class Target:
    """A frozen causal language model of transformers, and its tokenizer where it has one.

    Refuses a model whose logits are not ``head_weight`` times its final hidden state under its
    ``logit_rule`` (a bias on top), whose embedding is of another width, or whose layers are not
    found.
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase | None = None
    name: str = "in memory"

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        config = self.model.config.get_text_config()
        kind, head = type(self.model).__name__, self.model.get_output_embeddings()
        if config.is_encoder_decoder:
            self._refuse("a target must be a decoder alone", kind)
        if head is None or self.model.base_model is self.model:
            self._refuse("a target must be a base model under an LM head", kind)
        if getattr(head, "bias", None) is not None:
            self._refuse("a target's LM head must have no bias", "one")
        wanted = (self.vocab_size, config.hidden_size)
        for what, weight in (("embedding", self.embed_weight), ("LM head", self.head_weight)):
            if weight.shape != wanted:
                found = f"shape {tuple(weight.shape)}"
                self._refuse(f"a target's {what} must be [vocab, hidden] = {wanted}", found)
        _ = self._layers  # refuses a model that has none
        if not self.embed_weight.is_meta:
            self._check_logits()

    def _refuse(self, wanted: str, given: Any) -> NoReturn:
        raise ValueError(f"{self.name}: {wanted}, got {given}")

    @property
    def embed_weight(self) -> Float[Tensor, "vocab hidden"]:
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def head_weight(self) -> Float[Tensor, "vocab hidden"]:
        return self.model.get_output_embeddings().weight

    @cached_property
    def logit_rule(self) -> LogitRule:
        """The soft cap and the factor on its logits, from its config."""
        config = self.model.config.get_text_config()
        cap, scale = None, 1.0
        for name in _CAPS:
            cap = getattr(config, name, None) or cap
        for name in _SCALES:
            factor = getattr(config, name, None) or 1.0
            # Granite's divides, HyperCLOVA X's of the same name multiplies.
            divides = name == "logits_scaling" and not config.model_type.startswith("hyperclovax")
            scale *= 1 / factor if divides else factor
        return LogitRule(cap, scale)

    def logits(self, last: Float[Tensor, "*axes hidden"]) -> Float[Tensor, "*axes vocab"]:
        """The logits that the model makes of its final hidden states, after its last norm."""
        return self.logit_rule(nn.functional.linear(last, self.head_weight))

    @property
    def hidden_size(self) -> int:
        return self.embed_weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.embed_weight.shape[0]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def require_room(self, what: str, tokens: int) -> None:
        """Refuse more tokens in one document than its config allows, where that says so."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and tokens > most:
            wanted = f"{what} must have at most {most} tokens (max_position_embeddings)"
            self._refuse(wanted, tokens)

    @cached_property
    def _layers(self) -> nn.ModuleList:
        """The outermost list in the base model that has as many entries as there are layers."""
        count = self.model.config.get_text_config().num_hidden_layers
        lists = [
            (name.count("."), module)
            for name, module in self.model.base_model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if not lists:
            self._refuse(f"a target must have a list of its {count} layers", "none")
        return min(lists, key=lambda found: found[0])[1]

    @property
    def device(self) -> torch.device:
        return self.embed_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_weight.dtype

    @checked
    @torch.no_grad()
    def features(
        self,
        input_ids: Int[Tensor, "batch seq"],
        layer_ids: Sequence[int],
        *,
        attention_mask: Bool[Tensor, "batch seq"] | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        seq_lens: Int[Tensor, "batch docs"] | None = None,
    ) -> Features:
        """Run the model once, without the LM head, and keep the states of the chosen layers alone.

        Rows may be padded on the right, with or without ``attention_mask``: a causal model's tokens
        never see what follows them. The features of padding are finite and mean nothing.

        Args:
            layer_ids: -1 for the embedding's output, i for the output of layer i (the mean of
                parallel streams where it has several); for the last layer the state after the norm.
            attention_mask: False on padding; read to refuse padding on the left.
            position_ids: each token's in its document; counted from 0 where None.
            seq_lens: of packed rows, the lengths of their documents; each then sees itself alone.

        On a GPU the values of both are checked in debug mode alone, so that nothing waits for them;
        a model that needs a row for each document waits for ``seq_lens`` (but see
        :meth:`batch_features`).
        """
        ids = self._layer_ids(layer_ids)
        if position_ids is not None and seq_lens is None:
            raise ValueError("position_ids must come with seq_lens, got position_ids alone")
        check_token_ids(input_ids, self.vocab_size)
        if attention_mask is not None and may_be_read(attention_mask):
            if (attention_mask[:, 1:] & ~attention_mask[:, :-1]).any():
                wanted = "attention_mask must be False on the right only"
                raise ValueError(f"{wanted}, got one on the left")
        lengths = None
        if seq_lens is not None and (may_be_read(seq_lens) or not self.decodes_batches):
            lengths = seq_lens.tolist()
            self._check_lengths(lengths, input_ids.shape[1])
        elif seq_lens is None:
            self.require_room("a document", input_ids.shape[1])
        return self._read(input_ids, ids, position_ids, seq_lens, lengths)

    @checked
    @torch.no_grad()
    def batch_features(self, batch: Batch, layer_ids: Sequence[int]) -> Features:
        """The features of a batch, its documents apart where a row holds several."""
        lengths = [[length for _, length in documents] for documents in batch.documents]
        if all(len(documents) <= 1 for documents in lengths):
            return self.features(batch.input_ids, layer_ids)
        check_token_ids(batch.input_ids, self.vocab_size)
        self._check_lengths(lengths, batch.input_ids.shape[1])
        ids = self._layer_ids(layer_ids)
        return self._read(batch.input_ids, ids, None, batch.seq_lens, lengths)

    def _layer_ids(self, layer_ids: Sequence[int]) -> list[int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return validate_target_layer_ids(layer_ids, self.num_layers)

    def _read(
        self,
        input_ids: Tensor,
        layer_ids: list[int],
        position_ids: Tensor | None,
        seq_lens: Tensor | None,
        lengths: list[list[int]] | None,
    ) -> Features:
        """The features of checked rows; ``lengths`` are ``seq_lens`` on the host, where known."""
        input_ids = upload(input_ids, self.device)
        if seq_lens is None:
            return self._forward(input_ids, layer_ids)
        seq_lens = upload(seq_lens, self.device)
        if position_ids is not None:
            position_ids = upload(position_ids, self.device)
        if not self.decodes_batches:
            assert lengths is not None
            return self._apart(input_ids, layer_ids, position_ids, lengths)
        docs = context_doc_ids(seq_lens, input_ids.shape[1], self.device)
        # Padding counts as one more document: every token sees one at least, and no score is NaN.
        visible = (docs.unsqueeze(2) == docs.unsqueeze(1)).tril()
        if position_ids is None:
            position_ids = (visible.sum(dim=2) - 1).masked_fill_(docs == seq_lens.shape[1], 0)
        mask = _additive(visible, self.dtype)
        return self._forward(input_ids, layer_ids, attention_mask=mask, position_ids=position_ids)

    @property
    def decodes_batches(self) -> bool:
        """Whether tokens are known to interact only as an attention mask allows.

        Sliding windows, recurrent layers and some attention kernels do not read such a mask.
        """
        config: Any = self.model.config
        return (
            config.model_type in _MASKED_FAMILIES
            and getattr(config, "sliding_window", None) is None
            and config._attn_implementation in ("eager", "sdpa")
        )

    def start_cache(self, batch: int, capacity: int) -> TargetCache:
        """An empty cache of keys and values, for :meth:`advance`.

        It has room for ``capacity`` tokens a row, those of an :meth:`advance` that do not stay
        among them. Refuses recurrent layers, and several rows without :attr:`decodes_batches`.
        """
        if self._other_layers:
            self._refuse("decoding needs layers of attention alone", self._other_layers)
        if batch > 1 and not self.decodes_batches:
            self._refuse(f"a {type(self.model).__name__} decodes one row at a time", batch)
        rows = Rows(batch, capacity, self.device)
        return TargetCache(transformers.Cache(layer_class_to_replicate=partial(_Layer, rows)), rows)

    @property
    def _other_layers(self) -> list[str]:
        """The kinds of layers that a cache of keys and values does not suit."""
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None) or []
        return sorted({*kinds} - {"full_attention", "sliding_attention"})

    @cached_property
    def _takes_a_cache(self) -> bool:
        takes = inspect.signature(self.model.base_model.forward).parameters
        return not self._other_layers and "past_key_values" in takes

    @torch.no_grad()
    def advance(
        self, input_ids: Int[Tensor, "batch new"], cache: TargetCache, layer_ids: Sequence[int]
    ) -> Features:
        """The features of further tokens of each row, right behind those in ``cache``.

        Before the next call :meth:`TargetCache.commit` must say which tokens stay in the cache.
        """
        rows, new = cache.rows, input_ids.shape[1]
        inputs: dict[str, Any] = {"past_key_values": cache.states, "use_cache": True}
        if not rows.even:
            inputs["attention_mask"] = _additive(rows.mask(new), self.dtype)
        if any(rows.lengths):
            inputs["position_ids"] = rows.positions(new)
        return self._forward(input_ids, list(layer_ids), **inputs)

    def _forward(self, input_ids: Tensor, layer_ids: list[int], **inputs: Any) -> Features:
        layers = self._layers
        context = self.embed_weight.new_empty(*input_ids.shape, len(layer_ids), self.hidden_size)
        copied: list[int] = []

        def copy(index: int, state: Tensor | tuple[Tensor, ...]) -> None:
            state = state[0] if isinstance(state, tuple) else state
            if state.dim() == 4:  # hyper-connections: [batch, seq, streams, hidden]
                state = state.mean(dim=2)
            # A copy, because a model may go on to change its states in place.
            context[:, :, index].copy_(state)
            copied.append(index)

        def copy_input(index: int, _module: Any, args: Any, kwargs: Any) -> None:
            copy(index, args or kwargs["hidden_states"])

        def copy_output(index: int, _module: Any, _args: Any, output: Any) -> None:
            copy(index, output)

        hooks = []
        if self._takes_a_cache and "past_key_values" not in inputs:
            inputs["past_key_values"] = transformers.Cache(layer_class_to_replicate=_Passing)
        with _forward_lock:
            for index, layer_id in enumerate(layer_ids):
                if layer_id == -1:
                    hook = partial(copy_input, index)
                    hooks.append(layers[0].register_forward_pre_hook(hook, with_kwargs=True))
                elif layer_id < len(layers) - 1:
                    hook = partial(copy_output, index)
                    hooks.append(layers[layer_id].register_forward_hook(hook))
            try:
                output = self.model.base_model(input_ids, **{"use_cache": False, **inputs})
            finally:
                for handle in hooks:
                    handle.remove()
        last = output.last_hidden_state
        if layer_ids and layer_ids[-1] == len(layers) - 1:
            copy(-1, last)
        if len(copied) != len(layer_ids):
            self._refuse(f"each of the layers {layer_ids} must run once", f"{len(copied)} states")
        return Features(context.flatten(2), last)

    def _apart(
        self,
        input_ids: Tensor,
        layer_ids: list[int],
        position_ids: Tensor | None,
        lengths: list[list[int]],
    ) -> Features:
        """Each document in a row of its own: slower than a mask, and right for every model."""
        places = [
            (row, slice(end - length, end))
            for row, documents in enumerate(lengths)
            for length, end in zip(documents, accumulate(documents), strict=True)
            if length
        ]

        def in_rows(tokens: Tensor) -> Tensor:
            return pad_sequence([tokens[place] for place in places], batch_first=True)

        # Not every model takes positions; without any, all count from 0.
        given = {} if position_ids is None else {"position_ids": in_rows(position_ids)}
        alone = self._forward(in_rows(input_ids), layer_ids, **given)
        together = []
        for states in (alone.context, alone.last):
            together.append(states.new_zeros(*input_ids.shape, states.shape[2]))
            for (row, tokens), state in zip(places, states, strict=True):
                together[-1][row, tokens] = state[: tokens.stop - tokens.start]
        return Features(*together)

    def _check_lengths(self, lengths: list[list[int]], row: int) -> None:
        """Refuse lengths of documents that rows of ``row`` tokens, or the target, cannot hold."""
        flat = [length for documents in lengths for length in documents]
        if not any(flat) or min(flat) < 0 or max(map(sum, lengths)) > row:
            wanted = f"lengths of documents in rows of {row} tokens"
            raise ValueError(f"seq_lens must be {wanted}, got {lengths}")
        self.require_room("a document", max(flat))

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Refuse a model that does more to its logits than the names of its config tell."""
        ids = torch.arange(2, device=self.device).remainder(self.vocab_size).unsqueeze(0)
        found = self.model(ids, use_cache=False).logits.float()
        last = self._forward(ids, [0]).last
        expected = self.logits(last.to(self.dtype)).float()
        allowed = max(torch.finfo(torch.float32).eps, torch.finfo(self.dtype).eps) ** 0.5
        if found.shape != expected.shape or not torch.allclose(
            found, expected, rtol=0, atol=allowed * float(expected.abs().max())
        ):
            self._refuse(
                "a target's logits must be its LM head times its final hidden state, under the "
                "soft cap and the factor that its config tells",
                f"a {type(self.model).__name__} whose logits are something else",
            )


@checked
def load_target(
    name_or_path: str | os.PathLike[str] = "smollm2",
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
) -> Target:
    """Load ``"smollm2"``, or any causal language model by folder or by hub id.

    Never runs code that comes with a model, and reads safetensors alone. Weights that are missing,
    misshapen or cut off, and a broken tokenizer are a ValueError.
    """
    if name_or_path == "smollm2":
        return Target(*load_smollm2(device, dtype), "smollm2")
    name = os.path.expanduser(name_or_path)
    _require_weights(name_or_path)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local_files_only}
    try:
        result: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            # Said here with their names, where transformers points at a log.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(f"{name}: a file of weights is damaged or cut off: {error}") from error
    loaded, report = result
    # transformers would fill these with random numbers, and a target is not trained any more.
    if report["missing_keys"]:
        raise ValueError(f"{name}: weights are missing: {sorted(report['missing_keys'])}")
    if report["mismatched_keys"]:
        # transformers 4 gives their names, 5 the shapes as well.
        keys = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
        raise ValueError(f"{name}: weights have other shapes than the config says: {sorted(keys)}")
    return Target(loaded.to(device), _tokenizer(name, options), name)


@checked
def require_target(name_or_path: str | os.PathLike[str]) -> None:
    """Refuse what :func:`load_target` would not find; of a model of the hub, its config is read."""
    if name_or_path == "smollm2" or _require_weights(name_or_path):
        return
    try:
        transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"{not_in_folder(Path(name_or_path), 'a model')}, and none could be fetched under the "
            f"name {name_or_path} from the Hugging Face hub: {str(error).splitlines()[0]}"
        ) from error


def _require_weights(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether it names a folder, in which a model must lie."""
    name = os.path.expanduser(name_or_path)
    folder = Path(name)
    if isinstance(name_or_path, str) and not name.startswith((".", "/")) and not folder.is_dir():
        return False
    if not folder.is_dir():
        raise not_in_folder(folder, "a model")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} must hold its weights as *.safetensors, got none; pickled weights "
            "(*.bin, *.pt) can run code when they are read, so they never are"
            f"{checkpoints_inside(folder)}"
        )
    read_json(folder / "config.json")
    return True


def _tokenizer(name: str, options: dict[str, Any]) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub id; None where there is none that knows a token."""
    folder = Path(name)
    try:
        if folder.is_dir() and not any(any(folder.glob(files)) for files in _TOKENIZER_FILES):
            return None
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        if folder.is_dir():
            raise ValueError(f"{name}: its tokenizer cannot be read: {error}") from error
        if isinstance(error, (OSError, ValueError)):
            return None
        raise
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def _additive(
    visible: Bool[Tensor, "batch query key"], dtype: torch.dtype
) -> Float[Tensor, "batch 1 query key"]:
    """The mask as what is added to the scores."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
