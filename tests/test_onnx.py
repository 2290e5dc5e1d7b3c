"""The recipe of docs/onnx.md, in an environment of its own."""

import os
import pathlib
import re
import subprocess

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("MAKNET_ONNX_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(
    not PYTHON, reason="MAKNET_ONNX_PYTHON is not the Python of an environment as in docs/onnx.md"
)
def test_the_recipe_converts_a_bundle_for_onnxruntime(tmp_path):
    text = (REPO / "docs" / "onnx.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "convert.py").write_text(recipe)
    ran = subprocess.run(
        [str(PYTHON), "convert.py", "head-neck", "out.onnx"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    differences = re.findall(r"(logits|features) differ by (\S+)", ran.stdout)
    assert [name for name, _ in differences] == ["logits", "features"]
    assert all(float(value) < 1e-4 for _, value in differences)
    assert {path.name for path in tmp_path.iterdir()} == {"convert.py", "out.onnx"}
