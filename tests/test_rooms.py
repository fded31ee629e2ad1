"""The layout is enforced: a room imports only from rooms below it, and importing does nothing.

The order is that of ``ROOMS``; CONTRIBUTING.md says what each room is for.
"""

import ast
import subprocess
import sys

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "tlora_mlx"
# From the bottom up. A name is a folder, or a module directly in the package.
ROOMS = (
    "version",
    "errors",
    "invocation",
    "observer",
    "storage",
    "distributed",
    "models",
    "method",
    "data",
    "config",
    "runs",
    "adapters",
    "evaluation",
    "reporting",
    "training",
    "merging",
    "publishing",
    "terminal",
    "api",
    "cli",
)
DOORS = (
    "completion",
    "__main__",
    "check",
    "train",
    "plan",
    "export",
    "upload",
    "inspect",
    "generate",
    "chat",
    "serve",
    "evaluate",
    "report",
)


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """The package's own modules that a module imports, early or late, for types or for use."""
    known = {name_of(module) for module in modules()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else node.module


def room_of(module):
    return module.split(".")[1]


def test_every_module_is_in_a_room():
    assert {room_of(name_of(path)) for path in modules()} == {*ROOMS, *DOORS}
    assert {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"} <= {*ROOMS, *DOORS}


def test_no_room_imports_from_a_higher_one():
    height = {room: floor for floor, room in enumerate((*ROOMS, *DOORS))}
    found = [
        f"{name_of(path)} imports {other}"
        for path in modules()
        for other in imports_of(path)
        if height[room_of(other)] > height[room_of(name_of(path))]
        or (room_of(other) in DOORS and room_of(other) != room_of(name_of(path)))
    ]
    assert not found, "\n".join(found)


def test_there_are_no_circular_imports():
    arrows = {name_of(path): set(imports_of(path)) - {name_of(path)} for path in modules()}
    left = dict(arrows)
    while ground := [name for name, below in left.items() if not below & left.keys()]:
        for name in ground:
            del left[name]
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_length(path):
    """300 lines at most, unless the docstring says why; a door has fewer than 60."""
    text = path.read_text()
    lines = len(text.splitlines())
    if path.stem in DOORS and path.parent == PACKAGE:
        assert lines < 60
    elif lines > 300:
        assert "300 lines" in ast.get_docstring(ast.parse(text)), f"{lines} lines"


def test_one_name_has_one_meaning():
    """No two public classes or functions of one name, and no two modules but those of doors."""
    places = {}
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name_of(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}
    stems = {}
    for path in modules():
        if path.name != "__init__.py" and path.parent != PACKAGE:
            stems.setdefault(path.stem, []).append(name_of(path))
    assert not {stem: found for stem, found in stems.items() if len(found) > 1}


def test_only_adapter_formats_know_their_names():
    """No comparison with a format's name: a format is an object, or a row of a table."""
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                for side in (node.left, *node.comparators):
                    name = getattr(side, "attr", getattr(side, "id", None))
                    if name in ("format", "source"):
                        found.append(f"{name_of(path)}, line {node.lineno}")
    assert not found


def test_no_room_prints():
    """Rooms return values and notify observers; only the doors and the terminal print."""
    found = []
    for path in modules():
        if path.parent == PACKAGE or name_of(path).startswith("tlora_mlx.distributed"):
            continue  # doors, terminal, cli; a process that is ended from outside says why itself
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print":
                found.append(f"{name_of(path)}, line {node.lineno}")
    assert not found


def test_importing_starts_no_communication_and_reads_no_file():
    """Importing every module forms no process group and reads none of our files."""
    names = [name_of(path) for path in modules()]
    code = f"""
import builtins, importlib, sys
import mlx.core as mx
formed, read = [], []
init, plain_open = mx.distributed.init, builtins.open
mx.distributed.init = lambda *a, **k: (formed.append(1), init(*a, **k))[1]
for late in ("numpy", "mlx_lm.generate", "transformers", "huggingface_hub", "rich.progress",
             "rich.table", "jinja2", "tenacity", "yaml", "safetensors", "mlx_lm.tuner.datasets"):
    importlib.import_module(late)
sys.addaudithook(lambda event, arguments: read.append(arguments[0]) if event == "open" else None)
for name in {names}:
    importlib.import_module(name)
code = (".py", ".pyc", ".so", ".json", ".txt", ".pyi")
ours = [path for path in map(str, read) if "tlora_mlx" in path and not path.endswith(code)]
print(formed, [path for path in ours if "." in path.rsplit("/", 1)[-1]])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["[] []"], result.stdout + result.stderr
