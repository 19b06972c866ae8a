"""The power iteration over shards: every way to cut, order and setting, against whole weights."""

import itertools

import pytest
import stock
import torch
import torch.distributed as dist
from models import assert_close, make, vectors
from ranks import assert_same_on_all_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import spectral_ext
from spectral_ext.nn.sharded import normalize_sharded
from spectral_ext.normalization import normalize_layers
from spectral_ext.settings import LayerSettings, Settings

pytestmark = pytest.mark.xdist_group("distributed")

SHAPES = [
    ((5, 7), 0),
    ((7, 5), 1),
    ((1, 9), 0),
    ((9, 1), 0),
    ((1, 1), 0),
    ((4, 6, 3), 1),
    ((3, 2, 5), 2),
]
SETTINGS = [
    {},
    {"n_power_iterations": 3},
    {"tol": 0.05, "n_power_iterations": 6},
    {"scale": 2.5},
    {"bound": 0.3},
    {"bound": 3.0},
    {"detach_sigma": True},
    {"eps": 0.5},
]


def unit(size, dtype):
    return F.normalize(torch.randn(size, dtype=torch.float64), dim=0).to(dtype)


def layers(mesh, dtype, placements):
    """Return weights, vectors and settings of layers of all kinds, and the weights distributed."""
    combinations = itertools.product(SHAPES, placements, ("u_first", "v_first"))
    weights, us, vs, rows, distributed = [], [], [], [], []
    for i, ((shape, dim), cut, order) in enumerate(combinations):
        if any(p.dim >= len(shape) for p in cut if isinstance(p, Shard)):
            continue
        settings = LayerSettings(dim=dim, order=order, **SETTINGS[i % len(SETTINGS)])
        weight = torch.randn(shape, dtype=torch.float64).to(dtype)
        weights.append(weight.requires_grad_())
        vector = torch.float32 if dtype is torch.bfloat16 else dtype
        us.append(unit(shape[dim], vector))
        vs.append(unit(weight.numel() // shape[dim], vector))
        rows.append(settings)
        distributed.append(distribute_tensor(weight.detach(), mesh, cut).requires_grad_())
    return weights, us, vs, Settings.of(rows), distributed


def compare(found, expected, names, rtol):
    # What is near zero is a difference of numbers near one.
    found, expected = (dict(zip(names, values, strict=True)) for values in (found, expected))
    assert_close(found, expected, rtol, floor=1.0)


def like_whole_weights(mesh_shape, placements, dtype, rtol):
    mesh = init_device_mesh("cpu", mesh_shape)
    weights, us, vs, settings, distributed = layers(mesh, dtype, placements)
    names = [str(i) for i in range(len(weights))]
    for update in (True, False, True):
        whole_us, whole_vs = [u.clone() for u in us], [v.clone() for v in vs]
        found = normalize_sharded(distributed, us, vs, settings, update, None)
        expected = normalize_layers(weights, whole_us, whole_vs, settings, update, "reference")
        compare([found.sigmas], [expected.sigmas.detach()], ["sigmas"], rtol)
        compare(us + vs, whole_us + whole_vs, names + [f"v{i}" for i in names], rtol)
        compare(
            [found.convergence[len(us) :]], [expected.convergence[len(us) :]], ["iterations"], rtol
        )
        assert_same_on_all_ranks(dict(zip(names, us, strict=True)) | {"sigmas": found.sigmas})
        # In the unit's forward the weight is whole; elsewhere it is distributed.
        for values in (weights, distributed):
            normalized = [
                unit.normalized(w, lambda x: x) for unit, w in zip(found.units, values, strict=True)
            ]
            grads = [torch.randn(w.shape, dtype=torch.float64).to(dtype) for w in weights]
            truth = torch.autograd.grad(expected.normalized, weights, grads, retain_graph=True)
            if values is distributed:
                assert all(
                    y.placements == w.placements for y, w in zip(normalized, values, strict=True)
                )
                grads = [
                    distribute_tensor(g, mesh, w.placements)
                    for g, w in zip(grads, values, strict=True)
                ]
            ours = torch.autograd.grad(normalized, values, grads)
            compare([_whole(y) for y in normalized], expected.normalized, names, rtol)
            compare([_whole(g) for g in ours], truth, names, rtol)


def _whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        ((2,), [(Shard(0),), (Shard(1),), (Shard(2),), (Replicate(),)]),
        ((4,), [(Shard(0),), (Shard(1),), (Shard(2),)]),
        ((2, 2), [(Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(1))]),
    ],
    ids=str,
)
def test_every_cut_gives_what_the_whole_weights_give(ranks, mesh_shape, placements):
    world_size = 1
    for size in mesh_shape:
        world_size *= size
    ranks.run(world_size, like_whole_weights, mesh_shape, placements, torch.float64, 1e-11)
    if len(mesh_shape) == 1:
        ranks.run(world_size, like_whole_weights, mesh_shape, placements, torch.float32, 1e-4)


def no_worse_than_stock():
    mesh = init_device_mesh("cpu", (2,))
    for shape, dim in (((64, 129), 0), ((33, 40, 3, 3), 1)):
        for dtype, order in itertools.product(
            (torch.float32, torch.bfloat16), ("u_first", "v_first")
        ):
            weight = (torch.randn(shape, dtype=torch.float64) * 0.1).to(dtype)
            u, v = (
                unit(shape[dim], torch.float32),
                unit(weight.numel() // shape[dim], torch.float32),
            )
            settings = Settings.of([LayerSettings(dim=dim, order=order, n_power_iterations=3)])
            layer = stock.Layer(weight, u, v, dim, 3, order=order)
            truth, plain = stock.forward(layer.to(torch.float64)), stock.forward(layer.to(dtype))
            u, v = u.clone(), v.clone()
            sharded = [distribute_tensor(weight, mesh, [Shard(0)])]
            found = normalize_sharded(sharded, [u], [v], settings, True, None)
            for what, value in (("u", u), ("v", v), ("sigma", found.sigmas[0])):
                attribute = getattr(plain, what)
                stock.check(what, value, attribute, getattr(truth, what))
            normalized = found.units[0].normalized(weight, lambda x: x)
            stock.check("weight", normalized, plain.weight, truth.weight)


def test_errors_are_at_most_twice_those_of_stock(ranks):
    ranks.run(2, no_worse_than_stock)


def special_cases():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def both(weight, u, v, update, **settings):
        columns = Settings.of([LayerSettings(**settings)])
        copies = [x if x is None else x.clone() for x in (u, v)]
        distributed = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        found = normalize_sharded([distributed], [u], [v], columns, update, None)
        weight.requires_grad_()
        expected = normalize_layers([weight], *([x] for x in copies), columns, update, None)
        pairs = [(found.sigmas[0], expected.sigmas[0])]
        pairs += [(a, b) for a, b in zip((u, v), copies, strict=True) if a is not None]
        for value in (weight, distributed):
            y = found.units[0].normalized(value, lambda x: x)
            (grad,) = torch.autograd.grad(_sum_of_squares(y), value)
            (truth,) = torch.autograd.grad(
                _sum_of_squares(expected.normalized[0]), weight, retain_graph=True
            )
            pairs += [(_whole(y), expected.normalized[0]), (_whole(grad), truth)]
        for i, (a, b) in enumerate(pairs):
            assert torch.allclose(a, b.detach(), rtol=1e-10, atol=1e-12, equal_nan=True), (i, a, b)

    wide = torch.float64
    for order in ("u_first", "v_first"):
        # σ is zero: the vectors stay, and the weight is passed through.
        both(torch.zeros(5, 3, dtype=wide), unit(5, wide), unit(3, wide), True, order=order)
        # σ is zero or NaN: vectors that are of no use restart, and others stay.
        for bad in (0.0, float("nan"), float("inf")):
            for u, v in ((bad, bad), (bad, 1.0), (1.0, bad)):
                pair = (u * unit(5, wide), v * unit(3, wide))
                both(torch.randn(5, 3, dtype=wide), *pair, True, order=order)
            both(
                bad * torch.ones(5, 3, dtype=wide), unit(5, wide), unit(3, wide), True, order=order
            )
        weight = torch.zeros(5, 3, dtype=wide)
        weight[4, 2] = 3
        past = (F.normalize(torch.arange(4.0, -1, -1, dtype=wide), dim=0), unit(3, wide))
        past[1][2] = 0
        both(weight, *past, True, order=order)
        # Vectors of an average count as if they were of norm 1.
        both(torch.randn(5, 3, dtype=wide), 0.7 * unit(5, wide), unit(3, wide), False, order=order)
        # Computed as a whole: blocks, complex weights, and 1-D ones.
        vectors_of_blocks = [torch.cat([unit(n, wide), unit(n, wide)]) for n in (3, 4)]
        for update in (True, False):
            both(torch.randn(6, 4, dtype=wide), *vectors_of_blocks, update, order=order, blocks=2)
            weight, u, v = (torch.randn(n, dtype=torch.complex128) for n in ((5, 3), 5, 3))
            both(weight, u / u.norm(), v / v.norm(), update, order=order)
    both(torch.randn(5, dtype=wide), None, None, True)
    both(
        torch.randn(5, dtype=wide), unit(5, wide), torch.ones(1, dtype=wide), True, order="v_first"
    )


def _sum_of_squares(y):
    y = y.full_tensor() if isinstance(y, DTensor) else y
    return (y.abs().square() * torch.arange(1, y.shape[-1] + 1)).sum()


def test_rules_of_the_reference(ranks):
    ranks.run(2, special_cases)


def outside_of_a_forward():
    """A sharded layer that is asked for by itself computes with all ranks, as stock would with one."""
    mesh = init_device_mesh("cpu", (2,))
    net, reference = make("u_first"), make("u_first")
    for name in ("blocks.1.1", "blocks.0.0"):
        list_, expected = (m.get_submodule(name).parametrizations.weight for m in (net, reference))
        list_.original = torch.nn.Parameter(distribute_tensor(list_.original, mesh, [Shard(0)]))
        for _ in range(2):
            found, truth = net.get_submodule(name).weight, reference.get_submodule(name).weight
            assert isinstance(found, DTensor) and found.placements == (Shard(0),)
            compare([_whole(found)], [truth], [name], 1e-12)
            found.sum().backward()
            truth.sum().backward()
            compare([_whole(list_.original.grad)], [expected.original.grad], [name], 1e-12)
            assert_close(vectors(net), vectors(reference), 1e-12)
        # New vectors after a checkpoint that has none.
        for model in (net, reference):
            torch.manual_seed(1)
            norm = model.get_submodule(name).parametrizations.weight
            for vector in (norm[0]._u, norm[0]._v):
                vector.normal_()
            norm[0].warm_start(norm.original)
        assert_close(vectors(net), vectors(reference), 1e-12)


def test_a_sharded_layer_alone(ranks):
    ranks.run(2, outside_of_a_forward)


def tensor_parallel():
    """Weights that stay distributed in the computation, in one group."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
    ).double()
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
    ).double()
    for model in (whole, net):
        for i in (0, 2):
            torch.manual_seed(i)
            spectral_ext.spectral_norm(model[i])
    net.load_state_dict(whole.state_dict())
    group = spectral_ext.fuse(net)
    spectral_ext.fuse(whole)
    # Rows of the first layer and columns of the second: Megatron's way.
    for layer, cut, of_bias in ((net[0], Shard(0), Shard(0)), (net[2], Shard(1), Replicate())):
        list_ = layer.parametrizations.weight
        list_.original = torch.nn.Parameter(distribute_tensor(list_.original, mesh, [cut]))
        layer.bias = torch.nn.Parameter(distribute_tensor(layer.bias, mesh, [of_bias]))
    x = torch.randn(3, 6, dtype=torch.float64)
    for _ in range(2):
        y = net(distribute_tensor(x, mesh, [Replicate()]))
        truth = whole(x)
        compare([_whole(y)], [truth], ["output"], 1e-12)
        y.square().sum().backward()
        truth.square().sum().backward()
        for i in (0, 2):
            found, expected = (m[i].parametrizations.weight for m in (net, whole))
            compare([_whole(found.original.grad)], [expected.original.grad], [str(i)], 1e-12)
        assert_close(vectors(net), vectors(whole), 1e-12)
        assert len(group.sigmas) == 2
        assert y.placements[0] in (Partial(), Replicate())


def test_tensor_parallel_weights_stay_distributed(ranks):
    ranks.run(2, tensor_parallel)
