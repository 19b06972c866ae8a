"""Normalized weights that a model changes in place, and sparse gradients: the gradients are stock's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as stock_spectral_norm
from torch.utils.checkpoint import checkpoint

import spectral_ext
from spectral_ext.functional import spectral_normalize


class Masked(nn.Linear):
    """As the masked convolutions of autoregressive models: the weight is masked in place."""

    def forward(self, x):
        weight = self.weight
        with torch.no_grad():
            weight *= torch.tril(torch.ones_like(weight))
        return F.linear(x, weight, self.bias)


class Scaled(nn.Linear):
    """The change is part of the graph."""

    def forward(self, x):
        weight = self.weight
        weight.mul_(3)
        weight[0].fill_(0.5)
        return F.linear(x, weight, self.bias)


TOKENS = torch.tensor([[1, 2, 5], [0, 2, 5]])
MODELS = {
    "sparse": lambda: (nn.Embedding(6, 4, sparse=True), TOKENS),
    "sparse bag": lambda: (nn.EmbeddingBag(6, 4, sparse=True), TOKENS),
    "max_norm": lambda: (nn.Embedding(6, 4, max_norm=0.3), TOKENS),
    "max_norm and sparse": lambda: (nn.Embedding(6, 4, max_norm=0.3, sparse=True), TOKENS),
    "max_norm bag": lambda: (nn.EmbeddingBag(6, 4, max_norm=0.3), TOKENS),
    "masked": lambda: (Masked(4, 4), torch.randn(3, 4)),
    "scaled": lambda: (Scaled(4, 4), torch.randn(3, 4)),
}


def normalized(layer, norm):
    torch.manual_seed(1)
    return nn.Sequential(norm(copy.deepcopy(layer)), nn.Linear(4, 3))


def fused(layer, backend, **settings):
    model = normalized(layer, stock_spectral_norm)
    spectral_ext.fuse(model, backend=backend, **settings)
    return model


def losses_and_grads(model, x, steps=2):
    results = []
    for _ in range(steps):
        model.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        grad = model[0].parametrizations.weight.original.grad
        results += [loss.detach(), grad.to_dense()]
    return results


@pytest.mark.parametrize("settings", [{}, {"bucket_mb": 1e-6}, {"update": "step"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_stock(name, settings, backend):
    layer, x = MODELS[name]()
    steps = 1 if "update" in settings else 2
    expected = losses_and_grads(normalized(layer, stock_spectral_norm), x, steps)
    model = fused(layer, backend, **settings)
    torch.testing.assert_close(losses_and_grads(model, x, steps), expected)


@pytest.mark.parametrize("name", MODELS)
def test_layer_alone(name):
    layer, x = MODELS[name]()
    expected = losses_and_grads(normalized(layer, stock_spectral_norm), x)
    found = losses_and_grads(normalized(layer, spectral_ext.spectral_norm), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiled(backend):
    """A compiled graph that saved the masked weight would have another gradient, without an error."""
    layer, x = MODELS["masked"]()
    expected = losses_and_grads(normalized(layer, stock_spectral_norm), x)
    model = fused(layer, backend)
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(losses_and_grads(model, x), expected)


def test_compiled_graph_saves_no_copy():
    """The copies of normalized weights are made in the backward, where the compiler removes them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    saved = []

    def compiler(graph, inputs):
        *_, output = graph.graph.nodes
        saved.append([node.target for node in output.args[0] if node is not None])
        return graph.forward

    by = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
    )
    model = fused(nn.Linear(64, 4), None)
    torch.compile(model, backend=by)(torch.randn(8, 64, requires_grad=True)).sum().backward()
    assert len(saved) == 2
    assert not any("clone" in str(target) for target in saved[0])


class Checkpointed(nn.Sequential):
    """Computes its layers again in the backward, which changes the weight in place again."""

    use_reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["masked", "scaled"])
def test_activation_checkpointing(name, use_reentrant, backend):
    layer, x = MODELS[name]()
    x.requires_grad_()
    stock = normalized(layer, stock_spectral_norm)
    expected = losses_and_grads(stock, x, 1)
    model = Checkpointed(*normalized(layer, stock_spectral_norm))
    model.use_reentrant = use_reentrant
    spectral_ext.fuse(model, backend=backend)
    torch.testing.assert_close(losses_and_grads(model, x, 1), expected)


def operands(dtype=torch.float64, shapes=((3, 4), (2, 5))):
    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    us = [F.normalize(torch.randn(shape[0], dtype=dtype), dim=0) for shape in shapes]
    vs = [F.normalize(torch.randn(shape[1], dtype=dtype), dim=0) for shape in shapes]
    return weights, us, vs


def factor(output):
    return torch.linspace(-1, 2, output.numel()).view_as(output).to(output.dtype)


@pytest.mark.parametrize("is_changed", [False, True], ids=["kept", "changed"])
def test_double_backward(is_changed, backend):
    weights, us, vs = operands()

    def function(*weights):
        outputs, sigmas = spectral_normalize(
            list(weights),
            us,
            vs,
            update=False,
            scale=[2.0, 0.1],
            backend=backend,
        )
        if is_changed:
            outputs = [output.mul_(factor(output)) for output in outputs]
        return *(output.tanh() for output in outputs), sigmas

    torch.autograd.gradcheck(function, weights)
    torch.autograd.gradgradcheck(function, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", [0.01, 100.0])
def test_soft_bounds_and_half_precision(bound, dtype, backend):
    """A weight within its bound is computed again as it is."""
    grads = []
    for is_changed in (False, True):
        torch.manual_seed(0)
        weights, us, vs = operands(dtype)
        outputs, _ = spectral_normalize(weights, us, vs, bound=bound, backend=backend)
        loss = sum((output * factor(output)).sum() for output in outputs)
        if is_changed:
            for output in outputs:
                output.detach().fill_(7)
        loss.backward()
        grads.append([weight.grad for weight in weights])
    torch.testing.assert_close(*grads)


def test_two_backwards_with_a_step_between(backend):
    """As before: the node does not depend on the weight as long as its outputs are not changed."""
    weights, us, vs = operands()
    outputs, _ = spectral_normalize(weights, us, vs, backend=backend)
    loss = sum(output.tanh().sum() for output in outputs)
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    torch.optim.SGD(weights, lr=0.1).step()
    for weight in weights:
        weight.detach().mul_(2)
    assert all(map(torch.equal, torch.autograd.grad(loss, weights), first))


def test_error_names_the_layer_when_its_weight_was_changed_too(backend):
    weights, us, vs = operands()
    outputs, _ = spectral_normalize(weights, us, vs, backend=backend)
    loss = sum(output.sum() for output in outputs)
    outputs[1].detach().zero_()
    weights[1].detach().zero_()
    with pytest.raises(RuntimeError, match=r"layer 1 was changed.*weight was changed in place too"):
        loss.backward()


def test_error_says_when_the_weight_is_not_a_parameter(backend):
    weights, us, vs = operands()
    outputs, _ = spectral_normalize([weight * 2 for weight in weights], us, vs, backend=backend)
    outputs[0].detach().zero_()
    with pytest.raises(RuntimeError, match=r"layer 0 was changed.*is not a parameter.*copy"):
        sum(output.sum() for output in outputs).backward()


def test_changes_of_outputs_without_a_gradient_do_not_matter(backend):
    weights, us, vs = operands()
    weights[1].requires_grad_(False)
    outputs, _ = spectral_normalize(weights, us, vs, backend=backend)
    outputs[1].zero_()
    outputs[0].sum().backward()
    assert weights[0].grad is not None


def test_saved_tensor_hooks_see_the_outputs(backend):
    """Activation checkpointing and offloading count on them."""
    weights, us, vs = operands()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        outputs, _ = spectral_normalize(weights, us, vs, backend=backend)
    addresses = {tensor.data_ptr() for tensor in packed}
    assert {output.data_ptr() for output in outputs} <= addresses


@pytest.mark.parametrize("gain", [False, True])
def test_a_change_in_a_forward_that_was_entered_without_gradients_is_refused(backend, gain):
    """The gradients that the forward then asks for are those of a weight that is gone."""

    class Late(nn.Module):
        def __init__(self, is_changed):
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)
            spectral_ext.spectral_norm(self.layer, gain="one" if gain else None)
            self.is_changed = is_changed

        def forward(self, x):
            if self.is_changed:
                self.layer.weight.mul_(0.5)
            with torch.enable_grad():
                return self.layer(x)

    x = torch.randn(2, 4, dtype=torch.float64)
    for is_changed in (False, True):
        model = Late(is_changed)
        spectral_ext.fuse(model, backend=backend)
        with torch.no_grad():
            if is_changed:
                with pytest.raises(RuntimeError, match=r"shape \(3, 4\) was changed in place"):
                    model(x)
            else:
                y = model(x)
                with torch.enable_grad():
                    y.sum().backward()
                assert model.layer.parametrizations.weight.original.grad.any()
