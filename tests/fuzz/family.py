"""The models of the machine: small blocks of one shape, in roots of several kinds, with any norm.

Every block maps a tensor of shape (3, 4, 6) to one of the same shape, so that blocks can be combined,
replaced and removed at will. A model is described by a list of ``BlockSpec``, which prints as the call
that makes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.utils.checkpoint import checkpoint

import spectral_ext

SHAPE = (3, 4, 6)


class Block(nn.Module):
    """A block with one layer whose tensor ``tensor`` has the norm."""

    tensor = "weight"
    # The module that has the normalized tensor.
    owner = "layer"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Plane(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(1)).mean(1)


class Lookup(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.arange(SHAPE[2])).T


class Recurrent(Block):
    tensor = "weight_hh_l0"

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attention(Block):
    tensor = "in_proj_weight"

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class AttentionOut(Attention):
    """``nn.MultiheadAttention`` reads the weight of ``out_proj`` and never calls that module."""

    tensor = "weight"
    owner = "layer.out_proj"


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SHAPE[2]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Functional(Block):
    """Uses the weight of its layer itself, after it called the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, self.layer.weight)


class Mixing(nn.Module):
    """Has the normalized tensor and a child: the order of parameters differs between the layouts."""

    tensor, owner = "weight", ""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SHAPE[2], SHAPE[2]))
        self.gamma = nn.Parameter(torch.ones(SHAPE[2]))
        self.inner = nn.Linear(SHAPE[2], SHAPE[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.weight) * self.gamma


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Block(nn.Linear(6, 6)),
    "conv1d": lambda: Block(nn.Conv1d(4, 4, 3, padding=1)),
    "conv2d": lambda: Plane(nn.Conv2d(1, 3, 3, padding=1)),
    "transposed": lambda: Block(nn.ConvTranspose1d(4, 4, 3, padding=1)),
    "embedding": lambda: Lookup(nn.Embedding(6, 4)),
    "lstm": lambda: Recurrent(nn.LSTM(6, 6, batch_first=True)),
    "attention": lambda: Attention(nn.MultiheadAttention(6, 2, batch_first=True)),
    "attention_out": lambda: AttentionOut(nn.MultiheadAttention(6, 2, batch_first=True)),
    "scale": lambda: Block(Scale()),
    "functional": lambda: Functional(nn.Linear(6, 6, bias=False)),
    "mixing": lambda: Mixing(),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "two_iterations": {"n_power_iterations": 2},
    "v_first": {"order": "v_first"},
    "scale": {"scale": 1.5},
    "bound": {"bound": 0.7},
    "gain": {"gain": "sigma"},
    "tol": {"tol": 1e-3},
    "detach": {"detach_sigma": True},
}


class BlockSpec(NamedTuple):
    """One block: its kind, whose norm it has, and options of that norm."""

    kind: str
    norm: str = "parametrization"  # or "hook", "ours", "none"
    options: str = "default"


def normalize(module: nn.Module, tensor: str, spec: BlockSpec, backend: str | None = None) -> None:
    """Put the norm of a specification on a tensor of a module."""
    options = dict(OPTIONS[spec.options])
    iterations = options.get("n_power_iterations", 1)
    if spec.norm == "parametrization":
        parametrizations.spectral_norm(module, tensor, iterations)
    elif spec.norm == "hook":
        hook_spectral_norm(module, tensor, iterations)
    elif spec.norm == "ours":
        if isinstance(module, Scale):
            options = {k: v for k, v in options.items() if k in ("scale", "bound", "detach_sigma")}
        spectral_ext.spectral_norm(module, tensor, **options, backend=backend)


def make_block(spec: BlockSpec, backend: str | None = None) -> nn.Module:
    block = BLOCKS[spec.kind]().double()
    normalize(block.get_submodule(block.owner), block.tensor, spec, backend)
    return block


class Net(nn.Module):
    """A root of its own class, which can checkpoint its blocks."""

    checkpointing: str | None = None

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Parameter(torch.ones(SHAPE[2], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing:
                y = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                y = block(x)
            x = torch.tanh(y)
        return x * self.last


class NormalizedRoot(Net):
    """A root with a normalized tensor of its own."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.weight = nn.Parameter(torch.randn(SHAPE[2], SHAPE[2], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.weight


class Shared(Net):
    """Runs all blocks twice in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(0.5 * x)


ROOTS = ("sequential", "net", "normalized_root", "shared")


def build(
    root: str, blocks: list[BlockSpec], seed: int = 0, backend: str | None = None
) -> nn.Module:
    """Return a model in float64."""
    torch.default_generator.manual_seed(seed)
    made = [make_block(BlockSpec(*spec), backend) for spec in blocks]
    if root == "sequential":
        return nn.Sequential(*(layer for block in made for layer in (block, nn.Tanh())))
    model = {"net": Net, "normalized_root": NormalizedRoot, "shared": Shared}[root](made)
    if root == "normalized_root":
        spec = BlockSpec(*blocks[0])
        normalize(model, "weight", spec, backend)
    return model


def inputs(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed))
