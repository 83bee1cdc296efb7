"""The runner of reports under stress: limits, dead kernels, killed runners, locks, many at once and in a row, object stores, pages."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import nbformat
import pytest

from helpers import visrec
from visrec_nb.core.errors import InputError, ParameterError, ReportError
from visrec_nb.reports.kernels import marked_processes
from visrec_nb.reports.runner import run_report
from visrec_nb.reports.store import RunLocked, past_runs, run_lock

os.environ.setdefault(
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
)  # read when gcsfs is imported; the emulator does not answer what it asks

CELL = """out: str = "." # folder for metrics.json
n: int = 3 # how many [1..100]
table: str | None = None # what is read [data]
seed: int = 42 # of everything random"""
GOOD = "from visrec_nb.core.files import write_json\nwrite_json(f'{out}/metrics.json', {'n': n, 'seed': seed})\nf'{n} of them'"
ZYGOTE = """import os, sys
sys.modules["rfc3987_syntax"] = None
import visrec_nb.reports.engine, visrec_nb.reports.kernels, nbconvert
from visrec_nb.reports.runner import run_report
for line in sys.stdin:
    notebook, out, n = line.rstrip().split("\\t")
    if (pid := os.fork()) == 0:
        os.setsid()
        try: run_report(notebook, out, {"n": n})
        except BaseException as e: os._exit(e.code if isinstance(e, SystemExit) else 1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def make(path, *codes):
    cells = [
        nbformat.v4.new_markdown_cell("# Nightly\n\nAll **went** well."),
        nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, codes or [GOOD]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def whole(folder) -> bool:
    "Whether a folder is a complete run: every file that its manifest names has the bytes that it names."
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    return found == set(manifest["files"]) and all(
        hashlib.sha256((folder / n).read_bytes()).hexdigest() == d for n, d in manifest["files"].items()
    )


def kernel_folders():
    return {p.name for p in Path(tempfile.gettempdir()).glob("visrec-[0-9]*-*")}


def sleepers(folder):
    "Helpers that a notebook has started in a folder and that still run."
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes() == b"sleep\x001000\x00" and os.readlink(process / "cwd") == str(folder):
                found.append(process.name)
        except OSError:
            pass
    return found


def test_what_a_run_leaves(tmp_path):
    run = run_report(make(tmp_path / "nightly.ipynb"), tmp_path / "run", {"n": "5"}, seed=7)
    m = run.manifest
    assert run.metrics == {"n": 5, "seed": 7} and sorted(os.listdir(run.folder)) == [
        "index.html",
        "log.txt",
        "manifest.json",
        "metrics.json",
        "report.ipynb",
    ]
    assert m == json.loads((run.folder / "manifest.json").read_text()) and whole(run.folder)
    assert (m["report"], m["run"], m["status"], m["error"], m["seed"], m["conclusion"]) == (
        "nightly",
        "nightly",
        "ok",
        None,
        7,
        "All went well.",
    )
    assert m["exit_status"] == 0 and m["started"] <= m["ended"]
    assert m["parameters"] == {"n": 5, "table": None, "seed": 7} and m["started"].endswith("Z") and m["seconds"] > 0 and m["git"] is None
    assert set(m["hardware"]) == {"cpu", "cores", "memory_gb", "gpu"} and len(m["key"]) == 64 and m["data"] == {} and m["bundles"] == {}
    assert (
        str(tmp_path / "run") in (run.folder / "report.ipynb").read_text() and ".partial" not in (run.folder / "report.ipynb").read_text()
    )
    assert sorted(os.listdir(tmp_path)) == ["nightly.ipynb", "run"]


def test_same_inputs_give_the_same_metrics_and_changed_data_run_again(tmp_path):
    code = (
        "import random\nfrom visrec_nb.core.files import write_json\nfrom visrec_nb.core.seeds import rng\n"
        "found = {'order': list({str(k) for k in range(9)}), 'draw': rng(seed).normal(), 'text': open(table).read()}\n"
        "write_json(f'{out}/metrics.json', found)"
    )
    notebook, table = make(tmp_path / "nightly.ipynb", code), tmp_path / "t.csv"
    table.write_text("a")
    first, second = (run_report(notebook, tmp_path / name, {"table": str(table)}) for name in "ab")
    assert (first.folder / "metrics.json").read_bytes() == (second.folder / "metrics.json").read_bytes() and first.manifest[
        "key"
    ] == second.manifest["key"]
    assert not run_report(notebook, tmp_path / "a", {"table": str(table)}, if_changed=True).fresh
    table.write_text("b")
    assert run_report(notebook, tmp_path / "a", {"table": str(table)}, if_changed=True).metrics["text"] == "b"
    with pytest.raises(InputError, match=r"table=.*no such file"):
        run_report(notebook, tmp_path / "a", {"table": "gone.csv"})


@pytest.mark.parametrize(
    "code, limits, words, within",
    [
        ("time.sleep(100)", {"cell_timeout": 1.5}, "a cell took longer than its limit of 1.5 s", 20),
        ("for _ in range(99): time.sleep(1)", {"timeout": 4, "cell_timeout": 50}, "the report took longer than its limit of 4 s", 20),
        ("os.kill(os.getpid(), 9)", {}, r"the kernel was killed \(SIGKILL", 20),
        ("os._exit(3)", {}, "the kernel ended by itself with status 3", 20),
    ],
)
def test_every_end_is_told_and_nothing_is_left(tmp_path, monkeypatch, code, limits, words, within):
    "The notebook has started two helpers, one of which left its group."
    monkeypatch.chdir(tmp_path)
    start = "import os, subprocess, sys, time\nprint('begun')\n"
    start += "for new in (True, False): subprocess.Popen(['sleep', '1000'], start_new_session=new)"
    began = time.monotonic()
    with pytest.raises(ReportError, match=words) as caught:
        run_report(make(tmp_path / "nightly.ipynb", start, code), tmp_path / "run", **limits)
    run = caught.value.run
    assert (
        time.monotonic() - began < within
        and run.folder == tmp_path / "run.failed"
        and whole(run.folder)
        and not (tmp_path / "run").exists()
    )
    page = (run.folder / "index.html").read_text()
    assert (
        "This run failed" in page
        and "begun" in page
        and (run.manifest["status"], run.manifest["exit_status"]) == ("failed", 1)
        and run.manifest["error"] in caught.value.args[0]
    )
    assert not sleepers(tmp_path) and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert not any(name.split("-")[1] == str(os.getpid()) for name in kernel_folders())


def test_a_failed_run_exits_with_1_and_says_so(tmp_path):
    make(tmp_path / "nightly.ipynb", "from visrec_nb.core.errors import CatalogError\nraise CatalogError('list.csv: empty label (row 3)')")
    done = visrec("report", "run", tmp_path / "nightly.ipynb", "--runs", tmp_path / "runs", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "list.csv: empty label (row 3)" in done.stderr
    assert (
        told["status"] == "failed"
        and "empty label" in told["error"]
        and whole(Path(told["folder"]))
        and told["folder"].startswith(str(tmp_path / "runs"))
    )


def test_a_second_run_of_a_name_is_refused_or_waits(tmp_path):
    notebook = make(tmp_path / "nightly.ipynb")
    with run_lock(tmp_path / "run"):
        with pytest.raises(RunLocked, match="another run is writing there"):
            run_report(notebook, tmp_path / "run")
        waiting = threading.Thread(target=run_report, args=(notebook, tmp_path / "run"), kwargs={"wait": 60})
        waiting.start()
        time.sleep(0.3)
        assert not (tmp_path / "run").exists()
    waiting.join(60)
    assert whole(tmp_path / "run")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom visrec_nb.reports.store import run_lock\n"
            f"with run_lock({str(tmp_path / 'x')!r}): print('held', flush=True); time.sleep(100)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with run_lock(tmp_path / "x"):
        pass
    assert not (tmp_path / ".x.lock").exists()


def test_runs_are_kept_by_count(tmp_path):
    notebook = make(tmp_path / "nightly.ipynb")
    for _ in range(2):
        run_report(notebook, runs=tmp_path / "runs", keep=1)
    folders = os.listdir(tmp_path / "runs" / "nightly")
    assert len(folders) == 1 and whole(tmp_path / "runs" / "nightly" / folders[0])
    make(notebook, "1 / 0")
    with pytest.raises(ReportError, match="ZeroDivisionError"):
        run_report(notebook, runs=tmp_path / "runs", keep=1)
    assert [m["status"] for m in past_runs(tmp_path / "runs", "nightly").values()] == ["failed", "ok"]
    with pytest.raises(ParameterError, match="--name"):
        run_report(notebook, runs=tmp_path / "runs", name="../up")


# ---- killed


@pytest.fixture(scope="module")
def zygote():
    "A process that has imported everything and forks for each run, so that a run is quick to start and can be killed."
    process = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )

    def start(notebook, out, n):
        process.stdin.write(f"{notebook}\t{out}\t{n}\n")
        process.stdin.flush()
        return int(process.stdout.readline()), lambda: int(process.stdout.readline())

    yield start
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


def killed_at(zygote, tmp_path, points, victim, seed):
    notebook, out = make(tmp_path / "nightly.ipynb", "import time; time.sleep(.3)", GOOD), tmp_path / "place" / "run"
    began = time.monotonic()
    _, ended = zygote(notebook, out, 1)
    assert ended() == 0 and whole(out)
    took, draw, kept = time.monotonic() - began, random.Random(seed), 1
    for n in range(2, points + 2):
        pid, ended = zygote(notebook, out, n)
        time.sleep(draw.uniform(0, took * 1.05))
        try:
            if victim == "runner":
                os.kill(pid, signal.SIGKILL)
            else:
                for kernel in children(pid):
                    os.kill(kernel, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = ended()
        if not out.exists():
            continue  # between the two renames
        assert whole(out), f"a half-written run is visible after the {n}th kill"
        kept = json.loads((out / "metrics.json").read_text())["n"]
        assert kept <= n and (status != 0 or kept == n)
    _, ended = zygote(notebook, out, 99)
    assert ended() == 0 and whole(out) and json.loads((out / "metrics.json").read_text())["n"] == 99, "the next run needs no repair"
    names = set(os.listdir(tmp_path / "place"))
    assert names <= {"run", "run.failed"}, "what killed runs left is swept"
    assert "run.failed" not in names or whole(tmp_path / "place" / "run.failed")
    until = time.monotonic() + 10
    while (left := orphans(tmp_path)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left


def children(pid):
    try:
        return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def orphans(tmp_path):
    "Processes of runs to `place/run`, by their mark."
    from visrec_nb.core.files import fingerprint
    from visrec_nb.reports.store import lock_path

    return marked_processes(fingerprint(str(lock_path(tmp_path / "place" / "run")))[:16])


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("victim", ["runner", "kernel"])
def test_killed_at_a_few_points(zygote, tmp_path, victim):
    killed_at(zygote, tmp_path, 3, victim, 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("victim", ["runner", "kernel"])
def test_killed_at_twenty_points(zygote, tmp_path, victim):
    killed_at(zygote, tmp_path, 20, victim, 2)


def test_a_polite_end_keeps_what_was_done(zygote, tmp_path):
    notebook = make(tmp_path / "nightly.ipynb", "open(f'{out}/begun.txt', 'w').write('x'); print('begun')", "import time; time.sleep(100)")
    pid, ended = zygote(notebook, tmp_path / "run", 1)
    until = time.monotonic() + 30
    while not list(tmp_path.glob(".run.*/begun.txt")) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(pid, signal.SIGTERM)
    assert ended() == 143 and whole(tmp_path / "run.failed") and "begun" in (tmp_path / "run.failed" / "index.html").read_text()
    told = json.loads((tmp_path / "run.failed" / "manifest.json").read_text())
    assert "interrupted" in told["error"] and told["exit_status"] == 143


# ---- many


def test_four_at_once_in_one_process(tmp_path):
    notebook, runs, faults = make(tmp_path / "nightly.ipynb"), {}, []

    def one(n):
        try:
            runs[n] = run_report(notebook, tmp_path / f"run{n}", {"n": n})
        except Exception as e:
            faults.append(e)

    threads = [threading.Thread(target=one, args=(n,)) for n in (1, 2, 3, 4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not faults and {n: run.metrics["n"] for n, run in runs.items()} == {1: 1, 2: 2, 3: 3, 4: 4}


@pytest.mark.slow
def test_four_processes_at_once(tmp_path):
    notebook = make(tmp_path / "nightly.ipynb")
    command = [
        sys.executable,
        "-c",
        "from visrec_nb.cli import main; main()",
        "report",
        "run",
        str(notebook),
        "--runs",
        str(tmp_path / "runs"),
    ]
    for _ in range(2):
        jobs = [
            subprocess.Popen([*command, "--name", f"job{n}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for n in range(4)
        ]
        assert [(job.communicate(timeout=200)[1], job.returncode) for job in jobs] == [("", 0)] * 4
    assert all(len(past_runs(tmp_path / "runs", f"job{n}")) == 2 for n in range(4))


@pytest.mark.slow
def test_fifty_in_a_row_leak_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", temp := tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short, for sockets; nobody else's
    monkeypatch.setenv("TMPDIR", temp)
    notebook = make(tmp_path / "nightly.ipynb", "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)", GOOD)

    def state():
        files = {os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.exists()}
        return (
            len(files),
            threading.active_count(),
            len(children(os.getpid())),
            len(kernel_folders()),
            len(os.listdir(tempfile.gettempdir())),
        )

    for n in range(3):
        run_report(notebook, tmp_path / "run", {"n": n + 1})
    before = state()
    for n in range(50):
        run_report(notebook, tmp_path / "run", {"n": n + 1})
    after = state()
    assert after[0] <= before[0] + 3 and after[1] <= before[1] + 1 and after[2:] == before[2:], (before, after)
    assert sorted(os.listdir(tmp_path)) == ["nightly.ipynb", "run"] and not sleepers(tmp_path)
    shutil.rmtree(temp)


# ---- object stores


def stored(url, fs, key, notebook):
    "What every store has to do."
    run = run_report(notebook, f"{url}/now", {"n": 2})
    assert run.place == f"{url}/now" and json.loads(fs.cat_file(f"{key}/now/metrics.json")) == {"n": 2, "seed": 42}
    assert not run_report(notebook, f"{url}/now", {"n": 2}, if_changed=True).fresh
    runs = [run_report(notebook, runs=f"{url}/nights", parameters={"n": n}, keep=2) for n in (1, 2, 3)]
    assert (
        len(past_runs(f"{url}/nights", "nightly")) == 2
        and not run_report(notebook, runs=f"{url}/nights", parameters={"n": 3}, if_changed=True).fresh
    )
    names = sorted(name.rpartition("/")[2] for name in fs.find(f"{key}/nights/nightly/{runs[-1].place.rpartition('/')[2]}"))
    assert names == ["index.html", "log.txt", "manifest.json", "metrics.json", "report.ipynb"]
    make(notebook, "1 / 0")
    with pytest.raises(ReportError, match="ZeroDivisionError") as caught:
        run_report(notebook, f"{url}/now")
    assert (
        caught.value.run.place == f"{url}/now.failed" and json.loads(fs.cat_file(f"{key}/now.failed/manifest.json"))["status"] == "failed"
    )
    assert json.loads(fs.cat_file(f"{key}/now/metrics.json")) == {"n": 2, "seed": 42}, "the last good run stays"


def looked_back(url, fs, key):
    "The history of runs in a store, after `stored`."
    from visrec_nb.reports.history import compare_runs, read_history, write_history
    from visrec_nb.reports.notify import message
    from visrec_nb.reports.schedule import job, missed_time

    nights = f"{url}/nights"
    fs.pipe_file(f"{key}/nights/alerts.yaml", b"- n > 2\n")
    history = write_history(nights)
    assert [run.metrics["n"].value for run in history.runs] == [3, 2] and history.skipped == []
    page = fs.cat_file(f"{key}/nights/index.html").decode()
    assert "n is 3, above 2" in page and f'href="{history.runs[0].folder}/index.html"' in page
    assert fs.cat_file(f"{key}/nights/index.sqlite").startswith(b"SQLite format 3")
    newest, older = (f"{nights}/{run.folder}" for run in history.runs)
    assert message(f"{nights}/nightly").title == "nightly: 1 alert" and message(newest).text.endswith(f"{newest}/index.html")
    found = compare_runs(older, f"{nights}/nightly")
    assert (found["a"]["folder"], found["b"]["folder"]) == (older, newest) and found["inputs"]["parameters.n"] == [2, 3]
    assert compare_runs(f"{url}/now", newest)["inputs"]["parameters.n"] == [2, 3]
    with pytest.raises(InputError, match="no run"):
        compare_runs(f"{nights}/weekly", newest)
    daily, begun = job("nightly.ipynb", nights, "30 2 * * *"), history.runs[0].started
    due = missed_time(daily, begun + timedelta(days=1))
    assert begun < due <= begun + timedelta(days=1) and missed_time(daily, due - timedelta(seconds=1)) is None
    fs.rm(f"{key}/nights/{history.runs[0].folder}", recursive=True)
    assert [run.folder for run in read_history(nights).runs] == [history.runs[1].folder]
    write_history(nights)
    assert "above 2" not in fs.cat_file(f"{key}/nights/index.html").decode()


def test_in_a_store(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("VISREC_CACHE", str(tmp_path / "cache"))
    fs, puts = MemoryFileSystem(), []
    put = MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, a, b, **k: (puts.append(b), put(self, a, b, **k)))
    try:
        stored("memory://reports", fs, "/reports", make(tmp_path / "nightly.ipynb"))
    finally:
        fs.rm("/reports", recursive=True)
    runs = [puts[k : k + 5] for k in range(0, len(puts), 5)]
    assert runs and all(group[-1].endswith("/manifest.json") and len({g.rpartition("/")[0] for g in group}) == 1 for group in runs), (
        "the manifest goes last"
    )
    with pytest.raises(InputError, match="s3://"):
        run_report(make(tmp_path / "nightly.ipynb"), "https://example.org/run")


def test_the_history_of_a_store(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("VISREC_CACHE", str(tmp_path / "cache"))
    fs, notebook = MemoryFileSystem(), make(tmp_path / "nightly.ipynb")
    try:
        run_report(notebook, "memory://reports/now", {"n": 2})
        for n in (2, 3):
            run_report(notebook, runs="memory://reports/nights", parameters={"n": n})
        looked_back("memory://reports", fs, "/reports")
    finally:
        fs.rm("/reports", recursive=True)


def served(command, port, log):
    "A server on this machine, once it answers."
    with open(log, "wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out)
    for _ in range(300):
        if server.poll() is not None:
            pytest.fail(f"did not start: {log.read_text()[-1000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.1)
    pytest.fail("did not answer")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_in_s3(tmp_path, monkeypatch):
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import fsspec
    import fsspec.config

    port = free_port()
    server = served([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, tmp_path / "log")
    try:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "hush-hush",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "VISREC_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{port}"})
        fs = fsspec.filesystem("s3", use_listings_cache=False)
        fs.mkdir("shop")
        stored("s3://shop/reports", fs, "shop/reports", make(tmp_path / "nightly.ipynb"))
        looked_back("s3://shop/reports", fs, "shop/reports")
        with pytest.raises(ReportError, match="cannot be written"):
            run_report(make(tmp_path / "nightly.ipynb"), "s3://not-there/run")
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.slow
def test_in_google_cloud_storage(tmp_path, monkeypatch):
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("VISREC_CACHE", str(tmp_path / "cache"))
    import fsspec
    import fsspec.config

    port = free_port()
    code = "from gcp_storage_emulator.__main__ import main; main()"
    server = served(
        [sys.executable, "-c", code, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=shop"],
        port,
        tmp_path / "log",
    )
    try:
        monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon"})
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon"})
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        fs = fsspec.filesystem("gs", use_listings_cache=False)
        stored("gs://shop/reports", fs, "shop/reports", make(tmp_path / "nightly.ipynb"))
        looked_back("gs://shop/reports", fs, "shop/reports")
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.slow
def test_in_azure(tmp_path, monkeypatch):
    program = shutil.which("azurite-blob", path=f"{Path(sys.prefix) / 'azurite/node_modules/.bin'}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        (pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip)("no azurite (make azurite)")
    pytest.importorskip("adlfs")
    import fsspec

    port = free_port()
    server = served(
        [
            program,
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            str(port),
            "--location",
            str(tmp_path / "azure"),
            "--silent",
            "--skipApiVersionCheck",
        ],
        port,
        tmp_path / "log",
    )
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # azurite's own, public
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;"
        f"AccountKey={key};BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;",
    )
    monkeypatch.setenv("VISREC_CACHE", str(tmp_path / "cache"))
    try:
        fs = fsspec.filesystem("abfs", use_listings_cache=False)
        fs.mkdir("shop")
        stored("abfs://shop/reports", fs, "shop/reports", make(tmp_path / "nightly.ipynb"))
        looked_back("abfs://shop/reports", fs, "shop/reports")
    finally:
        server.kill()  # told politely, it waits for its connections to end
        server.wait(10)


WRITES = """import json, pathlib
from visrec_nb.core.bundle import new_bundle
with new_bundle(bundle, "recommendation", {}) as folder:
    (folder / "a.json").write_text("{}")
pathlib.Path(out, "metrics.json").write_text(json.dumps({"n": n}))"""


def test_a_bundle_that_a_template_writes(tmp_path):
    make(tmp_path / "nightly.ipynb", WRITES)
    book = nbformat.read(tmp_path / "nightly.ipynb", 4)
    book.cells[1].source += '\nbundle: str = "none" # where it goes [bundle]'
    nbformat.write(book, tmp_path / "nightly.ipynb")

    def run(**more):
        return run_report(tmp_path / "nightly.ipynb", tmp_path / "run", {"bundle": str(tmp_path / "b")}, if_changed=True, **more)

    first = run()
    assert set(first.manifest["bundles"]) == {"b"} and not run().fresh and not run(bundles=[tmp_path / "b"]).fresh
    (tmp_path / "b" / "a.json").write_text("[]")
    assert run().fresh and not run().fresh, "who touched the bundle gets a new one"
    shutil.rmtree(tmp_path / "b")
    assert run().fresh and (tmp_path / "b" / "a.json").read_text() == "{}"
    book.cells[2].source = book.cells[2].source.replace("new_bundle(bundle,", "new_bundle(bundle + '2',")
    nbformat.write(book, tmp_path / "nightly.ipynb")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ReportError, match="b"):
        run()
    assert json.loads((tmp_path / "run.failed" / "manifest.json").read_text())["status"] == "failed"
