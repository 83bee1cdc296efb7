"""The history of runs: many writers, damaged files, rules that must and must not fire, and the page in a browser."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from functools import partial
from pathlib import Path
from statistics import median

import helpers
import pytest

from visrec_nb.core.errors import InputError, ParameterError
from visrec_nb.core.files import write_json
from visrec_nb.reports import history as module
from visrec_nb.reports.history import (
    Metric, alerts, compare_runs, comparison_page, find_run, history_page, parse_rule, read_history, read_rules, run_alerts, write_history,
)

START = datetime(2026, 11, 1, 2, tzinfo=UTC)


def a_run(root, n, run="photos", metrics=None, failed=None, **more) -> Path:
    "A run's folder as the runner leaves it, n days after the first."
    at = START + timedelta(days=n)
    folder = Path(root) / run / f"{at:%Y-%m-%dT%H%M%SZ}-{n:06x}"
    folder.mkdir(parents=True)
    if failed is None:
        write_json(folder / "metrics.json", {"accuracy": 0.9} if metrics is None else metrics)
    write_json(folder / "manifest.json", {
        "report": "image_training", "run": run, "status": "failed" if failed else "ok", "error": failed,
        "started": f"{at:%Y-%m-%dT%H:%M:%SZ}", "seconds": 60.0,
        "conclusion": None if failed else "All is well.", "key": f"{n:064x}", "parameters": {"epochs": 40}} | more)
    return folder


visrec = partial(helpers.visrec, timeout=60)


def rows(root) -> list[tuple]:
    with closing(sqlite3.connect(root / "index.sqlite")) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        return db.execute("select folder, name, value, ci_low, ci_high from runs join metrics using (folder) order by 1, 2").fetchall()


# The index


def test_runs_that_end_at_once_are_all_in_the_index(tmp_path):
    for n in range(8):
        a_run(tmp_path / "waiting", n, f"report{n}")
    (tmp_path / "runs").mkdir()
    code = ("import os, sys; from visrec_nb.reports.history import write_history; sys.stdin.readline(); "
            "os.rename(sys.argv[1], sys.argv[2]); write_history(os.path.dirname(sys.argv[2]))")
    workers = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "waiting" / f"report{n}", tmp_path / "runs" / f"report{n}"],
                                stdin=subprocess.PIPE) for n in range(8)]
    for worker in workers:
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    assert [worker.wait(60) for worker in workers] == [0] * 8
    assert {folder.split("/")[0] for folder, *_ in rows(tmp_path / "runs")} == {f"report{n}" for n in range(8)}
    assert (tmp_path / "runs" / "index.html").read_text().count('class="card"') == 8
    assert not list((tmp_path / "runs").glob(".*.partial"))


def test_a_writer_that_is_killed_leaves_a_good_index(tmp_path):
    for n in range(20):
        a_run(tmp_path, n)
    write_history(tmp_path)
    before = rows(tmp_path)
    code = "import sys; from visrec_nb.reports.history import write_history\nwhile True: write_history(sys.argv[1]); print('.', flush=True)"
    for rounds in (1, 3, 4):
        with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as writer:
            for _ in range(rounds):
                writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        assert rows(tmp_path) == before
    write_history(tmp_path)
    assert rows(tmp_path) == before and not list(tmp_path.glob(".*.partial"))


def test_any_damage_of_the_index_is_mended(tmp_path):
    for n in range(6):
        a_run(tmp_path, n, metrics={"accuracy": n / 10, "accuracy_ci_low": 0, "accuracy_ci_high": 1})
    write_history(tmp_path)
    index, want, draw = tmp_path / "index.sqlite", read_history(tmp_path).runs, random.Random(0)
    whole = index.read_bytes()
    for case in range(30):
        data = bytearray(whole)
        if case % 3 == 0:
            data = data[: draw.randrange(len(data))]
        elif case % 3 == 1:
            at = draw.randrange(len(data) - 600)
            data[at:at + 600] = bytes(600)
        else:
            data = bytearray(draw.randbytes(draw.choice((0, 10, 5000))))
        index.write_bytes(bytes(data))
        found = read_history(tmp_path).runs
        assert found == want
        write_history(tmp_path)
    index.unlink()
    shutil.rmtree(want[0] and tmp_path / want[0].folder)
    assert [r.folder for r in write_history(tmp_path).runs] == [r.folder for r in want[1:]] and len(rows(tmp_path)) == 2 * 5


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    folders = [a_run(tmp_path, n) for n in range(5)]
    write_history(tmp_path)
    read, real = [], module.read_run
    monkeypatch.setattr(module, "read_run", lambda folder, root: read.append(folder) or real(folder, root))
    assert len(read_history(tmp_path).runs) == 5 and not read
    write_json(folders[2] / "metrics.json", {"accuracy": 0.25})
    assert read_history(tmp_path).runs[2].metrics["accuracy"] == Metric(0.25) and read == [folders[2]]


def test_many_runs(tmp_path):
    first = a_run(tmp_path, 0, metrics={f"metric{n}": n / 7 for n in range(10)})
    manifest = json.loads((first / "manifest.json").read_text())
    for n in range(1, 400):
        folder = first.with_name(f"run{n}")
        folder.mkdir()
        os.link(first / "metrics.json", folder / "metrics.json")
        at = START + timedelta(hours=n)
        (folder / "manifest.json").write_text(json.dumps(manifest | {"started": f"{at:%Y-%m-%dT%H:%M:%SZ}"}))
    assert len(write_history(tmp_path).runs) == 400
    began = datetime.now()
    history = write_history(tmp_path)
    assert (datetime.now() - began).total_seconds() < 4 and len(rows(tmp_path)) == 4_400
    assert history.runs[0].started - history.runs[-1].started == timedelta(hours=399)
    assert (tmp_path / "index.html").stat().st_size < 500_000


@pytest.mark.parametrize("manifest", [
    "", "[]", "{}", '{"status": "ok"}', "\0\xff", '{"report": "a", "status": "odd", "started": "2026-11-01", "seconds": 1}',
    '{"report": "a", "status": "ok", "started": "last night", "seconds": 1}'])
def test_a_folder_that_is_no_run_is_listed_as_such(tmp_path, manifest):
    a_run(tmp_path, 0)
    (tmp_path / "photos" / "odd").mkdir()
    (tmp_path / "photos" / "odd" / "manifest.json").write_text(manifest, encoding="latin-1")
    (tmp_path / "photos" / ".2026.partial").mkdir() # a run that is being written
    history = write_history(tmp_path)
    assert len(history.runs) == 1 and [name for name, _ in history.skipped] == ["photos/odd"]
    assert "photos/odd" in (tmp_path / "index.html").read_text()


# Alerts


def raised(root, *texts, now=START + timedelta(days=20)) -> list[str]:
    return [a.text.replace("\N{NO-BREAK SPACE}", " ") for a in alerts(read_history(root), [parse_rule(t) for t in texts], now)]


VALUES = [10, 12, 11, 13, 12, 9, 11]


@pytest.mark.parametrize(("last", "rule", "fires"), [
    (8, "loss < 8", False), (7.99, "loss < 8", True), (8, "loss > 8", False), (8.01, "loss > 8", True), (-1, "loss < -0.5", True),
    (9, "loss drops 2 over 7", True), (9.01, "loss drops 2 over 7", False), (13, "loss drops 2 over 7", False),
    (13, "loss rises 2 over 7", True), (12.99, "loss rises 2 over 7", False), (9, "loss rises 2 over 7", False),
    (9, "loss changes 2 over 7", True), (13, "loss changes 2 over 7", True), (11, "loss changes 0.001 over 7", False),
    (9.9, "loss drops 10% over 7", True), (9.91, "loss drops 10% over 7", False), (12.1, "loss rises 10 % over 7", True),
    (10, "loss drops 1 over 3", True), (10, "loss drops 2 over 1", False), (9, "loss drops 2 over 1", True),
    (9, "photos: loss drops 2 over 7", True), (9, "other: loss drops 2 over 7", None),
])
def test_a_rule_fires_when_it_should_and_only_then(tmp_path, last, rule, fires):
    assert median(VALUES) == 11 and median(VALUES[-3:]) == 11
    for n, value in enumerate([99, *VALUES, last]): # the first is too old to count among 7
        a_run(tmp_path, n, metrics={"loss": value})
    found = raised(tmp_path, rule)
    assert len(found) == (fires is not False)
    assert fires is not None or "fits nothing: there is no run 'other'" in found[0]


def test_failed_and_younger_runs_don_t_count_in_a_change(tmp_path):
    folders = [a_run(tmp_path, n, metrics={"loss": v}) for n, v in enumerate((1, 1, 1, 5, 1, 1, 1))]
    a_run(tmp_path, 7, failed="the disk is full")
    assert raised(tmp_path, "loss rises 1 over 3") == ["failed: the disk is full"]
    def at(folder): return run_alerts(read_history(tmp_path), [parse_rule("loss rises 1 over 3")], f"photos/{folder.name}")
    assert [a.text for a in at(folders[3])] == ["loss is 5, +4 against 1, the median of the 3 runs before"]
    assert not at(folders[2]) and not at(folders[4]) # too few before it; the peak does not move the median


def test_a_metric_that_is_gone_or_never_was(tmp_path):
    a_run(tmp_path, 0, metrics={"accuracy": 1, "ece": 0})
    a_run(tmp_path, 1, metrics={"accuracy": 1})
    a_run(tmp_path, 2, "other", {"ndcg@10": 0.1})
    assert raised(tmp_path, "ece > 1") == ["has no metric ece (rule: ece > 1)"]
    assert "did you mean 'ndcg@10'" in raised(tmp_path, "ndcg@1 > 1")[0]
    assert raised(tmp_path, "accuracy < 1", "ndcg@10 > 1", "no run for 30d") == []
    assert [t[:10] for t in raised(tmp_path, "no run for 18.5d")] == ["last begun"] # photos 19 days ago, other 18
    assert "60 s" not in str(raised(tmp_path, "seconds > 60")) and raised(tmp_path, "seconds > 59") != []


@pytest.mark.parametrize("text", ["- a: b: c < 1\n  d: 2", "a < 1", "- a is 1", "- [1]", "- {", "\0"])
def test_wrong_rules_are_refused(tmp_path, text):
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises((ParameterError, InputError)):
        read_rules(tmp_path / "rules.yaml")


# The page


class Seen(HTMLParser):
    "What a page shows and where it leads."

    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action")]


def test_what_a_run_says_is_text_on_the_page(tmp_path):
    evil = '<script>alert(1)</script><img src="http://example.org/x">'
    a_run(tmp_path, 0, 'A "run" & <b>', {evil: 1, "x": 2}, conclusion=evil)
    a_run(tmp_path, 1, 'A "run" & <b>', {evil: 3, "x": 2}, conclusion=evil)
    a_run(tmp_path, 2, "gone", failed=evil)
    page = Seen(history_page(write_history(tmp_path, [parse_rule("x > 1")]), [parse_rule("x > 1")]))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    name = "A%20%22run%22%20%26%20%3Cb%3E"
    assert set(page.links) == {"data:,", f"{name}/2026-11-01T020000Z-000000/index.html", f"{name}/2026-11-02T020000Z-000001/index.html",
                               "gone/2026-11-03T020000Z-000002/index.html"}


def test_the_page_of_an_empty_root(tmp_path):
    assert "No report has run here yet." in history_page(write_history(tmp_path)) and rows(tmp_path) == []
    with pytest.raises(InputError, match="no such folder"):
        write_history(tmp_path / "nothing")


@pytest.mark.browser
def test_the_page_on_a_phone_and_on_a_desk(tmp_path, browser):
    for n in range(30):
        low = 0.8 + n / 1000
        metrics = {"accuracy": low + 0.03, "accuracy_ci_low": low, "accuracy_ci_high": low + 0.06, "a_rather_long_metric@100": n}
        folder = a_run(tmp_path, n, metrics=metrics, conclusion="Of 372 photos that the model had never seen, it named 86 %. " * 3)
        (folder / "index.html").write_text("<h1>A run</h1>")
    a_run(tmp_path, 30, failed="catalog.csv: empty label (row 3)")
    write_history(tmp_path, [parse_rule("accuracy < 0.9")])
    for width in (390, 1280):
        for scheme in ("light", "dark"):
            asked: list[str] = []
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((tmp_path / "index.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert not [url for url in asked if not url.startswith(("file:", "data:"))]
            assert page.locator("svg").count() == 2 # how long it took never changes
            wide = page.evaluate("[...document.querySelectorAll('svg text')].every(t => t.getBoundingClientRect().left >= 0)")
            assert wide and page.locator("svg[aria-label*='30 runs']").count() == 2
            page.locator(".card a").first.focus()
            page.close()
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.locator("table.runs a").nth(1).click()
    assert page.locator("h1").inner_text() == "A run"
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_are_accessible(tmp_path, browser, scheme):
    "axe finds nothing: WCAG 2.2 A and AA, and its best practices."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    runs = [a_run(tmp_path / "runs", n, metrics={"accuracy": v, "accuracy_ci_low": v - 0.1, "accuracy_ci_high": v + 0.1})
            for n, v in enumerate((0.9, 0.8, 0.7))]
    a_run(tmp_path / "runs", 3, "log", failed="the disk is full")
    write_history(tmp_path / "runs", [parse_rule("accuracy < 0.75")])
    (tmp_path / "compare.html").write_text(comparison_page(compare_runs(*runs[:2])))
    for file in ("runs/index.html", "compare.html"):
        page = browser.new_page(viewport={"width": 390, "height": 900}, color_scheme=scheme)
        page.goto((tmp_path / file).as_uri())
        rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
        found = axe.Axe().run(page, options=rules).response
        assert len(found["passes"]) > 15 and not [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]]
        page.close()


# Two runs, and the command line


def test_comparison_both_ways(tmp_path):
    def figures(value): return {"accuracy": value, "accuracy_ci_low": value - 0.02, "accuracy_ci_high": value + 0.02}
    a = a_run(tmp_path, 0, metrics=figures(0.8) | {"gone": 1}, libraries={"numpy": "1"}, git={"commit": "a", "dirty": False})
    b = a_run(tmp_path, 1, metrics=figures(0.9) | {"new": 1}, libraries={"numpy": "2"}, git=None)
    c = a_run(tmp_path, 2, metrics=figures(0.83))
    there, back, near = compare_runs(a, b), compare_runs(b, a), compare_runs(a, c)
    def row(found, name): return next(r for r in found["metrics"] if r["metric"] == name)
    assert row(there, "accuracy")["difference"] == pytest.approx(0.1) == -row(back, "accuracy")["difference"]
    assert "accuracy is higher" in there["conclusion"] and "accuracy is lower" in back["conclusion"]
    assert row(near, "accuracy")["ranges"] == "overlap" and "none differs by more than chance" in near["conclusion"]
    assert there["inputs"] == {"libraries.numpy": ["1", "2"], "git.commit": ["a", None], "git.dirty": [False, None]}
    assert row(there, "gone")["words"] == "not known: only the first run has it" and row(there, "new")["difference"] is None
    assert find_run(tmp_path / "photos").folder == c


def test_the_commands(tmp_path):
    a, b = a_run(tmp_path, 0), a_run(tmp_path, 1, metrics={"accuracy": 0.7})
    (tmp_path / "alerts.yaml").write_text("- accuracy < 0.8\n")
    done = visrec("report", "history", tmp_path, "--json", "--strict")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and [x["metric"] for x in found["alerts"]] == ["accuracy"]
    assert "alert: photos: accuracy is 70.0" in done.stderr
    assert [r["folder"] for r in found["runs"]] == [f"photos/{b.name}", f"photos/{a.name}"]
    assert visrec("report", "history", tmp_path).returncode == 0
    wrong = visrec("report", "history", tmp_path, "--alert", "accuracy is bad")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "accuracy drops 0.02 over 7" in wrong.stderr
    done = visrec("report", "compare", a, tmp_path / "photos", "--out", tmp_path / "c.html", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["metrics"][1]["difference"] == pytest.approx(-0.2)
    assert "Two runs side by side" in (tmp_path / "c.html").read_text()
    assert visrec("report", "compare", a, tmp_path / "nothing").returncode == 2
