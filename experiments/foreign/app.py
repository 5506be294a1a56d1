"""python -m experiments.foreign.app +compression=prune_int8: somebody's own Hydra application."""

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg: DictConfig) -> None:
    """Train as configured; nothing here knows of compression."""
    callbacks = [instantiate(node, _convert_="all") for node in cfg.callbacks.values()]
    instantiate(cfg.trainer)(callbacks=callbacks).fit(instantiate(cfg.model), instantiate(cfg.data))


if __name__ == "__main__":
    main()
