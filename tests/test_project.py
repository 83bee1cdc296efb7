"""What git should hold: clean notebooks, modules that are their export, small licensed data, and nothing that belongs to one machine."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
NOT_COPIED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob(pattern))}


def named(different: set[str]) -> str:
    return ", ".join(sorted(different))


@pytest.fixture
def copy(tmp_path):
    "The notebooks and the package in a folder of their own: nbdev works there, and the checkout stays as it is."
    for name in ("nbs", "visrec_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=NOT_COPIED)
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


# Notebooks and what is made from them


def test_notebooks_are_clean(copy):
    before = files_of(copy / "nbs", "*.ipynb")
    run(BIN / "nbdev-clean", cwd=copy)
    after = files_of(copy / "nbs", "*.ipynb")
    dirty = {name for name in before if before[name] != after[name]}
    assert not dirty, f"run nbdev-clean: {named(dirty)}"


def test_modules_are_the_export_of_the_notebooks(copy):
    package = copy / "visrec_nb"
    before = files_of(package, "*.py")
    for path in package.rglob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    run(BIN / "nbdev-export", cwd=copy)
    after = files_of(package, "*.py")
    orphans = set(before) - set(after)
    stale = {name for name in after if before.get(name) != after[name]}
    assert not orphans | stale, f"run nbdev-export: {named(stale) or '-'}; no notebook exports, remove: {named(orphans) or '-'}"


def test_every_exporting_notebook_is_named_as_its_module():
    for path in NOTEBOOKS:
        source = "".join("".join(cell["source"]) + "\n" for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
        for module in re.findall(r"^#\|\s*default_exp\s+(\S+)", source, re.M):
            assert path.relative_to(ROOT / "nbs").with_suffix("").as_posix() == module.replace(".", "/")


def test_report_templates_keep_no_outputs():
    templates = sorted((ROOT / "nbs" / "reports" / "notebooks").glob("*.ipynb"))
    assert templates
    for path in templates:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells), path.name
        assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1, path.name


def test_notebooks_are_small():
    assert not {path.name: path.stat().st_size for path in NOTEBOOKS if path.stat().st_size > 1_000_000}


def test_readme_is_made_from_the_index_notebook(tmp_path):
    index = ROOT / "nbs" / "index.ipynb"
    assert index.is_file()
    run(BIN / "jupyter", "nbconvert", "--to", "markdown", index, "--output-dir", tmp_path, "--output", "README", cwd=tmp_path)
    made = (tmp_path / "README.md").read_text(encoding="utf-8")
    command = "jupyter nbconvert --to markdown nbs/index.ipynb --output-dir . --output README"
    assert made == (ROOT / "README.md").read_text(encoding="utf-8"), command


# Data


def test_data_are_small_and_say_where_they_come_from():
    data = ROOT / "data"
    assert sum(path.stat().st_size for path in data.rglob("*") if path.is_file()) <= 15_000_000
    sets = sorted(path for path in data.iterdir() if path.is_dir())
    assert sets
    for folder in sets:
        assert re.search(r"https?://", (folder / "SOURCE.txt").read_text(encoding="utf-8")), folder.name
        terms = [path for path in (folder / "LICENSE", folder / "README.txt") if path.is_file()]
        assert any(re.search("licen[cs]e", path.read_text(encoding="utf-8"), re.I) for path in terms), folder.name


# Nothing of one machine, nothing secret

PATTERNS = {
    "a path of one machine": r"(?<![\w./])/(?:root|work\w*|mnt|srv|home/\w+|Users/\w+)/|[A-Za-z]:\\Users\\",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a token": r"\b(?:(?:gh[pousr]|github_pat|hf)_\w{30,}|(?:glpat|sk)-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})\b",
    "a password in a URL": r"\b\w+://[^\s/:@\"'<>{}]+:[^\s/@\"'<>{}]+@",
}


def kept_files() -> list[Path]:
    "What git holds or would take in."
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("what", PATTERNS)
def test_files_hold_nothing_of_one_machine_and_no_secret(what):
    found, read = [], 0
    for path in kept_files():
        if path == Path(__file__) or ((ROOT / "nbs" / "benchmarks") in path.parents and what == "a path of one machine"):
            continue
        content = path.read_bytes()
        if b"\0" in content:
            continue
        read += 1
        for match in re.finditer(PATTERNS[what], content.decode("utf-8")):
            found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert read > 50
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for():
    examples = {
        "a path of one machine": ['open("/workspace/x/y")', "/mnt/disk/x", "/home/ann/x", "C:\\Users\\ann"],
        "a private key": ["-----BEGIN RSA PRIVATE KEY-----"],
        "a token": ["ghp_" + "a" * 36, "AKIA" + "A" * 16],
        "a password in a URL": ["postgres://ann:secret@host/db"],
    }
    for what, texts in examples.items():
        for text in texts:
            assert re.search(PATTERNS[what], text), text
    for text in ["homework/a", "s3://bucket/mnt/a", "https://host/srv/a", "http://127.0.0.1:8080/x@y"]:
        assert not any(re.search(pattern, text) for pattern in PATTERNS.values()), text


# No pickles

PICKLING = {"pickle", "cPickle", "_pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
LOADERS = {"load_learner", "read_pickle", "to_pickle"}


def pickling(source: str) -> list[str]:
    "The places where code pickles, or reads a format that may hold a pickle without refusing one."
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [f"line {node.lineno}: {name}" for name in names if name.partition(".")[0] in PICKLING]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and given.get("weights_only") != "True":
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if given.get("allow_pickle", "False") != "False" or called.rpartition(".")[2] in LOADERS:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_the_package_never_pickles():
    for path in sorted((ROOT / "visrec_nb").rglob("*.py")):
        assert not pickling(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def test_report_templates_never_pickle():
    for path in sorted((ROOT / "nbs" / "reports" / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                source = "".join(line for line in cell["source"] if not line.lstrip().startswith(("%", "!")))
                assert not pickling(source), path.name


def test_pickling_is_found():
    bad = ["import pickle", "from joblib import dump", "torch.load(p)", "torch.load(p, weights_only=False)",
           "np.load(p, allow_pickle=True)", "learn = load_learner(p)", "df.to_pickle(p)"]
    assert all(map(pickling, bad))
    assert not pickling("torch.load(p, weights_only=True)\nnp.load(p)\nfrom . import pickle_free")
