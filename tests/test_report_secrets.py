"""A secret is used by a report and found in nothing that the report wrote: every file is searched, of good runs and of failed ones."""

import base64
import html
import json
import os
from urllib.parse import quote_plus

import nbformat
import pytest

from visrec_nb.core.errors import ParameterError, ReportError
from visrec_nb.reports.runner import run_report

VALUE = 'hush/"p&ss" wörd+9'
CELL = """out: str = "." # folder for metrics.json
token: str = "env:SHOP_TOKEN" # opens the shop [secret]
key: str | None = None # another [secret]"""
USE = """import base64, html, json, os, sys
from urllib.parse import quote_plus
from IPython.display import HTML, display
from visrec_nb.core.files import write_json
from visrec_nb.reports.secrets import secret
value = secret(token)
assert len(value) == 18 and value == os.environ["SHOP_TOKEN"]
"""
LEAK = """print("plain", value)
print(value, file=sys.stderr)
print(value[:7], end="", flush=True)
print(value[7:], flush=True)
sys.stdout.write(value[:5]); sys.stdout.flush(); display("between"); sys.stdout.write(value[5:]); sys.stdout.flush()
display(HTML(f"<p title='{html.escape(value)}'>{html.escape(value)}</p>"), metadata={"note": value})
display({"application/json": {value: [value]}, "text/plain": json.dumps(value)}, raw=True)
print(f"https://shop.example/?t={quote_plus(value)}", base64.b64encode(f"me:{value}".encode()).decode())
os.system(f"echo '{value}'")
os.write(2, value.encode())
open(f"{out}/notes.txt", "w").write(value)
open(f"{out}/table.bin", "wb").write(b"\\xff\\xfe" + value.encode())
os.makedirs(f"{out}/deep", exist_ok=True); open(f"{out}/deep/x.json", "w").write(json.dumps({"t": value}))
write_json(f"{out}/metrics.json", {"n": 1, "said": value})
value
"""


def make(path, *codes):
    cells = [
        nbformat.v4.new_markdown_cell("# Shop"),
        nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, codes),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def leaks(folder, value=VALUE):
    "Files below a folder that hold the secret, in whatever shape."
    data, shapes = value.encode(), {value.encode(), json.dumps(value)[1:-1].encode(), json.dumps(value, ensure_ascii=False)[1:-1].encode()}
    shapes |= {
        html.escape(value).encode(),
        html.escape(value, quote=False).encode(),
        quote_plus(value).encode(),
        repr(value)[1:-1].encode(),
        data.hex().encode(),
    }
    shapes |= {base64.b64encode(b"x" * n + data)[4:-4] for n in range(3)} | {b"rd+9", b"hush/"}  # its ends, too
    return [f"{p.relative_to(folder)}: {s!r}" for p in folder.rglob("*") if p.is_file() for s in shapes if s in p.read_bytes()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOP_TOKEN", VALUE)
    (tmp_path / "run").mkdir()
    return tmp_path


def test_a_run_that_shows_its_secret_in_every_way(place):
    run = run_report(make(place / "shop.ipynb", USE + LEAK), place / "run" / "shop", {"token": "env:SHOP_TOKEN"})
    assert not leaks(place / "run")
    assert run.manifest["parameters"] == {"token": "env:SHOP_TOKEN", "key": None} and run.metrics == {"n": 1, "said": "[secret]"}
    text = (run.folder / "report.ipynb").read_text()
    assert "plain [secret]" in text and "env:SHOP_TOKEN" in text and "[secret]" in (run.folder / "index.html").read_text()
    assert (run.folder / "table.bin").stat().st_size == 2 + len(VALUE.encode())
    assert run.manifest["files"].keys() >= {"notes.txt", "deep/x.json"} and "taken out of" in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize("end", ["raise RuntimeError(f'no entry with {value}')", "raise KeyError(value)", "os.kill(os.getpid(), 9)"])
def test_a_run_that_fails_while_it_holds_the_secret(place, end):
    with pytest.raises(ReportError) as caught:
        run_report(make(place / "shop.ipynb", USE + LEAK, end), runs=place / "run", name="nightly")
    assert not leaks(place / "run") and "hush" not in str(caught.value) and "hush" not in str(caught.value.run.manifest)
    assert caught.value.run.manifest["status"] == "failed"


def test_a_secret_from_a_file_of_several_lines(place):
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----\n"
    (place / "key.pem").write_text(key)
    code = "from visrec_nb.reports.secrets import secret\nfrom visrec_nb.core.files import write_json\n"
    code += "for line in secret(key).splitlines(): print(line)\nwrite_json(f'{out}/metrics.json', {})\nraise ValueError(secret(key))"
    with pytest.raises(ReportError) as caught:
        run_report(make(place / "shop.ipynb", code), place / "run" / "shop", {"key": f"file:{place / 'key.pem'}"})
    assert not leaks(place / "run", "hkiG9w0BAQEFAASC") and "MIIE" not in str(caught.value)


def test_a_missing_secret_is_told_before_a_kernel_starts(place, monkeypatch):
    monkeypatch.delenv("SHOP_TOKEN")
    with pytest.raises(ParameterError, match="env:SHOP_TOKEN: the environment has no SHOP_TOKEN"):
        run_report(make(place / "shop.ipynb", USE), place / "run" / "shop")
    assert os.listdir(place / "run") == []
