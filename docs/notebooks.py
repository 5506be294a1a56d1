"""Shows the notebooks of docs/tutorials on the site: a page of Markdown for each, with the outputs that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put a page in the place of each notebook, which links to it lead to."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            text = page_of(json.loads(Path(str(file.abs_src_path)).read_text()))
            files.remove(file)
            files.append(File.generated(config, file.src_uri.removesuffix("ipynb") + "md", content=text))
    return files


def page_of(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown; links between notebooks are links between their pages."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text.replace(".ipynb)", ".md)"))
        else:
            parts += [_fenced(text, "{.python}"), *(_shown(output) for output in cell["outputs"])]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![The output of the cell](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return _fenced("".join(output.get("text") or data["text/plain"]).rstrip(), "{.text .output}")


def _fenced(text: str, language: str) -> str:
    return f"``` {language}\n{text}\n```"
