"""Makes the group ``compression``, and nothing else of ours, known to every Hydra application of the environment.

Without it, ``+compression=prune_int8`` in an application that forgot ``hydra.searchpath`` would be taken for a plain
value, and the run would train uncompressed. Hydra imports every module below ``hydra_plugins`` when it starts.
"""

from __future__ import annotations

from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin

_GROUP = "compression"


class RecipeSource(ImportlibResourcesConfigSource):
    """A package's configuration files, of the group ``compression`` alone."""

    @staticmethod
    def scheme() -> str:
        """The prefix of a search path entry."""
        return "recipes"

    def is_group(self, config_path: str) -> bool:
        """Only the one group."""
        return config_path in ("", _GROUP) and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Only its files."""
        return config_path.startswith(f"{_GROUP}/") and super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Only its files."""
        found = super().list(config_path, results_filter)
        return [name for name in found if name == _GROUP] if config_path == "" else found


class RecipeSearchPath(SearchPathPlugin):
    """Appends the recipes, behind everything that the application has itself."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called once an application."""
        search_path.append("lightning_compress", "recipes://lightning_compress.conf")
