"""torch.compile with inductor: one graph for each mode, in which the fused call is one node."""

from collections import Counter

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from nets import STOCK, assert_close, assert_same_state, inputs, make, matrices_only
from torch._dynamo.utils import counters

import spectral_ext

STEPS = 20


@pytest.fixture
def graphs():
    """How often each graph that inductor compiles calls which operator of ours."""
    found = []

    def count(graph):
        # What writes into its arguments is wrapped here, and has the operator for an argument.
        operators = [str(x) for node in graph.nodes for x in (node.target, *node.args[:1])]
        found.append(Counter(x.split(".")[1] for x in operators if x.startswith("spectral_ext.")))

    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(post_grad_custom_post_pass=count):
        yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_and_evaluation(mode, graphs):
    """With batches of all sizes; CUDA graphs of the second mode are for GPUs, the rest runs here."""
    with matrices_only():
        eager, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    for model in (eager, net):
        spectral_ext.fuse(model)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, mode=mode)
    calls = [(eager, eager), (net, compiled)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02) for model, _ in calls]
    for training in (True, False):
        for model, _ in calls:
            model.train(training)
        for step in range(STEPS):
            # Not 2 or 8, which other dimensions have: torch would take the batch for one of them.
            x = torch.cat([inputs(step)] * 3)[: 3 + step % 5]
            outputs = []
            for (_, call), optimizer in zip(calls, optimizers, strict=True):
                optimizer.zero_grad()
                outputs.append(call(x))
                outputs[-1].square().sum().backward()
                optimizer.step()
            assert_close(outputs[1], outputs[0], f"step {step}", rtol=1e-11)
        assert_same_state(net, eager, rtol=1e-10)  # gradients are among it
    sigmas = (spectral_ext.group_of(model).sigmas for model in (net, eager))
    assert_close(*sigmas, rtol=1e-11)
    assert counters["stats"]["unique_graphs"] == 2  # not one for each size
    assert not counters["graph_break"]
    forward, backward = {"allocate": 1, "forward_": 1}, {"backward": 1}
    assert graphs == [forward, backward, forward, backward]
