"""The GAN demo under Lightning: a run that goes on from its checkpoint, and where a model may be fused."""

import sys
from pathlib import Path

import pytest
import torch

import spectral_ext

lightning = pytest.importorskip(
    "lightning", reason="Lightning is not installed: pip install 'spectral-ext[lightning]'"
)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lightning_gan  # noqa: E402
from lightning_gan import Digits, DigitsGAN, trainer_of  # noqa: E402

EPOCH, BATCH = 4, 16  # few digits, so that runs end in the middle of an epoch

pytestmark = [
    # Lightning uses what torch's pytree has renamed.
    pytest.mark.filterwarnings("ignore:.*(treespec|LeafSpec):FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
    # Advice that is not for a test: other devices, shorter intervals of logs, checkpoints in other folders.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    # It holds the weights after the step, which is what we want.
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual:UserWarning"),
]


def fit(model, steps, out, resume=None, seed=0, **options):
    """Train on the CPU, and return all that the last checkpoint holds."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = trainer_of(steps, out, save_every=6, accelerator="cpu", **quiet, **options)
    torch.manual_seed(seed + 1)
    digits = Digits(seed, BATCH)
    digits.images = digits.images[: EPOCH * BATCH]
    trainer.fit(model, digits, ckpt_path=resume)
    trainer.save_checkpoint(out / "end.ckpt")
    saved = torch.load(out / "end.ckpt", weights_only=True)
    del saved["callbacks"]  # names and scores of files
    return saved


def built(seed=0, cls=DigitsGAN, **arguments):
    torch.manual_seed(seed)
    return cls(**arguments)


def tensors(tree, path=""):
    """Return all tensors of a checkpoint by path: models, optimizers, random numbers, loader."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    parts = tree if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    items = parts.items() if isinstance(parts, dict) else parts
    return {k: v for key, part in items for k, v in tensors(part, f"{path}/{key}").items()}


def assert_equal(found, expected):
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found, expected):
    """Within what float64 rounds in a few steps of Adam; the random numbers are the same."""
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of ten steps without a stop, and the folder of its one at step six."""
    out = tmp_path_factory.mktemp("whole")
    return fit(built(), 10, out), out


def test_a_checkpoint_holds_all_that_a_run_depends_on(whole):
    names = list(tensors(whole[0]))
    for part in ("_u", "_v", "running_mean", "exp_avg_sq", "/random", "combined_loader/0/random"):
        assert any(name.endswith(part) for name in names), part


@pytest.mark.parametrize("steps", [5, EPOCH], ids=["mid-epoch", "epoch's end"])
def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, steps):
    """Bit for bit, with fresh objects that began elsewhere."""
    part = fit(built(), steps, tmp_path)
    assert not torch.equal(part["random"], whole[0]["random"])
    resumed = fit(built(1), 10, tmp_path / "rest", tmp_path / "end.ckpt", seed=1)
    assert resumed["global_step"] == whole[0]["global_step"] == 2 * 10  # of both optimizers
    assert_equal(resumed, whole[0])


def test_a_checkpoint_that_the_callback_wrote_during_the_run(whole, tmp_path):
    saved = whole[1] / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 2 * 6
    assert_equal(fit(built(1), 10, tmp_path, saved, seed=1), whole[0])


@pytest.mark.parametrize("first", [False, True], ids=["unfused first", "fused first"])
def test_a_checkpoint_goes_from_fused_to_unfused_and_back(tmp_path, first):
    """The unfused runs without a stop, and the one that was fused for a half of it, in float64."""

    def run(
        model, *arguments, **options
    ):  # Lightning loads a checkpoint before it makes a model double
        return fit(model.double(), *arguments, precision="64-true", **options)

    stock = run(unfused(), 6, tmp_path / "stock")
    assert_close(run(built(), 6, tmp_path / "fused"), stock)
    run(built() if first else unfused(), 3, tmp_path / "part")
    other = unfused(1) if first else built(1)
    saved = tmp_path / "part" / "end.ckpt"
    assert_close(run(other, 6, tmp_path / "rest", saved, seed=1), stock)


class Unfused(DigitsGAN):
    """Has no σ to log."""

    def __init__(self):
        super().__init__(fused=False)

    def on_train_epoch_end(self):
        with pytest.raises(ValueError, match="not fused"):
            super().on_train_epoch_end()


def unfused(seed=0):
    return built(seed, Unfused)


class FusedLate(DigitsGAN):
    """Fused where Lightning sets up a model, which it may do more than once."""

    def __init__(self):
        super().__init__(fused=False)
        self.group = None

    def configure_model(self):
        if self.group is None:
            self.group = spectral_ext.fuse(self.discriminator)


def test_fused_in_configure_model(whole, tmp_path):
    """From the start, and with the checkpoint of a model that was fused in ``__init__``."""
    fit(built(cls=FusedLate), 5, tmp_path)
    model = built(1, FusedLate)
    assert_equal(fit(model, 10, tmp_path / "rest", tmp_path / "end.ckpt", seed=1), whole[0])
    assert model.group is spectral_ext.group_of(model.discriminator)
    assert_equal(fit(built(1, FusedLate), 10, tmp_path / "on", whole[1] / "last.ckpt"), whole[0])


class FusedWhole(DigitsGAN):
    """The LightningModule itself is the root; its ``training_step`` is no forward and enters by hand."""

    def __init__(self):
        super().__init__(fused=False)
        self.group = spectral_ext.fuse(self)

    def training_step(self, real):
        with self.group.normalized():
            loss = self.discriminator(real).mean()
        optimizer = self.optimizers()[1]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_train_epoch_end(self):
        self.log_dict(self.group.log_dict())


class OnlyDiscriminator(FusedWhole):
    """The same by the root that Lightning's users mostly fuse."""

    def __init__(self):
        DigitsGAN.__init__(self)
        self.group = spectral_ext.group_of(self.discriminator)

    def training_step(self, real):
        loss = self.discriminator(real).mean()
        optimizer = self.optimizers()[1]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_a_lightning_module_as_the_root(tmp_path):
    found = fit(built(cls=FusedWhole), 3, tmp_path / "a")
    assert_equal(found, fit(built(cls=OnlyDiscriminator), 3, tmp_path / "b"))


@pytest.mark.parametrize("fused", [False, True])
def test_load_from_checkpoint(whole, fused):
    saved = whole[1] / "end.ckpt"
    model = DigitsGAN.load_from_checkpoint(saved, map_location="cpu", fused=fused)
    assert_equal(dict(model.state_dict()), whole[0]["state_dict"])


def test_the_example_logs_sigma_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which it sets: to be undone
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    start = ["--batch-size", "400", "--out", str(tmp_path), "--steps"]
    lightning_gan.main([*start, "3"])
    lightning_gan.main([*start, "5", "--resume", str(tmp_path / "last.ckpt")])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2 * 5
    logged = sorted(tmp_path.rglob("metrics.csv"))
    header = logged[0].read_text().splitlines()[0]
    assert len(logged) == 2 and header.count("spectral_norm/sigma/") == 5
    assert "--resume" in capsys.readouterr().out
