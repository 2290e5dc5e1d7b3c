"""PNG: 16-bit HU are exact, 8-bit files need a window, and names give neighbours."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from maknet_jax.ct import png
from maknet_jax.errors import InputError, Rejected


def decode_grey16(content):
    """An independent decoder of 16-bit grey PNG (PNG specification, sections 7 and 9)."""
    place, packed = 8, b""
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        body = content[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            columns, rows, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, colour, interlaced) == (16, 0, 0)
        packed += body if kind == b"IDAT" else b""
        place += 12 + length
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(rows, 1 + 2 * columns)
    above = np.zeros(2 * columns, np.int64)
    out = []
    for line in lines:
        current = [int(b) for b in line[1:]]
        for k in range(2 * columns):
            left = current[k - 2] if k >= 2 else 0
            up, corner = int(above[k]), int(above[k - 2]) if k >= 2 else 0
            guess = left + up - corner
            nearest = min((left, up, corner), key=lambda v: abs(guess - v))
            current[k] += (0, left, up, (left + up) // 2, nearest)[line[0]]
            current[k] &= 255
        above = np.array(current)
        out.append(above.astype(np.uint8).view(">u2"))
    return np.stack(out)


def test_16_bit_values_are_exact(shared_data):
    path = shared_data / "deeplesion" / "Images_png" / "000001_01_01" / "109.png"
    hu = png.read_png(path)
    assert hu.dtype == np.int16 and hu.shape == (512, 512)
    np.testing.assert_array_equal(hu, decode_grey16(path.read_bytes()).astype(int) - 32768)
    assert hu.min() == -3024  # padding is unchanged


def test_extreme_values_are_exact(tmp_path):
    values = np.array([[0, 1, 32767], [32768, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "1.png")
    np.testing.assert_array_equal(png.read_png(tmp_path / "1.png"), values.astype(int) - 32768)


def test_8_bit_files_need_a_window(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "1.png")
    with pytest.raises(Rejected, match="--png-window"):
        png.read_png(tmp_path / "1.png")
    hu = png.read_png(tmp_path / "1.png", window=(-175, 275))
    assert hu[0, 0] == -175 and hu[-1, -1] == 275
    np.testing.assert_array_equal(hu, np.rint(-175 + grey * (450 / 255)))
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "2.png")
    np.testing.assert_array_equal(png.read_png(tmp_path / "2.png", window=(-175, 275)), hu)
    with pytest.raises(InputError, match="275,-175"):
        png.read_png(tmp_path / "1.png", window=(275, -175))


def test_a_real_8_bit_slice_spans_its_window(shared_data):
    path = sorted((shared_data / "body_part_ordinal").glob("*.png"))[0]
    hu = png.read_png(path, window=(-175, 275))
    assert hu.min() == -175 and 200 < hu.max() <= 275


def test_unsupported_files_are_rejected(tmp_path):
    def reason(window=(0, 255)):
        with pytest.raises(Rejected) as caught:
            png.read_png(tmp_path / "1.png", window)
        return str(caught.value)

    assert "No such file" in reason()
    (tmp_path / "1.png").write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    assert "PNG" in reason()
    grey = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(grey).save(tmp_path / "1.png")
    assert "colour" in reason()
    Image.fromarray(np.full((4, 4, 4), 9, np.uint8)).save(tmp_path / "1.png")
    assert "transparent" in reason()
    Image.fromarray(np.eye(4) > 0).save(tmp_path / "1.png")
    assert "1-bit" in reason()
    Image.fromarray(np.full((40, 40), 32768, np.uint16)).save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:16] + struct.pack(">II", 60000, 60000) + content[24:])
    assert "60000 x 60000" in reason()
    for cut in (8, 12, 20, 50, len(content) - 1):
        (tmp_path / "1.png").write_bytes(content[:cut])
        assert reason()


def test_a_flipped_bit_in_a_png_is_rejected(tmp_path, shared_data):
    damaged = shared_data.parent / "cases" / "png_damaged_idat.png"
    with pytest.raises(Rejected, match="IDAT"):
        png.read_png(damaged)
    values = np.random.default_rng(0).integers(0, 65535, (20, 20)).astype(np.uint16)
    path = tmp_path / "1.png"
    Image.fromarray(values).save(path)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        copy = bytearray(content)
        copy[place] ^= 1 << (place % 8)
        path.write_bytes(copy)
        with pytest.raises(Rejected):
            png.read_png(path)
    path.write_bytes(content + b"trailing bytes")
    np.testing.assert_array_equal(png.read_png(path), values.astype(int) - 32768)


@pytest.mark.parametrize(
    ("name", "series", "index"),
    [
        ("Images_png/000001_01_01/109.png", "000001_01_01", 109),
        ("000001_01_01_109.png", "000001_01_01", 109),
        ("001_score_-12.14557_000529_05_4_11.png", "001_score_-12.14557_000529_05_4", 11),
        ("scan/IM7.png", "IM", 7),
        ("liver.png", "liver", None),
    ],
)
def test_names_give_series_and_index(name, series, index):
    assert png.split_name(name) == (series, index)


def test_neighbours_keep_their_padding(tmp_path):
    assert png.neighbour_path("s/099.png", 1).as_posix() == "s/100.png"
    assert png.neighbour_path("s/000001_01_01_100.png", -1).name == "000001_01_01_099.png"
    assert png.neighbour_path("999.png", 1).name == "1000.png"
    for name in ("liver.png", "000.png"):
        (tmp_path / name).touch()
        assert not png.neighbour_path(tmp_path / name, -1).exists()
