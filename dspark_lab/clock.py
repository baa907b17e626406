"""The time, once a device has done what it was asked to; it knows nothing about what that is."""

import time

import torch

__all__ = ["now"]


def now(device: torch.device) -> float:
    """Seconds of a clock that only goes forward; a GPU's queued work is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
