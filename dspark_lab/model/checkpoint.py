"""Drafters on disk, in the layout of the published checkpoints.

    config.json         the drafter's shape, see DrafterConfig.to_dict, and the dtype of its tensors
    model.safetensors   every parameter under its name in the drafter; or several files
                        model-00001-of-0000N.safetensors, and model.safetensors.index.json, which
                        says what tensor is in what file

Embedding and LM head are the target's own, so a checkpoint may leave them out and take them from
the target again. A pickle is never opened: it can run any code. This file knows folders, files and
the names of tensors; it knows nothing about what a drafter computes, nor about the state of a
training run.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark_lab.checks import require_int
from dspark_lab.model.config import ARCHITECTURE, DrafterConfig
from dspark_lab.model.drafter import Drafter, meta_drafter

if TYPE_CHECKING:
    import dspark_lab.model.target

__all__ = ["load_drafter", "save_drafter"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# How a drafter's confidences are scaled (dspark_lab.rates.scaling); of these very weights.
CALIBRATION = "calibration.json"

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and what its file says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def save_drafter(
    drafter: Drafter,
    folder: str | os.PathLike[str],
    *,
    include_embeddings: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a drafter as a checkpoint folder, all of it or nothing.

    The files are written beside ``folder`` and renamed when they are complete. A checkpoint that
    stands there already is replaced, and left as it is when anything fails.

    Args:
        drafter: on any device, in training or not.
        folder: made where it does not exist, with its parents.
        include_embeddings: whether to write the frozen embedding and LM head too; without them,
            loading needs the target.
        dtype: of the tensors in the file; as they are where None.
        max_shard_bytes: split the tensors over files of at most so many bytes, or of one larger
            tensor; one file where None.

    Raises:
        TypeError, ValueError: a drafter, dtype or size that is none; or ``folder`` holds anything
            but a drafter's checkpoint, which would be lost (its calibration goes with it).
        OSError: ``folder`` cannot be written, or the disk is full.
    """
    if not isinstance(drafter, Drafter):
        raise TypeError(f"drafter must be a Drafter, got {type(drafter).__name__}")
    _require_dtype(dtype)
    if max_shard_bytes is not None:
        require_int("max_shard_bytes", max_shard_bytes, 1)
    folder = Path(folder).expanduser().resolve()
    partial, previous = _beside(folder, "partial"), _beside(folder, "previous")
    if previous.is_dir() and not folder.exists():
        # A save was killed as it replaced the checkpoint.
        previous.rename(folder)
    _require_replaceable(folder)
    tensors = _tensors_to_save(drafter, include_embeddings, dtype)
    values = drafter.config.to_dict()
    values["dtype"] = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _write_json(partial / CONFIG, values)
        _write_tensors(partial, tensors, max_shard_bytes)
        _replace(folder, partial, previous)
    except SafetensorError as error:
        raise OSError(f"could not write a drafter to {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_drafter(
    folder: str | os.PathLike[str],
    *,
    target: "dspark_lab.model.target.Target | None" = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Drafter:
    """Reads a drafter from a checkpoint folder, in eval mode, embedding and LM head frozen.

    The folder may come from any trainer that writes the published layout. With
    ``tie_word_embeddings`` one of embedding and LM head stands for both.

    Args:
        folder: a folder, or ``owner/name`` on the Hugging Face hub where there is no such folder.
        target: whose embedding and LM head the drafter shares where the checkpoint leaves them out.
            Always checked to fit the drafter.
        device: of the parameters.
        dtype: of the parameters. Where None: as stored, or, where the file holds several, the one
            that ``config.json`` names.

    Raises:
        TypeError, ValueError: a file that is no valid configuration or not a whole safetensors
            file, a pickle, a tensor that is missing, surplus or misshapen, a target that does not
            fit; named with the file.
        OSError: the folder or a file of it is missing (FileNotFoundError) or cannot be read.
    """
    _require_dtype(dtype)
    path = _find_folder(folder)
    values = _read_json(path / CONFIG)
    try:
        config = DrafterConfig.from_dict(values)
        drafter = meta_drafter(config)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path / CONFIG}: {error}") from None
    stored = _read_headers(path)
    tied = bool(values.get("tie_word_embeddings"))
    absent = [name for name in (_EMBEDDING, _HEAD) if name not in stored]
    _require_tensors(path, stored, drafter)
    if target is not None:
        _require_fitting_target(path, config, target)
    elif absent and not (tied and len(absent) == 1):
        raise ValueError(
            f"{path}: the checkpoint leaves out {' and '.join(absent)}; pass target= to take them "
            "from the target that the drafter was trained for"
        )
    state = _read_tensors(stored, device, dtype or _common_dtype(path, stored, values))
    drafter.load_state_dict(state, strict=False, assign=True)
    if tied and len(absent) == 1:
        (shared,) = (state[name] for name in (_EMBEDDING, _HEAD) if name in state)
        drafter.use_target_embeddings(shared, shared)
    elif absent and target is not None:
        drafter.use_target_embeddings(
            state.get(_EMBEDDING, target.embed_weight), state.get(_HEAD, target.head_weight)
        )
    elif tied and not absent and not torch.equal(state[_EMBEDDING], state[_HEAD]):
        raise ValueError(
            f"{path}: {CONFIG} says tie_word_embeddings, but {_EMBEDDING} and {_HEAD} differ"
        )
    return drafter.eval()


def _require_dtype(dtype: torch.dtype | None) -> None:
    if dtype is None or dtype in _DTYPES.values():
        return
    allowed = ", ".join(map(str, _DTYPES.values()))
    kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
    raise kind(f"dtype must be one of {allowed}, got {dtype!r}")


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _require_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder to save a drafter in, got a file")
    names = sorted(entry.name for entry in folder.iterdir())
    foreign = [
        name
        for name in names
        if name not in (CONFIG, WEIGHTS, INDEX, CALIBRATION) and not _SHARD.fullmatch(name)
    ]
    if foreign:
        raise ValueError(
            f"{folder} must be empty or hold a drafter's checkpoint alone, which is replaced as a "
            f"whole, got {_listed(foreign)}"
        )
    if names and not _holds_drafter(folder):
        raise ValueError(
            f"{folder} must be empty or hold a drafter's checkpoint to replace, got the files "
            f"{_listed(names)} without a {CONFIG} of architecture {ARCHITECTURE}"
        )


def _holds_drafter(folder: Path) -> bool:
    try:
        return ARCHITECTURE in (_read_json(folder / CONFIG).get("architectures") or ())
    except (OSError, TypeError, ValueError):
        return False


def _tensors_to_save(
    drafter: Drafter, include_embeddings: bool, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    storages = set()
    for name, value in drafter.state_dict().items():
        if name in (_EMBEDDING, _HEAD) and not include_embeddings:
            continue
        tensor = value.detach().to(dtype=dtype or value.dtype).contiguous()
        # Of a target whose embedding is its LM head: a file holds each name apart.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _write_tensors(folder: Path, tensors: dict[str, Tensor], max_bytes: int | None) -> None:
    shards = _split(tensors, max_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        file_of = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        _write_json(folder / INDEX, index)
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read, whatever the umask.
        shutil.copymode(folder / CONFIG, folder / name)


def _split(tensors: dict[str, Tensor], max_bytes: int | None) -> list[dict[str, Tensor]]:
    if max_bytes is None:
        return [tensors]
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _replace(folder: Path, partial: Path, previous: Path) -> None:
    """Puts ``partial`` in the place of ``folder``; a kill leaves the old one, perhaps moved."""
    if not folder.exists():
        partial.rename(folder)
        return
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)
    try:
        partial.rename(folder)
    except BaseException:
        previous.rename(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _find_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        what = "a pickle, which is never loaded" if path.suffix in _PICKLES else "a file"
        raise ValueError(f"{path} must be a folder with {CONFIG} and {WEIGHTS}, got {what}")
    previous = _beside(path.resolve(), "previous")
    if previous.is_dir():
        warnings.warn(
            f"a save to {path} was interrupted; loading the checkpoint before it, from {previous}",
            stacklevel=3,
        )
        return previous
    if isinstance(folder, str) and _HUB_ID.fullmatch(folder):
        return _download(folder)
    raise FileNotFoundError(f"there is no folder {path} with a drafter")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(
            f"there is no folder {name} with a drafter, and none could be fetched under that name "
            f"from the Hugging Face hub: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"the folder {path.parent} must hold {path.name}, got none")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_headers(folder: Path) -> dict[str, _Stored]:
    if (folder / WEIGHTS).is_file():
        return _read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} must hold {WEIGHTS} or {INDEX}, got a pickle, which is never loaded: "
                f"{_listed(pickles)}"
            )
        raise FileNotFoundError(f"{folder} must hold {WEIGHTS} or {INDEX}, got neither")
    file_of = _read_index(folder)
    stored: dict[str, _Stored] = {}
    for file in sorted(set(file_of.values())):
        stored |= _read_header(folder / file)
    for name, file in file_of.items():
        if name not in stored or stored[name].file.name != file:
            raise ValueError(f"{folder / file} must hold {name}, as {INDEX} says; it does not")
    return stored


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    file_of = _read_json(path).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ValueError(f"{path} must hold a weight_map from tensors to files, got {file_of!r}")
    for name, file in file_of.items():
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix in _PICKLES:
            raise ValueError(f"{path}: {name} must be in a safetensors file beside, got {file!r}")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{path} names {file}, which is not there")
    return file_of


def _read_header(path: Path) -> dict[str, _Stored]:
    with _opened(path) as file:
        stored = {}
        for name in file.keys():
            tensor = file.get_slice(name)
            stored[name] = _Stored(path, tuple(tensor.get_shape()), tensor.get_dtype())
        return stored


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, {_what_else(path, error)}") from None


def _what_else(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as file:
        start = file.read(32)
    # A safetensors file begins with the length of its header in eight bytes, and the header, {.
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[8:9] != b"{"):
        return "got a pickle, which is never loaded"
    if start.startswith(b"version https://git-lfs"):
        return "got a pointer of git-lfs; `git lfs pull` fetches the file itself"
    return f"got one that is truncated or damaged: {error}"


def _require_tensors(folder: Path, stored: Mapping[str, _Stored], drafter: Drafter) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    missing = [name for name in expected if name not in stored and name not in (_EMBEDDING, _HEAD)]
    if missing:
        raise ValueError(f"{folder} must hold {_listed(missing)}, as {CONFIG} says; it does not")
    surplus = [name for name in stored if name not in expected]
    if surplus:
        raise ValueError(
            f"{folder} must hold the tensors of {CONFIG} alone, got {_listed(sorted(surplus))} too"
        )
    misshapen = [
        f"{name} must be {list(expected[name])}, got {list(tensor.shape)}"
        for name, tensor in stored.items()
        if tensor.shape != expected[name]
    ]
    if misshapen:
        raise ValueError(f"{folder}: {_listed(misshapen, '; ')}")
    quantised = [name for name, tensor in stored.items() if tensor.dtype not in _DTYPES]
    if quantised:
        raise ValueError(
            f"{folder}: tensors must be of {', '.join(_DTYPES)}, got {stored[quantised[0]].dtype} "
            f"of {_listed(quantised)}"
        )


def _require_fitting_target(
    folder: Path, config: DrafterConfig, target: "dspark_lab.model.target.Target"
) -> None:
    if not hasattr(target, "embed_weight"):
        raise TypeError(
            f"{folder}: target must be a Target, see dspark_lab.model.target.load_target, got "
            f"{type(target).__name__}"
        )
    wanted = (config.vocab_size, config.target_hidden_size or config.hidden_size)
    found = (target.vocab_size, target.hidden_size)
    if found != wanted:
        raise ValueError(
            f"{folder}: target must have vocab_size {wanted[0]} and hidden_size {wanted[1]}, as "
            f"the drafter was made for, got {found[0]} and {found[1]}"
        )
    deepest = config.target_layer_ids[-1]
    if deepest >= target.num_layers:
        raise ValueError(
            f"{folder}: target must have the layers {list(config.target_layer_ids)}, got one of "
            f"{target.num_layers} layers"
        )


def _common_dtype(
    folder: Path, stored: Mapping[str, _Stored], values: Mapping[str, Any]
) -> torch.dtype:
    kinds = sorted({tensor.dtype for tensor in stored.values()})
    if len(kinds) == 1:
        return _DTYPES[kinds[0]]
    named = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    for dtype in _DTYPES.values():
        if str(dtype) == f"torch.{named}":
            return dtype
    raise ValueError(
        f"{folder}: tensors are of {' and '.join(kinds)}, and {CONFIG} names none of them as "
        f"dtype, got {named}; pass dtype="
    )


def _read_tensors(
    stored: Mapping[str, _Stored], device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    state = {}
    for path in sorted({tensor.file for tensor in stored.values()}):
        with _opened(path) as file:
            for name in file.keys():
                # What safetensors gives is mapped from the file, and would change with it.
                state[name] = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
    return state


def _listed(names: list[str], separator: str = ", ") -> str:
    """The names, of many the first eight."""
    rest = [f"and {len(names) - 8} more"] if len(names) > 8 else []
    return separator.join(names[:8] + rest)
