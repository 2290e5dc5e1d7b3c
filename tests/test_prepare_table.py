"""`maknet prepare table`: labelled slices in PNG, NIfTI and DICOM files."""

import numpy as np
import pytest
from PIL import Image
from prepared import examples, read_csv

from maknet_jax import prepare
from maknet_jax.ct import png, preprocess
from maknet_jax.data import records
from maknet_jax.errors import InputError


def write_table(path, rows, header="path,labels,split,slice,patient"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_table_of_8_bit_images(shared_data, tmp_path):
    folder = shared_data / "body_part_ordinal"
    paths = sorted(folder.glob("*.png"))[::7]
    table = write_table(
        tmp_path / "t.csv",
        [
            f"{p},{'neck' if k < 2 else 'other|x'},{'train' if k % 2 else 'test'},,{k}"
            for k, p in enumerate(paths)
        ],
    )
    summary = prepare.prepare_table(
        table, tmp_path / "out", png_window=(-175.0, 275.0), size=512, workers=1
    )
    assert summary["failures"] == 0 and sum(summary["records"].values()) == len(paths)
    written = examples(tmp_path / "out")
    assert records.open_dataset(tmp_path / "out").vocabulary.names == ("neck", "other", "x")
    example = written["test"][0]
    with Image.open(paths[0]) as image:
        grey = np.asarray(image.convert("L")).astype(np.float64)
    hu = np.rint(-175 + grey * 450 / 255).astype(np.int16)
    expected = preprocess.resize(hu, tuple(example.meta["crop"]), 512)
    np.testing.assert_array_equal(example.image[..., 1], expected)
    assert example.labels.tolist() == [1, 0, 0] and example.label_mask.all()
    # Most images are cropped to the body.
    boxes = np.array([e.meta["crop"] for split in written.values() for e in split])
    whole = np.array([0, 0, *grey.shape])
    assert (np.abs(boxes - whole).max(1) > 20).mean() > 0.5
    with pytest.raises(InputError, match="--png-window"):
        prepare.prepare_table(table, tmp_path / "none", size=32)


def test_a_table_over_nifti_and_dicom(shared_data, phantom, tmp_path):
    nifti = shared_data / "nifti" / "torso_112" / "example_ct.nii.gz"
    series = next(path for path in sorted(phantom["dicom"].iterdir()) if path.is_dir())
    file = sorted(series.glob("*.dcm"))[0]
    table = write_table(
        tmp_path / "t.csv",
        [
            f"{nifti},liver|spleen,train,80,a",
            f"{nifti},pelvis,train,3,a",
            f"{series},lung,val,2,b",
            f"{file},lung,val,,b",
            f"{series},lung,val,{file.name},b",
            f"{nifti},liver,train,112,a",
            f"{nifti},liver,train,,a",
            f"{tmp_path / 'absent.dcm'},liver,train,,c",
        ],
    )
    summary = prepare.prepare_table(table, tmp_path / "out", size=32)
    written = examples(tmp_path / "out")
    assert {split: [e.id for e in es] for split, es in written.items()} == {
        "train": ["line-000002", "line-000003"],
        "val": ["line-000004", "line-000006", "line-000005"],
    }
    # Stored slice 80, counted from the pelvis, is slice 31 from the head.
    assert [e.meta["slice"] for e in written["train"]] == [31, 108]
    assert written["val"][0].meta["slice"] == 2
    # A file named by its path and by its name in a folder is the same slice.
    np.testing.assert_array_equal(written["val"][1].image, written["val"][2].image)
    reasons = {
        row["input"].split(":")[0]: row["reason"]
        for row in read_csv(tmp_path / "out" / "failures.csv")
    }
    assert list(reasons) == ["line 7", "line 8", "line 9"] and summary["failures"] == 3
    assert "slice 112" in reasons["line 7"]
    assert "112 slices" in reasons["line 8"]
    assert "absent.dcm" in reasons["line 9"]


def test_unknown_labels_fill_the_mask_and_counts_are_printed(tmp_path, capsys):
    for k in range(3):
        pixels = np.full((40, 40), 32768 - 1000, np.uint16)
        pixels[8:32, 8:32] = 32768 + 40
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    rows = ["0.png,liver,train,a,lung", "1.png,lung,train,a,", "2.png,Lung,val,b,"]
    table = write_table(tmp_path / "t.csv", rows, header="path,labels,split,patient,unknown")
    summary = prepare.prepare_table(table, tmp_path / "out", size=32)
    first, second = examples(tmp_path / "out")["train"]
    assert first.labels.tolist() == [0, 1, 0] and first.label_mask.tolist() == [1, 1, 0]
    assert second.label_mask.tolist() == [1, 1, 1]
    assert ["lung", "train", 2, 1, 1, 1] in summary["label_counts"]
    assert len(read_csv(tmp_path / "out" / "label_counts.csv")) == 6
    assert "lung" in prepare.describe(summary) and "present" in prepare.describe(summary)
    (warning,) = summary["about"]["warnings"]
    assert "'Lung'" in warning and warning in capsys.readouterr().err.replace("\n", "")


def test_a_patient_in_two_splits_is_refused(tmp_path):
    table = write_table(tmp_path / "t.csv", ["a.png,liver,train,,p", "b.png,liver,test,,p"])
    with pytest.raises(InputError, match=r"\bp\b.*train.*test"):
        prepare.prepare_table(table, tmp_path / "out", size=32)
    assert not (tmp_path / "out").exists()


def test_16_bit_pngs_use_their_neighbours_and_ignore_the_window(phantom, tmp_path):
    row = read_csv(phantom["info"])[0]
    path = phantom["images"] / row["File_name"][:12] / row["File_name"][13:]
    written = []
    for name, window in (("plain", None), ("windowed", (-175.0, 275.0))):
        table = write_table(tmp_path / f"{name}.csv", [f"{path},liver,train,,p"])
        prepare.prepare_table(table, tmp_path / name, png_window=window, size=64)
        written += examples(tmp_path / name)["train"]
    np.testing.assert_array_equal(written[0].image, written[1].image)
    around = (png.neighbour_path(path, -1), path, png.neighbour_path(path, 1))
    present = [one if one.is_file() else path for one in around]
    for channel, one in enumerate(present):
        hu = preprocess.clean(png.read_png(one))
        expected = preprocess.resize(hu, tuple(written[0].meta["crop"]), 64)
        np.testing.assert_array_equal(written[0].image[..., channel], expected)
