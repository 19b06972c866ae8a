"""Any list of layers against float64, by the tolerance rule of stock.py."""

import pytest
import samples
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_numeric import DTYPES, ORDERS, check_backward, check_forward

from spectral_ext import backends

NO_TRITON = backends.unavailable("triton", torch.device("cpu"))


@st.composite
def layer_lists(draw, dtypes=DTYPES, max_size=6, longest=40):
    """Lists of layers of mixed shapes, dims, dtypes, layouts, orders and settings."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    result = []
    for _ in range(draw(st.integers(1, max_size))):
        shape = draw(st.lists(st.integers(1, longest), min_size=2, max_size=4))
        result.append(
            samples.layer(
                shape,
                draw(st.integers(0, len(shape) - 1)),
                draw(st.sampled_from(dtypes)),
                draw(st.sampled_from(samples.LAYOUTS)),
                order=draw(st.sampled_from(ORDERS)),
                n_power_iterations=draw(st.integers(1, 3)),
            )
        )
    return result


def check(layers, update, backend):
    grads = [torch.randn_like(layer.weight) for layer in layers]
    check_backward([layer.to(layer.weight.dtype) for layer in layers], grads, update, backend)
    check_forward(layers, update, backend)


@given(layer_lists(), st.booleans(), st.sampled_from(["cpu", "reference"]))
def test_any_list(layers, update, backend):
    check(layers, update, backend)


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
@settings(max_examples=30)
@given(layer_lists(max_size=4, longest=10), st.booleans())
def test_any_list_by_triton(layers, update):
    """Fewer and smaller lists, since they are interpreted."""
    check(layers, update, "triton")
