"""Which room may import which, and what must not load before it is used."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "visrec_nb"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}

# What the modules of a room may import besides their own room. vision and recsys meet in none of each other's modules.
BELOW_VISION = {"core", "media", "data"}
BELOW_SERVE = BELOW_VISION | {"vision", "recsys"}
ARROWS = {
    "core": set(),
    "media": {"core"},
    "data": {"core", "media"},
    "vision": BELOW_VISION,
    "recsys": BELOW_VISION,
    "serve": BELOW_SERVE,
    "scale": BELOW_SERVE,
    "widgets": BELOW_SERVE,
    "reports": BELOW_SERVE | {"serve"},
    "cli": BELOW_SERVE | {"serve", "scale", "widgets", "reports"},
}
# (module, room) -> why this one import goes against the arrows.
EXCEPTIONS: dict[tuple[str, str], str] = {}

HEAVY = ("torch", "torchvision", "fastai", "timm", "implicit", "polars", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "PIL", "av",
         "onnxruntime", "papermill", "nbconvert", "IPython")
TRAINING = {"torch", "torchvision", "fastai", "timm"}
# What a server of bundles loads, besides everything in the room serve.
SERVED = [f"{PACKAGE}.vision.predictor", f"{PACKAGE}.vision.encoder", f"{PACKAGE}.vision.store", f"{PACKAGE}.recsys.base"]


def room(module: str) -> str:
    "`visrec_nb.core.files` is in the room core; the package itself is in none."
    return (module.split(".") + [""])[1]


def imported(module: str, path: Path) -> Iterator[tuple[str, int]]:
    "Full names of all that a module imports, anywhere in it, with the line."
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(filter(None, [*parts[: len(parts) - node.level + 1], base]))
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "require"):
                yield node.args[0].value, node.lineno


def modules_after(code: str) -> set[str]:
    "Top-level names in sys.modules of a fresh interpreter that has run `code`."
    code += "\nimport sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_every_room_has_its_arrows():
    assert {room(module) for module in MODULES} - {"", "_modidx"} <= set(ARROWS)


def test_imports_follow_the_arrows():
    against = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        for name, line in imported(module, path)
        if name.partition(".")[0] == PACKAGE
        and (target := room(name)) in ARROWS  # visrec_nb.__version__ and the like are in no room
        and target != room(module)
        and target not in ARROWS.get(room(module), set())
        and (module, target) not in EXCEPTIONS
    ]
    assert not against, "\n".join(against)


def test_exceptions_are_still_needed():
    used = {(module, room(name)) for module, path in MODULES.items() for name, _ in imported(module, path)}
    assert set(EXCEPTIONS) <= used


def test_serving_names_no_training_library():
    named = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        if room(module) == "serve" or module in SERVED
        for name, line in imported(module, path)
        if name.partition(".")[0] in TRAINING
    ]
    assert not named, "\n".join(named)


def test_serving_loads_no_training_library():
    assert set(SERVED) <= set(MODULES)
    modules = SERVED + [module for module in MODULES if room(module) == "serve"]
    loaded = modules_after("".join(f"import {module}\n" for module in modules))
    assert {"numpy", "onnxruntime"} <= loaded
    assert not loaded & TRAINING


@pytest.mark.parametrize("package", sorted(module for module, path in MODULES.items() if path.name == "__init__.py"))
def test_packages_load_nothing_heavy(package):
    assert not modules_after(f"import {package}") & set(HEAVY)


def test_command_line_help_loads_nothing_heavy():
    loaded = modules_after(
        "import sys\nfrom visrec_nb.cli import main\nsys.argv = ['visrec', '--help']\n"
        "try: main()\nexcept SystemExit as e: assert not e.code, e"
    )
    assert PACKAGE in loaded
    assert not loaded & set(HEAVY)


def test_the_reader_of_imports_sees_every_form(tmp_path):
    source = tmp_path / "learners.py"
    source.write_text(
        "import os.path\nfrom .. import recsys\nfrom ..core.files import sha256_file\nfrom .heads import ImageHead\n"
        "def late():\n    from visrec_nb import reports\n"
        "    require('torch.nn', 'vision')\n    importlib.import_module('visrec_nb.serve.app')\n"
    )
    assert sorted(imported("visrec_nb.vision.learners", source), key=lambda pair: pair[1]) == [
        ("os.path", 1), ("visrec_nb.recsys", 2), ("visrec_nb.core.files.sha256_file", 3), ("visrec_nb.vision.heads.ImageHead", 4),
        ("visrec_nb.reports", 6), ("torch.nn", 7), ("visrec_nb.serve.app", 8),
    ]
