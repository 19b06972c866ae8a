"""The GAN demo under Lightning: a run that goes on from its checkpoint, and where a model may be fused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spectral_ext

lightning = pytest.importorskip(
    "lightning", reason="Lightning is not installed: pip install 'spectral-ext[lightning]'"
)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lightning_gan  # noqa: E402
from lightning_gan import DigitsGAN, trainer_of  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # Lightning's and torch's
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch):
    monkeypatch.setattr(lightning_gan, "STEPS", 3)


def fit(model, epochs, out, resume=None):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = trainer_of(epochs, out, accelerator="cpu", **options)
    trainer.fit(model, ckpt_path=resume)
    return trainer


def built(seed=0, cls=DigitsGAN, **arguments):
    torch.manual_seed(seed)
    return cls(batch=16, **arguments)


def everything(trainer):
    """Return all tensors of models and optimizers by name."""
    found = dict(trainer.model.state_dict())
    for i, optimizer in enumerate(trainer.optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i} {key} {name}": value for name, value in state.items()}
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Bit for bit, with fresh objects that began elsewhere."""
    whole = fit(built(), 4, tmp_path / "whole")
    fit(built(), 2, tmp_path / "part")
    resumed = fit(built(seed=1), 4, tmp_path / "rest", tmp_path / "part" / "last.ckpt")
    assert resumed.global_step == whole.global_step == 2 * 4 * 3  # of both optimizers
    assert_equal(everything(resumed), everything(whole))


def test_the_losses_are_those_of_the_unfused_model(tmp_path):
    runs = []
    for fused in (False, True):
        model = built(fused=fused).double()
        trainer = fit(model, 2, tmp_path / str(fused))
        runs.append((everything(trainer), trainer.callback_metrics))
    (expected, losses), (found, logged) = runs
    for name in ("d_loss", "g_loss"):
        assert abs(logged[name] - losses[name]) < 1e-9
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
    sigmas = spectral_ext.group_of(model.discriminator).log_dict()
    assert sigmas and {name: logged[name].item() for name in sigmas} == pytest.approx(sigmas)


@pytest.mark.parametrize("first", [False, True], ids=["unfused first", "fused first"])
def test_a_checkpoint_goes_from_fused_to_unfused_and_back(tmp_path, first):
    fit(built(fused=first).double(), 1, tmp_path / "first")
    saved = tmp_path / "first" / "last.ckpt"
    runs = [
        everything(fit(built(seed=1, fused=f).double(), 2, tmp_path / f"{f}", saved))
        for f in (False, True)
    ]
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-7, atol=1e-9)


class FusedLate(DigitsGAN):
    """Fused where Lightning sets up a model, once or more often."""

    def __init__(self, batch):
        super().__init__(fused=False, batch=batch)

    def configure_model(self):
        if self.group is None:
            self.group = spectral_ext.fuse(self.discriminator)


class FusedWhole(DigitsGAN):
    """The LightningModule itself is the root, whose ``training_step`` enters the group by hand."""

    def __init__(self, batch):
        super().__init__(fused=False, batch=batch)
        self.group = spectral_ext.fuse(self)

    def forward(self, x):
        return self.discriminator(x)

    def training_step(self, number, index):
        with self.group.normalized():
            real, _ = self.draw(number)
            loss = self(real).mean()
        optimizer = self.optimizers()[1]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_fused_in_configure_model(tmp_path):
    expected = everything(fit(built(), 2, tmp_path / "a"))
    assert_equal(everything(fit(built(cls=FusedLate), 2, tmp_path / "b")), expected)


def test_a_lightning_module_as_the_root(tmp_path):
    model = built(cls=FusedWhole)
    before = [p.detach().clone() for p in model.discriminator.parameters()]
    fit(model, 1, tmp_path)
    assert not any(map(torch.equal, before[::2], list(model.discriminator.parameters())[::2]))
    assert isinstance(model, FusedWhole) and isinstance(model.discriminator, nn.Sequential)
