"""torch.library.opcheck of every operator: schema, autograd, fake kernel, and use in a compiler."""

import pytest
import torch
from torch.testing._internal.optests.generate_tests import ALL_TEST_UTILS

from spectral_ext import backends, ops
from spectral_ext.layout import allocate
from spectral_ext.settings import LayerSettings, Settings

CPU = torch.device("cpu")


def layers(requires_grad):
    """Two layers that differ in dimension, dtype of vectors, order, target and tolerance."""
    weights = [torch.randn(4, 3), torch.randn(2, 5, 2, dtype=torch.bfloat16)]
    us, vs = [torch.randn(4), torch.randn(5)], [torch.randn(3), torch.randn(4)]
    for vector in (*us, *vs):
        vector /= vector.norm()
    settings = Settings.of(
        [
            LayerSettings(n_power_iterations=2, tol=0.1),
            LayerSettings(dim=1, order="v_first", bound=0.5, detach_sigma=True),
        ]
    )
    return [w.requires_grad_(requires_grad) for w in weights], us, vs, settings


def arguments(name, requires_grad, update, narrow):
    weights, us, vs, settings = layers(requires_grad)
    dtype = torch.bfloat16 if narrow else None
    if name == "allocate":
        return weights, settings.dims, dtype
    with torch.no_grad():
        outputs, saved, sigmas = allocate(weights, settings.dims, dtype)
        forward = (us, vs, outputs, saved, sigmas, saved.new_empty(4), *settings.of_forward(update))
        backends.reference.forward_(weights, *forward)
    if name.endswith("forward_"):
        return weights, *forward
    if name == "attach":
        return weights, outputs, saved, sigmas, *settings.of_node
    grads = [torch.randn_like(output).requires_grad_(requires_grad) for output in outputs]
    if not requires_grad:
        grads[0] = None
    results = [x.requires_grad_(requires_grad) for x in (*outputs, sigmas)]
    mask, widen = [True, not update], [narrow, False]
    return grads, torch.randn(2), results[:2], saved, results[2], *settings.of_node, mask, widen


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_operator(name, requires_grad):
    backend = "triton" if name.startswith("triton_") else "cpu"
    if reason := backends.unavailable(backend, CPU):
        pytest.skip(reason)
    operator = getattr(torch.ops.spectral_ext, name).default
    checks = list(ALL_TEST_UTILS)  # the default leaves one out
    if name == "allocate" and not requires_grad:  # its values are whatever was in memory
        checks = [check for check in checks if "aot_dispatch" not in check]
    for option in (True, False):  # to update, and to give bfloat16 for float32
        torch.manual_seed(1)
        sample = arguments(name, requires_grad, option, option)
        torch.library.opcheck(operator, sample, test_utils=checks)
