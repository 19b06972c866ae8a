"""What an autograd node knows about tensors that were changed in place after its forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Versions", "with_graph_of"]


class Versions:
    """The versions of a node's outputs and weights at the time of its forward."""

    def __init__(self, outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self._counters = [_counter_of(output) for output in outputs]
        self._of_outputs = [_version(counter) for counter in self._counters]
        self._of_weights = [_version(weight) for weight in weights]

    def is_output_changed(self, layer: int) -> bool:
        """Return whether an output was changed after the forward."""
        return _version(self._counters[layer]) != self._of_outputs[layer]

    def weight(self, node: Any, layer: int) -> Tensor:
        """Return a weight as it was in the forward; the graph holds it if it is a leaf.

        Raises:
            RuntimeError: the graph does not hold it, or it was changed.
        """
        weight = getattr(node.next_functions[layer][0], "variable", None)
        if weight is not None and _version(weight) == self._of_weights[layer]:
            return weight.detach()
        is_leaf = weight is not None
        raise RuntimeError(
            f"the normalized weight of layer {layer} was changed in place after the forward, and the "
            "backward cannot compute it again, because its weight "
            f"{'was changed in place too' if is_leaf else 'is not a parameter'}; change a copy of the "
            "normalized weight, as in `layer.weight * mask`"
            f"{', or call backward() before the weight changes' if is_leaf else ''}"
        )


def _counter_of(tensor: Tensor) -> Tensor:
    """Return a tensor without elements that shares the version counter of another, not its memory."""
    counter = tensor.detach()
    counter.data = tensor.new_empty(0)
    return counter


def _version(tensor: Tensor) -> int:
    """Return the version of a tensor; tensors that were made in inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version


def with_graph_of(output: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, which autograd takes for ``output``."""
    return _Replace.apply(output, value)


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
