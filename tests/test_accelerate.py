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
import accelerate_gan  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate_gan import Run  # noqa: E402

EPOCH, BATCH = 4, 16  # few digits, so that runs end in the middle of an epoch


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate has one configuration for a process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    digits = accelerate_gan.load_digits()
    digits.images = digits.images[: EPOCH * BATCH]
    monkeypatch.setattr(accelerate_gan, "load_digits", lambda: digits)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def built(seed=0, **options):
    accelerate.utils.set_seed(seed)
    return Run(batch=BATCH, cpu=True, **options)


def train(run, steps):
    """Return the losses of a run until so many steps."""
    return torch.stack(list(run.train(steps)))


def everything(run):
    """Return all tensors of models and optimizers, and the random state, by name."""
    found = {"random": torch.get_rng_state()}
    for kind in ("generator", "discriminator"):
        found |= {f"{kind} {k}": v for k, v in getattr(run, kind).state_dict().items()}
    for kind in ("g_optimizer", "d_optimizer"):
        for key, state in getattr(run, kind).state_dict()["state"].items():
            found |= {f"{kind} {key} {name}": value for name, value in state.items()}
    return {name: value.clone() for name, value in found.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found, expected):
    """Within what float64 rounds in a few steps of Adam; the random numbers are the same."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("steps", [5, EPOCH], ids=["mid-epoch", "epoch's end"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, steps):
    """Bit for bit, with fresh objects that began elsewhere; the saved run is not disturbed."""
    whole = built()
    losses = train(whole, 10)
    expected = everything(whole)
    assert any(name.endswith("_u") for name in expected)
    part = built()
    assert torch.equal(train(part, steps), losses[:steps])
    part.accelerator.save_state(tmp_path)
    assert torch.equal(train(part, 10), losses[steps:])
    assert_equal(everything(part), expected)
    resumed = built(1)
    resumed.accelerator.load_state(tmp_path)
    assert torch.equal(train(resumed, 10), losses[steps:])
    assert_equal(everything(resumed), expected)


class Seeing(Run):
    """Keeps the digits that it saw."""

    def train_step(self, real):
        self.__dict__.setdefault("seen", []).append(real)
        return super().train_step(real)


def test_every_epoch_has_an_order_of_its_own():
    accelerate.utils.set_seed(0)
    run = Seeing(batch=BATCH, cpu=True)
    train(run, 2 * EPOCH)
    first, second = torch.cat(run.seen[:EPOCH]), torch.cat(run.seen[EPOCH:])
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(0), second.sum(0))  # of the same digits


@pytest.mark.parametrize("first", [False, True], ids=["unfused first", "fused first"])
def test_a_checkpoint_goes_from_fused_to_unfused_and_back(tmp_path, double, first):
    """The unfused runs without a stop, and the one that was fused for a half of it, in float64."""
    stock, fused = built(fused=False), built()
    losses = []
    for run in (stock, fused):
        accelerate.utils.set_seed(0)
        losses.append(train(run, 6))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-12)
    expected = everything(stock)
    assert_close(everything(fused), expected)
    part = built(fused=first)
    accelerate.utils.set_seed(0)
    train(part, 3)
    part.accelerator.save_state(tmp_path)
    rest = built(1, fused=not first)
    rest.accelerator.load_state(tmp_path)
    torch.testing.assert_close(train(rest, 6), losses[0][3:], rtol=1e-10, atol=1e-12)
    assert_close(everything(rest), expected)


def test_fused_after_prepare(tmp_path):
    """From the start, and before a checkpoint is loaded."""
    whole, late = built(), built(fused=False)
    group = spectral_ext.fuse(late.discriminator)
    accelerate.utils.set_seed(0)
    losses = train(whole, 6)
    expected = everything(whole)
    accelerate.utils.set_seed(0)
    assert torch.equal(train(late, 3), losses[:3])
    assert spectral_ext.group_of(late.discriminator) is group and len(group.sigmas) == 5
    late.accelerator.save_state(tmp_path)
    resumed = built(1, fused=False)
    spectral_ext.fuse(resumed.discriminator)
    resumed.accelerator.load_state(tmp_path)
    assert torch.equal(train(resumed, 6), losses[3:])
    assert_equal(everything(resumed), expected)


def test_mixed_precision():
    """Accelerate puts a forward of its own into the model: one that is fused is, one later is refused."""
    run = built(mixed_precision="bf16")
    assert run.accelerator.mixed_precision == "bf16"
    assert train(run, 2).isfinite().all()
    sigmas = spectral_ext.group_of(run.discriminator).sigmas
    assert len(sigmas) == 5 and sigmas.dtype == torch.float32
    late = built(mixed_precision="bf16", fused=False)
    with pytest.raises(RuntimeError, match=r"fuse the model before"):
        spectral_ext.fuse(late.discriminator)


def test_the_example_prints_sigma_and_goes_on(tmp_path, capsys):
    start = ["--batch-size", str(BATCH), "--out", str(tmp_path), "--steps"]
    accelerate_gan.main([*start, "3"])
    accelerate_gan.main([*start, "5", "--resume", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "step 3: loss" in printed and "step 5: loss" in printed
    assert printed.count("σ from") == 2 and printed.count("--resume") == 2
