"""Fused models in several threads, in workers of a DataLoader, and at the end of a process."""

import copy
import multiprocessing
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from nets import OURS, STOCK, assert_same_state, inputs, make
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset

import spectral_ext

THREADS = 8


def together(function, count=THREADS):
    """Call a function in threads that begin at the same time; return what it returned."""
    barrier = Barrier(count)

    def run(i):
        barrier.wait()
        return function(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def train(net, steps=10):
    for x in range(steps):
        net.zero_grad()
        net(inputs(x)).square().sum().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.02 * parameter.grad
    return net


@pytest.mark.parametrize("update", ["forward", "step"])
def test_one_model_for_each_thread(update, backend):
    steps = 2 if backend == "triton" else 10
    nets = [make(STOCK["u_first"], seed=seed) for seed in range(THREADS)]
    expected = [make(STOCK["u_first"], seed=seed) for seed in range(THREADS)]
    for net in (*nets, *expected):
        spectral_ext.fuse(net, backend=backend, update=update)
    together(lambda i: train(nets[i], steps))
    for net, other in zip(nets, expected, strict=True):
        assert_same_state(net, train(other, steps), rtol=0)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_one_model_in_evaluation_from_eight_threads(update, backend):
    """Bit for bit the same outputs and gradients of the input; u and v stay."""
    calls = 2 if backend == "triton" else 25
    net = make(STOCK["u_first"]).eval().requires_grad_(False)
    spectral_ext.fuse(net, backend=backend, update=update)
    before = [buffer.clone() for buffer in net.buffers()]
    expected = [output_and_gradient(net, x) for x in range(THREADS)]

    def run(x):
        return [output_and_gradient(net, x) for _ in range(calls)]

    for x, results in enumerate(together(run)):
        for result in results:
            assert all(map(torch.equal, result, expected[x]))
    assert all(map(torch.equal, net.buffers(), before))


def output_and_gradient(net, x):
    x = inputs(x).requires_grad_()
    y = net(x)
    return (y.detach(), *torch.autograd.grad(y.sum(), x))


def test_layers_alone_from_several_threads(backend):
    net = make(OURS["u_first"], OURS["v_first"]).eval()
    with torch.no_grad():
        expected = net(inputs())
        results = together(lambda _: net(inputs()))
    assert all(torch.equal(result, expected) for result in results)


class Scored(Dataset):
    """Items that a fused model makes where they are asked for."""

    def __init__(self, net):
        self.net = net

    def __len__(self):
        return 6

    def __getitem__(self, i):
        net = copy.deepcopy(
            self.net
        )  # spawned workers share the memory of u and v, as torch does it
        x = torch.full((1, 64), float(i))
        net(x).sum().backward()
        with torch.no_grad():
            return net.eval()(x)


def wide(fused=True):
    """Return a model that is large enough for several threads."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 700), nn.Linear(700, 600), nn.Linear(600, 3))
    for layer in net:
        parametrizations.spectral_norm(layer)
    if fused:
        spectral_ext.fuse(net)
    return net


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start):
    """After the parent has run the model itself, with several threads. Workers have one, by torch."""
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {start} processes")
    net, scored = wide(), Scored(wide())
    expected = [scored[i] for i in range(len(scored))]
    used = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        net.eval()(torch.ones(1, 64)).sum().backward()
        net.zero_grad()
        net.train()
        loader = DataLoader(
            Scored(net), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=600
        )
        found = list(loader)
    finally:
        torch.set_num_threads(used)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


ENDS = {
    "with a model": "",
    "after a fork": """
        import os
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)  # OpenMP's threads are not in the child, for stock neither
        net(x).sum().backward()
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
    """,
    "with outputs of the pool": "kept = [net(x) for _ in range(3)]; norms = group.normalized()",
    "inside of a forward": "entry = group.normalized(); entry.__enter__()",
    "in an exception": """
        def fail(*_):
            raise SystemExit(0)
        net[1].register_forward_hook(fail)
        net(x)
    """,
    "after threads": """
        import threading
        threads = [threading.Thread(target=lambda: net(x).sum().backward()) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """,
}


@pytest.mark.parametrize("how", ENDS)
def test_the_end_of_a_process_is_clean(how):
    """Daemon threads that are still in torch when Python ends abort the process, for stock too."""
    program = """
        import torch
        from torch import nn
        from torch.nn.utils import parametrizations
        import spectral_ext
        net = nn.Sequential(nn.Linear(64, 700), nn.Linear(700, 600), nn.Linear(600, 3))
        for layer in net:
            parametrizations.spectral_norm(layer)
        group = spectral_ext.fuse(net, update="{update}")
        x = torch.ones(1, 64)
        net(x).sum().backward()
    """
    for update in ("forward", "step"):
        code = textwrap.dedent(program.format(update=update)) + textwrap.dedent(ENDS[how])
        done = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def in_a_process(net, x, queue):
    net(x).sum().backward()
    queue.put([p.grad.numpy() for p in net.parameters()])  # memory of its own


def test_a_model_goes_to_a_spawned_process():
    """Both processes have its tensors in shared memory, as torch does it."""
    net, alone, x = wide(), wide(), torch.ones(1, 64)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=in_a_process, args=(net, x, queue))
    process.start()
    found = queue.get()
    process.join()
    assert process.exitcode == 0
    alone(x).sum().backward()
    for gradient, parameter in zip(found, alone.parameters(), strict=True):
        torch.testing.assert_close(torch.from_numpy(gradient), parameter.grad)
    assert all(map(torch.equal, net.buffers(), alone.buffers()))
