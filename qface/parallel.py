"""Communication between processes in distributed training and evaluation.

In training, all processes draw the same batches. Each runs the networks on its slice of the batch, then the embeddings
are gathered: each process computes the same loss over all pairs of the batch. In verification, each process counts the
scores of its tiles, and the counts are summed.
"""

from __future__ import annotations

import atexit
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
    """This process in a group of processes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a module to call instead of ``model``, which synchronizes the gradients."""

    @abstractmethod
    def gather(self, embeddings: Tensor) -> Tensor:
        """Concatenate the embeddings [n, D] of all processes by rank, [n * world_size, D]."""

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all processes."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until all processes have called this."""


def processes_for(device: str | None) -> Parallel:
    """Return the process group that ``torchrun`` started, or a single process.

    Args:
        device: torch device name; None for a GPU if available.

    Raises:
        ConfigError: the device is not available.
        DependencyError: there are several processes, and Lightning Fabric is not installed.
    """
    wanted = device_for(device)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return FabricProcesses(wanted) if several else SingleProcess(wanted)


def device_for(name: str | None) -> torch.device:
    """Return the torch device ``name``; None for a GPU if available, else the CPU.

    Raises:
        ConfigError: the device is not available.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # .cpu() fails for the device "meta", which stores no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} is not available: choose another, or None") from error
    return device


class SingleProcess(Parallel):
    """A single process, without communication."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return ``model``."""
        return model

    def gather(self, embeddings: Tensor) -> Tensor:
        """Return ``embeddings``."""
        return embeddings

    def sum(self, values: Tensor) -> Tensor:
        """Return ``values``."""
        return values

    def wait(self) -> None:
        """Do nothing."""


class FabricProcesses(Parallel):
    """Processes started by ``torchrun``, connected by Lightning Fabric.

    Raises:
        DependencyError: Lightning Fabric is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._fabric = _fabric(device)
        connected = torch.distributed.is_initialized()
        self._fabric.launch()
        if not connected:
            atexit.register(_disconnect)
        self.rank = self._fabric.global_rank
        self.world_size = self._fabric.world_size
        self.device = self._fabric.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap ``model`` in DistributedDataParallel."""
        with warnings.catch_warnings():
            # Newer torch deprecates the argument, but older supported versions do not know its replacement.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            wrapped: nn.Module = self._fabric.setup_module(model)
        return wrapped

    def gather(self, embeddings: Tensor) -> Tensor:
        """Concatenate the embeddings of all processes; each gradient flows back to its own process.

        The gradient is summed over the processes, each of which computes the whole loss, and DistributedDataParallel
        takes the mean of the parameter gradients: together they are the gradient of one process.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*all_gather is deprecated.*")  # Fabric calls it
            gathered: Tensor = self._fabric.all_gather(embeddings, sync_grads=True)
        return gathered.flatten(0, 1)

    def sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all processes; the result is on the CPU."""
        total = values.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self._fabric.barrier()


def _disconnect() -> None:
    """Close the connections, which Fabric leaves open on CPUs: their threads may abort a process that ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _fabric(device: torch.device) -> Any:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ModuleNotFoundError as error:
        raise DependencyError(
            "running in several processes needs Lightning Fabric: pip install 'qface[distributed]'"
        ) from error
    world = int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # Buffers (BatchNorm statistics, observers) are frozen, so they need no broadcast.
    strategy = DDPStrategy(broadcast_buffers=False)
    return Fabric(accelerator=device.type, devices=local, num_nodes=world // local, strategy=strategy)
