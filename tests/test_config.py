"""The pages of `configs/` and what the command line may change in them."""

import json
import pathlib

import ml_collections
import pytest

from maknet_jax import config as configs
from maknet_jax.errors import InputError

PAGES = sorted(page.stem for page in configs.folder().glob("[!_]*.py"))


def test_the_pages_are_those_of_the_checkout():
    assert configs.folder() == pathlib.Path(__file__).resolve().parents[1] / "configs"
    assert {"teacher", "smoke", "linear"} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_loads_locked_and_survives_json(name):
    page = configs.load(name)
    assert page.is_locked
    with pytest.raises(AttributeError):
        page.unheard_of = 1
    with pytest.raises(AttributeError):
        page.optimizer.unheard_of = 1
    plain = json.loads(json.dumps(configs.to_json(page)))
    again = configs.from_json(plain)
    assert again.is_locked and again.to_dict() == page.to_dict()
    assert isinstance(again.data.window, tuple)
    assert configs.to_json(again) == plain


@pytest.mark.parametrize("name", PAGES)
def test_every_page_says_how_to_run_it(name):
    text = (configs.folder() / f"{name}.py").read_text()
    assert f"maknet train --config {name} --workdir " in text


def test_pages_have_the_same_fields():
    """So that what reads them never asks whether a field is there."""

    def fields(page):
        return {
            key: fields(value) if isinstance(value, ml_collections.ConfigDict) else None
            for key, value in page.items()
            if key != "options"  # each network has its own
        }

    teacher = fields(configs.load("teacher"))
    assert all(fields(configs.load(name)) == teacher for name in PAGES)


def test_teacher_is_the_papers():
    page = configs.load("teacher")
    assert (page.epochs, page.data.batch_size, page.data.size) == (15.0, 64, 256)
    assert (page.optimizer.name, page.optimizer.learning_rate) == ("ranger", 0.01)
    ranger = page.optimizer
    assert (ranger.b1, ranger.b2, ranger.eps, ranger.alpha, ranger.k) == (0.95, 0.999, 1e-5, 0.5, 6)
    assert ranger.weight_decay == 0 and not ranger.centralize
    assert page.model.options.dropout_rate == 0
    noise = {key: value for key, value in page.augment.items() if key.endswith("probability")}
    assert len(noise) == 4 and not any(noise.values())
    assert page.data.window == (-1024.0, 3071.0)
    assert (page.loss.gamma, page.loss.clamp, page.loss.head_weights) == (2.0, 300.0, (1.0, 1.0))
    assert round(page.epochs * 17_697 / page.data.batch_size) == 4_148


def test_a_page_is_found_by_name_or_path(tmp_path, monkeypatch):
    page = configs.load("smoke")
    assert configs.load(str(configs.folder() / "smoke.py")) == page
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/smoke.py") == page  # outside a checkout too
    mine = tmp_path / "mine.py"
    mine.write_text((configs.folder() / "smoke.py").read_text().replace('"seed": 0', '"seed": 7'))
    assert configs.load(str(mine)).seed == 7
    with pytest.raises(InputError, match="config .techer. is not there.* resnet18, smoke, teacher"):
        configs.load("techer")
    mine.write_text("def get_config():\n    return {}['no']\n")
    with pytest.raises(InputError, match=r"config .*mine.py fails: KeyError: 'no'"):
        configs.load(str(mine))


@pytest.mark.parametrize(
    "text, value",
    [
        ("optimizer.learning_rate=0.003", 0.003),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("epochs=3", 3.0),  # an integer is a fine float
        ("data.batch_size=16", 16),
        ("data.path=3", "3"),  # text stays text
        ("data.path=a=b c", "a=b c"),
        ("optimizer.centralize=true", True),
        ("optimizer.centralize=False", False),
        ("model.options.blocks=(1, 2)", (1, 2)),
        ("model.options.blocks=[1, 2]", (1, 2)),
        ("model.options.blocks=4", (4,)),
        ("precision=float32", "float32"),
    ],
)
def test_an_override_has_the_type_of_its_field(text, value):
    page = configs.load("smoke", [text])
    node = page
    for part in text.partition("=")[0].split("."):
        node = node[part]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("optimizer.learning_rat=1", "'optimizer.learning_rat' is unknown: did"
         " you mean 'learning_rate'"),
        ("optimiser.k=1", "did you mean 'optimizer'"),
        ("xyz=1", "config field 'xyz' is unknown: known are "),
        ("optimizer.learning_rate=fast", "'optimizer.learning_rate' is a float, 'fast' is not"),
        ("data.batch_size=1.5", "'data.batch_size' is a int, '1.5' is not"),
        ("data.batch_size=True", "'data.batch_size' is a int, 'True' is not"),
        ("optimizer.centralize=1", "'optimizer.centralize' is a bool, '1' is not"),
        ("data.window=(1", "'data.window' is a tuple"),
        ("optimizer=3", "'optimizer' is a group: name one of alpha, b1"),
        ("seed.x=3", "'seed' in 'seed.x' is a value, not a group"),
        ("seed", "override 'seed' should be key=value"),
    ],
)  # fmt: skip
def test_a_bad_override_is_one_line_with_its_mend(text, message):
    with pytest.raises(InputError) as caught:
        configs.load("smoke", [text])
    assert message in str(caught.value) and "\n" not in str(caught.value)
