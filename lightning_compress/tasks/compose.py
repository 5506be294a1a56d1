"""The objects that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_compress.checks import check_flag
from lightning_compress.files import check_folder
from lightning_compress.targets import check_arguments, check_exists, targets

__all__ = ["build", "build_all", "check", "check_fields", "check_targets", "start"]


def build(node: object, **options: object) -> Any:
    """The object that a configuration node names by ``_target_``; the only place that instantiates."""
    return hydra.utils.instantiate(node, _convert_="all", **options)


def build_all(group: DictConfig | None) -> list[Any]:
    """The objects of a group; what is null in it is left out."""
    return [build(node) for node in (group or {}).values() if node]


def start(cfg: DictConfig, callbacks: list[Any], loggers: object, **options: object) -> tuple[Any, Any, Any]:
    """A Trainer, and the model as it starts: from scratch by the seed, or from the weights of a checkpoint."""
    import lightning.pytorch as pl

    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    model = build(cfg.model)
    data = build(cfg.data)
    if cfg.init_from is not None:
        _init(model, cfg)
    trainer = build(cfg.trainer, _partial_=True)(callbacks=callbacks, logger=loggers, **options)
    return trainer, model, data


def _init(model: Any, cfg: DictConfig) -> None:
    """Load the weights of ``cfg.init_from``, and say what was done to them."""
    from lightning.pytorch.utilities import rank_zero_info

    from lightning_compress.checkpoint import check_structure
    from lightning_compress.weights import read_weights, that_fit

    of = f"init_from={str(cfg.init_from)!r}"
    weights, renamed = read_weights("init_from", cfg.init_from, model, cfg.weights_only)
    if not cfg.init_strict:
        weights, left = that_fit(of, model, weights)
        renamed = "; ".join(said for said in (renamed, left) if said)
    check_structure(model, weights, strict=cfg.init_strict, of=of)
    model.load_state_dict(weights, strict=cfg.init_strict)
    if renamed:
        rank_zero_info(f"{of}: {renamed}")


def check(cfg: DictConfig) -> None:
    """Refuse a configuration that would train something else than asked for, or whose results had no place.

    Raises:
        ValueError: Like :func:`check_fields`, or if a class does not take what it is given, or the folder of the run
            cannot be written to.
        FileNotFoundError: If a checkpoint does not exist.
    """
    check_fields(cfg)
    check_folder("dir", cfg.dir, cfg.dir)
    nodes = {field: cfg[field] for field in ("model", "data", "trainer")}
    for field in ("compression", "callbacks", "logger"):
        nodes.update({f"{field}.{name}": node for name, node in (cfg[field] or {}).items()})
    for place, node in nodes.items():
        if isinstance(node, DictConfig) and "_target_" in node:
            plain: Any = OmegaConf.to_container(node)
            check_arguments(place, plain)


def check_fields(cfg: DictConfig) -> None:
    """The part of :func:`check` that imports nothing and asks for no folder.

    Raises:
        ValueError: If compression is not a group of callbacks, model or data name no class, or a class is not there.
        FileNotFoundError: If a checkpoint does not exist.
    """
    if cfg.compression is not None and not isinstance(cfg.compression, DictConfig):
        raise ValueError(
            f"compression={cfg.compression!r} is a plain value: its configuration group was not found, and the run "
            "would train uncompressed. Add hydra.searchpath=[pkg://lightning_compress.conf], or name a recipe: "
            "magnitude, int8, prune_int8, finetune."
        )
    for field in ("model", "data"):
        if cfg[field] is None or OmegaConf.is_missing(cfg[field], "_target_"):
            raise ValueError(
                f"{field} names no class. Give {field}._target_=your.module.Class, or an experiment such as "
                "experiment=mnist_prune_int8."
            )
    check_flag("init_strict", cfg.init_strict)
    if cfg.weights_only is not None:
        check_flag("weights_only", cfg.weights_only, ", or null for that of torch.load")
    for field in ("init_from", "ckpt_path"):
        if cfg[field] is not None and not Path(cfg[field]).is_file():
            raise FileNotFoundError(
                f"{field}={cfg[field]!r}: there is no such checkpoint. Give the path of a .ckpt file."
            )
    check_targets(cfg)


def check_targets(cfg: DictConfig) -> None:
    """Refuse classes that are not there, without importing those that are.

    Raises:
        ValueError: If a ``_target_`` names none.
    """
    for place, target in targets(OmegaConf.to_container(cfg)):
        if not place.startswith("hydra.") and "${" not in target and target != "???":
            check_exists(place, target)
