"""Twelve architectures of Hugging Face, small and of random weights, from a LightningModule to a quantized ONNX file.

Each is wrapped in the one LightningModule below, quantized by ``PostTrainingQuantization`` (int8) and written by
``Export`` in one ``trainer.validate``. The file then runs in onnxruntime at two batch sizes and, where its inputs are
sequences that the model takes at any length, at two lengths, and is compared with the quantized model in PyTorch.
Needs transformers, best in an environment of its own: ``pip install 'lightning-compress[onnx]' transformers``.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.training import quiet
from lightning_compress.callbacks import Export, PostTrainingQuantization
from lightning_compress.checks import first_line
from lightning_compress.deploy.interface import taken_by_file
from lightning_compress.deploy.onnx import Runner
from lightning_compress.deploy.verify import Comparison
from lightning_compress.forward import Inputs, run_model

SIZES = (3, 8)
LENGTHS = (16, 11)
_CLASSES = 4
_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "num_labels": _CLASSES}
_BERT = _TEXT | {"intermediate_size": 64, "max_position_embeddings": 64}
_LM = _TEXT | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
_COLUMNS = ("inputs", "outputs", "batch sizes", "lengths", "agreement", "max difference", "deployed minus trained")
_NOT_WRITTEN: dict[str, Any] = {"written": False} | dict.fromkeys((*_COLUMNS, "judged", "integer kernels"), "")
Make = Callable[[Any, int, int], dict[str, Tensor]]


def tokens(config: Any, size: int, length: int) -> dict[str, Tensor]:
    """Token ids with a mask of what is padding, and a class for each text."""
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, length - 3 :] = 0
    return {
        "input_ids": torch.randint(3, config.vocab_size, (size, length)),
        "attention_mask": mask,
        "labels": torch.randint(0, _CLASSES, (size,)),
    }


def next_tokens(config: Any, size: int, length: int) -> dict[str, Tensor]:
    """Token ids that are their own labels."""
    ids = torch.randint(3, config.vocab_size, (size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def encoded(config: Any, size: int, length: int) -> dict[str, Tensor]:
    """Token ids for an encoder, which has no labels."""
    return {key: x for key, x in tokens(config, size, length).items() if key != "labels"}


def images(config: Any, size: int, length: int) -> dict[str, Tensor]:
    """Images with a class each."""
    return {"pixel_values": torch.randn(size, 3, 32, 32), "labels": torch.randint(0, _CLASSES, (size,))}


def spectrograms(config: Any, size: int, length: int) -> dict[str, Tensor]:
    """Mel spectrograms of the one length that Whisper takes."""
    return {"input_features": torch.randn(size, config.num_mel_bins, 2 * config.max_source_positions)}


def waves(config: Any, size: int, length: int) -> dict[str, Tensor]:
    """Waveforms with a class each."""
    return {"input_values": torch.randn(size, 100 * length), "labels": torch.randint(0, _CLASSES, (size,))}


# name: configuration, model, its sizes, its batches
NETS: dict[str, tuple[str, str, dict[str, Any], Make]] = {
    "BERT": ("BertConfig", "BertForSequenceClassification", _BERT, tokens),
    "DistilBERT": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100, "num_labels": _CLASSES},
        tokens,
    ),
    "RoBERTa": ("RobertaConfig", "RobertaForSequenceClassification", _BERT, tokens),
    "ViT": (
        "ViTConfig",
        "ViTForImageClassification",
        {k: v for k, v in _BERT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8},
        images,
    ),
    "ConvNeXt": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 2, "num_labels": _CLASSES},
        images,
    ),
    "ResNet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": _CLASSES},
        images,
    ),
    "T5 encoder": (
        "T5Config",
        "T5EncoderModel",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
        encoded,
    ),
    "Whisper encoder": (
        "WhisperConfig",
        "models.whisper.modeling_whisper.WhisperEncoder",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 16,
            "max_source_positions": 24,
        },
        spectrograms,
    ),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _LM, next_tokens),
    "Qwen": ("Qwen2Config", "Qwen2ForCausalLM", _LM, next_tokens),
    "GPT-2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2},
        next_tokens,
    ),
    "Wav2Vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        {
            **{k: v for k, v in _BERT.items() if k != "max_position_embeddings"},
            "conv_dim": (16, 16),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "classifier_proj_size": 16,
            "num_feat_extract_layers": 2,
        },
        waves,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--net, several times for several."""
    parser.add_argument("--net", choices=list(NETS), action="append", dest="nets", help="all without it")


class Wrapped(pl.LightningModule):
    """Any of them, trained and validated by what it returns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Tensor) -> Any:
        """The net's own outputs."""
        return self.net(**batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The accuracy of what has labels, else the power of the hidden state."""
        outputs = self(**batch)
        if "labels" in batch:
            self.log("val_acc", (outputs.logits.argmax(-1) == batch["labels"]).float().mean())
        else:
            self.log("val_power", outputs.last_hidden_state.square().mean())


def build(name: str) -> tuple[Wrapped, Callable[[int, int], dict[str, Tensor]]]:
    """A net of random weights, and what makes batches of a size and length."""
    import transformers

    config_name, model_name, fields, make = NETS[name]
    config = getattr(transformers, config_name)(**fields)
    config.pad_token_id = 0
    found: Any = transformers
    for part in model_name.split("."):
        found = getattr(found, part)
    net = found(config).eval()
    with torch.no_grad():
        for weight in net.parameters():
            # biases that are zero, and weights near it, would be too easy to compute exactly
            weight += 0.1 * torch.randn_like(weight)
    return Wrapped(net), lambda size, length: make(config, size, length)


def samples(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The samples of a batch."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The row of one architecture."""
    pl.seed_everything(0, verbose=False)
    row: dict[str, Any] = {"net": name} | _NOT_WRITTEN
    model, make = build(name)
    loader: Any = DataLoader(samples(make(48, LENGTHS[0])), 8)  # type: ignore[arg-type]
    export = Export(["onnx"], dirpath=folder / name.replace(" ", "_"))
    with warnings.catch_warnings():
        quiet()
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[PostTrainingQuantization(), export],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.validate(model, loader, verbose=False)
    if not export.artifacts:
        return row | {"judged": export.failures["onnx"]}
    (artifact,) = export.artifacts
    missed = [f"{key} {x['reached']:.3g}" for key, x in artifact.judged.items() if x["ok"] is False]
    return row | {
        "written": True,
        **ran(model, make, Path(artifact.path)),
        "deployed minus trained": artifact.deployed_minus_trained,
        "judged": ", ".join(missed) or "passed",
        "integer kernels": f"{artifact.integer_kernels} of {artifact.num_kernels}",
    }


def ran(model: Wrapped, make: Callable[[int, int], Mapping[str, Tensor]], path: Path) -> dict[str, Any]:
    """The file at all batch sizes and lengths that it takes, against the model."""
    model = model.cpu().eval()
    example = Inputs((), dict(make(SIZES[1], LENGTHS[0])))
    taken = taken_by_file(model, example)
    runner = Runner(path, run_model(model, taken.inputs))
    comparison = Comparison(model, runner, example, taken)
    sizes: set[int] = set()
    lengths: set[int] = set()
    for length in LENGTHS:
        for size in SIZES:
            batch = Inputs((), dict(make(size, length)))
            before = comparison.num_calls
            comparison(**batch.kwargs)
            if comparison.num_calls > before:
                sizes.add(size)
                first = next(iter(batch.kwargs.values()))
                first = next(iter(batch.kwargs.values()))
                lengths.add(first.shape[1 if first.dim() < 3 else -1])
    is_open = any(len(axes) > 1 for axes in runner.open_axes)
    return {
        "inputs": ", ".join(runner.names),
        "outputs": ", ".join(x.name for x in runner.session.get_outputs()),
        "batch sizes": ", ".join(map(str, sorted(sizes))),
        "lengths": ", ".join(map(str, sorted(lengths))) + ("" if is_open else " alone"),
        "agreement": comparison.agreement,
        "max difference": comparison.max_rel_diff,
    }


def run(nets: list[str] | None = None) -> dict[str, Any]:
    """Headline: nets, written, judged well, two batch sizes, two lengths."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in nets or list(NETS):
            try:
                rows.append(measure(name, Path(folder)))
            except Exception as error:  # one that fails is a row, too
                rows.append({"net": name} | _NOT_WRITTEN | {"judged": first_line(error)})
            print(rows[-1], flush=True)
    return {
        "headline": {
            "nets": len(rows),
            "written": sum(row["written"] for row in rows),
            "passed": sum(row["judged"] == "passed" for row in rows),
            "two batch sizes": sum("," in row["batch sizes"] for row in rows),
            "two lengths": sum("," in row["lengths"] for row in rows),
            "labels among the inputs": sum("labels" in row["inputs"] for row in rows),
        },
        "rows": rows,
        "failed": not all(row["written"] for row in rows),
    }
