"""LoRA on a small language model whose frozen base is of 4 or 8 bits, or half of it zeros.

A Llama of four layers learns the characters of tinyshakespeare; then adapters of rank 8 (peft; Hu 2021,
arXiv:2106.09685) on all linear layers learn source code of Python's standard library, each variant from the same base,
in the same steps on the same batches. Bits per character of source code that no training saw: with adapters beside
their base, and after ``merge_and_unload``, of which the weights are quantized anew; each in PyTorch and from the .onnx
file in onnxruntime.

Needs the environment of ``make test-foreign``.
"""

from __future__ import annotations

import argparse
import copy
import math
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import experiments.foreign  # noqa: F401  # before anything that imports torchvision

# isort: split
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.tasks import data_folder
from experiments.training import kept, quiet
from lightning_compress import Phase, Scheme, w4_groups, w8
from lightning_compress.callbacks import GradualPruning, PostTrainingQuantization, QuantizationAwareTraining
from lightning_compress.deploy.files import Pair, write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.size import weigh
from lightning_compress.forward import Inputs

LENGTH, BATCH, NUM_TEST = 64, 16, 128
_BASE = ("*.base_layer",)
# layers of the merged model, without the output layer, which has no adapter
_MERGED = ("*_proj",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --folder, --base-steps, --steps, --seeds."""
    parser.add_argument("--data", type=Path, help="folder of tinyshakespeare.txt")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the trained base")
    parser.add_argument("--base-steps", type=int, default=600, help="steps of 16 x 64 characters that the base learns")
    parser.add_argument("--steps", type=int, default=150, help="steps that the adapters learn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variant", choices=list(VARIANTS), action="append", dest="variants", help="all without it")


class Windows:
    """Batches of windows that begin anywhere in a text.

    Args:
        text: Codes of characters.
        steps: Number of batches.
        seed: Seed of where they begin.
    """

    def __init__(self, text: Tensor, steps: int, seed: int) -> None:
        self.text, self.steps, self.seed = text, steps, seed

    def __len__(self) -> int:
        """Number of batches."""
        return self.steps

    def __iter__(self) -> Any:
        """Windows of one character more than is read."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            first = torch.randint(len(self.text) - LENGTH - 1, (BATCH, 1), generator=generator)
            yield self.text[first + torch.arange(LENGTH + 1)]


class Characters(pl.LightningModule):
    """A language model of characters.

    Args:
        net: A causal model of transformers.
        learning_rate: Rate at the start, which a cosine leads to 0.
    """

    def __init__(self, net: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.net, self.learning_rate = net, learning_rate

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next character: batch, length, 128."""
        return self.net(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of the next character."""
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The same, for a calibration."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        """AdamW of what is trained."""
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def quantized(scheme: Scheme) -> Callable[[], list[pl.Callback]]:
    """The base is quantized nearly from the start, and the adapters are trained through it."""
    narrow = replace(scheme, include=_BASE)
    return lambda: [QuantizationAwareTraining(narrow, Phase(0.0, 0.02), Phase(0.02, 1.0))]


# by name: callbacks of the training, and the scheme of the base, if it is quantized
VARIANTS: dict[str, tuple[Callable[[], list[pl.Callback]], Scheme | None, bool]] = {
    "float base": (list, None, False),
    "8 bits, trained through": (quantized(w8()), w8(), False),
    "4-bit groups, trained through": (quantized(w4_groups(32)), w4_groups(32), False),
    "4-bit groups, quantized afterwards": (list, w4_groups(32), True),
    "half of the base zero": (lambda: [GradualPruning(0.5, phase=Phase(0.0, 0.0), include=_BASE)], None, False),
}


def llama() -> nn.Module:
    """786,000 weights in four layers of width 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: Any = {"attn_implementation": "eager"}
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        **options,
    )
    return LlamaForCausalLM(config)


def adapted(base: nn.Module) -> nn.Module:
    """The base, frozen, with adapters on all of its linear layers but the output."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=names))


def codes(text: str) -> Tensor:
    """ASCII codes; 63, a question mark, for everything else."""
    return torch.tensor(list(text.encode("ascii", "replace")))


def source_code() -> str:
    """The modules of Python's standard library in their order, a megabyte or so."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)[:2_000_000]


def run_once(model: Characters, callbacks: list[pl.Callback], batches: Windows, trains: bool = True) -> None:
    """A run, or a calibration that trains nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=callbacks,
            limit_val_batches=4,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            gradient_clip_val=1.0,
        )
        if trains:
            trainer.fit(model, batches)
        else:
            trainer.validate(model, batches, verbose=False)
    model.eval()


@torch.no_grad()
def bits(call: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """Bits per character of the windows."""
    found = [F.cross_entropy(call(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()) for x in windows.split(BATCH)]
    return float(torch.stack(found).mean()) / math.log(2)


def of_file(model: Characters, windows: Tensor) -> tuple[float, float]:
    """Bits per character and kilobytes of the .onnx file."""
    kind = FORMATS["onnx"]
    example = Inputs((windows[:BATCH, :-1].contiguous(),), {})
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(kind, model, example, Path(folder) / "model.onnx", (1,))
        pair = Pair(kind, files, model, example)
        return bits(lambda x: pair.shipped(Inputs((x.contiguous(),), {})), windows), weigh(files.shipped[1])[0] / 1e3


def measure(name: str, base: nn.Module, text: Tensor, windows: Tensor, steps: int, seed: int) -> dict[str, float]:
    """One variant and seed."""
    make, scheme, afterwards = VARIANTS[name]
    pl.seed_everything(seed, verbose=False)
    model = Characters(adapted(base), 3e-3)
    callbacks = make()
    run_once(model, callbacks, Windows(text, steps, seed))
    if afterwards and scheme is not None:
        run_once(model, [PostTrainingQuantization(replace(scheme, include=_BASE))], Windows(text, 4, 0), trains=False)
    found = {"beside": bits(model, windows)}
    found["beside, file"], found["beside, KB"] = of_file(model, windows)
    beside: Any = model.net
    model.net = beside.merge_and_unload()
    for callback in callbacks:
        if isinstance(callback, GradualPruning) and callback.masks is not None:
            callback.masks.apply()
    if scheme is not None:
        again = PostTrainingQuantization(replace(scheme, include=_MERGED))
        run_once(model, [again], Windows(text, 4, 0), trains=False)
    found["merged"] = bits(model, windows)
    found["merged, file"], found["merged, KB"] = of_file(model, windows)
    print(name, seed, found, flush=True)
    return found


def run(  # the options of the command
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
    base_steps: int = 600,
    steps: int = 150,
    seeds: int = 3,
    variants: list[str] | None = None,
) -> dict[str, Any]:
    """Headline: bits per character of the file of adapters beside a float base, and beside one of 4 bits."""
    quiet()
    folder.mkdir(parents=True, exist_ok=True)
    shakespeare = codes((data_folder(data) / "tinyshakespeare.txt").read_text())
    code = codes(source_code())
    text, rest = code[: len(code) * 9 // 10], code[len(code) * 9 // 10 :]
    windows = torch.stack([rest[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(NUM_TEST)])
    pl.seed_everything(0, verbose=False)
    learn = Windows(shakespeare, base_steps, 0)
    base = kept(folder / f"llama-{base_steps}.pt", llama, lambda net: run_once(Characters(net, 3e-3), [], learn)).eval()
    print("base, before adapters", bits(Characters(base, 0.0), windows), flush=True)
    rows = []
    for name in variants or VARIANTS:
        found = [measure(name, base, text, windows, steps, seed) for seed in range(seeds)]
        means = {key: mean(run[key] for run in found) for key in found[0]}
        spread = stdev(run["beside, file"] for run in found) if seeds > 1 else math.nan
        rows.append({"base": name, **means, "sd of beside, file": spread})
    by_name = {row["base"]: row for row in rows}
    names = {"float": "float base", "four_bits": "4-bit groups, trained through"}
    headline = {key: by_name[name]["beside, file"] for key, name in names.items() if name in by_name}
    return {"headline": headline, "rows": rows}
