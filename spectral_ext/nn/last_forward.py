"""What a group remembers of its last forward: σ, iterations, residuals, and what was not finite."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .active import Part
from .plan import Plan

__all__ = ["LastForward", "join_sigmas"]


class LastForward:
    """The results of one forward by unit, as tensors on the device; nothing here waits for it.

    Attributes:
        sigmas: of all units, detached; None before the first forward.
        not_finite: the units that had a σ which was not finite in any forward since it was None.
    """

    def __init__(self) -> None:
        self.sigmas: Tensor | None = None
        self.not_finite: Tensor | None = None
        self._convergence: list[tuple[Tensor, Sequence[int], bool]] = []

    def forget(self) -> None:
        """Forget the results: their units are no more, or tensors that must not be kept."""
        self.sigmas = None
        self._convergence = []

    def note(self, parts: list[Part], updates: Sequence[bool]) -> None:
        """Take the results of a forward; ``updates`` says of each unit whether it was advanced."""
        self.sigmas = join_sigmas(parts, len(updates))
        self._convergence = [
            (results.convergence, part, updates[part[0]]) for results, part in parts
        ]

    def note_not_finite(self, parts: list[Part], count: int) -> None:
        """Note which of so many units have no finite σ."""
        for results, part in parts:
            bad = ~results.sigmas.detach().isfinite()
            if len(part) < count:
                of_part = torch.zeros(count, dtype=torch.bool, device=bad.device)
                of_part[list(part)] = bad
                bad = of_part
            before = self.not_finite
            self.not_finite = bad if before is None else before | bad.to(before.device)

    def residuals(self, plan: Plan) -> Tensor:
        """Return the residual of every unit; NaN where there is no ``tol``."""
        return self._row(plan, 0)

    def iterations(self, plan: Plan) -> Tensor:
        """Return how many iterations every unit made; NaN before the first forward."""
        return self._row(plan, 1)

    def _row(self, plan: Plan, row: int) -> Tensor:
        count = len(plan.settings.dims)
        values = torch.full((count,), math.nan, device=plan.device)
        for convergence, part, updated in self._convergence:
            if len(convergence):
                values[list(part)] = convergence.view(2, -1)[row].to(values)
            elif row == 1:
                steps = [plan.settings.n_power_iterations[i] if updated else 0 for i in part]
                values[list(part)] = values.new_tensor(steps)
        return values


def join_sigmas(parts: list[Part], count: int) -> Tensor | None:
    """Return the sigmas of all units in one detached tensor; None if not all were computed."""
    if sum(len(part) for _, part in parts) < count:
        return None
    if not parts:
        return torch.empty(0)
    if len(parts) == 1:  # the usual case
        sigmas = parts[0][0].sigmas
        return sigmas.detach() if sigmas.requires_grad else sigmas
    several = [results.sigmas.detach() for results, _ in parts]
    dtype = torch.promote_types(several[0].dtype, several[-1].dtype)
    joined = torch.cat([s.to(several[0].device, dtype) for s in several])
    order = [place for _, part in parts for place in part]
    return joined[[order.index(place) for place in range(count)]]
