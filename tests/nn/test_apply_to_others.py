"""What apply_spectral_norm leaves alone: other norms, matrices of other names, selections of nothing."""

import pytest
import their_layers
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils import weight_norm as hook_weight_norm

import spectral_ext
from spectral_ext import apply_spectral_norm


def parametrized(model):
    return [name for name, m in model.named_modules() if parametrize.is_parametrized(m)]


# Selections.


@pytest.mark.parametrize(
    "include",
    ["typo", "^conv$", lambda name, module: False, "norm"],
    ids=["typo", "^", "f", "norm"],
)
def test_an_include_that_selects_nothing_is_an_error_that_names_what_there_is(include):
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "norm": nn.LayerNorm(3)})
    with pytest.raises(ValueError, match=r"include=.* they are: first\.weight$"):
        apply_spectral_norm(model, include=include)
    assert not parametrized(model)


def test_an_include_for_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match="the model has none"):
        apply_spectral_norm(nn.Sequential(nn.ReLU()), include="0")
    assert apply_spectral_norm(nn.Sequential(nn.ReLU())).normalized == ()


def test_an_include_of_what_is_normalized_already_selects_it():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for expected in (("0.weight",), ()):
        assert apply_spectral_norm(model, include="^0").normalized == expected


# Matrices of other names.


def test_matrices_of_other_names_are_among_the_skipped():
    model = nn.ModuleDict(
        {
            "rnn": nn.LSTM(3, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "left_out": nn.GRUCell(3, 4),
        }
    )
    result = apply_spectral_norm(model, exclude="^left")
    assert result.normalized == ("attention.out_proj.weight",)
    hint = "LSTM has no 'weight'; use spectral_norm(module, 'weight_ih_l0')"
    assert result.skipped == {
        "rnn.weight_ih_l0": hint,
        "rnn.weight_hh_l0": hint.replace("ih", "hh"),
        "attention.in_proj_weight": "MultiheadAttention has no 'weight'; "
        "use spectral_norm(module, 'in_proj_weight')",
        "left_out.weight_ih": "excluded",
        "left_out.weight_hh": "excluded",
    }
    spectral_ext.spectral_norm(model["rnn"], "weight_ih_l0")
    hook_spectral_norm(model["rnn"], "weight_hh_l0")
    assert not any(name.startswith("rnn") for name in apply_spectral_norm(model).skipped)
    assert apply_spectral_norm(nn.LSTM(3, 4), name="bias_ih_l0", types=nn.LSTM).skipped == {}


# Norms of other code.


class Wrapper(nn.Module):
    """Written as the wrappers of many GANs: the weight becomes ``weight_bar`` and a plain attribute."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        weight = module.weight
        del module._parameters["weight"]
        module.weight_u = nn.Parameter(torch.randn(len(weight)), requires_grad=False)
        module.weight_v = nn.Parameter(torch.randn(weight[0].numel()), requires_grad=False)
        module.weight_bar = nn.Parameter(weight.data)
        module.weight = weight.data


OTHERS = {
    "hook weight_norm": lambda: hook_weight_norm(nn.Linear(3, 4)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 4)),
    "wrapper": lambda: Wrapper(nn.Linear(3, 4)).module,
    "biggan linear": lambda: their_layers.SNLinear(3, 4),
    "biggan convolution": lambda: their_layers.SNConv2d(3, 4, 2),
    "biggan embedding": lambda: their_layers.SNEmbedding(3, 4),
    "due": lambda: their_layers.spectral_norm_fc(nn.Linear(3, 4), 0.9),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_weight_with_another_norm_does_not_get_a_second_one(make):
    model = nn.Sequential(nn.Linear(3, 3), make())
    before = type(model[1]), model[1].weight.detach().clone()
    result = apply_spectral_norm(model)
    assert result.normalized == ("0.weight",)
    assert list(result.skipped) == ["1.weight"]
    assert type(model[1]) is before[0] and torch.equal(model[1].weight, before[1])


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.mT


def test_a_parametrization_that_is_no_norm_gets_one():
    model = nn.Linear(3, 3)
    parametrize.register_parametrization(model, "weight", Symmetric())
    assert apply_spectral_norm(model).normalized == ("weight",)


# Compiled modules.


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_a_compiled_module_is_refused_or_skipped():
    compiled = torch.jit.script(nn.Linear(3, 3))
    for call in (spectral_ext.spectral_norm, apply_spectral_norm):
        with pytest.raises(TypeError, match=r"before torch\.jit\.script"):
            call(compiled)
    with pytest.raises(TypeError, match="named_parameters"):
        spectral_ext.SpectralProjection(compiled)
    model = nn.Sequential(nn.Linear(3, 3), compiled, torch.jit.script(nn.Sequential(nn.ReLU())))
    result = apply_spectral_norm(model, types=nn.Module)
    assert result.normalized == ("0.weight",)
    assert result.skipped == {"1.weight": "torch.jit has compiled the module"}
