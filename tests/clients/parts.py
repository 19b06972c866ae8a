"""Import one module of a package without the ``__init__`` of the packages around it.

Those import everything that the package has, and so need dependencies that the one module does not.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["part"]


def part(name: str, absent: Mapping[str, tuple[str, ...]] | None = None) -> ModuleType:
    """Import a module; of the packages that it belongs to, only their folders are used.

    Args:
        name: the qualified name of the module.
        absent: modules that ``name`` imports and does not call, and the names that it imports from
            each. These are None.
    """
    with _bare_packages(name.partition(".")[0], absent or {}):
        return importlib.import_module(name)


class _EmptyModule(Loader):
    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(dict.fromkeys(self.names))


class _Finder(MetaPathFinder):
    def __init__(self, root: str, absent: Mapping[str, tuple[str, ...]]) -> None:
        self.root, self.absent = root, absent

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != self.root:
            return None
        if name in self.absent:
            return ModuleSpec(name, _EmptyModule(self.absent[name]))
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec.loader = _EmptyModule()
        return spec


@contextmanager
def _bare_packages(root: str, absent: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    finder = _Finder(root, absent)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
