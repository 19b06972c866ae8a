"""All names of a printed script: ``from script import *`` in this folder."""

from ops_forward import *
from ops_hazards import *
from ops_structure import *
from ops_training import *

__all__ = [name for name in globals() if not name.startswith("_")]
