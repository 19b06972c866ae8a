"""What a projection refuses by name, and the versions of weights that it does not change."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from spectral_ext import functional
from spectral_ext.nn.projection import SpectralProjection, project_


def sigma(matrix):
    return torch.linalg.matrix_norm(matrix.detach().flatten(1), 2).item()


# Versions.


@pytest.mark.parametrize("settings", [{}, {"order": "v_first"}, {"init": "randn"}], ids=str)
def test_weights_that_keep_their_bits_keep_their_versions(settings, backend):
    net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 4))
    with torch.no_grad():
        net[1].weight.mul_(100)
    before, bits = [p._version for p in net.parameters()], net[0].weight.clone()
    projection = SpectralProjection(net, bound=5.0, backend=backend, **settings)
    projection.project()
    after = [p._version for p in net.parameters()]
    assert [b > a for a, b in zip(before, after, strict=True)] == [False, False, True, *[False] * 3]
    assert torch.equal(net[0].weight, bits)
    kept, frozen = net[0](torch.ones(1, 16)), net[1](torch.ones(1, 64))
    projection.project()  # the second weight may be above the bound by a rounding
    kept.sum().backward()
    frozen.sum().backward()


def test_a_weight_of_scale_always_gets_a_version(backend):
    weight = nn.Parameter(torch.eye(3))
    before = weight._version
    project_([weight], scale=1.0, backend=backend)
    assert weight._version > before


WEIGHTS = {
    "complex": lambda: torch.randn(4, 3, dtype=torch.complex64),
    "strided": lambda: torch.randn(4, 6)[:, ::2],
    "vector": lambda: torch.randn(6),
    "half": lambda: torch.randn(4, 3).bfloat16(),
}


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_weights_that_are_copied_back_keep_their_versions_too(make, blocks, backend):
    weight = make()
    if weight.ndim == 1 and blocks == 2:
        weight = weight[:, None]
    dtype = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    u = torch.randn(len(weight), dtype=dtype)
    v = torch.randn(blocks * weight[0].numel(), dtype=dtype)
    for bound, changes in ((1e3, False), (1e-3, True)):
        before, bits = weight._version, weight.clone()
        functional.project_([weight], [u], [v], bound=bound, blocks=blocks, backend=backend)
        assert (weight._version > before) == changes
        assert torch.equal(weight, bits) != changes


def test_a_weight_that_is_not_finite_gets_a_version(backend):
    weight = torch.full((3, 3), torch.nan)
    before = weight._version
    functional.project_([weight], [torch.ones(3)], [torch.ones(3)], bound=1.0, backend=backend)
    assert weight._version > before


# What is refused.


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 6))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda **settings: SpectralProjection([Experts().weight], **settings), "0"),
        (lambda **settings: SpectralProjection([("up", Experts().weight)], **settings), "up"),
        (
            lambda **settings: SpectralProjection(
                nn.ModuleDict({"moe": Experts()}), types=Experts, **settings
            ),
            "moe.weight",
        ),
    ],
    ids=["parameter", "pair", "model"],
)
def test_a_stack_of_matrices_is_refused_unless_its_user_says_that_it_is_one_matrix(make, name):
    with pytest.raises(ValueError, match=rf"{name}: .*\(4, 8, 6\) .* stack of matrices"):
        make()
    projection = make(dim=1, scale=1.0)
    projection.project()
    (weight,) = projection._weights
    assert sigma(weight.movedim(1, 0)) == pytest.approx(1, abs=1e-5)


def test_kernels_of_convolutions_are_one_matrix():
    net = nn.Sequential(nn.Conv1d(2, 3, 4), nn.ConvTranspose1d(2, 3, 4))
    project_(net, scale=1.0)
    assert sigma(net[0].weight) == pytest.approx(1, abs=1e-5)
    assert sigma(net[1].weight.movedim(1, 0)) == pytest.approx(1, abs=1e-5)
    kernel = nn.Conv2d(2, 3, 4).weight
    project_([kernel], scale=1.0)
    assert sigma(kernel) == pytest.approx(1, abs=1e-5)


@pytest.fixture
def mesh(tmp_path):
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_parameters_of_fsdp_are_refused_by_name(mesh):
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    fully_shard(net, mesh=mesh)
    for init in ("svd", "randn"):
        with pytest.raises(TypeError, match=r"0\.weight: the weight is a DTensor.*fully_shard"):
            SpectralProjection(net, init=init)
    for call in (functional.spectral_normalize, functional.project_):
        with pytest.raises(TypeError, match=r"weights\[0\]: the weight is a DTensor"):
            call([net[0].weight], [torch.randn(64)], [torch.randn(16)])
