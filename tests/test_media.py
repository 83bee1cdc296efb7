"""Every hard file that a decoder must get right, every limit, and thousands of damaged files."""

import io
import itertools
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from visrec_nb.core.errors import MediaError, ParameterError, VisrecError
from visrec_nb.media import video
from visrec_nb.media.image import decode_image, image_facts, load_image
from visrec_nb.media.isolated import IsolatedDecoder
from visrec_nb.media.video import probe, read_clip, read_pairs

Y, X = np.mgrid[:48, :64]
PICTURE = np.stack([X * 4, Y * 5, 255 - X * 2 - Y], -1).astype(np.uint8)
PHOTO = Image.fromarray(PICTURE)
FRAMES = [PHOTO, PHOTO.transpose(Image.Transpose.FLIP_LEFT_RIGHT), PHOTO.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
DEEP = np.random.default_rng(0).integers(0, 65536, (13, 17, 4), dtype=np.uint16)
STORED = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


def encoded(im, kind, **options):
    "The bytes of a file; of copies, because saving leaves its traces on an image."
    out = io.BytesIO()
    im.copy().save(out, kind, **{k: [other.copy() for other in v] if k == "append_images" else v for k, v in options.items()})
    return out.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels, *extra, bits=16):
    "A PNG written by hand: Pillow writes no sixteen-bit colour."
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in pixels)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(pixels, photometric=None, sample_format=1, order="<", extra=()):
    "An uncompressed TIFF written by hand."
    height, width, channels = pixels.shape
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    photometric = photometric if photometric is not None else 2 if channels >= 3 else 1
    tags = sorted([(256, "H", [width]), (257, "H", [height]), (258, "H", [pixels.itemsize * 8] * channels), (259, "H", [1]),
                   (262, "H", [photometric]), (273, "I", [0]), (277, "H", [channels]), (278, "I", [height]), (279, "I", [len(content)]),
                   (284, "H", [1]), (339, "H", [sample_format] * channels), *extra])
    start = 8 + 2 + 12 * len(tags) + 4
    longer = b"".join(v for v in (struct.pack(order + kind * len(n), *n) for _, kind, n in tags) if len(v) > 4)
    folder, at = struct.pack(order + "H", len(tags)), start
    for tag, kind, numbers in tags:
        value = struct.pack(order + kind * len(numbers), *([start + len(longer)] if tag == 273 else numbers))
        if len(value) > 4:
            value, at = struct.pack(order + "I", at), at + len(value)
        folder += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + value.ljust(4, b"\0")
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + folder + b"\0" * 4 + longer + content


def reason(function, *args, **options):
    "Why it was refused; anything but a MediaError is a failure of the test."
    with pytest.raises(MediaError) as caught:
        function(*args, **options)
    return caught.value.reason


def error(shown, wanted):
    return np.abs(shown.astype(int) - np.asarray(wanted)).max()


# Images

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_of_every_format(kind, turn):
    stored = PHOTO.transpose(STORED[turn]) if turn in STORED else PHOTO
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(stored, kind, exif=exif, **({} if kind in ("PNG", "TIFF") else {"quality": 97}))
    facts = image_facts(data)
    assert (facts.width, facts.height, facts.orientation, facts.frames) == (64, 48, turn, 1)
    shown = decode_image(data)
    assert shown.shape == PICTURE.shape
    assert np.abs(shown.astype(int) - PICTURE).mean() < (3 if kind in ("JPEG", "WEBP", "AVIF") else 0.001)
    small = decode_image(data, (12, 16))
    assert np.abs(small.astype(int) - np.asarray(PHOTO.resize((16, 12), Image.Resampling.BICUBIC))).mean() < 4


def test_a_png_may_tell_its_orientation_at_the_end():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(np.asarray(PHOTO.transpose(STORED[6])), bits=8)
    data = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    assert image_facts(data)[2:4] == (64, 48) and (decode_image(data) == PICTURE).all()


def test_orientation_without_sense_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 77
    data = encoded(PHOTO, "PNG", exif=exif)
    assert image_facts(data).orientation == 1 and (decode_image(data) == PICTURE).all()


def on_white(colour, alpha):
    return np.rint(colour / 257 * alpha + 255 * (1 - alpha))


GREY, ALPHA = np.rint(DEEP[..., :1] / 257).repeat(3, -1), DEEP[..., 3:] / 65535


@pytest.mark.parametrize(("data", "wanted", "tolerance"), [
    (png(DEEP[..., :1]), GREY, 0),
    (png(DEEP[..., :3]), np.rint(DEEP[..., :3] / 257), 1),
    (png(DEEP), on_white(DEEP[..., :3], ALPHA), 2),
    (png(DEEP[..., [0, 3]]), on_white(DEEP[..., :1], ALPHA).repeat(3, -1), 2),
    (png(DEEP[..., :1], chunk(b"tRNS", struct.pack(">H", DEEP[0, 0, 0]))), np.where(DEEP[..., :1] == DEEP[0, 0, 0], 255, GREY), 0),
    (tiff(DEEP[..., :1]), GREY, 0),
    (tiff(DEEP[..., :1], order=">"), GREY, 0),
    (tiff(DEEP[..., :1], photometric=0), 255 - GREY, 0),
    (tiff(DEEP[..., :3]), np.rint(DEEP[..., :3] / 257), 1),
    (tiff(DEEP[..., :3], order=">"), np.rint(DEEP[..., :3] / 257), 1),
    (tiff(DEEP, extra=[(338, "H", [2])]), on_white(DEEP[..., :3], ALPHA), 2),
    (tiff((DEEP[..., :1] / 65535).astype(np.float32), sample_format=3), np.rint(DEEP[..., :1] / 257).repeat(3, -1), 0),
    (b"P5\n17 13\n1023\n" + (DEEP[..., 0] >> 6).astype(">u2").tobytes(), np.rint((DEEP[..., :1] >> 6) / 1023 * 255).repeat(3, -1), 0),
    (b"P6\n17 13\n4095\n" + (DEEP[..., :3] >> 4).astype(">u2").tobytes(), np.rint((DEEP[..., :3] >> 4) / 4095 * 255), 0),
], ids=["png", "png rgb", "png rgba", "png grey alpha", "png key", "tiff", "tiff big-endian", "tiff white is 0", "tiff rgb",
        "tiff rgb big-endian", "tiff rgba", "tiff float", "pgm 10 bits", "ppm 12 bits"])
def test_sixteen_bits_are_scaled_right(data, wanted, tolerance):
    assert error(decode_image(data), wanted) <= tolerance
    assert image_facts(data).bits in (16, 32)


def test_a_sixteen_bit_colour_key_is_white():
    key = chunk(b"tRNS", struct.pack(">HHH", *map(int, DEEP[5, 5, :3])))
    shown = decode_image(png(DEEP[..., :3], key))
    wanted = np.rint(DEEP[..., :3] / 257)
    wanted[5, 5] = 255
    assert error(shown, wanted) <= 1


@pytest.mark.parametrize("pixels", [DEEP[..., :1].astype(np.uint32), DEEP[..., :1].astype(np.int16)], ids=["uint32", "int16"])
def test_numbers_without_a_range_are_refused(pixels):
    data = tiff(pixels, sample_format=1 if pixels.dtype.kind == "u" else 2)
    assert "the range that stands for white is unknown" in reason(decode_image, data)


def test_alpha_palette_and_printers_colours():
    clear = Image.fromarray(np.dstack([PICTURE, (X * 4).astype(np.uint8)]))
    wanted = PICTURE * (X[..., None] * 4 / 255) + 255 * (1 - X[..., None] * 4 / 255)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        data = encoded(clear, kind, **options)
        assert image_facts(data).alpha and error(decode_image(data), wanted) <= 1, kind
    assert error(decode_image(encoded(clear, "AVIF", quality=98)), wanted) <= 30
    ink = PHOTO.convert("CMYK")
    data = encoded(ink, "JPEG", quality=98)
    assert image_facts(data).mode == "CMYK" and error(decode_image(data), PICTURE) <= 24
    assert np.abs(decode_image(data).astype(int) - PICTURE).mean() < 3


@pytest.mark.parametrize(("kind", "frames"), [("GIF", 3), ("PNG", 3), ("WEBP", 3), ("AVIF", 3), ("TIFF", 3), ("MPO", 3)])
def test_the_first_of_several_frames_and_it_is_said(kind, frames):
    many = encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **({"lossless": True} if kind == "WEBP" else {}))
    one = encoded(FRAMES[0], "JPEG" if kind == "MPO" else kind)
    facts = image_facts(many)
    assert (facts.format, facts.frames, facts.width, facts.height) == (kind, frames, 64, 48)
    assert image_facts(one).frames == 1
    assert np.abs(decode_image(many).astype(int) - PICTURE).mean() < 6
    assert "more frames than the limit of 2" in reason(decode_image, many, max_frames=2)


def test_facts_read_no_pixels():
    data = encoded(PHOTO, "PNG")
    damaged = data[:data.index(b"IDAT") + 20]
    assert image_facts(damaged)[:5] == ("PNG", "RGB", 64, 48, 1) and reason(decode_image, damaged)
    assert "limit" in reason(image_facts, data, max_pixels=100)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_a_file_cut_anywhere_is_refused(kind):
    data = encoded(Image.fromarray(noise(0)), kind)
    for part in (0.1, 0.5, 0.9, 0.97):
        assert reason(decode_image, data[:int(len(data) * part)])


def test_limits_come_before_decoding(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(PHOTO, "PNG"))
    for limit in ({"max_bytes": 10}, {"max_pixels": 10}, {"max_frames": 0}):
        assert "limit" in reason(load_image, path, **limit)
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 5_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")
    assert reason(decode_image, huge) == "cannot be decoded (20,000 x 5,000 pixels, more than the limit of 80,000,000)"
    assert "limit" in reason(decode_image, encoded(PHOTO, "WEBP"), max_pixels=2 * PHOTO.width * PHOTO.height - 2)


def test_slow_ways_of_packing_are_refused_at_once():
    header = struct.pack("<IiiHHIIiiII", 40, 40_000_000, 1, 1, 8, 1, 4, 0, 0, 256, 0)
    bmp = b"BM" + struct.pack("<IHHI", 1082, 0, 0, 1078) + header + bytes(1024) + b"\1\0\0\0"
    start = time.perf_counter()
    assert "run-length" in reason(decode_image, bmp)
    assert "text" in reason(decode_image, b"P3\n1 1\n255\n1 2 3\n")
    gif = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + (b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\0") * 3_000_000
    assert "frames" in reason(image_facts, gif)
    assert "blocks" in reason(image_facts, gif[:13 + 11] + b"\1a" * 3_000_000)
    tiny = b"".join(struct.pack("<HI", 0, 14 + 6 * i) for i in range(200_000))
    assert reason(image_facts, b"II*\0\x08\0\0\0" + tiny)
    assert time.perf_counter() - start < 5


def test_large_jpegs_are_reduced_alike():
    large = Image.fromarray(PICTURE).resize((2400, 1800), Image.Resampling.BICUBIC)
    noisy = np.asarray(large).astype(int) + np.random.default_rng(0).integers(-15, 16, (1800, 2400, 1))
    data = encoded(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), "JPEG", quality=90)
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(decode_image(data, 224) - whole)
    assert difference.mean() < 1 and difference.max() < 12


# Videos

STEADY = [i / 10 for i in range(40)]
UNEVEN = (np.cumsum(np.random.default_rng(1).integers(20, 400, 40)) / 1000).tolist()
B_FRAMES = {"bf": "3", "b_strategy": "0", "crf": "10"}


def numbered(i, height=48, width=64):
    "A frame that shows its number in eight bars; its upper left corner is red."
    pixels = np.zeros((height, width, 3), np.uint8)
    for bit in range(8):
        pixels[16:, bit * width // 8:(bit + 1) * width // 8] = 255 * (i >> bit & 1)
    pixels[:12, :16] = (255, 0, 0)
    return pixels


def numbers(frames):
    return [int(sum(1 << bit for bit in range(8) if frame[32, 4 + 8 * bit].mean() > 127)) for frame in frames]


def add_video(container, codec="libx264", pix_fmt="yuv420p", options=None, rate=1000, gop=12, rotation=0, size=(48, 64)):
    stream = container.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width = size
    stream.pix_fmt, stream.codec_context.gop_size = pix_fmt, gop
    stream.time_base = stream.codec_context.time_base = Fraction(1, rate)
    if rotation:
        stream.set_display_rotation(rotation)
    return stream


def write_frames(container, stream, times, picture):
    "Encode a frame for each of these seconds; the last is shown a tenth of a second."
    ticks = [round(t / stream.codec_context.time_base) for t in [*times, times[-1] + 0.1]]
    lasting = {tick: after - tick for tick, after in itertools.pairwise(ticks)}

    def write(packets):
        for packet in packets:
            packet.duration = lasting[packet.pts]
            container.mux(packet)

    for i, tick in enumerate(ticks[:-1]):
        frame = av.VideoFrame.from_ndarray(picture(i))
        frame.pts, frame.time_base = tick, stream.codec_context.time_base
        write(stream.encode(frame))
    write(stream.encode())


def film(path, times=STEADY, *, mux=None, picture=numbered, **how):
    "Write a video whose frames appear at these seconds."
    with av.open(str(path), "w", options=mux or {}) as container:
        write_frames(container, add_video(container, **how), times, picture)
    return path


KINDS = {
    "mp4": ("a.mp4", {"options": B_FRAMES}), "mov open gop": ("a.mov", {"options": B_FRAMES | {"x264-params": "open-gop=1"}}),
    "mkv": ("a.mkv", {"options": B_FRAMES}), "fragments": ("b.mp4", {"options": B_FRAMES, "mux": {"movflags": "frag_keyframe+empty_moov"}}),
    "mpegts": ("a.ts", {"options": B_FRAMES}),
    "vp8 hidden frames": ("a.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "9"}}),
    "hevc": ("c.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}), "flv": ("a.flv", {"options": B_FRAMES}),
    "gif": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}), "avi": ("a.avi", {"codec": "mpeg4", "options": {"bf": "2"}, "rate": 10}),
    "avi h264": ("b.avi", {"options": B_FRAMES, "rate": 10}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [STEADY, UNEVEN], ids=["steady", "uneven"])
def test_frames_by_number_are_those_of_decoding_everything(kind, times, tmp_path):
    name, how = KINDS[kind]
    if name.endswith("avi") and times is UNEVEN:
        pytest.skip("AVI has no uneven times")
    path = film(tmp_path / name, times, **how)
    with av.open(str(path)) as container:
        everything = [frame.to_ndarray(format="rgb24", interpolation="BICUBIC") for frame in container.decode(video=0)]
    assert numbers(everything) == list(range(40)) and probe(path).frames == 40
    clip = read_clip(path, 40, frame_range=(0, None))
    assert numbers(clip.frames) == list(range(40)) and (clip.frames == everything).all()
    if kind != "gif":  # a GIF's times are hundredths of a second
        assert np.abs(clip.times - (np.array(times) - times[0])).max() < 0.0011
    draw = random.Random(kind)
    for _ in range(12):
        first, stride = draw.randrange(40), draw.randrange(1, 4)
        wanted = [min(first + stride * i, 39) for i in range(5)]
        assert numbers(read_clip(path, 5, frame_range=(first, None), sampling="dense", frame_stride=stride).frames) == wanted
        if kind != "gif":
            start = float(clip.times[first])
            assert numbers(read_clip(path, 5, start=start, sampling="dense", frame_stride=stride).frames) == wanted


def test_each_sampling_in_seconds_and_in_frames(tmp_path):
    times = [*STEADY[:10], *(1 + i for i in range(10))]  # ten frames in the first second, then one a second
    path = film(tmp_path / "a.mp4", times, options={"bf": "0"})
    assert numbers(read_clip(path, 5, seconds=10).frames) == [10, 12, 14, 16, 18]
    assert numbers(read_clip(path, 5, frame_range=(0, None)).frames) == [2, 6, 10, 14, 18]
    assert numbers(read_clip(path, 3, frame_range=(3, 9)).frames) == [4, 6, 8]
    assert numbers(read_clip(path, 4, start=0.5, seconds=0.4, sampling="dense").frames) == [5, 6, 7, 8]
    assert numbers(read_clip(path, 3, start=0.8, sampling="dense", frame_stride=2).frames) == [8, 10, 12]
    assert numbers(read_clip(path, 4, frame_range=(4, 9), sampling="dense", frame_stride=2).frames) == [4, 6, 8, 8]
    seen = set()
    for seed in range(30):
        drawn = numbers(read_clip(path, 4, frame_range=(4, 16), sampling="segments", rng=np.random.default_rng(seed)).frames)
        assert all(4 + 3 * i <= n < 7 + 3 * i for i, n in enumerate(drawn))
        seen.update(drawn)
        clip = read_clip(path, 4, seconds=8, sampling="segments", rng=np.random.default_rng(seed))
        assert ((clip.times >= np.arange(4) * 2 - 1) & (clip.times < np.arange(4) * 2 + 2)).all()
    assert seen == set(range(4, 16))
    for bad in ({"frame_range": (0, 5), "start": 1.0}, {"frame_range": (5, 5)}, {"frame_range": (-1, None)}, {"frame_stride": 0},
                {"sampling": "random"}, {"sampling": "segments"}, {"num_frames": 0}, {"seconds": -1.0}, {"size": 0}):
        with pytest.raises(ParameterError):
            read_clip(path, **({"num_frames": 4} | bad))
    assert "the video has 20" in reason(read_clip, path, frame_range=(20, None))


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_turned_videos_come_out_upright(turn, tmp_path):
    path = film(tmp_path / "a.mp4", STEADY[:4], rotation=turn, options={"crf": "5"})
    frame = read_clip(path, 1).frames[0]
    assert error(frame, np.rot90(numbered(2), turn // 90)) < 60
    assert probe(path)[3:] == (*frame.shape[1::-1], turn)
    assert read_clip(path, 2, size=(20, 30)).frames.shape == (2, 20, 30, 3)


def test_ten_bits(tmp_path):
    eight, ten = (film(tmp_path / f"{f}.mp4", STEADY[:8], pix_fmt=f, options={"crf": "4"}) for f in ("yuv420p", "yuv420p10le"))
    assert np.abs(read_clip(ten, 8).frames.astype(int) - read_clip(eight, 8).frames).mean() < 2


def add_sound(container):
    sound = container.add_stream("aac", rate=8000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    return sound, frame


def test_several_streams(tmp_path):
    cover_first, sound_first, two, only_sound = (tmp_path / name for name in ("cover.mp4", "sound.mp4", "two.mkv", "only.mp4"))
    with av.open(str(sound_first), "w") as container:
        sound, silence = add_sound(container)
        stream = add_video(container)
        container.mux(sound.encode(silence))
        write_frames(container, stream, STEADY[:10], numbered)
        container.mux(sound.encode())
    with av.open(str(two), "w") as container:
        small, large = add_video(container), add_video(container, size=(96, 128))
        write_frames(container, small, STEADY[:10], lambda i: numbered(100 + i))
        write_frames(container, large, STEADY[:10], lambda i: numbered(i, 96, 128))
    with av.open(str(cover_first), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = add_video(container)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((480, 640, 3), np.uint8))))
        write_frames(container, stream, STEADY[:10], numbered)
    with av.open(str(only_sound), "w") as container:
        sound, silence = add_sound(container)
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    for path in (sound_first, cover_first):
        assert numbers(read_clip(path, 5).frames) == [1, 3, 5, 7, 9], path
    assert probe(two).width == 64 and numbers(read_clip(two, 5).frames) == [101, 103, 105, 107, 109]  # of equals, the first
    assert reason(read_clip, only_sound) == reason(probe, only_sound) == "holds no video stream"


def noise(i):
    return np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(("name", "how"), [
    ("a.mp4", {"mux": {"movflags": "faststart"}}), ("b.mp4", {}), ("a.avi", {"codec": "mpeg4", "rate": 10}), ("a.mkv", {}),
    ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}), ("c.mp4", {"mux": {"movflags": "frag_keyframe+empty_moov"}}),
])
def test_a_video_cut_in_the_middle_is_refused(name, how, tmp_path):
    path = film(tmp_path / name, picture=noise, **how)
    assert read_clip(path, 4).frames.shape == (4, 48, 64, 3)
    cut = tmp_path / f"cut.{name}"
    cut.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    assert reason(read_clip, cut, 4)


def test_every_limit_of_a_video(tmp_path):
    path = film(tmp_path / "a.mp4")
    for limit in ({"max_bytes": 100}, {"max_pixels": 100}, {"max_frames": 39}, {"max_seconds": 1}, {"max_clip_bytes": 100}):
        assert "limit" in reason(read_clip, path, **limit)
        assert "limit" in reason(read_pairs, path, **limit)
        if "max_seconds" not in limit and "max_clip_bytes" not in limit:
            assert "limit" in reason(probe, path, **limit)
    assert numbers(read_clip(path, 2, max_frames=40).frames) == [10, 30]
    assert "limit" in reason(read_clip, film(tmp_path / "a.ts"), max_frames=39)
    assert "not allowed" in reason(read_clip, film(tmp_path / "a.mkv", codec="snow", options={"strict": "-2"}))


def claims(data, count, fragments=False):
    "The same MP4, with a table that says it has `count` frames of one byte each."
    data = bytearray(data)
    if fragments:
        struct.pack_into(">II", data, data.index(b"trun") + 4, 1, count)
    else:
        struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, count)
        struct.pack_into(">III", data, data.index(b"stsc") + 12, 1, count, 1)
        struct.pack_into(">II", data, data.index(b"stts") + 12, count, 1)
    return bytes(data)


def test_claimed_frames_cost_nothing(tmp_path):
    start = time.perf_counter()
    for mux in ({}, {"movflags": "frag_keyframe+empty_moov"}):
        path = film(tmp_path / "a.mp4", mux=mux)
        path.write_bytes(claims(path.read_bytes(), 170_000_000, bool(mux)))
        for read in (read_clip, read_pairs, probe):
            assert "claims more frames than the limit" in reason(read, path)
    film(path)
    data = bytearray(path.read_bytes())
    struct.pack_into(">I", data, data.index(b"stts") + 12, 1_000_000_000)
    path.write_bytes(data)
    assert "frames, more than the limit" in reason(read_clip, path)
    path.write_bytes(data[:32] + b"\0\0\0\x08free" * (video.MAX_BOXES + 1))
    assert "boxes" in reason(read_clip, path)
    assert time.perf_counter() - start < 10


def test_only_the_file_itself_is_opened(tmp_path):
    secret = film(tmp_path / "secret.mp4", STEADY[:4])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        here = f"http://127.0.0.1:{listener.getsockname()[1]}/a.mp4"
        for target in (str(secret), secret.name, f"file://{secret}", "file:///etc/passwd", here):
            planted = {
                "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:3,\n{target}\n#EXT-X-ENDLIST\n",
                "concat": f"ffconcat version 1.0\nfile '{target}'\n",
                "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
                        f"<BaseURL>{target}</BaseURL></AdaptationSet></Period></MPD>",
                "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\na=control:{target}\nm=video 9 RTP/AVP 96\n",
                "imf": f'<?xml version="1.0"?><CompositionPlaylist><Asset>{target}</Asset></CompositionPlaylist>',
                "vobsub": f"# VobSub index file, v7\nid: en, index: 0\n{target}\n",
            }
            for text in planted.values():
                for name in ("a.mp4", "a.m3u8", "a.avi", "a.mkv"):
                    (tmp_path / name).write_text(text)
                    assert reason(read_clip, tmp_path / name)
                    assert reason(probe, tmp_path / name)
            assert reason(load_image, tmp_path / "a.mp4")
        for address in (here, f"concat:{secret}|{secret}", f"subfile,,start,0,end,0,,:{secret}", f"file:{secret}", "data:video/mp4,AAAA"):
            assert reason(read_clip, address) == "no such file"
        with pytest.raises(TimeoutError):
            listener.accept()


# In a process of its own

@pytest.fixture(scope="module")
def long_film(tmp_path_factory):
    return film(tmp_path_factory.mktemp("films") / "long.mp4", [i / 10 for i in range(3000)])


def children(pid):
    "Processes that `pid` started, as the system sees them."
    try:
        return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    except OSError:
        return []


def test_a_decoder_apart_gives_the_same(tmp_path):
    path = film(tmp_path / "a.mp4")
    photo = tmp_path / "a.png"
    photo.write_bytes(encoded(PHOTO, "PNG"))
    with IsolatedDecoder() as decoder:
        assert (decoder.load_image(photo) == PICTURE).all() and (decoder.load_image(str(photo), 20) == load_image(photo, 20)).all()
        assert decoder.image_facts(photo.read_bytes()) == image_facts(photo.read_bytes())
        assert decoder.probe(path) == probe(path)
        for options in ({"size": (20, 30)}, {"frame_range": (3, 20)}, {"start": 1.0, "sampling": "dense", "frame_stride": 2}):
            for inside, outside in zip(decoder.read_clip(path, 5, **options), read_clip(path, 5, **options), strict=True):
                assert inside.dtype == outside.dtype and (inside == outside).all()
        for inside, outside in zip(decoder.read_pairs(path, 3), read_pairs(path, 3), strict=True):
            assert inside.dtype == outside.dtype and (inside == outside).all()
        first, second = (decoder.read_clip(path, 5, sampling="segments", rng=np.random.default_rng(s)).times for s in (0, 0))
        assert (first == second).all()
        assert reason(decoder.load_image, b"") == reason(decoder.load_image, b"", name="a") == "the file is empty"
        assert reason(decoder.load_image, photo, max_bytes=10) == reason(load_image, photo, max_bytes=10)
        assert reason(decoder.load_image, photo, max_pixels=10) == reason(load_image, photo, max_pixels=10)
        with pytest.raises(ParameterError, match="sampling"):
            decoder.read_clip(path, sampling="random")
        with pytest.raises(ParameterError, match="colour"):
            decoder.read_clip(path, colour="grey")
        with pytest.raises(MediaError) as caught:
            decoder.load_image(tmp_path / "absent.png")
        assert caught.value.path == str(tmp_path / "absent.png")
        assert decoder.restarts == 0 and 2**20 < decoder.peak_memory < 2**29
    with pytest.raises(VisrecError, match="closed"):
        decoder.load_image(photo)


def test_too_slow_too_large_and_killed(long_film):
    header = struct.pack(">IIBBBBB", 13_000, 12_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10)))
    with IsolatedDecoder(max_memory=100 * 2**20) as decoder:
        decoder.load_image(encoded(PHOTO, "PNG"))  # it has started
        os.kill(next(iter(decoder._all)).process.pid, signal.SIGSTOP)  # it can't be done in time, however fast it is
        start = time.perf_counter()
        assert reason(decoder.read_clip, long_film, 2000, timeout=0.1) == "took longer than 0.1 s"
        assert time.perf_counter() - start < 3 and decoder.restarts == 1
        assert "memory" in reason(decoder.load_image, bomb, max_pixels=10**9) and decoder.restarts == 2
        assert decoder.peak_memory < 400 * 2**20
        decoder.load_image(encoded(PHOTO, "PNG"))  # it has started
        child = next(iter(decoder._all)).process
        os.kill(child.pid, signal.SIGSTOP)  # it can't be done before it is killed, however fast it is
        threading.Timer(0.15, child.kill).start()
        assert "SIGKILL" in reason(decoder.read_clip, long_film, 3000, timeout=30) and decoder.restarts == 3
        next(iter(decoder._all)).process.kill()  # while idle: the next call doesn't notice
        time.sleep(0.2)
        assert (decoder.load_image(encoded(PHOTO, "PNG")) == PICTURE).all()


def test_four_threads_share_two_processes(long_film):
    before = set(children(os.getpid()))
    threads_before = threading.active_count()
    with IsolatedDecoder(2) as decoder:
        def work(i):
            if i % 10 == 3:
                return reason(decoder.read_clip, long_film, 2000, timeout=0.001)
            if i % 2:
                return numbers(decoder.read_clip(long_film, 1, start=i / 10 + 0.05, sampling="dense").frames) == [i]
            shade = np.full((20, 30, 3), i, np.uint8)
            return (decoder.load_image(encoded(Image.fromarray(shade), "PNG")) == i).all()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(work, range(100)))
        assert all("took longer" in a if i % 10 == 3 else a is True or a == np.True_ for i, a in enumerate(answers))
        assert decoder.restarts == 10
        assert len(set(children(os.getpid())) - before) == 2
    assert set(children(os.getpid())) <= before and threading.active_count() <= threads_before


def test_closing_ends_running_and_waiting_calls(long_film):
    decoder = IsolatedDecoder()
    decoder.load_image(encoded(PHOTO, "PNG"))
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(reason, decoder.read_clip, long_film, 3000, size=(150, 200), timeout=30) for _ in range(3)]
        time.sleep(0.15)
        decoder.close()
        assert all("died" in call.result(timeout=10) for call in calls)


def test_it_knows_nothing_and_ends_with_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    code = ("import sys, time\nfrom visrec_nb.media.isolated import IsolatedDecoder\ndecoder = IsolatedDecoder()\n"
            "decoder.load_image(sys.stdin.buffer.read())\nprint(next(iter(decoder._all)).process.pid, flush=True)\ntime.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    parent.stdin.write(encoded(PHOTO, "PNG"))
    parent.stdin.close()
    child = int(parent.stdout.readline())
    if sys.platform == "linux":
        assert b"secret" not in Path(f"/proc/{child}/environ").read_bytes()
        limits = Path(f"/proc/{child}/limits").read_text()
        assert all(line.split()[-3:-1] == ["0", "0"] for line in limits.splitlines() if line.startswith(("Max core", "Max file size")))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if sys.platform == "linux" and Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break  # ended; whoever adopted it has not noticed
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child outlived its parent")


def test_it_is_not_used_after_a_fork():
    with IsolatedDecoder() as decoder:
        decoder._owner = os.getpid() + 1
        with pytest.raises(VisrecError, match="fork"):
            decoder.load_image(encoded(PHOTO, "PNG"))


# Damaged files by the thousand: VISREC_FUZZ=10 makes ten times as many, others

TIMES = int(os.environ.get("VISREC_FUZZ", "1"))
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def image_seeds():
    alpha = Image.fromarray(np.dstack([PICTURE, (X * 4).astype(np.uint8)]))
    packed = b"x\0\0" + zlib.compress(bytes(300))
    more = {"save_all": True, "append_images": FRAMES[1:]}
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": encoded(PHOTO, "JPEG", exif=exif), "progressive": encoded(PHOTO, "JPEG", progressive=True),
        "mpo": encoded(PHOTO, "MPO", **more), "cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"), "png": encoded(alpha, "PNG", exif=exif),
        "apng": encoded(PHOTO, "PNG", **more), "png16": png(DEEP[..., :1], *(chunk(kind, packed) for kind in (b"iCCP", b"zTXt"))),
        "palette": encoded(PHOTO.convert("P"), "PNG"), "webp": encoded(PHOTO, "WEBP"),
        "webp lossless": encoded(alpha, "WEBP", lossless=True),
        "webp animated": encoded(PHOTO, "WEBP", **more), "gif": encoded(PHOTO, "GIF"), "gif animated": encoded(PHOTO, "GIF", **more),
        "bmp": encoded(PHOTO, "BMP"), "tiff": tiff(DEEP[..., :3]), "tiff pages": encoded(PHOTO, "TIFF", compression="tiff_lzw", **more),
        "tiff deflate": encoded(alpha, "TIFF", compression="tiff_adobe_deflate"), "tiff jpeg": encoded(PHOTO, "TIFF", compression="jpeg"),
        "tiff float": tiff((DEEP[..., :1] / 65535).astype(np.float32), sample_format=3), "avif": encoded(alpha, "AVIF", exif=exif),
        "avif animated": encoded(PHOTO, "AVIF", **more), "ppm": encoded(PHOTO, "PPM"), "pgm": b"P5\n17 13\n1023\n" + DEEP[..., 0].tobytes(),
    }


def clip_seeds(folder):
    kinds = KINDS | {"mov turned": ("t.mov", {"rotation": 90}), "mjpeg": ("m.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "rate": 10}),
                     "vp9": ("v.webm", {"codec": "libvpx-vp9"}), "mpeg2": ("m.mpg", {"codec": "mpeg2video", "rate": 25})}
    return {kind: film(folder / name, STEADY[:12], **how).read_bytes() for kind, (name, how) in kinds.items()}


def damaged(draw, seeds):
    "One of the seeds after one to three accidents."
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3))):
        if len(data) < 16:
            break
        at = draw.randrange(min(len(data), draw.choice((64, 512, len(data)))))
        length = draw.choice((1, 4, 16, 64, 256))
        accident = draw.randrange(8)
        if accident == 0:
            for _ in range(draw.choice((1, 4, 16))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif accident == 1:
            data[at:at + length] = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))
        elif accident == 2:
            del data[max(at, 8):]
        elif accident == 3:
            data[at:at] = data[at:at + length] * draw.choice((1, 3, 100))
        elif accident == 4:
            del data[at:at + length]
        elif accident in (5, 6):
            form = draw.choice((">I", "<I", ">H", "<H", "B"))
            near = int.from_bytes(data[at:at + struct.calcsize(form)], "big" if form[0] == ">" else "little") + draw.choice((-1, 1))
            number = draw.choice((draw.choice(NUMBERS), draw.randrange(2**32), near))
            value = struct.pack(form, number % 2**(8 * struct.calcsize(form)))
            data[at:at + len(value)] = value
        else:
            other = draw.choice(seeds)
            data[at:] = other[draw.randrange(len(other)):]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "count"), [("image", 4000), ("clip", 1600)])
def test_damaged_files_do_no_harm(what, count, tmp_path):
    seeds = list((image_seeds() if what == "image" else clip_seeds(tmp_path)).values())
    with IsolatedDecoder(2, timeout=5, max_memory=2**30) as decoder:
        def decode(data, draw, number):
            size = draw.choice((None, 32))
            if what == "image":
                return decoder.load_image(data, size)[None]
            path = tmp_path / f"{number}.bin"
            path.write_bytes(data)
            try:
                return decoder.read_clip(path, 4, size=size, sampling=draw.choice(("uniform", "dense")),
                                         frame_range=draw.choice((None, (0, None), (2, 9)))).frames
            finally:
                path.unlink()

        def attempt(number, again=True):
            draw = random.Random(f"{what} {TIMES} {number}")
            start = time.perf_counter()
            try:
                frames = decode(damaged(draw, seeds), draw, number)
            except MediaError as e:
                if "took longer" in e.reason and again:  # a busy machine
                    return attempt(number, again=False)
                harm = "took longer" in e.reason or "died" in e.reason
                return "harm" if harm else "out of memory" if "memory" in e.reason else "refused", e.reason, time.perf_counter() - start
            form = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[::3] == (1 if what == "image" else 4, 3)
            return "decoded" if form else "harm", str(frames.shape), time.perf_counter() - start

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(attempt, range(count * TIMES)))
        outcomes = [kind for kind, _, _ in results]
        print({kind: outcomes.count(kind) for kind in sorted(set(outcomes))}, f"slowest {max(t for _, _, t in results):.2f} s,",
              f"{decoder.peak_memory / 2**20:.0f} MiB at most, {decoder.restarts} restarts")
        harm = [f"{what} {TIMES} {number}: {said}" for number, (kind, said, _) in enumerate(results) if kind == "harm"]
        assert not harm, "\n".join(harm)
        assert outcomes.count("decoded") > count * TIMES / 20 and outcomes.count("refused") > count * TIMES / 5
        assert decoder.peak_memory < 2**30
