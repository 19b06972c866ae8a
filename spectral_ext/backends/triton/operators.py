"""The operators: from tensors that may be anything to layers that the kernels can follow."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...layout import grad_dtypes, matrix_shape
from .checks import (
    Overlaps,
    check_count,
    check_dense,
    check_flat,
    check_memory,
    check_one_dtype,
    check_output,
    check_same,
    check_settings,
    check_target,
    check_tensor,
    check_vector,
    checked_dim,
    common_dtype,
)
from .launch import Layer, run_backward, run_forward
from .tables import LayerFacts, Shape

__all__ = ["backward", "forward_"]

shape_of = cache(Shape.of)


def are_same(weight: Tensor, output: Tensor) -> bool:
    """Return whether a weight and its output are one tensor: the weight is normalized in place."""
    return (
        weight.data_ptr() == output.data_ptr()
        and weight.dtype == output.dtype
        and weight.stride() == output.stride()
    )


@torch.no_grad()
def forward_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Tensor,
    sigmas: Tensor,
    convergence: Tensor,
    dims: Sequence[int],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    v_first: Sequence[bool],
    tols: Sequence[float],
    scales: Sequence[float],
    soft: Sequence[bool],
    update: bool,
) -> None:
    """Normalize all layers; see :data:`spectral_ext.ops.SCHEMAS`."""
    count, device, dtype = len(weights), saved.device, common_dtype(weights)
    settings = {"dims": dims, "n_power_iterations": n_power_iterations, "eps": eps}
    settings |= {"v_first": v_first, "tols": tols, "scales": scales, "soft": soft}
    for name, values in {"us": us, "vs": vs, "outputs": outputs, **settings}.items():
        check_count(values, count, name)
    layers: list[Layer] = []
    overlaps = Overlaps()
    place = 0
    for i, (weight, output, u, v) in enumerate(zip(weights, outputs, us, vs, strict=True)):
        weight_name, output_name = f"the weight of layer {i}", f"the output of layer {i}"
        reach = check_tensor(weight, device, dtype, i, "the weight")
        if not are_same(weight, output):
            overlaps.add(weight, reach, weight_name, False)
        overlaps.add(output, check_output(output, weight, i), output_name, True)
        check_settings(n_power_iterations[i], eps[i], tols[i], i)
        check_target(scales[i], i)
        dim = checked_dim(weight, dims[i], i)
        rows, columns = matrix_shape(weight, dim)
        overlaps.add(u, check_vector(u, rows, weight, "u", i), f"u of layer {i}", update)
        overlaps.add(v, check_vector(v, columns, weight, "v", i), f"v of layer {i}", update)
        check_one_dtype(u, v, i)
        # A weight in another order than its output is copied there first, and normalized in place.
        source = weight if weight.stride() == output.stride() else output
        facts = LayerFacts(
            shape_of(output.shape, output.stride(), dim),
            place,
            i,
            16 // weight.element_size(),
            scales[i],
            soft[i],
            eps=eps[i],
            tol=tols[i],
            wide_vectors=u.dtype != weight.dtype,
            u_stride=u.stride(0),
            v_stride=v.stride(0),
            n_power_iterations=n_power_iterations[i],
            v_first=v_first[i],
            update=update,
        )
        addresses = (source.data_ptr(), output.data_ptr(), u.data_ptr(), v.data_ptr())
        layers.append(Layer(weight.dtype, output.dtype, facts, addresses))
        place += rows + columns
    overlaps.add(saved, check_flat(saved, place, dtype, device, "saved"), "saved", True)
    overlaps.add(sigmas, check_flat(sigmas, count, dtype, device, "sigmas"), "sigmas", True)
    reported = 2 * count if convergence.numel() > 0 else 0
    reach = check_flat(convergence, reported, dtype, device, "convergence")
    overlaps.add(convergence, reach, "convergence", True)
    overlaps.check()

    for weight, output in zip(weights, outputs, strict=True):
        if weight.stride() != output.stride():
            output.copy_(weight)
    run_forward(layers, saved, sigmas, convergence)
    if update:  # as a stock in-place operation tells autograd
        written = [vector for vector in (*us, *vs) if not vector.is_inference()]
        torch.autograd.graph.increment_version(written)


@torch.no_grad()
def backward(
    grad_outputs: Sequence[Tensor | None],
    grad_sigmas: Tensor | None,
    outputs: Sequence[Tensor],
    saved: Tensor,
    sigmas: Tensor,
    dims: Sequence[int],
    scales: Sequence[float],
    soft: Sequence[bool],
    detach_sigma: Sequence[bool],
    mask: Sequence[bool],
    widen: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the weights for which ``mask`` is true."""
    count, device, dtype = len(outputs), saved.device, common_dtype(outputs)
    settings = {"dims": dims, "scales": scales, "soft": soft, "detach_sigma": detach_sigma}
    for name, values in {"grad_outputs": grad_outputs, **settings, "mask": mask}.items():
        check_count(values, count, name)
    if widen:
        check_count(widen, count, "widen")
    places = []
    place = 0
    for i, (output, grad) in enumerate(zip(outputs, grad_outputs, strict=True)):
        check_tensor(output, device, dtype, i, "the output")
        check_dense(output, i)
        places.append(place)
        place += sum(matrix_shape(output, checked_dim(output, dims[i], i)))
        check_target(scales[i], i)
        if grad is not None:
            check_same(grad, output, f"the gradient of layer {i}")
    check_flat(saved, place, dtype, device, "saved")
    check_flat(sigmas, count, dtype, device, "sigmas")
    if grad_sigmas is not None:
        check_memory(grad_sigmas, device, "grad_sigmas")
        grad_sigmas = grad_sigmas.contiguous()
        check_flat(grad_sigmas, count, dtype, device, "grad_sigmas")

    dtypes = grad_dtypes(outputs, widen)
    results: list[Tensor] = []
    layers: list[Layer] = []
    kept: list[Tensor] = []  # alive until all launches are in the stream
    for i, (output, grad) in enumerate(zip(outputs, grad_outputs, strict=True)):
        if not mask[i]:
            continue
        if grad is not None and grad.stride() != output.stride():
            grad = torch.empty_like(output).copy_(grad)
            kept.append(grad)
        result = torch.empty_like(output, dtype=dtypes[i])
        results.append(result)
        facts = LayerFacts(
            shape_of(output.shape, output.stride(), dims[i] % output.ndim),
            places[i],
            i,
            16 // output.element_size(),
            scales[i],
            soft[i],
            detach_sigma[i],
        )
        addresses = (0 if grad is None else grad.data_ptr(), output.data_ptr(), result.data_ptr())
        layers.append(Layer(output.dtype, result.dtype, facts, addresses))
    run_backward(layers, saved, sigmas, grad_sigmas)
    return results
