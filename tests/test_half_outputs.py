"""Normalized weights that are written in half precision, of float32 weights: what autocast takes."""

import pytest
import samples
import stock
import torch
from samples import options_of

from spectral_ext import reference
from spectral_ext.functional import spectral_normalize

HALF = [torch.bfloat16, torch.float16]


def run(layers, backend, dtype=None, update=True):
    """Call the list API on copies; return weights with gradients, results, σ and vectors."""
    layers = [
        layer.with_tensors(layer.weight, layer.u.clone(), layer.v.clone()) for layer in layers
    ]
    weights = [layer.weight.detach().requires_grad_() for layer in layers]
    us, vs = [layer.u for layer in layers], [layer.v for layer in layers]
    options = options_of(layers)
    normalized, sigmas = spectral_normalize(
        weights, us, vs, **options, update=update, dtype=dtype, backend=backend
    )
    return weights, normalized, sigmas, us, vs


def mixed(layout="contiguous", order="u_first"):
    """Return layers of all shapes; among them bounds on both sides of σ, scales, constant σ."""
    layers = samples.layers(layout=layout, order=order)
    for i, layer in enumerate(layers):
        sigma = stock.forward(layer.to(torch.float64)).sigma.item()
        layer.bound = {1: 0.5 * sigma, 2: 2 * sigma}.get(i % 5)
        layer.scale = 2.5 if i % 5 == 3 else 1.0
        layer.detach_sigma = i % 5 == 4
    return layers


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset", "strided"])
@pytest.mark.parametrize("update", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("order", ["u_first", "v_first"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_outputs_are_the_float_ones_rounded_once(backend, dtype, order, update, layout):
    """To the bit; σ, u and v are as ever, and the gradient is that of the formula in float32."""
    layers = mixed(layout, order)
    dense = layers
    if layout in ("strided", "expanded"):  # these are made dense first
        dense = [la.with_tensors(la.weight.contiguous(), la.u, la.v) for la in layers]
    _, expected, *rest = run(dense, backend, None, update)
    weights, found, *others = run(layers, backend, dtype, update)
    assert torch.equal(others[0], rest[0])  # σ
    for a, b in zip(others[1] + others[2], rest[1] + rest[2], strict=True):
        assert torch.equal(a, b)
    for y, float_y in zip(found, expected, strict=True):
        assert torch.equal(y, float_y.to(dtype)) and y.dtype == dtype
    grads = [torch.randn_like(y) for y in found]
    sigmas, us, vs = others
    for i, gradient in enumerate(torch.autograd.grad(found, weights, grads)):
        layer = layers[i]
        assert gradient.dtype == torch.float32
        truth = reference.backward(
            grads[i].double(),
            None,
            found[i].detach().double(),
            sigmas[i].detach().double(),
            us[i].double(),
            vs[i].double(),
            dim=layer.dim,
            scale=layer.bound or layer.scale,
            soft=layer.bound is not None,
            detach_sigma=layer.detach_sigma,
        )
        # What cancels in it: G·c/σ, and u vᵀ times ⟨G, Y⟩/σ, of which rows and columns have a sum.
        size = (grads[i].double().norm() / sigmas[i].double()).item() * (layer.bound or layer.scale)
        name = f"{i}: {tuple(layer.weight.shape)}"
        stock.check(f"gradient {name}", gradient, truth.float(), truth, max(size, 1e-3))


def test_weights_of_several_dtypes(backend):
    """Only float32 weights are narrowed; the gradient of each has the dtype of its weight."""
    shape = (6, 8)
    layers = [samples.layer(shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    layers += [samples.layer(shape, dtype=torch.float64), samples.layer(shape)]
    layers[3].weight.requires_grad_(False)
    weights, found, *_ = run(layers, backend, torch.bfloat16)
    expected = [torch.bfloat16, torch.bfloat16, torch.float64, torch.bfloat16]
    assert [y.dtype for y in found] == expected
    grads = torch.autograd.grad(found, weights, [torch.ones_like(y) for y in found])
    assert [grad.dtype for grad in grads] == [weight.dtype for weight in weights]


def test_vectors_blocks_and_gains(backend):
    """What is computed by the reference or after the call is narrowed, too."""
    vector, block, gained = torch.randn(5), torch.randn(6, 4), torch.randn(3, 4)
    us = [None, torch.randn(6), torch.randn(3)]
    vs = [None, torch.randn(8), torch.randn(4)]
    for u, v in zip(us[1:], vs[1:], strict=True):
        u /= u.norm()
        v /= v.norm()
    results = [
        spectral_normalize(
            [vector, block, gained],
            [None, us[1].clone(), us[2].clone()],
            [None, vs[1].clone(), vs[2].clone()],
            blocks=[1, 2, 1],
            gain=[None, None, torch.tensor(2.0)],
            dtype=dtype,
            backend=backend,
        )
        for dtype in (None, torch.float16)
    ]
    (plain, sigmas), (narrow, same_sigmas) = results
    assert torch.equal(sigmas, same_sigmas)
    for a, b in zip(plain, narrow, strict=True):
        assert torch.equal(a.half(), b) and b.dtype == torch.float16


def test_double_backward(backend):
    """Its gradients are float32, and those of the formula in float64 to the precision of a half type."""
    layer = samples.layer((7, 5))
    results = []
    for dtype, precision in ((torch.bfloat16, torch.float32), (None, torch.float64)):
        copy = layer.to(precision)
        (weight,), (y,), *_ = run([copy], backend, dtype)
        grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).requires_grad_()
        (first,) = torch.autograd.grad(y, weight, grad, create_graph=True)
        assert first.dtype == precision
        results.append(torch.autograd.grad(first.square().sum(), (weight, grad)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype in (torch.float32, torch.bfloat16)
        assert stock.error(found, expected) < 2 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, "bfloat16"], ids=str)
def test_other_dtypes_are_refused(backend, dtype):
    layer = samples.layer((3, 4))
    u = layer.u.clone()
    with pytest.raises(TypeError, match="dtype must be"):
        run([layer], backend, dtype)
    assert torch.equal(layer.u, u)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_nan_becomes_a_number(backend, dtype):
    """Not even one whose bits, when they are rounded, run over into the sign."""
    bits = torch.tensor([2**31 - 1, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    layer = samples.layer((12, 31))
    weight = bits.repeat(93).view(torch.float32).reshape(12, 31).clone()
    (normalized,), _ = spectral_normalize(
        [weight], [layer.u], [layer.v], update=False, dtype=dtype, backend=backend
    )
    assert normalized.isnan().all()
