"""The pages of `configs/` and what the command line may change in them."""

import json
import pathlib

import ml_collections
import pytest

from maknet_jax.errors import InputError
from maknet_jax.runs import config as configs

PAGES = sorted(page.stem for page in configs.folder().glob("[!_]*.py"))
ROUNDS = ["noisy_student"]  # pages of several runs, each with a page of its own
RUNS = [name for name in PAGES if name not in ROUNDS]


def test_the_pages_are_those_of_the_checkout():
    assert configs.folder() == pathlib.Path(__file__).resolve().parents[1] / "configs"
    assert {"teacher", "student", "noisy_student", "smoke", "linear"} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_loads_locked_and_survives_json(name):
    page = configs.load(name)
    assert page.is_locked
    with pytest.raises(AttributeError):
        page.unheard_of = 1
    if name in RUNS:
        with pytest.raises(AttributeError):
            page.optimizer.unheard_of = 1
    plain = json.loads(json.dumps(configs.to_json(page)))
    again = configs.from_json(plain)
    assert again.is_locked and again.to_dict() == page.to_dict()
    if name in RUNS:
        assert isinstance(again.data.window, tuple)
    assert configs.to_json(again) == plain


@pytest.mark.parametrize("name", PAGES)
def test_every_page_says_how_to_run_it(name):
    text = (configs.folder() / f"{name}.py").read_text()
    verb = "noisy-student" if name in ROUNDS else "train"
    alone = f"maknet {verb} --config {name} --workdir " in text
    assert alone or (f"--config.student={name}" in text and "maknet noisy-student" in text)


def fields(page):
    """The names of a page's fields, of groups theirs too."""
    return {
        key: fields(value) if isinstance(value, ml_collections.ConfigDict) else None
        for key, value in page.items()
        if key != "options"  # each network has its own
    }


@pytest.mark.parametrize("name", RUNS)
def test_pages_have_the_same_fields(name):
    """So that what reads them never asks whether a field is there.

    A loss and an optimiser have their own, the same on all pages that use them.
    """
    page, wanted = configs.load(name), fields(configs.load("teacher"))
    first = {
        "ranger": "teacher",
        "weighted_focal": "teacher",
        "sgd": "lesanet",
        "lesion": "lesanet",
    }
    for group in ("optimizer", "loss"):
        own = fields(configs.load(first[page[group].name]))[group]
        wanted[group] = own
        read = {"optimizer": {"learning_rate", "decay_from"}, "loss": {"clamp"}}[group]
        assert {"name"} | read <= set(own)  # by name; all others are handed on
    assert fields(page) == wanted


def test_lesanet_is_the_papers():
    page = configs.load("lesanet")
    assert (page.epochs, page.data.batch_size, page.data.size) == (15.0, 128, 120)
    sgd, loss = page.optimizer, page.loss
    assert (sgd.learning_rate, sgd.momentum, sgd.clip, sgd.weight_decay) == (0.001, 0.9, 10.0, 1e-4)
    assert (sgd.decay_from * page.epochs, sgd.drop, sgd.bias_rate) == (10.0, 0.1, 2.0)
    assert (loss.rhem_weight, loss.rhem_power, loss.rhem_draws) == (1.0, 2.0, 10_000)
    assert (loss.triplet_weight, loss.triplet_margin, loss.triplets) == (5.0, 0.1, 5_000)
    assert (loss.clamp, loss.head_weights, sgd.trunk_rate) == (300.0, (1.0, 1.0), 1.0)
    assert not any(value for name, value in page.augment.items() if name.endswith("probability"))


def test_the_pre_training_sees_500_000_pseudo_labelled_images_five_times():
    page, vgg = configs.load("vgg16_pretrain"), configs.load("vgg16").to_dict()
    steps = round(page.epochs * 17_697 / page.data.batch_size)
    assert steps * page.pseudo.batch_size == pytest.approx(5 * 500_000, rel=1e-3)
    plain = page.to_dict()
    for one in (plain, vgg):
        del one["epochs"], one["data"]["batch_size"], one["pseudo"]
    assert plain == vgg


def test_options_of_a_trunk_are_free():
    changes = ["trunk=maknet", "trunk_options.blocks=3,3", "trunk_options.form=split"]
    page = configs.load("lesanet", [f"model.options.{change}" for change in changes])
    assert page.model.options.trunk_options.to_dict() == {"blocks": (3, 3), "form": "split"}


def test_noisy_student_is_the_papers_and_has_fields_of_its_own():
    page = configs.load("noisy_student")
    assert set(fields(page)) == {
        "seed",
        "rounds",
        "labelled",
        "unlabelled",
        "split",
        "teacher",
        "student",
        "teacher_changes",
        "student_changes",
        "from_last",
        "checkpoint",
        "top",
        "threshold",
        "evaluate",
        "soft",
    }
    assert (page.rounds, page.top, page.threshold, page.soft) == (5, 15, 0.5, False)
    assert (page.teacher, page.student) == ("teacher", "student")
    assert page.teacher_changes == page.student_changes == page.evaluate == ()
    page = configs.load("noisy_student", ["student_changes=('epochs=1.0', 'pseudo.balance=3')"])
    assert page.student_changes == ("epochs=1.0", "pseudo.balance=3")


def test_student_is_the_teacher_with_pseudo_labels_and_noise():
    teacher, student = (configs.load(name).to_dict() for name in ("teacher", "student"))
    assert student["epochs"] == 100.0
    assert (student["data"]["batch_size"], student["pseudo"]["batch_size"]) == (64, 64)
    assert round(student["epochs"] * 17_697 / 64) == 27_652
    assert student["model"]["options"].pop("dropout_rate") == 0.5
    noise = {k: v for k, v in student["augment"].items() if k.endswith("probability")}
    assert len(noise) == 4 and min(noise.values()) > 0
    del teacher["model"]["options"]["dropout_rate"]
    for page in (teacher, student):
        del page["epochs"], page["pseudo"], page["augment"]
    assert student == teacher


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
    with pytest.raises(
        InputError, match="config .techer. is not there.* resnet18, smoke, .*, teacher"
    ):
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
        (
            "optimizer.learning_rat=1",
            "'optimizer.learning_rat' is unknown: did you mean 'learning_rate'",
        ),
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
)
def test_a_bad_override_is_one_line_with_its_mend(text, message):
    with pytest.raises(InputError) as caught:
        configs.load("smoke", [text])
    assert message in str(caught.value) and "\n" not in str(caught.value)
