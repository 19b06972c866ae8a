"""The Keras layer, on Keras's torch backend: against singular values, autograd and Keras's own layer."""

import os
import subprocess
import sys

import pytest
import torch

os.environ["KERAS_BACKEND"] = "torch"  # before anyone imports Keras
keras = pytest.importorskip("keras", reason="the extra `keras` is not installed")

from spectral_ext.keras import SpectralNormalization  # noqa: E402

# Keras's accessor of arrays is older than NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TYPE = "float64"
SINGLE = 2e-6  # Keras multiplies matrices of float64 in float32
LAYERS = {
    "dense": (lambda **k: keras.layers.Dense(5, **k), (3, 4)),
    "einsum": (lambda **k: keras.layers.EinsumDense("ab,bc->ac", 5, **k), (3, 4)),
    "conv1d": (lambda **k: keras.layers.Conv1D(5, 3, **k), (2, 7, 3)),
    "conv2d": (lambda **k: keras.layers.Conv2D(5, 3, strides=2, **k), (2, 7, 7, 3)),
    "conv3d": (lambda **k: keras.layers.Conv3D(5, 2, **k), (2, 4, 4, 4, 3)),
    "conv1d_transpose": (lambda **k: keras.layers.Conv1DTranspose(5, 3, **k), (2, 7, 3)),
    "conv2d_transpose": (lambda **k: keras.layers.Conv2DTranspose(5, 3, **k), (2, 7, 7, 3)),
    "conv3d_transpose": (lambda **k: keras.layers.Conv3DTranspose(5, 2, **k), (2, 4, 4, 4, 3)),
    "depthwise": (lambda **k: keras.layers.DepthwiseConv2D(3, **k), (2, 7, 7, 3)),
    "embedding": (lambda **k: keras.layers.Embedding(7, 5, **k), None),
}


@pytest.fixture(autouse=True)
def seeded_by_keras():
    """Start from the same initial weights, whose seeds Keras draws by itself."""
    keras.utils.set_random_seed(0)


def inputs(kind: str) -> torch.Tensor:
    shape = LAYERS[kind][1]
    return torch.randint(7, (2, 3)) if shape is None else torch.randn(shape, dtype=torch.float64)


def wrapped(kind: str, x: torch.Tensor, **settings) -> SpectralNormalization:
    """Return a built layer whose σ is far from 1."""
    layer = SpectralNormalization(LAYERS[kind][0](dtype=TYPE), dtype=TYPE, **settings)
    layer.build(x.shape)
    layer.kernel.assign(3 * torch.randn(tuple(layer.kernel.shape), dtype=torch.float64))
    return layer


def tensor(variable) -> torch.Tensor:
    return variable.value.detach().clone()


def matrix(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.reshape(-1, kernel.shape[-1])


def plain(kind: str, x: torch.Tensor, kernel: torch.Tensor, layer) -> torch.Tensor:
    """Return the output of a layer without a norm that has a given kernel."""
    other = LAYERS[kind][0](dtype=TYPE)
    other.build(x.shape)
    other.set_weights(layer.layer.get_weights())
    SpectralNormalization(other).kernel.assign(kernel)
    return other(x)


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_runs_with_a_kernel_of_norm_one_and_leaves_its_own(kind):
    x = inputs(kind)
    layer = wrapped(kind, x, power_iterations=30)
    kernel = tensor(layer.kernel)
    for _ in range(10):
        found = layer(x, training=True)
    sigma = torch.linalg.matrix_norm(matrix(kernel), 2)
    close(found, plain(kind, x, kernel / sigma, layer), SINGLE)
    close(layer(x), found, SINGLE)  # in evaluation too
    assert torch.equal(tensor(layer.kernel), kernel)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "embedding"])
def test_a_training_call_has_the_numbers_of_keras_from_the_same_kernel_and_vector(kind, steps):
    """Keras's own overwrites its kernel: what it starts from is given to ours before each call.

    Not for an embedding, whose output Keras's own layer rounds to integers, the dtype of the input.
    """
    x = inputs(kind)
    ours = wrapped(kind, x, power_iterations=steps)
    other = LAYERS[kind][0](dtype=TYPE)
    theirs = keras.layers.SpectralNormalization(other, power_iterations=steps, dtype=TYPE)
    theirs.build(x.shape)
    theirs.kernel.assign(ours.kernel)
    for _ in range(3):
        ours.kernel.assign(theirs.kernel)
        ours.vector_u.assign(tensor(theirs.vector_u)[0])
        close(ours(x, training=True), theirs(x, training=True), SINGLE)
        close(tensor(ours.vector_u), tensor(theirs.vector_u)[0], SINGLE)
        assert not torch.equal(tensor(ours.kernel), tensor(theirs.kernel))


def test_an_embedding_gives_what_it_holds():
    x = inputs("embedding")
    layer = wrapped("embedding", x)
    assert layer(x, training=True).dtype == torch.float64
    theirs = keras.layers.SpectralNormalization(keras.layers.Embedding(7, 5))
    assert theirs(x, training=True).dtype == torch.int64  # why ours is not compared with it


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_goes_through_sigma(training):
    x = inputs("conv2d")
    layer = wrapped("conv2d", x)
    loss = layer(x, training=training).sin().sum()
    found, of_bias = torch.autograd.grad(loss, [v.value for v in layer.trainable_weights])

    kernel, bias = (tensor(v).requires_grad_() for v in layer.trainable_weights)
    sigma = tensor(layer.vector_v) @ matrix(kernel) @ tensor(layer.vector_u)
    weight = (kernel / sigma).permute(3, 2, 0, 1)
    y = torch.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2)
    expected, of_other = torch.autograd.grad(y.sin().sum(), [kernel, bias])
    close(found, expected)
    close(of_bias, of_other)


def test_only_training_moves_the_vectors():
    x = inputs("dense")
    layer = wrapped("dense", x)
    vectors = [tensor(layer.vector_u), tensor(layer.vector_v)]
    layer(x)
    layer(x, training=False)
    assert all(map(torch.equal, vectors, [tensor(layer.vector_u), tensor(layer.vector_v)]))
    layer(x, training=True)
    assert not torch.equal(vectors[0], tensor(layer.vector_u))
    assert not torch.equal(vectors[1], tensor(layer.vector_v))


def test_before_training_the_norm_is_nearly_right():
    x = inputs("conv2d")
    layer = SpectralNormalization(LAYERS["conv2d"][0](dtype=TYPE), dtype=TYPE)
    layer.build(x.shape)
    sigma = tensor(layer.vector_v) @ matrix(tensor(layer.kernel)) @ tensor(layer.vector_u)
    truth = torch.linalg.matrix_norm(matrix(tensor(layer.kernel)), 2)
    assert 0.95 * truth < sigma <= truth * (1 + 1e-12)


def test_a_zero_kernel_is_passed_through():
    x = inputs("dense")
    layer = wrapped("dense", x)
    layer.kernel.assign(torch.zeros(4, 5))
    assert torch.equal(layer(x, training=True), torch.zeros(3, 5, dtype=torch.float64))


def network():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            SpectralNormalization(keras.layers.Conv2D(4, 3, activation="relu"), 2),
            keras.layers.Flatten(),
            SpectralNormalization(keras.layers.Dense(1)),
        ]
    )


def test_a_model_trains_and_is_saved_and_loaded(tmp_path):
    x = torch.randn(64, 6, 6, 2).numpy()
    y = x.mean(axis=(1, 2))[:, :1]
    model = network()
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    history = model.fit(x, y, batch_size=16, epochs=4, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    for layer in (model.layers[0], model.layers[2]):
        kernel = tensor(layer.kernel)
        sigma = torch.linalg.matrix_norm(matrix(kernel), 2)
        assert abs(sigma - 1) > 0.05  # it is the raw one
        found = tensor(layer.vector_v) @ matrix(kernel) @ tensor(layer.vector_u)
        assert abs(found / sigma - 1) < 0.02

    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded, filled = keras.models.load_model(tmp_path / "model.keras"), network()
    filled.load_weights(tmp_path / "model.weights.h5")
    for other in (loaded, filled):
        assert other.layers[0].power_iterations == 2
        assert (other.predict(x, verbose=0) == model.predict(x, verbose=0)).all()
        for a, b in zip(other.weights, model.weights, strict=True):
            assert torch.equal(a.value, b.value)


def test_the_layer_in_models_that_keras_traces():
    """Keras asks for shapes with tensors that have no values, and makes the weights afterwards."""

    class Inner(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = SpectralNormalization(keras.layers.Dense(5))
            self.second = SpectralNormalization(keras.layers.Dense(1))

        def call(self, x):
            return self.second(self.first(x))

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def call(self, x):
            return self.inner(x)

    entry = keras.Input((6,))
    outer = Outer()
    model = keras.Model(entry, outer(entry))
    x = torch.randn(4, 6)
    layers = [outer.inner.first, outer.inner.second]
    expected = x
    for layer in layers:
        kernel = tensor(layer.kernel)
        sigma = tensor(layer.vector_v) @ kernel @ tensor(layer.vector_u)
        assert abs(sigma / torch.linalg.matrix_norm(kernel, 2) - 1) < 0.05
        expected = expected @ (kernel / sigma) + layer.layer.bias.value
    close(model(x), expected, 1e-5)


def test_a_stateless_call_takes_what_it_is_given_and_changes_nothing():
    x = inputs("dense")
    layer = wrapped("dense", x)
    before = [tensor(v) for v in layer.variables]
    trainable = [2 * v.value for v in layer.trainable_variables]
    fixed = [v.value for v in layer.non_trainable_variables]
    found, new = layer.stateless_call(trainable, fixed, x, training=True)
    assert all(map(torch.equal, before, [tensor(v) for v in layer.variables]))

    layer.kernel.assign(2 * tensor(layer.kernel))
    layer.layer.bias.assign(2 * tensor(layer.layer.bias))
    close(layer(x, training=True), found, SINGLE)
    close(new[0], tensor(layer.vector_u))
    close(new[1], tensor(layer.vector_v))


class Counting(keras.layers.Dense):
    """A layer with a state of its own."""

    def build(self, input_shape):
        super().build(input_shape)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs, training=None):
        self.calls.assign(self.calls + 1)
        return super().call(inputs)


def test_losses_and_states_of_the_layer_are_kept():
    regularized = {"activity_regularizer": "l2", "kernel_regularizer": "l2"}
    layer = SpectralNormalization(Counting(5, dtype=TYPE, **regularized), dtype=TYPE)
    x = inputs("dense")
    for calls in (1, 2):
        y = layer(x, training=True)
        assert layer.layer.calls.value == calls
    found = sorted(loss.item() for loss in layer.losses)
    expected = (0.01 * y.square().sum() / 3, 0.01 * tensor(layer.kernel).square().sum())
    close(torch.tensor(found), torch.tensor(sorted(loss.item() for loss in expected)), SINGLE)


def test_in_mixed_precision_the_kernel_is_normalized_before_it_is_rounded():
    x = torch.randn(64, 32)
    layers = []
    for policy in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(5, use_bias=False, dtype=policy)
        layer = SpectralNormalization(dense, dtype=policy)
        y = layer(x, training=True)
        layers.append(layer)
    full, mixed = layers
    assert y.dtype == torch.bfloat16
    assert mixed.kernel.value.dtype == mixed.vector_u.value.dtype == torch.float32
    assert torch.equal(full.vector_u.value, mixed.vector_u.value)
    assert torch.equal(full.vector_v.value, mixed.vector_v.value)
    weight = full(torch.eye(32)).detach()
    assert torch.equal(y, x.bfloat16() @ weight.bfloat16())


def test_half_precision_has_vectors_of_single():
    layer = SpectralNormalization(keras.layers.Dense(5, dtype="bfloat16"), dtype="bfloat16")
    assert layer(torch.randn(3, 4), training=True).dtype == torch.bfloat16
    assert layer.kernel.value.dtype == torch.bfloat16
    assert layer.vector_u.value.dtype == layer.vector_v.value.dtype == torch.float32


def test_errors_are_those_of_keras():
    for own in (SpectralNormalization, keras.layers.SpectralNormalization):
        with pytest.raises(ValueError, match="`power_iterations` should be greater than zero"):
            own(keras.layers.Dense(3), power_iterations=0)
        with pytest.raises(ValueError, match="ReLU object has no attribute 'kernel' nor 'embed"):
            own(keras.layers.ReLU()).build((2, 3))
        with pytest.raises(ValueError, match="supported layer type"):
            own(torch.nn.Linear(2, 3))


def imported(backend: str, then: str) -> str:
    """Return the error of an import of the layer in a process of its own."""
    code = f"""
import sys, spectral_ext
assert not any(name.partition(".")[0] == "keras" for name in sys.modules)
{then}
try:
    import spectral_ext.keras
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def test_another_backend_is_refused_and_the_package_itself_does_not_import_keras():
    hint = "set KERAS_BACKEND=torch before importing keras"
    # The usual case: nobody has set it, and what Keras wants is not there (if it is: as below).
    found = imported("jax", "")
    assert "jax" in found and hint in found
    # Other backends need packages of gigabytes; this is the line by which Keras knows its own.
    found = imported("torch", "import keras; keras.src.backend.config._BACKEND = 'jax'")
    assert f"its backend is 'jax'; {hint}" in found
