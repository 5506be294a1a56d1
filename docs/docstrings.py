"""How the site reads our docstrings: a single example is an example, and roles of Sphinx are code."""

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["AsWritten"]


class AsWritten(Extension):
    """Words of Sphinx in those of mkdocstrings."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of whatever is found."""
        if obj.docstring:
            text = re.sub(r":(?:class|func|meth|mod):`~?\.?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
