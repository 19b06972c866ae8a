"""Spectral normalization of Keras 3 layers, on Keras's torch backend: the extra ``keras``.

Keras's own wrapper writes the normalized kernel over the trained one in every training call, so the
optimizer moves a weight that is normalized again and again, and no gradient passes through σ. Here the
kernel stays what the optimizer made of it, and the layer runs with ``W/σ``.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .functional import spectral_normalize
from .layout import compute_dtype

_HINT = "set KERAS_BACKEND=torch before importing keras"
try:
    import keras
    from keras.src.backend import AutocastScope  # not public, and there is no other way to its end
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise
    raise ImportError(f"Keras cannot import its backend: {error}; {_HINT}") from error
if keras.config.backend() != "torch":
    raise ImportError(
        "spectral_ext.keras is for Keras on torch, and "
        f"its backend is {keras.config.backend()!r}; {_HINT}"
    )

__all__ = ["SpectralNormalization"]

_WARM_START = 15  # iterations, as many as stock PyTorch makes at construction


@keras.saving.register_keras_serializable(package="spectral_ext")
class SpectralNormalization(keras.layers.Wrapper):
    """Run a layer with its kernel divided by the largest singular value of the kernel.

    The matrix is that of ``keras.layers.SpectralNormalization``, ``kernel.reshape(-1, kernel.shape[-1])``,
    and so is the order of the power iteration. In training every call advances ``vector_u`` (of shape
    ``(kernel.shape[-1],)``) and ``vector_v`` (of as many elements as the matrix has rows); otherwise
    they stay, and the kernel is divided by σ all the same. Both are weights that are not trained. They
    start near the singular vectors, so that a model can be evaluated before it is trained. A kernel
    that is zero is passed through.

    In mixed precision the kernel is normalized in its own dtype, and then rounded for the layer.

    Args:
        layer: a Keras layer with a ``kernel`` or with ``embeddings``.
        power_iterations: steps of the power method for each training call.
        **kwargs: of ``keras.layers.Wrapper``.

    Raises:
        ValueError: ``power_iterations`` is not positive; when it is built, the layer has neither a
            ``kernel`` nor ``embeddings``.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.
    """

    def __init__(self, layer: Any, power_iterations: int = 1, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)
        if power_iterations <= 0:
            raise ValueError(
                "`power_iterations` should be greater than zero. Received: "
                f"`power_iterations={power_iterations}`"
            )
        self.power_iterations = power_iterations

    def build(self, input_shape: Any) -> None:
        """Build the layer, and make the vectors for its kernel."""
        super().build(input_shape)
        *others, columns = self.kernel.shape
        dtype = keras.backend.standardize_dtype(compute_dtype(_value(self.kernel).dtype))
        # Keras may call the initializers later, when the kernel has its values.
        for name, size, initializer in (
            ("vector_u", columns, self._first_u),
            ("vector_v", math.prod(others), self._first_v),
        ):
            vector = self.add_weight(
                name=name,
                shape=(size,),
                initializer=initializer,
                dtype=dtype,
                trainable=False,
                autocast=False,
            )
            setattr(self, name, vector)

    @property
    def kernel(self) -> Any:
        """The variable that is normalized: the layer's ``kernel``, or else its ``embeddings``."""
        for name in ("kernel", "embeddings"):
            if hasattr(self.layer, name):
                return getattr(self.layer, name)
        raise ValueError(
            f"{type(self.layer).__name__} object has no attribute 'kernel' nor 'embeddings'"
        )

    def _first_u(self, shape: Any, dtype: Any = None) -> Tensor:
        kernel = _value(self.kernel).detach()
        u = torch.randn(shape, device=kernel.device, dtype=compute_dtype(kernel.dtype))
        if not kernel.is_meta:
            v = u.new_zeros(kernel[..., 0].numel())
            self._normalize(kernel, u, v, _WARM_START, True)
        return u

    def _first_v(self, shape: Any, dtype: Any = None) -> Tensor:
        u = _value(self.vector_u)
        matrix = _value(self.kernel).detach().reshape(shape[0], len(u))
        return normalize(matrix.to(u.dtype) @ u, dim=0)

    def _normalize(self, kernel: Tensor, u: Tensor, v: Tensor, steps: int, update: bool) -> Tensor:
        """Return ``kernel / σ``; write ``u`` and ``v`` if they are to be updated."""
        # The rows of our matrix are the columns of Keras's, and u comes second in a step.
        (normalized,), _ = spectral_normalize(
            [kernel],
            [u],
            [v],
            n_power_iterations=steps,
            dims=kernel.ndim - 1,
            order="v_first",
            update=update,
        )
        return normalized

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Run the layer with the normalized kernel."""
        values = [(variable, _value(variable)) for variable in self.layer.variables]
        kernel = _value(self.kernel)
        if not kernel.is_meta:  # Keras only asks for the shape of the output
            u, v = (_value(vector).clone() for vector in (self.vector_u, self.vector_v))
            normalized = self._normalize(kernel, u, v, self.power_iterations, bool(training))
            if training:
                self.vector_u.assign(u)
                self.vector_v.assign(v)
            values.append((self.kernel, normalized))
        with keras.StatelessScope(values, collect_losses=True) as scope:
            before = [scope.get_current_value(variable) for variable, _ in values]
            outputs = self.layer(inputs)
        for (variable, _), value in zip(values, before, strict=True):
            after = scope.get_current_value(variable)
            if after is not value and variable is not self.kernel:
                variable.assign(after)
        for loss in scope.losses:
            self.add_loss(loss)
        return outputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return what the layer says."""
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {**super().get_config(), "power_iterations": self.power_iterations}


def _value(variable: Any) -> Tensor:
    """Return the tensor of a variable, which mixed precision would round."""
    with AutocastScope(None):
        return variable.value
