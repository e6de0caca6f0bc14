"""The structure of the source: which room may import which, and constructs that no module may contain.

Each rule yields complaints about one module. The last tests show that each rule can complain.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import fewbits

PACKAGE = Path(fewbits.__file__).parent

# A room is a module or a subpackage of fewbits. It may import only from itself and from the rooms before it.
ROOMS = [
    "errors",
    "_version",
    "_events",
    "_table",
    "_sizes",
    "_heap",
    "numerics",
    "selection",
    "observers",
    "rounding",
    "kernels",
    "nn",
    "calibration",
    "checkpoint",
    "formats",
    "sources",
    "pages",
    "validation",
    "conversion",
    "quantizers",
    "schemes",
    "config",
    "planning",
    "api",
    "fleet",
    "extend",
    "testing",
    "integrations",
    "cli",
    "__main__",
]

DEPENDENCIES = {"torch", "safetensors", "attr", "attrs", "structlog"}
CLI_DEPENDENCIES = {"click", "rich"}
TESTING_DEPENDENCIES = {"hypothesis"}
SCALES = ("fewbits.numerics.scales", "fewbits.numerics.affine")
MAX_PARAMETERS = 7
# Users call these by keyword, and need every setting at hand.
FRONT_DOORS = {
    "fewbits.api.quantize",
    "fewbits.calibration.tuning.tune",
    "fewbits.planning.allocate.allocate",
    "fewbits.formats.loading.load",
    "fewbits.quantizers.scheme.Scheme.__init__",
    "fewbits.selection.selector.LayerSelector.__init__",
}
MAX_ROOT_NAMES = 40
BANNED = ("torch.ao", "torch.nn.utils.parametrize", "torch.qint8", "torch.quint8", "torch.qint32")


parse = functools.cache(ast.parse)


class Module(NamedTuple):
    """A parsed source file: `name` is its dotted name, and `room` the part of it after `fewbits`."""

    name: str
    source: str
    is_package: bool

    @property
    def room(self) -> str:
        return [*self.name.split("."), "__init__"][1]

    @property
    def tree(self) -> ast.Module:
        return parse(self.source)

    def imports(self, tree: ast.AST) -> Iterator[str]:
        """The dotted names a tree imports, resolved: `from ..a import b` gives `fewbits.a.b`."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = self.name.split(".")
                ups = node.level - self.is_package
                base = parts[: len(parts) - ups] if node.level else []
                base += node.module.split(".") if node.module else []
                yield from (".".join([*base, alias.name]) for alias in node.names)


def read(path: Path) -> Module:
    parts = ("fewbits", *path.relative_to(PACKAGE).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    return Module(".".join(parts[:-1] if is_package else parts), path.read_text(encoding="utf-8"), is_package)


MODULES = [read(path) for path in sorted(PACKAGE.rglob("*.py"))]


def imports_only_rooms_below(module: Module) -> Iterator[str]:
    if module.room == "__init__":
        return
    if module.room not in ROOMS:
        yield f"is in an unknown room; place {module.room!r} in ROOMS in {Path(__file__).name}"
        return
    allowed = ROOMS[: ROOMS.index(module.room) + 1]
    for name in module.imports(module.tree):
        top, _, rest = name.partition(".")
        room = rest.split(".")[0]
        if top != "fewbits":
            continue
        if room in ROOMS:
            if room not in allowed:
                yield f"imports {name}, but {module.room} is below {room}"
        elif "." in rest:
            yield f"imports {name} from an unknown room; place {room!r} in ROOMS in {Path(__file__).name}"
        elif module.room not in ("cli", "__main__"):
            yield f"imports {name} from the package root; import it from the module that defines it"


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run on import."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from outside_functions(node)


def imports_only_declared_dependencies(module: Module) -> Iterator[str]:
    def packages(nodes: Iterator[ast.AST]) -> set[str]:
        nodes = (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
        return {name.partition(".")[0] for node in nodes for name in module.imports(node)}

    if module.room != "cli":
        for name in sorted(packages(ast.walk(module.tree)) & CLI_DEPENDENCIES):
            yield f"imports {name}, which only cli may"
    if module.room != "testing":
        for name in sorted(packages(ast.walk(module.tree)) & TESTING_DEPENDENCIES):
            yield f"imports {name}, which only testing may"
    declared = {"fewbits", *sys.stdlib_module_names, *DEPENDENCIES, *CLI_DEPENDENCIES, *TESTING_DEPENDENCIES}
    for name in sorted(packages(outside_functions(module.tree)) - declared):
        yield f"imports {name}, not a dependency, outside a function"


def names_nothing_banned(module: Module) -> Iterator[str]:
    attributes = [ast.unparse(node) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    for name in sorted({*module.imports(module.tree), *attributes}):
        if any(name == banned or name.startswith(f"{banned}.") for banned in BANNED):
            yield f"uses {name}"


def computes_no_scales(module: Module) -> Iterator[str]:
    """Only two modules divide by the range of codes, or multiply with it. The others only shift codes."""
    if module.name in SCALES:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.Mult | ast.FloorDiv | ast.Pow):
            names = {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
            if names & {"code_min", "code_max"}:
                yield f"line {node.lineno}: {ast.unparse(node)} belongs to {' or '.join(SCALES)}"


def has_no_assert(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: assert vanishes under -O; raise an error from fewbits.errors"


def has_no_bare_except(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: name the exceptions that are caught"


def has_no_unfinished_business(module: Module) -> Iterator[str]:
    for number, line in enumerate(module.source.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME)\b", line):
            yield f"line {number}: {line.strip()}"


def has_no_cast(module: Module) -> Iterator[str]:
    """A cast hides that an object is of another type than its interface says."""
    if module.room == "cli":  # rich and click ask for a whole `TextIO`, and only write to it
        return
    for name in module.imports(module.tree):
        if name == "typing.cast":
            yield "imports typing.cast; check the type with isinstance, or change the interface"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "typing.cast":
            yield f"line {node.lineno}: typing.cast; check the type with isinstance, or change the interface"


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a tree with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        inner = f"{prefix}.{node.name}" if isinstance(node, ast.ClassDef | ast.FunctionDef) else prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node
        yield from functions(node, inner)


def has_few_parameters(module: Module) -> Iterator[str]:
    """`self`, `*args` and `**kwargs` do not count; neither do the parameters of a click command, which are options."""
    for name, function in functions(module.tree, module.name):
        arguments = function.args
        parameters = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len(parameters) - (parameters[:1] in (["self"], ["cls"]))
        is_command = any(".command" in ast.unparse(decorator) for decorator in function.decorator_list)
        if count > MAX_PARAMETERS and not is_command and name not in FRONT_DOORS:
            yield f"{name} has {count} parameters, of at most {MAX_PARAMETERS}; group those that travel together"


RULES = [
    imports_only_rooms_below,
    imports_only_declared_dependencies,
    names_nothing_banned,
    computes_no_scales,
    has_no_assert,
    has_no_bare_except,
    has_no_unfinished_business,
    has_no_cast,
    has_few_parameters,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    complaints = [f"{module.name}: {complaint}" for module in MODULES for complaint in rule(module)]
    assert not complaints, "\n".join(complaints)


def test_all_lists_what_the_package_imports():
    root = next(module for module in MODULES if module.name == "fewbits")
    listed = [
        name
        for node in root.tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    ]
    imported = [
        alias.asname or alias.name
        for node in root.tree.body
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("fewbits"))
        for alias in node.names
    ]
    assert sorted(set(listed) - {"__version__"}) == sorted(n for n in imported if not n.startswith("_"))
    assert len(listed) == len(set(listed)) <= MAX_ROOT_NAMES


@pytest.mark.parametrize("from_file", [False, True])
def test_a_conversion_never_calls_back_into_the_quantizer(tmp_path, from_file):
    source = {"weight": torch.ones(64, 128)}
    output = None
    if from_file:
        save_file(source, tmp_path / "in.safetensors")
        source, output = tmp_path / "in.safetensors", fewbits.Output(tmp_path / "out.safetensors", threads=1)
    upwards, calls = [], 0

    def record(frame, event, _):
        nonlocal calls
        caller, callee = room_of(frame.f_back), room_of(frame)
        if event == "call" and caller == "conversion" and callee:
            calls += 1
            if ROOMS.index(callee) > ROOMS.index(caller):
                upwards.append(frame.f_code.co_name)

    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(source)
    sys.setprofile(record)
    try:
        quantizer.convert(output=output)
        quantizer.validate()
    finally:
        sys.setprofile(None)
    assert calls > 20
    assert not upwards


def room_of(frame):
    """The room whose code a frame runs; None for code outside fewbits."""
    path = Path(frame.f_code.co_filename) if frame else PACKAGE.parent
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py") if PACKAGE in path.parents else None


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (imports_only_rooms_below, "fewbits.attic", ""),
        (imports_only_rooms_below, "fewbits.kernels.cpu", "from fewbits.api import quantize"),
        (imports_only_rooms_below, "fewbits.kernels.cpu", "from ..nn import linear"),
        (imports_only_rooms_below, "fewbits.kernels.cpu", "def f():\n    import fewbits.cli"),
        (imports_only_rooms_below, "fewbits.kernels.cpu", "from fewbits.attic.box import x"),
        (imports_only_rooms_below, "fewbits.testing", "import fewbits"),
        (imports_only_rooms_below, "fewbits.testing", "from . import quantize"),
        (imports_only_declared_dependencies, "fewbits.api", "import numpy.linalg"),
        (imports_only_declared_dependencies, "fewbits.api", "def f():\n    import click"),
        (imports_only_declared_dependencies, "fewbits.api", "import hypothesis"),
        (imports_only_declared_dependencies, "fewbits.testing.check", "import pytest"),
        (names_nothing_banned, "fewbits.api", "from torch import ao"),
        (names_nothing_banned, "fewbits.api", "x = torch.ao.quantization.observer"),
        (names_nothing_banned, "fewbits.api", "import torch.nn.utils.parametrize as p"),
        (names_nothing_banned, "fewbits.api", "x.to(torch.qint8)"),
        (computes_no_scales, "fewbits.observers.mine", "scale = x.abs().amax() / spec.code_max"),
        (computes_no_scales, "fewbits.nn.linear", "y = (q - spec.code_min) * scale"),
        (has_no_assert, "fewbits.api", "assert x"),
        (has_no_bare_except, "fewbits.api", "try:\n    f()\nexcept:\n    pass"),
        (has_no_unfinished_business, "fewbits.api", "x = 1  # TODO"),
        (has_no_cast, "fewbits.fleet", "from typing import Any, cast"),
        (has_no_cast, "fewbits.fleet", "import typing\nx = typing.cast(int, y)"),
        (has_few_parameters, "fewbits.numerics.affine", "def f(a, b, c, d, e, f, g, h): pass"),
        (has_few_parameters, "fewbits.fleet", "class C:\n    def f(self, a, b, c, d, *, e, f, g, h): pass"),
        (has_few_parameters, "fewbits.nn.base", "def f():\n    async def g(a, b, c, d, e, f, g, h): pass"),
    ],
)
def test_rule_complains(rule, name, source):
    assert list(rule(Module(name, source, is_package=False)))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fewbits", "from fewbits.cli import main"),
        ("fewbits.cli", "import click\nimport fewbits\nfrom fewbits import quantize"),
        (
            "fewbits.nn.linear",
            "import torch.nn.functional as F\nfrom ..numerics import x\nfrom .base import y",
        ),
        ("fewbits.nn.linear", "from fewbits import numerics"),
        ("fewbits.numerics.tensor", "unsigned = q - spec.code_min"),
        ("fewbits.numerics.scales", "scale = high / spec.code_max"),
        ("fewbits.testing.check", "from hypothesis import given"),
        ("fewbits.integrations.hub", "def f():\n    import transformers"),
        ("fewbits.fleet", "class C:\n    def f(self, a, b, c, d, e, *args, f, g, **kwargs): pass"),
        ("fewbits.api", "def quantize(a, b, c, d, e, f, g, h): pass"),
        ("fewbits.cli", "@group.command()\ndef quantize(a, b, c, d, e, f, g, h): pass"),
        ("fewbits.conversion.encoder", "from fewbits.numerics.quantize import cast"),
    ],
)
def test_rules_allow(name, source):
    module = Module(name, source, is_package=name == "fewbits")
    assert [complaint for rule in RULES for complaint in rule(module)] == []
