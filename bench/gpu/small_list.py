"""A short list of small layers through every path of the kernels, for compute-sanitizer.

Fused and very wide rows, every layout of memory, all dtypes, both orders, both schedules, targets and
tolerances, forward and backward, by CUDA's kernels and by Triton's. The numbers are checked by
tests/test_cuda_device.py.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from spectral_ext import backends
from spectral_ext.functional import spectral_normalize

SHAPES = [((5, 7), 0), ((33, 27), 0), ((64, 64, 3, 3), 0), ((16, 24, 4, 4), 1), ((3, 15001), 0)]
# Whole vectors of narrow and wide rows, which Triton reads another way.
SHAPES += [((130, 40), 0), ((9, 2056), 0)]


def step(backend: str, dtype: torch.dtype, order: str, channels_last: bool, offset: int) -> None:
    """Run a forward and a backward of all layers."""
    weights, us, vs = [], [], []
    for shape, dim in SHAPES:
        flat = torch.randn(torch.Size(shape).numel() + offset, device="cuda", dtype=dtype)
        weight = flat[offset:].view(shape)
        if channels_last and weight.ndim == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        weights.append(weight.requires_grad_())
        rows = shape[dim]
        for vectors, size in ((us, rows), (vs, weight.numel() // rows)):
            vectors.append(torch.full((size,), size**-0.5, device="cuda", dtype=dtype))
    for update in (True, False):
        normalized, sigmas = spectral_normalize(
            weights,
            us,
            vs,
            dims=[dim for _, dim in SHAPES],
            n_power_iterations=3,
            order=order,
            tol=[0.5, 0.0, 0.01, 0.1, 0.3, 0.0, 0.9],
            bound=[None, 0.1, None, 1e3, None, 0.5, None],
            detach_sigma=[False, False, True, False, False, True, False],
            update=update,
            backend=backend,
        )
        (sum(y.sum() for y in normalized) + sigmas.sum()).backward()


def main() -> None:
    """Run every combination that takes another path."""
    for backend, schedule in (("cuda", "phases"), ("cuda", "ticket"), ("triton", "")):
        if (reason := backends.unavailable(backend, torch.device("cuda", 0))) is not None:
            print(f"{backend}: {reason}")
            continue
        os.environ["SPECTRAL_EXT_CUDA_SCHEDULE"] = schedule
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            step(backend, dtype, "u_first", channels_last=False, offset=0)
        step(backend, torch.float32, "v_first", channels_last=True, offset=0)
        step(backend, torch.float32, "u_first", channels_last=False, offset=1)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
