"""Drafters on disk, in the layout of the published checkpoints.

    config.json         the drafter's shape, see DrafterConfig.to_dict, and the dtype of its tensors
    model.safetensors   every parameter under its name in the drafter; or several files
                        model-00001-of-0000N.safetensors, and model.safetensors.index.json, which
                        says what tensor is in what file

Embedding and LM head are the target's own, so a checkpoint may leave them out and take them from
the target again. A pickle is never opened: it can run any code.
"""

import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dspark_lab.checks import Count, Device, checked
from dspark_lab.files import previous_version, read_json, replaced_whole, write_json
from dspark_lab.model.config import ARCHITECTURE, DrafterConfig
from dspark_lab.model.drafter import Drafter, meta_drafter
from dspark_lab.model.protocol import TargetWeights

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# How the confidences of these weights are scaled (dspark_lab.rates).
CALIBRATION = "calibration.json"

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OWN_FILE = re.compile(
    rf"{CONFIG}|{WEIGHTS}|{INDEX}|{CALIBRATION}|model-\d{{5}}-of-\d{{5}}\.safetensors"
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@checked
def save_drafter(
    drafter: Drafter,
    folder: str | os.PathLike[str],
    *,
    include_embeddings: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: Count | None = None,
) -> None:
    """Write a drafter as a checkpoint folder, whole or not at all.

    A checkpoint that stands there already is replaced, its calibration too; a folder that holds
    anything else is refused.

    Args:
        include_embeddings: write the frozen embedding and LM head too; without them, loading needs
            the target.
        max_shard_bytes: most bytes of a file, unless one tensor is larger; one file where None.
    """
    from huggingface_hub import split_torch_state_dict_into_shards as split_by_size

    _check_dtype(dtype)
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    _check_replaceable(folder)
    for unfinished in folder.parent.glob(f".{folder.name}.partial*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    tensors = {
        name: value.to(dtype or value.dtype).contiguous()
        for name, value in drafter.state_dict().items()
        if include_embeddings or name not in (_EMBEDDING, _HEAD)
    }
    # The target's embedding may be its LM head; a file holds each name apart.
    if include_embeddings and tensors[_HEAD].data_ptr() == tensors[_EMBEDDING].data_ptr():
        tensors[_HEAD] = tensors[_HEAD].clone()
    values = drafter.config.to_dict()
    values["dtype"] = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    split = split_by_size(tensors, max_shard_size=max_shard_bytes or sys.maxsize)
    try:
        with replaced_whole(folder) as partial:
            write_json(partial / CONFIG, values)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                write_json(partial / INDEX, index)
            for file, names in split.filename_to_tensors.items():
                shard = {name: tensors[name] for name in names}
                save_file(shard, partial / file, metadata={"format": "pt"})
                # safetensors makes files that only their owner can read, whatever the umask.
                shutil.copymode(partial / CONFIG, partial / file)
    except SafetensorError as error:
        raise OSError(f"could not write a drafter to {folder}: {error}") from error


@checked
def load_drafter(
    folder: str | os.PathLike[str],
    *,
    target: TargetWeights | None = None,
    device: Device = "cpu",
    dtype: torch.dtype | None = None,
) -> Drafter:
    """Read a drafter from a checkpoint folder, in eval mode, embedding and LM head frozen.

    With ``tie_word_embeddings`` one of embedding and LM head stands for both.

    Args:
        folder: a folder, or ``owner/name`` on the Hugging Face hub where there is no such folder.
        target: the :class:`dspark_lab.model.Target` whose embedding and LM head the drafter shares
            where the checkpoint leaves them out. Always checked to fit the drafter.
        dtype: where None as stored, or, of several, the one that ``config.json`` names.

    Raises:
        TypeError, ValueError: a damaged or unfit configuration or file of weights, by its name.
    """
    _check_dtype(dtype)
    path = _find_folder(folder)
    if not (path / CONFIG).is_file():
        inside = checkpoints_inside(path)
        raise FileNotFoundError(f"the folder {path} must hold {CONFIG}, got none{inside}")
    values = read_json(path / CONFIG)
    try:
        config = DrafterConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path / CONFIG}: {error}") from None
    drafter = meta_drafter(config)
    stored = _read_headers(path)
    _check_tensors(path, stored, drafter)
    absent = [name for name in (_EMBEDDING, _HEAD) if name not in stored]
    tied = bool(values.get("tie_word_embeddings"))
    one_for_both = tied and len(absent) == 1
    if target is not None:
        _check_target(path, config, target)
    elif absent and not one_for_both:
        raise ValueError(
            f"{path}: the checkpoint leaves out {' and '.join(absent)}; pass target= to take them "
            "from the target that the drafter was trained for"
        )
    dtype = dtype or _common_dtype(path, stored, values)
    # What safetensors gives is mapped from the file, and would change with it.
    state = {name: part[:].to(device, dtype, copy=True) for name, part in stored.items()}
    drafter.load_state_dict(state, strict=False, assign=True)
    frozen = {name: state[name] for name in (_EMBEDDING, _HEAD) if name in state}
    if tied and not absent and not torch.equal(frozen[_EMBEDDING], frozen[_HEAD]):
        wrong = f"tie_word_embeddings, but {_EMBEDDING} and {_HEAD} differ"
        raise ValueError(f"{path}: {CONFIG} says {wrong}")
    if one_for_both:
        frozen = dict.fromkeys((_EMBEDDING, _HEAD), *frozen.values())
    elif target is not None:
        frozen = {_EMBEDDING: target.embed_weight, _HEAD: target.head_weight} | frozen
    drafter.use_target_embeddings(frozen[_EMBEDDING], frozen[_HEAD])
    return drafter.eval()


def checkpoints_inside(folder: Path) -> str:
    """A sentence that names the checkpoints in the folders of ``folder``; empty without any."""
    found = sorted(
        path.parent.relative_to(folder).as_posix()
        for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}")
        for path in folder.glob(pattern)
    )
    return f"; it holds checkpoints, load one of them: {_listed(found)}" if found else ""


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _DTYPES.values():
        allowed = ", ".join(map(str, _DTYPES.values()))
        raise ValueError(f"dtype must be one of {allowed}, got {dtype}")


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder to save a drafter in, got a file")
    names = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in names if not _OWN_FILE.fullmatch(name)]
    try:
        is_drafter = ARCHITECTURE in (read_json(folder / CONFIG).get("architectures") or ())
    except (OSError, TypeError, ValueError):
        is_drafter = False
    if foreign or (names and not is_drafter):
        raise ValueError(
            f"{folder} must be empty or hold a drafter's checkpoint alone, which is replaced as a "
            f"whole, got {_listed(foreign or names)}"
            + ("" if is_drafter else f" without a {CONFIG} of architecture {ARCHITECTURE}")
        )


def _find_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        what = "a pickle, which is never loaded" if path.suffix in _PICKLES else "a file"
        raise ValueError(f"{path} must be a folder with {CONFIG} and {WEIGHTS}, got {what}")
    previous = previous_version(Path(os.path.realpath(path)))
    if previous.is_dir():
        warnings.warn(
            f"a save to {path} was interrupted; loading the checkpoint before it, from {previous}",
            stacklevel=4,
        )
        return previous
    if not (isinstance(folder, str) and _HUB_ID.fullmatch(folder)):
        raise FileNotFoundError(f"there is no folder {path} with a drafter")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(folder, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(
            f"there is no folder {folder} with a drafter, and none could be fetched under that "
            f"name from the Hugging Face hub: {error}"
        ) from error


def _read_headers(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint as slices of its files, none read so far."""
    if (folder / WEIGHTS).is_file():
        return _read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        wanted = f"{folder} must hold {WEIGHTS} or {INDEX}"
        if pickles:
            found = f"a pickle, which is never loaded: {_listed(pickles)}"
            raise ValueError(f"{wanted}, got {found}")
        raise FileNotFoundError(f"{wanted}, got neither")
    file_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        wanted = "a weight_map from tensors to files"
        raise ValueError(f"{folder / INDEX} must hold {wanted}, got {file_of!r}")
    files: dict[str, dict[str, Any]] = {}
    for name, file in file_of.items():
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix in _PICKLES:
            wanted = "in a safetensors file beside"
            raise ValueError(f"{folder / INDEX}: {name} must be {wanted}, got {file!r}")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / INDEX} names {file}, which is not there")
        if file not in files:
            files[file] = _read_header(folder / file)
        if name not in files[file]:
            raise ValueError(f"{folder / file} must hold {name}, as {INDEX} says; it does not")
    stored = {name: part for parts in files.values() for name, part in parts.items()}
    return stored | {name: files[file][name] for name, file in file_of.items()}


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name) for name in file.keys()}
    except SafetensorError as error:
        with path.open("rb") as opened:
            start = opened.read(32)
        found = f"got one that is truncated or damaged: {error}"
        # A safetensors file begins with the length of its header in eight bytes, and the header, {.
        if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[8:9] != b"{"):
            found = "got a pickle, which is never loaded"
        elif start.startswith(b"version https://git-lfs"):
            found = "got a pointer of git-lfs; `git lfs pull` fetches the file itself"
        raise ValueError(f"{path} must be a safetensors file, {found}") from None


def _check_tensors(folder: Path, stored: dict[str, Any], drafter: Drafter) -> None:
    expected = {name: list(tensor.shape) for name, tensor in drafter.state_dict().items()}
    missing = [name for name in expected if name not in stored and name not in (_EMBEDDING, _HEAD)]
    if missing:
        raise ValueError(f"{folder} must hold {_listed(missing)}, as {CONFIG} says; it does not")
    surplus = sorted(name for name in stored if name not in expected)
    if surplus:
        wanted = f"the tensors of {CONFIG} alone"
        raise ValueError(f"{folder} must hold {wanted}, got {_listed(surplus)} too")
    wrong = []
    for name, part in stored.items():
        if part.get_shape() != expected[name]:
            wrong.append(f"{name} must be {expected[name]}, got {part.get_shape()}")
        if part.get_dtype() not in _DTYPES:
            wrong.append(f"{name} must be of {', '.join(_DTYPES)}, got {part.get_dtype()}")
    if wrong:
        raise ValueError(f"{folder}: {_listed(wrong, '; ')}")


def _check_target(folder: Path, config: DrafterConfig, target: TargetWeights) -> None:
    wanted = (config.vocab_size, config.target_hidden_size or config.hidden_size)
    found = tuple(target.embed_weight.shape)
    if found != wanted:
        raise ValueError(
            f"{folder}: target must have vocab_size {wanted[0]} and hidden_size {wanted[1]}, as "
            f"the drafter was made for, got {found[0]} and {found[1]}"
        )
    if config.target_layer_ids[-1] >= target.num_layers:
        needs = f"target must have the layers {list(config.target_layer_ids)}"
        raise ValueError(f"{folder}: {needs}, got one of {target.num_layers} layers")


def _common_dtype(folder: Path, stored: dict[str, Any], values: dict[str, Any]) -> torch.dtype:
    kinds = sorted({part.get_dtype() for part in stored.values()})
    if len(kinds) == 1:
        return _DTYPES[kinds[0]]
    named = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    for dtype in _DTYPES.values():
        if str(dtype) == f"torch.{named}":
            return dtype
    lacking = f"{CONFIG} names none of them as dtype, got {named}; pass dtype="
    raise ValueError(f"{folder}: tensors are of {' and '.join(kinds)}, and {lacking}")


def _listed(names: list[str], separator: str = ", ") -> str:
    """The names, of many the first eight."""
    rest = [f"and {len(names) - 8} more"] if len(names) > 8 else []
    return separator.join(names[:8] + rest)
