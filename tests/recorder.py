"""A record of the tensors that operations make."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """The devices of all tensors, and the number of elements of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            self.devices.add(tensor.device.type)
            self.largest = max(self.largest, tensor.numel())
        return out
