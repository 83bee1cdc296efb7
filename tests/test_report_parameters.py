"""What is said of a report's parameters before a kernel starts: quickly, all at once, without a heavy import."""

import json
import os
import resource
import subprocess
import sys
from datetime import date, datetime

import nbformat
import pytest

from helpers import visrec
from visrec_nb.core.errors import ParameterError
from visrec_nb.reports.parameters import check_parameters, parse_parameters, read_parameters

CELL = """from datetime import date
from pathlib import Path
out: str = "." # folder for metrics.json
epochs: int = 3 # passes [1..100]
rate: float | None = None # learning rate [0..1]
order: str = "name" # of rows [name | size]
sizes: list[int] = [32] # to try [1..]
flags: dict = {} # more
day: date = "2026-01-31" # the last day [2020-01-01..]
since: "datetime | None" = None # events after it
where: Path = "." # a folder
fast: bool = False # skip the slow part
token: str = "" # opens the shop [secret]"""
HEAVY = {
    "polars",
    "numpy",
    "torch",
    "papermill",
    "nbconvert",
    "nbformat",
    "nbclient",
    "jupyter_client",
    "zmq",
    "IPython",
    "matplotlib",
    "PIL",
    "jsonschema",
    "requests",
    "fsspec",
}


@pytest.fixture
def known():
    return [p for p in parse_parameters(CELL) if p.name != "out"]


@pytest.fixture
def template(tmp_path):
    cells = [
        nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "from visrec_nb.core.files import write_json\nwrite_json(f'{out}/metrics.json', {'epochs': epochs, 'day': day, 'sizes': sizes})"
        ),
    ]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path := tmp_path / "nightly.ipynb")
    return path


@pytest.mark.parametrize(
    "name, given, value",
    [
        ("epochs", "20", 20),
        ("epochs", 20, 20),
        ("rate", "1", 1.0),
        ("rate", "null", None),
        ("rate", "", None),
        ("sizes", "8,16", [8, 16]),
        ("sizes", "[8, 16]", [8, 16]),
        ("sizes", "", []),
        ("sizes", (4,), [4]),
        ("flags", '{"a": 1}', {"a": 1}),
        ("day", "2026-02-01", "2026-02-01"),
        ("day", date(2026, 2, 1), "2026-02-01"),
        ("since", datetime(2026, 2, 1, 3), "2026-02-01T03:00:00"),
        ("since", "2026-02-01", "2026-02-01T00:00:00"),
        ("since", "None", None),
        ("where", "a b/c", "a b/c"),
        ("fast", "TRUE", True),
        ("order", "size", "size"),
        ("token", "env:TOKEN", "env:TOKEN"),
    ],
)
def test_values_get_their_types(known, name, given, value):
    found = check_parameters(known, {name: given})[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name, given, words",
    [
        ("epochs", "many", "not of type int"),
        ("epochs", True, "not of type int"),
        ("epochs", "1e1", "not of type int"),
        ("epochs", "0", "at least 1"),
        ("epochs", 101, "at most 100"),
        ("epochs", "1.0", "not of type int"),
        ("rate", "nan", "not of type float or None"),
        ("rate", float("inf"), "not of type float"),
        ("rate", "yes", "not of type float"),
        ("order", "sise", "did you mean 'size'"),
        ("sizes", "8,x", "not of type list[int]"),
        ("sizes", "8,0", "sizes=0 has to be at least 1"),
        ("flags", "[1]", "not of type dict"),
        ("day", "31.1.2026", "not of type date"),
        ("day", "2026-02-30", "not of type date"),
        ("day", "2019-12-31", "at least 2020-01-01"),
        ("since", "soon", "not of type datetime or None"),
        ("where", " ", "not of type Path"),
        ("fast", "maybe", "not of type bool"),
        ("fast", 1, "not of type bool"),
        ("epochs", None, "not of type int"),
        ("tokn", "x", "did you mean 'token'"),
        ("zzz", "x", "it has epochs, rate"),
    ],
)
def test_wrong_values_are_refused(known, name, given, words):
    with pytest.raises(ParameterError, match=words.replace("[", r"\[")):
        check_parameters(known, {name: given})


def test_a_secret_itself_is_refused_and_not_repeated(known):
    with pytest.raises(ParameterError) as caught:
        check_parameters(known, {"token": "hunter22"})
    assert "hunter22" not in str(caught.value) and "env:NAME" in str(caught.value)


def test_yaml_and_command_line_together_everything_wrong_at_once(template, tmp_path):
    (tmp_path / "p.yaml").write_text("epochs: 500\nday: 2019-01-01\nsizs: [1]\n")
    done = visrec("report", "run", template, "-f", tmp_path / "p.yaml", "-p", "order=sise", "-p", "rate=2", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    for words in (
        "epochs=500 has to be at least 1 and at most 100",
        "day='2019-01-01'",
        "did you mean 'sizes'",
        "order='sise'",
        "rate=2.0",
    ):
        assert words in done.stderr
    (tmp_path / "p.yaml").write_text("epochs: [1\n")
    with pytest.raises(ParameterError, match="not YAML"):
        read_parameters(tmp_path / "p.yaml")


def test_show_as_table_and_json(template):
    text = visrec("report", "show", template).stdout
    assert "1..100" in text and "name | size" in text and "list[int]" in text and "opens the shop" in text and "out " not in text
    shown = json.loads(visrec("report", "show", template, "--json").stdout)
    epochs = shown["parameters"][0]
    assert shown["report"] == "nightly"
    assert epochs == {
        "name": "epochs",
        "type": "int",
        "default": 3,
        "help": "passes",
        "low": 1,
        "high": 100,
        "choices": [],
        "data": False,
        "bundle": False,
        "secret": False,
    }


def test_validation_is_quick_and_imports_nothing_heavy(template, tmp_path):
    "A fresh process: what it loads, and its processor time (a busy machine's clock says nothing)."
    (tmp_path / "p.yaml").write_text("epochs: 500\n")
    code = f"""import sys
sys.argv = ["visrec", "report", "run", {str(template)!r}, "-f", {str(tmp_path / "p.yaml")!r}, "-p", "tokn=x"]
from visrec_nb.cli import main
try: main()
except SystemExit as e: assert e.code == 2
print(",".join(sorted({{name.partition(".")[0] for name in sys.modules}})))"""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert not set(done.stdout.strip().split(",")) & HEAVY
    assert min(times) < 0.5, times


@pytest.mark.slow
def test_plain_papermill_runs_a_template(template, tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(template),
        str(tmp_path / "o.ipynb"),
        "-p",
        "out",
        str(tmp_path),
        "-p",
        "epochs",
        "5",
        "-p",
        "day",
        "2026-02-01",
        "--no-progress-bar",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"epochs": 5, "day": "2026-02-01", "sizes": [32]}
