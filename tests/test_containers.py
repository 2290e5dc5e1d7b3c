"""Zip and tar archives are read as folders; links, junk and files that cannot be read."""

import io
import os
import struct
import tarfile
import zipfile

import nibabel
import numpy as np
import pytest
from test_dicom import stored_values, write_series, write_slice

from maknet_jax.ct import archives, containers, search, volumes
from maknet_jax.data import overview
from maknet_jax.errors import InputError

ENDINGS = (".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz")


def pack(archive, members):
    """Writes an archive of name -> bytes."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name, content)
        return archive
    with tarfile.open(archive, "w:" + archive.suffix[1:].replace("tar", "")) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return archive


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """A DICOM series (last slice first), a NIfTI volume, and junk."""
    folder = tmp_path_factory.mktemp("members")
    paths = write_series(folder / "s", [0, 5, 10, 15])
    values = np.arange(-1000, -1000 + 4 * 5 * 3, dtype=np.int16).reshape(4, 5, 3)
    nibabel.Nifti1Image(values, np.diag([1.0, 1, 2, 1])).to_filename(folder / "v.nii.gz")
    content = {f"p/s/{path.name}": path.read_bytes() for path in reversed(paths)}
    content |= {"p/v.nii.gz": (folder / "v.nii.gz").read_bytes()}
    junk = {"__MACOSX/p/._000.dcm": b"x", "p/._000.dcm": b"x", "LICENSE": b"MIT"}
    return content | junk


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_archive_is_read_like_its_folder(tmp_path, members, ending):
    for name, content in members.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "packed").mkdir()
    archive = pack(tmp_path / "packed" / f"a{ending}", members)
    expected = search.find_series(tmp_path / "folder")
    assert [ref.key for ref in expected[0]] == ["1.2.3", "p/v.nii.gz"] and not expected[1]
    for path in (archive, archive.parent):
        series, failures = search.find_series(path)
        assert failures == [] and [ref.count for ref in series] == [4, 3]
        for ref, original in zip(series, expected[0], strict=True):
            volume, like = volumes.load_series(ref), volumes.load_series(original)
            np.testing.assert_array_equal(volume.hu, like.hu)
            assert (volume.uids, volume.spacing) == (like.uids, like.spacing)
            inside = "" if path == archive else f"{archive.name}/"
            if ref.kind == "dicom":
                assert volume.slices == tuple(inside + name for name in like.slices)
    assert sorted(os.listdir(tmp_path / "packed")) == [archive.name]
    volume, index = volumes.load_series_of(f"{archive}/p/s/001.dcm")
    np.testing.assert_array_equal(volume.hu[index], stored_values(1).astype(int) - 1024)
    assert len(volumes.load_series_of(f"{archive}/p/s")[0].hu) == 4
    with pytest.raises(InputError, match="does not exist"):
        volumes.load_series_of(f"{archive}/p/nothing.dcm")


@pytest.mark.parametrize("ending", [".zip", ".tar"])
@pytest.mark.parametrize("name", ["../x.dcm", "/etc/x.dcm", "a/../../x.dcm", "C:/x.dcm"])
def test_an_archive_with_a_member_outside_is_refused_as_a_whole(tmp_path, members, ending, name):
    archive = pack(tmp_path / f"a{ending}", members | {name: b"x"})
    series, failures = search.find_series(tmp_path)
    assert series == [] and [path for path, _ in failures] == [str(archive)]
    assert "outside" in failures[0][1]


def test_links_bombs_duplicates_and_damage_refuse_an_archive(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "link.tar", "w") as file:
        link = tarfile.TarInfo("x.dcm")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    info = zipfile.ZipInfo("x.dcm")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    monkeypatch.setattr(archives, "SMALL", 1 << 20)
    pack(tmp_path / "bomb.zip", {"x.dcm": bytes(8 << 20)})
    pack(tmp_path / "bomb.tar.gz", {"x.dcm": bytes(8 << 20)})
    with pytest.warns(UserWarning, match="Duplicate"):
        with zipfile.ZipFile(tmp_path / "twice.zip", "w") as file:
            file.writestr("x.dcm", "1")
            file.writestr("x.dcm", "2")
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4" + bytes(50))
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    pack(tmp_path / "outer.zip", {"inner.zip": b"PK"})
    series, failures = search.find_series(tmp_path)
    reasons = {os.path.basename(path): reason for path, reason in failures}
    assert series == [] and len(reasons) == 8
    for name, part in (
        ("link.tar", "link"),
        ("link.zip", "link"),
        ("bomb.zip", "bomb"),
        ("bomb.tar.gz", "bomb"),
        ("twice.zip", "two members"),
        ("broken.zip", "damaged"),
        ("broken.tar.gz", "damaged"),
        ("inner.zip", "archive in an archive"),
    ):
        assert part in reasons[name], reasons[name]


def test_an_archive_of_too_many_members_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_MEMBERS", 20)
    for ending in (".zip", ".tar"):
        pack(tmp_path / f"a{ending}", {str(k): b"" for k in range(21)})
    # A table of contents that would fill the memory is not read, whatever it says.
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 20 * 512 + 1, 0, 0)
    (tmp_path / "b.zip").write_bytes(bytes(20_000) + end)
    _, failures = search.find_series(tmp_path)
    assert len(failures) == 3 and all("more than 20 members" in reason for _, reason in failures)


def test_a_damaged_member_of_a_zip_is_rejected_alone(tmp_path, members):
    archive = pack(tmp_path / "a.zip", {name: members[name] for name in sorted(members)})
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        info = file.getinfo("p/s/002.dcm")
    content[info.header_offset + len("p/s/002.dcm") + 30 + info.compress_size - 20] ^= 0xFF
    archive.write_bytes(content)
    series, failures = search.find_series(tmp_path)
    ((path, reason),) = failures
    assert path.endswith("p/s/002.dcm") and "CRC" in reason
    assert {ref.kind: len(ref.paths) for ref in series} == {"dicom": 3, "nifti": 1}


def test_links_are_followed_once_and_dead_ones_and_pipes_are_listed(tmp_path):
    write_series(tmp_path / "elsewhere", [0, 5, 10])
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "patient").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "dead.dcm").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "in" / "pipe.dcm")
    series, failures = search.find_series(tmp_path / "in")
    assert [ref.count for ref in series] == [3]
    assert [os.path.basename(path) for path, _ in failures] == ["dead.dcm", "loop", "pipe.dcm"]
    assert "nowhere" in failures[0][1] and "neither a file" in failures[2][1]
    with pytest.raises(InputError, match="neither a file nor a folder"):
        search.find_series(tmp_path / "in" / "pipe.dcm")


def test_unreadable_folders_and_files_are_listed(tmp_path, monkeypatch):
    write_series(tmp_path / "good", [0, 5, 10])
    (tmp_path / "secret").mkdir()
    (tmp_path / "file.dcm").write_bytes(b"x")
    scan, read, listed = os.scandir, containers.open_file, os.listdir

    def scandir(path):
        if str(path).endswith("secret"):  # the tests may run as root, who can read everything
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    def listdir(path):
        return list(scandir(path)) if str(path).endswith("secret") else listed(path)

    def open_file(path):
        if str(path).endswith("file.dcm"):
            raise PermissionError(13, "Permission denied", path)
        return read(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "listdir", listdir)
    monkeypatch.setattr(containers, "open_file", open_file)
    series, failures = search.find_series(tmp_path)
    assert [ref.count for ref in series] == [3]
    assert [(os.path.basename(path), reason) for path, reason in failures] == [
        ("file.dcm", "cannot be read (Permission denied)"),
        ("secret", "cannot be read (Permission denied)"),
    ]
    assert overview.by_reason(failures) == {"cannot be read (Permission denied)": 2}


def test_reasons_name_no_member_of_an_archive(tmp_path):
    slices = write_series(tmp_path / "s", [0, 5, 10])
    write_slice(tmp_path / "s" / "Doe_Jane.dcm", z=15, values=stored_values(shape=(4, 5)))
    slices.append(tmp_path / "s" / "Doe_Jane.dcm")
    archive = pack(tmp_path / "a.zip", {path.name: path.read_bytes() for path in slices})
    _, failures = search.find_series(archive)
    assert "Doe_Jane" in failures[0][1]
    (reason,) = overview.by_reason(failures)
    assert "Doe" not in reason and "matrix differs" in reason
