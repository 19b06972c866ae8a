"""Any list of layers against float64, by the tolerance rule of stock.py."""

import samples
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_numeric import DTYPES, ORDERS, check_backward, check_forward

from spectral_ext import backends

CPU = torch.device("cpu")
CPU_BACKENDS = [name for name in backends.names() if backends.unavailable(name, CPU) is None]


@st.composite
def layer_lists(draw, dtypes=DTYPES, max_size=6):
    """Lists of layers of mixed shapes, dims, dtypes, layouts, orders and settings."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    result = []
    for _ in range(draw(st.integers(1, max_size))):
        shape = draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
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


@given(layer_lists(), st.booleans(), st.sampled_from(CPU_BACKENDS))
def test_any_list(layers, update, backend):
    grads = [torch.randn_like(layer.weight) for layer in layers]
    check_backward([layer.to(layer.weight.dtype) for layer in layers], grads, update, backend)
    check_forward(layers, update, backend)
