"""All names of a printed script: ``from script import *`` in this folder."""

from math import nan

from machine import MODULES
from pair import Pair
from registry import OPERATIONS

assert MODULES  # they fill the table
globals().update({name: operation.function for name, operation in OPERATIONS.items()})

__all__ = ["Pair", "nan", *OPERATIONS]
