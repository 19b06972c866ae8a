"""The public API as a user's typed code has it: checked by mypy in strict mode, and run."""

from re import compile as regex

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from typing_extensions import assert_type

import spectral_ext
from spectral_ext import plot, reference, spectrum
from spectral_ext.nn import (
    AppliedSpectralNorm,
    Layer,
    OperatorNorm,
    Report,
    SpectralGroup,
    SpectralNorm,
    SpectralProjection,
)


class Discriminator(nn.Module):
    """A model of a user, whose attributes keep their types under a spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = spectral_ext.spectral_norm(nn.Conv2d(1, 4, 3, padding=1), bound=2.0)
        self.linear = spectral_ext.nn.spectral_norm(nn.Linear(64, 1), order="v_first")

    def forward(self, x: Tensor) -> Tensor:
        """Return a score for each image."""
        assert_type(self.conv, nn.Conv2d)
        assert_type(self.linear, nn.Linear)
        score: Tensor = self.linear(self.conv(x).relu().mean(1).flatten(1))
        return score


def layers() -> None:
    """Put spectral norms on single layers."""
    conv = spectral_ext.nn.operator_norm(nn.Conv2d(1, 2, 3), input_size=(8, 8))
    assert_type(conv, nn.Conv2d)
    norm = spectral_ext.spectral_norm(nn.Linear(3, 2), gain="sigma", tol=1e-3, init="svd")
    found = [part for part in norm.modules() if isinstance(part, SpectralNorm | OperatorNorm)]
    assert_type(found, list[SpectralNorm | OperatorNorm])


def group() -> None:
    """Fuse a model, look at its group, and take it apart."""
    model = Discriminator()
    made = spectral_ext.fuse(
        model, update="step", include=regex("conv|linear"), exclude=lambda name, module: False
    )
    assert_type(made, SpectralGroup)
    assert_type(made.layers, tuple[Layer, ...])
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert_type(made.sigmas, Tensor)
    assert_type(made.sigma_of("conv"), Tensor)
    assert_type(made.log_dict(), dict[str, float])
    made.iterate()
    made.warm_start(2)
    made.invalidate()
    with made.normalized() as entered:
        assert_type(entered, SpectralGroup)
    assert_type(spectral_ext.group_of(model), SpectralGroup)
    Discriminator().load_state_dict(spectral_ext.stock_state_dict(model))
    assert_type(spectral_ext.bake(model), Discriminator)
    assert_type(spectral_ext.unfuse(model), Discriminator)
    assert_type(spectral_ext.empty_cache(), int)


def whole_models() -> None:
    """Normalize, project, report and measure."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    projection = spectral_ext.SpectralProjection(model, bound=1.0).attach(optimizer)
    assert_type(projection, SpectralProjection)
    assert_type(projection.project(), Tensor)
    projection.detach()
    assert_type(spectral_ext.project_(model.named_parameters(), scale=2.0), Tensor)
    applied = spectral_ext.apply_spectral_norm(model, nn.Linear, n_power_iterations=2)
    assert_type(applied, AppliedSpectralNorm)
    assert_type(applied.skipped, dict[str, str])
    table = spectral_ext.report(model, exact=True)
    assert_type(table, Report)
    assert_type([row.exact for row in table.rows], list[float | None])
    assert_type(spectral_ext.singular_values(model, 2, names=["0.weight"]), dict[str, Tensor])
    assert_type(plot.sigmas(torch.rand(5, 2), names=["a", "b"]), Axes)


def lists_of_tensors() -> None:
    """Call what works on tensors."""
    weights = [torch.randn(3, 4), torch.randn(2, 5, 3)]
    vectors = [(torch.ones(3), torch.ones(4)), (torch.ones(2), torch.ones(15))]
    us, vs = [u for u, _ in vectors], [v for _, v in vectors]
    normalized, sigmas = spectral_ext.functional.spectral_normalize(
        weights, us, vs, n_power_iterations=[1, 2], bound=(None, 1.5)
    )
    assert_type(normalized, list[Tensor])
    assert_type(sigmas, Tensor)
    assert_type(spectral_ext.functional.project_(weights, us, vs), Tensor)
    step = reference.spectral_normalize(weights[0], us[0], vs[0])
    assert_type(step, reference.Normalized)
    assert_type(reference.divisor(step.sigma, soft=True), Tensor)
    order: reference.Order = "v_first"
    matrix = reference.weight_matrix(weights[1], 0)
    found = reference.power_iteration(
        matrix, us[1], vs[1], n_power_iterations=1, eps=1e-12, order=order
    )
    assert_type(found, tuple[Tensor, Tensor, Tensor, Tensor])
    assert_type(reference.unit_vectors(us[1], vs[1], torch.float32), tuple[Tensor, Tensor])
    results = step.weight, step.sigma, step.u, step.v
    assert_type(reference.backward(weights[0], None, *results), Tensor)
    assert_type(reference.jvp(weights[0], *results), tuple[Tensor, Tensor])


def norms() -> None:
    """Estimate and bound."""
    kernel, convolution = torch.randn(3, 2, 3, 3), spectrum.Convolution((8, 8), padding="same")
    assert_type(spectrum.operator_norm(kernel, convolution), Tensor)
    assert_type(spectrum.certified_operator_norm(kernel, convolution), Tensor)
    assert_type(spectrum.certified_matrix_norm(kernel.flatten(1)), Tensor)
    assert_type(spectrum.singular_values(kernel.flatten(1), k=2), Tensor)


if __name__ == "__main__":
    for use in (layers, group, whole_models, lists_of_tensors, norms):
        use()
