"""The processes of a run: wrapping the module, summing over processes, gathering shards."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dspark_lab.checks import checked
from dspark_lab.model import Drafter

Parallel = Literal["none", "ddp", "fsdp2"]


@checked
class Processes:
    """This process and the others of ``torch.distributed``, if any."""

    def __init__(self, parallel: Parallel = "none") -> None:
        if parallel != "none" and not torch.distributed.is_initialized():
            raise ValueError(f"parallel {parallel!r} needs torch.distributed to be initialised")
        self.parallel = parallel
        self.size = 1 if parallel == "none" else torch.distributed.get_world_size()
        self.rank = 0 if parallel == "none" else torch.distributed.get_rank()
        self.main = self.rank == 0

    def wrap(self, step: nn.Module, drafter: Drafter, unused: bool) -> nn.Module:
        """``step``, the module around ``drafter``, with gradients that are means over processes.

        All processes begin with the main one's weights. ``unused``: whether a step may leave
        trained parameters without a gradient.
        """
        if self.parallel == "ddp":
            return nn.parallel.DistributedDataParallel(step, find_unused_parameters=unused)
        if self.parallel == "fsdp2":
            # Imported here because it takes long.
            from torch.distributed.fsdp import fully_shard

            for parameter in drafter.parameters():
                if parameter.requires_grad:
                    torch.distributed.broadcast(parameter.detach(), 0)
            for layer in drafter.layers:
                fully_shard(layer)
            fully_shard(step)
        return step

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            torch.distributed.barrier()


def fill(x: Any, value: Tensor) -> None:
    """Copy a whole tensor into ``x``, which may be sharded."""
    if hasattr(x, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(x.device), x.device_mesh, x.placements)
    x.copy_(value)


def whole(x: Any) -> Tensor:
    """The tensor itself, or gathered where it is sharded, which all processes must ask for."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
