"""What a group remembers of its last forward: σ, iterations, residuals, and what was not finite."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .active import Part
from .plan import Layer, Plan

__all__ = ["LastForward", "join_sigmas"]


class LastForward:
    """The results of one forward, as tensors on the device; nothing here waits for it.

    They belong to the layers of the plan that they were computed with, whatever the group has now.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._sigmas: Tensor | None = None
        self._n_power_iterations: list[int] = []
        self._convergence: list[tuple[Tensor, Sequence[int], bool]] = []
        # Since they were last taken: names of units, and which of them had a σ that was not finite.
        self._not_finite: list[tuple[list[str], Tensor]] = []

    def forget(self) -> None:
        """Forget the results of a forward whose tensors must not be kept."""
        self._plan = self._sigmas = None
        self._convergence = []

    def note(self, plan: Plan, parts: list[Part], updates: Sequence[bool]) -> None:
        """Take the results of a forward; ``updates`` says of each unit whether it was advanced."""
        self._plan = plan
        self._sigmas = join_sigmas(parts, len(updates))
        # A copy: those of the plan change when a setting is assigned.
        self._n_power_iterations = plan.settings.n_power_iterations.copy()
        self._convergence = [
            (results.convergence, part, updates[part[0]]) for results, part in parts
        ]

    def note_not_finite(self, plan: Plan, parts: list[Part], count: int) -> None:
        """Note which of ``count`` units have a σ that is not finite."""
        for results, part in parts:
            bad = ~results.sigmas.detach().isfinite()
            if len(part) < count:
                of_part = torch.zeros(count, dtype=torch.bool, device=bad.device)
                of_part[list(part)] = bad
                bad = of_part
            for i, (names, before) in enumerate(self._not_finite):
                if names == plan.names and len(before) == count:
                    self._not_finite[i] = (names, before | bad.to(before.device))
                    break
            else:
                self._not_finite.append((plan.names, bad))

    def take_not_finite(self) -> list[str]:
        """Return the names of the layers with a σ that was not finite, and forget them."""
        found, self._not_finite = self._not_finite, []
        names = [
            name
            for of_units, bad in found
            for name, is_bad in zip(of_units, bad.tolist(), strict=True)
            if is_bad
        ]
        return list(dict.fromkeys(names))

    def sigmas(self, layers: Sequence[Layer]) -> Tensor | None:
        """Return σ of layers, detached; None if it has not been computed for all of them."""
        if self._sigmas is None:
            return None
        units = self._units(layers)
        if None in units:
            return None
        return self._sigmas if units == list(range(len(self._sigmas))) else self._sigmas[units]

    def residuals(self, layers: Sequence[Layer]) -> Tensor:
        """Return the residual of every layer; NaN where there is no ``tol``."""
        return self._row(layers, 0)

    def iterations(self, layers: Sequence[Layer]) -> Tensor:
        """Return how many iterations every layer made; NaN before the first forward."""
        return self._row(layers, 1)

    def _units(self, layers: Sequence[Layer]) -> list[int | None]:
        index = {} if self._plan is None else self._plan.index
        return [index.get(id(layer.parametrization)) for layer in layers]

    def _row(self, layers: Sequence[Layer], row: int) -> Tensor:
        plan = self._plan
        if plan is None:
            device = layers[0].weight.device if layers else None
            return torch.full((len(layers),), math.nan, device=device)
        # One more, for the layers that it has not computed.
        count = len(plan.settings.dims)
        values = torch.full((count + 1,), math.nan, device=plan.device)
        for convergence, part, updated in self._convergence:
            if len(convergence):
                values[list(part)] = convergence.view(2, -1)[row].to(values)
            elif row == 1:
                steps = [self._n_power_iterations[i] if updated else 0 for i in part]
                values[list(part)] = values.new_tensor(steps)
        return values[[count if unit is None else unit for unit in self._units(layers)]]


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
