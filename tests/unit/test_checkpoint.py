"""A compressed LightningModule from its checkpoint, without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import Phase, int8, load_from_checkpoint
from lightning_compress.callbacks import GradualPruning, QuantizationAwareTraining
from lightning_compress.checkpoint import check_structure
from lightning_compress.quantization import Affine, Scheme
from lightning_compress.quantization.model import quantization_of

from .helpers import noise, run


class Module(pl.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(noise(32, 6), 4)


class Mine(Affine):
    """A quantizer of a user's own."""


def train(folder: Path, callbacks: list[pl.Callback], **kwargs: Any) -> tuple[Module, Path]:
    model = Module(**kwargs)
    trainer = pl.Trainer(
        max_steps=8,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(model)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model.eval(), folder / "last.ckpt"


def compressing(scheme: Scheme | None = None) -> list[pl.Callback]:
    return [
        GradualPruning(0.5, phase=Phase(0.0, 0.25)),
        QuantizationAwareTraining(scheme, Phase(0.25, 0.5), Phase(0.5, 1)),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, Path]:
    return train(tmp_path_factory.mktemp("trained"), compressing(int8(exclude=["net.3"])), width=10)


def test_a_loaded_model_computes_bit_for_bit_what_was_trained(trained: Any) -> None:
    model, path = trained
    loaded = load_from_checkpoint(Module, path).eval()
    x = noise(9, 6, seed=5)
    assert torch.equal(run(loaded, x), run(model, x))
    assert quantization_of(loaded).enabled
    assert [layer.name for layer in quantization_of(loaded).layers] == ["net.0"]
    plain = Module.load_from_checkpoint(path).eval()
    assert not torch.equal(run(plain, x), run(model, x))


def test_a_loaded_model_is_as_sparse_as_it_was_trained(trained: Any) -> None:
    loaded = load_from_checkpoint(Module, trained[1])
    weights = torch.cat([p.detach().flatten() for p in loaded.parameters() if p.dim() == 2])
    assert float((weights == 0).float().mean()) == 0.5


def test_arguments_reach_the_class(trained: Any) -> None:
    assert load_from_checkpoint(Module, trained[1]).hparams.width == 10
    with pytest.raises(ValueError, match=r"last.ckpt' does not fit Module.*\n?.*size mismatch"):
        load_from_checkpoint(Module, trained[1], width=4)


def test_a_checkpoint_without_compression_loads_as_it_is(tmp_path: Path) -> None:
    model, path = train(tmp_path, [])
    loaded = load_from_checkpoint(Module, path).eval()
    assert quantization_of(loaded) is None
    assert torch.equal(run(loaded, noise(4, 6)), run(model, noise(4, 6)))


def test_a_quantizer_of_ones_own_is_given_again_by_hand(tmp_path: Path) -> None:
    scheme = Scheme(weight=Mine(4, symmetric=True))
    model, path = train(tmp_path, compressing(scheme))
    with pytest.raises(ValueError, match="Mine, a class of your own"):
        load_from_checkpoint(Module, path)
    loaded = load_from_checkpoint(Module, path, scheme=scheme).eval()
    assert torch.equal(run(loaded, noise(4, 6)), run(model, noise(4, 6)))


def test_a_checkpoint_that_quantizes_other_modules_is_refused(trained: Any, tmp_path: Path) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    checkpoint["callbacks"]["QuantizationAwareTraining"]["quantization"]["placement"]["outputs"].append("tail")
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="modules that this model does not have: tail"):
        load_from_checkpoint(Module, tmp_path / "other.ckpt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        load_from_checkpoint(Module, tmp_path / "nowhere.ckpt")


def test_weights_that_fit_are_accepted() -> None:
    check_structure(nn.Linear(3, 2), nn.Linear(3, 2).state_dict())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(4, 2), r"weight is \(2, 4\) there and \(2, 3\) here"),
        (nn.Linear(3, 2, bias=False), r"1 missing there \(bias\)"),
        (nn.Sequential(nn.Linear(3, 2)), r"2 unknown here \(0\.weight, 0\.bias\)"),
    ],
)
def test_weights_of_another_structure_are_refused_and_the_difference_is_named(other: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_structure(nn.Linear(3, 2), other.state_dict())


def test_names_may_differ_where_that_is_asked_for_but_shapes_may_not() -> None:
    check_structure(nn.Linear(3, 2), nn.Linear(3, 2, bias=False).state_dict(), strict=False)
    with pytest.raises(ValueError, match="there and"):
        check_structure(nn.Linear(3, 2), nn.Linear(4, 2).state_dict(), strict=False)


def test_many_differences_are_counted() -> None:
    with pytest.raises(ValueError, match=r"8 missing there \(0\.weight, 0\.bias, 1\.weight and 5 more\)"):
        check_structure(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), {})


class LoadsItself(Module):
    """As chemprop's: it says by itself how objects are read, and takes no other word on it."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any) -> Any:
        return super().load_from_checkpoint(checkpoint_path, map_location, weights_only=False, **kwargs)


def test_a_class_that_loads_in_its_own_way_is_not_told_twice(tmp_path: Path) -> None:
    model, path = train(tmp_path, [GradualPruning(0.5, phase=Phase(0.1, 0.6))])
    for options in ({}, {"weights_only": False}, {"weights_only": False, "map_location": "cpu"}):
        loaded = load_from_checkpoint(LoadsItself, path, **options).eval()
        assert torch.equal(run(loaded, noise(4, 6)), run(model, noise(4, 6)))
