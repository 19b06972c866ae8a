"""A fused model and its twin: operations are done to both, and all that can be seen is compared."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from family import BlockSpec, build, inputs
from registry import Skip
from torch import Tensor, nn
from twin import Norm, TwinGroup, norms

import spectral_ext

TOLERANCE = 1e-9


class Side:
    """One of the two models, with what belongs to it: its optimizer and things that were kept."""

    is_twin = False

    def __init__(self, pair: "Pair", model: nn.Module) -> None:
        self.pair = pair
        self.model = model
        self.optimizer: torch.optim.Optimizer | None = None
        self.kept: dict[str, Any] = {}

    def norms(self) -> list[Norm]:
        return norms(self.model)

    def norm(self, name: str) -> Norm:
        return next(norm for norm in self.norms() if norm.name == name)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Return the blocks with the names of their places."""
        if isinstance(self.model, nn.Sequential):
            pairs = self.model.named_children()
            return [(name, x) for name, x in pairs if not isinstance(x, nn.Tanh)]
        return [(f"blocks.{name}", block) for name, block in self.model.blocks.named_children()]

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters in their order, by names that both layouts have."""
        return {canonical(name): p for name, p in self.model.named_parameters()}

    def fuse(self, root: nn.Module, update: str) -> None:
        spectral_ext.fuse(root, update=update)

    def unfuse(self) -> None:
        spectral_ext.unfuse(self.model)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to eval mode, and back to the mode of each module."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def has_changed(self) -> None:
        """Say that weights were changed in a way that versions do not show."""

    def setting_was_assigned(self, norm: Norm) -> None:
        """Say that the group of a layer has new settings."""

    def forget(self) -> None:
        """Drop what refers to parameters that were exchanged."""
        self.optimizer = None
        self.kept.pop("loss", None)


class TwinSide(Side):
    is_twin = True

    def __init__(self, pair: "Pair", model: nn.Module) -> None:
        super().__init__(pair, model)
        self.groups: list[TwinGroup] = []

    def fuse(self, root: nn.Module, update: str) -> None:
        members = norms(root)
        taken = {id(norm.norm) for norm in members}
        for group in self.groups:
            if group.root is root:
                group.root.__dict__.pop("forward", None)
        self.groups = [group for group in self.groups if group.root is not root]
        for group in self.groups:
            group.ids -= taken
            if not group.members():
                group.root.__dict__.pop("forward", None)
        self.groups = [group for group in self.groups if group.members()]
        self.groups.append(TwinGroup(root, members, update))

    def unfuse(self) -> None:
        for group in self.groups:
            group.root.__dict__.pop("forward", None)
        self.groups = []

    def has_changed(self) -> None:
        for group in self.groups:
            group.kept = None

    def setting_was_assigned(self, norm: Norm) -> None:
        for group in self.groups:
            if id(norm.norm) in group.ids:
                group.kept = None


class Pair:
    """Build both models, then ``do`` operations; every failure is an ``AssertionError``.

    Args:
        root: see ``family.ROOTS``.
        blocks: kind, norm and options of every block.
        update: of :func:`spectral_ext.fuse`.
        seed: of the weights.
    """

    def __init__(
        self, root: str, blocks: list[tuple[str, ...]], update: str = "forward", seed: int = 0
    ) -> None:
        self.script = [f"pair = Pair({root!r}, {[tuple(b) for b in blocks]}, {update!r}, {seed})"]
        self.root, self.update = root, update
        specs = [BlockSpec(*spec) for spec in blocks]
        self.fused = Side(self, build(root, specs, seed))
        self.twin = TwinSide(self, build(root, specs, seed, backend="reference"))
        self.is_fused = False
        self.compare()
        self.fuse(update)
        self.compare()

    def fuse(self, update: str) -> None:
        self.update, self.is_fused = update, True
        for side in (self.fused, self.twin):
            side.fuse(side.model, update)

    @property
    def sides(self) -> tuple[Side, TwinSide]:
        return self.fused, self.twin

    def do(self, operation: Callable[..., Any], **arguments: Any) -> None:
        """Do one operation to both, and compare outputs and states."""
        shown = "".join(f", {key}={value!r}" for key, value in arguments.items())
        self.script.append(f"pair.do({operation.__name__}{shown})")
        results: list[Any] = []
        try:
            self._run(operation, arguments, results)
        except Skip:
            self.script.pop()
            raise
        for group in self.twin.groups:
            for norm in group.members():
                group.refresh(norm)
        if results:
            close(*results, f"result of {operation.__name__}", self.tolerance)
        self.compare()

    def _run(self, operation: Callable[..., Any], arguments: Any, results: list[Any]) -> None:
        if getattr(operation, "of_the_pair", False):
            operation(self, **arguments)
        else:
            for side in self.sides:
                torch.default_generator.manual_seed(len(self.script))
                results.append(operation(side, **arguments))

    tolerance = TOLERANCE

    def group(self) -> spectral_ext.SpectralGroup:
        return spectral_ext.group_of(self.fused.model)

    @property
    def root_is_fused(self) -> bool:
        """Whether the root has a group; it has none if parts of it took all layers."""
        return any(group.root is self.twin.model and group.members() for group in self.twin.groups)

    def invalidate(self) -> None:
        """Invalidate all groups of the fused model, also those of parts of it."""
        for module in self.fused.model.modules():
            if "_spectral_group" in module.__dict__:
                spectral_ext.group_of(module).invalidate()

    def compare(self) -> None:
        """Compare weights, gradients, vectors, names and their order; vectors must be unit vectors."""
        found, expected = (side.parameters() for side in self.sides)
        assert list(found) == list(expected), (
            f"parameters {list(found)}, stock has {list(expected)}"
        )
        for name, parameter in expected.items():
            mine = found[name]
            close(mine.detach(), parameter.detach(), name, self.tolerance)
            assert mine.requires_grad == parameter.requires_grad, f"requires_grad of {name}"
            close(mine.grad, parameter.grad, f"gradient of {name}", self.tolerance)
        for mine, norm in zip(self.fused.norms(), self.twin.norms(), strict=True):
            assert mine.name == norm.name, f"norm of {mine.name}, stock has {norm.name}"
            assert mine.training == norm.training, f"mode of {norm.name}"
            for letter, (a, b) in zip(
                "uv", zip(mine.vectors, norm.vectors, strict=True), strict=False
            ):
                close(a, b, f"{letter} of {norm.name}", self.tolerance)
                length = a.double().norm().item()
                assert abs(length - 1) < 1e-2, f"{letter} of {norm.name} has the length {length}"

    def start_anew(self, side: Side) -> None:
        """Let all groups of a side compute in their next forward.

        For changes of which some groups must notice something and others need not.
        """
        if side.is_twin:
            side.has_changed()
        else:
            self.invalidate()

    def all_are_in_groups(self) -> bool:
        taken = {i for group in self.twin.groups for i in group.ids}
        return all(id(norm.norm) in taken for norm in self.twin.norms())

    def adopt_vectors(self) -> None:
        """Give the twin the vectors of the fused model, where stock cannot follow it."""
        for mine, norm in zip(self.fused.norms(), self.twin.norms(), strict=True):
            for a, b in zip(mine.vectors, norm.vectors, strict=True):
                length = a.double().norm().item()
                assert abs(length - 1) < 1e-2, f"{norm.name}: a vector has the length {length}"
                with torch.no_grad():
                    a.div_(length)  # those of stock were in half precision, perhaps
                    b.copy_(a)
        self.twin.has_changed()
        self.invalidate()

    def renew(self) -> None:
        """Run a forward, after which the hooks of both have kept weights of the same vectors."""
        with torch.no_grad():
            outputs = [side.model(inputs(0)) for side in self.sides]
        close(*outputs, "output of the next forward", self.tolerance)

    def follow_a_forward(self, x: Tensor) -> None:
        """Run a forward of which it is left open whether it advances the vectors.

        Its output must be that of the weights and of the vectors that the model has after it.
        """
        with torch.no_grad():
            found = self.fused.model(x)
        self.adopt_vectors()
        with self.twin.evaluating(), torch.no_grad():
            close(found, self.twin.model(x), "output", self.tolerance)
        self.twin.has_changed()


def canonical(name: str) -> str:
    """Return the name of a parameter without what a layout adds to it."""
    name = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
    name = re.sub(r"parametrizations\.(\w+)\.0\.", r"\1 ", name)
    return re.sub(r"_orig$", "", name)


def close(found: Any, expected: Any, what: str, tolerance: float) -> None:
    """Assert that two results are the same: tensors within a tolerance, the rest equal."""
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), what
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            close(a, b, f"{what}[{i}]", tolerance)
    elif isinstance(expected, dict):
        assert list(found) == list(expected), f"{what}: {list(found)}, stock has {list(expected)}"
        for key in expected:
            close(found[key], expected[key], f"{what}[{key!r}]", tolerance)
    elif isinstance(expected, Tensor):
        assert isinstance(found, Tensor), f"{what} is {found}, stock's is a tensor"
        assert type(found.detach()) is Tensor, f"{what} is a {type(found).__name__}"
        assert found.shape == expected.shape, f"{what} has the shape {tuple(found.shape)}"
        a, b = found.detach().double(), expected.detach().double()
        size = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        difference = (a - b).abs().max().item() if b.numel() else 0.0
        # Written so that NaN fails.
        assert difference <= tolerance * size, f"{what} is off by {difference:.2e}"
    else:
        assert found == expected, f"{what} is {found!r}, stock's is {expected!r}"
