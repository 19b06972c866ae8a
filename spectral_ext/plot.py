"""Pictures of how σ went during training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["sigmas"]

# With more layers than lines can be told apart, bands are drawn.
MOST_LINES = 12
_SIGMA = "sigma/"


def sigmas(
    history: Sequence[Mapping[str, float]] | Sequence[Tensor] | Sequence[Sequence[float]] | Tensor,
    *,
    names: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw σ over the steps of a training: up to 12 layers as lines, more as bands of quantiles.

    The axis of σ is logarithmic where the largest is more than 100 times the smallest and all are
    positive. NaN and infinity leave gaps.

    Args:
        history: for each step what :func:`spectral_ext.nn.report.log_dict` gave, or σ of all layers
            (``group.sigmas``); or a tensor ``(steps, layers)``.
        names: of the layers; default those of ``log_dict``, else their numbers.
        ax: where to draw; default a new figure.

    Returns:
        The axes. ``ax.figure.savefig(path, bbox_inches="tight")`` keeps the legend, which stands
        outside.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        ImportError: matplotlib is not installed.
    """
    values, found_names = _table(history)
    names = found_names if names is None else list(names)
    if len(names) != values.shape[1]:
        raise ValueError(f"names has {len(names)} entries for {values.shape[1]} layers")
    ax = _axes(ax)
    if len(names) <= MOST_LINES:
        _draw_lines(ax, values, names)
    else:
        _draw_bands(ax, values)
    finite = values[values.isfinite()]
    if len(finite) and finite.min() > 0 and finite.max() > 100 * finite.min():
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("σ")
    ax.margins(x=0)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return ax


def _table(history: Any) -> tuple[Tensor, list[str]]:
    """Return the history as ``(steps, layers)`` in float64, and the names of the layers."""
    if not isinstance(history, (Tensor, Sequence)) or isinstance(history, (str, bytes)):
        raise TypeError(f"history must be a sequence or a tensor, got {type(history).__name__}")
    if len(history) == 0:
        raise ValueError("history is empty; it must have at least one step")
    if isinstance(history[0], Mapping):
        keys = [key for key in history[0] if _SIGMA in key]
        for step, entry in enumerate(history):
            if not isinstance(entry, Mapping) or [key for key in entry if _SIGMA in key] != keys:
                raise ValueError(f"history[{step}] does not have the layers of history[0]")
        names = [key.partition(_SIGMA)[2] for key in keys]
        history = [[entry[key] for key in keys] for entry in history]
    else:
        names = None
    values = history if isinstance(history, Tensor) else _stack(history)
    if values.ndim != 2 or values.shape[1] == 0 or values.is_complex():
        raise ValueError(
            "history must give real σ of at least one layer for each step, "
            f"got shape {tuple(values.shape)} of {values.dtype}"
        )
    values = values.detach().to("cpu", torch.float64)
    return values, names or [str(layer) for layer in range(values.shape[1])]


def _stack(history: Sequence[Any]) -> Tensor:
    rows = []
    for step, entry in enumerate(history):
        try:
            rows.append(torch.as_tensor(entry).detach().to("cpu", torch.float64))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"history[{step}] is not a row of numbers: {error}") from error
        if rows[-1].shape != rows[0].shape:
            raise ValueError(
                f"history[{step}] has shape {tuple(rows[-1].shape)}, "
                f"history[0] {tuple(rows[0].shape)}; they must be the same"
            )
    return torch.stack(rows)


def _axes(ax: Any) -> "Axes":
    """Return the axes to draw on."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
    except ImportError as error:
        message = "plot.sigmas() needs matplotlib: pip install 'spectral-ext[report]'"
        raise ImportError(message) from error
    if ax is None:
        return plt.subplots(figsize=(8, 4), layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be matplotlib.axes.Axes, got {type(ax).__name__}")
    return ax


def _draw_lines(ax: "Axes", values: Tensor, names: Sequence[str]) -> None:
    from matplotlib import colormaps

    for layer, name in enumerate(names):
        shade = 0.9 * layer / max(len(names) - 1, 1)  # from the first layer to the last
        style: dict[str, Any] = {
            "color": colormaps["viridis"](shade),
            "ls": ("-", "--", ":")[layer % 3],
        }
        ax.plot(values[:, layer].tolist(), label=name, linewidth=1.4, **style)


def _draw_bands(ax: "Axes", values: Tensor) -> None:
    finite = values.masked_fill(~values.isfinite(), torch.nan)
    levels = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=values.dtype)
    least, lower, middle, upper, most = torch.nanquantile(finite, levels, dim=1).tolist()
    steps, color = range(len(values)), "#2a6fb0"
    edges: dict[str, Any] = {"color": color, "linewidth": 0}
    ax.fill_between(steps, least, most, alpha=0.15, label="min to max", **edges)
    ax.fill_between(steps, lower, upper, alpha=0.35, label="25% to 75%", **edges)
    label = f"median of {values.shape[1]} layers"
    ax.plot(steps, middle, color=color, linewidth=1.6, label=label)
