"""Layers that came with PyTorch's hook behave as with the hook, once they are fused."""

import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from nets import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, remove_spectral_norm, spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook

import spectral_ext

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


@pytest.fixture(autouse=True)
def double():
    # A bypassed layer of PyTorch's cannot be converted: its attribute stays what it was.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Bypassing(nn.Module):
    """As SwinV2 of timm: the weight of ``qkv`` is read, and ``qkv`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.qkv, self.out = (spectral_norm(nn.Linear(6, n)) for n in (6, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(self.inp(x).relu(), self.qkv.weight, self.qkv.bias).relu())


class Attention(nn.Module):
    """``nn.MultiheadAttention`` reads the weight of its ``out_proj``."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        for module in list(self.block.modules()):
            if isinstance(module, nn.Linear):
                spectral_norm(module)
        spectral_norm(self.block.self_attn, "in_proj_weight")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[None]).sum((0, 2))[:, None]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = spectral_norm(nn.LSTM(6, 6), "weight_hh_l0")
        self.fc = spectral_norm(nn.Linear(6, 1))

    def infer(self, x: Tensor) -> Tensor:
        return self.lstm(x[None])[0][0]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.infer(x))


MODELS = {"bypassing": Bypassing, "attention": Attention, "recurrent": Recurrent}
BYPASSED = {"bypassing": ["qkv"], "attention": ["block.self_attn.out_proj"], "recurrent": []}


def pair(cls: type[nn.Module], **settings: object) -> tuple[nn.Module, nn.Module]:
    """Return a model with hooks, and the same fused."""
    torch.manual_seed(0)
    stock = cls()
    net = copy.deepcopy(stock)
    spectral_ext.fuse(net, **settings)
    return stock, net


def hooked(net: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        f"{name}.{hook.name}": (module, hook.name)
        for name, module in net.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, StockHook)
    }


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """By the hook's names, which the fused model has too."""
    return {
        name + end: getattr(module, tensor_name + end).detach().clone()
        for name, (module, tensor_name) in hooked(net).items()
        for end in ("_orig", "_u", "_v", "")
    }


def assert_same(net: nn.Module, stock: nn.Module, but: str = " ") -> None:
    found, expected = tensors(net), tensors(stock)
    assert found.keys() == expected.keys()
    for key in expected:
        if not key.endswith(but):
            assert_close(found[key], expected[key], key)


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def train(net: nn.Module, steps: int, first: int = 0, run=None) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = (net if run is None else run)(inputs(step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("how", ["eager", "compiled", "step", "autograd off first"])
@pytest.mark.parametrize("kind", MODELS)
def test_five_steps_have_the_numbers_of_the_hook(kind, how):
    if kind == "recurrent" and how == "compiled":
        pytest.skip("torch.compile leaves LSTMs to eager")
    stock, net = pair(MODELS[kind], update="step" if how == "step" else "forward")
    before = tensors(stock)
    if how == "autograd off first":
        with torch.no_grad():
            assert_close(net(inputs(9)), stock(inputs(9)))
    run = torch.compile(net, backend="eager") if how == "compiled" else None
    for found, expected in zip(train(net, 5, run=run), train(stock, 5), strict=True):
        assert_close(found, expected)
    # What compiled code has computed is not kept: an access computes it again.
    last_weight = tuple(name for name in before if name.endswith("weight") or "hh_l0" in name[-6:])
    assert_same(net, stock, but=last_weight if how == "compiled" else " ")
    found = tensors(net)
    for name in BYPASSED[kind]:
        for end in ("_orig", "_u", "_v", ""):
            key = f"{name}.weight{end}"
            assert torch.equal(found[key], before[key]), key
        assert net.get_submodule(name).weight_orig.grad is None


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_of_a_loaded_checkpoint(kind):
    trained = MODELS[kind]()
    train(trained, 10)
    stock, net = pair(MODELS[kind])
    for model in (stock, net):
        model.load_state_dict(trained.state_dict())
        model.eval()
    expected = trained.eval()(inputs())
    assert_close(stock(inputs()), expected)
    for _ in range(2):
        assert_close(net(inputs()), expected)


def test_compilation_happens_once_more_at_most():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    _, net = pair(Bypassing)
    counter = CompileCounter()
    train(net, 5, run=torch.compile(net, backend=counter, fullgraph=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("recurrent", lambda net: net.infer(inputs()).sum()),
        ("recurrent", lambda net: net.lstm(inputs()[None])[0].sum() + net.fc(inputs()).sum()),
        ("attention", lambda net: net.block(inputs()[None]).sin().sum()),
        ("attention", lambda net: net.block.linear1(inputs()).sum()),
        ("bypassing", lambda net: net.qkv(inputs()).sum() + net.qkv(inputs(1)).sum()),
    ],
)
def test_each_call_outside_of_the_forward_makes_one_iteration(kind, run, training):
    stock, net = pair(MODELS[kind])
    for model in (stock, net):
        model.train(training)
    for _ in range(3):
        found, expected = run(net), run(stock)
        assert_close(found, expected)
        found.backward()
        expected.backward()
        assert_same(net, stock)
    for found, expected in zip(net.parameters(), stock.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            assert_close(found.grad, expected.grad)


def test_accesses_iterate_nothing():
    stock, net = pair(Recurrent)
    for model in (stock, net):
        for _ in range(3):
            _ = model.fc.weight, model.lstm.weight_hh_l0
        model(inputs())
        for _ in range(3):
            _ = model.fc.weight.norm(), model.lstm.weight_hh_l0
    assert_same(net, stock)
    assert net.fc.weight is net.fc.weight
    assert_close(net(inputs()), stock(inputs()))


def test_a_penalty_on_the_weight_after_the_forward_is_in_its_graph():
    stock, net = pair(Recurrent)
    for model in (stock, net):
        for step in range(2):
            output = model(inputs(step))
            (
                output.sum() + model.fc.weight.pow(3).sum() + model.lstm.weight_hh_l0.cos().sum()
            ).backward()
    for found, expected in zip(net.parameters(), stock.parameters(), strict=True):
        assert_close(found.grad, expected.grad)


def test_pre_hooks_of_the_model_see_the_weight_of_the_last_call():
    stock, net = pair(Recurrent)
    seen = {}
    for model in (stock, net):
        seen[model] = []
        model.register_forward_pre_hook(
            lambda m, _, model=model: seen[model].append(m.fc.weight.detach().clone())
        )
    train(net, 3)
    train(stock, 3)
    for found, expected in zip(seen[net], seen[stock], strict=True):
        assert_close(found, expected)


def test_before_the_first_call_an_access_gives_the_raw_weight():
    results = []
    for order in ("stock", "init, fuse", "fuse, init"):
        torch.manual_seed(0)
        net = nn.Sequential(spectral_norm(nn.Linear(4, 5)), spectral_norm(nn.Linear(5, 1)))
        if order == "fuse, init":
            spectral_ext.fuse(net)
        for layer in net:
            nn.init.constant_(layer.weight, 0.5)
            layer.weight.data[0, 0] = 2.0
            assert not layer.weight.requires_grad
        if order == "init, fuse":
            spectral_ext.fuse(net)
        results.append(net(torch.ones(1, 4)))
        assert net[0].weight_orig[0, 0] == 2
    for found in results[1:]:
        assert_close(found, results[0])


def test_an_assigned_weight_stays_until_the_next_call():
    stock, net = pair(Recurrent)
    for model in (stock, net):
        model(inputs())
        model.fc.weight = torch.ones(1, 6)
        assert torch.equal(model.fc.weight, torch.ones(1, 6))
        model.fc(inputs())
    assert_same(net, stock)
    with pytest.raises(KeyError, match="weight"):
        net.fc.weight = nn.Parameter(torch.ones(1, 6))


def test_code_that_looks_for_the_hook_finds_it():
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Linear(4, 5), n_power_iterations=2, eps=1e-6), nn.Tanh())
    layer, events = net[0], []
    layer.register_forward_pre_hook(lambda *_: events.append("mine"))
    (key, stock), mine = layer._forward_pre_hooks.items()
    spectral_ext.fuse(net)
    (found_key, hook), found_mine = layer._forward_pre_hooks.items()
    assert isinstance(hook, StockHook)
    assert (found_key, found_mine) == (key, mine)
    for setting in ("name", "n_power_iterations", "dim", "eps"):
        assert getattr(hook, setting) == getattr(stock, setting)
    list_ = layer.parametrizations.weight
    assert layer.weight_orig is list_.original
    assert layer.weight_u is list_[0]._u
    assert layer.weight_v is list_[0]._v
    with pytest.raises(RuntimeError, match="two spectral_norm hooks on the same parameter weight"):
        spectral_norm(layer)
    with pytest.raises(RuntimeError, match="normalizes this parameter already"):
        spectral_ext.spectral_norm(layer, order="v_first")
    assert [k for k in net.state_dict() if "weight" in k] == [
        f"0.parametrizations.weight.{end}" for end in ("original", "0._u", "0._v")
    ]
    net(torch.ones(1, 4))
    assert events == ["mine"]
    spectral_ext.unfuse(net)
    (found_key, hook), found_mine = layer._forward_pre_hooks.items()
    assert type(hook) is StockHook
    assert (found_key, found_mine) == (key, mine)
    assert not hasattr(type(layer), "weight_orig")


@pytest.mark.parametrize("runs", [0, 1])
def test_remove_spectral_norm(runs):
    stock, net = pair(Recurrent)
    group = spectral_ext.group_of(net)
    for _ in range(runs):
        assert_close(net(inputs()), stock(inputs()))
    for name, tensor_name in (("fc", "weight"), ("lstm", "weight_hh_l0")):
        for model in (stock, net):
            module = model.get_submodule(name)
            assert remove_spectral_norm(module, tensor_name) is module
            assert not hasattr(module, f"{tensor_name}_orig")
            assert not hasattr(module, "parametrizations")
            with pytest.raises(ValueError, match=f"spectral_norm of '{tensor_name}' not found"):
                remove_spectral_norm(module, tensor_name)
        assert_close(
            getattr(net.get_submodule(name), tensor_name),
            getattr(stock.get_submodule(name), tensor_name),
        )
    assert type(net) is Recurrent
    assert group.layers == ()
    assert [name for name, _ in net.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert_close(net(inputs()), stock(inputs()))


def test_a_forward_that_raises_makes_no_layer_a_bypassed_one():
    stock, net = pair(Recurrent)
    group = spectral_ext.group_of(net)
    for model in (stock, net):
        handle = model.fc.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(inputs())
        handle.remove()
    # The forward has computed the layers, and the hook of the last one has not run.
    assert torch.equal(net.fc.weight_u, stock.fc.weight_u)
    assert len(group.layers) == 2
    train(net, 3)
    train(stock, 3)
    assert_same(net, stock)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_layer_that_is_called_late(update):
    class Late(Bypassing):
        def forward(self, x):
            return super().forward(x) if x[0, 0] < 9 else self.out(self.qkv(self.inp(x)))

    stock, net = pair(Late, update=update)
    group = spectral_ext.group_of(net)
    special = inputs(3).clone()
    special[0, 0] = 10
    for x, n_layers in ((inputs(1), 2), (inputs(2), 2), (special, 3), (special, 3), (special, 3)):
        for model in (stock, net):
            with torch.no_grad():
                model.inp.weight_orig.mul_(1.01)  # a step
        assert_close(net(x), stock(x))
        assert len(group.layers) == len(group.sigmas) == n_layers
        assert_same(net, stock)


def test_what_the_group_tells_of_a_bypassed_layer():
    _, net = pair(Bypassing)
    group = spectral_ext.group_of(net)
    names = ["inp.weight", "qkv.weight", "out.weight"]
    assert [layer.qualified_name for layer in group.layers] == names
    assert group.sigmas.shape == (3,)
    net(inputs())
    names.remove("qkv.weight")
    for _ in range(2):
        assert [layer.qualified_name for layer in group.layers] == names
        assert group.sigmas.shape == group.iterations.shape == (2,)
        for sigma, layer in zip(group.sigmas, (net.inp, net.out), strict=True):
            assert_close(sigma, layer.weight_u @ layer.weight_orig @ layer.weight_v)
        assert "qkv" not in repr(group)
        report = spectral_ext.report(net)
        assert [row.name for row in report.rows] == names
        assert report.skipped["qkv.weight"].startswith("no forward of the fused model")
        with pytest.raises(KeyError, match="'qkv' names 0 layers"):
            group.sigma_of("qkv")
        net(inputs())


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "save": lambda net: (
        lambda file: (torch.save(net, file), file.seek(0), torch.load(file, weights_only=False))[2]
    )(io.BytesIO()),
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("runs", [0, 2])
def test_copies_have_the_same_rules(kind, how, runs):
    stock, net = pair(MODELS[kind])
    train(net, runs)
    train(stock, runs)
    copied = COPIES[how](net)
    size = len(pickle.dumps(net))
    for _ in range(2):
        assert_same(copied, net, but="weight" if runs else " ")
        assert_close(copied(inputs(7)), stock(inputs(7)))
        if how != "copy":  # which shares all tensors
            assert_close(net(inputs(7)), stock.eval()(inputs(7)) if 0 else copied.eval()(inputs(7)))
            break
        net = copied
    assert len(pickle.dumps(copied)) < 1.2 * size + 2000


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_the_weight_that_the_hook_left_before_the_model_was_fused(how):
    model = nn.Sequential(spectral_norm(nn.Linear(3, 3)))
    with torch.no_grad():  # of a weight with a graph PyTorch makes no deep copy
        model(torch.ones(1, 3))
    with torch.no_grad():
        model[0].weight_orig.mul_(3)
    last = model[0].weight.clone()
    spectral_ext.fuse(model)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_close(model[0].weight, last)
    assert_close(copied[0].weight, last)
    x = torch.ones(1, 3)
    assert_close(copied(x), model(x))
    assert_close(copied[0].weight, model[0].weight)


def test_replicas_of_data_parallel():
    stock, net = pair(Bypassing)
    for step in range(3):
        replica = net._replicate_for_data_parallel()
        for name in ("inp", "qkv", "out"):
            layer = getattr(net, name)
            list_ = layer.parametrizations.weight
            copies = [
                m._replicate_for_data_parallel() for m in (layer, layer.parametrizations, list_)
            ]
            norm = list_[0]._replicate_for_data_parallel()
            norm._buffers = dict(list_[0]._buffers)
            copies[2]._modules["0"] = norm
            copies[2].__dict__["original"] = list_.original.clone()
            copies[1]._modules["weight"] = copies[2]
            copies[0]._modules["parametrizations"] = copies[1]
            copies[0].bias = layer.bias.clone()
            replica._modules[name] = copies[0]
        assert_close(replica(inputs(step)), stock(inputs(step)))
    assert_same(net, stock, but="weight")


def test_functional_call():
    stock, net = pair(Bypassing)
    for model, prefix in ((stock, "weight_orig"), (net, "parametrizations.weight.original")):
        model(inputs())
        changed = {f"inp.{prefix}": torch.eye(6, requires_grad=True)}
        model.result = torch.func.functional_call(model, changed, inputs())
    assert_close(net.result, stock.result)
    del net.result, stock.result
    assert_close(net(inputs()), stock(inputs()))


def test_what_was_kept_is_freed_before_the_group_computes(monkeypatch):
    _, net = pair(Recurrent)
    group = spectral_ext.group_of(net)
    net(inputs()).sum().backward()
    gone = [weakref.ref(net.fc.weight), weakref.ref(net.lstm.weight_hh_l0)]
    net.lstm._flat_weights = []
    alive = []
    normalize = type(group)._normalize_at_once
    monkeypatch.setattr(
        type(group),
        "_normalize_at_once",
        lambda *a: (alive.append([r() is not None for r in gone]), normalize(*a))[1],
    )
    net(inputs())
    assert alive == [[False, False]]


def test_unfuse_leaves_the_weight_that_the_hook_would_have_left():
    stock, net = pair(Bypassing)
    for model in (stock, net):
        model(inputs())
        with torch.no_grad():
            model.inp.weight_orig.mul_(2)
    spectral_ext.unfuse(net)
    assert_same(net, stock)
    assert net.qkv.weight.data_ptr() == net.qkv.weight_orig.data_ptr()
    spectral_ext.fuse(net)
    assert_same(net, stock)  # the weight of the last call is taken over
    train(net, 2)
    train(stock, 2)
    assert_same(net, stock)


@contextmanager
def told_of(name: str | None) -> Iterator[None]:
    """One warning names the layer that keeps its raw weight; none for attention, which is known."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    expected = [] if name is None else [f"{name}.weight: the layer was never called"]
    assert [str(w.message).partition(" and its u")[0] for w in caught] == expected


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_bake_of_a_model_that_was_run(kind, fused):
    stock, net = pair(MODELS[kind])
    train(stock, 3)
    train(net, 3)
    with told_of("qkv" if kind == "bypassing" else None):
        baked = spectral_ext.bake(net if fused else stock)
    assert_close(baked.eval()(inputs()), stock.eval()(inputs()))
    for name in BYPASSED[kind]:
        assert torch.equal(baked.get_submodule(name).weight, stock.get_submodule(name).weight_orig)


@pytest.mark.parametrize("fused", [True, False])
def test_bake_of_a_model_that_was_loaded(fused):
    torch.manual_seed(0)
    trained = Attention()
    train(trained, 20)
    net = Attention()
    net.load_state_dict(trained.state_dict())
    if fused:
        spectral_ext.fuse(net)
    baked = spectral_ext.bake(net)  # without a warning
    assert_close(baked.eval()(inputs()), trained.eval()(inputs()))

    trained = Bypassing()
    train(trained, 20)
    net = Bypassing()
    net.load_state_dict(trained.state_dict())
    if fused:
        spectral_ext.fuse(net)
    with told_of("qkv"):
        baked = spectral_ext.bake(net)
    assert_close(baked.eval()(inputs()), trained.eval()(inputs()))


def test_bake_does_not_take_one_model_for_another():
    """The discriminator was run, the generator was not: that says nothing of its layers."""
    torch.manual_seed(0)
    gan = nn.ModuleDict({name: nn.Sequential(*(nn.Linear(3, 3) for _ in "ab")) for name in "GD"})
    for layer in (*gan["G"], *gan["D"]):
        spectral_norm(layer)
        for _ in range(2):
            layer(torch.ones(1, 3))
    fresh = copy.deepcopy({k: v.detach() for k, v in gan.state_dict().items()})
    again = nn.ModuleDict({name: nn.Sequential(*(nn.Linear(3, 3) for _ in "ab")) for name in "GD"})
    for layer in (*again["G"], *again["D"]):
        spectral_norm(layer)
    again.load_state_dict(fresh)
    again.eval()["D"](torch.ones(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        baked = spectral_ext.bake(again)
    assert_close(baked["G"](torch.ones(1, 3)), gan.eval()["G"](torch.ones(1, 3)))


def test_parametrizations_iterate_as_before():
    """Each access in training, as in PyTorch; the rules of the hook are for layers that had it."""
    torch.manual_seed(0)
    stock = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)))
    net = copy.deepcopy(stock)
    spectral_ext.fuse(net)
    for model in (stock, net):
        for _ in range(2):
            _ = model[0].weight
    assert_close(net[0].weight, stock[0].weight)


def test_a_parametrization_on_top_is_applied_to_what_the_hook_gives():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    stock, net = pair(Recurrent)
    nn.utils.parametrize.register_parametrization(net.fc, "weight", Double(), unsafe=True)
    x = inputs()
    expected = 2 * (stock(x) - stock.fc.bias) + stock.fc.bias
    assert_close(net(x), expected)


class Root(nn.Module):
    """A root that has a normalized tensor of its own, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight = spectral_norm(nn.Linear(6, 6)), nn.Parameter(torch.randn(6, 6))
        spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.weight


def a_layer() -> nn.Module:
    return spectral_norm(nn.Linear(6, 6))


def by_replica(net: nn.Module, x: Tensor) -> Tensor:
    """Call a replica, as ``DataParallel`` makes them: its tensors are those of the model."""
    modules = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, replica in modules.items():
        for name, child in module._modules.items():
            replica._modules[name] = modules[child]
        for name, parameter in module._parameters.items():
            replica._parameters[name] = parameter
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return modules[net](x)


def compiled(net: nn.Module, x: Tensor) -> Tensor:
    return torch.compile(net, backend="aot_eager")(x)


ROOT_CALLS = {
    "call": lambda net, x: net(x),
    "replica": by_replica,
    "compiled": compiled,
    "no-grad": torch.no_grad()(lambda net, x: net(x)),
}


@pytest.mark.parametrize("call", ROOT_CALLS.values(), ids=ROOT_CALLS)
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("root", [a_layer, Root])
def test_a_root_with_a_tensor_of_its_own_iterates_once_a_call(root, outer, call):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = root()
    net = copy.deepcopy(stock)
    spectral_ext.fuse(net)
    if outer:  # a root in the forward of another one, which has layers of its own
        head = spectral_norm(nn.Linear(6, 6))
        stock, net = nn.Sequential(stock, head), nn.Sequential(net, copy.deepcopy(head))
        spectral_ext.fuse(net, include=r"^1\.")
    for step in range(3):
        assert_close(call(net, inputs(step)), call(stock, inputs(step)), f"output {step}")
        with torch.no_grad():
            for model in (stock, net):
                inner = model[0] if outer else model
                inner.weight_orig.mul_(torch.linspace(1, 2, 6))
        found, expected = (model[0] if outer else model for model in (net, stock))
        if call not in (by_replica, compiled):  # neither keeps the weight of the last call
            assert_close(found.weight, expected.weight, f"the weight after call {step}")
        assert_close(found.weight_u, expected.weight_u, f"u {step}")
        assert_close(found.weight_v, expected.weight_v, f"v {step}")


def test_the_passes_of_a_step_share_the_tensor_of_a_root():
    torch.manual_seed(0)
    net = Root()
    spectral_ext.fuse(net, update="step")
    net(inputs())
    before = net.weight_u.clone(), net.inner.weight_u.clone()
    net(inputs())
    assert torch.equal(net.weight_u, before[0]) and torch.equal(net.inner.weight_u, before[1])


@pytest.mark.parametrize("suffix", ["orig", "u", "v"])
def test_a_tensor_of_the_hook_that_is_another_kind_of_attribute_is_refused_by_name(suffix):
    net = nn.Sequential(spectral_norm(nn.Linear(6, 6)))
    value = getattr(net[0], f"weight_{suffix}").detach().clone()
    delattr(net[0], f"weight_{suffix}")
    setattr(net[0], f"weight_{suffix}", value)
    with pytest.raises(ValueError, match=rf"0\.weight of Linear: weight_{suffix} .*exclude"):
        spectral_ext.fuse(net)
    assert type(net) is nn.Sequential and type(net[0]) is nn.Linear
    net(inputs())


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("through", ["group", "alone", "copy"])
def test_settings_and_weights_assigned_where_the_hook_has_them_are_followed(through, update):
    stock, net = pair(Bypassing, update=update)
    train(stock, 1), train(net, 1)
    if through == "copy":
        net, original = copy.deepcopy(net), net
        expected = tensors(original)
    weight = torch.randn(6, 6)
    for model in (stock, net):
        hook = next(h for h in model.inp._forward_pre_hooks.values() if isinstance(h, StockHook))
        hook.n_power_iterations, hook.eps = 4, 1e-6
        model.inp.weight_orig = nn.Parameter(weight.clone())
        model.out.weight_orig = nn.Parameter(weight[:1].clone())
    calls = {"alone": lambda model: model.inp(inputs()), "group": lambda model: model(inputs())}
    call = calls.get(through, calls["group"])
    assert_close(call(net), call(stock), "output")
    assert_same(net, stock)
    assert net.inp.parametrizations.weight[0].n_power_iterations == 4
    net.inp.parametrizations.weight[0].n_power_iterations = 2
    hook = next(h for h in net.inp._forward_pre_hooks.values() if isinstance(h, StockHook))
    assert hook.n_power_iterations == 2
    if through == "copy":
        assert all(torch.equal(value, expected[name]) for name, value in tensors(original).items())
        assert original.inp.parametrizations.weight[0].n_power_iterations == 1


def test_remove_parametrizations_removes_the_hook_too():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 4)))
    spectral_ext.fuse(model)
    x = torch.randn(2, 4)
    model(x)
    with torch.no_grad():
        expected = model[0].eval().weight.clone()
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert not model[0]._forward_pre_hooks
    assert type(model[0]) is nn.Linear
    assert_close(model[0].weight, expected)
    model(x)
    parametrizations.spectral_norm(model[0], n_power_iterations=3)
    spectral_ext.fuse(model)
    model[0](x)
    assert model[0].parametrizations.weight[0].n_power_iterations == 3


def test_the_hook_of_another_tensor_stays():
    layer = nn.LSTM(4, 4)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        spectral_norm(layer, name)
    model = Recurrent()
    model.layer = layer
    spectral_ext.fuse(model)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert [hook.name for hook in layer._forward_pre_hooks.values()] == ["weight_ih_l0"]
    remove_spectral_norm(layer, "weight_ih_l0")
    assert not layer._forward_pre_hooks
