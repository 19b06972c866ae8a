"""How well the spectral norms of a model are doing: one row for each, and what the model can amplify."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..reference import divisor, weight_matrix
from ..settings import LayerSettings
from ..validation import check_weight
from .dynamic_class import GROUP, is_fused, parametrization_lists
from .find import NormSite, find_norms
from .parametrization import SpectralNorm, StockSpectralNorm

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["NormalizedTensor", "Report", "Row", "log_dict", "report"]


@dataclass(frozen=True)
class Row:
    """One spectral norm, measured in float64. ``M`` is the weight before it, as a matrix."""

    name: str
    """Qualified name of the tensor, such as ``"block1.conv.weight"``; of a block with ``[0]``."""
    layer_type: str | None
    """Class of the module; None in a checkpoint."""
    shape: tuple[int, ...]
    """Of the weight."""
    rows: int
    """Of ``M``."""
    columns: int
    """Of ``M``."""
    dtype: str
    """Of the weight, such as ``"float32"``."""
    order: str | None
    """``"u_first"`` or ``"v_first"``; None where a checkpoint does not say it."""
    n_power_iterations: int | None
    """Steps of the power method for each forward in training; None in a checkpoint."""
    iterations: int | None
    """Those that the last forward of a fused model has made; None where there was none."""
    sigma: float
    """``uᵀMv`` with the stored ``u`` and ``v``, divided by their norms; of complex weights its size."""
    exact: float | None
    """The largest singular value of ``M``; None unless it was asked for."""
    residual: float
    """``max(‖Mv − σu‖, ‖Mᵀu − σv‖) / σ``: 0 for singular vectors. Some singular value is so near σ."""
    bound: float
    """What σ is brought to, or with a soft bound what it may be at most; 1 unless it was set.

    With a learned gain its size, of several gains the largest.
    """
    lipschitz: float
    """The largest singular value of the weight in use, as a matrix, in an evaluation forward.

    With gains for each channel what it may be at most.

    From :attr:`exact` if it is there. Else from ``max(‖Mv‖, ‖Mᵀu‖) = σ·√(1 + residual²)``, which is
    never more than the true value.
    """
    normalized: bool = True
    """False if σ is 0 or not finite while the weight is not zero: it is not divided by its norm."""


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`report` found; it prints as a table."""

    rows: tuple[Row, ...]
    """One for each spectral norm, in the order of ``model.named_modules()``."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Qualified names of the tensors that could not be measured, with the reason."""
    lipschitz_product: float | None = None
    """What the model amplifies at most: the product over its layers, in the 2-norm; or None.

    A bound only where the rows are exact. A convolution counts with more than its row says,
    because σ is that of the unrolled matrix: with ``σ·√overlap``, where ``overlap`` is in how many
    windows an input may lie, at most the number of elements of the kernel. Source: Tsuzuku et al.,
    "Lipschitz-Margin Training", NeurIPS 2018, which has it for stride 1.
    """
    why: str | None = None
    """Why there is no product."""

    @property
    def exact(self) -> bool:
        """Whether the exact singular values were computed."""
        return all(row.exact is not None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain Python values for JSON; None for numbers that are not finite."""
        return {
            "rows": [
                {name: _finite(value) for name, value in dataclasses.asdict(row).items()}
                for row in self.rows
            ],
            "skipped": dict(self.skipped),
            "lipschitz_product": _finite(self.lipschitz_product),
            "why": self.why,
        }

    def table(self) -> "Table":
        """Return the report as a table of ``rich``.

        Raises:
            ImportError: rich is not installed.
        """
        try:
            from rich.box import SIMPLE_HEAD
            from rich.table import Table
            from rich.text import Text
        except ImportError as error:
            message = "Report.table() needs rich: pip install 'spectral-ext[report]'"
            raise ImportError(message) from error
        note = Text("\n".join(self._notes()))
        style: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
        table = Table(**style, caption=note, caption_justify="left")
        columns, _ = self._columns()
        for title, is_number, _ in columns:
            align: Literal["left", "right"] = "right" if is_number else "left"
            table.add_column(title, justify=align, overflow="fold", no_wrap=title != "weight")
        for cells in zip(*(cells for *_, cells in columns), strict=True):
            table.add_row(*map(Text, cells))
        return table

    def __rich__(self) -> "Table":
        return self.table()

    def __repr__(self) -> str:
        blocks = []
        for title, is_number, cells in self._columns()[0]:
            width = max(map(len, [title, *cells]))
            align = str.rjust if is_number else str.ljust
            blocks.append([align(cell, width) for cell in (title, *cells)])
        lines = ["  ".join(cells).rstrip() for cells in zip(*blocks, strict=True)]
        return "\n".join([*lines, *self._notes()])

    def _columns(self) -> tuple[list[tuple[str, bool, list[str]]], list[str]]:
        """Return title, whether it holds numbers, and cells of each column; and what all rows share."""
        rows = self.rows
        settings = [
            ("dtype", False, [row.dtype for row in rows]),
            ("order", False, [row.order or "" for row in rows]),
            ("steps", True, [str(row.n_power_iterations or "") for row in rows]),
            ("made", True, ["" if r.iterations is None else str(r.iterations) for r in rows]),
            ("bound", True, [f"{row.bound:g}" for row in rows]),
        ]
        shared = [f"{title} {cells[0]}" for title, _, cells in settings if len(set(cells)) == 1]
        columns = [
            ("weight", False, [row.name for row in rows]),
            ("layer", False, [row.layer_type or "" for row in rows]),
            ("shape", False, ["×".join(map(str, row.shape)) for row in rows]),
            ("M", False, [f"{row.rows}×{row.columns}" for row in rows]),
            *(column for column in settings if len(set(column[2])) > 1),
            ("σ", True, [f"{row.sigma:.5g}" for row in rows]),
            ("exact", True, ["" if row.exact is None else f"{row.exact:.5g}" for row in rows]),
            ("residual", True, [f"{row.residual:.1e}" for row in rows]),
            ("Lipschitz", True, [f"{row.lipschitz:.5g}" for row in rows]),
        ]
        shown = [column for column in columns if any(column[2]) or not rows]
        return shown, [text for text in shared if not text.endswith(" ")]

    def _notes(self) -> list[str]:
        shared = self._columns()[1]
        from_below = "" if self.exact else ", estimated from below"
        notes = [f"{name}: not measured, {reason}" for name, reason in self.skipped.items()]
        notes += [
            f"{row.name}: not normalized, σ is {row.sigma:g} and the weight is not zero."
            for row in self.rows
            if not row.normalized
        ]
        notes += [f"All: {', '.join(shared)}."] if shared else []
        notes.append(f"Lipschitz: of the weight in use, as a matrix{from_below}.")
        if self.lipschitz_product is None:
            return [*notes, f"Whole model: no factor, {self.why}."]
        amount = f"{'at most' if self.exact else 'about'} {self.lipschitz_product:.5g}"
        product = "the product; convolutions count √overlap times (Tsuzuku et al. 2018)"
        return [*notes, f"Whole model: {amount}, {product}."]


@dataclass(frozen=True)
class NormalizedTensor:
    """What a row is measured from: a weight before its spectral norm, ``u``, ``v`` and settings."""

    name: str
    weight: Tensor
    u: Tensor
    v: Tensor
    dim: int
    layer_type: str | None = None
    order: str | None = None
    n_power_iterations: int | None = None
    iterations: int | None = None
    bound: float = 1.0
    is_soft: bool = False
    is_stock: bool = False
    """Whether the divisor is ``uᵀMv`` also where ``u``, ``v`` are not unit vectors, or where it is 0."""

    def check(self) -> None:
        """Raise, naming the tensor, unless weight, ``u`` and ``v`` fit each other."""
        check_weight(self.name, self.weight, self.dim)
        if self.weight.is_meta:
            raise ValueError(f"{self.name}: the weight is on the meta device and has no values")
        sizes = tuple(weight_matrix(self.weight, self.dim).shape)
        found = (tuple(self.u.shape), tuple(self.v.shape))
        if found != ((sizes[0],), (sizes[1],)):
            raise ValueError(
                f"{self.name}: u and v must have shapes ({sizes[0]},) and ({sizes[1]},) for a weight of "
                f"shape {tuple(self.weight.shape)} with dim={self.dim}, got {found[0]} and {found[1]}"
            )

    def measure(self, exact: bool) -> Row:
        """Return the row; all is computed on the CPU, in float64."""
        weight, u, v = map(_in_float64, (self.weight, self.u, self.v))
        dtype = weight.dtype
        matrix = weight_matrix(weight, self.dim)
        length = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(v)
        u, v = (F.normalize(x, dim=0, eps=torch.finfo(dtype).tiny) for x in (u, v))
        mv, mu = matrix @ v, matrix.mH @ u
        sigma = torch.vdot(u, mv)
        by = sigma * length if self.is_stock else divisor(sigma, self.bound, self.is_soft)
        missed = torch.maximum(
            torch.linalg.vector_norm(mv - sigma * u),
            torch.linalg.vector_norm(mu - sigma.conj() * v),
        )
        normalized = bool((sigma != 0) & sigma.isfinite() | (matrix == 0).all())
        if exact:
            largest = _largest_singular_value(matrix)
        else:
            largest = torch.maximum(torch.linalg.vector_norm(mv), torch.linalg.vector_norm(mu))
        if not normalized:  # no product with u or v says anything
            largest = torch.maximum(largest, torch.linalg.vector_norm(matrix, dim=1).amax())
        return Row(
            name=self.name,
            layer_type=self.layer_type,
            shape=tuple(weight.shape),
            rows=matrix.shape[0],
            columns=matrix.shape[1],
            dtype=str(self.weight.dtype).removeprefix("torch."),
            order=self.order,
            n_power_iterations=self.n_power_iterations,
            iterations=self.iterations,
            sigma=(sigma.abs() if sigma.is_complex() else sigma).item(),
            exact=largest.item() if exact else None,
            residual=0.0 if missed == 0 else (missed / sigma.abs()).item(),
            bound=self.bound,
            lipschitz=(largest / by.abs()).item(),
            normalized=normalized,
        )


def report(model: Module, *, exact: bool = False) -> Report:
    """Measure every spectral norm of a model: ours, fused or not, and both of stock's.

    The weights are looked at as they are now, with the ``u`` and ``v`` that the last forward left,
    as the next forward in evaluation would. Nothing is changed and no random number is drawn.

    Args:
        model: any module.
        exact: compute the largest singular values with ``torch.linalg.matrix_norm``, too. Takes
            minutes where weights have thousands of rows and columns.

    Returns:
        The rows; and the product of the factors of all layers where the model is made of
        ``nn.Sequential`` with layers of known factors: normalized ``Linear``, ``Conv*d``,
        ``ConvTranspose*d``; poolings; ``Flatten``; ``Dropout`` in evaluation; and activations such
        as ``ReLU``. Forward hooks are taken to leave outputs alone.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a weight, its ``u`` and its ``v`` do not fit; the message names the weight.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(exact, bool):
        raise TypeError(f"exact must be a bool, got {type(exact).__name__}")
    found = list(_normalized_tensors(model))
    for _, tensor in found:
        tensor.check()
    rows = tuple(tensor.measure(exact) for _, tensor in found)
    factors = {
        place: (tensor.dim, row.lipschitz) for (place, tensor), row in zip(found, rows, strict=True)
    }
    product, why = _lipschitz_product(model, factors)
    return Report(rows, _skipped(model), product, why)


def log_dict(group: Any, prefix: str = "spectral_norm/") -> dict[str, float]:
    """Return ``group.log_dict(prefix)``, of a :class:`spectral_ext.SpectralGroup`."""
    values: dict[str, float] = group.log_dict(prefix)
    return values


# The spectral norms of a model.

# Where a norm is: the module by its id, and the name of the tensor.
_Place = tuple[int, str]
# The dimension of the rows and the factor of each weight.
_Factors = dict[_Place, tuple[int, float]]


def _iterations_made(model: Module) -> dict[int, int]:
    """Return what the groups in a model know of their last forwards, by ``id`` of the layer's norm."""
    groups = [module.__dict__[GROUP] for module in model.modules() if GROUP in module.__dict__]
    return {
        id(layer.parametrization): int(count)
        for group in groups
        for layer, count in zip(group.layers, group.iterations.tolist(), strict=True)
        if not math.isnan(count)
    }


def _normalized_tensors(model: Module) -> Iterator[tuple[_Place, NormalizedTensor]]:
    made = _iterations_made(model)
    for site in find_norms(model):
        if site.is_hook:
            yield _of_hook(site)
        elif (
            site.is_first
            and isinstance(site.norm, StockSpectralNorm)
            and not getattr(site.norm, "is_bypassed", False)
        ):
            for place, tensor in _of_parametrization(site):
                yield place, dataclasses.replace(tensor, iterations=made.get(id(site.norm)))


def _of_hook(site: NormSite) -> tuple[_Place, NormalizedTensor]:
    u, v = (getattr(site.module, site.tensor_name + end) for end in ("_u", "_v"))
    return (id(site.module), site.tensor_name), NormalizedTensor(
        site.qualified_name,
        site.original,
        u,
        v,
        site.norm.dim % site.original.ndim,
        layer_type=_own_class(site.module).__name__,
        order="v_first",
        n_power_iterations=site.norm.n_power_iterations,
        is_stock=True,
    )


def _of_parametrization(site: NormSite) -> Iterator[tuple[_Place, NormalizedTensor]]:
    """Yield what a parametrization normalizes: one tensor, or its blocks."""
    norm, weight = site.norm, site.original
    has_vectors = "_u" in norm._buffers  # a 1-D weight is its own singular vector
    settings = norm.settings if isinstance(norm, SpectralNorm) else LayerSettings()
    scale, blocks = settings.scale, settings.blocks
    gain = norm.learned_gain if isinstance(norm, SpectralNorm) else None
    if gain is not None:
        scale = gain.detach().abs().amax().item()
    u = norm._u if has_vectors else weight
    v = norm._v if has_vectors else torch.ones_like(weight[:1])
    for i, part in enumerate(weight.chunk(blocks)):
        of_part = f"[{i}]" if blocks > 1 else ""
        yield (
            (id(site.module), site.tensor_name + of_part),
            NormalizedTensor(
                site.qualified_name + of_part,
                part,
                u.chunk(blocks)[i],
                v.chunk(blocks)[i],
                norm.dim,
                layer_type=_own_class(site.module).__name__,
                order=settings.order,
                n_power_iterations=getattr(norm, "n_power_iterations", None),
                bound=scale if settings.bound is None else settings.bound,
                is_soft=settings.bound is not None,
                is_stock=has_vectors and not isinstance(norm, SpectralNorm),
            ),
        )


def _skipped(model: Module) -> dict[str, str]:
    skipped = {}
    for site in find_norms(model):
        if getattr(site.norm, "is_bypassed", False):
            skipped[site.qualified_name] = (
                "no forward of the fused model has called its module yet; another module may read it "
                "before normalization"
            )
        elif isinstance(site.norm, StockSpectralNorm) and not isinstance(
            site.list_[0], StockSpectralNorm
        ):
            skipped[site.qualified_name] = "it is stacked on another parametrization"
    return skipped


def _own_class(module: Module) -> type[Module]:
    """Return the class that a module had before it was parametrized or fused."""
    cls: type[Module] = parametrize.type_before_parametrizations(module)
    return cls.__bases__[0] if is_fused(cls) else cls


def _in_float64(x: Tensor) -> Tensor:
    """Return a copy on the CPU; converted there, since some devices have no float64."""
    host = x.detach().cpu()
    dtype = torch.complex128 if host.is_complex() else torch.float64
    return torch.empty_like(host, dtype=dtype).copy_(host)


def _largest_singular_value(matrix: Tensor) -> Tensor:
    if not matrix.isfinite().all():
        return torch.tensor(math.nan)
    return torch.linalg.matrix_norm(matrix, 2)


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # NumPy's numbers
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What layers amplify, in the 2-norm. A string is the reason why that is not known.

_ACTIVATIONS: dict[type[Module], float] = {
    nn.Flatten: 1.0,
    nn.Identity: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Sigmoid: 0.25,
    nn.Softsign: 1.0,
    nn.Tanh: 1.0,
    nn.Unflatten: 1.0,
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_AVERAGE_POOLINGS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_MAX_POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _lipschitz_product(model: Module, factors: _Factors) -> tuple[float | None, str | None]:
    """Return the product of the factors of all layers, or why there is none."""
    product = 1.0
    for name, layer in _in_sequence("", model):
        factor = _layer_factor(layer, factors)
        if isinstance(factor, str):
            return None, f"{name or 'the model'} ({_own_class(layer).__name__}) {factor}"
        product *= factor
    return product, None


def _in_sequence(name: str, module: Module) -> Iterator[tuple[str, Module]]:
    """Return the layers of nested ``nn.Sequential`` as they follow each other."""
    if _own_class(module) is not nn.Sequential:
        yield name, module
        return
    for child_name, child in module._modules.items():  # one that stands there twice counts twice
        assert child is not None
        yield from _in_sequence(f"{name}.{child_name}" if name else child_name, child)


def _layer_factor(layer: Any, factors: _Factors) -> float | str:
    cls = _own_class(layer)
    if cls in _ACTIVATIONS:
        return _ACTIVATIONS[cls]
    if cls is nn.LeakyReLU:
        return max(1.0, abs(layer.negative_slope))
    if cls in _DROPOUTS:
        return "is in training" if layer.training else 1.0
    if cls in _MAX_POOLINGS:
        n = _MAX_POOLINGS.index(cls) + 1
        return math.sqrt(_overlap(n, layer.kernel_size, layer.stride, layer.dilation))
    if cls in _AVERAGE_POOLINGS:
        if getattr(layer, "divisor_override", None) is not None:
            return "has a divisor_override"
        n = _AVERAGE_POOLINGS.index(cls) + 1
        return math.sqrt(_overlap(n, layer.kernel_size, layer.stride, 1))
    if cls is nn.Linear or cls in _CONVOLUTIONS + _TRANSPOSED:
        return _weight_factor(layer, cls, factors)
    return "has no factor that is known"


def _weight_factor(layer: Any, cls: type[Module], factors: _Factors) -> float | str:
    if (id(layer), "weight") not in factors:
        return "is not normalized"
    dim, lipschitz = factors[id(layer), "weight"]
    if len(parametrization_lists(layer).get("weight", ())) > 1:
        return "has a parametrization on its spectral norm"
    if cls is nn.Linear:
        return lipschitz
    if layer.padding_mode != "zeros":
        return f"has padding_mode={layer.padding_mode!r}"
    if dim > 1:
        return f"is normalized with dim={dim}"
    # Dimension 0 counts what a window of the large side, the input of a convolution, is mapped to;
    # dimension 1 what a window of the small side is, whose elements lie in one window for each
    # element of the kernel.
    stride, dilation = (layer.stride, layer.dilation) if dim == 0 else (1, 1)
    n = len(layer.kernel_size)
    return lipschitz * math.sqrt(_overlap(n, layer.kernel_size, stride, dilation))


def _overlap(n: int, kernel_size: Any, stride: Any, dilation: Any) -> int:
    """Return in how many windows an element may lie: ``⌈k / (s / gcd(s, d))⌉`` in each dimension."""
    sizes = zip(*(_spread(value, n) for value in (kernel_size, stride, dilation)), strict=True)
    return math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in sizes)


def _spread(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)
