"""What docs/migration.md says: both sides of each section are trained side by side."""

import os
import sys

import pages
import pytest
import their_layers
import torch
from torch import Tensor, nn

import spectral_ext

os.environ["KERAS_BACKEND"] = "torch"  # before anyone imports Keras

PAGE = pages.read("migration.md")
SECTIONS = pages.sections(PAGE)
TITLES = ["torch, parametrization", "torch, hook", "BigGAN-PyTorch", "DUE", "Keras"]
STEPS = 4


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs the blocks of a section and gives their names."""
    for name, module in their_layers.modules().items():
        monkeypatch.setitem(sys.modules, name, module)

    def run(title: str, change=lambda names: None) -> dict[str, object]:
        names: dict[str, object] = {"__name__": "page"}
        *blocks, last = SECTIONS[title]
        for code in blocks:
            exec(code, names)
        change(names)
        exec(last, names)
        return names

    return run


def doubled(names: dict[str, object]) -> None:
    """Make models of float64, whose weights a norm of at most 1 has to change, before the last block."""
    for model in (names["theirs"].double(), names["ours"].double()):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)


def outputs(model: nn.Module) -> Tensor:
    if isinstance(model, nn.Sequential):
        size = 6 if isinstance(model[2], nn.Conv2d) else 8
        return model(images(size))
    hidden = model["linear"](model["conv"](images(8)).relu().flatten(1))
    return (hidden * model["embed"](torch.tensor([0, 3, 3, 9]))).sum(1)


def images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=generator)


def train(model: nn.Module) -> Tensor:
    """Return the losses of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(STEPS):
        loss = (outputs(model) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def close(a: Tensor, b: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-6


def test_every_section_has_its_blocks_and_its_row():
    assert list(SECTIONS) == TITLES
    for title in TITLES:
        assert f"[{title}](#" in PAGE


@pytest.mark.parametrize("title", TITLES[:3])
def test_training_has_the_same_numbers(run, title):
    names = run(title, doubled)
    theirs, ours = names["theirs"], names["ours"]
    expected = train(theirs)
    assert differ(expected[:-1], expected[1:])
    close(train(ours), expected)
    if title != "BigGAN-PyTorch":
        close(outputs(ours.eval()), outputs(theirs.eval()))
        other = run(title, doubled)["theirs"].eval()
        layout = "hook" if title == "torch, hook" else "parametrization"
        other.load_state_dict(spectral_ext.stock_state_dict(ours, layout=layout))
        close(outputs(other), outputs(theirs))


@pytest.mark.parametrize("title", TITLES[:2])
def test_a_model_that_is_there_needs_fuse_alone(run, title):
    theirs, fused = (run(title, doubled)["theirs"] for _ in range(2))
    fused.load_state_dict(theirs.state_dict())
    assert len(spectral_ext.fuse(fused).layers) == 2
    close(train(fused), train(theirs))


# BigGAN-PyTorch


class Model(nn.Module):
    """A model with a forward, to be fused."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self) -> Tensor:
        return outputs(self.layers)


def test_in_evaluation_a_biggan_layer_is_a_step_ahead(run):
    names = run("BigGAN-PyTorch", doubled)
    theirs, ours = names["theirs"].eval(), Model(names["ours"]).eval()
    group = spectral_ext.fuse(ours)
    for name, layer in theirs.items():
        sigma = (layer.u0[0] @ layer.weight.flatten(1)).norm() / layer.u0.norm()
        close(group.sigma_of(f"layers.{name}"), sigma)
    expected = outputs(theirs)
    assert differ(ours(), expected)
    group.iterate()
    close(ours(), expected)
    close(outputs(theirs), expected)  # nothing was kept


def test_the_singular_values_that_biggan_logs(run):
    names = run("BigGAN-PyTorch", doubled)
    ours = names["ours"]
    layer = their_layers.SNLinear(288, 6, num_svs=3).double()
    layer.load_state_dict(names["theirs"]["linear"].state_dict(), strict=False)
    for _ in range(2000):
        layer.normalized()
    found = torch.cat([layer.sv0, layer.sv1, layer.sv2])
    close(spectral_ext.singular_values(ours, 3)["linear.weight"], found, 1e-5)

    state = {f"linear.{key}": value for key, value in layer.state_dict().items()}
    carried = names["from_biggan"](state)
    assert sorted(carried) == sorted(key for key in ours.state_dict() if key.startswith("linear."))

    model = Model(ours)
    group = spectral_ext.fuse(model)
    for _ in range(300):
        group.iterate()
    model()
    close(group.sigma_of("layers.linear"), layer.sv0[0], 1e-5)


def test_plain_layers_of_a_biggan_checkpoint_are_carried_as_they_are(run):
    state = {
        "shared.weight": torch.ones(2, 2),
        "bn.gain.weight": torch.ones(3),
        "gamma": torch.ones(()),
    }
    assert run("BigGAN-PyTorch")["from_biggan"](state) == state


# DUE


def test_due_gives_the_same_in_evaluation(run):
    names = run("DUE", doubled)
    ours, theirs = names["ours"], names["theirs"]
    assert [layer.name for layer in spectral_ext.group_of(ours).layers] == ["2", "4"]
    train(theirs)
    run("DUE", lambda later: later.update(theirs=theirs, ours=ours))
    assert all(
        (layer.weight_sigma > 0.9).all() for layer in theirs if hasattr(layer, "weight_orig")
    )
    close(outputs(ours.eval()), outputs(theirs.eval()))


def test_due_linear_layers_train_the_same_above_and_below_the_bound(run):
    names = run("DUE", doubled)
    with torch.no_grad():
        names["theirs"][4].weight_orig.div_(1000)
        names["ours"][4].parametrizations.weight.original.div_(1000)
    for place in (2, 4):
        their, our = (nn.Sequential(names[side][place]) for side in ("theirs", "ours"))
        x = (
            torch.randn(4, 8, 6, 6, dtype=torch.float64)
            if place == 2
            else torch.randn(4, 144).double()
        )
        sides = []
        for model in (their, our):
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)
            losses = []
            for _ in range(STEPS):
                loss = (model(x) - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            sides.append(torch.stack(losses))
        assert (names["theirs"][place].weight_sigma.item() > 0.9) == (place == 2)
        close(sides[1], sides[0])


def test_each_step_of_our_operator_norm_is_between_two_of_due(run):
    names = run("DUE", doubled)
    outputs(names["theirs"])  # at the start its vectors do not belong together
    run("DUE", lambda later: later.update(theirs=names["theirs"], ours=names["ours"]))
    theirs, ours = names["theirs"][0], names["ours"][0]
    size = ours.parametrizations.weight.original.detach().norm()

    def of_ours() -> float:
        return (0.9 * size / ours.weight.detach().norm()).item()

    def of_theirs() -> float:
        theirs(images(6))
        return theirs.weight_sigma.item()

    previous = 0.0
    for _ in range(5):
        between, after = of_ours(), of_theirs()
        assert previous < between < after
        previous = after
    for _ in range(500):
        between, after = of_ours(), of_theirs()
    assert abs(between / after - 1) < 1e-6


# Keras


@pytest.fixture
def keras_models(run):
    keras = pytest.importorskip("keras", reason="the extra `keras` is not installed")
    keras.utils.set_random_seed(0)
    return run


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_keras_layer_keeps_its_kernel_and_starts_from_the_same_output(keras_models):
    def scaled(names):
        for layer in names["theirs"].layers:
            if hasattr(layer, "layer"):
                layer.kernel.assign(3 * layer.kernel.value)

    names = keras_models("Keras", scaled)
    theirs, ours = names["theirs"], names["ours"]
    x = images(8).permute(0, 2, 3, 1).float()
    raw = [v.value.detach().clone() for v in ours.trainable_weights]
    assert differ(ours(x), theirs(x))  # theirs is not normalized yet
    for _ in range(3):
        found, expected = ours(x, training=True), theirs(x, training=True)
        close(found, expected, 1e-5)
        assert all(map(torch.equal, raw, [v.value for v in ours.trainable_weights]))
        assert differ(theirs.layers[0].kernel.value, ours.layers[0].kernel.value)
        for old, new in zip(theirs.layers, ours.layers, strict=True):
            if hasattr(old, "layer"):  # for the next round: theirs starts from what it has written
                old.kernel.assign(new.kernel.value)
    close(ours(x), found, 1e-5)

    for _ in range(300):
        expected = theirs(x, training=True)
    keras_models("Keras", lambda later: later.update(theirs=theirs, ours=ours))
    close(ours(x), expected, 1e-3)

    last = theirs.layers[2]
    x = torch.randn(2, 288)
    (gradient,) = torch.autograd.grad(last(x, training=True).sin().sum(), last.kernel.value)
    kernel = last.kernel.value.detach().requires_grad_()  # as it is after that call
    plain = (x @ kernel + last.layer.bias.value).sin().sum()
    close(gradient, torch.autograd.grad(plain, kernel)[0], 1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_in_evaluation_keras_has_what_the_last_step_left(keras_models):
    names = keras_models("Keras")
    theirs, ours = names["theirs"], names["ours"]
    x = images(8).permute(0, 2, 3, 1).float().numpy()
    for model in (theirs, ours):
        model.compile(names["keras"].optimizers.SGD(0.05), "mse")
        model.fit(x, x[:, 0, 0, :1], epochs=3, verbose=0)
    kernel = theirs.layers[0].kernel.value.detach().reshape(-1, 8)
    assert abs(torch.linalg.matrix_norm(kernel, 2) - 1) > 0.01
    for layer in (ours.layers[0], ours.layers[2]):
        u, v = layer.vector_u.value, layer.vector_v.value
        sigma = v @ layer.kernel.value.detach().reshape(len(v), len(u)) @ u
        assert (
            abs(sigma / torch.linalg.matrix_norm(layer.kernel.value.reshape(len(v), -1), 2) - 1)
            < 0.1
        )
