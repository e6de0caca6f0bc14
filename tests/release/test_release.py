"""The parts of the release checks that need no package index, and the files that a release has beside the package."""

import re

import pytest

import fewbits
from release import check, environments

ROOT = environments.ROOT


def test_the_version_is_the_same_everywhere():
    assert check.version() == fewbits.__version__
    assert check.changelog_version((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")) == fewbits.__version__
    assert environments.PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", fewbits.__version__)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("# Changelog\n\n## 1.2.3 (unreleased)\n\n### Added\n\n## 1.2.2\n", "1.2.3"),
        ("## [0.1.0rc1] - 2026-01-01\n", "0.1.0rc1"),
        ("# Changelog\n\n### Added\n", "no version"),
    ],
)
def test_the_version_of_a_changelog_is_that_of_its_first_entry(text, version):
    assert check.changelog_version(text) == version


@pytest.fixture
def wheel():
    """The names in a wheel that is as it should be."""
    info = f"fewbits-{fewbits.__version__}.dist-info"
    return [
        *check.package_files(),
        *(f"{info}/{name}" for name in ("METADATA", "entry_points.txt", "licenses/LICENSE")),
    ]


def test_a_wheel_has_the_package_and_nothing_else(wheel):
    assert check.wheel_complaints(wheel) == []
    assert "fewbits/py.typed" in wheel


@pytest.mark.parametrize("missing", ["fewbits/py.typed", "fewbits/cli/help.py", "entry_points.txt", "licenses/LICENSE"])
def test_a_wheel_without_a_file_is_complained_about(wheel, missing):
    [complaint] = check.wheel_complaints(name for name in wheel if not name.endswith(missing))
    assert complaint.startswith("the wheel lacks ")
    assert complaint.endswith(missing)


@pytest.mark.parametrize("added", ["tests/test_api.py", "fewbits/old.py", "benchmarks/__init__.py"])
def test_a_wheel_with_another_file_is_complained_about(wheel, added):
    assert check.wheel_complaints([*wheel, added]) == [f"the wheel has {added}"]


def test_an_sdist_has_all_sources_and_no_product_of_a_build():
    names = [*check.OF_SOURCE, *(f"src/{name}" for name in check.package_files())]
    assert check.sdist_complaints(names) == []
    assert check.sdist_complaints([*names, "build/x.whl"]) == ["the sdist has build/x.whl"]
    assert check.sdist_complaints([name for name in names if name != "LICENSE"]) == ["the sdist lacks LICENSE"]
    assert all((ROOT / name).is_file() for name in check.OF_SOURCE)


def test_the_floors_are_those_of_the_dependencies():
    floors = environments.floors(["cli", "toml"])
    assert {"torch", "safetensors", "attrs", "structlog", "click", "rich", "jinja2", "tomli"} == floors.keys()
    assert all(re.fullmatch(r"\d+(\.\d+)*", version) for version in floors.values())
    table = (
        (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Lower bounds of the dependencies")[2]
    )
    for name, version in re.findall(r"^\| (\w+) \| ([\d.]+) \|", table, re.MULTILINE):
        assert floors[name] == version


def test_the_selection_of_tests_exists():
    from release import dependencies

    assert all((ROOT / test).exists() for test in (*dependencies.TESTS, *check.TESTS))


def test_issue_templates_ask_for_what_they_require():
    yaml = pytest.importorskip("yaml")
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in templates}
    assert forms.keys() == {"bug", "config", "quality-or-speed", "scheme-or-format"}
    for form in (form for name, form in forms.items() if name != "config"):
        assert form["name"]
        assert form["description"]
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in fields)
        assert len({field["id"] for field in fields}) == len(fields)
        assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_security_policy_says_how_to_report_and_names_programs_that_exist():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "Report a vulnerability" in text
    assert "make fuzz" in text
    assert re.search(r"^fuzz:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
