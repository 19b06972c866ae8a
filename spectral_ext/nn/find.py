"""Where a model has spectral norms: the one search that everything in this folder shares."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.nn import Module
from torch.nn.utils.parametrize import ParametrizationList

from .dynamic_class import parametrization_lists
from .hook import GroupHook
from .operator_norm import OperatorNorm
from .parametrization import SpectralNorm, StockHook, StockSpectralNorm

__all__ = ["NormSite", "find_norms", "norms_of", "qualified"]


def qualified(module_name: str, tensor_name: str) -> str:
    """Return the name of a tensor in a model, such as ``"block1.conv.weight"``."""
    return f"{module_name}.{tensor_name}" if module_name else tensor_name


@dataclass(frozen=True)
class NormSite:
    """A spectral norm and the tensor that it is on.

    Callers filter: :func:`find_norms` yields subclasses, stacked norms and operator norms, too.
    """

    module_name: str
    """Qualified name of the module in the model; empty for the model itself."""
    module: Module
    tensor_name: str
    norm: Any
    """PyTorch's hook (``StockHook``), or a parametrization."""
    position: int = 0
    """The place of a parametrization among those of its tensor."""

    @property
    def qualified_name(self) -> str:
        """Name of the tensor in the model."""
        return qualified(self.module_name, self.tensor_name)

    @property
    def is_hook(self) -> bool:
        """Whether it is PyTorch's hook, on a tensor that is not parametrized."""
        return isinstance(self.norm, StockHook)

    @property
    def is_first(self) -> bool:
        """Whether no other parametrization computes the tensor that it gets."""
        return self.position == 0

    @property
    def list_(self) -> ParametrizationList:
        """The parametrizations of the tensor; not of a hook."""
        return parametrization_lists(self.module)[self.tensor_name]

    @property
    def is_alone(self) -> bool:
        """Whether the tensor has no other parametrization."""
        return self.is_hook or len(self.list_) == 1

    @property
    def original(self) -> Tensor:
        """The tensor before all its parametrizations."""
        if self.is_hook:
            return cast(Tensor, getattr(self.module, f"{self.tensor_name}_orig"))
        return self.list_.original

    @property
    def is_fusible(self) -> bool:
        """Whether a group can take it: a subclass of PyTorch's may compute something else."""
        return self.is_first and type(self.norm) in (StockHook, StockSpectralNorm, SpectralNorm)


def norms_of(module: Module, module_name: str = "") -> Iterator[NormSite]:
    """Yield the spectral norms of one module: PyTorch's hooks, then parametrizations."""
    for hook in module._forward_pre_hooks.values():
        # The hook of a fused layer calls the parametrization that came with it.
        if isinstance(hook, StockHook) and not isinstance(hook, GroupHook):
            yield NormSite(module_name, module, hook.name, hook)
    for tensor_name, list_ in parametrization_lists(module).items():
        for position, norm in enumerate(list_):
            if isinstance(norm, (StockSpectralNorm, OperatorNorm)):
                yield NormSite(module_name, module, tensor_name, norm, position)


def find_norms(model: Module, remove_duplicate: bool = True) -> Iterator[NormSite]:
    """Yield every spectral and operator norm of a model, in the order of its modules."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield from norms_of(module, name)
