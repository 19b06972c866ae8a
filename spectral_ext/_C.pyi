from typing import TypedDict

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
