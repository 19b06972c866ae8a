"""What docs/regularisers.md says, statement by statement."""

import re

import pages
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import spectral_ext
from spectral_ext.nn.projection import SpectralProjection

PAGE = pages.read("regularisers.md")
BLOCKS = [(title, code) for title, blocks in pages.sections(PAGE).items() for code in blocks]
TYPE = torch.float64
RATE, DECAY = 0.1, 0.3


def layer(sigma: float | None = None, **settings) -> nn.Linear:
    """Return a normalized layer with exact ``u`` and ``v``, whose raw weight may have a given σ."""
    plain = nn.Linear(6, 4, bias=False, dtype=TYPE)
    if sigma is not None:
        with torch.no_grad():
            plain.weight.mul_(sigma / torch.linalg.matrix_norm(plain.weight, 2))
    return spectral_ext.spectral_norm(plain, init="svd", **settings)


def times(factor: float, net: nn.Module) -> nn.Module:
    """Multiply the raw weight."""
    with torch.no_grad():
        raw(net).mul_(factor)
    return net


def raw(net: nn.Module) -> torch.Tensor:
    return net.parametrizations.weight.original


def in_use(net: nn.Module) -> torch.Tensor:
    """Return the weight in use, as in evaluation."""
    weight = net.eval().weight.detach()
    net.train()
    return weight


def norm(weight: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(weight, 2).item()


def loss(net: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 18, dtype=TYPE).view(3, 6)
    return net(x).sin().sum()


def gradient(net: nn.Module) -> torch.Tensor:
    return torch.autograd.grad(loss(net), raw(net))[0]


def stepped(net: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Return the weight in use after a step; ``u`` and ``v`` are exact again, as the claims suppose."""
    loss(net).backward()
    optimizer.step()
    for _ in range(300):
        net.weight  # noqa: B018
    return in_use(net)


def sgd(net: nn.Module, rate: float = RATE, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), rate, weight_decay=decay)


def twins(**settings) -> tuple[nn.Linear, nn.Linear]:
    """Return two layers with the same weight."""
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        pair.append(layer(**settings))
    return pair[0], pair[1]


def close(a: torch.Tensor | float, b: torch.Tensor | float) -> None:
    a, b = (torch.as_tensor(x, dtype=TYPE) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-4


def test_every_section_but_the_last_has_a_block_of_code():
    assert [title for title, _ in BLOCKS] == re.findall(r"^## (.+)$", PAGE, re.M)[:-1]
    assert len(BLOCKS) == 6


# Weight decay


def test_a_factor_of_the_weight_cancels_and_divides_the_gradient():
    small, large = twins()
    times(3.0, large)
    close(in_use(large), in_use(small))
    close(gradient(large), gradient(small) / 3)


def test_a_step_of_sgd_has_the_size_of_the_rate_by_the_squared_norm():
    small, large = twins()
    times(3.0, large)
    assert differ(stepped(small, sgd(small)), in_use(twins()[0]))
    close(in_use(small), stepped(large, sgd(large, 9 * RATE)))


def test_a_step_of_adam_has_the_size_of_the_rate_by_the_norm():
    small, large = twins()
    times(3.0, large)
    adams = [
        torch.optim.Adam(net.parameters(), rate, eps=0.0)
        for net, rate in ((small, RATE), (large, 3 * RATE))
    ]
    close(stepped(small, adams[0]), stepped(large, adams[1]))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_decay_alone_leaves_the_function_alone(optimizer):
    net = layer()
    before, size = in_use(net), raw(net).norm().item()
    raw(net).grad = torch.zeros_like(raw(net))
    optimizer(net.parameters(), RATE, weight_decay=DECAY).step()
    close(in_use(net), before)
    close(raw(net).norm().item(), size * (1 - RATE * DECAY))


def test_decay_with_a_gradient_is_a_larger_step():
    decayed, plain = twins()
    a = stepped(decayed, sgd(decayed, decay=DECAY))
    close(a, stepped(plain, sgd(plain, RATE / (1 - RATE * DECAY))))


def test_decay_inside_of_adam_is_not_along_the_weight():
    changed = []
    for decay in (0.0, DECAY):
        net, _ = twins()
        before = raw(net).detach().clone()
        stepped(net, torch.optim.Adam(net.parameters(), RATE, weight_decay=decay, eps=1e-1))
        changed.append(raw(net).detach() - before)
    by_decay = changed[1] - changed[0]
    along = (by_decay * before).sum().abs() / (by_decay.norm() * before.norm())
    assert along < 0.9


def test_a_step_of_sgd_makes_the_weight_larger():
    net = layer()
    size = raw(net).norm().item()
    close((gradient(net) * raw(net)).sum(), 0.0)
    loss(net).backward()
    sgd(net).step()
    assert raw(net).norm().item() > size


def test_decay_of_the_gain_shrinks_the_norm_of_the_weight_in_use():
    net = layer(gain="sigma")
    gain = net.parametrizations.weight[0].gain
    close(norm(in_use(net)), gain.abs().item())
    before = norm(in_use(net))
    raw(net).grad, gain.grad = torch.zeros_like(raw(net)), torch.zeros_like(gain)
    torch.optim.SGD([gain], RATE, weight_decay=DECAY).step()
    close(norm(in_use(net)), before * (1 - RATE * DECAY))
    torch.optim.SGD([raw(net)], RATE, weight_decay=DECAY).step()
    close(norm(in_use(net)), before * (1 - RATE * DECAY))


@pytest.mark.parametrize(("sigma", "factor"), [(0.5, 1 - RATE * DECAY), (2.0, 1.0)])
def test_with_a_bound_decay_acts_below_it_alone(sigma, factor):
    net = layer(sigma, bound=1.0)
    before = in_use(net)
    raw(net).grad = torch.zeros_like(raw(net))
    sgd(net, decay=DECAY).step()
    close(in_use(net), factor * before)
    close(norm(raw(net).detach()), sigma * (1 - RATE * DECAY))


def test_below_a_bound_a_layer_is_a_plain_one():
    net = layer(0.5, bound=1.0)
    assert torch.equal(in_use(net), raw(net))


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_projection_does_not_undo_decay(sigma):
    plain = nn.Linear(6, 4, bias=False, dtype=TYPE)
    with torch.no_grad():
        plain.weight.mul_(sigma / norm(plain.weight.detach()))
    optimizer = sgd(plain, decay=DECAY)
    SpectralProjection(plain, bound=1.0).attach(optimizer)
    plain.weight.grad = torch.zeros_like(plain.weight)
    optimizer.step()
    close(norm(plain.weight.detach()), sigma * (1 - RATE * DECAY))


# Dropout


def test_dropout_before_or_after_does_not_change_the_weight():
    first, second = twins()
    for net in (nn.Sequential(nn.Dropout(), first), nn.Sequential(second, nn.Dropout())):
        net(torch.randn(5, 6, dtype=TYPE))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert torch.equal(in_use(first), in_use(second))


def jacobian(net: nn.Module) -> torch.Tensor:
    return torch.autograd.functional.jacobian(net, torch.zeros(6, dtype=TYPE))


@pytest.mark.parametrize(("scale", "most"), [(1.0, 2.0), (0.5, 1.0)])
def test_dropout_amplifies_in_training_and_a_scale_takes_it_off(scale, most):
    net = nn.Sequential(nn.Dropout(0.5), layer(scale=scale))
    norms = [norm(jacobian(net)) for _ in range(500)]
    assert max(norms) <= most + 1e-9
    close(max(norms), most)  # a mask that keeps everything is among them
    close(norm(jacobian(net.eval())), scale)


# Weight norm


def test_a_spectral_norm_works_on_a_weight_norm_and_is_not_fused():
    stacked = spectral_ext.spectral_norm(weight_norm(nn.Linear(6, 4, dtype=TYPE)))
    net = nn.Sequential(stacked, spectral_ext.spectral_norm(nn.Linear(4, 4, dtype=TYPE)))
    group = spectral_ext.fuse(net)
    assert [layer.name for layer in group.layers] == ["1"]
    for _ in range(300):
        net(torch.randn(2, 6, dtype=TYPE))
    close(norm(in_use(stacked)), 1.0)


def test_weight_norm_on_a_spectral_norm_fails_in_the_first_forward():
    net = weight_norm(spectral_ext.spectral_norm(nn.Linear(6, 4)))
    with pytest.raises(TypeError, match="weight_v"):
        net(torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_the_older_weight_norm_leaves_no_parameter():
    with pytest.raises(ValueError, match=r"Linear\.weight"):
        spectral_ext.spectral_norm(nn.utils.weight_norm(nn.Linear(6, 4)))


@pytest.mark.parametrize("dim", [0, None])
def test_the_length_of_a_weight_norm_is_redundant(dim):
    net = weight_norm(nn.Linear(6, 4, bias=False, dtype=TYPE), dim=dim)
    spectral_ext.spectral_norm(net)
    length = net.parametrizations.weight.original0
    (of_length,) = torch.autograd.grad(loss(net), length)
    close((length * of_length).sum(), 0.0)
    assert (of_length.norm().item() > 1e-3) == (dim == 0)  # rows still compare


@pytest.mark.parametrize(("gain", "shape"), [("sigma", ()), ("sigma_per_channel", (4,))])
def test_a_gain_is_a_length_that_is_learned(gain, shape):
    net = layer(gain=gain)
    assert net.parametrizations.weight[0].gain.shape == shape
    loss(net).backward()
    assert net.parametrizations.weight[0].gain.grad.abs().min() > 0


# Orthogonal start


def orthogonal(rows: int, columns: int, **settings) -> nn.Linear:
    plain = nn.Linear(columns, rows, bias=False, dtype=TYPE)
    nn.init.orthogonal_(plain.weight)
    return spectral_ext.spectral_norm(plain, **settings)


@pytest.mark.parametrize("order", ["u_first", "v_first"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_an_orthogonal_weight_is_left_as_it_is(shape, order):
    net = orthogonal(*shape, order=order)
    for _ in range(3):
        close(net.weight.detach(), raw(net).detach())


@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_the_vectors_of_an_orthogonal_weight_are_not_unique(order):
    net = orthogonal(4, 6, order=order)
    found = []
    for _ in range(2):
        norm_of = net.parametrizations.weight[0]
        norm_of._u.copy_(nn.functional.normalize(torch.randn(4, dtype=TYPE), dim=0))
        norm_of._v.copy_(nn.functional.normalize(torch.randn(6, dtype=TYPE), dim=0))
        close(net.weight.detach(), raw(net).detach())
        u, v = norm_of._u.clone(), norm_of._v.clone()
        close(raw(net).detach() @ v, u)
        close(raw(net).detach().mT @ u, v)
        net.weight  # noqa: B018
        close(norm_of._u, u)  # nothing to converge to
        found.append(u)
    assert differ(*found)


def test_the_backward_of_an_orthogonal_weight_takes_a_subgradient():
    net = orthogonal(4, 6)
    norm_of = net.parametrizations.weight[0]
    g = torch.randn(4, 6, dtype=TYPE)
    (found,) = torch.autograd.grad(net.weight, raw(net), g)
    w, uv = raw(net).detach(), torch.outer(norm_of._u, norm_of._v)
    close(found, g - (g * w).sum() * uv)
    for other in torch.randn(50, 4, 6, dtype=TYPE):
        assert norm(other) >= norm(w) + (uv * (other - w)).sum().item() - 1e-9


@pytest.mark.parametrize("order", ["u_first", "v_first"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_one_step_estimates_between_the_smallest_and_the_largest_singular_value(shape, order):
    for _ in range(20):
        weight = torch.randn(shape, dtype=TYPE)
        u, v = (nn.functional.normalize(torch.randn(n, dtype=TYPE), dim=0) for n in shape)
        _, (sigma,) = spectral_ext.functional.spectral_normalize([weight], [u], [v], order=order)
        values = torch.linalg.svdvals(weight)
        assert values[-1] - 1e-12 <= sigma <= values[0] + 1e-12


def test_initialising_a_normalized_layer_changes_nothing():
    net = layer()
    before = raw(net).detach().clone()
    nn.init.orthogonal_(net.weight)
    assert torch.equal(raw(net), before)
    nn.init.orthogonal_(raw(net))
    close(norm(raw(net).detach()), 1.0)


def test_an_orthogonal_transposed_convolution_has_another_sigma():
    plain = nn.ConvTranspose2d(8, 4, 3, dtype=TYPE)
    nn.init.orthogonal_(plain.weight)
    close(norm(plain.weight.detach().flatten(1)), 1.0)
    net = spectral_ext.spectral_norm(plain, init="svd")
    assert differ(in_use(net), raw(net).detach())


def test_the_gain_of_an_orthogonal_start_is_sigma():
    weight = nn.init.orthogonal_(torch.empty(4, 6, dtype=TYPE), 1.7)
    close(norm(weight), 1.7)


# Batch norm


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_undoes_the_bound(affine):
    net = nn.Sequential(layer(), nn.BatchNorm1d(4, affine=affine, dtype=TYPE))
    for _ in range(50):
        net(torch.randn(64, 6, dtype=TYPE) / 3)
    if affine:
        nn.init.uniform_(net[1].weight, 0.5, 2)
    net.eval()
    gain = net[1].weight.detach() if affine else torch.ones(4, dtype=TYPE)
    scale = gain / (net[1].running_var + net[1].eps).sqrt()
    found = norm(torch.autograd.functional.jacobian(net, torch.zeros(1, 6, dtype=TYPE))[0, :, 0])
    close(found, norm(scale[:, None] * net[0].weight.detach()))
    assert 1.5 < found <= scale.abs().max().item() + 1e-12


def test_in_training_batch_norm_cancels_the_scale():
    x = torch.randn(64, 6, dtype=TYPE)
    normalized = nn.BatchNorm1d(4, eps=1e-15, dtype=TYPE)
    one, three = (twins(scale=scale)[0](x) for scale in (1.0, 3.0))
    close(3 * one, three)
    close(normalized(one), normalized(three))


# Gradient clipping


def test_the_gradient_is_as_the_page_says_and_half_for_twice_the_weight():
    small, large = twins()
    times(2.0, large)
    for net, sigma in ((small, norm(raw(small).detach())), (large, norm(raw(large).detach()))):
        weight = net.weight
        (g,) = torch.autograd.grad(torch.cos(weight).sum(), weight, retain_graph=True)
        norm_of = net.parametrizations.weight[0]
        uv = torch.outer(norm_of._u, norm_of._v)
        (found,) = torch.autograd.grad(torch.cos(weight).sum(), raw(net))
        close(found, (g - (g * weight.detach()).sum() * uv) / sigma)
    close(gradient(large), gradient(small) / 2)


@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping_by_norm_keeps_the_gradient_across_the_weight_and_by_value_does_not(by):
    net = layer()
    loss(net).backward()
    gradient, weight = raw(net).grad, raw(net).detach()
    before = gradient.clone()
    if by == "norm":
        nn.utils.clip_grad_norm_(net.parameters(), before.norm().item() / 3)
    else:
        nn.utils.clip_grad_value_(net.parameters(), before.abs().max().item() / 3)
    assert differ(gradient, before)
    along = (gradient * weight).sum().abs() / (gradient.norm() * weight.norm())
    assert along < 1e-9 if by == "norm" else along > 1e-3


def test_the_bound_holds_whatever_a_step_did():
    net = layer()
    raw(net).grad = 100 * torch.randn_like(raw(net))
    sgd(net).step()
    for _ in range(300):
        net.weight  # noqa: B018
    close(norm(in_use(net)), 1.0)
