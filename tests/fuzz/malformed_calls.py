"""Random calls of the native operators, most of them malformed, each in a child process.

    python tests/fuzz/malformed_calls.py --minutes 5 --seed 0

A call may return or raise. It fails the run if it ends the process, does not come back, raises an internal
assertion, or raises and has changed a tensor. What failed is printed as a script of a few lines.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, field

from judging import run

HEADER = """\
import math, torch, spectral_ext
from spectral_ext import _C
inf, nan = math.inf, math.nan
ops, Call = torch.ops.spectral_ext, torch.classes.spectral_ext.Call
torch.manual_seed(0)
"""

DTYPES = ("float32", "float32", "float64", "bfloat16", "float16")
WRONG_DTYPES = (*DTYPES, "int64", "complex64", "bool", "float8_e4m3fn")
INTEGERS = (0, -1, 1, 2, 3, 7, -5, 2**31, 2**32 + 1, -(2**31), 2**62, -(2**63))
FLOATS = (0.0, -0.0, -1.0, 5e-324, 1e-300, 1e300, 1.7e308, "inf", "-inf", "nan", 1.0, 0.5)


@dataclass
class Script:
    """The lines of one call, and the dice for it."""

    dice: random.Random
    wrong: float
    """The probability that an argument is made wrong."""
    lines: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def goes_wrong(self) -> bool:
        return self.dice.random() < self.wrong

    def tensor(self, shape: tuple[int, ...], dtype: str, make: str = "randn") -> str:
        """Define a tensor that may be wrong in one way, and return its name."""
        if self.names and self.goes_wrong() and self.dice.random() < 0.3:
            return self.dice.choice(self.names)  # it overlaps all of another argument
        name = f"t{len(self.names)}"
        after: list[str] = []
        expression = self._expression(name, shape, dtype, make, after)
        self.lines += [f"{name} = {expression}", *after]
        self.names.append(name)
        return name

    def _expression(
        self, name: str, shape: tuple[int, ...], dtype: str, make: str, after: list[str]
    ) -> str:
        way = self.dice.randrange(12) if self.goes_wrong() else None
        if way == 0:
            shape = self._other_shape(shape)
        elif way == 1:
            dtype = self.dice.choice(WRONG_DTYPES)
        elif way == 2:
            return f"torch.empty({shape}, dtype=torch.{dtype}, device='meta')"
        plain = f"torch.{make}({shape}).to(torch.{dtype})"
        if way == 3:
            after.append(f"{name}.untyped_storage().resize_({self.dice.choice((0, 4, 17))})")
        elif way == 4:
            return f"{plain}.to_sparse()"
        elif way == 5:
            return f"torch._neg_view({plain})"
        elif way == 6:
            after.append(f"{name}.requires_grad_()")
        elif way == 7:
            return f"torch.{make}({(1,) * len(shape)}).to(torch.{dtype}).expand({shape})"
        elif way == 8 and self.names:  # it overlaps a part of another argument
            other, start = self.dice.choice(self.names), self.dice.randrange(4)
            size = 1
            for length in shape:
                size *= length
            return f"{other}.reshape(-1)[{start}:{start} + {size}].view({shape})"
        elif way == 9:
            return f"torch.{make}({tuple(2 * n for n in shape)}).to(torch.{dtype})" + (
                f"[{', '.join(['::2'] * len(shape))}]" if shape else ""
            )
        elif way == 10:
            return f"torch.{make}({shape[::-1]}).to(torch.{dtype}).permute({self._reversed(shape)})"
        elif way == 11:
            return f"({plain} * inf)"
        return plain

    def _other_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        changed = list(shape)
        way = self.dice.randrange(4)
        if way == 0 or not changed:
            changed.insert(self.dice.randrange(len(changed) + 1), self.dice.choice((0, 1, 2)))
        elif way == 1:
            changed.pop()
        else:
            place = self.dice.randrange(len(changed))
            changed[place] = max(0, changed[place] + self.dice.choice((-1, 1, -99)))
        return tuple(changed)

    @staticmethod
    def _reversed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(reversed(range(len(shape))))

    def numbers(self, right: list[object], wrong: tuple[object, ...]) -> str:
        """Return a list, in which a number may be wrong, or of the wrong length."""
        values = [self.dice.choice(wrong) if self.goes_wrong() else value for value in right]
        if self.goes_wrong() and self.dice.random() < 0.4:
            values = self.dice.choice((values[:-1], [*values, *values, 1], []))
        return f"[{', '.join(map(str, values))}]"

    def integers(self, right: list[int]) -> str:
        return self.numbers(list(right), INTEGERS)

    def floats(self, right: list[float]) -> str:
        return self.numbers(list(right), FLOATS)

    def booleans(self, count: int) -> str:
        return self.numbers([self.dice.random() < 0.5 for _ in range(count)], (True, False))

    def listed(self, values: list[str]) -> str:
        """Return a list of tensors, which may be of the wrong length."""
        if self.goes_wrong() and self.dice.random() < 0.3:
            values = self.dice.choice((values[:-1], values + values[:1], []))
        return f"[{', '.join(values)}]"


@dataclass
class Layers:
    """The layers of a call as they should be."""

    shapes: list[tuple[int, ...]]
    dims: list[int]
    dtype: str
    compute: str

    @classmethod
    def draw(cls, dice: random.Random) -> Layers:
        shapes: list[tuple[int, ...]] = []
        for _ in range(dice.choice((0, 1, 1, 2, 3))):
            if dice.random() < 0.05:
                shapes.append((dice.randrange(200, 500), dice.randrange(500, 1500)))
            else:
                shapes.append(tuple(dice.randrange(1, 9) for _ in range(dice.randrange(1, 5))))
        dtype = dice.choice(DTYPES)
        compute = "float64" if dtype == "float64" else "float32"
        return cls(shapes, [dice.randrange(len(shape)) for shape in shapes], dtype, compute)

    def matrices(self) -> list[tuple[int, int]]:
        sizes = []
        for shape, dim in zip(self.shapes, self.dims, strict=True):
            columns = 1
            for d, length in enumerate(shape):
                columns *= 1 if d == dim else length
            sizes.append((shape[dim], columns))
        return sizes


def _weights(script: Script, layers: Layers) -> str:
    return script.listed([script.tensor(shape, layers.dtype) for shape in layers.shapes])


def _vectors(script: Script, layers: Layers, side: int) -> str:
    sizes = [matrix[side] for matrix in layers.matrices()]
    return script.listed([script.tensor((size,), layers.compute) for size in sizes])


def _flat(script: Script, layers: Layers) -> list[str]:
    """Return ``saved`` and ``sigmas``."""
    saved = script.tensor((sum(map(sum, layers.matrices())),), layers.compute)
    return [saved, script.tensor((len(layers.shapes),), layers.compute, "ones")]


def _dtype(script: Script) -> str:
    names = ("None", "torch.float16", "torch.bfloat16", "torch.float32", "torch.int8")
    return script.dice.choice(names) if script.goes_wrong() else "None"


def _update(script: Script) -> str:
    return str(script.dice.random() < 0.7)


def _targets(script: Script, count: int) -> list[str]:
    return [script.floats([script.dice.choice((1.0, 2.0, 0.1))] * count), script.booleans(count)]


def _of_forward(script: Script, layers: Layers) -> list[str]:
    count = len(layers.shapes)
    return [
        script.integers(layers.dims),
        script.integers([script.dice.choice((1, 1, 2, 3))] * count),
        script.floats([1e-12] * count),
        script.booleans(count),
        script.floats([script.dice.choice((0.0, 0.0, 0.1))] * count),
        *_targets(script, count),
    ]


def _forward(script: Script, layers: Layers) -> str:
    count = len(layers.shapes)
    weights = _weights(script, layers)
    vectors = [_vectors(script, layers, side) for side in (0, 1)]
    outputs = weights if script.dice.random() < 0.1 else _weights(script, layers)
    flat = _flat(script, layers)
    size = script.dice.choice((0, 2 * count))
    convergence = script.tensor((size,), layers.compute)
    arguments = [weights, *vectors, outputs, *flat, convergence]
    arguments += [*_of_forward(script, layers), _update(script)]
    return f"ops.forward_({', '.join(arguments)})"


def _backward(script: Script, layers: Layers) -> str:
    count, dice = len(layers.shapes), script.dice
    given = [
        "None" if dice.random() < 0.2 else script.tensor(shape, layers.dtype)
        for shape in layers.shapes
    ]
    of_sigmas = "None" if dice.random() < 0.5 else script.tensor((count,), layers.compute)
    outputs, flat = _weights(script, layers), _flat(script, layers)
    widen = "[]" if dice.random() < 0.5 else script.booleans(count)
    arguments = [script.listed(given), of_sigmas, outputs, *flat, script.integers(layers.dims)]
    arguments += [*_targets(script, count), script.booleans(count), script.booleans(count), widen]
    return f"ops.backward({', '.join(arguments)})"


def _allocate(script: Script, layers: Layers) -> str:
    dims = script.integers(layers.dims)
    return f"ops.allocate({_weights(script, layers)}, {dims}, {_dtype(script)})"


def _differentiate(script: Script) -> None:
    script.lines += [
        "loss = sum([y.float().sum() for y in outputs] + [sigmas.sum()])",
        f"if loss.requires_grad: loss.backward(create_graph={script.dice.random() < 0.3})",
    ]


def _attach(script: Script, layers: Layers) -> str:
    weights = _weights(script, layers)
    script.lines += [f"for t in {weights}: t.is_floating_point() and t.requires_grad_()"]
    arguments = [weights, _weights(script, layers), *_flat(script, layers)]
    arguments += [script.integers(layers.dims), *_targets(script, len(layers.shapes))]
    arguments += [script.booleans(len(layers.shapes))]
    script.lines.append(f"outputs, sigmas = ops.attach({', '.join(arguments)})")
    _differentiate(script)
    return ""


def _call(script: Script, layers: Layers) -> str:
    weights = _weights(script, layers)
    if script.dice.random() < 0.5:
        script.lines += [f"for t in {weights}: t.is_floating_point() and t.requires_grad_()"]
    arguments = [weights, *(_vectors(script, layers, side) for side in (0, 1))]
    arguments += [*_of_forward(script, layers), script.booleans(len(layers.shapes))]
    script.lines.append(f"call = Call({', '.join(arguments)})")
    if script.goes_wrong() and script.names:  # between the call's making and its use
        name = script.dice.choice(script.names)
        change = script.dice.choice(
            ("untyped_storage().resize_(0)", "resize_(3)", "t_()", "squeeze_()")
        )
        script.lines.append(f"{name}.{change}")
    for _ in range(2):
        use = f"call.normalize({_update(script)}, {_update(script)}, {_dtype(script)})"
        script.lines.append(f"outputs, saved, sigmas, convergence = {use}")
    _differentiate(script)
    return ""


def _plan(script: Script, layers: Layers) -> str:
    dice = script.dice
    triples = [
        [
            dice.choice(INTEGERS) if script.goes_wrong() else dice.randrange(1, 3000)
            for _ in range(3)
        ]
        for _ in layers.shapes
    ]
    shapes = ", ".join(f"({', '.join(map(str, triple))})" for triple in triples)
    dtype = dice.choice(WRONG_DTYPES) if script.goes_wrong() else layers.dtype
    tickets = dice.choice(INTEGERS) if script.goes_wrong() else dice.randrange(1, 300)
    if dice.random() < 0.4:
        return f"_C.plan_backward([{shapes}], '{dtype}', {tickets})"
    n = dice.choice(INTEGERS) if script.goes_wrong() else dice.randrange(1, 4)
    columns = dice.choice(INTEGERS) if script.goes_wrong() else 1 << 30
    return (
        f"_C.plan_forward([{shapes}], '{dtype}', {dice.random() < 0.5}, {n}, {_update(script)}, "
        f"{tickets}, {columns})"
    )


KINDS = (_forward, _forward, _backward, _backward, _allocate, _attach, _call, _call, _plan)


def script_of(seed: int) -> str:
    """Return the call of a seed as Python."""
    dice = random.Random(seed)
    script = Script(dice, wrong=dice.choice((0.0, 0.03, 0.1, 0.3)))
    call = dice.choice(KINDS)(script, Layers.draw(dice))
    return HEADER + "\n".join([*script.lines, call]) + "\n"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--calls", type=int, default=None, help="the number of calls, whatever the time"
    )
    arguments = parser.parse_args()
    end, failed = time.monotonic() + 60 * arguments.minutes, 0
    seed = arguments.seed
    while (arguments.calls is None and time.monotonic() < end) or (
        arguments.calls is not None and seed - arguments.seed < arguments.calls
    ):
        for script, wrong in run(script_of(s) for s in range(seed, seed + 100)):
            failed += 1
            print(f"{wrong}\n\n{script}", flush=True)
        seed += 100
    print(f"{seed - arguments.seed} calls from seed {arguments.seed}: {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
