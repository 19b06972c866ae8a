"""The native CUDA backend: kernels registered for ``spectral_ext::*`` in ``csrc/ops_cuda.cpp``.

The operators are those of the CPU backend: torch takes the kernels of the device of their tensors.
"""

from collections.abc import Sequence

import torch

from . import cpu
from .cpu import allocate, attach, backward, forward_, prepare

__all__ = ["allocate", "attach", "backward", "covers", "forward_", "prepare", "unavailable"]


def unavailable(device: torch.device | None) -> str | None:
    """Return None if it can run on ``device``, else why not."""
    if device is not None and device.type != "cuda":
        return f"it computes on CUDA tensors, not on {device.type}"
    if (reason := cpu.unavailable(None)) is not None:
        return reason
    from .._C import build_info  # there, or the CPU backend would not be

    info = build_info()
    if info["cuda"] is None:
        return (
            "it was not compiled: there was no toolkit, a torch without CUDA, or SKIP_CUDA was set"
        )
    if not torch.cuda.is_available():
        return "there is no CUDA device, or no driver for it"
    devices = range(torch.cuda.device_count()) if device is None else [device]
    capabilities = [torch.cuda.get_device_capability(index) for index in devices]
    if any(covers(info["cuda_architectures"], capability) for capability in capabilities):
        return None
    found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    return (
        f"it is compiled for {', '.join(info['cuda_architectures'])}, and the compute capability "
        f"here is {found}; set TORCH_CUDA_ARCH_LIST and build spectral_ext again"
    )


def covers(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Return whether code for ``architectures`` runs on a device of that compute capability.

    Machine code runs on its own major version, from its minor version on; an intermediate code
    (``+PTX``) on all that is newer. A name, such as ``Ampere``, is taken to fit: if it does not, the
    first call says so.
    """
    for architecture in architectures:
        number, _, suffix = architecture.partition("+")
        try:
            major, minor = (int(part) for part in number.split("."))
        except ValueError:
            return True
        if capability[0] == major and capability[1] >= minor:
            return True
        if suffix == "PTX" and capability >= (major, minor):
            return True
    return False
