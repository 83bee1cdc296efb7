"""The embedding store under kill -9 and two writers, and embedding that goes on where it was."""

import os
import signal
import subprocess
import sys
import textwrap
from hashlib import sha256
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from visrec_nb.vision.encoder import FunctionEncoder
from visrec_nb.vision.features import embed, image_preprocessing
from visrec_nb.vision.store import EmbeddingStore

WRITER = """
    import sys, numpy as np
    from hashlib import sha256
    from visrec_nb.vision.store import EmbeddingStore
    folder, who, batches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = EmbeddingStore(folder)
    for batch in range(batches):
        numbers = [1000 * who + 10 * batch + i for i in range(10)] if who else [10 * batch + i for i in range(10)]
        store.put([sha256(str(n).encode()).hexdigest() for n in numbers], np.array([[n] * 700 for n in numbers], np.float32))
        print(batch, flush=True)
"""


def writer(folder, who=0, batches=10**9):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(who), str(batches)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def key(n): return sha256(str(n).encode()).hexdigest()


@pytest.mark.slow
def test_a_writer_killed_at_any_point_loses_at_most_one_batch(tmp_path):
    draw = np.random.default_rng(0)
    for run in range(12):
        folder = tmp_path / str(run)
        process = writer(folder)
        wanted = int(draw.integers(1, 60))
        for _ in range(wanted): process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        told = wanted + len(process.stdout.read().splitlines())
        process.wait()
        store = EmbeddingStore(folder)
        assert 10 * told <= len(store) <= 10 * (told + 1)
        present = [n for n in range(10 * (told + 1)) if key(n) in store]
        assert (store.get([key(n) for n in present]) == np.array(present, np.float32)[:, None]).all()
        missing = [n for n in range(10 * (told + 1)) if n not in set(present)]
        if missing: store.put([key(n) for n in missing], np.array([[n] * 700 for n in missing], np.float32))
        again = EmbeddingStore(folder)
        assert (again.get([key(n) for n in range(10 * (told + 1))])[:, 0] == np.arange(10 * (told + 1))).all()


def test_two_writers_and_a_reader_at_once(tmp_path):
    writers = [writer(tmp_path, who, 40) for who in (1, 2)]
    for process in writers: process.stdout.readline()
    reader, sizes = EmbeddingStore(tmp_path), []
    while any(process.poll() is None for process in writers):
        for process in writers: process.stdout.readline()
        reader.refresh()
        sizes.append(len(reader))
        for who in (1, 2):
            there = [n for n in range(1000 * who, 1000 * who + 400) if key(n) in reader]
            assert there == list(range(1000 * who, 1000 * who + len(there)))
            if there: assert (reader.get([key(there[-1])]) == there[-1]).all()
    reader.refresh()
    assert len(reader) == 800 and sizes == sorted(sizes) and all(process.returncode == 0 for process in writers)


def test_memory_of_a_large_store_is_mapped_not_read(tmp_path):
    code = f"""
        import os, numpy as np
        from hashlib import sha256
        from visrec_nb.vision.store import EmbeddingStore
        keys = [sha256(str(n).encode()).hexdigest() for n in range(60_000)]
        if not os.path.exists({str(tmp_path / "s")!r}):
            store = EmbeddingStore({str(tmp_path / "s")!r})
            for i in range(0, 60_000, 2000): store.put(keys[i:i + 2000], np.full((2000, 1280), i, np.float32))
            store.close()
        else:
            from visrec_nb.media.isolated import _peak
            before = _peak()
            store = EmbeddingStore({str(tmp_path / "s")!r})
            assert len(store) == 60_000 and (store.get(keys[59_990:]) == 58_000).all()
            print((_peak() - before) / 2**20)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    for _ in range(2): out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "s").exists() and float(out) < 60  # MB, of a store of 307


EMBED = """
    import sys, time, os
    from pathlib import Path
    import numpy as np, polars as pl
    from visrec_nb.vision.encoder import FunctionEncoder
    from visrec_nb.vision.features import embed, image_preprocessing
    def slow(pixels):
        if len(pixels) > 2 or pixels.any():
            sys.stdout.write(f"{len(pixels)}\\n")
            sys.stdout.flush()
        return pixels.reshape(len(pixels), -1)[:, :8].astype(np.float32)
    catalog = pl.read_parquet(sys.argv[1])
    embed(catalog, FunctionEncoder(slow, "slow 1", 16), image_preprocessing(16, ["plain"]), sys.argv[2], threads=2)
"""


@pytest.mark.slow
def test_a_killed_run_repeats_at_most_what_its_threads_held(tmp_path):
    draw = np.random.default_rng(1)
    for n in range(400): Image.fromarray(draw.integers(1, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{n:03}.png")
    catalog = pl.DataFrame({"item_id": [f"{n:03}" for n in range(400)], "path": [str(tmp_path / f"{n:03}.png") for n in range(400)]})
    catalog.write_parquet(tmp_path / "catalog.parquet")
    encoded = []

    def counting(pixels):
        encoded.append(len(pixels))
        return pixels.reshape(len(pixels), -1)[:, :8].astype(np.float32)

    encoder = FunctionEncoder(counting, "slow 1", 16)
    for stop in (3, 17, 31):
        store = tmp_path / f"store-{stop}"
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(EMBED), str(tmp_path / "catalog.parquet"), str(store)],
                                   stdout=subprocess.PIPE, text=True)
        begun = sum(int(process.stdout.readline()) for _ in range(stop))
        process.send_signal(signal.SIGKILL)
        begun += sum(map(int, process.stdout.read().split()))
        process.wait()
        encoded.clear()
        again = embed(catalog, encoder, image_preprocessing(16, ["plain"]), store, threads=2)
        assert again.catalog.height == 400 and sum(encoded) == again.computed
        assert begun + again.computed - 400 <= 16, "two threads hold eight pictures each"
        whole = embed(catalog, encoder, image_preprocessing(16, ["plain"]), None)
        assert (again.features == whole.features).all()


def test_an_interrupted_run_keeps_what_was_done(tmp_path):
    for n in range(64): Image.fromarray(np.full((16, 16, 3), n, np.uint8)).save(tmp_path / f"{n}.png")
    catalog = pl.DataFrame({"item_id": list(map(str, range(64))), "path": [str(tmp_path / f"{n}.png") for n in range(64)]})
    calls = []

    def interrupting(pixels):
        calls.append(len(pixels))
        if len(calls) == 4: os.kill(os.getpid(), signal.SIGINT)
        return pixels.reshape(len(pixels), -1)[:, :4].astype(np.float32)

    encoder = FunctionEncoder(interrupting, "interrupting", 16)
    calls.clear()
    with pytest.raises(KeyboardInterrupt): embed(catalog, encoder, image_preprocessing(16, ["plain"]), tmp_path / "store", threads=1)
    stored = EmbeddingStore(next(Path(tmp_path / "store").iterdir()))
    assert 24 <= len(stored) < 64
    done = embed(catalog, encoder, image_preprocessing(16, ["plain"]), tmp_path / "store", threads=1)
    assert done.computed == 64 - len(stored) and done.features.shape == (64, 1, 4)


@pytest.mark.parametrize("size", ["lite1", "lite2"])
@pytest.mark.slow
def test_the_larger_packaged_backbones_name_a_photo_and_agree_with_torch(size):
    import timm
    import torch
    from PIL import ImageOps
    from sklearn.datasets import load_sample_image

    from visrec_nb.vision.backbones import _load_in_order, _packaged_state, backbone
    from visrec_nb.vision.export import from_pixels
    from visrec_nb.vision.encoder import open_encoder
    from visrec_nb.vision.torch_encoder import torch_encoder

    row = backbone(f"efficientnet_{size}")
    photo = np.asarray(ImageOps.fit(Image.fromarray(load_sample_image("china.jpg")), (row.size,) * 2))[None]
    network = timm.create_model(row.architecture).eval()
    _load_in_order(network, _packaged_state(row.weights))
    with torch.no_grad(): assert from_pixels(network, row)(torch.tensor(photo)).argmax(1).item() == 698  # palace
    onnx = open_encoder(row.name, "cpu")
    by_torch = torch_encoder(row.name, "cpu")
    assert by_torch.id == onnx.id
    assert np.linalg.norm(onnx(photo) - by_torch(photo)) < 1e-3 * np.linalg.norm(by_torch(photo))
