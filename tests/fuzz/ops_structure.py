"""Operations: checkpoints, copies, conversions, other layers, and groups that are made and undone."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from family import BlockSpec, Net, inputs, make_block, normalize
from hypothesis import strategies as st
from pair import Pair, Side, close
from registry import BOOL, SEED, operation, skip_unless, specs
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm
from twin import Norm, QuietHook, TwinGroup

import spectral_ext


def snapshot(model: nn.Module) -> dict[str, Any]:
    state = model.state_dict()
    metadata = state._metadata
    state = type(state)((key, value.clone()) for key, value in state.items())
    state._metadata = metadata
    return state


def scramble(model: nn.Module, seed: int) -> None:
    """Change all weights and vectors, so that what is not loaded shows."""
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise / noise.norm())


@operation()
def save(side: Side) -> None:
    side.kept["state"] = snapshot(side.model)


@operation(assign=BOOL, strict=BOOL)
def load(side: Side, assign: bool, strict: bool) -> Any:
    """Load what was saved, if the layers are still the same."""
    side.kept.setdefault("state", snapshot(side.model))
    state, now = side.kept["state"], side.model.state_dict()
    same = list(now) == list(state)
    same = same and all(now[key].shape == state[key].shape for key in now)
    if not same:
        for each in side.pair.sides:
            each.kept.pop("state", None)
        skip_unless(False)
    state = {key: value.clone() for key, value in state.items()} if assign else state
    found = side.model.load_state_dict(state, strict=strict, assign=assign)
    if assign:
        side.forget()
    return [found.missing_keys, found.unexpected_keys]


@operation(of_the_pair=True, seed=SEED)
def load_the_checkpoint_of_stock(pair: Pair, seed: int) -> None:
    """Hook layers write the hook's keys, the others those of the parametrization."""
    for side in pair.sides:
        side.forget()
    scramble(pair.fused.model, seed)
    pair.fused.model.load_state_dict(snapshot(pair.twin.model))
    pair.twin.has_changed()
    pair.invalidate()


@operation(of_the_pair=True, seed=SEED)
def load_into_stock(pair: Pair, seed: int) -> None:
    """``stock_state_dict`` in the layout of each layer of the twin."""
    layouts = {
        norm.name: "hook" if norm.is_hook else "parametrization" for norm in pair.twin.norms()
    }
    skip_unless(len(set(layouts.values())) == 1)
    state = spectral_ext.stock_state_dict(pair.fused.model, layout=next(iter(layouts.values())))
    state_of_the_twin = pair.twin.model.state_dict()
    assert set(state) == set(state_of_the_twin), set(state) ^ set(state_of_the_twin)
    for side in pair.sides:
        side.forget()
    scramble(pair.twin.model, seed)
    pair.twin.model.load_state_dict(snapshot_of(state))
    pair.twin.has_changed()
    pair.invalidate()


def snapshot_of(state: Any) -> Any:
    made = type(state)((key, value.clone()) for key, value in state.items())
    made._metadata = getattr(state, "_metadata", {})
    return made


@operation(of_the_pair=True, seed=SEED)
def load_weights_alone(pair: Pair, seed: int) -> None:
    """A checkpoint without vectors: they are computed again. Stock keeps those that it has."""
    for side in pair.sides:
        state = snapshot(side.model)
        generator = torch.Generator().manual_seed(seed)
        for name in list(state):
            if name.endswith(("_u", "_v")):
                if not side.is_twin:
                    del state[name]
            elif name.endswith(("original", "_orig")):
                noise = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
                state[name] = noise
        side.model.load_state_dict(state, strict=False)
    pair.adopt_vectors()
    pair.renew()


@operation(of_the_pair=True, how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
def copy_model(pair: Pair, how: str) -> None:
    """Go on with a copy; stock cannot be copied after a forward of a hook, and stays."""
    # Stock's layers, and those that were put in since, cannot all be pickled or copied.
    skip_unless(all(isinstance(n.norm, spectral_ext.nn.SpectralNorm) for n in pair.fused.norms()))
    modes = [p.requires_grad for p in pair.fused.model.parameters()]
    if how == "deepcopy":
        copied = copy.deepcopy(pair.fused.model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(pair.fused.model))
    else:
        file = io.BytesIO()
        torch.save(pair.fused.model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert [p.requires_grad for p in copied.parameters()] == modes
    if pair.root_is_fused:
        assert spectral_ext.group_of(copied) is not pair.group()
    pair.fused.model = copied
    for side in pair.sides:
        side.model.zero_grad()
        side.forget()
    pair.twin.has_changed()
    for group in pair.twin.groups:
        group.was_captured = group.has_run = False  # the copy was not captured, and has not run
    for norm, twin in zip(pair.fused.norms(), pair.twin.norms(), strict=True):
        hook = norm.norm._hook
        if hook is not None and hook.called:  # the copy has not the weight of the last call
            forget_last_call(twin)


def forget_last_call(norm: Norm) -> None:
    """Let the twin of a copied layer compute its weight when it is read."""
    if isinstance(norm.norm, QuietHook) and norm.norm.called:
        norm.norm.forgotten = True
        TwinGroup.refresh(norm)


@operation(of_the_pair=True, block="block")
def copy_block_in_place(pair: Pair, block: str) -> None:
    """``model.block = deepcopy(model.block)``; a copied layer is computed alone, so it is fused again."""
    skip_unless(pair.is_fused)
    skip_unless(all(isinstance(n.norm, spectral_ext.nn.SpectralNorm) for n in pair.fused.norms()))
    # An RNN reads some weights from a list that a copy renews, and so reads, and iterates, more often.
    modules = pair.twin.model.get_submodule(block).modules()
    skip_unless(not any(isinstance(module, nn.RNNBase) for module in modules))
    parent = pair.fused.model.get_submodule(block.rpartition(".")[0])
    setattr_of(
        parent, block.rpartition(".")[2], copy.deepcopy(pair.fused.model.get_submodule(block))
    )
    for side in pair.sides:
        side.model.zero_grad()
        side.forget()
    pair.fuse(pair.update)
    for norm in pair.twin.norms():
        if norm.name.startswith(f"{block}."):
            forget_last_call(norm)


def setattr_of(parent: nn.Module, name: str, value: nn.Module) -> None:
    if isinstance(parent, (nn.Sequential, nn.ModuleList)):
        parent[int(name)] = value
    else:
        setattr(parent, name, value)


def round_trip(
    pair: Pair, dtype: torch.dtype, tolerance: float, run: Callable[..., Tensor]
) -> None:
    """Convert both, run them in the other dtype, and convert them back."""
    skip_unless(pair.all_are_in_groups())  # stock does not convert what a hook has left
    outputs = []
    for side in pair.sides:
        side.model.to(dtype)
        outputs.append(run(side.model).detach())
        side.model.double()
        side.model.zero_grad()
        side.forget()
    pair.adopt_vectors()
    pair.renew()
    close(*outputs, f"output in {dtype}", tolerance)


def are_divided_by_their_norms(pair: Pair) -> bool:
    """Whether every σ is near the norm of its weight.

    With a σ of a hundredth a layer makes the rounding of half precision a hundred times larger.
    """
    for norm in pair.fused.norms():
        weight = norm.weight.detach()
        matrix = weight.movedim(norm.norm.dim, 0).flatten(1) if weight.ndim > 1 else weight[:, None]
        if norm.sigma() < 0.5 * torch.linalg.matrix_norm(matrix, 2).item():
            return False
    return True


@operation(of_the_pair=True, dtype=st.sampled_from(["float32", "bfloat16"]), seed=SEED)
def convert_and_back(pair: Pair, dtype: str, seed: int) -> None:
    """Vectors of half precision are float32 in a fused model, so the twin takes them over."""
    kind = getattr(torch, dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.15}[kind]
    skip_unless(kind is torch.float32 or are_divided_by_their_norms(pair))
    round_trip(pair, kind, tolerance, lambda model: model(inputs(seed, kind)))


@operation(of_the_pair=True, seed=SEED)
def autocast(pair: Pair, seed: int) -> None:
    def run(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(inputs(seed, torch.float32))
        y.float().sum().backward() if y.requires_grad else None
        return y

    skip_unless(are_divided_by_their_norms(pair))
    round_trip(pair, torch.float32, 0.15, run)


@operation(how=st.sampled_from(["cpu", "clone", "float64", "share_memory"]))
def to(side: Side, how: str) -> None:
    """Conversions that change no value, but perhaps the memory."""
    if how == "cpu":
        side.model.to("cpu")
    elif how == "float64":
        side.model.to(torch.float64)
    elif how == "clone":
        side.model._apply(lambda tensor: tensor.clone())
        side.forget()
    else:
        side.model.share_memory()
    side.pair.start_anew(side)


def put(side: Side, block: str, new: nn.Module) -> None:
    parent, _, name = block.rpartition(".")
    setattr_of(side.model.get_submodule(parent), name, new)
    side.forget()


@operation(block="block", spec=specs(), again=BOOL, seed=SEED)
def replace_block(side: Side, block: str, spec: tuple[str, ...], again: bool, seed: int) -> None:
    """Put a new normalized block in the place of another, and perhaps fuse again."""
    torch.default_generator.manual_seed(seed)
    put(side, block, make_block(BlockSpec(*spec), "reference" if side.is_twin else None))
    side.model.get_submodule(block).train(side.model.training)
    fuse_new(side, again)


def fuse_new(side: Side, again: bool) -> None:
    pair = side.pair
    if pair.is_fused and again:
        side.fuse(side.model, pair.update)
    pair.start_anew(side)


@operation(block="block")
def replace_block_by_a_plain_layer(side: Side, block: str) -> None:
    skip_unless(len(side.pair.twin.norms()) > 1)
    put(side, block, nn.Linear(6, 6).double())
    side.pair.start_anew(side)


@operation(spec=specs(), seed=SEED, again=BOOL)
def add_block(side: Side, spec: tuple[str, ...], seed: int, again: bool) -> None:
    skip_unless(isinstance(side.model, Net) and len(side.model.blocks) < 5)
    torch.default_generator.manual_seed(seed)
    block = make_block(BlockSpec(*spec), "reference" if side.is_twin else None)
    side.model.blocks.append(block.train(side.model.training))
    side.forget()
    fuse_new(side, again)


@operation(block="block")
def remove_block(side: Side, block: str) -> None:
    skip_unless(isinstance(side.model, Net) and len(side.pair.twin.norms()) > 1)
    skip_unless(len(side.model.blocks) > 1)
    del side.model.blocks[int(block.rpartition(".")[2])]
    side.forget()
    side.pair.start_anew(side)


@operation(layer="layer")
def remove_norm(side: Side, layer: str) -> None:
    """``remove_parametrizations`` and ``remove_spectral_norm``, in evaluation."""
    skip_unless(len(side.pair.twin.norms()) > 1)
    norm = side.norm(layer)
    mode = norm.module.training
    norm.module.eval()
    if side.pair.twin.norm(layer).is_hook if not side.is_twin else norm.is_hook:
        remove_spectral_norm(norm.module, norm.tensor)
        # Stock leaves a hook there that asks checkpoints for the old keys.
        norm.module._load_state_dict_pre_hooks.clear()
    else:
        parametrize.remove_parametrizations(norm.module, norm.tensor)
    norm.module.train(mode)
    side.forget()
    side.pair.start_anew(side)


@operation(block="block", spec=specs(), seed=SEED)
def add_norm(side: Side, block: str, spec: tuple[str, ...], seed: int) -> None:
    """Put a norm on a layer that has none, and fuse again."""
    torch.default_generator.manual_seed(seed)
    put(side, block, nn.Linear(6, 6).double())
    module = side.model.get_submodule(block)
    normalize(module, "weight", BlockSpec(*spec), "reference" if side.is_twin else None)
    side.forget()
    fuse_new(side, True)


@operation()
def unfuse(side: Side) -> None:
    skip_unless(side.pair.is_fused or side.is_twin)
    side.unfuse()
    side.pair.is_fused = False


@operation(update=st.sampled_from(["forward", "step", "manual"]))
def fuse(side: Side, update: str) -> None:
    """Fuse, or fuse again with other settings."""
    skip_unless(side.norms())
    side.fuse(side.model, update)
    side.pair.update, side.pair.is_fused = update, True


@operation(block="block")
def fuse_part(side: Side, block: str) -> None:
    """A sub-model takes its layers into a group of its own."""
    skip_unless(side.pair.is_fused)
    module = side.model.get_submodule(block)
    here = [n.name.startswith(f"{block}.") for n in side.pair.twin.norms()]
    skip_unless(any(here) and not all(here))
    side.fuse(module, side.pair.update)
    side.pair.start_anew(side)
