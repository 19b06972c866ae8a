"""The GAN demo under Accelerate: a run that goes on from its checkpoint, and where a model may be fused."""

import sys
from pathlib import Path

import pytest
import torch

import spectral_ext

accelerate = pytest.importorskip(
    "accelerate", reason="Accelerate is not installed: pip install 'spectral-ext[accelerate]'"
)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate_gan import Run  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate has one configuration for a process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def built(seed=0, **options):
    accelerate.utils.set_seed(seed)
    return Run(batch=400, cpu=True, **options)


def train(run, epochs):
    losses = []
    while run.epoch < epochs:
        losses.append(run.train_epoch())
    return torch.stack(losses)


def everything(run):
    """Return all tensors of models and optimizers by name."""
    found = {}
    for kind in ("generator", "discriminator"):
        found |= {f"{kind} {k}": v for k, v in getattr(run, kind).state_dict().items()}
    for kind in ("g_optimizer", "d_optimizer"):
        for key, state in getattr(run, kind).state_dict()["state"].items():
            found |= {f"{kind} {key} {name}": value for name, value in state.items()}
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Bit for bit, with fresh objects that began elsewhere."""
    whole = built()
    losses = train(whole, 4)
    part = built()
    train(part, 2)
    part.accelerator.save_state(tmp_path)
    resumed = built(seed=1)
    resumed.accelerator.load_state(tmp_path)
    assert torch.equal(train(resumed, 4), losses[2:])
    assert_equal(everything(resumed), everything(whole))


@pytest.mark.parametrize("first", [False, True], ids=["unfused first", "fused first"])
def test_a_checkpoint_goes_from_fused_to_unfused_and_back(tmp_path, first):
    """And both go the same way from there, within what float32 rounds."""
    run = built(fused=first)
    train(run, 1)
    run.accelerator.save_state(tmp_path)
    results = []
    for fused in (False, True):
        run = built(seed=1, fused=fused)
        run.accelerator.load_state(tmp_path)
        results.append((train(run, 2), everything(run)))
    (loss, expected), (other_loss, found) = results
    torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-5)
    assert found.keys() == expected.keys()
    for name in (n for n in expected if n.endswith(("._u", "._v"))):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-3)


def test_the_losses_are_those_of_the_unfused_model():
    """In float64, where rounding does not part them."""
    losses = []
    for fused in (False, True):
        run = built(fused=fused)
        run.generator.double()
        run.discriminator.double()
        real = torch.randn(16, 1, 8, 8, dtype=torch.float64)
        torch.manual_seed(0)
        losses.append(torch.stack([run.step(real) for _ in range(3)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-12)


def test_fused_after_prepare():
    runs = [built(), built(fused=False)]
    runs[1].group = spectral_ext.fuse(runs[1].discriminator)
    losses = []
    for run in runs:
        accelerate.utils.set_seed(0)
        losses.append(train(run, 1))
    assert torch.equal(*losses)


def test_mixed_precision():
    """Accelerate puts a forward of its own into the model: one that is fused is, one later is refused."""
    run = built(mixed_precision="bf16")
    assert run.accelerator.mixed_precision == "bf16"
    assert train(run, 1).isfinite().all()
    assert len(run.group.sigmas) == 5 and run.group.sigmas.dtype == torch.float32
    late = built(mixed_precision="bf16", fused=False)
    with pytest.raises(RuntimeError, match=r"fuse the model before"):
        spectral_ext.fuse(late.discriminator)
