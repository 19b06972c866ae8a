"""Bad input: an error in words, and nothing written. The operators are called directly too."""

import math

import pytest
import torch

from spectral_ext import backends
from spectral_ext.backends import cpu
from spectral_ext.functional import spectral_normalize

CPU = torch.device("cpu")
# The backends whose operators check what they are given, where they run here.
CHECKING = [name for name in ("cpu", "triton") if backends.unavailable(name, CPU) is None]


@pytest.fixture(params=CHECKING)
def operators(request):
    """A backend that is called directly."""
    return backends.select(request.param, CPU)


def lists():
    torch.manual_seed(1)
    return {
        "weights": [torch.randn(4, 6), torch.randn(5, 3)],
        "us": [torch.randn(4), torch.randn(5)],
        "vs": [torch.randn(6), torch.randn(3)],
    }


def shared(size):
    flat = torch.randn(2 * size)
    return [flat[:size], flat[size - 1 : 2 * size - 1]]


# what is changed, the error, a word of the message
LIST_CASES = {
    "fewer us": ({"us": [torch.randn(4)]}, ValueError, "us"),
    "fewer vs": ({"vs": [torch.randn(6)]}, ValueError, "vs"),
    "fewer dims": ({"dims": [0]}, ValueError, "dims"),
    "fewer eps": ({"eps": [1e-12]}, ValueError, "eps"),
    "no list": ({"weights": torch.randn(2, 4, 6)}, TypeError, "weights"),
    "no tensor": ({"weights": [None, torch.randn(5, 3)]}, TypeError, r"weights\[0\]"),
    "size of u": ({"us": [torch.randn(4), torch.randn(4)]}, ValueError, r"weights\[1\]: u"),
    "size of v": ({"vs": [torch.randn(7), torch.randn(3)]}, ValueError, r"weights\[0\]: v"),
    "u of two dimensions": ({"us": [torch.randn(4, 1), torch.randn(5)]}, ValueError, "u must"),
    "dtype of u": ({"us": [torch.randn(4).double(), torch.randn(5)]}, TypeError, "u is"),
    "device of v": ({"vs": [torch.randn(6), torch.empty(3, device="meta")]}, ValueError, "meta"),
    "u is missing": ({"us": [None, torch.randn(5)]}, TypeError, "u must"),
    "u requires grad": (
        {"us": [torch.randn(4, requires_grad=True), torch.randn(5)]},
        ValueError,
        "require grad",
    ),
    "u expanded": ({"us": [torch.randn(1).expand(4), torch.randn(5)]}, ValueError, "overlap"),
    "u overlaps u": (
        {"weights": [torch.randn(4, 6), torch.randn(4, 3)], "us": shared(4)},
        RuntimeError,
        "overlap",
    ),
    "integers": (
        {"weights": [torch.ones(4, 6, dtype=torch.int64), torch.randn(5, 3)]},
        TypeError,
        "int64",
    ),
    "sparse": (
        {"weights": [torch.randn(4, 6).to_sparse(), torch.randn(5, 3)]},
        TypeError,
        "dense",
    ),
    "no elements": (
        {"weights": [torch.randn(4, 0), torch.randn(5, 3)]},
        ValueError,
        "no elements",
    ),
    "no dimensions": (
        {"weights": [torch.tensor(1.0), torch.randn(5, 3)]},
        ValueError,
        "Dimension",
    ),
    "dim": ({"dims": [0, 2]}, ValueError, "Dimension out of range"),
    "dim as in stock": ({"dims": -3}, IndexError, "Dimension out of range"),
    "dim is a float": ({"dims": 0.0}, TypeError, "dim"),
    "n 0": ({"n_power_iterations": [1, 0]}, ValueError, "positive"),
    "n huge": ({"n_power_iterations": 2**40}, ValueError, "too large"),
    "n float": ({"n_power_iterations": 1.0}, TypeError, "n_power_iterations"),
    "eps negative": ({"eps": -1e-12}, ValueError, "eps must be finite and not negative"),
    "eps nan": ({"eps": [1e-12, math.nan]}, ValueError, r"weights\[1\]: eps"),
    "eps inf": ({"eps": math.inf}, ValueError, "eps"),
    "eps text": ({"eps": "small"}, TypeError, "eps"),
    "order": ({"order": "w_first"}, ValueError, "order"),
    "backend": ({"backend": "tpu"}, ValueError, "tpu"),
    "backend that cannot run": ({"backend": "cuda"}, RuntimeError, "cuda"),
}


@pytest.mark.parametrize("case", LIST_CASES)
def test_list_api(backend, case):
    change, error, word = LIST_CASES[case]
    arguments = {**lists(), "backend": backend, **change}
    vectors = [x for x in (*arguments["us"], *arguments["vs"]) if x is not None and not x.is_meta]
    before = [x.detach().clone() for x in vectors]
    with pytest.raises(error, match=word):
        spectral_normalize(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True))


def forward_arguments():
    given = lists()
    outputs, saved, sigmas = cpu.allocate(given["weights"], [0, 0])
    return dict(
        **given,
        outputs=outputs,
        saved=saved,
        sigmas=sigmas,
        convergence=torch.empty(4),
        dims=[0, 0],
        n_power_iterations=[1, 1],
        eps=[1e-12, 1e-12],
        v_first=[False, False],
        tols=[0.0, 0.1],
        scales=[1.0, 2.0],
        soft=[False, True],
        update=True,
    )


def freed(shape):
    tensor = torch.randn(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


OTHER = torch.randn(5, 3)
LONGER = torch.randn(16)
# (what is changed, words of the message): the change
FORWARD_CASES = {
    ("fewer us", "us has"): {"us": [torch.randn(4)]},
    ("fewer vs", "vs has"): {"vs": []},
    ("fewer outputs", "outputs has"): {"outputs": [torch.empty(4, 6)]},
    ("fewer dims", "dims has"): {"dims": [0]},
    ("fewer n", "n_power_iterations has"): {"n_power_iterations": [1]},
    ("fewer eps", "eps has"): {"eps": [1e-12]},
    ("fewer v_first", "v_first has"): {"v_first": []},
    ("fewer tols", "tols has"): {"tols": []},
    ("fewer scales", "scales has"): {"scales": [1.0]},
    ("fewer soft", "soft has"): {"soft": []},
    ("tol", "tol of layer 1"): {"tols": [0.0, -0.1]},
    ("tol nan", "tol of layer 0"): {"tols": [math.nan, 0.1]},
    ("scale", "scale of layer 1"): {"scales": [1.0, 0.0]},
    ("scale inf", "scale of layer 0"): {"scales": [math.inf, 1.0]},
    ("convergence too short", "convergence must"): {"convergence": torch.empty(3)},
    ("convergence in float64", "convergence must"): {"convergence": torch.empty(4).double()},
    ("convergence in two rows", "convergence must"): {"convergence": torch.empty(2, 2)},
    ("types of u and v", "u and v of layer 0"): {
        "weights": [torch.randn(4, 6).half(), OTHER],
        "outputs": [torch.randn(4, 6).half(), OTHER * 1],
        "vs": [torch.randn(6).half(), torch.randn(3)],
    },
    ("dim", "dim of layer 1"): {"dims": [0, 2]},
    ("n", "n_power_iterations of layer 0"): {"n_power_iterations": [0, 1]},
    ("n beyond int", "n_power_iterations of layer 0"): {"n_power_iterations": [2**31, 1]},
    ("eps", "eps of layer 0"): {"eps": [math.nan, 1e-12]},
    ("size of u", "u of layer 0"): {"us": [torch.randn(3), torch.randn(5)]},
    ("size of v", "v of layer 1"): {"vs": [torch.randn(6), torch.randn(30)]},
    ("u expanded", "u of layer 0 overlap"): {"us": [torch.randn(1).expand(4), torch.randn(5)]},
    ("dtype of v", "v of layer 0 is (Half|float16)"): {
        "vs": [torch.randn(6).half(), torch.randn(3)]
    },
    ("dtype of a weight", "weight of layer 0 is (Int|int32)"): {
        "weights": [torch.ones(4, 6, dtype=torch.int32), OTHER]
    },
    ("float64 among float32", "layer 1 is (Double|float64)"): {
        "weights": [torch.randn(4, 6), OTHER.double()]
    },
    ("shape of an output", "output of layer 0 has shape"): {
        "outputs": [torch.empty(4, 5), torch.empty(5, 3)]
    },
    ("dtype of an output", "output of layer 0 is (Double|float64)"): {
        "outputs": [torch.empty(4, 6).double(), torch.empty(5, 3)]
    },
    ("half output of a half weight", "output of layer 0 is (Half|float16)"): {
        "weights": [torch.randn(4, 6).bfloat16(), OTHER],
        "outputs": [torch.empty(4, 6).half(), torch.empty(5, 3)],
    },
    ("half output in another order", "output of layer 0 has a half type"): {
        "outputs": [torch.empty(6, 4).half().T, torch.empty(5, 3)]
    },
    ("half output of an expanded weight", "output of layer 0 has a half type"): {
        "weights": [torch.randn(4, 1).expand(4, 6), OTHER],
        "outputs": [torch.empty(4, 6).half(), torch.empty(5, 3)],
    },
    ("half output in the weight", "layer 1 overlap in memory"): {
        "weights": [torch.randn(4, 6), LONGER[:15].view(5, 3)],
        "outputs": [torch.empty(4, 6), LONGER.view(torch.float16)[:15].view(5, 3)],
    },
    ("output expanded", "output of layer 0 must be dense"): {
        "outputs": [torch.empty(4, 1).expand(4, 6), torch.empty(5, 3)]
    },
    ("output within the weight", "layer 1 overlap in memory"): {
        "weights": [torch.randn(4, 6), LONGER[:15].view(5, 3)],
        "outputs": [torch.empty(4, 6), LONGER[1:].view(5, 3)],
    },
    ("output is the weight transposed", "layer 1 overlap in memory"): {
        "weights": [torch.randn(4, 6), LONGER[:9].view(3, 3)],
        "outputs": [torch.empty(4, 6), LONGER[:9].view(3, 3).T],
        "us": [torch.randn(4), torch.randn(3)],
        "saved": torch.empty(16),
    },
    ("saved too short", "saved must"): {"saved": torch.empty(3)},
    ("saved in float64", "saved must"): {"saved": torch.empty(18).double()},
    ("sigmas strided", "sigmas must"): {"sigmas": torch.empty(4)[::2]},
    ("weight freed", "beyond its storage"): {"weights": [freed((4, 6)), OTHER]},
    ("u freed", "u of layer 0 reaches"): {"us": [freed(4), torch.randn(5)]},
    ("no elements", "layer 0 has no elements"): {
        "weights": [torch.randn(0, 6), OTHER],
        "outputs": [torch.empty(0, 6), OTHER * 1],
    },
    ("no dimensions", "out of range"): {
        "weights": [torch.tensor(1.0), OTHER],
        "outputs": [torch.tensor(1.0), OTHER * 1],
    },
    ("u inside of a weight", "overlap in memory"): {
        "weights": [torch.randn(4, 6), OTHER],
        "us": [OTHER.reshape(-1)[:4], torch.randn(5)],
    },
}


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda case: case[0])
def test_forward_operator(case, operators):
    arguments = {**forward_arguments(), **FORWARD_CASES[case]}
    vectors = [x for x in (*arguments["us"], *arguments["vs"]) if x.untyped_storage().nbytes()]
    before = [x.clone() for x in vectors]
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError), match=case[1]):
        operators.forward_(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True))


def backward_arguments():
    outputs = [torch.randn(4, 6), torch.randn(5, 3)]
    return {
        "grad_outputs": [torch.randn(4, 6), None],
        "grad_sigmas": None,
        "outputs": outputs,
        "saved": torch.randn(18),
        "sigmas": torch.ones(2),
        "dims": [0, 0],
        "scales": [1.0, 2.0],
        "soft": [False, True],
        "detach_sigma": [True, False],
        "mask": [True, True],
        "widen": [],
    }


BACKWARD_CASES = {
    ("fewer gradients", "grad_outputs has"): {"grad_outputs": [None]},
    ("fewer dims", "dims has"): {"dims": [0]},
    ("fewer masks", "mask has"): {"mask": [True]},
    ("fewer widen", "widen has"): {"widen": [True]},
    ("fewer scales", "scales has"): {"scales": [1.0]},
    ("fewer soft", "soft has"): {"soft": [True]},
    ("fewer detach_sigma", "detach_sigma has"): {"detach_sigma": []},
    ("scale", "scale of layer 0"): {"scales": [-1.0, 1.0]},
    ("dim", "dim of layer 1"): {"dims": [0, -3]},
    ("shape of a gradient", "gradient of layer 0 has shape"): {
        "grad_outputs": [torch.randn(6, 4), None]
    },
    ("dtype of a gradient", "gradient of layer 0 is (Double|float64)"): {
        "grad_outputs": [torch.randn(4, 6).double(), None]
    },
    ("gradient freed", "gradient of layer 0 reaches"): {"grad_outputs": [freed((4, 6)), None]},
    ("output expanded", "output of layer 0 must be dense"): {
        "outputs": [torch.randn(4, 1).expand(4, 6), OTHER]
    },
    ("saved too short", "saved must"): {"saved": torch.randn(17)},
    ("sigmas too short", "sigmas must"): {"sigmas": torch.ones(1)},
    ("gradient of sigmas too short", "grad_sigmas must"): {"grad_sigmas": torch.ones(1)},
    ("gradient of sigmas in float64", "grad_sigmas must"): {"grad_sigmas": torch.ones(2).double()},
}


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case[0])
def test_backward_operator(case, operators):
    operators.backward(**backward_arguments())  # the arguments are right but for the change
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError), match=case[1]):
        operators.backward(**{**backward_arguments(), **BACKWARD_CASES[case]})


def attach_arguments():
    weights = [torch.randn(4, 6, requires_grad=True), torch.randn(5, 3)]
    return {
        "weights": weights,
        "outputs": [torch.randn(4, 6), torch.randn(5, 3)],
        "saved": torch.randn(18),
        "sigmas": torch.ones(2),
        "dims": [0, 0],
        "scales": [1.0, 2.0],
        "soft": [False, True],
        "detach_sigma": [True, False],
    }


ATTACH_CASES = {
    ("fewer outputs", "each have 2"): {"outputs": [OTHER]},
    ("fewer dims", "each have 2"): {"dims": [0]},
    ("fewer scales", "each have 2"): {"scales": [1.0]},
    ("fewer soft", "each have 2"): {"soft": []},
    ("fewer detach_sigma", "each have 2"): {"detach_sigma": [True]},
    ("shape of an output", "output of layer 1 has shape"): {
        "outputs": [torch.randn(4, 6), torch.randn(3, 5)]
    },
    ("dim", "dim of layer 0"): {"dims": [2, 0]},
    ("negative dim", "dim of layer 0"): {"dims": [-1, 0]},
    ("no elements", "dim of layer 1"): {
        "weights": [torch.randn(4, 6), torch.randn(0, 3)],
        "outputs": [torch.randn(4, 6), torch.randn(0, 3)],
    },
    ("saved too short", "saved and sigmas"): {"saved": torch.randn(17)},
    ("sigmas too long", "saved and sigmas"): {"sigmas": torch.ones(3)},
}


@pytest.mark.parametrize("case", ATTACH_CASES, ids=lambda case: case[0])
def test_attach_operator(case):
    arguments = attach_arguments()
    (first, second), sigmas = cpu.attach(**arguments)
    assert first.requires_grad and sigmas.requires_grad and not second.requires_grad
    assert torch.equal(first, arguments["outputs"][0])
    with pytest.raises((ValueError, IndexError), match=case[1]):
        cpu.attach(**{**attach_arguments(), **ATTACH_CASES[case]})


def test_attached_to_what_does_not_fit_together():
    """The backward looks at everything again: a dtype that the node was given wrongly is an error."""
    arguments = {**attach_arguments(), "saved": torch.randn(18, dtype=torch.float64)}
    (first, _), _ = cpu.attach(**arguments)
    with pytest.raises(ValueError, match="saved must"):
        first.sum().backward()


_SETTINGS = ("n_power_iterations", "eps", "v_first", "tols", "scales", "soft", "detach_sigma")
PREPARED_CASES = {
    "fewer us": {"us": [torch.randn(4)]},
    "fewer eps": {"eps": [1e-12]},
    "eps": {"eps": [1e-12, -1.0]},
    "fewer tols": {"tols": []},
    "scale": {"scales": [1.0, math.inf]},
    "iterations": {"n_power_iterations": [1, 0]},
    "dim": {"dims": [0, 2]},
    "u of another size": {"us": [torch.randn(4), torch.randn(4)]},
    "u twice": {"us": [OTHER.reshape(-1)[:4], OTHER.reshape(-1)[:5]]},
    "no layer": {key: [] for key in ("weights", "us", "vs", "dims", *_SETTINGS)},
}


@pytest.mark.parametrize("case", PREPARED_CASES)
def test_prepared_call(case):
    def arguments():
        given = {**forward_arguments(), "detach_sigma": [False, False]}
        return {key: given[key] for key in given if key not in _OF_A_CALL}

    right, wrong = arguments(), {**arguments(), **PREPARED_CASES[case]}
    outputs, saved, sigmas, convergence = cpu.prepare(*right.values())(True, False, None)
    assert [y.shape for y in outputs] == [w.shape for w in right["weights"]]
    assert saved.shape == (18,) and sigmas.isfinite().all() and convergence.shape == (4,)
    before = [v.clone() for v in (*wrong["us"], *wrong["vs"])]
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
        cpu.prepare(*wrong.values())(True, False, None)
    for vector, old in zip((*wrong["us"], *wrong["vs"]), before, strict=True):
        assert torch.equal(vector, old)


_OF_A_CALL = ("outputs", "saved", "sigmas", "convergence", "update")


def test_allocate_operator():
    with pytest.raises(ValueError, match="dims"):
        cpu.allocate([torch.randn(2, 3)], [0, 0])
    with pytest.raises(ValueError, match="no elements"):
        cpu.allocate([torch.randn(0, 3)], [0])
    with pytest.raises(IndexError, match="dim"):
        cpu.allocate([torch.randn(2, 3)], [5])
    with pytest.raises(TypeError, match="half type"):
        cpu.allocate([torch.randn(2, 3)], [0], torch.float64)


def test_many_permuted_dimensions():
    """More orders of columns than the kernels describe: an error, and no wrong number."""
    weight = torch.randn([2] * 12).permute(0, *reversed(range(1, 12)))
    with pytest.raises(ValueError, match="contiguous"):
        spectral_normalize([weight], [torch.randn(2)], [torch.randn(2**11)], backend="cpu")
