"""torch.export, ONNX and TorchScript of fused models, unbaked and baked."""

import subprocess
import sys

import pytest
import torch
from nets import OURS, STOCK, assert_close, assert_same_state, inputs, make
from torch import nn
from torch.export import Dim

import spectral_ext

# Torch 2.13 copies a class that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

# What was exported from three samples runs on six.
BATCH = {"x": {0: Dim("batch")}}
MORE = torch.cat([inputs(1), inputs(2)])


def fused(dtype=torch.float64, **settings):
    net = make(STOCK["u_first"], STOCK["v_first"], dtype=dtype)
    spectral_ext.fuse(net, **settings)
    return net


def stock(dtype=torch.float64):
    return make(STOCK["u_first"], STOCK["v_first"], dtype=dtype)


def operators_of(program):
    graphs = (m.graph for m in program.graph_module.modules() if hasattr(m, "graph"))
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return {str(x) for node in nodes for x in (node.target, *node.args[:1])}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_exported_program(update, training, strict):
    """In training it advances the vectors that are in it; of either mode it has torch's operations."""
    check_exported_program(update, training, strict, None)


def test_every_backend_exports_torch_operations(backend):
    check_exported_program("step", True, False, backend)


def check_exported_program(update, training, strict, backend):
    net, expected = fused(backend=backend, update=update).train(training), stock().train(training)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    program = torch.export.export(net, (inputs(),), dynamic_shapes=BATCH, strict=strict)
    assert not [name for name in operators_of(program) if "spectral_ext" in name]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    # The program has the tensors of the model, and both go on from there. One of fewer operations
    # knows nothing of no_grad: it is for inference.
    plain_run = program.run_decompositions().module()
    for run in (program.module(), program.module(), plain_run, net):
        with torch.set_grad_enabled(run is not plain_run):
            assert_close(run(MORE), expected(MORE))
    assert_same_state(net, expected)
    sigmas = spectral_ext.group_of(net).sigmas
    assert type(sigmas) is torch.Tensor  # and none of those that the export saw
    assert_close(sigmas, spectral_ext.fuse(expected).sigmas)


def test_an_exported_program_trains():
    """Gradients flow through it as they do through the model."""
    net, expected = fused(), stock()
    run = torch.export.export(net, (inputs(),), dynamic_shapes=BATCH).module()
    run(MORE).square().sum().backward()
    expected(MORE).square().sum().backward()
    original = run.get_parameter("conv.parametrizations.weight.original")
    assert_close(original.grad, expected.conv.parametrizations.weight.original.grad)


def test_layers_alone():
    net = make(OURS["u_first"], OURS["v_first"]).eval()
    run = torch.export.export(net, (inputs(),), dynamic_shapes=BATCH).module()
    assert_close(run(MORE), net(MORE))


SETTINGS = [
    {"bound": 0.3},
    {"scale": 2.0, "detach_sigma": True},
    {"gain": "sigma_per_channel"},
    {"tol": 0.05},
    {"blocks": 3},
    {"norm": "operator", "input_size": 6},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_settings_beyond_stock(dtype):
    net = nn.Sequential(*(nn.Conv1d(6, 6, 3, padding=1) for _ in SETTINGS)).to(dtype)
    for layer, settings in zip(net, SETTINGS, strict=True):
        spectral_ext.spectral_norm(layer, **settings)
    spectral_ext.fuse(net, check_finite=True)
    x = torch.randn(2, 6, 6, dtype=dtype)
    net(x)
    net.eval()
    run = torch.export.export(net, (x,)).module()
    rtol = 1e-12 if dtype == torch.float64 else 2e-2
    assert_close(run(x).double(), net(x).double(), rtol=rtol)
    spectral_ext.group_of(net).check()


def traced(net):
    """Trace, with torch's own comparison of two traces."""
    return torch.jit.trace(net, (inputs(),))


@pytest.mark.parametrize("baked", [False, True])
def test_torchscript(baked, tmp_path, recwarn):
    net, expected = fused(), stock()
    for model in (net, expected):
        model(inputs())  # vectors that were never iterated are not baked
        model.eval()
    trace = traced(spectral_ext.bake(net) if baked else net)
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
    torch.jit.save(trace, tmp_path / "net.pt")
    assert_close(torch.jit.load(tmp_path / "net.pt")(MORE), expected(MORE))


WITHOUT_US = """
import sys, torch
sys.modules["spectral_ext"] = None
folder, samples = sys.argv[1], torch.load(sys.argv[1] + "/samples.pt")
for run in (torch.export.load(folder + "/net.pt2").module(), torch.jit.load(folder + "/net.pt")):
    assert torch.equal(run(samples["x"]), samples["y"])
try:
    import spectral_ext
except ImportError:
    print("ran without us")
"""


def test_where_spectral_ext_is_not_installed(tmp_path):
    net = fused().eval()
    program = torch.export.export(net, (inputs(),), dynamic_shapes=BATCH)
    torch.export.save(program, tmp_path / "net.pt2")
    torch.jit.save(traced(net), tmp_path / "net.pt")
    torch.save({"x": MORE, "y": program.module()(MORE).detach()}, tmp_path / "samples.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout == "ran without us\n", done.stderr


@pytest.mark.parametrize("baked", [False, True])
def test_onnx(baked, tmp_path):
    """Straight from the fused model, too; float32, as it is deployed."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'spectral-ext[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'spectral-ext[export]'")
    x = inputs(dtype=torch.float32)
    net, expected = fused(torch.float32), stock(torch.float32)
    for model in (net, expected):
        model(x)  # vectors that were never iterated are not baked
        model.eval()
    truth = stock().eval()
    truth.load_state_dict({key: value.double() for key, value in expected.state_dict().items()})
    source = spectral_ext.bake(net) if baked else net
    program = torch.onnx.export(source, (x,), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}  # ONNX's own operators
    program.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: MORE.float().numpy()})
    with torch.no_grad():
        found, of_stock, exact = torch.from_numpy(found), expected(MORE.float()), truth(MORE)
    slack = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (of_stock - exact).abs().max() + slack
