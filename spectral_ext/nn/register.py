"""Put a spectral norm on a tensor of a module: the function that users call, and its checks."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..reference import Order
from ..settings import LayerSettings
from ..validation import check_bool, check_integer, check_number
from .dynamic_class import parametrization_lists, register
from .operator_norm import operator_norm
from .parametrization import (
    GAINS,
    INITS,
    Gain,
    Init,
    SpectralNorm,
    StockSpectralNorm,
    check_backend,
    checked_weight,
    default_dim,
    stock_hook,
)
from .select import check_module, check_name

__all__ = [
    "LazyNorm",
    "blocks_of",
    "check_choices",
    "is_lazy",
    "iterations_of",
    "normalize_parameter",
    "pending_norm",
    "spectral_norm",
]


_Module = TypeVar("_Module", bound=Module)


def spectral_norm(
    module: _Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    order: Order = "u_first",
    scale: float = 1.0,
    bound: float | None = None,
    gain: Gain | None = None,
    detach_sigma: bool = False,
    tol: float = 0.0,
    max_power_iterations: int | None = None,
    init: Init = "randn",
    blocks: int = 1,
    per_group: bool = False,
    norm: Literal["matrix", "operator"] = "matrix",
    input_size: int | Sequence[int] | None = None,
    backend: str | None = None,
) -> _Module:
    """Normalize a parameter of a module by its spectral norm, like ``torch.nn.utils``.

    Args:
        module: the module that has the parameter; it is changed in place. A lazy module is
            normalized in its first forward, when it has a weight. Until then it loads the state dict
            of a normalized module, and its vectors are used from the first forward on.
        name: name of the parameter (or buffer).
        n_power_iterations: steps of the power method for each access in training.
        eps: smallest divisor of a vector, not negative.
        dim: the dimension that counts the outputs: default 1 for ``ConvTranspose1d/2d/3d``, else 0.
        order: ``"u_first"`` is ``torch.nn.utils.parametrizations.spectral_norm``, ``"v_first"`` has
            the numbers of the older ``torch.nn.utils.spectral_norm``.
        scale: ``c`` of ``c·W/σ``.
        bound: ``c`` of ``W / max(1, σ/c)``, which leaves a weight alone whose σ is at most ``c``.
        gain: γ of ``γ·W/σ``, a parameter: ``"sigma"`` starts at the σ of the weight, so that the
            layer begins as it is, ``"one"`` at 1; ``"sigma_per_channel"`` and ``"one_per_channel"``
            have one for each output channel. Instead of ``scale`` and ``bound``.
        detach_sigma: let σ count as a constant in the gradient.
        tol: make steps until the residual is at most ``tol`` times σ, decided on the device.
        max_power_iterations: with ``tol``, at most so many steps; default the larger one of 20 and
            ``n_power_iterations``.
        init: ``"randn"`` starts as stock does, ``"svd"`` with the exact singular vectors.
        blocks: treat so many equal parts of the weight's first dimension as weights of their own:
            3 for ``MultiheadAttention.in_proj_weight``, whose parts are query, key and value.
        per_group: the same for the groups of a convolution.
        norm: ``"operator"`` divides by the norm of the convolution itself and not by that of its
            unrolled weight; see :func:`spectral_ext.nn.operator_norm`, which takes
            ``n_power_iterations``, ``eps``, ``scale`` and ``bound``.
        input_size: for that the sizes of the input, without batch and channels.
        backend: see :func:`spectral_ext.functional.spectral_normalize`.

    Returns:
        ``module``. Undo it with ``torch.nn.utils.parametrize.remove_parametrizations``.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was changed. A ``dim`` out of range
            is an ``IndexError`` too, as in stock.
        RuntimeError: the tensor has a spectral norm already (``"v_first"``; stock allows to stack
            ``"u_first"``), or the backend cannot run.

    Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018;
    ``bound``: Behrmann et al., "Invertible Residual Networks", ICML 2019; ``gain``: Zhai et al.,
    "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023.
    """
    check_module("module", module)
    check_name(name)
    label = f"{parametrize.type_before_parametrizations(module).__name__}.{name}"
    if norm == "operator":
        if input_size is None:
            raise ValueError(f"{label}: norm='operator' needs the input_size")
        others = (order, gain, detach_sigma, tol, max_power_iterations, init, blocks, per_group)
        if others != ("u_first", None, False, 0.0, None, "randn", 1, False) or dim is not None:
            raise ValueError(
                f"{label}: norm='operator' takes n_power_iterations, eps, scale, bound and "
                "input_size, and excludes the other settings"
            )
        return operator_norm(
            module,
            name,
            input_size=input_size,
            n_power_iterations=n_power_iterations,
            eps=eps,
            scale=scale,
            bound=bound,
        )
    if norm != "matrix":
        raise ValueError(f"{label}: norm must be 'matrix' or 'operator', got norm={norm!r}")
    if input_size is not None:
        raise ValueError(f"{label}: input_size is for norm='operator'")
    settings = LayerSettings(
        default_dim(module) if dim is None else dim,
        iterations_of(label, n_power_iterations, tol, max_power_iterations),
        eps,
        order,
        tol,
        scale,
        bound,
        detach_sigma,
        blocks_of(label, module, blocks, per_group),
    )
    normalize_parameter(module, name, settings, gain, init, backend, label)
    return module


def iterations_of(
    label: str, n_power_iterations: int, tol: float, max_power_iterations: int | None
) -> int:
    """Return how many iterations a layer may make."""
    check_integer(label, "n_power_iterations", n_power_iterations)
    check_number(label, "tol", tol)
    if max_power_iterations is None:
        return max(20, n_power_iterations) if tol > 0 else n_power_iterations
    check_integer(label, "max_power_iterations", max_power_iterations)
    if tol == 0:
        raise ValueError(f"{label}: max_power_iterations is for tol > 0; use n_power_iterations")
    if max_power_iterations < 1:
        raise ValueError(
            f"{label}: max_power_iterations must be positive, got {max_power_iterations}"
        )
    return max_power_iterations


def blocks_of(label: str, module: Module, blocks: int, per_group: bool) -> int:
    """Return into how many blocks a layer is cut."""
    check_bool(label, "per_group", per_group)
    if not per_group:
        return blocks
    groups = getattr(module, "groups", None)
    if not isinstance(groups, int):
        raise ValueError(f"{label}: per_group is for convolutions; it has no groups")
    if blocks != 1:
        raise ValueError(f"{label}: blocks={blocks} and per_group exclude each other")
    return groups


def normalize_parameter(
    module: Module,
    name: str,
    settings: LayerSettings,
    gain: Gain | None,
    init: Init,
    backend: str | None,
    label: str,
) -> None:
    """Do what :func:`spectral_norm` says; ``label`` is how messages call the layer."""
    check_choices(label, settings, gain, init)
    _refuse_second(module, name, settings.order, label)
    if is_lazy(module, name):
        LazyNorm(name, settings, gain, init, backend, label).attach(module)
        return
    weight, dim = checked_weight(module, name, settings.dim, label)
    check_backend(backend, weight)
    if len(weight) % settings.blocks:
        raise ValueError(
            f"{label}: blocks={settings.blocks} does not divide the first dimension of a weight "
            f"of shape {tuple(weight.shape)}"
        )
    settings = settings._replace(dim=dim)
    options = settings._asdict()
    positional = [options.pop(key) for key in ("n_power_iterations", "dim", "eps")]
    parametrization = SpectralNorm(
        weight, *positional, **options, gain=gain, init=init, backend=backend, label=label
    )
    # Stock's consistency check calls the parametrization, which iterates in training; its hook
    # has no such check.
    unsafe = settings.order == "v_first"
    register(module, name, parametrization, unsafe=unsafe)
    parametrization.make_unit_vectors()  # that check has iterated, perhaps with a weight below eps


def check_choices(label: str, settings: LayerSettings, gain: Gain | None, init: Init) -> None:
    """Raise unless settings, gain and start make sense together."""
    settings.check(label)
    for argument, value, known in (("gain", gain, (None, *GAINS)), ("init", init, INITS)):
        if value not in known:
            raise ValueError(f"{label}: {argument} must be one of {known}, got {value!r}")
    if gain is not None and (settings.scale != 1 or settings.bound is not None):
        raise ValueError(f"{label}: gain and scale or bound exclude each other")


def is_lazy(module: Module, name: str) -> bool:
    """Return whether a parameter waits for the first forward to get a size."""
    return isinstance(module._parameters.get(name), UninitializedTensorMixin)


class LazyNorm:
    """A forward pre-hook that normalizes a lazy module once it has a weight.

    It was registered after the module's own, which makes the weight. Until it has run, it translates the
    state dict of a normalized module: the module gets the weight, and the vectors are kept here.
    """

    handles: tuple[RemovableHandle, ...]

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name = name
        self.arguments = arguments
        self.loaded: dict[str, Tensor] = {}

    def attach(self, module: Module) -> None:
        """Wait for the first forward of a module, and for state dicts until then."""
        loading = module._register_load_state_dict_pre_hook(self._load)
        hooks: Any = module._load_state_dict_pre_hooks
        # Before the module's own, which gives the parameters the shapes of the state dict.
        hooks.move_to_end(loading.id, last=False)
        self.handles = module.register_forward_pre_hook(self), loading

    def __call__(self, module: Module, inputs: Any) -> None:
        """Normalize the module, once."""
        for handle in self.handles:
            handle.remove()
        normalize_parameter(module, self.name, *self.arguments)
        if self.loaded:
            parametrization_lists(module)[self.name][0].load_state_dict(self.loaded)

    def _load(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Give the module the weight of a normalized one, and keep the other tensors."""
        place = f"{prefix}parametrizations.{self.name}."
        if f"{place}original" not in state_dict:
            return
        state_dict[f"{prefix}{self.name}"] = state_dict.pop(f"{place}original")
        keys = [key for key in state_dict if key.startswith(f"{place}0.")]
        self.loaded = {key[len(f"{place}0.") :]: state_dict.pop(key).clone() for key in keys}


def pending_norm(module: Module, name: str) -> LazyNorm | None:
    """Return the norm that a lazy module gets in its first forward, if there is one."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, LazyNorm) and hook.name == name:
            return hook
    return None


def _refuse_second(module: Module, name: str, order: Order, label: str) -> None:
    """Raise where stock refuses a second spectral norm on one tensor."""
    if stock_hook(module, name) is not None:
        error = RuntimeError if order == "v_first" else ValueError
        raise error(f"{label}: torch.nn.utils.spectral_norm normalizes this parameter already")
    if order == "v_first" and pending_norm(module, name) is not None:
        raise RuntimeError(f"{label}: cannot register two spectral norms on the same parameter")
    if order == "v_first" and parametrize.is_parametrized(module, name):
        for parametrization in parametrization_lists(module)[name]:
            if isinstance(parametrization, StockSpectralNorm):
                raise RuntimeError(
                    f"{label}: cannot register two spectral norms on the same parameter"
                )
