"""Drafters on disk, in the layout of the published checkpoints or of another program.

    config.json         the drafter's shape, see DrafterConfig.to_dict and dspark_lab.model.formats,
                        and the dtype of its tensors
    model.safetensors   every parameter under its name in the drafter; or several files
                        model-00001-of-0000N.safetensors, and model.safetensors.index.json, which
                        says what tensor is in what file

All formats have these names for tensors, some of them more tensors than a drafter has parameters.
With a reduced vocabulary ``d2t`` maps it to the target's (target id = draft id + d2t[draft id]),
and ``t2d`` says of each of the target's ids whether it is in it.

Embedding and LM head are the target's own, so a checkpoint may leave them out and take them from
the target again. A pickle is never opened: it can run any code.
"""

import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dspark_lab.blocks import Layout
from dspark_lab.checks import Count, Device, checked
from dspark_lab.files import not_in_folder, previous_version, read_json, replaced_whole, write_json
from dspark_lab.model.config import DrafterConfig
from dspark_lab.model.drafter import Drafter, meta_drafter
from dspark_lab.model.formats import ARCHITECTURES, Format, config_for
from dspark_lab.model.protocol import TargetWeights

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# How the confidences of these weights are scaled (dspark_lab.rates).
CALIBRATION = "calibration.json"

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_D2T, _T2D = "d2t", "t2d"
# Integers of tensors that no dtype of the drafter changes.
_MAPS = {_D2T: ("I64", "I32"), _T2D: ("BOOL", "U8", "I64", "I32")}
# What trainers store beside a drafter's own: the target's, and what follows from the config.
_NOT_READ = re.compile(
    r"verifier_(lm_head|norm)\.weight|mask_embedding|(.*\.)?rotary_emb\.inv_freq"
)
_QUANTIZED = re.compile(
    r".*(_packed|_scale|_scale_inv|_scale_2|_zero_point|_shape|qweight|qzeros|\.scales|g_idx)"
)
_WITHIN = re.compile(r"logit_head\.(?=markov_head\.|confidence_head\.)")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OWN_FILE = re.compile(
    rf"{CONFIG}|{WEIGHTS}|{INDEX}|{CALIBRATION}|model-\d{{5}}-of-\d{{5}}\.safetensors"
)
_ANY_OF = " or ".join(ARCHITECTURES)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk; no tensor is read so far.

    Attributes:
        values: its ``config.json``.
        parts: slices of its files, under the names of the drafter's parameters.
        not_read: names of tensors that say nothing of the drafter.
    """

    path: Path
    values: dict[str, Any]
    config: DrafterConfig
    parts: dict[str, Any]
    not_read: list[str]

    @property
    def dtype(self) -> Any:
        """What its ``config.json`` calls the dtype of its tensors."""
        holders = self.values, self.values.get("transformer_layer_config") or {}
        named = [holder.get(key) for holder in holders for key in ("dtype", "torch_dtype")]
        return next(filter(None, named), None)

    @property
    def tied(self) -> bool:
        """Whether one tensor is embedding and LM head; of a reduced vocabulary none can be."""
        reduced = self.config.draft_vocab_size is not None
        return bool(self.values.get("tie_word_embeddings")) and not reduced

    @property
    def cuts_blocks(self) -> str:
        """A sentence where programs differ in what a slot sees of its block; else empty."""
        window, slots = self.config.sliding_window, self.config.block_size
        if window is None or window >= slots:
            return ""
        return (
            f"sliding_window {window} is narrower than a block of {slots}: SpecForge and servers "
            "hide a block's own earlier slots beyond it too, speculators and this library do not"
        )

    @property
    def absent(self) -> list[str]:
        """Of embedding and LM head, what a target has to give."""
        names = [name for name in (_EMBEDDING, _HEAD) if name not in self.parts]
        return [] if self.tied and len(names) == 1 else names


@checked
def save_drafter(
    drafter: Drafter,
    folder: str | os.PathLike[str],
    *,
    format: Format = "dspark",
    include_embeddings: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: Count | None = None,
) -> None:
    """Write a drafter as a checkpoint folder, whole or not at all.

    A checkpoint that stands there already is replaced, its calibration too; a folder that holds
    anything else is refused.

    Args:
        format: of what program the files shall be; see :mod:`dspark_lab.model.formats`.
        include_embeddings: write the frozen embedding and LM head too; without them, loading needs
            the target. The LM head of a reduced vocabulary is always written.
        max_shard_bytes: most bytes of a file, unless one tensor is larger; one file where None.

    Raises:
        ValueError: the format has no key for something that the drafter does.
    """
    _check_dtype(dtype)
    left_out = {_EMBEDDING} if drafter.config.draft_vocab_size else {_EMBEDDING, _HEAD}
    tensors = {
        name: value if name in _MAPS else value.to(dtype or value.dtype)
        for name, value in drafter.state_dict().items()
        if include_embeddings or name not in left_out
    }
    # The target's embedding may be its LM head; a file holds each name apart.
    if include_embeddings and tensors[_HEAD].data_ptr() == tensors[_EMBEDDING].data_ptr():
        tensors[_HEAD] = tensors[_HEAD].clone()
    values = drafter.config.to_dict()
    values["dtype"] = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    _write(folder, config_for(values, format), tensors, format, max_shard_bytes)


@checked
def convert_checkpoint(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format,
    layout: Layout | None = None,
    max_shard_bytes: Count | None = None,
) -> None:
    """Write a checkpoint in the format of another program, every tensor as it is stored.

    Nothing of the target is needed; a calibration of the confidences goes along.

    Args:
        folder: as :func:`load_drafter`.
        out: a folder, as :func:`save_drafter`.
        layout: of the blocks, where not None; only that of the checkpoint can be.

    Raises:
        ValueError: the format has no key for something that the drafter does.
    """
    stored = read_checkpoint(folder)
    config = stored.config
    if layout not in (None, config.layout):
        raise ValueError(
            f"{stored.path}: layout must stay {config.layout!r}, got {layout!r}: the weights were "
            "trained for the other position, each slot one token off"
        )
    values = config.to_dict() | {"tie_word_embeddings": stored.tied}
    if stored.dtype is not None:
        values["dtype"] = stored.dtype
    try:
        described = stored.values.get("speculators_config")
        values = config_for(values, format, speculators_config=described)
    except ValueError as error:
        raise ValueError(f"{stored.path}: {error}") from None
    tensors = {name: part[:] for name, part in stored.parts.items() if name not in _MAPS}
    if config.draft_vocab_size:
        tensors[_D2T] = _read_d2t(stored)
    calibration = stored.path / CALIBRATION
    also = {CALIBRATION: read_json(calibration)} if calibration.is_file() else {}
    _write(out, values, tensors, format, max_shard_bytes, also)


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
    stored = read_checkpoint(folder)
    path, config, parts = stored.path, stored.config, stored.parts
    if target is not None:
        _check_target(path, config, target)
    elif stored.absent:
        names = " and ".join(stored.absent)
        raise ValueError(
            f"{path}: the checkpoint leaves out {names}; pass target= to take them from the target "
            "that the drafter was trained for"
        )
    if stored.cuts_blocks:
        warnings.warn(f"{path / CONFIG}: {stored.cuts_blocks}", stacklevel=3)
    dtype = dtype or _common_dtype(stored)
    # What safetensors gives is mapped from the file, and would change with it.
    state = {
        name: part[:].to(device, dtype, copy=True)
        for name, part in parts.items()
        if name not in _MAPS
    }
    for name, value in state.items():
        if not bool(torch.stack(value.aminmax()).isfinite().all()):
            found = f"NaN or infinity in {dtype}"
            raise ValueError(f"{path}: {name} must hold finite numbers, got {found}")
    if config.draft_vocab_size or parts.keys() & _MAPS.keys():
        state[_D2T] = _read_d2t(stored).to(device)  # of a whole vocabulary, checked and left out
    drafter = meta_drafter(config)
    drafter.load_state_dict(state, strict=False, assign=True)
    frozen = {name: state[name] for name in (_EMBEDDING, _HEAD) if name in state}
    if stored.tied and frozen:
        one, *others = frozen.values()
        if others and not torch.equal(one, others[0]):
            wrong = f"tie_word_embeddings, but {_EMBEDDING} and {_HEAD} differ"
            raise ValueError(f"{path}: {CONFIG} says {wrong}")
        frozen = dict.fromkeys((_EMBEDDING, _HEAD), one)
    given = {} if target is None else {_EMBEDDING: target.embed_weight, _HEAD: target.head_weight}
    rule = getattr(target, "logit_rule", None)
    if not config.draft_vocab_size:
        weights = given | frozen
        drafter.use_target_embeddings(weights[_EMBEDDING], weights[_HEAD], rule)
    elif target is not None:
        # The target's LM head has a row for each of its tokens, a stored one for the draft's alone.
        embedding = frozen.get(_EMBEDDING, target.embed_weight)
        drafter.use_target_embeddings(embedding, target.head_weight, rule)
        if _HEAD in frozen:
            drafter.lm_head.weight = nn.Parameter(frozen[_HEAD], requires_grad=False)
    return drafter.eval()


@checked
def require_checkpoint(folder: str | os.PathLike[str]) -> DrafterConfig:
    """What :func:`load_drafter` would find; of the hub, the config alone is fetched."""
    path = Path(folder).expanduser()
    if not path.exists() and isinstance(folder, str) and _HUB_ID.fullmatch(folder):
        return _config_of(find_folder(folder, [CONFIG]))
    return read_checkpoint(folder).config


def read_checkpoint(folder: str | os.PathLike[str]) -> Stored:
    """A checkpoint of any format, its configuration and the shapes of its tensors checked."""
    path = find_folder(folder)
    config = _config_of(path)
    parts, not_read = _own_names(path, _read_headers(path))
    stored = Stored(path, read_config(path), config, parts, not_read)
    _check_tensors(stored)
    return stored


def _config_of(path: Path) -> DrafterConfig:
    try:
        return DrafterConfig.from_dict(read_config(path))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path / CONFIG}: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder, whatever it is of."""
    if not (path / CONFIG).is_file():
        inside = checkpoints_inside(path)
        gguf = sorted(file.name for file in path.glob("*.gguf"))
        if gguf:
            inside = f"; it holds what llama.cpp alone reads: {_listed(gguf)}"
        raise FileNotFoundError(f"the folder {path} must hold {CONFIG}, got none{inside}")
    return read_json(path / CONFIG)


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
        said = read_json(folder / CONFIG).get("architectures") or ()
        is_drafter = any(name in ARCHITECTURES for name in said)
    except (OSError, TypeError, ValueError):
        is_drafter = False
    if foreign or (names and not is_drafter):
        raise ValueError(
            f"{folder} must be empty or hold a drafter's checkpoint alone, which is replaced as a "
            f"whole, got {_listed(foreign or names)}"
            + ("" if is_drafter else f" without a {CONFIG} of architecture {_ANY_OF}")
        )


def find_folder(
    folder: str | os.PathLike[str], files: Sequence[str] = ("*.json", "*.safetensors")
) -> Path:
    """The folder of a checkpoint; of one on the hub, such files are fetched."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        kinds = dict.fromkeys(_PICKLES, "a pickle, which is never loaded")
        kinds[".gguf"] = "a GGUF file, which llama.cpp alone reads"
        what = kinds.get(path.suffix, "a file")
        raise ValueError(f"{path} must be a folder with {CONFIG} and {WEIGHTS}, got {what}")
    previous = previous_version(Path(os.path.realpath(path)))
    if previous.is_dir():
        warnings.warn(
            f"a save to {path} was interrupted; loading the checkpoint before it, from {previous}",
            stacklevel=4,
        )
        return previous
    if not (isinstance(folder, str) and _HUB_ID.fullmatch(folder)):
        raise not_in_folder(path, "a drafter")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(folder, allow_patterns=list(files)))
    except Exception as error:
        raise FileNotFoundError(
            f"{not_in_folder(path, 'a drafter')}, and none could be fetched under the name "
            f"{folder} from the Hugging Face hub: {error}"
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


def _own_names(folder: Path, stored: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors under the names of the drafter's parameters, and the names of the others."""
    quantized = sorted(name for name in stored if _QUANTIZED.fullmatch(name))
    if quantized:
        wanted = "tensors of the weights themselves, not quantized ones"
        raise ValueError(f"{folder} must hold {wanted}, got {_listed(quantized)}")
    not_read = sorted(name for name in stored if _NOT_READ.fullmatch(name))
    holders = {name.removesuffix("fc.weight") for name in stored if name.endswith("fc.weight")}
    prefix = min(holders, key=len, default="")
    own: dict[str, Any] = {}
    for name, part in stored.items():
        if name in not_read:
            continue
        short = _WITHIN.sub("", name.removeprefix(prefix))
        if short in own:
            raise ValueError(f"{folder} must hold {short} once, got it under two names")
        own[short] = part
    return own, not_read


def _check_tensors(stored: Stored) -> None:
    folder, config, parts = stored.path, stored.config, stored.parts
    drafter = meta_drafter(config)
    expected = {name: list(tensor.shape) for name, tensor in drafter.state_dict().items()}
    reduced = config.draft_vocab_size
    if not reduced and _D2T in parts and parts[_D2T].get_shape() != [config.vocab_size]:
        few = f"draft_vocab_size, as {_D2T} of shape {parts[_D2T].get_shape()} needs"
        raise ValueError(f"{folder / CONFIG} must hold {few}, got {reduced}")
    maps = {_D2T: [config.output_size], _T2D: [config.vocab_size]}
    if reduced and not parts.keys() & maps.keys():
        why = f"draft_vocab_size {reduced} of {CONFIG} needs one of them"
        raise ValueError(f"{folder} must hold d2t or t2d, got neither: {why}")
    expected |= maps
    left_out = {_EMBEDDING, _HEAD, *_MAPS}
    missing = [name for name in expected if name not in parts and name not in left_out]
    if missing:
        raise ValueError(f"{folder} must hold {_listed(missing)}, as {CONFIG} says; it does not")
    surplus = sorted(name for name in parts if name not in expected)
    if surplus:
        wanted = f"the tensors of {CONFIG} alone"
        raise ValueError(f"{folder} must hold {wanted}, got {_listed(surplus)} too")
    wrong = []
    for name, part in parts.items():
        if part.get_shape() != expected[name]:
            wrong.append(f"{name} must be {expected[name]}, got {part.get_shape()}")
        allowed = _MAPS.get(name, _DTYPES)
        if part.get_dtype() not in allowed:
            wrong.append(f"{name} must be of {', '.join(allowed)}, got {part.get_dtype()}")
    if wrong:
        raise ValueError(f"{folder}: {_listed(wrong, '; ')}")


def _read_d2t(stored: Stored) -> torch.Tensor:
    """The offset of each draft id to its target id, checked against the other map."""
    config, parts = stored.config, stored.parts
    ids = None
    if _T2D in parts:
        marks = parts[_T2D][:].long()
        ids = marks.nonzero().flatten()
        if len(ids) != config.output_size or bool((marks != marks.bool()).any()):
            wanted = f"with 1 as many of the target's ids as it predicts, {config.output_size}"
            found = f"{len(ids)} with {marks[ids].unique().tolist()[:8]}"
            raise ValueError(f"{stored.path}: t2d must mark {wanted}, others with 0, got {found}")
    places = torch.arange(config.output_size)
    if _D2T not in parts:
        return cast(torch.Tensor, ids) - places
    offsets = parts[_D2T][:].long()
    found = offsets + places
    last = config.vocab_size - 1
    if bool((found[1:] <= found[:-1]).any()) or int(found[0]) < 0 or int(found[-1]) > last:
        wanted = f"d2t must map draft ids to increasing target ids in [0, {last}]"
        raise ValueError(f"{stored.path}: {wanted}, got {found[:8].tolist()}, ...")
    if ids is not None and not torch.equal(found, ids):
        first = int((found != ids).nonzero()[0])
        both = f"draft id {first} is target id {int(found[first])} by d2t, {int(ids[first])} by t2d"
        raise ValueError(f"{stored.path}: d2t and t2d must agree, but {both}")
    return offsets


def _write(
    folder: str | os.PathLike[str],
    values: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    format: Format,
    max_shard_bytes: int | None,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder; ``also`` are other JSON files of it."""
    from huggingface_hub import split_torch_state_dict_into_shards as split_by_size

    folder = Path(os.path.realpath(Path(folder).expanduser()))
    _check_replaceable(folder)
    for unfinished in folder.parent.glob(f".{folder.name}.partial*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    if _D2T in tensors:
        size = values.get("transformer_layer_config", values)["vocab_size"]
        ids = tensors[_D2T] + torch.arange(len(tensors[_D2T]), device=tensors[_D2T].device)
        tensors[_T2D] = torch.zeros(size, dtype=torch.bool).index_fill(0, ids.cpu(), True)
    split = split_by_size(tensors, max_shard_size=max_shard_bytes or sys.maxsize)
    files, places = split.filename_to_tensors, split.tensor_to_filename
    if format == "automodel" and not split.is_sharded:
        only = "model-00001-of-00001.safetensors"
        files, places = {only: list(tensors)}, dict.fromkeys(tensors, only)
    try:
        with replaced_whole(folder) as partial:
            for name, content in {CONFIG: values, **(also or {})}.items():
                write_json(partial / name, content)
            if WEIGHTS not in files:
                index = {"metadata": split.metadata, "weight_map": places}
                write_json(partial / INDEX, index)
            for file, names in files.items():
                shard = {name: tensors[name] for name in names}
                save_file(shard, partial / file, metadata={"format": "pt"})
                # safetensors makes files that only their owner can read, whatever the umask.
                shutil.copymode(partial / CONFIG, partial / file)
    except SafetensorError as error:
        raise OSError(f"could not write a drafter to {folder}: {error}") from error


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


def _common_dtype(stored: Stored) -> torch.dtype:
    parts = stored.parts
    kinds = sorted({part.get_dtype() for name, part in parts.items() if name not in _MAPS})
    if len(kinds) == 1:
        return _DTYPES[kinds[0]]
    named = str(stored.dtype).removeprefix("torch.")
    for dtype in _DTYPES.values():
        if str(dtype) == f"torch.{named}":
            return dtype
    lacking = f"{CONFIG} names none of them as dtype, got {named}; pass dtype="
    raise ValueError(f"{stored.path}: tensors are of {' and '.join(kinds)}, and {lacking}")


def _listed(names: list[str], separator: str = ", ") -> str:
    """The names, of many the first eight."""
    rest = [f"and {len(names) - 8} more"] if len(names) > 8 else []
    return separator.join(names[:8] + rest)
