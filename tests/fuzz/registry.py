"""What the machine can do: a table of operations and of their arguments.

An operation is a function of a :class:`pair.Side`, called for the fused model and then for the twin; what
it returns is compared. One that is ``of_the_pair`` is a function of the :class:`pair.Pair`. Arguments are
described by strategies of hypothesis, or by the words ``"layer"`` (the name of a normalized tensor) and
``"block"`` (the name of a block's place).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from family import BLOCKS, OPTIONS
from hypothesis import strategies as st


class Skip(Exception):
    """The operation does not apply to the pair as it is; nothing was changed."""


class Operation(NamedTuple):
    function: Callable[..., Any]
    arguments: dict[str, Any]


OPERATIONS: dict[str, Operation] = {}


def operation(of_the_pair: bool = False, **arguments: Any) -> Callable[..., Any]:
    """Add a function to the table."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        function.of_the_pair = of_the_pair  # type: ignore[attr-defined]
        OPERATIONS[function.__name__] = Operation(function, arguments)
        return function

    return add


def skip_unless(condition: object) -> None:
    if not condition:
        raise Skip


SEED = st.integers(0, 3)
BOOL = st.booleans()
UPDATES = st.sampled_from(["forward", "forward", "step", "manual"])
KINDS = st.sampled_from(list(BLOCKS))
NORMS = st.sampled_from(["parametrization", "hook", "ours"])


@st.composite
def specs(draw: Any, with_plain: bool = True) -> tuple[str, str, str]:
    """Draw a block: kind, norm, options. Stock's norms have one option."""
    norm = draw(NORMS)
    options = list(OPTIONS) if norm == "ours" else ["default", "two_iterations"]
    return draw(KINDS), norm, draw(st.sampled_from(options))
