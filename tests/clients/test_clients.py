"""Models of other people's packages go on as they were when they are fused.

`python tests/clients/install.py` installs the packages; one that is absent is skipped with pip's word.
"""

import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from client_models import MODELS, Model, audiocraft
from install import FIXED, pip
from required import require
from torch import Tensor, nn
from torch.nn.utils import parametrize

import spectral_ext

STEPS = 5
# What rounding becomes in so many steps, relative to the largest entry.
RTOL = 1e-9


@pytest.fixture(params=MODELS)
def client(request: pytest.FixtureRequest) -> Model:
    require(request.param)
    return MODELS[request.param]


def build(client: Model) -> nn.Module:
    torch.manual_seed(0)
    # `double()` does not convert the raw weight that the hook leaves in a layer that is never called.
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the packages' own, and that torch's hooks are deprecated
            return client.build().double()
    finally:
        torch.set_default_dtype(torch.float32)


def forward(model: nn.Module, inputs: tuple[object, ...]) -> Tensor:
    """Return all of what a model gives, which may be lists of lists, as one tensor."""

    def leaves(output: object) -> list[Tensor]:
        if isinstance(output, Tensor):
            return [output.flatten()]
        if isinstance(output, (list, tuple)):
            return [leaf for part in output for leaf in leaves(part)]
        return []

    return torch.cat(leaves(model(*inputs)))


def train(model: nn.Module, client: Model, stock: bool) -> list[float]:
    """Return the losses of some steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 2e-3, momentum=0.9)
    torch.manual_seed(1)
    losses = []
    for _ in range(STEPS):
        # A fused model computes a weight once in a forward, which is what this does in stock.
        once = parametrize.cached() if stock and client.repeats else nullcontext()
        with once:
            loss = (forward(model, client.inputs()) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_checkpoint(
    found: dict[str, Tensor], expected: dict[str, Tensor], unused: str | None
) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        if unused is not None and key.startswith(f"{unused}.") and key.endswith(("_u", "_v")):
            assert not torch.equal(found[key], value)
            continue
        scale = max(value.double().abs().max().item(), 1e-3)
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=RTOL * scale, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_a_client_trains_the_same_when_it_is_fused(client):
    stock, fused = build(client), build(client)
    group = spectral_ext.fuse(fused)
    assert len(group.layers) == client.normalized

    first = {key: value.clone() for key, value in stock.state_dict().items()}
    expected, found = train(stock, client, stock=True), train(fused, client, stock=False)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=RTOL, atol=0)
    assert len(set(expected)) == STEPS

    checkpoint = spectral_ext.stock_state_dict(fused, layout=client.layout)
    assert_same_checkpoint(checkpoint, stock.state_dict(), client.unused)
    vectors = [key for key in first if key.endswith("_u")]
    assert len(vectors) == client.normalized
    for key in vectors:  # one entry alone is ±1 forever
        stays = checkpoint[key].numel() == 1 or key.startswith(client.bypassed)
        assert stays == torch.equal(first[key], checkpoint[key]), key

    inputs = client.inputs()
    with torch.no_grad():
        answer = forward(fused.eval(), inputs)
        again = build(client).eval()
        again.load_state_dict(checkpoint)
        torch.testing.assert_close(forward(again, inputs), answer, rtol=RTOL, atol=RTOL)
        taken = build(client).eval()
        spectral_ext.fuse(taken)
        taken.load_state_dict(stock.state_dict())
        torch.testing.assert_close(forward(taken, inputs), answer, rtol=RTOL, atol=RTOL)

    spectral_ext.unfuse(fused)
    assert type(fused) is type(stock)
    assert list(fused.state_dict()) == list(first)


BYPASSED = [name for name, model in MODELS.items() if model.bypassed]


@pytest.mark.parametrize("name", BYPASSED)
def test_a_layer_that_is_never_called_keeps_its_raw_weight(name):
    """The hook runs in the call of its layer. A module that reads the layer's weight gets it raw."""
    require(name)
    client = MODELS[name]
    stock, fused = build(client), build(client)
    first = {key: value.clone() for key, value in stock.state_dict().items()}
    spectral_ext.fuse(fused)
    for training in (True, False, True):
        torch.manual_seed(1)
        inputs = client.inputs()
        expected, found = (forward(m.train(training), inputs) for m in (stock, fused))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for output in (expected, found):
            output.square().sum().backward()
    checkpoint = spectral_ext.stock_state_dict(fused, layout=client.layout)
    for layer in client.bypassed:
        found, expected = fused.get_submodule(layer), stock.get_submodule(layer)
        for read in (found.weight, found.weight_orig):
            assert torch.equal(read, expected.weight)
        assert not found.weight.requires_grad
        assert found.weight_orig.grad is None and expected.weight_orig.grad is None
        for key in ("weight_orig", "weight_u", "weight_v"):
            assert torch.equal(checkpoint[f"{layer}.{key}"], first[f"{layer}.{key}"])


@pytest.mark.parametrize("name", BYPASSED)
def test_a_trained_checkpoint_answers_the_same_when_it_is_fused_or_baked(name):
    require(name)
    client = MODELS[name]
    trained, inputs = build(client), client.inputs()
    train(trained, client, stock=True)

    def again() -> nn.Module:
        model = build(client)
        model.load_state_dict(trained.state_dict())
        return model.eval()

    expected = forward(again(), inputs)
    torch.testing.assert_close(forward(trained.eval(), inputs), expected, rtol=1e-12, atol=1e-12)
    fused = again()
    spectral_ext.fuse(fused)
    torch.testing.assert_close(forward(fused, inputs), expected, rtol=1e-12, atol=1e-12)
    called = again()
    forward(called, inputs)
    for model in (again(), called, fused):
        with pytest.warns(UserWarning, match="attn.qkv.weight: the layer was never called"):
            baked = spectral_ext.bake(model)
        torch.testing.assert_close(forward(baked, inputs), expected, rtol=1e-12, atol=1e-12)


class Predictor(nn.Module):
    """A root whose forward is not the way in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, context: Tensor, lengths: Tensor) -> Tensor:
        return self.net(context, lengths)

    def infer(self, context: Tensor, lengths: Tensor) -> Tensor:
        return self.net(context, lengths)

    def run_lstm(self, context: Tensor, lengths: Tensor) -> Tensor:
        lstm = self.net.bilstm
        return self.net.run_unsorted_inputs(lstm, context.new_ones(3, 10, 8), lengths)


def lstm_norms(lstm: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the weight, `u` and `v` of both directions."""
    names = ("weight_hh_l0", "weight_hh_l0_reverse")
    return [tuple(getattr(lstm, name + s) for s in ("_orig", "_u", "_v")) for name in names]


@pytest.mark.parametrize("method", ["forward", "infer", "run_lstm"])
def test_an_lstm_iterates_once_for_each_call_through_any_method(method):
    require("coqui-tts")
    client = MODELS["coqui-tts"]
    stock, fused = Predictor(build(client)), Predictor(build(client))
    spectral_ext.fuse(fused)
    for training in (True, True, False, True):
        inputs = client.inputs()
        outputs = []
        for model in (stock, fused):
            torch.manual_seed(2)  # of dropout
            call = model if method == "forward" else getattr(model, method)
            outputs.append(forward(model.train(training) and call, inputs))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-13)
        both = zip(lstm_norms(fused.net.bilstm), lstm_norms(stock.net.bilstm), strict=True)
        for found, expected in both:
            torch.testing.assert_close(found[0].grad, expected[0].grad, rtol=1e-11, atol=1e-13)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lstm", [0, 1])
def test_the_encoder_of_a_codec_compiles(lstm):
    """An LSTM breaks the graph."""
    require("audiocraft")
    client = replace(MODELS["audiocraft"], build=lambda: audiocraft(lstm))
    stock, fused = build(client), build(client)
    spectral_ext.fuse(fused)
    compiled = torch.compile(fused, backend="aot_eager")
    expected, found = train(stock, client, stock=True), train(compiled, client, stock=False)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=RTOL, atol=0)
    checkpoint = spectral_ext.stock_state_dict(fused, layout=client.layout)
    assert_same_checkpoint(checkpoint, stock.state_dict(), None)


def test_what_normalizes_by_its_own_code_is_left_alone():
    """normflows has the induced norms of residual flows: a soft bound, and mixed norms, of its own.

    Stock's layers are told by their class, and what only looks alike is not taken: the package reads and
    writes its own `u`, `v` and `scale` in its forward. Fuse says so and changes nothing.
    """
    require("normflows")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from normflows.nets.lipschitz import LipschitzMLP

    def model() -> nn.Module:
        torch.manual_seed(0)
        net = LipschitzMLP([3, 8, 3], init_zeros=False).double()
        net(torch.randn(4, 3, dtype=torch.float64))
        return net

    net, other = model(), model()
    with pytest.raises(ValueError, match="LipschitzMLP has no spectral norm to fuse"):
        spectral_ext.fuse(net)
    assert type(net) is type(other)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(net(inputs), other(inputs))
    for key, value in other.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)


def test_why_a_package_is_not_there_is_pips_word():
    failure = pip("--no-index", "absent-client==1.0")
    assert failure.startswith("pip exited with 1: ERROR: No matching distribution found for absent")


@pytest.mark.parametrize("name", FIXED)
def test_torch_and_numpy_stay_what_they_are(name):
    failure = pip("--no-index", "--dry-run", f"{name}==1.0.0")
    assert failure.startswith("pip exited with 1: ERROR: ResolutionImpossible")
