"""Projection of weights after every optimizer step: the spectral norm as a constraint of training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self, Unpack

from .. import functional
from ..layout import compute_dtype, matrix_shape
from ..reference import Order, weight_matrix
from ..settings import LayerSettings
from ..validation import check_layer, check_weight, refuse_sharded
from .apply import LAYER_TYPES
from .dynamic_class import parametrization_lists
from .parametrization import Init, check_backend, default_dim
from .register import check_choices, iterations_of
from .select import Selector, check_name, check_selector, checked_types, is_selected

__all__ = ["SpectralProjection", "project_"]

# A model, parameters, or parameters with names.
Weights = Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class SpectralProjection:
    """Keep the spectral norms of weights at most ``c``, by a projection after every optimizer step.

    ``W ← W / max(1, σ/c)``, or ``W ← c·W/σ`` with ``scale``, in place and for all weights of a device
    and dtype in one native call. σ comes from power iteration on the weight's matrix, whose vectors are
    kept from step to step.

        projection = SpectralProjection(model)
        projection.project()  # so that the first forward is within the bound, too
        projection.attach(optimizer)

    Compared with the parametrization :func:`spectral_ext.spectral_norm`, the weights themselves are
    the normalized ones: checkpoints, export and evaluation know nothing of it, and a forward costs
    nothing. The gradient is that of the plain network, not one through σ, so a step may leave the
    constraint and is brought back. Prefer it for a limit on a network that is to stay ordinary; prefer
    the parametrization where σ is part of the model, as in GAN discriminators.

    The iteration finds at most the true σ. A weight stays above ``c`` by as much as the vectors lag
    behind the steps: little where these are small, some percent while another singular value overtakes
    the largest. More iterations or a ``tol`` make that less.

    Momentum and Adam's moments do not know of the projection. They may go on pushing a weight beyond
    its bound, and the projection takes that off again. Weight decay works with ``bound``: it shrinks
    weights below it. ``scale`` undoes the shrinking; what is left of the decay is that steps become
    larger relative to the weight.

    Args:
        weights: a model, of which the weights of ``types`` are taken; or parameters, or pairs of name
            and parameter, such as ``model.named_parameters()``. Whether they require a gradient does
            not matter: a frozen weight above the bound would break it, too. Left out, with the reason
            in ``skipped``, are parameters with fewer than two dimensions (biases do not change what a
            layer amplifies) or without elements, and those that came before under another name.
        bound: ``c`` of ``W / max(1, σ/c)``, default 1 unless ``scale`` is given. A weight whose σ is at
            most ``c`` keeps its bits.
        scale: ``c`` of ``c·W/σ``, instead of ``bound``.
        n_power_iterations, eps, order, backend: see
            :func:`spectral_ext.functional.spectral_normalize`.
        tol, max_power_iterations: see :func:`spectral_ext.spectral_norm`.
        init: ``"svd"`` starts with the exact singular vectors, and leaves the random numbers alone;
            ``"randn"`` with random vectors and 15 iterations, which is faster for large weights.
        dim: the dimension that counts the outputs: default 1 for ``ConvTranspose1d/2d/3d`` of a model,
            else 0. All other dimensions are flattened into one. A 3-D parameter that is not the weight
            of a convolution may be a stack of matrices, such as experts of shape ``(E, out, in)``, and
            requires an explicit ``dim``: it is projected as one matrix.
        types, include, exclude, name: of a model, see :func:`spectral_ext.apply_spectral_norm`.

    Attributes:
        names: of the weights that are projected: qualified names, those given, or positions.
        skipped: the names of what was left out, with the reason.
        sigmas: every σ before the last projection, in the order of ``names``; None before the first.

    Copies and pickles are attached to no optimizer; copy or pickle the model together with the
    projection, as in ``copy.deepcopy((model, projection))``, so that both keep the same parameters.

    Raises:
        TypeError, ValueError: an argument does not fit, there is nothing to project, or a
            parametrization or hook computes a selected weight, such as a spectral norm; the message
            names it.
        RuntimeError: the backend cannot run.

    Sources: Gouk et al., "Regularisation of neural networks by enforcing Lipschitz continuity",
    Machine Learning 110, 2021, algorithm 1, where σ of a convolution is that of the operator and not
    of the unrolled weight. In contrast Yoshida and Miyato, "Spectral Norm Regularization for Improving
    the Generalizability of Deep Learning", 2017, add ``σ²`` to the loss: a penalty, and no bound.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        bound: float | None = None,
        scale: float | None = None,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        tol: float = 0.0,
        max_power_iterations: int | None = None,
        order: Order = "u_first",
        init: Init = "svd",
        dim: int | None = None,
        types: type[Module] | Sequence[type[Module]] = LAYER_TYPES,
        include: Selector | None = None,
        exclude: Selector | None = None,
        name: str = "weight",
        backend: str | None = None,
    ) -> None:
        label = type(self).__name__
        if scale is not None and bound is not None:
            raise ValueError(f"{label}: scale={scale} and bound={bound} exclude each other")
        self._settings = LayerSettings(
            n_power_iterations=iterations_of(label, n_power_iterations, tol, max_power_iterations),
            eps=eps,
            order=order,
            tol=tol,
            scale=1.0 if scale is None else scale,
            bound=1.0 if scale is None and bound is None else bound,
        )
        check_choices(label, self._settings, None, init)
        self.skipped: dict[str, str] = {}
        if isinstance(weights, Module):
            check_selector("include", include)
            check_selector("exclude", exclude)
            check_name(name)
            found = _of_model(weights, checked_types(types), include, exclude, name, self.skipped)
        elif (types, include, exclude, name) != (LAYER_TYPES, None, None, "weight"):
            raise ValueError(f"{label}: types, include, exclude and name are for a model")
        else:
            found = _of_parameters(weights)
        chosen = _projectable(found, dim, self.skipped)
        if not chosen:
            raise ValueError(f"{label}: there is nothing to project; skipped: {self.skipped}")
        self.names = tuple(chosen)
        self._weights = [weight for weight, _ in chosen.values()]
        self._dims = [of_weight for _, of_weight in chosen.values()]
        self._backend = backend
        for weight in self._weights:
            check_backend(backend, weight)
        vectors = [
            _first_vectors(weight, self._settings._replace(dim=of_weight), init, backend)
            for weight, of_weight in chosen.values()
        ]
        self._us, self._vs = (list(column) for column in zip(*vectors, strict=True))
        self.sigmas: Tensor | None = None
        self._handles: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()

    def project(self) -> Tensor:
        """Project all weights once, in place.

        A weight on a CPU that keeps its bits keeps its version, too: graphs and caches that hold it stay
        valid. On other devices all versions advance, because reading σ would wait for the device.

        Returns:
            Every σ before the projection, a 1-D tensor in the order of ``names``.

        Raises:
            TypeError, ValueError: a weight was changed into one of another shape; the message names it.
        """
        for vectors in (self._us, self._vs):  # weights may have gone to another device or dtype
            for i, (weight, vector) in enumerate(zip(self._weights, vectors, strict=True)):
                vectors[i] = vector.to(weight.device, compute_dtype(weight.dtype))
        settings = self._settings
        try:
            self.sigmas = functional.project_(
                self._weights,
                self._us,
                self._vs,
                n_power_iterations=settings.n_power_iterations,
                eps=settings.eps,
                dims=self._dims,
                order=settings.order,
                tol=settings.tol,
                scale=settings.scale,
                bound=settings.bound,
                backend=self._backend,
            )
        except (TypeError, ValueError):
            layers = zip(self.names, self._weights, self._us, self._vs, self._dims, strict=True)
            for layer in layers:
                check_layer(*layer)
            raise
        return self.sigmas

    def attach(self, optimizer: Optimizer) -> Self:
        """Project after every step of an optimizer; a second call with the same one changes nothing.

        All weights are projected, also those that the optimizer does not have: with one optimizer for
        each part of a model, make a projection for each part. A step that ``GradScaler`` skips calls no
        hook. An optimizer with ``fused=True`` decides that on the device: there the projection runs,
        on weights that did not change.

        Raises:
            TypeError: it is no ``torch.optim.Optimizer``.
            ValueError: it has none of the weights.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if stepped.isdisjoint(map(id, self._weights)):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} has none of the weights {self.names}"
            )
        if optimizer not in self._handles:
            self._handles[optimizer] = optimizer.register_step_post_hook(self._after_step)
        return self

    def detach(self) -> None:
        """Project no more after the steps of any optimizer."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _after_step(self, *_: Any) -> None:
        self.project()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the vectors as ``<name>.u`` and ``<name>.v``.

        They share memory with the projection, as the tensors of ``Module.state_dict`` do.
        """
        named = zip(self.names, self._us, self._vs, strict=True)
        return {
            f"{name}.{key}": x for name, *pair in named for key, x in zip("uv", pair, strict=True)
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over the vectors of another projection of the same weights.

        Raises:
            TypeError, ValueError: an entry is missing, unknown, no tensor, of another shape or complex
                for a real weight. All such are named, and nothing was changed.
        """
        vectors = self.state_dict()
        wrong = [f"{key} is missing" for key in vectors if key not in state_dict]
        for key, value in state_dict.items():
            if key not in vectors:
                wrong.append(f"{key} is unknown")
            elif not isinstance(value, Tensor):
                wrong.append(f"{key} must be a tensor, got {type(value).__name__}")
            elif value.shape != vectors[key].shape:
                shapes = tuple(vectors[key].shape), tuple(value.shape)
                wrong.append(f"{key} must have shape {shapes[0]}, got {shapes[1]}")
            elif not torch.can_cast(value.dtype, vectors[key].dtype):
                wrong.append(f"{key} must be {vectors[key].dtype}, got {value.dtype}")
        if wrong:
            raise ValueError(f"state_dict does not fit: {'; '.join(wrong)}")
        for key, vector in vectors.items():
            vector.copy_(state_dict[key])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the optimizers: a copy is attached to none."""
        return {key: value for key, value in self.__dict__.items() if key != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _handles=WeakKeyDictionary())

    def __repr__(self) -> str:
        settings, defaults = self._settings._asdict(), LayerSettings()._asdict()
        target = "scale" if settings["bound"] is None else "bound"
        shown = [target, *(key for key in settings if key not in ("bound", "scale"))]
        words = [f"{k}={settings[k]!r}" for k in shown if k == target or settings[k] != defaults[k]]
        width = max(map(len, (*self.names, *self.skipped)))
        lines = [f"{type(self).__name__}({', '.join(words)}"]
        for name, weight in zip(self.names, self._weights, strict=True):
            lines.append(f"  {name:{width}}  {tuple(weight.shape)}")
        lines += [f"  {name:{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines) + "\n)"


class ProjectionSettings(TypedDict, total=False):
    """The keywords of :class:`SpectralProjection`."""

    bound: float | None
    scale: float | None
    n_power_iterations: int
    eps: float
    tol: float
    max_power_iterations: int | None
    order: Order
    init: Init
    dim: int | None
    types: type[Module] | Sequence[type[Module]]
    include: Selector | None
    exclude: Selector | None
    name: str
    backend: str | None


def project_(weights: Weights, **settings: Unpack[ProjectionSettings]) -> Tensor:
    """Project weights once, in place, with exact singular vectors.

    One iteration from the vectors of an SVD gives σ to rounding. For large weights
    ``init="randn", tol=1e-3, max_power_iterations=1000`` is faster; the σ that it finds is a little
    smaller than the true one.

    Args:
        weights: **written in place**: a model, parameters, or pairs of name and parameter.
        settings: those of :class:`SpectralProjection`.

    Returns:
        Every σ before the projection, a 1-D tensor in the order of the weights.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`SpectralProjection`. Nothing was changed.
    """
    return SpectralProjection(weights, **settings).project()


# Name, parameter, and the dimension that counts the outputs; None where a parameter does not tell.
_Found = tuple[str, Tensor, int | None]


def _of_model(
    model: Module,
    types: tuple[type[Module], ...],
    include: Selector | None,
    exclude: Selector | None,
    name: str,
    skipped: dict[str, str],
) -> Iterator[_Found]:
    """Yield the selected weights of a model; say in ``skipped`` why others were not."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{module_name or 'the model'}: torch.jit has compiled this module and hides its "
                "layers; pass model.named_parameters() instead"
            )
        weight = module._parameters.get(name)
        # A hook leaves its result among the plain attributes.
        is_computed = name in parametrization_lists(module) or isinstance(
            module.__dict__.get(name), Tensor
        )
        if weight is None and not is_computed:
            continue
        qualified_name = f"{module_name}.{name}" if module_name else name
        if not isinstance(module, types):
            skipped[qualified_name] = f"{type(module).__name__} is not among the types"
        elif not is_selected(include, exclude, module_name, name, module):
            skipped[qualified_name] = "excluded"
        elif weight is None:
            raise ValueError(
                f"{qualified_name}: a parametrization or a hook, such as a spectral norm, computes "
                "this weight; it cannot be projected, leave it out with exclude"
            )
        else:
            is_known = isinstance(module, LAYER_TYPES)
            yield qualified_name, weight, _dim_of(weight, default_dim(module), is_known)


def _of_parameters(weights: Any) -> Iterator[_Found]:
    """Yield parameters by the names that they came with, or by their positions."""
    if isinstance(weights, Tensor) or not isinstance(weights, Iterable):
        raise TypeError(
            "weights must be a torch.nn.Module, or parameters or pairs of name and parameter, "
            f"got {type(weights).__name__}"
        )
    for position, item in enumerate(weights):
        is_named = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        name, weight = item if is_named else (str(position), item)
        yield name, weight, _dim_of(weight, 0, False)


def _dim_of(weight: Any, default: int, is_known: bool) -> int | None:
    """Return ``default``, or None where a 3-D parameter may be a kernel or a stack of matrices."""
    is_unclear = not is_known and isinstance(weight, Tensor) and weight.ndim == 3
    return None if is_unclear else default


def _projectable(
    found: Iterable[_Found], dim: int | None, skipped: dict[str, str]
) -> dict[str, tuple[Tensor, int]]:
    """Return weights and their ``dim`` by name; say in ``skipped`` why others are left out."""
    chosen: dict[str, tuple[Tensor, int]] = {}
    known: dict[int, str] = {}
    for name, weight, default in found:
        if name in chosen or name in skipped:
            raise ValueError(f"{name}: two parameters have this name")
        reason = _obstacle(weight)
        if id(weight) in known:
            reason = f"the same parameter as {known[id(weight)]}"
        if reason is not None:
            skipped[name] = reason
            continue
        refuse_sharded(name, weight)
        wanted = default if dim is None else dim
        if wanted is None:
            raise ValueError(
                f"{name}: a parameter of shape {tuple(weight.shape)} may be the kernel of a convolution, "
                "which is one matrix, or a stack of matrices, such as experts, which cannot be projected "
                "one by one; pass dim to project it as one matrix, or leave it out"
            )
        of_weight = check_weight(name, weight, wanted)
        if not weight.is_leaf:
            raise ValueError(f"{name}: it is the result of a computation and not a parameter")
        if not weight.isfinite().all():
            raise ValueError(f"{name}: the weight is not finite and has no singular vectors")
        chosen[name] = weight, of_weight
        known[id(weight)] = name
    return chosen


def _obstacle(weight: Any) -> str | None:
    """Return why a parameter is left out, or None."""
    if isinstance(weight, Tensor) and not isinstance(weight, UninitializedTensorMixin):
        if weight.ndim < 2:
            return "it has fewer than two dimensions"
        if weight.numel() == 0:
            return "it has no elements"
    return None


@torch.no_grad()
def _first_vectors(
    weight: Tensor, settings: LayerSettings, init: Init, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return ``u`` and ``v`` to begin with, float32 for half precision."""
    dtype = compute_dtype(weight.dtype)
    if init == "svd":
        matrix = weight_matrix(weight, settings.dim).to(dtype)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, 0].clone(), right[0].conj().clone()
    u, v = (
        F.normalize(weight.new_empty(size, dtype=dtype).normal_(), dim=0, eps=settings.eps)
        for size in matrix_shape(weight, settings.dim)
    )
    functional.spectral_normalize(
        [weight],
        [u],
        [v],
        n_power_iterations=15,
        eps=settings.eps,
        dims=settings.dim,
        order=settings.order,
        backend=backend,
    )
    return u, v
