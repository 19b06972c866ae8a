"""Singular values, norms of convolutions and certified bounds, against the dense matrix's SVD."""

import math
import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from spectral_ext.spectrum import (
    Convolution,
    certified_matrix_norm,
    certified_operator_norm,
    operator_norm,
    singular_values,
)


def orthogonal(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def with_values(values, width):
    """Return a matrix with the given singular values."""
    height = len(values)
    return orthogonal(height) @ torch.diag(values) @ orthogonal(width)[:height]


def dense(weight, convolution):
    """Return the matrix of a convolution: its images of the unit vectors."""
    shape = convolution.input_shape(weight)
    basis = torch.eye(math.prod(shape), dtype=weight.dtype).unflatten(1, shape)
    return convolution.apply(weight, basis).flatten(1).T


MATRICES = {
    "tall": (torch.randn, (400, 90)),
    "wide": (torch.randn, (90, 400)),
    "small": (torch.randn, (7, 5)),
    "one row": (torch.randn, (1, 300)),
    "rank two": (lambda *shape: torch.randn(shape[0], 2) @ torch.randn(2, shape[1]), (120, 150)),
    "clustered": (lambda h, w: with_values(1 - 1e-4 * torch.rand(h, dtype=torch.float64), w), (90, 99)),
    "one value": (lambda h, _: orthogonal(h), (80, 80)),
    "falling": (lambda h, w: with_values(0.5 ** torch.arange(h, dtype=torch.float64), w), (90, 99)),
}  # fmt: skip


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MATRICES)
def test_singular_values_are_those_of_the_svd(kind, dtype, k):
    make, shape = MATRICES[kind]
    matrix = make(*shape).to(dtype)
    k = min(k, *shape)
    found = singular_values(matrix, k)
    expected = torch.linalg.svdvals(matrix.double())[:k]
    assert found.dtype == dtype
    assert found.shape == (k,)
    tol = 1e-5 if dtype == torch.float32 else 1e-6
    assert (found - expected).abs().max() <= tol * expected[0]


def test_singular_values_of_zeros_are_zero():
    assert torch.equal(singular_values(torch.zeros(70, 80), 3), torch.zeros(3))


def test_singular_values_of_a_complex_matrix_are_real():
    matrix = torch.randn(80, 70, dtype=torch.complex128)
    found = singular_values(matrix, 2)
    torch.testing.assert_close(found, torch.linalg.svdvals(matrix)[:2])


@pytest.mark.parametrize("scale", [1e-36, 1e30])
def test_singular_values_neither_overflow_nor_vanish(scale, monkeypatch):
    monkeypatch.delattr(torch.linalg, "svdvals")  # what helps where the iteration fails
    matrix = torch.randn(80, 70)
    found = singular_values(matrix * scale, 2) / scale
    torch.testing.assert_close(found, singular_values(matrix, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    matrix = torch.randn(80, 70).to(dtype)
    assert torch.equal(singular_values(matrix, 2), singular_values(matrix.float(), 2))


def test_singular_values_of_what_is_not_finite_are_nan():
    matrix = torch.ones(80, 70)
    matrix[3, 4] = math.inf
    assert singular_values(matrix, 2).isnan().all()


def test_all_singular_values_may_be_asked_for():
    matrix = torch.randn(40, 30, dtype=torch.float64)
    torch.testing.assert_close(singular_values(matrix, 30), torch.linalg.svdvals(matrix))


def test_singular_values_are_right_when_iterations_run_out():
    matrix = torch.randn(90, 90, dtype=torch.float64)
    found = singular_values(matrix, 2, max_iterations=1)
    torch.testing.assert_close(found, torch.linalg.svdvals(matrix)[:2])


def test_the_start_is_the_same_every_time_and_draws_nothing():
    matrix, weight = torch.randn(90, 90), torch.randn(3, 3, 3)
    convolution = Convolution((30,))
    state = torch.get_rng_state()
    for measure in (lambda: singular_values(matrix), lambda: operator_norm(weight, convolution)):
        assert torch.equal(measure(), measure())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_draws_the_start():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    singular_values(torch.randn(90, 90), generator=generator)
    middle = generator.get_state()
    operator_norm(torch.randn(3, 3, 3), Convolution((30,)), generator=generator)
    assert not torch.equal(middle, before)
    assert not torch.equal(generator.get_state(), middle)


# Settings of convolutions that the hypothesis tests draw from. Small, for the SVD of the matrix.
@st.composite
def convolutions(draw, **fixed):
    ndim = draw(st.integers(1, 3))
    most = (7, 5, 3)[ndim - 1]

    def numbers(least, most):
        return draw(st.tuples(*[st.integers(least, most)] * ndim))

    settings = {
        "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
        "transposed": draw(st.booleans()),
        "stride": numbers(1, 3),
        "dilation": numbers(1, 2),
        "padding": draw(st.one_of(st.just(numbers(0, 2)), st.sampled_from(["same", "valid"]))),
        "groups": draw(st.integers(1, 2)),
        **fixed,
    }
    if settings["padding"] == "same":
        settings |= {"stride": 1, "transposed": False}
    if settings["transposed"]:
        settings["padding_mode"] = "zeros"
        limits = zip(settings["stride"], settings["dilation"], strict=True)
        settings["output_padding"] = [draw(st.integers(0, max(limit) - 1)) for limit in limits]
    channels = [draw(st.integers(1, 2)), draw(st.integers(1, 2))]
    kernel_size = numbers(1, 4 if ndim < 3 else 3)
    seed = draw(st.integers(0, 2**20))
    convolution = Convolution(numbers(1, most), **settings)
    weight = torch.randn(
        channels[0] * settings["groups"],
        channels[1],
        *kernel_size,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    try:
        convolution.check(weight)
    except ValueError:
        hypothesis.reject()
    return weight, convolution


@hypothesis.given(convolutions())
def test_the_adjoint_is_the_transposed_matrix(case):
    weight, convolution = case
    matrix = dense(weight, convolution)
    shape = convolution.output_shape(weight)
    basis = torch.eye(math.prod(shape), dtype=weight.dtype).unflatten(1, shape)
    torch.testing.assert_close(convolution.adjoint(weight, basis).flatten(1), matrix)


@hypothesis.given(convolutions())
def test_the_operator_norm_is_that_of_the_matrix(case):
    weight, convolution = case
    expected = torch.linalg.matrix_norm(dense(weight, convolution), 2)
    found = operator_norm(weight, convolution, tol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@hypothesis.given(
    convolutions(), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 9)
)
def test_the_certified_bound_of_a_convolution_is_never_below(case, dtype, iterations):
    weight, convolution = case[0].to(dtype), case[1]
    norm = torch.linalg.matrix_norm(dense(weight.double(), convolution), 2)
    # The SVD has rounding errors, too.
    assert certified_operator_norm(weight, convolution, iterations) >= norm * (1 - 1e-14)


def same_circular(ndim, **settings):
    """Return the cases of circular padding where the outputs are as many as the inputs."""
    kernel_size, sizes = (3, 2, 4)[:ndim], (7, 5, 4)[:ndim]
    weight = torch.randn(4, 3, *kernel_size, dtype=torch.float64)
    return weight, Convolution(sizes, padding="same", padding_mode="circular", **settings)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_the_certified_bound_is_tight_for_circular_padding(ndim, dilation):
    weight, convolution = same_circular(ndim, dilation=1 if ndim == 3 else dilation)
    norm = torch.linalg.matrix_norm(dense(weight, convolution), 2)
    bounds = [certified_operator_norm(weight, convolution, n) / norm for n in (4, 6, 20)]
    assert 1.04 >= bounds[0] >= bounds[1] >= bounds[2]
    assert bounds[2] <= 1 + 1e-5


@pytest.mark.parametrize("kind", [{}, {"padding_mode": "circular"}, {"transposed": True}])
def test_the_certified_bound_is_tight_for_patches(kind):
    """Windows that do not overlap: the norm is that of the kernel's matrix."""
    weight = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    convolution = Convolution((6, 9), stride=(2, 3), **kind)
    norm = torch.linalg.matrix_norm(weight.flatten(1), 2)
    bound = certified_operator_norm(weight, convolution, 20)
    torch.testing.assert_close(bound, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(operator_norm(weight, convolution), norm, rtol=1e-6, atol=0)


def test_the_spectrum_is_bounded_in_parts(monkeypatch):
    weight, convolution = same_circular(2)
    weight = weight.abs()  # the largest norm is that of the first frequency
    whole = certified_operator_norm(weight, convolution)
    monkeypatch.setattr("spectral_ext.spectrum.certified._PART", 1)
    torch.testing.assert_close(certified_operator_norm(weight, convolution), whole)


matrices = st.builds(
    lambda h, w, rank, dtype, scale, seed: (
        (torch.randn(h, rank, generator=seed) @ torch.randn(rank, w, generator=seed)).to(dtype)
        * scale
    ),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([torch.float16, torch.float32, torch.float64, torch.complex64]),
    st.sampled_from([1.0, 1e-4, 1e-38, 1e37, 0.0]),
    st.integers(0, 2**20).map(torch.Generator().manual_seed),
)


@hypothesis.given(matrices, st.integers(1, 50))
def test_the_certified_bound_of_a_matrix_is_never_below(matrix, iterations):
    hypothesis.assume(matrix.isfinite().all())
    double = torch.complex128 if matrix.is_complex() else torch.float64
    norm = torch.linalg.matrix_norm(matrix.to(double), 2)
    bound = certified_matrix_norm(matrix, iterations)
    assert bound.dtype == torch.float64
    assert bound >= norm * (1 - 1e-14)
    assert bound <= norm * min(matrix.shape) ** (0.5 ** (iterations + 1)) * (1 + 1e-11) + 1e-320


@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_certified_bound_counts_its_own_rounding(size):
    """Equal values: Gram iteration is exact save for rounding, so only the allowance is above."""
    matrix = torch.eye(size, dtype=torch.float64)
    bound = certified_matrix_norm(matrix, 50)
    assert bound > 1
    torch.testing.assert_close(bound, torch.ones_like(bound), rtol=1e-11, atol=0)


@pytest.mark.parametrize("taps", [(1.0, 1e-17, -1.0), (1e-17, 1.0, -1.0), (1.0, -1.0, 1e-17)])
def test_the_certified_bound_counts_the_rounding_of_the_transform(taps):
    """Taps that wrap around to one place and all but cancel: in some order their sum is lost."""
    weight = torch.tensor([[taps]], dtype=torch.float64)
    convolution = Convolution((1,), padding=1, padding_mode="circular")
    assert certified_operator_norm(weight, convolution) >= 1e-17


def test_a_group_of_zeros_has_no_part_in_the_certified_bound():
    weight, convolution = torch.randn(4, 3, 3), Convolution((5,), groups=2)
    weight[2:] = 0
    whole = certified_operator_norm(weight, convolution)
    torch.testing.assert_close(whole, certified_operator_norm(weight[:2], Convolution((5,))))


def test_certified_bounds_of_what_is_not_finite_are_nan():
    weight = torch.ones(2, 2, 3)
    weight[0, 0, 0] = math.nan
    assert certified_matrix_norm(weight.flatten(1)).isnan()
    assert certified_operator_norm(weight, Convolution((5,))).isnan()
    assert operator_norm(weight, Convolution((5,))).isnan()


def test_zero_kernels_have_norm_zero_and_a_finite_gradient():
    weight = torch.zeros(2, 2, 3, requires_grad=True)
    norm = operator_norm(weight, Convolution((5,)))
    norm.backward()
    assert norm == 0
    assert weight.grad.isfinite().all()
    assert certified_operator_norm(weight, Convolution((5,))) == 0


@pytest.mark.parametrize(
    ("shape", "convolution"),
    [
        ((2, 3, 3), Convolution((6,), padding=1)),
        ((4, 2, 2, 3), Convolution((5, 4), stride=2, groups=2, dilation=(1, 2), padding=2)),
        ((3, 2, 3, 2), Convolution((3, 3), stride=2, transposed=True, output_padding=1)),
        ((2, 2, 2, 1, 2), Convolution((3, 2, 2))),
    ],
)
def test_the_gradient_of_the_operator_norm(shape, convolution):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: operator_norm(w, convolution, tol=1e-12), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_norm_in_lower_precision(dtype):
    weight = torch.randn(4, 3, 3, 3, dtype=dtype)
    convolution = Convolution((9, 9), padding=1)
    found = operator_norm(weight, convolution)
    assert found.dtype == torch.float32
    expected = operator_norm(weight.double(), convolution)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_a_norm_that_has_not_converged_is_told():
    weight, convolution = torch.randn(3, 3, 3, dtype=torch.float64), Convolution((40,), padding=1)
    with pytest.warns(RuntimeWarning, match="tol=1e-05 in 2 iterations"):
        found = operator_norm(weight, convolution, max_iterations=2)
    assert found < operator_norm(weight, convolution)


@pytest.mark.parametrize("kernel_size", [2, 3, 4])
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_convolution_is_that_of_torch(padding_mode, padding, kernel_size):
    module = torch.nn.Conv2d(
        2, 4, kernel_size, padding=padding, padding_mode=padding_mode, groups=2, bias=False
    )
    x = torch.randn(3, 2, 7, 6)
    with warnings.catch_warnings(action="ignore"):  # torch copies for a padding that is not even
        expected = module(x)
    convolution = Convolution((7, 6), padding=padding, padding_mode=padding_mode, groups=2)
    torch.testing.assert_close(convolution.apply(module.weight, x), expected)
    assert convolution.output_shape(module.weight) == expected.shape[1:]


MATRIX, KERNEL, LINE = torch.ones(9, 5), torch.ones(4, 2, 3), Convolution((5,))
BAD = {
    "no matrix": (lambda: singular_values([[1.0]]), TypeError, "matrix must be a tensor"),
    "integers": (lambda: singular_values(MATRIX.int()), TypeError, "matrix must be floating .* torch.int32"),
    "one dimension": (lambda: singular_values(MATRIX[0]), ValueError, "matrix .* two dimensions"),
    "empty": (lambda: certified_matrix_norm(MATRIX[:0]), ValueError, "matrix .* empty"),
    "k zero": (lambda: singular_values(MATRIX, 0), ValueError, "k must be positive"),
    "k too large": (lambda: singular_values(MATRIX, 6), ValueError, "k must be at most 5"),
    "k float": (lambda: singular_values(MATRIX, 1.0), TypeError, "k must be an int"),
    "k bool": (lambda: singular_values(MATRIX, True), TypeError, "k must be an int"),
    "tol zero": (lambda: singular_values(MATRIX, tol=0.0), ValueError, "tol must be positive"),
    "tol NaN": (lambda: operator_norm(KERNEL, LINE, tol=math.nan), ValueError, "tol must be"),
    "tol text": (lambda: operator_norm(KERNEL, LINE, tol="x"), TypeError, "tol must be a float"),
    "no iterations": (
        lambda: operator_norm(KERNEL, LINE, max_iterations=0),
        ValueError,
        "max_iterations must be positive",
    ),
    "no Gram iterations": (
        lambda: certified_matrix_norm(MATRIX, 0),
        ValueError,
        "iterations must be positive",
    ),
    "many Gram iterations": (
        lambda: certified_operator_norm(KERNEL, LINE, 51),
        ValueError,
        "iterations must be at most 50",
    ),
    "no kernel": (lambda: operator_norm(None, LINE), TypeError, "weight must be a tensor"),
    "complex": (lambda: operator_norm(KERNEL * 1j, LINE), TypeError, "weight must be real"),
    "a kernel of 2-D": (lambda: operator_norm(KERNEL[..., None], LINE), ValueError, "weight must"),
    "groups": (
        lambda: operator_norm(KERNEL, Convolution((5,), groups=3)),
        ValueError,
        "groups=3",
    ),
    "large kernel": (lambda: operator_norm(KERNEL, Convolution((2,))), ValueError, "kernel"),
    "circular twice around": (
        lambda: operator_norm(KERNEL, Convolution((2,), padding=3, padding_mode="circular")),
        ValueError,
        "more than once around",
    ),
    "input_size int": (lambda: Convolution(5), TypeError, "input_size must be a tuple"),
    "input_size zero": (lambda: Convolution((5, 0)), ValueError, "input_size must be at least 1"),
    "input_size 4-D": (lambda: Convolution((5,) * 4), ValueError, "input_size must have 1, 2"),
    "stride": (lambda: Convolution((5,), stride=0), ValueError, "stride must be at least 1"),
    "strides": (lambda: Convolution((5,), stride=(1, 1)), ValueError, "stride must have 1"),
    "dilation": (lambda: Convolution((5,), dilation=1.5), TypeError, "dilation must be int"),
    "padding": (lambda: Convolution((5,), padding=-1), ValueError, "padding must be at least 0"),
    "padding text": (lambda: Convolution((5,), padding="full"), ValueError, "padding must be"),
    "padding mode": (
        lambda: Convolution((5,), padding_mode="reflect"),
        ValueError,
        "padding_mode must be",
    ),
    "same with a stride": (
        lambda: Convolution((5,), padding="same", stride=2),
        ValueError,
        "stride 1",
    ),
    "output padding": (lambda: Convolution((5,), output_padding=1), ValueError, "output_padding"),
    "large output padding": (
        lambda: Convolution((5,), output_padding=2, stride=2, transposed=True),
        ValueError,
        "output_padding must be smaller",
    ),
    "transposed same": (
        lambda: Convolution((5,), padding="same", transposed=True),
        ValueError,
        "transposed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
