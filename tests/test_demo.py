"""The main job, end to end at a tenth of its size: lines, numbers, caches, pages, the README's commands, bad input, a killed process."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import polars as pl
import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("data", "images", "videos", "recommendations", "overview")
pytestmark = pytest.mark.slow


def visrec(*args, cache, cwd=ROOT, **options):
    "Run the command as a shell would."
    return helpers.visrec(*args, cwd=cwd, env={**os.environ, "VISREC_CACHE": str(cache), "VISREC_PROGRESS": "0"}, **options)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def demo(tmp_path_factory, cache):
    "A clean small run: its folder and what it printed."
    out = tmp_path_factory.mktemp("demo") / "out"
    done = visrec("demo", "--small", "--out", out, cache=cache)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_prints_a_line_a_stage_and_the_page(demo):
    out, text = demo
    lines = text.splitlines()
    assert tuple(line.split()[0] for line in lines[:-1]) == STAGES
    assert lines[-1] == str(out / "index.html") and (out / "index.html").is_file()
    assert re.search(r"accuracy 0\.\d{3}", lines[1]) and "synthetic" in lines[2] and "als 0." in lines[3]


def test_numbers(demo):
    found = json.loads((demo[0] / "metrics.json").read_text())
    assert {"images", "videos", "recommenders", "seconds"} <= set(found)
    assert found["images"]["accuracy"] > 0.6, "120 training photos, ten classes"
    assert found["videos"]["accuracy"] > 0.5 > found["videos"]["still_frame_accuracy"], "motion is seen, and only motion tells"
    assert set(found["recommenders"]) >= {"popularity", "als", "item_item", "hybrid"}
    for metrics in (found["images"], found["videos"]):
        assert metrics["accuracy_ci_low"] <= metrics["accuracy"] <= metrics["accuracy_ci_high"]
    for metrics in found["recommenders"].values():
        for name in ("recall@10", "ndcg@10", "coverage@10", "novelty@10"):
            assert metrics[f"{name}_ci_low"] <= metrics[name] <= metrics[f"{name}_ci_high"]


def test_no_pickle_and_nothing_half_written(demo):
    out = demo[0]
    suffixes = {p.suffix for p in (out / "bundles").rglob("*") if p.is_file()}
    assert suffixes <= {".onnx", ".safetensors", ".parquet", ".json"}
    assert not [p for p in out.rglob("*.partial")] and not [p for p in out.rglob("*.failed")]


def test_second_run_is_unchanged(demo, cache):
    out = demo[0]
    before = (out / "metrics.json").read_bytes()
    done = visrec("demo", "--small", "--out", out, cache=cache)
    assert done.returncode == 0, done.stderr
    assert (out / "metrics.json").read_bytes() == before
    assert all("unchanged" in line for line in done.stdout.splitlines()[:5]), done.stdout


def test_damaged_bundle_is_made_again(demo, cache):
    out = demo[0]
    head = out / "bundles" / "videos" / "head.onnx"
    good = head.read_bytes()
    head.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    done = visrec("demo", "--small", "--out", out, cache=cache)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:5])
    assert "unchanged" not in lines["videos"] and "unchanged" in lines["images"]
    assert visrec("bundle", "verify", out / "bundles" / "videos", cache=cache).returncode == 0


def test_two_clean_runs_agree_and_a_killed_run_goes_on(demo, tmp_path):
    "Killed with -9 after the first stage, started again in a clean cache: the figures are those of the other clean run."
    code = "from visrec_nb.cli import main; main()"
    env = {**os.environ, "VISREC_CACHE": str(tmp_path / "cache")}
    out = tmp_path / "out"
    started = subprocess.Popen([sys.executable, "-u", "-c", code, "demo", "--small", "--out", str(out)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env=env, start_new_session=True, cwd=ROOT)
    assert started.stdout.readline().startswith("data")
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (out / "index.html").exists() and not (out / "bundles" / "images" / "manifest.json").exists()
    done = visrec("demo", "--small", "--out", out, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "unchanged" in done.stdout.splitlines()[0], "the finished stage is not repeated"
    assert not [p for p in out.rglob("*.partial")]
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (demo[0], out))
    first.pop("seconds"), second.pop("seconds")
    assert first == second


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1400])
def test_pages_in_a_browser(demo, browser, width):
    "No console error, every picture loads, nothing is wider than the screen, links lead somewhere, tables sort."
    out = demo[0]
    for path in [out / "index.html", *(out / "reports" / stage / "index.html" for stage in STAGES[:-1])]:
        page = browser.new_page(viewport={"width": width, "height": 900})
        trouble = []
        page.on("console", lambda m, t=trouble: t.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e, t=trouble: t.append(str(e)))
        page.on("request", lambda r, t=trouble: t.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(path.as_uri(), wait_until="load")
        assert not trouble, f"{path.parent.name}: {trouble}"
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), f"{path}: wider than {width}"
        assert page.locator("h1").count() == 1 and "import" not in page.locator("main").inner_text().split()
        assert float(page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")) >= 16
        for link in page.eval_on_selector_all("main a[href]", "found => found.map(a => a.getAttribute('href'))"):
            assert link.startswith("#") or (path.parent / link).is_file(), f"{path}: {link}"
        page.close()


@pytest.mark.browser
def test_tables_sort(demo, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto((demo[0] / "reports" / "images" / "index.html").as_uri())
    table = page.locator("table").first
    table.locator("th", has_text="items").locator("button").click()
    values = [int(v.replace(",", "")) for v in table.locator("tbody td:nth-child(2)").all_inner_texts()]
    assert values == sorted(values) and len(values) == 10
    page.close()


def test_the_commands_of_the_readme(demo, cache, tmp_path):
    "Each `visrec` line of the README that uses the demonstration's bundles runs."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if "out/demo/bundles" in line]
    assert len(commands) >= 5
    for line in commands:
        args = shlex.split(line.replace("out/demo", str(demo[0])))[1:]
        done = visrec(*args, cache=cache)
        assert done.returncode == 0 and done.stdout, f"{line}: {done.stderr}"


def test_predict_and_recommend_tables(demo, cache, tmp_path):
    photos = sorted((ROOT / "data" / "clothing" / "test" / "shoes").iterdir())[:3]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:700])
    out = tmp_path / "p.parquet"
    done = visrec("predict", demo[0] / "bundles" / "images", *photos, broken, "--out", out, cache=cache)
    assert done.returncode == 0, done.stderr
    table = pl.read_parquet(out)
    assert table.columns == ["path", "label", "score", "labels", "scores", "error"]
    assert table["error"].is_null().to_list() == [True] * 3 + [False] and table["label"][3] is None
    assert "1 of 4 files could not be read" in done.stderr
    done = visrec("recommend", demo[0] / "bundles" / "recommender", "--users", "1,2", "-k", "3", "--explain", "--json", cache=cache)
    rows = json.loads(done.stdout)["recommendations"]
    assert [r["rank"] for r in rows] == [1, 2, 3] * 2 and all(r["reason"] for r in rows)


@pytest.mark.parametrize("make, words", [
    (lambda d: (d / "hat").mkdir(), "the class 'hat' is empty"),
    (lambda d: [shutil.rmtree(p) for p in d.iterdir()], "holds no photos or videos"),
])
def test_bad_folders(tmp_path, cache, make, words):
    folder = tmp_path / "photos"
    for label in ("coat", "shoe"):
        (folder / label).mkdir(parents=True)
        (folder / label / "1.jpg").write_bytes(b"x")
    make(folder)
    done = visrec("train", "image", folder, "--out", tmp_path / "b", "--head-only", cache=cache)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_bad_photos_are_listed_and_left_out(tmp_path, cache):
    "Missing, truncated and empty files among good ones: counted, named, left out; the bundle says so."
    source = pl.read_parquet(ROOT / "data" / "clothing" / "catalog.parquet").filter(pl.col("label").is_in(["hat", "shoes"]))
    source = source.with_columns(path=pl.lit(f"{ROOT}/data/clothing/") + pl.col("path"))
    source = pl.concat([part.head(12) for _, part in source.group_by("split", "label", maintain_order=True)])
    (tmp_path / "cut.jpg").write_bytes(Path(source["path"][0]).read_bytes()[:900])
    (tmp_path / "empty.jpg").write_bytes(b"")
    bad = [("cut", "cut.jpg"), ("empty", "empty.jpg"), ("gone", "gone.jpg")]
    rows = pl.DataFrame({"item_id": [n for n, _ in bad], "path": [str(tmp_path / f) for _, f in bad], "media": "image", "label": "hat",
                         "split": "train"})
    pl.concat([source.select(rows.columns), rows]).write_csv(tmp_path / "list.csv")
    done = visrec("train", "image", tmp_path / "list.csv", "--out", tmp_path / "b", "--head-only", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stderr for name in ("cut.jpg", "empty.jpg", "gone.jpg")) and "3 files could not be read" in done.stderr
    assert json.loads(done.stdout)["accuracy"] > 0.8
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["data"]["skipped"] == 3


def test_an_empty_clip(demo, cache, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    done = visrec("predict", demo[0] / "bundles" / "videos", tmp_path / "empty.mp4", "--json", cache=cache)
    row = json.loads(done.stdout)["predictions"][0]
    assert row["label"] is None and row["error"] and done.returncode == 0


@pytest.mark.parametrize("header, rows, words", [
    ("user_id,item_id,wieght", ["a,x,1"], "wieght"),
    ("user_id,item_id,weight", ["a,x,1", "a,y,nan"], "weight"),
    ("user_id,item_id,weight", ["a,x,1", "a,y,-2"], "weight"),
    ("user,item", ["a,x"], "user_id"),
    ("user_id,item_id", ["a,x", ",y"], "user_id"),
])
def test_bad_logs(tmp_path, cache, header, rows, words):
    log = tmp_path / "log.csv"
    log.write_text("\n".join([header, *rows]) + "\n")
    done = visrec("train", "recommender", log, "--model", "popularity", "--out", tmp_path / "b", cache=cache)
    assert done.returncode == 2 and words in done.stderr and str(log) in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "b").exists() and os.listdir(tmp_path) == ["log.csv"]


def test_repeated_events_are_summed_and_said(tmp_path, cache):
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id\na,x\nb,y\na,x\n")
    args = ("train", "recommender", log, "--model", "popularity", "--out", tmp_path / "b")
    done = visrec(*args, cache=cache)
    assert done.returncode == 0 and "1 events repeat an earlier user and item (first in row 3 of 3)" in done.stderr
    done = visrec(*args, "--duplicates", "error", cache=cache)
    assert done.returncode == 2 and "row 3 of 3" in done.stderr


def test_wrong_report_parameters_start_no_kernel(tmp_path, cache):
    done = visrec("report", "run", "image_training", "-p", "epoch=3", "-p", "seed=x", "--out", tmp_path / "r", cache=cache)
    assert done.returncode == 2 and "did you mean 'epochs'" in done.stderr and "seed='x' is not of type int" in done.stderr
    assert os.listdir(tmp_path) == []


def test_no_data_and_wrong_data(tmp_path, cache):
    done = visrec("demo", "--data", tmp_path, "--out", tmp_path / "o", cache=cache)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--data" in done.stderr and not (tmp_path / "o").exists()
