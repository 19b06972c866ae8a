"""What a package needs before it can be imported with the current versions of its dependencies."""

import sys
from types import ModuleType

__all__ = ["parallel_wavegan"]


def parallel_wavegan() -> None:
    """Give scipy the name that it had until 2024, and librosa an empty module if it is absent.

    Only the loss over mel spectrograms calls librosa; the models import the module that defines it.
    """
    import scipy.signal

    scipy.signal.kaiser = scipy.signal.windows.kaiser
    try:
        import librosa  # noqa: F401
    except ImportError:
        sys.modules["librosa"] = ModuleType("librosa")
