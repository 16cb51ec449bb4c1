"""One process, or several that share the work: how embeddings and counts travel between them.

In training, all processes draw the same batches. Each feeds its slice through the networks; the embeddings are then
gathered, so that the loss, and every pair in it, spans the whole batch and is the same everywhere. In verification each
counts the scores of its tiles, and the counts are summed.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from qface.errors import ConfigError, DependencyError

__all__ = ["FabricProcesses", "Parallel", "SingleProcess", "device_for", "processes_for"]


class Parallel(ABC):
    """This process among all that work together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """A module to call instead of ``model``, whose gradients then agree on all processes."""

    @abstractmethod
    def gather(self, embeddings: Tensor) -> Tensor:
        """The embeddings [n, D] of all processes, ordered by rank, as one tensor [n * world_size, D]."""

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes."""

    @abstractmethod
    def wait(self) -> None:
        """Return when all processes have come here."""


def processes_for(device: str | None) -> Parallel:
    """The processes that ``torchrun`` started, or this one alone.

    Args:
        device: as torch names it, or None for a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
        DependencyError: there are several processes, and Lightning Fabric is not installed.
    """
    wanted = device_for(device)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return FabricProcesses(wanted) if several else SingleProcess(wanted)


def device_for(name: str | None) -> torch.device:
    """The device called ``name``, or for None a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" has no values to bring back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"there is no device {name!r} here: choose another, or None") from error
    return device


class SingleProcess(Parallel):
    """The only process: nothing to share."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` itself."""
        return model

    def gather(self, embeddings: Tensor) -> Tensor:
        """``embeddings`` themselves."""
        return embeddings

    def sum(self, values: Tensor) -> Tensor:
        """``values`` themselves."""
        return values

    def wait(self) -> None:
        """Nobody to wait for."""


class FabricProcesses(Parallel):
    """The processes of ``torchrun``, joined by Lightning Fabric.

    Raises:
        DependencyError: Lightning Fabric is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._fabric = _fabric(device)
        self._fabric.launch()
        self.rank = self._fabric.global_rank
        self.world_size = self._fabric.world_size
        self.device = self._fabric.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` in DistributedDataParallel."""
        with warnings.catch_warnings():
            # The name that newer torch wants instead is unknown to the older versions we support.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            wrapped: nn.Module = self._fabric.setup_module(model)
        return wrapped

    def gather(self, embeddings: Tensor) -> Tensor:
        """All processes' embeddings; the gradient flows back to their own process.

        The gradient is summed over the processes, each of which computes the whole loss, and DistributedDataParallel
        takes the mean of the parameter gradients: together they are the gradient of one process.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*all_gather is deprecated.*")  # Fabric calls it
            gathered: Tensor = self._fabric.all_gather(embeddings, sync_grads=True)
        return gathered.flatten(0, 1)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, on the CPU."""
        total = values.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def wait(self) -> None:
        """Return when all processes have come here."""
        self._fabric.barrier()


def _fabric(device: torch.device) -> Any:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ModuleNotFoundError as error:
        raise DependencyError(
            "work in several processes needs Lightning Fabric: pip install 'qface[distributed]'"
        ) from error
    world = int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # Buffers (batch norm statistics, observers) are frozen, so there is nothing to broadcast.
    strategy = DDPStrategy(broadcast_buffers=False)
    return Fabric(accelerator=device.type, devices=local, num_nodes=world // local, strategy=strategy)
