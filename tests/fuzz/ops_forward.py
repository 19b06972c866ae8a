"""Operations: forwards in all modes and contexts, and what is differentiated through them."""

import threading
from contextlib import nullcontext
from typing import Any

import torch
from family import inputs
from hypothesis import strategies as st
from pair import Side
from registry import BOOL, SEED, operation, skip_unless
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook
from torch.utils.checkpoint import checkpoint

CONTEXTS = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "cached": parametrize.cached,
}


def squares(y: Tensor) -> Tensor:
    return y.square().mean()


def back_from(loss: Tensor, **keywords: bool) -> None:
    """Go back from a loss; not from that of a model whose parameters are frozen."""
    if loss.requires_grad:
        loss.backward(**keywords)


@operation(context=st.sampled_from(list(CONTEXTS)), seed=SEED)
def forward(side: Side, context: str, seed: int) -> Tensor:
    with CONTEXTS[context]():
        return side.model(inputs(seed)).clone()


@operation(context=st.sampled_from(["grad", "cached"]), seed=SEED)
def forward_and_backward(side: Side, context: str, seed: int) -> Tensor:
    x = inputs(seed).requires_grad_()
    with CONTEXTS[context]():
        y = side.model(x)
        back_from(squares(y))
    return [y, x.grad]


@operation(seed=SEED)
def forward_with_grad_inside_no_grad(side: Side, seed: int) -> Any:
    """The forward is entered without gradients, and its first block asks for them."""
    skip_unless(not any(norm.is_hook for norm in side.pair.twin.norms()))
    found = []

    def grad_inside(module: Any, args: Any) -> None:
        with torch.enable_grad():
            for norm in side.norms():
                if norm.module is module:
                    found.append(getattr(module, norm.tensor))

    handles = [norm.module.register_forward_pre_hook(grad_inside) for norm in side.norms()]
    try:
        with torch.no_grad():
            y = side.model(inputs(seed))
    finally:
        for handle in handles:
            handle.remove()
    back_from(sum((weight.pow(3).sum() for weight in found), y.sum()))
    return [y, *(weight.detach() for weight in found)]


@operation(first=BOOL, seed=SEED)
def two_forwards_then_backward(side: Side, first: bool, seed: int) -> list[Tensor]:
    losses = [squares(side.model(inputs(seed + i))) for i in range(2)]
    for loss in losses if first else losses[::-1]:
        back_from(loss)
    return losses


@operation(seed=SEED)
def gradient_accumulation(side: Side, seed: int) -> None:
    for i in range(3):
        back_from(squares(side.model(inputs(seed + i))))


@operation(seed=SEED)
def double_backward(side: Side, seed: int) -> Tensor:
    """A gradient penalty."""
    x = inputs(seed).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the other has no second derivative
        y = side.model(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    penalty = (gradient.square().sum() - 1).square() + squares(y)
    penalty.backward()
    return [penalty, x.grad]


@operation(seed=SEED)
def keep_loss(side: Side, seed: int) -> Tensor:
    """Its backward comes later, after other forwards."""
    loss = squares(side.model(inputs(seed)))
    side.kept["loss"] = (loss, versions(side.pair.twin))
    return loss


@operation(retain=BOOL)
def backward_of_kept_loss(side: Side, retain: bool) -> None:
    """Only where stock allows it: no weight was changed since."""
    twin = side.pair.twin
    if "loss" not in side.kept:
        skip_unless(side.pair.all_are_in_groups())
        keep_loss(side, 0)
        side.model(inputs(1))
    elif side.kept["loss"][1] != versions(twin):
        for each in side.pair.sides:
            each.kept.pop("loss", None)
        skip_unless(False)
    loss, _ = side.kept["loss"]
    back_from(loss, retain_graph=retain)
    if not retain:
        del side.kept["loss"]


def versions(twin: Side) -> list[tuple[int, int]]:
    """Return what stock's graphs hold: weights, and the vectors of hooks outside of a group."""
    of_hooks = [n.vectors for n in twin.norms() if n.is_hook and type(n.norm) is StockHook]
    tensors = [*twin.model.parameters(), *(vector for pair in of_hooks for vector in pair)]
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


@operation(seed=SEED, factor=st.sampled_from([0.5, 2.0]))
def functional_call(side: Side, seed: int, factor: float) -> list[Tensor]:
    """With parameters of its own, and the gradient with respect to them."""
    own = {n: (factor * p.detach()).requires_grad_() for n, p in side.model.named_parameters()}
    y = torch.func.functional_call(side.model, own, (inputs(seed),))
    gradients = torch.autograd.grad(squares(y), list(own.values()), allow_unused=True)
    return [y, *(g for g in gradients if g is not None)]


@operation(seed=SEED)
def func_grad(side: Side, seed: int) -> Any:
    """``torch.func.grad`` in evaluation; in training stock cannot."""
    own = {name: p.detach() for name, p in side.model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return squares(torch.func.functional_call(side.model, parameters, (inputs(seed),)))

    with side.evaluating():
        gradients = torch.func.grad(loss)(own)
    return list(gradients.values())


@operation(times=st.sampled_from([1, 2, 9, 12]), whole=BOOL, reentrant=BOOL, seed=SEED)
def checkpointed(side: Side, times: int, whole: bool, reentrant: bool, seed: int) -> list[Tensor]:
    """A cell that is called many times; the twin, without checkpoints, has the right gradient.

    No output goes into the next call: over 12 such calls the twin's own gradient changes by 1e-8 if its
    inputs do by 1e-15.
    """
    skip_unless(whole or hasattr(side.model, "checkpointing"))
    skip_unless(side.pair.all_are_in_groups())  # stock's layers advance in a recomputation
    x = inputs(seed).requires_grad_()
    h = 0.0 * x
    if not whole and not side.is_twin:
        side.model.checkpointing = "reentrant" if reentrant else "not reentrant"
    try:
        for i in range(times):
            if whole and not side.is_twin:
                h = 0.5 * h + checkpoint(side.model, 0.9**i * x, use_reentrant=reentrant)
            else:
                h = 0.5 * h + side.model(0.9**i * x)
    finally:
        if not whole and not side.is_twin:
            side.model.checkpointing = None
    squares(h).backward()
    # The recomputation has called the modules of hooks again, and left its weights there.
    with torch.no_grad():
        side.model(inputs(seed))
    return [h, x.grad]


@operation(times=st.integers(1, 3), seed=SEED)
def forward_in_a_backward(side: Side, times: int, seed: int) -> list[Tensor]:
    """As adjoint solvers do: the model runs inside of a backward, and only there."""
    outputs = []

    def hook(gradient: Tensor) -> None:
        with torch.enable_grad():
            outputs.append(side.model(gradient.detach()))

    for i in range(times):
        z = inputs(seed + i).requires_grad_()
        q = z * 1
        q.register_hook(hook)
        q.sum().backward()
    back_from(squares(outputs[-1]))
    return outputs


@operation(seed=SEED)
def forward_in_a_thread(side: Side, seed: int) -> Tensor:
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(side.model(inputs(seed))))
    thread.start()
    thread.join()
    back_from(squares(outputs[0]))
    return outputs


@operation(block="block", seed=SEED)
def call_block(side: Side, block: str, seed: int) -> Tensor:
    """A direct call of a sub-module, outside of the root's forward."""
    y = side.model.get_submodule(block)(inputs(seed))
    back_from(squares(y))
    return y


@operation(layer="layer", times=st.integers(1, 3))
def read_weight(side: Side, layer: str, times: int) -> list[Tensor]:
    norm = side.norm(layer)
    with torch.no_grad():
        return [getattr(norm.module, norm.tensor).clone() for _ in range(times)]


@operation(layer="layer", seed=SEED)
def penalty_on_a_weight(side: Side, layer: str, seed: int) -> Tensor:
    """A penalty on a weight that is read after the forward."""
    norm = side.norm(layer)
    y = side.model(inputs(seed))
    loss = squares(y) + getattr(norm.module, norm.tensor).pow(3).sum()
    back_from(loss)
    return loss


@operation(layer="layer", seed=SEED)
def read_before_the_forward(side: Side, layer: str, seed: int) -> Tensor:
    """A forward pre-hook of the root reads a weight, for a log."""
    norm = side.norm(layer)
    # The entry computes it, after all pre-hooks of the root; a hook of stock did before them.
    of_root = side.pair.twin.norm(layer)
    skip_unless(not (of_root.is_hook and of_root.module is side.pair.twin.model))
    found = []

    def log(module: Any, args: Any) -> None:
        found.append(getattr(norm.module, norm.tensor).detach().clone())

    handle = side.model.register_forward_pre_hook(log)
    try:
        return [side.model(inputs(seed)), *found]
    finally:
        handle.remove()
