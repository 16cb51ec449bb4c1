"""Memory limits for networks from files: while layers are built, and in a dry run on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qface.limits import Allowance, check

__all__ = ["BuildGuard", "dry_run"]


class BuildGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that counts new tensors against ``allowance`` before they are allocated.

    Example:
        >>> with BuildGuard(Allowance("the file")):
        ...     layer = torch.nn.PReLU(4)
    """

    def __init__(self, allowance: Allowance) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allowance = allowance

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; if it creates a tensor without tensor inputs, run it on the meta device first."""
        kwargs = kwargs or {}
        named = {argument.name for argument in func._schema.arguments}
        if "device" in named and not any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs))):
            made = func(*args, **{**kwargs, "device": "meta"})
            self._allowance.spend(sum(each.nbytes for each in tree_leaves(made)))
        return func(*args, **kwargs)


@torch.no_grad()
def dry_run(graph_module: fx.GraphModule, size: tuple[int, int]) -> None:
    """Run ``graph_module`` on fake tensors and check the memory of its activations.

    Quantizers are skipped and quantized layers run as the float layers that they extend, since both need tensor values.
    Any other operator whose result depends on tensor values ends the run without an error.

    Args:
        graph_module: a network of layers, in eval mode.
        size: height and width of the images.

    Raises:
        LimitError: the activations that are alive at once for one image are too large.
        Exception: any error of torch if layers do not fit together.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            _DryRun(graph_module).run(torch.empty(_IMAGES, 3, *size))
        except (DataDependentOutputException, DynamicOutputShapeException):
            return


_IMAGES = 2


class _DryRun(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self._held = 0.0
        self._sizes: dict[fx.Node, float] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer in float; a quantizer, which extends no float layer, returns its input."""
        layer = self.fetch_attr(target)
        kind = next(each for each in type(layer).__mro__ if _is_float(each) and "forward" in each.__dict__)
        if kind is nn.Module or kind.__module__.startswith("torch.ao."):
            return args[0]
        return kind.__dict__["forward"](layer, *args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n`` and count the bytes of its output until its last consumer has run."""
        made = super().run_node(n)
        if n.op != "get_attr":  # tensors of the file are not activations
            self._sizes[n] = sum(each.nbytes for each in tree_leaves(made) if isinstance(each, Tensor)) / _IMAGES
            self._held += self._sizes[n]
            check("activations", self._held, f"the network, at {n.name},")
        for read in self.user_to_last_uses.get(n, []):
            self._held -= self._sizes.pop(read, 0)
        return made


def _is_float(kind: type) -> bool:
    return not kind.__module__.startswith("qface.quantization.")
