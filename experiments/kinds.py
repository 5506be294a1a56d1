"""The kinds of model that people have, from the packages they have them from, each on a task that trains in a minute.

Named like the recipe that is for them. Needs the environment of ``make test-foreign``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experiments.foreign  # noqa: F401  # before anything that imports torchvision

# isort: split
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.forecast import generated
from experiments.tasks import ds_cnn, fsdd, mnist, roll6_mask6

__all__ = ["KINDS", "Batches", "Kind", "Model"]

Metric = Callable[[Tensor, Tensor], Tensor]
Split = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs and targets to train on, inputs and targets to test on


@dataclass(frozen=True)
class Kind:
    """A model and its task.

    Args:
        model: What it is.
        build: Makes the module, whose output is one tensor.
        load: Reads or makes the data.
        loss: Of outputs and targets.
        metric: Mean over a batch, of outputs and targets.
        says: What the metric is.
        steps: Steps of the float training.
        more: Steps in which the recipe compresses.
        batch_size: Examples a step.
        rate: AdamW's rate of the float training; the recipe gets half of it.
        augment: Changes a batch of training inputs.
    """

    model: str
    build: Callable[[], nn.Module]
    load: Callable[[Path], Split]
    loss: Metric
    metric: Metric
    says: str
    steps: int = 600
    more: int = 300
    batch_size: int = 64
    rate: float = 2e-3
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None


class Model(pl.LightningModule):
    """A module and its loss, trained by AdamW with a cosine to zero."""

    def __init__(self, kind: Kind, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.kind, self.rate = net, kind, rate

    def forward(self, x: Tensor) -> Tensor:
        """The net's output."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch of (inputs, targets)."""
        return self.kind.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The metric of a batch."""
        self.log("val_metric", self.kind.metric(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine a step."""
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class Batches:
    """A number of batches drawn from memory, which follow from the seed."""

    def __init__(self, kind: Kind, x: Tensor, y: Tensor, steps: int, seed: int) -> None:
        self.kind, self.x, self.y, self.steps, self.seed = kind, x, y, steps, seed

    def __len__(self) -> int:
        """Number of batches."""
        return self.steps

    def __iter__(self) -> Any:
        """Inputs and targets."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            index = torch.randint(len(self.y), (self.kind.batch_size,), generator=generator)
            x = self.x[index]
            yield (x if self.kind.augment is None else self.kind.augment(x, generator)), self.y[index]


class Output(nn.Module):
    """A model of transformers that gives one of its outputs."""

    def __init__(self, net: nn.Module, output: str, takes: str = "input_ids") -> None:
        super().__init__()
        self.net, self.output, self.takes = net, output, takes

    def forward(self, x: Tensor) -> Tensor:
        """The tensor of that name."""
        return getattr(self.net(**{self.takes: x}), self.output)


class GraphNet(nn.Module):
    """Three graph convolutions over patches of an image, each beside its neighbours, and their mean."""

    near: Tensor
    place: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        from torch_geometric.nn import DenseGraphConv

        at = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"), -1).view(49, 2)
        near = (at[:, None] - at).abs().amax(-1) == 1
        self.register_buffer("near", near.float()[None])
        sizes = [(18, width), (width, width), (width, width)]
        self.layers = nn.ModuleList(DenseGraphConv(a, b, aggr="mean") for a, b in sizes)
        self.register_buffer("place", at[None].float() / 3 - 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits for images of (batch, 1, 28, 28)."""
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)
        x = torch.cat([patches, self.place.expand(patches.shape[0], -1, -1)], -1)
        for layer in self.layers:
            x = layer(x, self.near).relu()
        return self.head(x.mean(1))


def bert() -> nn.Module:
    """Two layers of width 64."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: Any = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    dropout: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 128}
    config = BertConfig(vocab_size=128, max_position_embeddings=32, **sizes, **dropout)
    return Output(BertForSequenceClassification(config), "logits")


def vit() -> nn.Module:
    """Four blocks of width 64, of timm."""
    from timm.models.vision_transformer import VisionTransformer

    sizes: Any = {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 4}
    return VisionTransformer(img_size=28, patch_size=4, in_chans=1, num_classes=10, **sizes)


def llama() -> nn.Module:
    """Two layers of width 96."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=128, tie_word_embeddings=False, use_cache=False, **sizes, **heads)
    return Output(LlamaForCausalLM(config), "logits")


def unet() -> nn.Module:
    """MONAI's, of three levels and 16 to 64 channels."""
    from monai.networks.nets import UNet

    return UNet(2, 1, 2, channels=(16, 32, 64), strides=(2, 2), num_res_units=1)


def forecaster() -> nn.Module:
    """PatchTST of transformers: 96 values give the next 24."""
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    sizes: Any = {"d_model": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    window: Any = {"context_length": 96, "prediction_length": 24, "patch_length": 8, "patch_stride": 8}
    config = PatchTSTConfig(num_input_channels=1, loss="mse", **window, **sizes)
    return Output(PatchTSTForPrediction(config), "prediction_outputs", "past_values")


def _text(folder: Path) -> tuple[Tensor, Tensor]:
    text = torch.tensor(list((folder / "tinyshakespeare.txt").read_bytes()))
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def next_character(folder: Path) -> Split:
    """Thirty-one characters, behind a mark, and the one that follows."""
    found: list[Tensor] = []
    for part, num in zip(_text(folder), (200_000, 4_000), strict=True):
        windows = part.unfold(0, 32, 5 if num > 10_000 else 25)[:num]
        found += [F.pad(windows[:, :-1], (1, 0)), windows[:, -1]]
    return found[0], found[1], found[2], found[3]


def every_character(folder: Path) -> Split:
    """Sixty-four characters, and those that follow each."""
    found: list[Tensor] = []
    for part, num in zip(_text(folder), (100_000, 1_000), strict=True):
        windows = part.unfold(0, 65, 10 if num > 10_000 else 65)[:num]
        found += [windows[:, :-1], windows[:, 1:]]
    return found[0], found[1], found[2], found[3]


def digits(folder: Path) -> Split:
    """MNIST."""
    data = mnist(folder)
    return data.x_train[:, None], data.y_train, data.x_test[:5000, None], data.y_test[:5000]


def strokes(folder: Path) -> Split:
    """MNIST in noise, and where the strokes are."""
    x, _, x_test, _ = digits(folder)
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for part in (x[:20_000], x_test[:1000]):
        found += [part + torch.randn(part.shape, generator=generator), (part[:, 0] > 1).long()]
    return found[0], found[1], found[2], found[3]


def words(folder: Path) -> Split:
    """Spoken digits as cepstral coefficients."""
    data = fsdd(folder)
    return data.x_train, data.y_train, data.x_test, data.y_test


def series(folder: Path) -> Split:
    """Generated: two waves, a slope and autoregressive noise."""
    x = generated(12_000)[..., None]
    return x[:10_000, :96], x[:10_000, 96:], x[10_000:, :96], x[10_000:, 96:]


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """Per cent that is right; classes are the last axis."""
    return 100 * (outputs.argmax(-1) == y).float().mean()


def dice(outputs: Tensor, y: Tensor) -> Tensor:
    """Overlap of what is found and what is there, in per cent."""
    found = outputs.argmax(1)
    return 200 * (found * y).sum() / (found.sum() + y.sum())


def nats(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy; classes are the last axis."""
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


def bits(outputs: Tensor, y: Tensor) -> Tensor:
    """Bits per character."""
    return nats(outputs, y) / 0.6931472


# by recipe
KINDS = {
    "bert": Kind("BERT, transformers", bert, next_character, nats, accuracy, "next character, accuracy"),
    "vit": Kind("ViT, timm", vit, digits, nats, accuracy, "MNIST, accuracy", rate=1e-3),
    "llama": Kind("Llama, transformers", llama, every_character, nats, bits, "text, bits per character", batch_size=16),
    "unet": Kind("UNet, MONAI", unet, strokes, F.cross_entropy, dice, "strokes in noise, Dice", batch_size=32),
    "keyword": Kind(
        "DS-CNN", ds_cnn, words, F.cross_entropy, accuracy, "spoken digits, accuracy", rate=4e-3, augment=roll6_mask6
    ),
    "forecaster": Kind(
        "PatchTST, transformers", forecaster, series, F.mse_loss, F.l1_loss, "series, mean absolute error"
    ),
    "graph": Kind("DenseGraphConv, torch_geometric", GraphNet, digits, nats, accuracy, "MNIST's patches, accuracy"),
}
