"""One set of facts, and a wheel and a source archive that work where nothing else of the project is."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import visrec_nb
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("data", "vision", "recsys", "reports", "cloud", "widgets", "dev")
NOT_SOURCE = (".git", ".venv", "out", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".ipynb_checkpoints", "_proc", "_docs")


def run(*command, **kwargs):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False, **kwargs)


def pins():
    "The releases of constraints.txt that apply to this interpreter."
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    all_pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in all_pins if pin.marker is None or pin.marker.evaluate()}


# Facts


def test_version_is_the_same_everywhere(facts):
    assert facts["version"] == visrec_nb.__version__ == metadata.version("visrec_nb")
    assert re.search(rf"^## {re.escape(facts['version'])}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_nbdev_is_told_the_same_as_settings(facts):
    nbdev = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    assert (nbdev["lib_path"], nbdev["nbs_path"], nbdev["tst_flags"]) == (facts["lib_path"], facts["nbs_path"], facts["tst_flags"].split())


def test_installed_requirements_are_those_of_settings(requirements):
    installed = [Requirement(text) for text in metadata.requires("visrec_nb") or []]
    for extra in ("", *EXTRAS):
        found = {(r.name, r.specifier) for r in installed if (f'extra == "{extra}"' in str(r.marker) if extra else r.marker is None)}
        assert found == {((r := Requirement(text)).name, r.specifier) for text in requirements[extra]}, extra


def test_all_is_every_extra(requirements):
    installed = [Requirement(text) for text in metadata.requires("visrec_nb") or []]
    assert set(requirements) == {"", *EXTRAS}
    assert {r.name for r in installed if 'extra == "all"' in str(r.marker)} == {
        Requirement(text).name for extra in EXTRAS for text in requirements[extra]
    }


def test_constraints_pin_every_requirement_as_tested(requirements):
    pinned = pins()
    for text in {text for texts in requirements.values() for text in texts}:
        requirement = Requirement(text)
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt: make constraints"
        assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), f"{pin} is not a pin"
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{pin} is outside of {requirement}: make constraints"
        assert metadata.version(requirement.name).partition("+")[0] == version, f"installed: another release than {pin}"


def test_constraints_pin_all_that_is_needed():
    "Nothing that a fresh installation would bring is left to the day it is made."
    pinned, needed, todo = pins(), set(), [("visrec_nb", "all")]
    while todo:
        name, extra = todo.pop()
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found = {(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)} - needed
                needed |= found
                todo += found
    assert len(needed) > 100
    assert {name for name, _ in needed} - {"visrec-nb"} <= set(pinned)


def test_conda_environment_names_the_same_dependencies(facts, requirements):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == facts["lib_name"]
    python, pip, section = environment["dependencies"]
    assert (python, pip, environment["channels"]) == (f"python={facts['min_python']}", "pip", ["conda-forge", "nodefaults"])
    lines = section["pip"]
    assert (lines[0], lines[-1]) == ("-c constraints.txt", "-e .[all]")
    named = [str(Requirement(line)) for line in lines[1:-1]]
    assert sorted(named) == sorted({str(Requirement(text)) for texts in requirements.values() for text in texts})


def test_pip_finds_no_conflicts():
    done = run(sys.executable, "-m", "pip", "check")
    assert done.returncode == 0, done.stdout


# Archives


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    "The source archive, and the wheel that is built from it: of a copy, so that nothing is left in the checkout."
    source = tmp_path_factory.mktemp("source") / "visrec_nb"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    out = tmp_path_factory.mktemp("archives")
    done = run(sys.executable, "-m", "build", "--outdir", out, source)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(archives, facts):
    with zipfile.ZipFile(archives["wheel"]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        text = archive.read(f"visrec_nb-{facts['version']}.dist-info/METADATA").decode()
    package = ROOT / "visrec_nb"
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    theme = {path.relative_to(ROOT).as_posix() for path in (package / "reports" / "theme").rglob("*") if path.is_file()}
    templates = {f"visrec_nb/reports/notebooks/{path.name}" for path in (ROOT / "nbs" / "reports" / "notebooks").glob("*.ipynb")}
    assert modules and theme and templates
    assert {name for name in names if ".dist-info/" not in name} == modules | theme | templates | {"visrec_nb/py.typed"}
    assert f"visrec_nb-{facts['version']}.dist-info/licenses/LICENSE" in names
    assert "\nLicense-Expression: Apache-2.0\n" in text and f"\nRequires-Python: >={facts['min_python']}\n" in text
    assert "\nProvides-Extra: all\n" in text


@pytest.mark.slow
def test_source_archive_leaves_the_data_out(archives, facts):
    with tarfile.open(archives["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith("data/") or name.endswith((".jpg", ".parquet", ".mp4"))]
    assert archives["sdist"].stat().st_size < 2_000_000


@pytest.fixture(scope="session")
def empty_environment(archives, tmp_path_factory):
    "A new virtual environment with the wheel and what it needs, and nothing else."
    folder = tmp_path_factory.mktemp("environment")
    done = run(sys.executable, "-m", "venv", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(folder / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", archives["wheel"])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_and_runs_where_nothing_else_is(kind, archives, empty_environment, facts, tmp_path, monkeypatch):
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    python = empty_environment / "python"
    monkeypatch.chdir(tmp_path)
    # With the wheel's dependencies in place, both archives are put in by themselves.
    done = run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", archives[kind])
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(python, "-m", "pip", "check").returncode == 0

    done = run(python, "-c", "import visrec_nb; print(visrec_nb.__version__, visrec_nb.__file__)")
    version, where = done.stdout.split()
    assert version == facts["version"]
    assert Path(where).is_relative_to(empty_environment.parent)
    absent = "import importlib.util as u; print([name for name in ('torch', 'fastai', 'implicit', 'papermill') if u.find_spec(name)])"
    assert run(python, "-c", absent).stdout.strip() == "[]"

    done = run(empty_environment / "visrec", "--help")
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout

    done = run(empty_environment / "visrec", "demo", "--out", tmp_path / "demo")
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "clone" in line and "data" in line
    assert not (tmp_path / "demo").exists()
