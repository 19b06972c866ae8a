"""The CUDA and Triton backends on a device: numbers, graphs, streams, memory and bad input.

`make gpu` runs these, and the numeric tests of all backends with tensors that visit the device.
"""

import sys

import pytest
import samples
import torch
from test_half_outputs import (  # noqa: F401  (run here with the backend of this file)
    test_half_outputs_are_the_float_ones_rounded_once,
    test_weights_of_several_dtypes,
)
from test_numeric import (  # noqa: F401  (and these)
    DTYPES,
    ORDERS,
    test_backward,
    test_backward_of_odd_gradients,
    test_eps_clamps_as_in_stock,
    test_every_half_is_converted_and_rounded_as_in_torch,
    test_forward,
    test_frozen_weights_get_no_gradient,
    test_gradcheck,
    test_gradient_of_sigma,
    test_many_iterations_find_the_norm,
    test_non_finite_weights_propagate,
    test_optimizer_step_between_two_backwards,
    test_scales,
    test_two_forwards_then_backward_of_the_first,
    test_zero_sigma_of_a_weight_that_is_not_zero,
    test_zero_weight,
)
from test_options import (  # noqa: F401  (and these)
    test_a_weight_within_its_bound_is_left_alone,
    test_a_zero_weight_stays_zero_whatever_the_target,
    test_averaged_vectors_count_as_unit_vectors_in_evaluation,
    test_evaluation_reports_no_iterations,
    test_float32_vectors_of_half_precision_weights,
    test_plain_layers_keep_their_bits_beside_others,
    test_project_writes_the_weights,
    test_targets,
    test_tolerance,
    test_tolerance_of_weights_without_a_direction,
)
from torch.nn.utils.parametrizations import spectral_norm

from spectral_ext import backends, fuse
from spectral_ext.functional import spectral_normalize

SCHEDULES = ("ticket", "phases")
MODEL = [((64, 3, 3, 3), 0), ((128, 64, 3, 3), 0), ((128, 128, 4, 4), 1), ((10, 2048), 0)]


DEVICE = torch.device("cuda", 0)
REASONS = {name: backends.unavailable(name, DEVICE) for name in ("cuda", "triton")}
HERE = [name for name, reason in REASONS.items() if reason is None]
if "--collect-only" in sys.argv:
    HERE = list(REASONS)
elif not HERE:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in REASONS.items())
    pytest.skip(f"no backend for a CUDA device here: {reasons}", allow_module_level=True)


@pytest.fixture(autouse=True, params=HERE)
def on_device(request, monkeypatch):
    """The backend that computes on the device in this test, where none is named."""
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    return backends.select(request.param, DEVICE)


if "cuda" in HERE:
    cuda_only = pytest.mark.parametrize("on_device", ["cuda"], indirect=True)
else:
    cuda_only = pytest.mark.skip(reason=f"there is no cuda backend here: {REASONS['cuda']}")


class Visiting:
    """A backend of CPU tensors that computes on the device.

    Whole storages go there and back, so that strides, offsets and what lies between stay.
    """

    attach = prepare = None

    def __init__(self, backend):
        self.backend = backend

    @staticmethod
    def unavailable(device):
        return None

    @staticmethod
    def there(tensor):
        if tensor is None:
            return None
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
        place = tensor.size(), tensor.stride(), tensor.storage_offset()
        return storage.cuda().as_strided(*place)

    def allocate(self, weights, dims, dtype=None):
        there = [self.there(weight) for weight in weights]
        outputs, saved, sigmas = self.backend.allocate(there, dims, dtype)
        return [torch.empty_like(y, device="cpu") for y in outputs], saved.cpu(), sigmas.cpu()

    def forward_(self, weights, us, vs, outputs, saved, sigmas, convergence, *settings):
        written = [*us, *vs, *outputs, saved, sigmas, convergence]
        there = [self.there(tensor) for tensor in written]
        n = len(weights)
        us, vs, outputs_there = (there[i * n : (i + 1) * n] for i in range(3))
        self.backend.forward_(
            [
                result if output.data_ptr() == weight.data_ptr() else self.there(weight)
                for weight, output, result in zip(weights, outputs, outputs_there, strict=True)
            ],
            us,
            vs,
            outputs_there,
            *there[3 * n :],
            *settings,
        )
        for here, result in zip(written, there, strict=True):
            here.copy_(result)

    def backward(self, grad_outputs, grad_sigmas, outputs, saved, sigmas, *settings):
        grads = self.backend.backward(
            [self.there(g) for g in grad_outputs],
            self.there(grad_sigmas),
            [self.there(y) for y in outputs],
            self.there(saved),
            self.there(sigmas),
            *settings,
        )
        return [grad.cpu() for grad in grads]


@pytest.fixture
def backend(on_device, monkeypatch):
    """The name of the backend for the tests that are shared with others."""
    monkeypatch.setitem(backends._chosen, ("visiting", torch.device("cpu")), Visiting(on_device))
    return "visiting"


def device_layers(shapes=MODEL, dtype=torch.float32, **settings):
    """Return weights that require a gradient, us, vs and dims, all on the device."""
    layers = [samples.layer(shape, dim, dtype, **settings) for shape, dim in shapes]
    return (
        [layer.weight.cuda().requires_grad_() for layer in layers],
        [layer.u.cuda() for layer in layers],
        [layer.v.cuda() for layer in layers],
        [layer.dim for layer in layers],
    )


def step(weights, us, vs, dims, grads):
    """Return the results of a forward and a backward."""
    normalized, sigmas = spectral_normalize(weights, us, vs, dims=dims)
    return [*normalized, sigmas, *torch.autograd.grad(normalized, weights, grads)]


def plain_settings(count):
    """Return what ``forward_`` takes from n_power_iterations to soft, without any option."""
    values = (1, 1e-12, False, 0.0, 1.0, False)
    return [[value] * count for value in values]


def clones(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_auto_chooses_the_best():
    assert backends.select("auto", DEVICE) is backends.select(HERE[0], DEVICE)


def test_captured_iterations_stop_by_their_tolerance():
    """A replay decides anew, on the device: fewer steps once the vectors have settled."""
    weights, us, vs, dims = device_layers([((64, 48), 0), ((10, 300), 0)])
    for vector in (*us, *vs):
        vector.copy_(torch.nn.functional.normalize(torch.randn_like(vector), dim=0))
    report = torch.empty(2, 2, device="cuda")
    options = {"dims": dims, "n_power_iterations": 40, "tol": [0.05, 0.0], "convergence": report}
    spectral_normalize(weights, clones(us), clones(vs), **options)
    graph = torch.cuda.CUDAGraph()
    torch.use_deterministic_algorithms(False)  # fills would be captured
    with torch.cuda.graph(graph), torch.no_grad():
        spectral_normalize(weights, us, vs, **options)
    counts = []
    for _ in range(2):
        graph.replay()
        counts.append(report[1].tolist())
    assert 1 < counts[0][0] < 40 and counts[1] == [1, 40] and counts[0][1] == 40


@cuda_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_schedules_give_the_same_bits(dtype, order, layout, monkeypatch):
    results = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("SPECTRAL_EXT_CUDA_SCHEDULE", schedule)
        torch.manual_seed(0)
        layers = samples.layers(dtype, layout, order=order, n_power_iterations=2)
        weights = [Visiting.there(layer.weight).requires_grad_() for layer in layers]
        us, vs = [layer.u.cuda() for layer in layers], [layer.v.cuda() for layer in layers]
        normalized, sigmas = spectral_normalize(
            weights, us, vs, dims=[layer.dim for layer in layers], n_power_iterations=2, order=order
        )
        grads = [torch.randn_like(y) for y in normalized]
        results.append([*normalized, sigmas, *torch.autograd.grad(normalized, weights, grads)])
        results[-1] += [*us, *vs]
    assert_equal(*results)


def test_more_layers_than_one_launch_takes():
    shapes = [((3 + i % 7, 5 + i % 11), i % 2) for i in range(300)]
    torch.manual_seed(0)
    weights, us, vs, dims = device_layers(shapes)
    here = [[tensor.cpu() for tensor in clones(tensors)] for tensors in (weights, us, vs)]
    normalized, sigmas = spectral_normalize(weights, us, vs, dims=dims)
    expected, expected_sigmas = spectral_normalize(*here, dims=dims, backend="reference")
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close([y.cpu() for y in normalized], list(expected), **close)
    torch.testing.assert_close(sigmas.cpu(), expected_sigmas, **close)


@pytest.mark.parametrize("schedule", SCHEDULES)  # of cuda; triton has one
def test_graph_is_captured_in_the_first_call(schedule, monkeypatch):
    """Replays do what calls do, also where plan and tables were made during the capture."""
    monkeypatch.setenv("SPECTRAL_EXT_CUDA_SCHEDULE", schedule)
    weights, us, vs, dims = device_layers([((4, 5), 0)])
    step(weights, us, vs, dims, [torch.randn_like(w) for w in weights])  # loads the kernels
    shapes = [((33 if schedule == "ticket" else 35, 77), 0), *MODEL]  # a plan that nobody made yet
    weights, us, vs, dims = device_layers(shapes)
    grads = [torch.randn_like(w) for w in weights]
    start = clones([*us, *vs])
    torch.use_deterministic_algorithms(False)  # fills of uninitialized memory would be captured

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(weights, us, vs, dims, grads)
    assert_equal([*us, *vs], start)  # a capture runs nothing
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(clones([*captured, *us, *vs]))

    for vector, value in zip([*us, *vs], start, strict=True):
        vector.copy_(value)
    for found in replayed:
        assert_equal(found, [*step(weights, us, vs, dims, grads), *us, *vs])


def test_two_streams():
    """Calls on two streams at once do what they do one after the other."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights, us, vs, dims = device_layers(MODEL * 3)
        runs.append((weights, us, vs, dims, [torch.randn_like(w) for w in weights]))
    copies = [(w, clones(u), clones(v), d, g) for w, u, v, d, g in runs]
    expected = [[step(*run) for _ in range(5)] for run in copies]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in runs]
    found = [[], []]
    for _ in range(5):
        for run, stream, results in zip(runs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(*run))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        for result, other in zip(a, b, strict=True):
            assert_equal(result, other)


def test_two_forwards_then_two_backwards():
    weights, us, vs, dims = device_layers()
    grads = [torch.randn_like(w) for w in weights]
    copies = clones(us), clones(vs)
    expected = [step(weights, *copies, dims, grads)[-len(weights) :] for _ in range(2)]
    outputs = [spectral_normalize(weights, us, vs, dims=dims)[0] for _ in range(2)]
    found = [torch.autograd.grad(normalized, weights, grads) for normalized in outputs]
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)


def test_no_call_waits_for_the_device():
    weights, us, vs, dims = device_layers()
    grads = [torch.randn_like(w) for w in weights]
    step(weights, us, vs, dims, grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(weights, us, vs, dims, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_high_water_mark():
    """A call needs its results and a workspace of a few MB; calls that follow need no more."""
    shapes = [((512, 512, 3, 3), 0)] * 12
    weights, us, vs, dims = device_layers(shapes)
    grads = [torch.randn_like(w) for w in weights]
    size = sum(w.nbytes for w in weights)
    peaks = []
    for _ in range(3):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(weights, us, vs, dims, grads)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert 2 * size <= peaks[0] <= 2 * size + (32 << 20)  # normalized weights and gradients
    assert peaks[1] == peaks[2] <= peaks[0]


def test_more_than_2_to_the_31_elements():
    rows, columns = 2**18 + 3, 8200
    needed = 3 * 2 * rows * columns
    if torch.cuda.mem_get_info()[0] < needed + (2 << 30):
        pytest.skip(f"needs {needed >> 30} GiB of free memory on the device")
    torch.use_deterministic_algorithms(False)  # do not poison gigabytes
    weight = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda").requires_grad_()
    with torch.no_grad():
        weight[-1] = 2
    u = torch.full((rows,), rows**-0.5, device="cuda", dtype=torch.bfloat16)
    v = torch.full((columns,), columns**-0.5, device="cuda", dtype=torch.bfloat16)
    (normalized,), sigmas = spectral_normalize([weight], [u], [v])
    sigma = (columns * (rows + 3)) ** 0.5  # rank one
    assert abs(sigmas.item() / sigma - 1) < 1e-4
    assert abs(normalized[-1, -1].item() * sigma / 2 - 1) < 1e-2
    (gradient,) = torch.autograd.grad(normalized[-1].sum(), weight)
    expected = (1 - columns * 2 / sigma * u[-1].item() * v[-1].item()) / sigma
    assert abs(gradient[-1, -1].item() - expected) < 2e-2 * abs(expected)


def test_fused_module():
    """A whole model on the device, against the same on the CPU."""

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            spectral_norm(torch.nn.Conv2d(3, 8, 3)), spectral_norm(torch.nn.Conv2d(8, 4, 3))
        )

    here, there = model(), model().cuda()
    fuse(here, backend="reference")
    fuse(there)
    torch.use_deterministic_algorithms(False)  # of the convolutions
    for _ in range(2):
        x = torch.randn(2, 3, 9, 9)
        here(x).sum().backward()
        there(x.cuda()).sum().backward()
    close = {"rtol": 1e-3, "atol": 1e-4}  # convolutions may compute in TF32
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        torch.testing.assert_close(b.cpu(), a, msg=name, **close)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-2, atol=1e-2)


def test_compiled_with_cuda_graphs():
    """The first call comes while memory is allocated for a graph: what stays must not be there."""

    def model():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(37, 41), torch.nn.Linear(41, 5)]
        return torch.nn.Sequential(*(spectral_norm(layer) for layer in layers)).cuda()

    eager, net = model(), model()
    for each in (eager, net):
        fuse(each)
    compiled = torch.compile(net, mode="reduce-overhead")
    torch.use_deterministic_algorithms(False)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(3, 37, device="cuda")
        compiled(x).square().sum().backward()
        eager(x).square().sum().backward()
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Weights are written in its dtype, the norms stay float32; a scaled loss, as in training."""

    def model():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 96), torch.nn.Linear(96, 16)]
        return torch.nn.Sequential(*(spectral_norm(layer) for layer in layers)).cuda()

    plain, net = model(), model()
    fuse(plain)
    group = fuse(net, autocast=True)
    torch.use_deterministic_algorithms(False)
    scaler = torch.amp.GradScaler("cuda", 2.0**8)
    x = torch.randn(8, 64, device="cuda")
    for each in (plain, net):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        with torch.autocast("cuda", dtype):
            scaler.scale(each(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
    with torch.autocast("cuda", dtype), group.normalized():
        assert net[0].weight.dtype == dtype
    assert group.sigmas.dtype == torch.float32


# ---- Bad input


def test_devices_must_be_equal(on_device):
    weights, us, vs, dims = device_layers()
    outputs, saved, sigmas = on_device.allocate(weights, dims)
    n = len(dims)
    before = clones([*us, *vs])
    settings = plain_settings(n)
    arguments = (outputs, saved, sigmas, sigmas.new_empty(0), dims, *settings, True)
    with pytest.raises(ValueError, match="v of layer 1 is on cpu, expected cuda:0"):
        on_device.forward_(weights, us, [vs[0], vs[1].cpu(), *vs[2:]], *arguments)
    with pytest.raises(ValueError, match="the weight of layer 0 is on cpu"):
        on_device.forward_([weights[0].detach().cpu(), *weights[1:]], us, vs, *arguments)
    assert_equal([*us, *vs], before)


@cuda_only
def test_unknown_schedule(monkeypatch):
    weights, us, vs, dims = device_layers()
    before = clones([*us, *vs])
    monkeypatch.setenv("SPECTRAL_EXT_CUDA_SCHEDULE", "random")
    with pytest.raises(ValueError, match="is 'random', expected 'ticket' or 'phases'"):
        spectral_normalize(weights, us, vs, dims=dims)
    assert_equal([*us, *vs], before)


def test_out_of_memory_leaves_vectors_as_they_were(on_device):
    weights, us, vs, dims = device_layers([((2048, 2304), 0)] * 8)
    results = on_device.allocate(weights, dims)
    arguments = [results[2].new_empty(0), dims, *plain_settings(8), True]
    before = clones([*us, *vs])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)  # no room for the workspace
    try:
        with pytest.raises(torch.OutOfMemoryError):
            on_device.forward_(weights, us, vs, *results, *arguments)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_equal([*us, *vs], before)
    on_device.forward_(weights, us, vs, *results, *arguments)
    assert results[2].isfinite().all()
