"""The processes of a run: wrapping the module, summing over processes, gathering shards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dspark_lab.model import Drafter

__all__ = ["Parallel", "Processes", "fill", "whole"]

Parallel = Literal["none", "ddp", "fsdp2"]


class Processes:
    """This process and the others of ``torch.distributed``, if any."""

    def __init__(self, parallel: Parallel = "none") -> None:
        if parallel not in get_args(Parallel):
            raise ValueError(f"parallel must be one of {get_args(Parallel)}, got {parallel!r}")
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
            from torch.distributed.fsdp import fully_shard

            for parameter in drafter.parameters():
                if parameter.requires_grad:
                    torch.distributed.broadcast(parameter.detach(), 0)
            for layer in drafter.layers:
                fully_shard(layer)
            fully_shard(step)
        return step

    def unshared(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Gradients of a backward in here may wait for a later one to be shared."""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            torch.distributed.barrier()

    def whole_drafter(self, drafter: Drafter) -> Drafter:
        """The drafter itself, or a copy with whole parameters where they are sharded."""
        if self.parallel != "fsdp2":
            return drafter
        # Imported here because it takes long and only "fsdp2" has shards.
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(drafter, options=StateDictOptions(full_state_dict=True))
        weight = drafter.fc.weight
        copy = Drafter(drafter.config).to(weight.device, weight.dtype)
        copy.load_state_dict(weights)
        return copy

    def whole_optimizer_state(
        self, drafter: Drafter, optimizer: torch.optim.Optimizer
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """The optimiser's state by parameter name; with shards, on the main process alone."""
        if self.parallel == "fsdp2":
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                get_optimizer_state_dict,
            )

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            gathered: Any = get_optimizer_state_dict(drafter, optimizer, options=options)
            return gathered.get("state", {})
        state = {name: optimizer.state.get(p) for name, p in drafter.named_parameters()}
        return {name: values for name, values in state.items() if values}


def fill(x: Any, value: Tensor) -> None:
    """Copy a whole tensor into ``x``, which may be sharded."""
    if hasattr(x, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(x.device), x.device_mesh, x.placements)
    x.copy_(value)


def whole(x: Any) -> Tensor:
    """The tensor itself, or gathered where it is sharded, which all processes must ask for."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
