"""The Triton backend: the kernels in Python, for a GPU where nothing was compiled.

Its operators ``spectral_ext::triton_forward_`` and ``spectral_ext::triton_backward`` have the schemas of
``forward_`` and ``backward``. In Triton's interpreter (``TRITON_INTERPRET=1``) they compute on the CPU, which
is how they are tested without a GPU.
"""

from functools import cache
from importlib import metadata

import torch

from ...layout import allocate
from ...ops import LIBRARY

try:
    import triton
    from triton import knobs

    from . import operators
except Exception as error:  # whatever an installation has to say
    triton = None
    _IMPORT_ERROR = error
else:
    # What it is when the kernels are made, and not what the environment says later.
    _INTERPRETED = knobs.runtime.interpret
    _KEY = "CPU" if _INTERPRETED else "CUDA"
    LIBRARY.impl("triton_forward_", operators.forward_, _KEY)
    LIBRARY.impl("triton_backward", operators.backward, _KEY)

__all__ = ["allocate", "attach", "backward", "forward_", "prepare", "unavailable"]

forward_ = torch.ops.spectral_ext.triton_forward_.default
backward = torch.ops.spectral_ext.triton_backward.default
attach = None
prepare = None


def unavailable(device: torch.device | None) -> str | None:
    """Return None if it can run on ``device``, else why not."""
    if triton is None:
        return f"triton cannot be imported ({_IMPORT_ERROR}); pip install 'triton>=3.6'"
    version = _number(triton.__version__)
    if version < (3, 6):
        return f"it needs triton 3.6 or later, and here is {triton.__version__}"
    if _INTERPRETED:
        if version < (3, 7) and _number(metadata.version("numpy")) >= (2, 4):
            return f"the interpreter of triton {triton.__version__} wants numpy<2.4"
        if device is not None and device.type != "cpu":
            return f"TRITON_INTERPRET is set: it computes on CPU tensors, not on {device.type}"
        return None
    if device is not None and device.type != "cuda":
        return (
            f"it computes on CUDA tensors, not on {device.type}; "
            "in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors"
        )
    if torch.version.hip is not None:
        return "this torch is a build with ROCm, for which the kernels are not made"
    if not torch.cuda.is_available():
        return "there is no CUDA device, or no driver for it"
    devices = range(torch.cuda.device_count()) if device is None else [device]
    capabilities = [torch.cuda.get_device_capability(index) for index in devices]
    if all(capability < _CAPABILITY for capability in capabilities):
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        return f"Triton wants compute capability 8.0 or higher, and here is {found}"
    return _why_not_started()


_CAPABILITY = (8, 0)


def _number(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(map(int, version.split(".")[:2]))


@cache
def _why_not_started() -> str | None:
    """Return None if Triton can launch kernels: the first time it compiles a part of itself, in C."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever a compiler, a linker or a driver has to say
        return f"Triton does not start here: {error}"
    return None
