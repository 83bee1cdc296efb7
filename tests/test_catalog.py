"""Catalogs end to end: every type there and back, tables too long to hold, and an S3 store on this machine."""

import datetime as dt
import json
import os
import random
import socket
import subprocess
import sys
import time
import warnings
from decimal import Decimal

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import CatalogError, DataWarning, MediaError, MissingExtra
from visrec_nb.data.catalog import read_catalog, scan_catalog, validate_catalog, with_hashes, write_catalog
from visrec_nb.data.remote import local_file


# ---- there and back

def everything(folder):
    "A catalog with a column of each type."
    tags = pl.Series("tag", ["b", None, "a", "b"])
    return read_catalog(pl.DataFrame({
        "path": [f"{folder}/a.jpg", f"{folder}/für/ß 🐈.png", "/elsewhere/c.mp4", "s3://shop/d, e.jpg"],
        "item_id": ["007", "ß", 'quote " and , comma', " spaces "], "labels": [["cat", "ß 🐈"], [], None, ["cat"]],
        "split": ["train", None, "valid", "test"], "group": ["1", None, "", "x"],
        "whole": [1, None, -(2**63), 2**63 - 1], "small": pl.Series([1, None, 3, 255], dtype=pl.UInt8),
        "real": [0.1, float("nan"), None, float("inf")], "single": pl.Series([0.1, None, 1e-30, 3.0], dtype=pl.Float32),
        "truth": [True, None, False, True], "text": ["", None, "two\nlines", "NULL"], "bytes": [b"\x00\xff", b"", None, b"x"],
        "day": [dt.date(1969, 7, 20), None, dt.date(2400, 2, 29), dt.date(1, 1, 1)],
        "moment": pl.Series([0, None, 1, -1], dtype=pl.Datetime("ns", "Asia/Kathmandu")),
        "took": pl.Series([1, None, 2, 3], dtype=pl.Duration("ms")),
        "clock": [dt.time(1, 2, 3), None, dt.time(0), dt.time(23, 59, 59, 999999)],
        "price": pl.Series([Decimal("1.10"), None, Decimal("-0.01"), Decimal("1234567890123456.78")], dtype=pl.Decimal(38, 2)),
        "tag": tags.cast(pl.Categorical), "fixed": tags.cast(pl.Enum(["b", "a", "never"])), "nothing": [None] * 4,
        "boxes": [[[1, 2], []], None, [], [None, [3]]], "vector": pl.Series([[1.0, 2.0]] * 3 + [None], dtype=pl.Array(pl.Float32, 2)),
        "camera": [{"name": "X", "lens": {"mm": 35}}, None, {"name": None, "lens": None}, {"name": "Y", "lens": {"mm": None}}],
    }))


@pytest.mark.parametrize("lazy", [False, True])
def test_parquet_loses_nothing_and_moves_with_its_folder(tmp_path, lazy):
    before = tmp_path / "before"
    before.mkdir()
    catalog = everything(before)
    write_catalog(catalog.lazy() if lazy else catalog, before / "catalog.parquet")
    again = read_catalog(before / "catalog.parquet")
    assert again.schema == catalog.schema
    assert again.equals(catalog, null_equal=True)
    before.rename(tmp_path / "after")
    moved = read_catalog(tmp_path / "after" / "catalog.parquet")["path"].to_list()
    assert moved == [p.replace(str(before), str(tmp_path / "after")) for p in catalog["path"]]


def test_long_parquet_keeps_order_and_rows(tmp_path):
    n = 400_000
    catalog = pl.DataFrame({"path": pl.int_range(n, eager=True).shuffle(1).cast(pl.String) + ".jpg", "x": range(n)})
    write_catalog(scan_catalog(catalog), tmp_path / "long.parquet")
    read = read_catalog(tmp_path / "long.parquet")
    assert read["item_id"].to_list() == catalog["path"].to_list() and read["x"].equals(catalog["x"])


def test_csv_keeps_what_text_can_hold(tmp_path):
    draw = random.Random(7)
    letters = ["a", "B", "ß", "🐈", ",", '"', ";", " ", "\n", "'", "0", "1", "-", ".", "#", "\t", "NULL", "true"]
    words = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(500)]
    names = [w for w in dict.fromkeys(w.strip() for w in words) if w]
    rows, epoch = 400, dt.datetime(2000, 1, 1)
    catalog = read_catalog(pl.DataFrame({
        "path": [f"{tmp_path}/{i}.jpg" for i in range(rows)], "item_id": [f"{i:04d}" for i in range(rows)],
        "labels": [draw.choice([None, [], draw.sample(names, draw.randint(1, 4))]) for _ in range(rows)],
        "text": [draw.choice(words + [None]) for _ in range(rows)],
        "whole": [draw.choice([None, draw.randint(-(2**63), 2**63 - 1)]) for _ in range(rows)],
        "real": [draw.choice([None, draw.uniform(-1, 1) * 10.0 ** draw.randint(-20, 20)]) for _ in range(rows)],
        "truth": [draw.choice([None, True, False]) for _ in range(rows)],
        "day": [draw.choice([None, dt.date(2000, 1, 1) + dt.timedelta(draw.randint(-9999, 9999))]) for _ in range(rows)],
        "moment": [draw.choice([None, epoch + dt.timedelta(microseconds=draw.randint(-(10**15), 10**15))]) for _ in range(rows)],
    }))
    write_catalog(catalog, tmp_path / "catalog.csv")
    again = read_catalog(tmp_path / "catalog.csv")
    assert again.schema == catalog.schema
    assert again.equals(catalog)


def test_json_lines_keep_lists_and_numbers(tmp_path):
    rows = [{"path": "a.jpg", "labels": None, "size": [1, 2]}] * 1 + [{"path": f"{i}.jpg", "labels": []} for i in range(300)]
    rows += [{"path": "z.jpg", "labels": ["cat"], "late": {"x": 1}}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    catalog = read_catalog(tmp_path / "list.jsonl")
    assert catalog["labels"].to_list() == [None] + [[]] * 300 + [["cat"]] and catalog["late"][-1] == {"x": 1}
    write_catalog(catalog, tmp_path / "again.jsonl")
    assert read_catalog(tmp_path / "again.jsonl").equals(catalog)


def test_pandas_frames(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": ["a.jpg", "b.jpg"], "label": ["cat", None], "stars": [1.5, None]})
    assert read_catalog(frame).select("label", "stars").rows() == [("cat", 1.5), (None, None)]
    with pytest.raises(CatalogError, match=r"empty 'path' \(row 2"):
        read_catalog(pandas.DataFrame({"path": ["a.jpg", None]}))


def test_names_on_disk(tmp_path):
    for name in ("cat/a, 'b'.jpg", "cat/ü🐈.jpg", "dog/back\\slash.jpg", "dog/c:/d.jpg", "dog/x.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    catalog = read_catalog(tmp_path)
    for ending in (".csv", ".parquet", ".jsonl"):
        write_catalog(catalog, tmp_path / f"catalog{ending}")
        again = read_catalog(tmp_path / f"catalog{ending}")
        assert again.equals(catalog) and all(map(os.path.isfile, again["path"]))
    (tmp_path / "cat" / "line\nbreak.jpg").touch()
    with pytest.raises(CatalogError, match="control character"):
        read_catalog(tmp_path)
    (tmp_path / "cat" / "line\nbreak.jpg").unlink()
    os.close(os.open(os.fsencode(tmp_path / "cat") + b"/\xff.jpg", os.O_CREAT))
    with pytest.raises(CatalogError, match="not UTF-8"):
        read_catalog(tmp_path)


# ---- too long to hold

def test_repeated_rows_are_found_as_by_counting(tmp_path):
    draw = np.random.default_rng(3)
    ids = draw.integers(0, 3 * 10**8, 300_000)
    table = pl.DataFrame({"path": [f"{i}.jpg" for i in ids]})
    table.write_parquet(tmp_path / "many.parquet", row_group_size=10_000)
    bad = (table["path"].is_duplicated().arg_true() + 1).to_list()
    with pytest.raises(CatalogError) as error:
        validate_catalog(tmp_path / "many.parquet")
    assert str(error.value).endswith(f"the same 'item_id' twice (row {', '.join(map(str, bad[:5]))} and {len(bad) - 5} more)")
    with pytest.raises(CatalogError) as eager:
        read_catalog(table)
    assert str(eager.value).partition(": ")[2] == str(error.value).partition(": ")[2]


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_faults_far_down_have_their_row(tmp_path, ending):
    n = 250_000
    rows = pl.DataFrame({"path": pl.int_range(n, eager=True).cast(pl.String) + ".jpg"}).with_columns(split=pl.lit("train"))
    split = pl.when(pl.col("path").is_in(["123456.jpg", "249999.jpg"])).then(pl.lit("tset")).otherwise("split")
    wrong = rows.lazy().with_columns(split=split)
    file = tmp_path / f"far{ending}"
    {".csv": wrong.sink_csv, ".parquet": wrong.sink_parquet, ".jsonl": wrong.sink_ndjson}[ending](file)
    for read in (validate_catalog, scan_catalog, read_catalog):
        with pytest.raises(CatalogError, match=r"'split' is not train, valid or test \(row 123457, 250000\)"):
            read(file)


def test_memory_of_a_million_rows(tmp_path):
    n = 1_000_000
    number = pl.int_range(n, eager=True).alias("n").to_frame().lazy().select(pl.col("n").cast(pl.String).str.zfill(9))
    number.select(path=pl.format("train/class_{}/photo_{}.jpg", pl.col("n").str.slice(5), "n"), label=pl.col("n").str.slice(5),
                  item_id=pl.format("item-{}", "n")).sink_csv(tmp_path / "long.csv")
    code = ("import sys; from visrec_nb.data.catalog import validate_catalog; from visrec_nb.media.isolated import _peak;"
            "facts = validate_catalog(sys.argv[1]); print(facts.rows, _peak() // 2**20)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "long.csv")], capture_output=True, text=True, check=True, timeout=120)
    rows, megabytes = map(int, done.stdout.split())
    assert rows == n and megabytes < 600


# ---- an object store

@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    "An S3 server on this machine, for the tests of this file only."
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    with open(log, "wb") as out:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out)
    try:
        for _ in range(300):
            if server.poll() is not None:
                pytest.fail(f"moto did not start: {log.read_text()[-2000:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def s3(endpoint, tmp_path, monkeypatch):
    "A file system with an empty bucket `shop`; the cache is new."
    import fsspec
    import fsspec.config
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "hush-hush", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_EC2_METADATA_DISABLED": "true", "VISREC_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    if fs.exists("shop"):
        fs.rm("shop", recursive=True)
    fs.mkdir("shop")
    return fs


def test_catalogs_in_a_store(s3, tmp_path):
    for name in ("train/cat/1.jpg", "train/dog/2 ü.jpg", "test/cat/3.jpg", "test/dog/.hidden.jpg", "notes.txt"):
        s3.pipe(f"shop/pets/{name}", name.encode())
    catalog = read_catalog("s3://shop/pets/")
    assert catalog["path"].to_list() == [f"s3://shop/pets/{n}" for n in ("test/cat/3.jpg", "train/cat/1.jpg", "train/dog/2 ü.jpg")]
    assert catalog["label"].to_list() == ["cat", "cat", "dog"] and catalog["split"].to_list() == ["test", "train", "train"]
    for ending in ("parquet", "csv", "jsonl"):
        write_catalog(catalog, f"s3://shop/pets/catalog.{ending}")
        assert read_catalog(f"s3://shop/pets/catalog.{ending}").equals(catalog)
    assert s3.cat("shop/pets/catalog.csv").splitlines()[1] == b"test/cat/3.jpg,test/cat/3.jpg,image,cat,test"
    s3.copy("shop/pets", "shop/moved", recursive=True)
    assert scan_catalog("s3://shop/moved/catalog.parquet").collect()["path"][0] == "s3://shop/moved/test/cat/3.jpg"
    hashed = with_hashes(catalog)
    (tmp_path / "3.jpg").write_bytes(b"test/cat/3.jpg")
    assert hashed["sha256"][0] == with_hashes(pl.DataFrame({"path": [str(tmp_path / "3.jpg")]}))["sha256"][0]
    everywhere = everything("s3://shop/all")
    write_catalog(everywhere, "s3://shop/all/catalog.parquet")
    assert read_catalog("s3://shop/all/catalog.parquet").equals(everywhere)


def test_a_remote_file_is_fetched_once_and_again_after_a_change(s3, tmp_path, monkeypatch):
    s3.pipe("shop/a b/ü+%20.JPG", b"one")
    url = "s3://shop/a b/ü+%20.JPG"
    first = local_file(url)
    assert first.read_bytes() == b"one" and first.suffix == ".jpg" and (tmp_path / "cache") in first.parents
    stamp = first.stat().st_mtime_ns
    assert local_file(url) == first and first.stat().st_mtime_ns == stamp
    first.write_bytes(b"cut")
    first.write_bytes(b"c")
    assert local_file(url).read_bytes() == b"one"
    s3.pipe("shop/a b/ü+%20.JPG", b"two")
    assert local_file(url).read_bytes() == b"two"
    large = os.urandom(12_000_000)
    s3.pipe("shop/large.mp4", large)
    assert local_file("s3://shop/large.mp4").read_bytes() == large
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_what_cannot_be_fetched_says_why(s3, tmp_path, monkeypatch):
    s3.pipe("shop/large.jpg", b"x" * 1000)
    for url, text in {"s3://shop/none.jpg": "no such file", "s3://nobucket/a.jpg": "no such file", "s3://shop": "is a folder"}.items():
        with pytest.raises(MediaError, match=text):
            local_file(url)
    with pytest.raises(MediaError, match="1,000 bytes, more than the limit of 999"):
        local_file("s3://shop/large.jpg", max_bytes=999)
    with pytest.raises(CatalogError, match="no such file"):
        read_catalog("s3://shop/none.parquet")
    with pytest.raises(CatalogError, match="holds no photos"):
        read_catalog("s3://shop/nothing/")
    with pytest.raises(CatalogError, match="cannot be written"):
        write_catalog(pl.DataFrame({"path": ["a.jpg"]}), "s3://nobucket/catalog.csv")
    lost = pl.DataFrame({"path": ["s3://shop/none.jpg", "s3://shop/large.jpg"]})
    with pytest.warns(DataWarning, match="1 of 2 files cannot be read"):
        assert with_hashes(lost)["sha256"].null_count() == 1


def test_unreachable_store_is_an_error_in_one_line(s3, monkeypatch):
    import fsspec.config
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nobody = {"endpoint_url": f"http://127.0.0.1:{port}", "config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", nobody)
    with pytest.raises(MediaError) as error:
        local_file("s3://shop/a.jpg")
    assert "cannot be fetched" in str(error.value) and "\n" not in str(error.value) and "hush" not in str(error.value)


def test_processes_that_fetch_the_same_file(s3, endpoint, tmp_path):
    content = os.urandom(3_000_000)
    s3.pipe("shop/clip.mp4", content)
    code = "from visrec_nb.data.remote import local_file; print(local_file('s3://shop/clip.mp4'))"
    environment = os.environ | {"FSSPEC_S3_ENDPOINT_URL": endpoint}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate(timeout=120)[0].strip() for process in running}
    assert len(found) == 1 and open(found.pop(), "rb").read() == content
    assert len([f for f in (tmp_path / "cache").rglob("*") if f.is_file()]) == 1


@pytest.mark.parametrize(("url", "package"), [("s3://shop/a.jpg", "s3fs"), ("gs://shop/a.jpg", "gcsfs"), ("az://shop/a.jpg", "adlfs"),
                                               ("abfs://shop/a.jpg", "adlfs")])
def test_a_missing_backend_is_named_with_its_extra(monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed.*visrec_nb\[cloud\]"):
        local_file(url)


def test_nothing_escapes_the_cache(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem
    monkeypatch.setenv("VISREC_CACHE", str(tmp_path / "cache"))
    names = ["/..%2f..%2fevil.jpg", "/a/..hidden.jpg", "/a.sh;rm -rf ~", "/con.jpg/x." + "j" * 300, "/" + "n" * 900 + ".jpg",
             "/x.jpg\\..\\evil"]
    for name in names:
        MemoryFileSystem().pipe(name, name.encode())
        file = local_file(f"memory:/{name}")
        assert file.read_bytes() == name.encode()
        assert file.resolve().is_relative_to((tmp_path / "cache" / "remote").resolve())
    for url in ("memory://a/../../evil.jpg", "memory://../evil.jpg", "memory://a/./b.jpg", "s3://shop/..", "http://127.0.0.1/a.jpg",
                "s3://" + "KEY:hush@shop/a.jpg", "az://shop/a.jpg?sv=1&sig=hush", "simplecache::memory://a.jpg",
                "reference://a", "github://c/d.jpg", "sftp://host/a.jpg", "local:///etc/passwd"):
        with pytest.raises(CatalogError) as fetching:
            local_file(url)
        with pytest.raises(CatalogError) as reading:
            read_catalog(pl.DataFrame({"path": [url], "media": ["image"]}))
        assert "hush" not in f"{fetching.value} {reading.value}"


def test_no_warning_without_a_reason(tmp_path):
    write_catalog(pl.DataFrame({"path": ["a.jpg", "b.jpg"], "label": ["x", "y"]}), tmp_path / "list.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate_catalog(tmp_path / "list.csv")
