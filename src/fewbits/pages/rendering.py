"""`HtmlPage`: a page as one HTML file without references to other files, for a browser or a notebook."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import os
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs

from fewbits._table import printable
from fewbits._version import __version__
from fewbits.checkpoint.publishing import check_document, publish_document
from fewbits.errors import ArgumentError
from fewbits.pages.charts import CURVE_SIZE
from fewbits.pages.content import Page, size_in_words

_SUFFIXES = (".html", ".htm")


@attrs.frozen(repr=False)
class HtmlPage:
    """A page. A notebook shows it, if it is the last value of a cell.

    Attributes:
        html: the whole page. It refers to no other file.
    """

    html: str

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Write the page to a file, which appears when it is complete.

        Args:
            path: the file; its name ends in .html or .htm.
            replace: whether to replace an existing file.

        Raises:
            ArgumentError: if the file exists, or its name has another ending.
            CheckpointError: if it cannot be written.
        """
        check_page_path(path, replace=replace)
        publish_document(Path(path), self.html)

    def _repr_html_(self) -> str:
        """Return a frame that isolates the page from the notebook."""
        style = "width:100%;height:42rem;border:1px solid #8884;border-radius:6px"
        return (
            f'<iframe title="fewbits report" sandbox="allow-scripts" style="{style}" srcdoc="{escape(self.html)}">'
            "</iframe>"
        )

    def __repr__(self) -> str:
        return f"HtmlPage({size_in_words(len(self.html.encode()))})"


def check_page_path(path: str | os.PathLike[str], *, replace: bool) -> None:
    """Refuse a file for a page before the page is made.

    Raises:
        ArgumentError: if the file exists, or its name does not end in .html or .htm.
        CheckpointError: if it cannot be written.
    """
    check_document(Path(path), _SUFFIXES, replace=replace)


def load_template() -> Any:
    """Return the template of pages, a `jinja2.Template`.

    Raises:
        ArgumentError: if Jinja2 is not installed.
    """
    try:
        importlib.import_module("jinja2")
    except ModuleNotFoundError:
        raise ArgumentError("a report in HTML needs jinja2: pip install 'fewbits[report]'") from None
    return _compiled()


@functools.cache
def _compiled() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_finalized
    )
    return environment.from_string(_look("report.html"))


def render(page: Page) -> HtmlPage:
    """Render a page. Equal pages give equal bytes.

    Raises:
        ArgumentError: if Jinja2 is not installed.
    """
    template = load_template()
    from markupsafe import Markup

    style, script = _look("report.css"), _look("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = {"style": Markup(style), "script": Markup(script), "script_digest": digest}
    return HtmlPage(template.render(page=page, curve_size=CURVE_SIZE, version=__version__, **shown) + "\n")


def _finalized(value: Any) -> Any:
    """Escape characters of texts that change the direction of writing, end the line, or cannot be encoded."""
    return printable(value) if type(value) is str else value


def _look(name: str) -> str:
    return files("fewbits.pages").joinpath("look", name).read_text(encoding="utf-8")
