"""Triton's interpreter for the tests: asked for where there is no GPU, quick enough, and exact.

Triton reads `TRITON_INTERPRET` when it is imported.
"""

import os


def ask_for() -> None:
    """Let Triton kernels compute on CPU tensors in this process."""
    os.environ.setdefault("TRITON_INTERPRET", "1")


def improve() -> None:
    """Mend what keeps the interpreter from being a test of these kernels."""
    import functools
    import warnings

    import numpy
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    # It puts its own functions in the place of Triton's whenever a kernel calls a device function, which
    # takes many times what the function takes. Once in a launch is enough.
    replace = interpreter._patch_lang
    replaced = set()

    def call(self, *args, **kwargs):
        module = self.fn.__globals__["__name__"]
        if module not in replaced:
            replaced.add(module)
            replace(self.fn)
        return self.rewrite()(*args, **kwargs)

    launch = interpreter.GridExecutor.__call__

    def launch_anew(self, *args, **kwargs):
        replaced.clear()
        # A device does not warn either.
        with numpy.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return launch(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = launch_anew

    # It makes a table of all dtypes to look one up, tens of thousands of times in a launch.
    look_up = functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(dtype):
        scalar = dtype.scalar  # of a block its elements
        return numpy.dtype(numpy.uint64) if scalar.is_ptr() else look_up(scalar)

    interpreter._get_np_dtype = numpy_dtype

    # Its bfloat16 has no subnormal numbers and is not rounded to the nearest.
    convert = interpreter._convert_float

    def convert_exactly(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(numpy.array(data, numpy.float32)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(numpy.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (numpy.array(data, numpy.uint32) << 16).view(numpy.float32)
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_exactly
