"""Layers with options beyond stock, and their check against float64 by the rule of stock.py."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import emulator
import samples
import stock
import torch
from stock import Layer
from torch import Tensor

from spectral_ext import reference
from spectral_ext.layout import split_saved

# In turns: targets on both sides of a bound, of which `bound` counts in σ; tolerances that stop at
# once, after some steps, or never.
OPTIONS = (
    {"bound": 0.5, "tol": 0.3},
    {"bound": 2.0, "tol": 0.9},
    {"scale": 2.5},
    {"detach_sigma": True, "tol": 1e-9},
    {"bound": 0.7, "detach_sigma": True},
    {"scale": 0.3, "detach_sigma": True, "tol": 0.1},
    {},
)
HALF = (torch.bfloat16, torch.float16)


def with_options(layer: Layer, bound: float | None = None, **options) -> Layer:
    """Return a layer with options; ``bound`` is a multiple of its σ."""
    if bound is not None:
        bound *= stock.forward(layer.plain().to(torch.float64)).sigma.item()
    return replace(layer, bound=bound, **options)


def mixed(layers: Sequence[Layer], update: bool) -> list[Layer]:
    """Return layers with all options in turn; every other half precision weight has wide vectors.

    Without an update some vectors are averages of unit vectors.
    """
    result = []
    for i, layer in enumerate(layers):
        layer = with_options(layer, **OPTIONS[i % len(OPTIONS)])
        if update and layer.tol > 0:
            layer = restarted(layer)
        if i % 2:
            layer = with_wide_vectors(layer)
        if not update and i % 3 == 0:
            layer.u, layer.v = layer.u / 2, layer.v * 1.5
        result.append(layer)
    return result


def restarted(layer: Layer) -> Layer:
    """Return a layer with random unit vectors, which have some way to go."""
    dtype = layer.u.dtype
    u, v = (samples.unit(len(vector), dtype) for vector in (layer.u, layer.v))
    return layer.with_tensors(layer.weight, u, v)


def with_wide_vectors(layer: Layer) -> Layer:
    if layer.weight.dtype not in HALF:
        return layer
    u, v = (x.float() / x.float().norm() for x in (layer.u, layer.v))
    return layer.with_tensors(layer.weight, u, v)


class Results(NamedTuple):
    """What a forward writes beside its vectors."""

    outputs: list[Tensor]
    saved: Tensor
    sigmas: Tensor
    residuals: Tensor
    iterations: Tensor


def targets(layers: Sequence[Layer]) -> tuple[list[float], list[bool]]:
    """Return the scales of layers as the operators take them, and which of them are bounds."""
    return (
        [layer.scale if layer.bound is None else layer.bound for layer in layers],
        [layer.bound is not None for layer in layers],
    )


def forward(
    backend: emulator.Emulator,
    layers: Sequence[Layer],
    update: bool,
    in_place: bool = False,
    dtype: torch.dtype | None = None,
) -> Results:
    """Run a forward, into the weights themselves where they can be outputs, or into a half dtype."""
    weights, dims = [layer.weight for layer in layers], [layer.dim for layer in layers]
    outputs, saved, sigmas = backend.allocate(weights, dims, dtype)
    if in_place:
        pairs = zip(weights, outputs, strict=True)
        outputs = [w if w.stride() == y.stride() else y for w, y in pairs]
    convergence = torch.empty(2 * len(layers), dtype=sigmas.dtype)
    scales, soft = targets(layers)
    backend.forward_(
        weights,
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        outputs,
        saved,
        sigmas,
        convergence,
        dims=dims,
        n_power_iterations=[layer.n_power_iterations for layer in layers],
        eps=[layer.eps for layer in layers],
        v_first=[layer.order == "v_first" for layer in layers],
        tols=[layer.tol for layer in layers],
        scales=scales,
        soft=soft,
        update=update,
    )
    return Results(outputs, saved, sigmas, *convergence.view(2, -1))


def check(
    backend: emulator.Emulator,
    layers: Sequence[Layer],
    update: bool,
    in_place: bool = False,
    grad_sigmas: Tensor | None = None,
) -> None:
    """Run forward and backward of layers, and compare all that they write with float64."""
    before = [
        layer.with_tensors(layer.weight.clone(), layer.u.clone(), layer.v.clone())
        for layer in layers
    ]
    results = forward(backend, layers, update, in_place)
    outputs, saved, sigmas, residuals, iterations = results
    grads = [torch.randn_like(layer.weight) for layer in layers]
    dims = [layer.dim for layer in layers]
    scales, soft = targets(layers)
    found = backend.backward(
        grads,
        grad_sigmas,
        outputs,
        saved,
        sigmas,
        dims=dims,
        scales=scales,
        soft=soft,
        detach_sigma=[layer.detach_sigma for layer in layers],
        mask=[True] * len(layers),
        widen=[],
    )
    vectors = split_saved(saved, outputs, dims)
    for i, (layer, old, (u, v)) in enumerate(zip(layers, before, vectors, strict=True)):
        name = f"{i}: {tuple(old.weight.shape)} dim {old.dim} {old.order}"
        check_convergence(name, old, update, residuals[i].item(), iterations[i].item())
        if update:
            old = replace(old, n_power_iterations=int(iterations[i]))
        grad_sigma = None if grad_sigmas is None else grad_sigmas[i]
        gradients, outcomes = [], []
        for dtype in (old.u.dtype, torch.float64):
            copy = old.to(dtype) if update else averaged(old.to(dtype))
            copy.weight.requires_grad_()
            outcome = stock.forward(copy, update)
            outcomes.append(outcome)
            gradients.append(gradient(copy, outcome, grads[i], grad_sigma))
        own, truth = outcomes
        dtype = old.weight.dtype
        stock.check(f"weight {name}", outputs[i], own.weight.to(dtype), truth.weight)
        stock.check(f"sigma {name}", sigmas[i], own.sigma, truth.sigma)
        stock.check(f"saved u {name}", u, own.u, truth.u)
        stock.check(f"saved v {name}", v, own.v, truth.v)
        if update:
            stock.check(f"u {name}", layer.u, own.u, truth.u)
            stock.check(f"v {name}", layer.v, own.v, truth.v)
        else:
            assert torch.equal(layer.u, old.u) and torch.equal(layer.v, old.v), name
        # The terms of the gradient, each as large as these, may cancel.
        size = (grads[i].double().norm() / truth.sigma.abs()).item()
        size *= max(1.0, layer.bound or layer.scale)
        size += 0.0 if grad_sigma is None else grad_sigma.abs().item()
        stock.check(f"gradient {name}", found[i], gradients[0].to(dtype), gradients[1], size)


def check_half_outputs(backend: emulator.Emulator, layers: Sequence[Layer]) -> None:
    """Check half outputs of float32 weights, or float32 gradients of half outputs."""
    plain = forward(backend, layers, False)
    if layers[0].weight.dtype == torch.float32:
        found = forward(backend, layers, False, dtype=torch.bfloat16).outputs
        expected = [y.bfloat16() for y in plain.outputs]
    else:
        count = len(layers)
        arguments = ([torch.randn_like(y) for y in plain.outputs], None, *plain[:3])
        options = ([layer.dim for layer in layers], [1.0] * count, *[[False] * count] * 2)
        wide, expected = (
            backend.backward(*arguments, *options, [True] * count, [is_wide] * count)
            for is_wide in (True, False)
        )
        found = [gradient.to(layers[0].weight.dtype) for gradient in wide]
    for half, other in zip(found, expected, strict=True):
        stock.check("half output", half, other, other.double())


def averaged(layer: Layer) -> Layer:
    """Return a layer whose vectors, if they are far from unit vectors, are divided by their norms."""
    norms = layer.u.double().norm(), layer.v.double().norm()
    if abs(norms[0] * norms[1] - 1) < 1e-2:
        return layer
    u, v = (x / n.to(x.dtype) for x, n in zip((layer.u, layer.v), norms, strict=True))
    return layer.with_tensors(layer.weight, u, v)


def gradient(
    layer: Layer, outcome: stock.Outcome, grad: Tensor, grad_sigma: Tensor | None
) -> Tensor:
    """Return the gradient by autograd through stock, with that of σ by its formula."""
    dtype = layer.weight.dtype
    (total,) = torch.autograd.grad(outcome.weight, layer.weight, grad.to(dtype))
    if grad_sigma is not None:
        rank_one = torch.outer(outcome.u, outcome.v) * grad_sigma.to(dtype)
        shape = layer.weight.movedim(layer.dim, 0).shape
        total = total + rank_one.reshape(shape).movedim(0, layer.dim)
    return total


def check_convergence(
    name: str, layer: Layer, update: bool, residual: float, iterations: float
) -> None:
    """Compare the report on a layer with that of the specification, in float64."""
    if layer.tol == 0 or not update:
        expected = layer.n_power_iterations if update else 0
        assert math.isnan(residual) and iterations == expected, (
            f"iterations of {name}: {iterations}"
        )
        return
    matrix = reference.weight_matrix(layer.weight.double(), layer.dim)
    steps = [
        reference.power_iteration(
            matrix,
            layer.u.double(),
            layer.v.double(),
            n_power_iterations=n + 1,
            eps=layer.eps,
            order=layer.order,
            tol=1e-300,
        )[2].item()
        for n in range(layer.n_power_iterations)
    ]
    made = int(iterations)
    assert 1 <= made <= layer.n_power_iterations, f"iterations of {name}: {made}"
    # What a difference of squares resolves.
    slack = 1e-12 if layer.weight.dtype == torch.float64 else 1e-5
    assert abs(residual**2 - steps[made - 1] ** 2) < slack, f"residual of {name}: {residual}"
    too_early = made < layer.n_power_iterations and steps[made - 1] ** 2 > layer.tol**2 + slack
    too_late = any(step**2 < layer.tol**2 - slack for step in steps[: made - 1])
    assert not (too_early or too_late), f"iterations of {name}: {made}, where {steps} are left"
