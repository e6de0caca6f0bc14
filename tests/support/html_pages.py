"""Read a page: rows of its tables, texts of its sections. The parser closes cells and rows as HTML allows."""

from html.parser import HTMLParser
from typing import Any

from fewbits.extend import HtmlPage


class Page(HTMLParser):
    """The parts of a page.

    Attributes:
        tables: rows of texts of each table, heads included, by the id of the table or of the section around it.
        lists: the items of lists, by the id of the section around them.
        sections: the texts of sections, by id.
        elements: every element: its name and attributes.
        scripts: the texts of script elements.
    """

    def __init__(self, page: HtmlPage) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.lists: dict[str, list[str]] = {}
        self.sections: dict[str, str] = {"": ""}
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.scripts: list[str] = []
        self._section = self._table = self._into = ""
        self.feed(page.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = dict(attrs)
        self.elements.append((tag, fields))
        if tag == "section":
            self._section = fields["id"] or ""
            self.sections[self._section] = ""
        elif tag == "table":
            self._table = fields.get("id") or self._section
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
            self._into = "cell"
        elif tag == "li":
            self.lists.setdefault(self._section, []).append("")
            self._into = "item"
        elif tag == "script":
            self.scripts.append("")
            self._into = "script"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "tr", "thead", "tbody", "li", "script"):
            self._into = ""

    def handle_data(self, data: str) -> None:
        if self._into == "script":
            self.scripts[-1] += data
            return
        self.sections[self._section] += data
        if self._into == "cell":
            self.tables[self._table][-1][-1] += data
        elif self._into == "item":
            self.lists[self._section][-1] += data

    @property
    def tensors(self) -> list[list[str]]:
        """The rows of the table of all tensors, without line breaks of the file."""
        return [[cell.removesuffix("\n") for cell in row] for row in self.tables.get("all", [])[1:]]
