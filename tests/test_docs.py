"""Every fenced code block in the documents runs.

The blocks of one document run in order and share a namespace and an empty working directory:

- `python` is executed; the Hub's name of all-MiniLM-L6-v2 is a directory there, so nothing is fetched;
- `console` has its `$ ` lines run by bash, which must exit 0, or N where a line ends in `# exit code N`; a plain
  `fewbits` command runs in this process, which saves the seconds that importing torch takes. Lines below a command are
  what it prints, line by line, apart from progress. `…` in such a line stands for one word of at most 16 characters,
  for what changes from machine to machine; most of the line must be there;
- `json` and `toml` must parse; `text`, `make` and `mermaid` are for reading only, `{eval-rst}` and `{toctree}` are for
  Sphinx; any other language fails.

The code cells of a notebook run in the same way. Links must lead to files and headings that exist.
`test_site.py` builds the site.
"""

import difflib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import click
import pytest

from fewbits.cli import main
from fewbits.cli.commands import cli
from support import interchange
from support.markdown import blocks
from test_architecture import ROOMS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

# Set-up commands, not run here: they need a network or would start the tests again.
NOT_RUN = ("pip install", "python -m pip install", "python -m venv", "git clone", "make", "cd fewbits")

EXIT_CODE = re.compile(r"\s*#\s*exit code (\d+)\s*$")
#: Printed by slow machines only.
PROGRESS = re.compile(r"fewbits: (convert|validate) \d+ %")


def is_not_run(command: str) -> bool:
    """Whether every part of a compound command is a set-up command."""
    parts = re.split(r"&&|\|\||[;|]", command)
    return all(re.match(rf"({'|'.join(NOT_RUN)})(\s|$)", part.strip()) for part in parts)


def run_console(source: str, directory: Path) -> None:
    """Run the `$ ` lines of a console block, and compare what they print; a trailing backslash continues a command."""
    start, *steps = re.split(r"^\$ ", re.sub(r"\\\n(> ?)?", " ", source), flags=re.MULTILINE)
    assert steps, "a console block needs a line that starts with '$ '"
    assert not start.strip(), "a console block begins with a line that starts with '$ '"
    for step in steps:
        command, *printed = step.rstrip("\n").split("\n")
        if is_not_run(command):
            continue
        expected = EXIT_CODE.search(command)
        plain = EXIT_CODE.sub("", command)
        run = run_fewbits if re.fullmatch(r"fewbits [^#|<>&;$`*]+", plain) else run_bash
        code, output = run(plain, directory)
        assert code == int(expected[1] if expected else 0), f"$ {command}\n{output}"
        if printed:
            compare(command, printed, [line for line in output.splitlines() if not PROGRESS.match(line)])


def run_bash(command: str, directory: Path) -> tuple[int, str]:
    """Run a command in bash: its exit code, and what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=directory,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def run_fewbits(command: str, _: Path) -> tuple[int, str]:
    """Run a `fewbits` command in the working directory: its exit code, and what it printed."""
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out:
        patch.setattr(sys, "argv", shlex.split(command))
        with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as end:
            main()
        return end.value.code, out.getvalue()


def compare(command: str, expected: list[str], printed: list[str]) -> None:
    """Compare the lines below a command in a document with the lines that it printed."""
    for line in expected:
        known = len(re.sub(r"[\s…]", "", line))
        assert known >= 10 * line.count("…"), f"$ {command}\n{line!r} leaves out too much"
    patterns = [r"\S{1,16}".join(map(re.escape, line.split("…"))) for line in expected]
    same = len(patterns) == len(printed) and all(map(re.fullmatch, patterns, printed))
    assert same, "\n".join(
        [f"$ {command}", *difflib.unified_diff(expected, printed, "document", "printed", lineterm="")]
    )


def run_document(path: Path, directory: Path) -> None:
    """Run all blocks of a document in `directory`, which is the working directory."""
    namespace = {"__name__": "__main__"}
    for block in blocks(path.read_text(encoding="utf-8")):
        where = f"{path.name}:{block.line}"
        if block.language == "python":
            # The empty lines in front make line numbers in a traceback those of the document.
            exec(compile("\n" * (block.line - 1) + block.source, str(path), "exec"), namespace)
        elif block.language == "console":
            print(where)
            run_console(block.source, directory)
        elif block.language == "json":
            json.loads(block.source)
        elif block.language == "toml":
            tomllib.loads(block.source)
        elif block.language not in ("text", "make", "mermaid", "{eval-rst}", "{toctree}"):
            pytest.fail(f"{where}: a block in {block.language or 'no language'!r} would go unchecked")


@pytest.fixture
def workplace(tmp_path, monkeypatch, minilm_path):
    """An empty working directory in which the Hub's name of all-MiniLM-L6-v2 is a directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sentence-transformers").mkdir()
    (tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(minilm_path.parent)
    return tmp_path


def place(path: Path) -> str:
    """The name of a page in this repository."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_document(path, workplace):
    run_document(path, workplace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=place)
def test_notebook(path, workplace):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["cells"][0]["cell_type"]) == (4, "markdown")
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"cell {number} has outputs: clear them"
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """The links of a page, or of a notebook, to a file or a heading that does not exist."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not link.startswith("https://") and (
            not target.exists() or (anchor and anchor not in (anchors(target) if target.suffix == ".md" else ()))
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", [*DOCUMENTS, *NOTEBOOKS], ids=place)
def test_links_lead_somewhere(path):
    assert not broken_links(path)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](page.md#a-title) [c](https://d.e) `[f](g.md)` [h](#h) [i](j.md)")
    assert broken_links(page) == ["#h", "j.md"]


def test_the_drawings_are_those_of_the_script(tmp_path):
    script = ROOT / "docs" / "images" / "draw.py"
    runpy.run_path(str(script))["main"](tmp_path)
    for picture in tmp_path.iterdir():
        assert picture.read_text(encoding="utf-8") == (script.parent / picture.name).read_text(encoding="utf-8")


def test_every_drawing_has_a_text_for_those_who_cannot_see_it():
    for path in DOCUMENTS:
        assert "![](" not in path.read_text(encoding="utf-8"), place(path)


@pytest.mark.parametrize("command", [cli, *cli.commands.values()], ids=lambda command: command.name)
def test_the_help_of_a_command_has_no_escapes(command):
    assert "\\b" not in command.get_help(click.Context(command))


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_make_targets_exist(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in re.findall(r"(?:`|\$ )make ([a-z-]+)", path.read_text(encoding="utf-8")):
        assert name in targets, f"{path.name} tells readers to run `make {name}`, which the Makefile lacks"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```", AssertionError),
        ("```console\n$ false\n```", AssertionError),
        ("```console\n$ exit 3  # exit code 4\n```", AssertionError),
        ("```console\n$ make test; false\n```", AssertionError),
        ("```console\noutput only\n```", AssertionError),
        ("```console\noutput\n$ true\n```", AssertionError),
        ("```console\n$ echo one\ntwo\n```", AssertionError),
        ("```console\n$ printf 'one\\ntwo'\none\n```", AssertionError),
        ("```console\n$ echo one\none\ntwo\n```", AssertionError),
        ("```console\n$ echo one\n…\n```", AssertionError),
        ("```console\n$ echo the version is 1.0 and a word\nthe version is … a word\n```", AssertionError),
        ("```console\n$ echo abcdefghi$((6 * 7))j\nabc…ghi…\n```", AssertionError),
        ("```json\n{,}\n```", ValueError),
        ("```toml\n=\n```", ValueError),
        ("```rust\n```", pytest.fail.Exception),
        ("```\n```", pytest.fail.Exception),
        ("```python\n", ValueError),
    ],
)
def test_a_wrong_document_fails(text, error, tmp_path):
    (tmp_path / "wrong.md").write_text(text, encoding="utf-8")
    with pytest.raises(error):
        run_document(tmp_path / "wrong.md", tmp_path)


def test_a_right_document_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """\
1. A block in a list:

   ```python
   from pathlib import Path
   Path("made").touch()
   ```

```console
$ ls \\
    made
made
$ exit 3  # exit code 3
$ echo written by version $((6 * 7)) here; echo fewbits: convert 7 %
written by version … here
$ git clone somewhere && make test
```
"""
    (tmp_path / "right.md").write_text(text, encoding="utf-8")
    run_document(tmp_path / "right.md", tmp_path)


def test_the_diagram_of_rooms_has_every_room_once():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    diagram = next(block.source for block in blocks(text) if block.language == "mermaid")
    names = [name for label in re.findall(r'\["([^<]*)<br>', diagram) for name in label.split(", ")]
    assert sorted(names) == sorted({*ROOMS} - {"_version", "__main__"})


def test_the_files_that_the_pages_for_developers_name_exist():
    for page in ("CONTRIBUTING.md", "docs/design.md", "tests/README.md"):
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        named = set(re.findall(r"`([\w./]+(?:/|\.py|\.md))`", text))
        assert named
        places = (ROOT, ROOT / "src" / "fewbits", ROOT / "tests", ROOT / "docs")
        missing = {name for name in named if not any((place / name).exists() for place in places)}
        assert not missing, f"{page} names {sorted(missing)}"


def test_each_row_of_the_table_of_formats_names_packages_and_tests_that_exist():
    found = list(interchange.rows(interchange.DOCUMENT.read_text(encoding="utf-8")))
    assert len(found) > 15
    for row in found:
        assert len(row.cells) == 5, row.cells
        assert all(re.fullmatch(r"[\w-]+ [\d.]+", entry) for entry in row.cells[2].split(", ")), row.cells[2]
        for test in row.tests:
            path, _, name = test.partition("::")
            text = (interchange.TESTS / path).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}" in text, f"{test} does not exist"


def test_the_versions_of_a_row_are_those_its_tests_passed_with(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    row = "| {} | reads | pytest 1.0, attrs 2.0 | it works | `{}` |"
    page.write_text("\n".join([interchange.HEADER, "|---|", row.format("good", "a"), row.format("bad", "b"), ""]))
    monkeypatch.setattr(interchange, "DOCUMENT", page)
    monkeypatch.setattr(interchange, "ran", lambda tests: "passed" if tests == ["a"] else "failed")
    assert interchange.main() == 1
    good, bad = page.read_text().splitlines()[2:]
    assert f"pytest {pytest.__version__}" in good
    assert bad == row.format("bad", "b")
    assert capsys.readouterr().out == "passed: good\nfailed: bad\n"
