"""The state machine of hypothesis over the table of operations.

The names and arguments of its rules are those of a script; when one fails, the script that repeats it is
printed::

    from script import *
    pair = Pair('net', [('linear', 'hook', 'default')], 'step', 0)
    pair.do(train, mode=False)
    pair.do(forward, context='grad', seed=0)
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import family
import ops_forward
import ops_hazards
import ops_structure
import ops_training
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from pair import Pair
from registry import OPERATIONS, SEED, UPDATES, Operation, Skip, specs

__all__ = ["COUNTS", "END", "FAILED", "LEAVE_OUT", "machine"]

MODULES = [ops_forward, ops_training, ops_structure, ops_hazards]
COUNTS: Counter[str] = Counter()
"""How often each operation ran."""
LEAVE_OUT = [name for name in os.environ.get("FUZZ_LEAVE_OUT", "").split(",") if name]
"""Operations, kinds of norms and of blocks that are not drawn."""
FAILED: list[list[str]] = []
"""The scripts that failed, each with the step that did as its last line."""


END: list[float] = []
"""The time after which the rules do nothing, unless one has failed, which hypothesis repeats."""


def is_over() -> bool:
    return bool(END) and not FAILED and time.monotonic() > END[-1]


class Machine(RuleBasedStateMachine):
    pair: Pair | None = None

    def run(self, operation: Operation, arguments: dict[str, Any]) -> None:
        if self.pair is None or is_over():
            return
        for key, strategy in operation.arguments.items():
            if strategy == "layer":
                names = [norm.name for norm in self.pair.twin.norms()]
                if not names:
                    return
                arguments[key] = names[arguments[key] % len(names)]
            elif strategy == "block":
                blocks = [name for name, _ in self.pair.twin.blocks()]
                if not blocks:
                    return
                arguments[key] = blocks[arguments[key] % len(blocks)]
        try:
            self.pair.do(operation.function, **arguments)
        except Skip:
            return
        except Exception:
            FAILED.append(list(self.pair.script))
            note("\n".join(["\nThe same as a script:\nfrom script import *", *self.pair.script]))
            raise
        COUNTS[operation.function.__name__] += 1


def as_rule(operation: Operation, fits: Callable[[Any], bool]) -> Any:
    def run(self: Machine, **arguments: Any) -> None:
        self.run(operation, arguments)

    run.__name__ = operation.function.__name__
    run.__doc__ = operation.function.__doc__
    strategies = {
        key: st.integers(0, 5) if isinstance(strategy, str) else strategy.filter(fits)
        for key, strategy in operation.arguments.items()
    }
    return rule(**strategies)(run)


def machine(leave_out: Collection[str] = LEAVE_OUT) -> type[Machine]:
    """Return the machine without some operations, norms (``hook``), blocks, roots or values of ``update``."""

    def fits(drawn: Any) -> bool:
        values = drawn if isinstance(drawn, tuple) else (drawn,)
        return not any(value in leave_out for value in values if isinstance(value, str))

    roots = [root for root in family.ROOTS if root not in leave_out]

    @initialize(
        root=st.sampled_from(roots),
        blocks=st.lists(specs().filter(fits), min_size=1, max_size=4),
        update=UPDATES.filter(fits),
        seed=SEED,
    )
    def build(self: Machine, root: str, blocks: list[Any], update: str, seed: int) -> None:
        if is_over():
            return
        try:
            self.pair = Pair(root, blocks, update, seed)
        except Exception:
            FAILED.append([f"pair = Pair({root!r}, {blocks}, {update!r}, {seed})"])
            note(f"from script import *\n{FAILED[-1][0]}")
            raise
        COUNTS["build"] += 1

    body: dict[str, Any] = {"build": build}
    for name, found in OPERATIONS.items():
        if name not in leave_out:
            body[name] = as_rule(found, fits)
    return type("Fuzz", (Machine,), body)
