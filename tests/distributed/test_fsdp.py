"""FSDP2: groups of units, and one group whose power iteration runs on shards."""

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import EXTENDED, LAYERS, Net, assert_close, batch, make, ours, state, vectors
from ranks import assert_same_on_all_ranks, share
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import spectral_ext

pytestmark = pytest.mark.xdist_group("distributed")


def shard(net, mesh=None, root=True, **settings):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **settings)
    if root:
        fully_shard(net, mesh=mesh, **settings)
    return net


def loss_of(net, x):
    return (net(x) - x.mean((1, 2, 3))[:, None]).square().mean()


def train(net, reference, steps=3, passes=1, rtol=1e-10, apart=False):
    """Train on this rank's part of each batch, and the reference on the whole, and compare."""
    pairs = [(m, torch.optim.Adam(m.parameters(), 0.01)) for m in (net, reference)]
    for step in range(steps):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            losses = []
            for i in range(passes):
                x = batch(20, seed=10 * step + i)
                losses.append(loss_of(model, x if model is reference else share(x)))
            for loss in losses if apart else [sum(losses)]:
                loss.backward()
            if model is net:
                assert_same_on_all_ranks(vectors(net))
        assert_close(state(net), state(reference), rtol)
        for _, optimizer in pairs:
            optimizer.step()


def evaluate(net, reference, rtol=1e-10):
    net.eval()
    reference.eval()
    before = vectors(net)
    for _ in range(2):
        with torch.no_grad():
            found, expected = net(batch()), reference(batch())
        assert_close({"output": found}, {"output": expected}, rtol)
    assert all(torch.equal(value, before[key]) for key, value in vectors(net).items())
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward nothing else does, if not after the forward
    for model in (net, reference):
        model.train()


def train_and_evaluate(net, reference, **settings):
    train(net, reference, **settings)
    evaluate(net, reference)
    train(net, reference, steps=1, **settings)


def one_group(kinds, more, shard_settings):
    net, reference = (make(*kinds, more=more) for _ in range(2))
    group = spectral_ext.fuse(net)
    shard(net, **shard_settings)
    if more == [{}]:
        expected = spectral_ext.fuse(reference)
    train_and_evaluate(net, reference)
    if more != [{}]:
        return  # the reference has computed every layer alone
    sigmas = {"sigmas": group.sigmas, "iterations": group.iterations.double()}
    assert_same_on_all_ranks(sigmas)
    assert_close(
        sigmas, {"sigmas": expected.sigmas, "iterations": expected.iterations.double()}, 1e-10
    )


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("reshard", [True, False])
def test_one_group_at_the_root_gives_the_numbers_of_one_process(ranks, world_size, reshard):
    """Layers of rows and of columns, ranks without rows, both orders, several iterations."""
    settings = {"reshard_after_forward": reshard}
    ranks.run(world_size, one_group, ["u_first", "v_first"], [{}], settings)
    ranks.run(world_size, one_group, ["v_first", "u_first"], EXTENDED, settings)


def group_of_every_unit(order_of_calls, **settings):
    net, reference = (make("u_first", "v_first") for _ in range(2))
    spectral_ext.fuse(reference, **settings)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in [*net.blocks, net]:
        calls = [lambda m: spectral_ext.fuse(m, exclude="blocks" if m is net else None, **settings)]
        calls.append(lambda m: fully_shard(m, mesh=mesh))
        for call in calls if order_of_calls == "fuse, fully_shard" else reversed(calls):
            call(unit)
    groups = [spectral_ext.group_of(unit) for unit in [net, *net.blocks]]
    assert [len(group.layers) for group in groups] == [1, 1, 1, 2]
    passes = 1 if not settings else 2
    train_and_evaluate(net, reference, passes=passes)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    sigmas = torch.cat([group.sigmas for group in groups])
    assert_close({"": sigmas}, {"": spectral_ext.group_of(reference).sigmas})
    spectral_ext.unfuse(net)
    assert all(isinstance(unit, FSDPModule) for unit in [net, *net.blocks])
    spectral_ext.unfuse(reference)
    train_and_evaluate(net, reference)


@pytest.mark.parametrize("order_of_calls", ["fuse, fully_shard", "fully_shard, fuse"])
def test_a_group_of_every_unit_gives_the_numbers_of_one_process(ranks, order_of_calls):
    ranks.run(2, group_of_every_unit, order_of_calls)


def layers_as_units(kind, fuse_first):
    """Units that have a class of their own, for their normalized weights, below that of FSDP."""
    net, reference = (make(kind) for _ in range(2))
    layers = [net.get_submodule(name) for name in LAYERS]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if fuse_first:
        spectral_ext.fuse(net)
    for unit in [*layers, net]:
        fully_shard(unit, mesh=mesh)
    if not fuse_first:
        spectral_ext.fuse(net)
        spectral_ext.fuse(layers[0])  # a root that is all of this
        spectral_ext.fuse(net)
    spectral_ext.fuse(reference)
    train(net, reference)
    for model in (net, reference):
        spectral_ext.unfuse(model)
    train(net, reference)
    assert all(isinstance(unit, FSDPModule) for unit in [*layers, net])


@pytest.mark.parametrize("fuse_first", [True, False])
def test_layers_that_are_units(ranks, fuse_first):
    for kind in ("u_first", "stock"):
        ranks.run(2, layers_as_units, kind, fuse_first)


def stock(kind, fuse_first):
    """Stock under the same wrapper; fused before it is sharded, or (parametrizations only) after."""
    net, expected = (make(kind) for _ in range(2))
    if fuse_first:
        spectral_ext.fuse(net)
        shard(net)
    else:
        shard(net)
        spectral_ext.fuse(net)
    shard(expected)
    for step in range(3):
        for model in (net, expected):
            model.zero_grad()
            loss_of(model, share(batch(seed=step))).backward()
        found, truth = state(net), state(expected)
        if kind == "hook":
            found = {spectral_ext_name(key): value for key, value in found.items()}
        assert_close(found, truth)
        for model in (net, expected):
            torch.optim.SGD(model.parameters(), 0.1).step()
    evaluate_pair(net, expected)


def spectral_ext_name(key):
    """Return the name that the tensor of a key has with stock's hook."""
    key = key.replace("parametrizations.weight.original", "weight_orig")
    return key.replace("parametrizations.weight.0.", "weight")


def evaluate_pair(net, expected):
    for model in (net, expected):
        model.eval()
    with torch.no_grad():
        assert_close({"": net(batch())}, {"": expected(batch())})


@pytest.mark.parametrize(
    ("kind", "fuse_first"), [("stock", True), ("stock", False), ("hook", True)]
)
def test_it_gives_the_numbers_of_stock_under_the_same_wrapper(ranks, kind, fuse_first):
    ranks.run(2, stock, kind, fuse_first)


def refusals():
    net = shard(make("hook", "stock"))
    with pytest.raises(RuntimeError, match=r"stem.weight of Conv2d: fuse .* before fully_shard"):
        spectral_ext.fuse(net)
    assert spectral_ext.fuse(net, exclude=r"stem|blocks.1|blocks.2.2")  # stock's parametrizations
    net = make("hook")
    spectral_ext.fuse(net)
    shard(net)
    with pytest.raises(RuntimeError, match=r"stem.weight of Conv2d: unfuse .* before fully_shard"):
        spectral_ext.unfuse(net)
    loss_of(net, share(batch())).backward()  # nothing was changed
    net = shard(Net().double())
    with pytest.raises(RuntimeError, match=r"Conv2d.weight: .* before fully_shard"):
        spectral_ext.spectral_norm(net.stem)


def test_what_fsdp_would_lose_is_refused(ranks):
    ranks.run(1, refusals)


class Collectives(TorchDispatchMode):
    """Notes every collective that this rank calls, with the number of elements that it sends."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it takes itself apart, and comes back with what it sends
        name = function._schema.name
        if "c10d" in name and "wait" not in name:
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)]
            self.calls.append((name.split("::")[1], max(x.numel() for x in tensors)))
        return function(*args, **(kwargs or {}))


def wire(kind):
    """On entry: one all-reduce of h + w + 1 numbers a layer and iteration; no weight is gathered."""
    net = make(kind)
    spectral_ext.fuse(net)
    shard(net)
    net(batch(2)).sum().backward()  # the first forward does more
    sizes = {name: vectors_of(net.get_submodule(name)) for name in LAYERS if name != "stem"}
    steps = {name: LAYERS[name].get("n_power_iterations", 1) for name in sizes}
    expected = []
    for step in range(max(steps.values())):
        active = [name for name in sizes if steps[name] > step]
        first, second = 0, 0
        for name in active:
            u, v = map(len, sizes[name])
            first += 1  # whether the weight is zero
            # FSDP cuts dimension 0: rows, but of the transposed convolution columns.
            if (name == "blocks.0.0") is (kind == "v_first"):
                first += u + v
            else:
                first, second = (
                    first + (u if kind == "u_first" else v),
                    second + (v if kind == "u_first" else u),
                )
        expected += [("allreduce_", n) for n in (first, second) if n]
    assert all(isinstance(p, DTensor) for p in net.parameters())
    with torch.no_grad():
        net.stem.parametrizations.weight[0].eval()
        with Collectives() as found, spectral_ext.group_of(net).normalized():
            pass
        stem = [("allreduce_", 1)]  # sharded too, outside of a forward; in evaluation
        assert sorted(found.calls) == sorted(expected + stem), found.calls
        net.eval()
        with Collectives() as found, spectral_ext.group_of(net).normalized():
            pass
        assert found.calls == [("allreduce_", len(LAYERS))]
        # A forward gathers as often, and as much, as one of the same model without any norm.
        plain = shard(Net().double())
        with Collectives() as of_plain:
            plain(batch(2))
        with Collectives() as found:
            net(batch(2))
    gathers = [call for call in found.calls if call[0] != "allreduce_"]
    assert gathers == of_plain.calls and len(gathers) == 4
    assert found.calls.count(("allreduce_", len(LAYERS) - 1)) == 1


def vectors_of(layer):
    norm = layer.parametrizations.weight[0]
    return norm._u, norm._v


@pytest.mark.parametrize("kind", ["u_first", "v_first"])
def test_only_vectors_go_over_the_wire(ranks, kind):
    ranks.run(2, wire, kind)


def two_passes(update, per_unit):
    net, reference = (make("u_first", "v_first") for _ in range(2))
    spectral_ext.fuse(reference, update=update)
    if per_unit:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for unit in [*net.blocks, net]:
            exclude = "blocks" if unit is net else None
            spectral_ext.fuse(unit, update=update, exclude=exclude)
            fully_shard(unit, mesh=mesh)
    else:
        spectral_ext.fuse(net, update=update)
        shard(net)
    train(net, reference, passes=2)
    train(net, reference, passes=2, apart=True)
    evaluate(net, reference)
    # A checkpoint in between is seen.
    other = {key: value * 1.5 for key, value in reference.state_dict().items()}
    reference.load_state_dict(other)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(net, other, options=options)
    evaluate(net, reference)
    train(net, reference, passes=2)


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("per_unit", [True, False])
def test_two_forwards_before_a_backward(ranks, update, per_unit):
    ranks.run(2, two_passes, update, per_unit)


class Checkpointed(Net):
    """Computes its blocks again in the backward."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def checkpointed(use_reentrant, per_unit):
    torch.manual_seed(0)
    net = Checkpointed(use_reentrant).double()
    for name, settings in LAYERS.items():
        ours(net.get_submodule(name), **settings)
    reference = make("u_first")
    reference.load_state_dict(net.state_dict())
    spectral_ext.fuse(reference)
    if per_unit:
        for unit in [*net.blocks, net]:
            spectral_ext.fuse(unit, exclude="blocks" if unit is net else None)
    else:
        spectral_ext.fuse(net)
    shard(net)
    # FSDP loses gradients of two reentrant checkpoints before a backward, with or without a norm.
    train(net, reference, passes=1 if use_reentrant else 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("per_unit", [True, False])
def test_activation_checkpointing(ranks, use_reentrant, per_unit):
    ranks.run(2, checkpointed, use_reentrant, per_unit)


def mesh_of_two_dimensions():
    net, reference = (make("u_first", "v_first") for _ in range(2))
    spectral_ext.fuse(net)
    spectral_ext.fuse(reference)
    shard(net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    train_and_evaluate(net, reference)


def test_shards_that_are_replicated(ranks):
    ranks.run(4, mesh_of_two_dimensions)


def columns():
    """Shards of dimension 1, where they can be equal."""

    def placement(parameter):
        return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % 5 == 0 else None

    net, reference = (make("u_first", "v_first") for _ in range(2))
    for model in (net, reference):
        spectral_ext.fuse(model)
    shard(net, shard_placement_fn=placement)
    placements = net.blocks[1][1].parametrizations.weight.original.placements
    assert placements == (Shard(1),)
    train_and_evaluate(net, reference)


def test_shards_of_another_dimension(ranks):
    ranks.run(5, columns)


def half_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net, reference = (make("u_first", dtype=torch.float32) for _ in range(2))
    spectral_ext.fuse(net)
    shard(net, mp_policy=policy)
    spectral_ext.fuse(reference)
    x = batch(dtype=torch.float32)
    loss_of(net, share(x)).backward()
    loss_of(reference, x).backward()
    found, expected = state(net), state(reference)
    assert_close(found, expected, 0.1)
    of_shards = [
        key for key in vectors(net) if "stem" not in key
    ]  # the root is gathered, in bfloat16
    assert_close(*({key: s[key] for key in of_shards} for s in (found, expected)), 1e-5)
    assert net(share(x)).dtype == torch.bfloat16


def test_mixed_precision_takes_sigma_of_the_wide_weights(ranks):
    ranks.run(2, half_precision)


def save(path):
    """Save after two steps, by both ways; return the outputs and vectors of the next forward."""
    net = make("u_first", "v_first", more=[{}, {"gain": "one_per_channel"}])
    spectral_ext.fuse(net)
    shard(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(net, share(batch(seed=step))).backward()
        optimizer.step()
    keys = set(Net().state_dict()) | {
        f"{name}.parametrizations.weight.{tensor}"
        for name in LAYERS
        for tensor in ("original", "0._u", "0._v")
    }
    keys -= {f"{name}.weight" for name in LAYERS}
    state_dict = net.state_dict()
    assert keys == {key for key in state_dict if not key.endswith("gain")}  # stock's
    dcp.save(state_dict, checkpoint_id=f"{path}/plain", no_dist=dist.get_world_size() == 1)
    dcp.save(get_model_state_dict(net), checkpoint_id=f"{path}/state")
    return _next(net)


def load(path, way, is_sharded):
    net = make("u_first", "v_first", seed=1, more=[{}, {"gain": "one_per_channel"}])
    spectral_ext.fuse(net)
    if is_sharded:
        shard(net)
    loss_of(net, batch()).backward()  # a plan was made before
    state_dict = net.state_dict() if way == "plain" else get_model_state_dict(net)
    dcp.load(state_dict, checkpoint_id=f"{path}/{way}")
    if way == "plain":
        net.load_state_dict(state_dict)
    else:
        set_model_state_dict(net, state_dict)
    return _next(net)


def _next(net):
    with torch.no_grad():
        found = {"output": net(batch())}
    found |= vectors(net)
    found["output in evaluation"] = net.eval()(batch()).detach()
    return found


@pytest.mark.parametrize("way", ["plain", "state"])
def test_a_checkpoint_is_loaded_by_another_number_of_ranks(ranks, tmp_path, way):
    expected = ranks.run(2, save, str(tmp_path))[0]
    for world_size, is_sharded in ((1, False), (1, True), (4, True)):
        for found in ranks.run(world_size, load, str(tmp_path), way, is_sharded):
            assert_close(found, expected)


def memory():
    """Without gradients a unit's normalized weights are freed with the unit."""
    net = make("u_first")
    group = spectral_ext.fuse(net)
    shard(net)
    seen, alive = [], []

    def look(layer, *_):
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(layer.weight))

    for block in net.blocks:
        next(m for m in block if hasattr(m, "parametrizations")).register_forward_hook(look)
    with torch.no_grad():
        net(batch(2))
        assert alive == [0, 0, 0]
        with group.normalized():
            unit = net.blocks[1]
            unit.unshard()
            weight = unit[1].weight
            assert unit[1].weight is weight  # the same one while it is held


def test_normalized_weights_are_not_kept(ranks):
    ranks.run(2, memory)


def autocast():
    """σ is computed wide, and the weights are written in the dtype of autocast where that is asked for."""
    for heeds in (False, True):
        net, reference = (make("u_first", "v_first", dtype=torch.float32) for _ in range(2))
        for model in (net, reference):
            spectral_ext.fuse(model, autocast=heeds)
        shard(net)
        seen = []
        net.blocks[1][1].register_forward_hook(lambda m, *_, seen=seen: seen.append(m.weight.dtype))
        x = batch(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(net, share(x)).backward()
            loss_of(reference, x).backward()
        assert seen == [torch.bfloat16 if heeds else torch.float32]
        assert_close(vectors(net), vectors(reference), 1e-5)
        assert_close(state(net), state(reference), 0.1)
        gradients = [parameter.grad for parameter in net.parameters()]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_autocast_leaves_the_power_iteration_alone(ranks):
    ranks.run(2, autocast)
