"""torch.func around fused models and single layers: the numbers of stock, and one call for a batch."""

import copy
from collections.abc import Callable

import pytest
import torch
from nets import OURS, STOCK, assert_close, inputs, make, matrices_only
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import spectral_ext
from spectral_ext import backends, functional

X = inputs()
HEAD = "head.parametrizations.weight.original"


def model(how: str, backend: str | None, training: bool) -> nn.Module:
    net = make((OURS if how == "layers" else STOCK)["u_first"])
    if how == "fused":
        spectral_ext.fuse(net, backend=backend)
    for norm in net.modules():
        if isinstance(norm, spectral_ext.nn.SpectralNorm):
            norm.backend = backend
    return net.train(training)


def parameters(net: nn.Module) -> dict[str, Tensor]:
    """Return other parameters than the net has."""
    return {name: 1.5 * p.detach() + 0.01 for name, p in net.named_parameters()}


def call(net: nn.Module, x: Tensor = X) -> Callable[..., Tensor]:
    return lambda p: functional_call(net, p, (x,))


def loss(net: nn.Module, x: Tensor = X) -> Callable[..., Tensor]:
    return lambda p: functional_call(net, p, (x,)).square().sum()


def values_and_gradients(net):
    p = {name: value.requires_grad_() for name, value in parameters(net).items()}
    output = call(net)(p)
    return [output, *torch.autograd.grad(output.square().sum(), list(p.values()))]


def gradients(net):
    return list(grad(loss(net))(parameters(net)).values())


def vector_jacobian_product(net):
    output, pull = vjp(call(net), parameters(net))
    return [output, *pull(torch.ones_like(output))[0].values()]


def over_the_batch(net):
    return [vmap(lambda x: net(x[None])[0])(X)]


def per_sample_gradients(net):
    def of_sample(p, x):
        return functional_call(net, p, (x[None],)).square().sum()

    return list(vmap(grad(of_sample), (None, 0))(parameters(net), X).values())


def jacobian(net):
    return list(jacrev(call(net))(parameters(net)).values())


def along_the_input(net):
    return list(jvp(net, (X,), (inputs(3),)))


def along_parameters(net):
    p = parameters(net)
    return list(jvp(call(net), (p,), (parameters(net),)))


def forward_jacobian(net):
    p = parameters(net)
    return [jacfwd(lambda w: call(net)({**p, HEAD: w}))(p[HEAD])]


def second_derivative(net):
    p = parameters(net)
    return [hessian(lambda w: loss(net)({**p, HEAD: w}))(p[HEAD])]


def dual_numbers(net):
    """Forward mode without torch.func."""
    with forward_ad.dual_level():
        p = {name: forward_ad.make_dual(w, w) for name, w in parameters(net).items()}
        return list(forward_ad.unpack_dual(call(net)(p)))


REVERSE = [values_and_gradients, gradients, vector_jacobian_product, jacobian]
BATCHED = [over_the_batch, per_sample_gradients]
FORWARD = [along_parameters, forward_jacobian, second_derivative, dual_numbers]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["fused", "layers"])
@pytest.mark.parametrize("transformed", [*REVERSE, *BATCHED, along_the_input, *FORWARD])
def test_numbers_of_stock(transformed, how, training, backend):
    """Twice, since the first call leaves other vectors. Stock has no forward mode in training."""
    net, stock = model(how, backend, training), model("stock", None, training)
    if training and transformed in FORWARD:
        with pytest.raises(NotImplementedError, match="forward AD"):
            transformed(stock)
        stock = model("stock", None, False)
        for _ in range(2):
            expected = same_vectors(net, stock, transformed)
            for found, other in zip(*expected, strict=True):
                assert_close(found, other, rtol=1e-11)
        return
    for _ in range(2):
        for found, expected in zip(transformed(net), transformed(stock), strict=True):
            assert_close(found, expected, rtol=1e-11)
        for (name, found), expected in zip(net.named_buffers(), stock.buffers(), strict=True):
            assert_close(found, expected, name)


def same_vectors(net, stock, transformed):
    """Transform a model in training, and stock in evaluation with the vectors that it leaves."""
    found = transformed(net)
    for mine, theirs in zip(net.buffers(), stock.buffers(), strict=True):
        theirs.copy_(mine)
    return found, transformed(stock)


def ensemble(net: nn.Module, members: int = 3) -> list[nn.Module]:
    torch.manual_seed(4)
    nets = [copy.deepcopy(net) for _ in range(members)]
    with torch.no_grad():
        for member in nets:
            for parameter in member.parameters():
                parameter += torch.randn_like(parameter) / 10
    return nets


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["fused", "layers"])
def test_ensembles(how, training, backend):
    """Members of stock cannot be batched in training; there each one runs alone."""
    net = model(how, backend, training)
    nets = ensemble(net)
    p, b = stack_module_state(nets)

    def run(p, b):
        return functional_call(net, (p, b), (X,))

    def gradients_of(p, b):
        return grad(lambda p: run(p, b).square().sum())(p)

    before = {name: vector.clone() for name, vector in b.items()}
    outputs = vmap(run)(p, b)
    grads = torch.autograd.grad(outputs.square().sum(), list(p.values()))
    again = {name: value.detach() for name, value in p.items()}
    inner = vmap(gradients_of)(again, before)
    for i, member in enumerate(nets):
        output = member(X)
        assert_close(outputs[i], output)
        member.zero_grad()
        output.square().sum().backward()
        for (name, parameter), of_all in zip(member.named_parameters(), grads, strict=True):
            assert_close(of_all[i], parameter.grad, name, rtol=1e-11)
            assert_close(inner[name][i], parameter.grad, name, rtol=1e-11)
        for name, vector in member.named_buffers():
            assert_close(b[name][i], vector, name)
            assert_close(before[name][i], vector, name)


def test_stock_has_no_ensembles_in_training():
    nets = ensemble(model("stock", None, True))
    p, b = stack_module_state(nets)
    with pytest.raises(RuntimeError, match=r"div\.out"):
        vmap(lambda p, b: functional_call(nets[0], (p, b), (X,)))(p, b)


def test_an_ensemble_is_one_call(monkeypatch):
    """Forward and, where no transform differentiates, backward: of E·L layers each."""
    calls = []
    reference = backends.reference
    for name, column in (("forward_", 0), ("backward", 2)):
        kernel = getattr(reference, name)

        def counted(*arguments, kernel=kernel, name=name, column=column):
            calls.append((name, len(arguments[column])))
            return kernel(*arguments)

        monkeypatch.setattr(reference, name, counted)
    with matrices_only():
        net = make(STOCK["u_first"])
    spectral_ext.fuse(net, backend="reference")
    p, b = stack_module_state(ensemble(net))
    outputs = vmap(lambda p, b: functional_call(net, (p, b), (X,)))(p, b)
    assert calls == [("forward_", 15)]
    outputs.sum().backward()
    assert calls == [("forward_", 15), ("backward", 15)]


@pytest.mark.parametrize("update", [False, True])
def test_members_that_share_layers(update, backend):
    """Weights, vectors or both are batched; a layer that all share is computed once."""
    net = model("fused", backend, update)
    nets = ensemble(net)
    for member in nets:  # one layer is the same for all, vectors too
        member.head.load_state_dict(net.head.state_dict())
    p, b = stack_module_state(nets)
    for tensors, own in ((p, net.named_parameters()), (b, net.named_buffers())):
        tensors.update({name: value for name, value in own if name.startswith("head")})
    in_dims = tuple({name: None if "head" in name else 0 for name in d} for d in (p, b))
    outputs = vmap(lambda p, b: functional_call(net, (p, b), (X,)), in_dims)(p, b)
    for i, member in enumerate(nets):
        assert_close(outputs[i], member(X))
        for name, vector in member.named_buffers():
            assert_close(b[name] if "head" in name else b[name][i], vector, name)


def test_members_that_would_write_the_same_vectors(backend):
    net = model("fused", backend, True)
    p, _ = stack_module_state(ensemble(net))
    before = [vector.clone() for vector in net.buffers()]
    with pytest.raises(ValueError, match=r"u and v, which are not batched"):
        vmap(lambda p: functional_call(net, p, (X,)))(p)
    assert all(map(torch.equal, net.buffers(), before))
    net.eval()
    assert vmap(lambda p: functional_call(net, p, (X,)))(p).shape == (3, 3, 1)


def test_nested_batches(backend):
    net = model("fused", backend, False)
    p, b = stack_module_state(ensemble(net, 4))
    p, b = ({k: v.view(2, 2, *v.shape[1:]) for k, v in d.items()} for d in (p, b))
    nested = vmap(vmap(lambda p, b: functional_call(net, (p, b), (X,))))(p, b)
    for i, j in ((0, 1), (1, 0)):
        member = ({k: v[i, j] for k, v in d.items()} for d in (p, b))
        assert_close(nested[i, j], functional_call(net, tuple(member), (X,)))


SETTINGS = [
    {"bound": 0.3},
    {"bound": 1e3},
    {"scale": 2.0},
    {"detach_sigma": True},
    {"gain": "sigma_per_channel"},
    {"order": "v_first", "tol": 0.05},
    {"blocks": 3},
]


@pytest.mark.parametrize("update", ["forward", "step", "manual"])
def test_settings_beyond_stock(update, backend):
    """Against a loop over members, and forward mode against the limit of a difference."""
    net = nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in SETTINGS))
    for layer, settings in zip(net, SETTINGS, strict=True):
        spectral_ext.spectral_norm(layer, **settings)
    spectral_ext.fuse(net, update=update, check_finite=True, backend=backend)
    x = torch.randn(2, 6, dtype=torch.float64)
    nets = ensemble(net, 2)
    p, b = stack_module_state(nets)
    outputs = vmap(lambda p, b: functional_call(net, (p, b), (x,)))(p, b)
    for i, member in enumerate(nets):
        assert_close(outputs[i], member(x))
        for name, vector in member.named_buffers():
            assert_close(b[name][i], vector, name)

    net.eval()
    detached = net[3].parametrizations.weight[0]
    detached.detach_sigma = False  # it counts as a constant in the derivative alone
    p = {name: value.detach() for name, value in net.named_parameters()}

    def run(step):
        return functional_call(net, {k: v * (1 + step * v) for k, v in p.items()}, (x,))

    _, found = jvp(run, (torch.zeros((), dtype=torch.float64),), (torch.ones(()).double(),))
    h = 1e-5
    assert_close(found, (run(h) - run(-h)) / (2 * h), rtol=1e-8)
    _, pull = vjp(run, torch.zeros((), dtype=torch.float64))
    cotangent = torch.randn_like(found)
    assert_close(pull(cotangent)[0], (found * cotangent).sum(), rtol=1e-11)


def test_a_constant_sigma_in_forward_mode(backend):
    net = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64))
    for layer in net:
        spectral_ext.spectral_norm(layer, detach_sigma=True, scale=2.0)
    spectral_ext.fuse(net, backend=backend)
    weight = net.eval()[0].parametrizations.weight.original.detach()
    sigma = spectral_ext.group_of(net).sigma_of("0")
    name = "0.parametrizations.weight.original"
    x = torch.randn(3, 6, dtype=torch.float64)
    tangent = torch.randn_like(weight)
    _, found = jvp(lambda w: functional_call(net, {name: w}, (x,)), (weight,), (tangent,))
    assert_close(found, x @ (2 * tangent / sigma).T @ net[1].weight.T)


def test_half_precision_of_float32_weights(backend):
    """What autocast asks for; forward and reverse mode against each other, and every member alone."""
    weights, u, v = torch.randn(3, 5, 4), torch.randn(5), torch.randn(4)
    options = {"update": False, "dtype": torch.bfloat16, "backend": backend}

    def normalized(weight):
        return functional.spectral_normalize([weight], [u], [v], **options)[0][0]

    tangent = torch.randn_like(weights[0])
    output, pull = vjp(normalized, weights[0])
    _, along = jvp(normalized, (weights[0],), (tangent,))
    cotangent = torch.randn_like(output)
    (gradient,) = pull(cotangent)
    assert (output.dtype, along.dtype, gradient.dtype) == (torch.bfloat16,) * 2 + (torch.float32,)
    assert_close((gradient * tangent).sum(), (along * cotangent).sum().float(), rtol=3e-2)
    together = vmap(normalized)(weights)
    assert all(torch.equal(one, normalized(w)) for one, w in zip(together, weights, strict=True))


def test_nothing_of_a_transform_is_left(backend):
    net = model("fused", backend, True)
    group = spectral_ext.group_of(net)
    p, b = stack_module_state(ensemble(net))
    vmap(lambda p, b: functional_call(net, (p, b), (X,)))(p, b)
    assert group.visible.record is None
    expected = copy.deepcopy(net)
    for found in (group.sigmas, group.iterations):
        assert found.shape == (6,)
        assert not torch._C._functorch.is_functorch_wrapped_tensor(found)
    assert_close(net(X), expected(X))


def test_a_weight_of_before_in_a_transform(backend):
    """Entered without gradients, asked for with them inside of a transform."""
    net, stock = model("fused", backend, False), model("stock", None, False)
    x = torch.randn(4, 7, dtype=torch.float64)

    def at(layer):
        name = "parametrizations.weight.original"
        p = {name: layer.parametrizations.weight.original.detach()}
        return grad(lambda p: functional_call(layer, p, (x,)).square().sum())(p)[name]

    with torch.no_grad():
        entry = spectral_ext.group_of(net).normalized()
        entry.__enter__()
    try:
        assert_close(at(net.body[2]), at(stock.body[2]))
        found, expected = (vmap(m.body[2])(x) for m in (net, stock))
        assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
    finally:
        entry.__exit__(None, None, None)
    weights = (m.body[2].parametrizations.weight.original.grad for m in (net, stock))
    assert_close(*weights)


@pytest.mark.parametrize("transformed", [gradients, per_sample_gradients, along_parameters])
def test_compiled(transformed):
    net, stock = model("fused", None, False), model("stock", None, False)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: transformed(net), fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(), transformed(stock), strict=True):
        assert_close(found, expected, rtol=1e-11)
    torch._dynamo.reset()
