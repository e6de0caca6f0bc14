"""Settings of the site: `make docs` builds it, and every warning is an error.

Pages are Markdown, which GitHub shows as well. Two things are made while the site is built: the page of the command
line, from its own options, and the pages of notebooks, from their JSON.
"""

import json
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

import fewbits
from fewbits import errors, extend, schemes
from fewbits.cli.commands import cli

log = logging.getLogger(__name__)

project = "fewbits"
version = release = fewbits.__version__
copyright = "the fewbits authors, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.mermaid",
]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}

html_theme = "furo"
html_title = "fewbits"
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

# A name in single backticks links to its entry in the reference.
default_role = "py:obj"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_inherit_docstrings = True
napoleon_use_ivar = True
python_maximum_signature_line_length = 100


def _public_names() -> dict[str, str]:
    """Every spelling of a public name, and the one that the reference has.

    An object that several modules export has its entry under the first of these modules.
    """
    names, spellings = {}, {}
    for module in (schemes, extend, errors, fewbits):
        for name in (name for name in vars(module) if not name.startswith("_")):
            value = getattr(module, name)
            if hasattr(value, "__qualname__") and value.__module__.startswith("fewbits"):
                chosen = names.setdefault(id(value), f"{module.__name__}.{name}")
                for spelling in (name, f"{module.__name__}.{name}", f"{value.__module__}.{value.__qualname__}"):
                    spellings[spelling] = chosen
    return spellings


PUBLIC = _public_names()


def notebook_as_markdown(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn the JSON of a notebook into Markdown."""
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        return
    cells = json.loads(source[0])["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    kinds = [cell["cell_type"] for cell in cells]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in zip(texts, kinds, strict=True)]
    parts.insert(1, f"{{download}}`Download this notebook <{path.name}>`, or copy the blocks in order.")
    source[0] = "\n\n".join(parts)


def command_line(app: Sphinx, docname: str, source: list[str]) -> None:
    """Add the help of every command to the page of the command line."""
    if docname == "reference/cli":
        source[0] += "".join(_command(command) for command in cli.commands.values())


def _command(command: click.Command) -> str:
    context = click.Context(command, info_name=f"fewbits {command.name}", terminal_width=100, max_content_width=100)
    return f"\n## fewbits {command.name}\n\n```text\n{command.get_help(context)}\n```\n"


def docstring_is_there(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Warn of an entry of the reference without a docstring."""
    if what in ("module", "class", "exception", "function", "method") and not any(line.strip() for line in lines):
        log.warning("%s has no docstring", name)


def link_to_public_name(app: Sphinx, env: Any, node: Any, content: nodes.TextElement) -> nodes.reference | None:
    """Link a name in a signature or a docstring to the page that has it, however it is spelled there."""
    target = node.get("reftarget", "")
    head = next((head for head in (target, target.rpartition(".")[0]) if head in PUBLIC), None)
    if node.get("refdomain") != "py" or head is None:
        return None
    domain, public = env.get_domain("py"), PUBLIC[head] + target.removeprefix(head)
    found = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)
    if found is None and head == target:
        log.warning("%s is not in the reference", public, location=node)
    return found


def every_public_name_is_there(app: Sphinx, env: Any) -> None:
    """Warn of a public name that no page of the reference has."""
    for missing in sorted({*PUBLIC.values()} - {*env.get_domain("py").objects}):
        log.warning("no page of docs/reference has %s", missing)


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", notebook_as_markdown)
    app.connect("source-read", command_line)
    app.connect("autodoc-process-docstring", docstring_is_there)
    app.connect("missing-reference", link_to_public_name)
    app.connect("env-check-consistency", every_public_name_is_there)
