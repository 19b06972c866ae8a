"""Spectral normalization of one tensor of a module, as a drop-in for stock's parametrization."""

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as StockSpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook

from .. import backends
from ..autograd import Settings
from ..functional import normalize_layers
from ..reference import Order, weight_matrix
from ..validation import check_layer, check_settings, check_weight
from .active import Visible, active, hidden_saves, lookup
from .dynamic_class import own_class, parametrization_lists

if TYPE_CHECKING:
    from .group import SpectralGroup

__all__ = [
    "IN_GROUP",
    "Origin",
    "SpectralNorm",
    "StockHook",
    "StockSpectralNorm",
    "spectral_norm",
    "stock_hook",
]

Origin = Literal["own", "parametrization", "hook"]

# The attributes of a layer that is in a group.
IN_GROUP = ("_group", "_visible", "_place")
_SETTINGS = {"n_power_iterations", "eps", "dim", "order", "backend"}


class SpectralNorm(StockSpectralNorm):
    """The parametrization ``W -> W / σ(W)``, computed by ``spectral_ext``.

    It has the initialisation, the buffers ``_u`` and ``_v`` and the ``right_inverse`` of stock's
    ``torch.nn.utils.parametrizations._SpectralNorm``, which it is an instance of. In training every
    call advances ``_u`` and ``_v`` in place, also without gradients. Inside the forward of a fused
    model (:func:`spectral_ext.fuse`) a call returns what the group has computed.

    Args:
        weight: the tensor to normalize; it gives the sizes of ``_u`` and ``_v``.
        n_power_iterations, dim, eps: as in stock.
        order: ``"u_first"`` starts as stock's parametrization does, with 15 iterations, and leaves
            a 1-D weight to its norm. ``"v_first"`` starts as stock's hook does, from random
            vectors, and takes a 1-D weight as a matrix of one column.
        backend: see :func:`spectral_ext.functional.spectral_normalize`.
        label: how messages call the layer.
    """

    order: Order = "u_first"
    backend: str | None = None
    label: str = "SpectralNorm"
    # What unfuse makes of the layer again.
    origin: Origin = "own"
    # Where a hook's tensors stood in its module: for each, the names behind it.
    hook_places: dict[str, tuple[str, ...]]
    # What compiled code sees of the group, and the place of this layer in its lists.
    _visible: Visible | None = None
    _place: int = -1
    _group: "weakref.ref[SpectralGroup] | None" = None

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        order: Order = "u_first",
        backend: str | None = None,
        label: str = "SpectralNorm",
    ) -> None:
        if order == "u_first":
            super().__init__(weight, n_power_iterations, dim, eps)
            if weight.ndim == 1:
                self.n_power_iterations = n_power_iterations
        else:
            Module.__init__(self)
            self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim % weight.ndim, eps
            with torch.no_grad():
                matrix = weight_matrix(weight, self.dim)
                for name, size in zip(("_u", "_v"), matrix.shape, strict=True):
                    vector = F.normalize(weight.new_empty(size).normal_(0, 1), dim=0, eps=eps)
                    self.register_buffer(name, vector)
        self.order = order
        self.backend = backend
        self.label = label

    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalized weight.

        Raises:
            TypeError, ValueError: the weight, ``_u`` or ``_v`` were exchanged for something that
                does not fit. ``_u`` and ``_v`` are as they were.
        """
        if is_dynamo_compiling():
            visible = self._visible_weight(weight)
            return self._normalize(weight) if visible is None else visible
        in_force = lookup(active.record, id(self), weight)
        if in_force is not None:
            return in_force
        if torch._C._current_graph_task_id() != -1:  # a checkpointed block is computed again
            with hidden_saves():
                return self._normalize(weight)
        return self._normalize(weight)

    def _visible_weight(self, weight: Tensor) -> Tensor | None:
        """Return the weight in force for code that ``torch.compile`` traces."""
        record = None if self._visible is None else self._visible.record
        if record is None or record.weights[self._place] is not weight:
            return None
        normalized = record.normalized[self._place]
        wants_grad = torch.is_grad_enabled() and weight.requires_grad
        if normalized is None or (wants_grad and not normalized.requires_grad):
            return None
        return normalized

    def _normalize(self, weight: Tensor) -> Tensor:
        """Normalize this layer alone."""
        u, v = self._buffers.get("_u"), self._buffers.get("_v")
        try:
            results = normalize_layers(
                [weight], [u], [v], self.settings, self.training, self.backend
            )
        except Exception:
            self.check(weight)
            raise
        return results.normalized[0]

    @property
    def is_vector(self) -> bool:
        """Whether the weight is divided by its norm, without ``u`` and ``v``."""
        return "_u" not in self._buffers

    @property
    def settings(self) -> Settings:
        """The settings as a list call takes them."""
        return Settings(
            [self.dim], [self.n_power_iterations], [self.eps], [self.order == "v_first"]
        )

    def check(self, weight: Tensor, label: str | None = None) -> None:
        """Raise unless the weight, the vectors and the settings fit each other."""
        label = label or self.label
        check_settings(label, self.n_power_iterations, self.eps, self.order)
        dim = check_weight(label, weight, self.dim)
        if weight.ndim > 1 or self.order == "v_first":
            check_layer(label, weight, self._buffers.get("_u"), self._buffers.get("_v"), dim)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _SETTINGS and self._group is not None:
            group = self._group()
            if group is not None:
                group.invalidate()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the group: a copied layer belongs to the copied group or to none."""
        return {k: v for k, v in self.__dict__.items() if k not in IN_GROUP}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch.compile cannot trace the import of a backend; from now on there is none.
        with contextlib.suppress(ValueError, RuntimeError):  # the first forward raises it
            for vector in self._buffers.values():
                if vector is not None:
                    check_backend(self.backend, vector)

    def extra_repr(self) -> str:
        """Return the settings that differ from the defaults."""
        shown = []
        if self.n_power_iterations != 1:
            shown.append(f"n_power_iterations={self.n_power_iterations}")
        if self.eps != 1e-12:
            shown.append(f"eps={self.eps}")
        if self.dim != 0:
            shown.append(f"dim={self.dim}")
        if self.order != "u_first":
            shown.append(f"order={self.order!r}")
        if self.backend is not None:
            shown.append(f"backend={self.backend!r}")
        return ", ".join(shown)


def stock_hook(module: Module, name: str) -> StockHook | None:
    """Return stock's spectral norm hook on a tensor of a module, if there is one."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, StockHook) and hook.name == name:
            return hook
    return None


def default_dim(module: Module) -> int:
    """Return the dimension of a module's weight that counts its outputs, as stock has it."""
    transposed = (
        torch.nn.ConvTranspose1d,
        torch.nn.ConvTranspose2d,
        torch.nn.ConvTranspose3d,
    )
    return 1 if isinstance(module, transposed) else 0


def spectral_norm(
    module: Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    order: Order = "u_first",
    backend: str | None = None,
) -> Module:
    """Normalize a parameter of a module by its spectral norm, like ``torch.nn.utils``.

    Args:
        module: the module that has the parameter; it is changed in place.
        name: name of the parameter (or buffer).
        n_power_iterations: steps of the power method for each access in training.
        eps: smallest divisor of a vector.
        dim: the dimension that counts the outputs: default 1 for ``ConvTranspose1d/2d/3d``, else 0.
        order: ``"u_first"`` is ``torch.nn.utils.parametrizations.spectral_norm``, ``"v_first"`` has
            the numbers of the older ``torch.nn.utils.spectral_norm``.
        backend: see :func:`spectral_ext.functional.spectral_normalize`.

    Returns:
        ``module``. Undo it with ``torch.nn.utils.parametrize.remove_parametrizations``.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was changed. A ``dim`` out of range
            is an ``IndexError`` too, as in stock.
        RuntimeError: the tensor has a spectral norm already (``"v_first"``; stock allows to stack
            ``"u_first"``), or the backend cannot run.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.
    """
    if not isinstance(module, Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    label = f"{parametrize.type_before_parametrizations(module).__name__}.{name}"
    dim = default_dim(module) if dim is None else dim
    normalize_parameter(module, name, n_power_iterations, eps, dim, order, backend, label)
    return module


def normalize_parameter(
    module: Module,
    name: str,
    n_power_iterations: int,
    eps: float,
    dim: int,
    order: Order,
    backend: str | None,
    label: str,
) -> None:
    """Do what :func:`spectral_norm` says; ``label`` is how messages call the layer."""
    check_settings(label, n_power_iterations, eps, order)
    _refuse_second(module, name, order, label)
    weight, dim = checked_weight(module, name, dim, label)
    check_backend(backend, weight)
    parametrization = SpectralNorm(
        weight, n_power_iterations, dim, eps, order=order, backend=backend, label=label
    )
    # Stock's consistency check calls the parametrization, which iterates in training; its hook
    # has no such check.
    parametrize.register_parametrization(module, name, parametrization, unsafe=order == "v_first")
    own_class(module)


def check_backend(backend: str | None, weight: Tensor) -> None:
    """Raise unless the backend exists and can run where the weight is."""
    if not weight.is_complex():
        backends.select(backend, weight.device)


def checked_weight(module: Module, name: str, dim: int, label: str) -> tuple[Tensor, int]:
    """Return the tensor to normalize and ``dim`` as not negative."""
    if parametrize.is_parametrized(module, name):
        weight = getattr(module, name)
    else:
        weight = module._parameters.get(name)
        if weight is None:
            weight = module._buffers.get(name)
    if weight is None:
        state = "is None" if name in module._parameters else "does not exist"
        raise ValueError(f"{label}: there is no such parameter or buffer to normalize; it {state}")
    return weight, check_weight(label, weight, dim)


def _refuse_second(module: Module, name: str, order: Order, label: str) -> None:
    """Raise where stock refuses a second spectral norm on one tensor."""
    if stock_hook(module, name) is not None:
        error = RuntimeError if order == "v_first" else ValueError
        raise error(f"{label}: torch.nn.utils.spectral_norm normalizes this parameter already")
    if order == "v_first" and parametrize.is_parametrized(module, name):
        for parametrization in parametrization_lists(module)[name]:
            if isinstance(parametrization, StockSpectralNorm):
                raise RuntimeError(
                    f"{label}: cannot register two spectral norms on the same parameter"
                )
