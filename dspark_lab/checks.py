"""Saying no in one sentence: what was wrong, what was given, what is allowed.

Everything here looks at Python values and at the shapes, dtypes and devices of tensors, which cost
no synchronisation. The contents of a tensor are looked at only in debug mode, which is switched on
by the environment variable ``DSPARK_LAB_DEBUG=1`` and left out of compiled graphs. This file knows
nothing about anchors or masks.
"""

import numbers
import os

import torch
from torch import Tensor

DEBUG = os.environ.get("DSPARK_LAB_DEBUG", "0") not in ("", "0")


def require_int(name: str, value: int, minimum: int) -> None:
    """Refuse anything but a whole number of at least ``minimum`` (a bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")


def require_number(name: str, value: float) -> None:
    """Refuse anything but an int or a float (a bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def require_tensor(name: str, value: Tensor, axes: tuple[str, ...]) -> None:
    """Refuse anything but a tensor with one axis for each name in ``axes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != len(axes):
        raise ValueError(f"{name} must be [{', '.join(axes)}], got shape {tuple(value.shape)}")


def require_shape(name: str, value: Tensor, axes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Refuse a tensor whose shape is not ``shape``; ``axes`` names its axes in the message."""
    require_tensor(name, value, axes)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be [{', '.join(axes)}] = {tuple(shape)}, got shape {tuple(value.shape)}"
        )


def require_integers(name: str, value: Tensor) -> None:
    """Refuse a tensor of truth values, floats or complex numbers where positions are expected."""
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} must hold integers, got {value.dtype}")


def require_bool(name: str, value: Tensor) -> None:
    """Refuse a mask that does not hold truth values."""
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")


def require_same_device(**tensors: Tensor | None) -> None:
    """Refuse what is no tensor, and tensors that live on more than one device."""
    given = {name: value for name, value in tensors.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    devices = {name: value.device for name, value in given.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {found}")


def debug_range(name: str, value: Tensor, low: int, high: int) -> None:
    """In debug mode, refuse a tensor with a value outside ``low`` to ``high - 1``."""
    if not DEBUG or torch.compiler.is_compiling() or value.numel() == 0 or value.is_meta:
        return
    smallest, largest = int(value.min()), int(value.max())
    if smallest < low or largest >= high:
        raise ValueError(
            f"{name} must lie in [{low}, {high - 1}], got values from {smallest} to {largest}"
        )
