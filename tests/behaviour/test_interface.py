"""What people's models return and take: labels, flags, objects and nothing beside tensors, sequences of any length."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress.callbacks import Export, PostTrainingQuantization
from lightning_compress.callbacks.verdict import TargetMissed
from lightning_compress.deploy.files import try_format
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.interface import axes_to_try, taken_by_file
from lightning_compress.forward import Inputs, run_model, tensors_in

NUM_TOKENS = 20


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """A dataclass that is a dict, too, as those of transformers are."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past: object = None
    states: tuple[Tensor, ...] | None = None
    num_tokens: int = 0
    name: str = "tagger"

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Cache:
    """Holds tensors, and is nothing that anybody knows."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Tagger(pl.LightningModule):
    """Text in, a class for each token out, with whatever else people return."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_TOKENS, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
        mode: str = "tag",
    ) -> Output:
        x = self.embed(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (x * mask.unsqueeze(-1)).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        x = self.mix(x + mean).relu()
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.transpose(1, 2), labels)
        return Output(loss, logits, Cache(x), (x,), input_ids.shape[1])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        assert loss is not None
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        outputs = self(**batch, return_dict=True, mode="tag")
        self.log("val_acc", (outputs.logits.argmax(-1) == batch["labels"]).float().mean())
        self.log("val_loss", outputs.loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def batch_of(size: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, NUM_TOKENS, (size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3}


def loader(num: int = 64) -> Any:
    batch = batch_of(num, 12)
    return DataLoader([{key: x[i] for key, x in batch.items()} for i in range(num)], 16)  # type: ignore[arg-type]


def validated(folder: Path, **options: Any) -> tuple[Tagger, Export]:
    pl.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    model = Tagger()
    pl.Trainer(max_epochs=8, **quiet).fit(model, loader())
    export = Export(["onnx"], **options)
    pl.Trainer(callbacks=[PostTrainingQuantization(), export], **quiet).validate(model, loader(), verbose=False)
    return model, export


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tagger, Export]:
    return validated(tmp_path_factory.mktemp("tagger"), labels=["a", "b", "c"])


def test_labels_flags_and_loss_are_left_out_and_names_are_the_forwards_own(written: tuple[Tagger, Export]) -> None:
    (artifact,) = written[1].artifacts
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    assert [(x.name, x.shape) for x in session.get_inputs()] == [
        ("input_ids", ["batch", "sequence"]),
        ("attention_mask", ["batch", "sequence"]),
    ]
    assert [x.name for x in session.get_outputs()] == ["logits", "states_0"]
    assert artifact.inputs == ["input_ids", "attention_mask"]
    assert artifact.left_out == ["labels", "loss"]


@pytest.mark.parametrize(("size", "length"), [(1, 12), (5, 12), (3, 7), (1, 20)])
def test_the_file_of_a_validation_is_quantized_and_answers_at_any_size_and_length(
    size: int, length: int, written: tuple[Tagger, Export]
) -> None:
    model, export = written
    (artifact,) = export.artifacts
    assert artifact.integers == "uint8"
    assert artifact.integer_kernels == 2
    batch = batch_of(size, length)
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {name: batch[name].numpy() for name in artifact.inputs})[0]
    expected = run_model(model.eval(), Inputs((), batch)).logits
    assert torch.from_numpy(logits).sub(expected).abs().max() <= 0.02 * (expected.max() - expected.min())


def test_a_metric_of_the_loss_that_the_file_does_not_give_is_unknown_and_others_are_compared(
    written: tuple[Tagger, Export],
) -> None:
    _, export = written
    (artifact,) = export.artifacts
    assert export.metrics["onnx"]["val_loss"] != export.metrics["onnx"]["val_loss"]  # NaN
    assert artifact.metric is not None
    assert artifact.metric > 0.9
    assert artifact.deployed_minus_trained == pytest.approx(artifact.metric - export.trained["val_acc"])
    assert artifact.judged["agreement"]["ok"]
    assert artifact.judged["latency_ratio"]["ok"] is None


def test_the_file_says_what_it_is(written: tuple[Tagger, Export]) -> None:
    said = {prop.key: prop.value for prop in onnx.load(written[1].artifacts[0].path).metadata_props}
    assert said["model"] == "Tagger"
    assert said["labels"].split("\n") == ["a", "b", "c"]
    assert said["recipe"] == "PostTrainingQuantization(bits=8)"
    assert said["lightning_compress"]


class Returns(nn.Module):
    """Returns what it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        found: dict[str, Any] = {
            "none": (y, None),
            "none in a dict": {"loss": None, "logits": y},
            "int and string": (y, 7, "seven"),
            "twice": (y, y),
            "input": (y, x),
            "shape": {"logits": y, "size": x.shape[0]},
            "constant": (y, torch.ones(3)),
            "dataclass": Output(logits=y, past=None),
            "nested": {"a": [y, None, {"b": y + 1}], "c": True},
        }
        return found[self.kind]


KINDS = ("none", "none in a dict", "int and string", "twice", "input", "shape", "constant", "dataclass", "nested")


def check_returns(key: str, kind: str, folder: Path) -> None:
    model = Returns(kind).eval()
    inputs = Inputs((torch.randn(4, 4),), {})
    path = folder / f"model{FORMATS[key].suffix}"
    FORMATS[key].export(model, inputs, path, **({} if FORMATS[key].dynamic_batch else {"batch_size": 4}))
    expected = run_model(model, inputs)
    given = FORMATS[key].runner(path, expected)(inputs)
    assert type(given) is type(expected)
    for a, b in zip(tensors_in(given), tensors_in(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_returned_comes_back(kind: str, tmp_path: Path) -> None:
    check_returns("onnx", kind, tmp_path)


@pytest.mark.runtimes
@pytest.mark.parametrize("key", ["openvino", "executorch", "litert", "torch"])
@pytest.mark.parametrize("kind", ["none", "dataclass", "nested"])
def test_whatever_is_returned_comes_back_in_every_runtime(key: str, kind: str, tmp_path: Path) -> None:
    check_returns(key, kind, tmp_path)


class Masked(nn.Linear):
    """Has an argument that may be left out, and changes nothing in this batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = super().forward(x)
        return {"logits": y if mask is None else y * mask, "power": y.square().mean()}


def test_a_mask_of_ones_is_no_label() -> None:
    taken = taken_by_file(Masked(4, 3), Inputs((torch.randn(2, 4),), {"mask": torch.ones(2, 1)}))
    assert taken.labels == ()
    assert taken.outputs == (0, 1)


class Pair(nn.Linear):
    """Returns a pair with labels, and else the logits alone."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = super().forward(x)
        return logits if y is None else (F.cross_entropy(logits, y), logits)


def test_labels_by_place_are_left_out_too() -> None:
    model = Pair(4, 3)
    taken = taken_by_file(model, Inputs((torch.randn(2, 4), torch.tensor([0, 2])), {}))
    assert (taken.labels, taken.outputs, taken.lost) == (("y",), (1,), ("0",))
    assert isinstance(run_model(model, taken.inputs), Tensor)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Conv1d(3, 4, 3), (2, 3, 20), {0: "batch", 2: "sequence"}),
        (nn.LSTM(3, 4, batch_first=True), (2, 9, 3), {0: "batch", 1: "sequence"}),
        (nn.Linear(7, 3), (2, 7), {0: "batch"}),
        (nn.Conv2d(3, 4, 3), (2, 3, 8, 8), {0: "batch"}),
    ],
)
def test_axes_of_sequences_are_open_and_others_are_not(
    model: nn.Module, shape: tuple[int, ...], expected: dict[int, str]
) -> None:
    assert next(iter(axes_to_try(model.eval(), Inputs((torch.randn(shape),), {})))) == (expected,)


class Nothing(nn.Module):
    """Takes an object that nobody knows."""

    def forward(self, x: Cache) -> Tensor:
        return x.keys


def test_a_call_without_a_tensor_is_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"forward is called with \(Cache\), in which there is no tensor. Accepted are"
    ):
        try_format(FORMATS["onnx"], Nothing(), Inputs((Cache(torch.ones(2)),), {}), Path())


def test_a_limit_that_is_missed_is_a_target_that_is_missed(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="Export: target not reached: asked bytes_ratio 0.001, reached"),
        pytest.raises(TargetMissed, match=r"times the bytes of its float twin"),
    ):
        validated(tmp_path, max_bytes_ratio=0.001, strict=True)
    assert (tmp_path / "deploy" / "model.onnx").exists()
