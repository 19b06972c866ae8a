"""The question of every forward, whether all objects are still the same: native, and in Python."""

from typing import Any

import pytest

from spectral_ext.nn import plan

_C = pytest.importorskip("spectral_ext._C", reason="the native library was not built")


def in_python(dictionaries: Any, keys: Any, objects: Any) -> bool:
    return all(d.get(k) is x for d, k, x in zip(dictionaries, keys, objects, strict=True))


CASES = {
    "the same object": ({"a": plan}, "a", plan, True),
    "an equal object": ({"a": (1, [])}, "a", (1, []), False),
    "nothing, as expected": ({}, "a", None, True),
    "None, as expected": ({"a": None}, "a", None, True),
    "an object instead of nothing": ({"a": 0}, "a", None, False),
    "nothing instead of an object": ({}, "a", plan, False),
}


@pytest.mark.parametrize("hold", [_C.hold, in_python])
@pytest.mark.parametrize("case", CASES)
def test_objects_are_compared_by_identity(hold: Any, case: str) -> None:
    dictionary, key, expected, holds = CASES[case]
    assert hold((dictionary,), (key,), (expected,)) is holds
    good = {"b": plan}
    assert hold((good, dictionary), ("b", key), (plan, expected)) is holds


def test_the_plan_asks_the_native_one() -> None:
    assert plan.hold is _C.hold


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((({},), ("a", "b"), (None,)), ValueError),
        ((({},), ("a",), ()), ValueError),
        ((([],), ("a",), (None,)), TypeError),
        ((({},), ([],), (None,)), TypeError),
        (([{}], ["a"], [None]), TypeError),
        ((None, None, None), TypeError),
    ],
)
def test_malformed_arguments_are_refused(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        _C.hold(*arguments)


def test_an_error_of_a_key_passes() -> None:
    class Key(str):
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="unhashable"):
        _C.hold(({},), (Key("a"),), (None,))
