from collections.abc import Sequence
from typing import Any, TypedDict

class BuildInfo(TypedDict):
    torch: str  # the version that the library was compiled against
    compiler: str
    flags: str
    cpu_levels: list[str]  # compiled in
    cpu_level: str  # the one that this processor gets
    cuda: str | None  # the toolkit's version; None without CUDA kernels
    cuda_architectures: list[str]

def build_info() -> BuildInfo: ...
def empty_cache() -> int: ...
def hold(
    dictionaries: tuple[dict[str, Any], ...], keys: tuple[str, ...], objects: tuple[Any, ...]
) -> bool: ...

class Piece(TypedDict):
    layer: int
    kind: str  # rows, columns, vectors, scale; order, dot, update
    begin: int
    end: int
    index: int  # among the layer's pieces of this kind in a phase
    required: int  # the pieces of this layer that must be finished first
    dots: bool
    sums: bool
    initial: bool

class LayerPlan(TypedDict):
    blocks: int
    chunks: int
    row_group: int

class Plan(TypedDict):
    layers: list[LayerPlan]
    pieces: list[Piece]
    tickets: list[int]  # the first piece of each, and one more at the end
    phases: list[int]  # the first ticket of each, and one more at the end
    workspace_bytes: int

def plan_forward(
    shapes: Sequence[tuple[int, int, int]],
    dtype: str = "float32",
    v_first: bool = False,
    n_power_iterations: int = 1,
    update: bool = True,
    tickets: int = 264,
    max_columns: int = ...,
) -> Plan: ...
def plan_backward(
    shapes: Sequence[tuple[int, int, int]], dtype: str = "float32", tickets: int = 264
) -> Plan: ...
