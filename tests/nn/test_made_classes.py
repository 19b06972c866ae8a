"""The classes that are made for layers and models: their names, and what user code sees of them."""

import abc
import copy
import io
import pickle
from typing import ClassVar

import pytest
import torch
from nets import STOCK, assert_close, inputs, make
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import spectral_ext


class Keyword(nn.Module):
    """Its subclasses must give a keyword."""

    def __init_subclass__(cls, /, key, **keywords):
        super().__init_subclass__(**keywords)


class Named(nn.Module):
    """A registry by name, which takes no name twice."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        if cls.__name__.removeprefix("Parametrized") in Named.known:
            raise ValueError(f"{cls.__name__} registered twice")
        Named.known.append(cls.__name__)


class Meta(type):
    """A registry in a metaclass, with a keyword."""

    known: ClassVar[list[str]] = []

    def __new__(cls, name, bases, body, *, key):
        Meta.known.append(name)
        return super().__new__(cls, name, bases, body)

    def __init__(cls, name, bases, body, *, key):
        super().__init__(name, bases, body)


class Abstract(abc.ABC):
    @abc.abstractmethod
    def forward(self, x): ...


class KeywordLayer(Keyword, nn.Linear, key="layer"):
    pass


class NamedLayer(Named, nn.Linear):
    pass


class MetaLayer(nn.Linear, metaclass=Meta, key="layer"):
    pass


class AbstractLayer(nn.Linear, Abstract):
    pass


LAYERS = [KeywordLayer, NamedLayer, MetaLayer, AbstractLayer]


class KeywordNet(Keyword, nn.Sequential, key="net"):
    pass


class NamedNet(Named, nn.Sequential):
    pass


class MetaNet(nn.Sequential, metaclass=Meta, key="net"):
    pass


class AbstractNet(nn.Sequential, Abstract):
    pass


NETS = [KeywordNet, NamedNet, MetaNet, AbstractNet]


def hook(layer):
    return spectral_norm(layer)


def ours(layer):
    return spectral_ext.spectral_norm(layer)


@pytest.mark.parametrize("norm", [hook, ours])
@pytest.mark.parametrize("kind", range(4))
def test_classes_that_listen_to_their_subclasses(kind, norm):
    torch.manual_seed(0)
    net = NETS[kind](norm(LAYERS[kind](3, 3)), nn.Tanh(), norm(LAYERS[kind](3, 3)))
    known, meta = list(Named.known), list(Meta.known)
    x, keys = torch.ones(1, 3), list(net.state_dict())
    expected = copy.deepcopy(net)(x)
    spectral_ext.fuse(net)
    assert_close(net(x), expected, rtol=1e-5)
    assert isinstance(net, NETS[kind])
    assert isinstance(net[0], LAYERS[kind])
    assert type(net).__mro__[1] is NETS[kind]
    assert not isinstance(nn.Linear(1, 1), type(net[0]))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_close(copied.eval()(x), net.eval()(x), rtol=1e-6)
    baked = spectral_ext.bake(net)
    assert type(baked) is NETS[kind]
    assert type(baked[0]) is LAYERS[kind]
    spectral_ext.unfuse(net)
    assert list(net.state_dict()) == keys
    assert type(net) is NETS[kind]
    assert_close(net.eval()(x), baked(x), rtol=1e-5)
    assert (Named.known, Meta.known) == (known, meta)


@pytest.mark.parametrize("kind", range(4))
def test_apply_spectral_norm_to_such_classes(kind):
    net = nn.Sequential(nn.Linear(3, 3), LAYERS[kind](3, 3))
    known, meta = list(Named.known), list(Meta.known)
    applied = spectral_ext.apply_spectral_norm(net)
    assert applied.normalized == ("0.weight", "1.weight")
    assert (Named.known, Meta.known) == (known, meta)
    parametrize.remove_parametrizations(net[1], "weight")
    assert type(net[1]) is LAYERS[kind]


def test_unfuse_gives_torchs_class_back_without_telling_the_users():
    net = nn.Sequential(parametrizations.spectral_norm(AbstractLayer(3, 3)))
    before = type(net[0])
    spectral_ext.fuse(net)
    spectral_ext.unfuse(net)
    after = type(net[0])
    assert after.__name__ == before.__name__
    assert after.__bases__ == before.__bases__
    assert set(after.__dict__) >= {"__getstate__", "__deepcopy__", "weight"}
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(net)
    copy.deepcopy(net)


class Outer:
    class Net(nn.Sequential):
        pass


def test_made_classes_have_the_names_of_the_users():
    """Configurations, registries and loggers write ``type(model).__name__``."""
    net = Outer.Net(spectral_norm(nn.Linear(3, 3)), spectral_ext.spectral_norm(nn.Conv1d(3, 3, 1)))
    text = repr(Outer.Net(nn.Linear(3, 3), nn.Tanh()))
    spectral_ext.fuse(net)
    for module, cls in ((net, Outer.Net), (net[0], nn.Linear), (net[1], nn.Conv1d)):
        made = type(module)
        assert made is not cls
        for name in ("__qualname__", "__module__", "__doc__"):
            assert getattr(made, name) == getattr(cls, name)
        # PyTorch's parametrization makes a class too, and its hook makes none.
        assert made.__name__ == ("Parametrized" if cls is nn.Conv1d else "") + cls.__name__
        assert parametrize.type_before_parametrizations(module).__name__ == cls.__name__
    assert repr(net).splitlines()[:2] == [*text.splitlines()[:1], "  (0): Linear("]
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, Outer.Net)
    assert type(loaded).__name__ == "Net"


def test_cloudpickle_of_a_local_class():
    cloudpickle = pytest.importorskip("cloudpickle")

    class Local(nn.Sequential):
        pass

    net = Local(spectral_norm(nn.Linear(3, 3)))
    spectral_ext.fuse(net)
    net(torch.ones(1, 3))
    loaded = cloudpickle.loads(cloudpickle.dumps(net))
    assert_close(loaded.eval()(torch.ones(1, 3)), net.eval()(torch.ones(1, 3)))


class Base(nn.Module):
    def forward(self, x):
        return x + 1


class SuperOfClass(Base):
    def __init__(self):
        super(self.__class__, self).__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(3, 3))

    def forward(self, x):
        return self.layer(super(self.__class__, self).forward(x))


class SuperOfClassInInit(nn.Module):
    def __init__(self):
        super(self.__class__, self).__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(3, 3))

    def forward(self, x):
        return self.layer(x)


class Inherits(SuperOfClassInInit):
    def __init__(self):
        super(SuperOfClassInInit, self).__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(3, 3))


class SuperOfType(SuperOfClassInInit):
    def __init__(self):
        super(SuperOfClassInInit, self).__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(3, 3))

    def train(self, mode=True):
        return super(type(self), self).train(mode)


class NamesItsClass(SuperOfType):
    """Uses ``super`` and its class, but not the one with the other."""

    def extra_repr(self):
        return super().extra_repr() + self.__class__.__name__

    def __repr__(self):
        return f"{type(self).__name__} {super().__repr__()}"

    def train(self, mode=True):
        return nn.Module.train(self, mode)


def test_super_of_type_is_refused_and_a_name_of_the_class_is_not():
    with pytest.raises(RuntimeError, match=r"SuperOfType\.train calls super\("):
        spectral_ext.fuse(SuperOfType())
    net = NamesItsClass()
    spectral_ext.fuse(net)
    assert repr(net).startswith("NamesItsClass NamesItsClass(")


def test_super_of_self_class_is_named_before_it_recurses():
    net = SuperOfClass()
    keys, norm = list(net.state_dict()), net.layer.parametrizations.weight[0]
    with pytest.raises(RuntimeError, match=r"SuperOfClass\.forward calls super\(self\.__class__"):
        spectral_ext.fuse(net)
    assert type(net) is SuperOfClass
    assert list(net.state_dict()) == keys
    assert type(norm) is not spectral_ext.nn.SpectralNorm
    for cls in (SuperOfClassInInit, Inherits):  # where it was called once, it is over
        net = cls()
        spectral_ext.fuse(net)
        net(torch.ones(1, 3))


def test_an_error_while_classes_are_made_changes_nothing(monkeypatch):
    from spectral_ext.nn import dynamic_class

    net = make(STOCK["u_first"], STOCK["v_first"])
    shape = [(name, type(module)) for name, module in net.named_modules()]
    keys = list(net.state_dict())
    make_class, calls = dynamic_class.subclass, []

    def refuse_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise TypeError("no more subclasses")
        return make_class(*arguments)

    monkeypatch.setattr(dynamic_class, "subclass", refuse_the_third)
    with pytest.raises(TypeError, match="no more subclasses"):
        spectral_ext.fuse(net)
    assert [(name, type(module)) for name, module in net.named_modules()] == shape
    assert list(net.state_dict()) == keys
    net(inputs())


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


@pytest.mark.parametrize("order", ["nest", "nest, fuse", "fuse, nest", "fuse, forward, nest"])
def test_a_parametrization_of_the_original(order):
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(*(parametrizations.spectral_norm(nn.Linear(4, 4)) for _ in "ab"))
        for action in order.split(", "):
            if action == "nest":
                list_ = net[0].parametrizations.weight
                parametrize.register_parametrization(list_, "original", Symmetric())
            elif action == "forward":
                net(torch.ones(2, 4))
            elif fused:
                spectral_ext.fuse(net)
        for _ in range(2):
            output = net(torch.ones(2, 4)).sum()
        output.backward()
        gradient = net[0].parametrizations.weight.parametrizations.original.original.grad
        results.append((output, gradient, net[0].parametrizations.weight[0]._u))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lone", "fused", "hook"])
def test_tracing_inside_of_cached_is_refused(kind):
    layer = nn.Linear(3, 2).requires_grad_(False)
    if kind == "lone":
        spectral_ext.spectral_norm(layer)
    else:
        (hook if kind == "hook" else parametrizations.spectral_norm)(layer)
        spectral_ext.fuse(layer)
    layer.eval()
    with parametrize.cached():
        _ = layer.weight
        with pytest.raises(RuntimeError, match="Cannot trace a model while caching"):
            torch.jit.trace(layer, torch.ones(1, 3))
    layer(torch.ones(1, 3))
