"""The configs in `configs/`: where they are loaded from, and what overrides can change."""

import functools
import json
import operator
import pathlib

import ml_collections
import pytest

from maknet_jax import cli
from maknet_jax.errors import InputError
from maknet_jax.runs import config as configs
from maknet_jax.runs import ranges

NAMES = sorted(file.stem for file in configs.folder().glob("[!_]*.py"))
ROUNDS = ["noisy_student"]  # configs of several runs, each of which has a config of its own
RUNS = [name for name in NAMES if name not in ROUNDS]


def test_configs_are_those_of_the_checkout():
    assert configs.folder() == pathlib.Path(__file__).resolve().parents[1] / "configs"
    assert {"teacher", "student", "noisy_student", "smoke", "linear"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_configs_load_locked_and_survive_json(name):
    config = configs.load(name)
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.unknown_field = 1
    if name in RUNS:
        with pytest.raises(AttributeError):
            config.optimizer.unknown_field = 1
    plain = json.loads(json.dumps(configs.to_json(config)))
    again = configs.from_json(plain)
    assert again.is_locked and again.to_dict() == config.to_dict()
    if name in RUNS:
        assert isinstance(again.data.window, tuple)
    assert configs.to_json(again) == plain


@pytest.mark.parametrize("name", NAMES)
def test_configs_document_their_command(name):
    text = (configs.folder() / f"{name}.py").read_text()
    verb = "noisy-student" if name in ROUNDS else "train"
    alone = f"maknet {verb} --config {name} --workdir " in text
    assert alone or (f"--config.student={name}" in text and "maknet noisy-student" in text)


def fields(config):
    """The names of a config's fields, nested as its groups."""
    return {
        key: fields(value) if isinstance(value, ml_collections.ConfigDict) else None
        for key, value in config.items()
        if key != "options"  # each network has its own
    }


@pytest.mark.parametrize("name", RUNS)
def test_configs_have_the_same_fields(name):
    """So that the code never asks whether a field exists.

    Each loss and each optimiser has its own fields, the same in all configs that use it.
    """
    config, expected = configs.load(name), fields(configs.load("teacher"))
    reference = {
        "ranger": "teacher",
        "weighted_focal": "teacher",
        "sgd": "lesanet",
        "lesion": "lesanet",
    }
    for group in ("optimizer", "loss"):
        expected[group] = fields(configs.load(reference[config[group].name]))[group]
        read = {"optimizer": {"learning_rate", "decay_from"}, "loss": {"clamp"}}[group]
        assert {"name"} | read <= set(expected[group])  # read by name; all others are passed on
    assert fields(config) == expected


def test_teacher_is_the_papers():
    config = configs.load("teacher")
    assert (config.epochs, config.data.batch_size, config.data.size) == (15.0, 64, 256)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("ranger", 0.01)
    ranger, loss = config.optimizer, config.loss
    assert (ranger.b1, ranger.b2, ranger.eps, ranger.alpha, ranger.k) == (0.95, 0.999, 1e-5, 0.5, 6)
    assert ranger.weight_decay == 0 and not ranger.centralize
    assert config.model.options.dropout_rate == 0
    noise = {key: value for key, value in config.augment.items() if key.endswith("probability")}
    assert len(noise) == 5 and not any(noise.values())
    assert config.data.window == (-1024.0, 3071.0)
    assert (loss.gamma, loss.clamp, loss.head_weights) == (2.0, 300.0, (1.0, 1.0))
    assert round(config.epochs * 17_697 / config.data.batch_size) == 4_148


def test_student_has_the_papers_batches_and_noise():
    config = configs.load("student")
    assert config.epochs == 100.0
    assert (config.data.batch_size, config.pseudo.batch_size) == (64, 64)
    assert round(config.epochs * 17_697 / 64) == 27_652
    assert config.model.options.dropout_rate == 0.5
    noise = {k: v for k, v in config.augment.items() if k.endswith("probability")}
    assert len(noise) == 5 and min(noise.values()) > 0


def test_lesanet_is_the_papers():
    config = configs.load("lesanet")
    assert (config.epochs, config.data.batch_size, config.data.size) == (15.0, 128, 120)
    sgd, loss = config.optimizer, config.loss
    assert (sgd.learning_rate, sgd.momentum, sgd.clip, sgd.weight_decay) == (0.001, 0.9, 10.0, 1e-4)
    assert (sgd.decay_from * config.epochs, sgd.drop, sgd.bias_rate) == (10.0, 0.1, 2.0)
    assert (loss.rhem_weight, loss.rhem_power, loss.rhem_draws) == (1.0, 2.0, 10_000)
    assert (loss.triplet_weight, loss.triplet_margin, loss.triplets) == (5.0, 0.1, 5_000)
    assert (loss.clamp, loss.head_weights, sgd.trunk_rate) == (300.0, (1.0, 1.0), 1.0)
    assert not any(value for name, value in config.augment.items() if name.endswith("probability"))


def test_pretraining_sees_500_000_pseudo_labelled_images_five_times():
    config = configs.load("vgg16_pretrain")
    steps = round(config.epochs * 17_697 / config.data.batch_size)
    assert steps * config.pseudo.batch_size == pytest.approx(5 * 500_000, rel=1e-3)
    assert config.model == configs.load("vgg16").model


def test_noisy_student_is_the_papers():
    config = configs.load("noisy_student")
    assert set(fields(config)) == {
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
        "precision",
        "evaluate",
        "soft",
    }
    assert (config.rounds, config.top, config.threshold, config.soft) == (5, 15, 0.5, False)
    assert config.precision == 0.0  # one threshold for all labels
    assert (config.teacher, config.student) == ("teacher", "student")
    assert config.teacher_changes == config.student_changes == config.evaluate == ()
    config = configs.load("noisy_student", ["student_changes=('epochs=1.0', 'pseudo.balance=3')"])
    assert config.student_changes == ("epochs=1.0", "pseudo.balance=3")


def test_configs_are_found_by_name_or_path(tmp_path, monkeypatch):
    config = configs.load("smoke")
    assert configs.load(configs.folder() / "smoke.py") == config
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/smoke.py") == config  # outside a checkout too
    mine = tmp_path / "mine.py"
    mine.write_text((configs.folder() / "smoke.py").read_text().replace('"seed": 0', '"seed": 7'))
    assert configs.load(mine).seed == 7
    with pytest.raises(InputError) as caught:
        configs.load("techer")
    assert "'techer'" in str(caught.value) and "resnet18, smoke" in str(caught.value)


def test_a_custom_config_loads_another(tmp_path):
    mine = tmp_path / "mine.py"
    header = "from maknet_jax.runs.config import load\n\n\ndef get_config():\n"
    body = "    config = load('teacher')\n    config.optimizer.k = 5\n    return config\n"
    mine.write_text(header + body)
    config, teacher = configs.load(mine, ["seed=3"]), configs.load("teacher")
    assert (config.optimizer.k, config.seed, teacher.optimizer.k, teacher.seed) == (5, 3, 6, 0)
    assert config.is_locked
    for wrong, named in [("optimizer.kk = 5", "kk"), ("optimizer.k = 'x'", "'k'"), ("x(", "mine")]:
        mine.write_text((header + body).replace("optimizer.k = 5", wrong))
        with pytest.raises(InputError) as caught:
            configs.load(mine)
        assert str(mine) in str(caught.value) and named in str(caught.value)
        assert "\n" not in str(caught.value)


def test_config_json_and_workdirs_are_configs(tmp_path):
    config = configs.load("student", ["epochs=3", "data.window=(-100.0, 200.0)"])
    run = tmp_path / "runs" / "a.b"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(configs.to_json(config)))
    for name in (run, run / "config.json", str(run)):
        assert configs.load(name).to_dict() == config.to_dict()
    assert configs.load(run, ["epochs=4"]).epochs == 4.0
    with pytest.raises(InputError, match="config .*runs' not found"):
        configs.load(run.parent)
    for text in ("{", "[1]"):
        (run / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"a\.b/config\.json"):
            configs.load(run)


def test_fields_that_an_old_config_lacks_have_values_that_reproduce_it(tmp_path):
    plain = configs.to_json(configs.load("teacher"))
    old = json.loads(json.dumps(plain))
    for key in configs.ADDED_FIELDS:
        *groups, field = key.split(".")
        del functools.reduce(operator.getitem, groups, old)[field]
    before = json.dumps(old)
    assert configs.to_json(configs.from_json(old)) == plain
    assert json.dumps(old) == before, "the argument was changed"
    mine = tmp_path / "mine.py"
    header = "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    mine.write_text(f"{header}    return ConfigDict({old})\n")
    assert configs.to_json(configs.load(mine)) == plain
    changed = plain | {"ema_decay": 0.5}
    assert configs.to_json(configs.from_json(changed)) == changed
    rounds = configs.to_json(configs.load("noisy_student"))
    assert configs.to_json(configs.from_json(rounds)) == rounds
    older = {key: value for key, value in rounds.items() if key != "precision"}
    mine.write_text(f"{header}    return ConfigDict({older})\n")
    assert configs.load(mine, ["precision=0.5"]).precision == 0.5
    assert configs.to_json(configs.load(mine)) == rounds


@pytest.mark.parametrize("name", ["lesanet", "noisy_student"])
def test_print_config_prints_every_field_with_the_overrides(capsys, tmp_path, name):
    argv = ["train", "--config", name, "--print-config", "--config.seed=5"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    config = configs.load(name, ["seed=5"])
    assert json.loads(printed) == configs.to_json(config)
    (tmp_path / "saved.json").write_text(printed)
    assert configs.load(tmp_path / "saved.json").to_dict() == config.to_dict()


def test_train_without_a_workdir_is_refused(capsys):
    assert cli.main(["train", "--config", "teacher"]) == 2
    assert "--workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, value",
    [
        ("optimizer.learning_rate=0.003", 0.003),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("epochs=3", 3.0),  # an integer is accepted as a float
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
def test_overrides_take_the_type_of_their_field(text, value):
    node = configs.load("smoke", [text])
    for part in text.partition("=")[0].split("."):
        node = node[part]
    assert node == value and type(node) is type(value)


def test_options_of_a_trunk_are_free():
    changes = ["trunk=maknet", "trunk_options.blocks=3,3", "trunk_options.form=split"]
    config = configs.load("lesanet", [f"model.options.{change}" for change in changes])
    assert config.model.options.trunk_options.to_dict() == {"blocks": (3, 3), "form": "split"}


@pytest.mark.parametrize(
    "text, named",
    [
        ("optimizer.learning_rat=1", ("'optimizer.learning_rat'", "'learning_rate'")),
        ("optimiser.k=1", ("'optimiser.k'", "did you mean 'optimizer'")),
        ("xyz=1", ("'xyz'", "augment, checkpoint_every")),
        ("optimizer.learning_rate=fast", ("'optimizer.learning_rate'", "float", "'fast'")),
        ("data.batch_size=1.5", ("'data.batch_size'", "int", "1.5")),
        ("data.batch_size=True", ("'data.batch_size'", "int", "True")),
        ("optimizer.centralize=1", ("'optimizer.centralize'", "bool", "1")),
        ("data.window=(1", ("'data.window'", "tuple", "'(1'")),
        ("optimizer=3", ("'optimizer'", "alpha, b1")),
        ("seed.x=3", ("'seed'", "'seed.x'")),
        ("seed", ("'seed'", "key=value")),
    ],
)
def test_bad_overrides_are_one_line_that_names_the_field(text, named):
    with pytest.raises(InputError) as caught:
        configs.load("smoke", [text])
    assert all(part in str(caught.value) for part in named), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("optimizer.learning_rate", value) for value in (0.0, -0.01, float("inf"), float("nan"))),
        ("optimizer.weight_decay", -1e-4),
        ("optimizer.b2", 1.0),
        ("optimizer.eps", 0.0),
        ("epochs", float("inf")),
        ("data.window", (-1024.0, float("inf"))),
        ("data.threads", -1),
        ("seed", 2**63),
        ("augment.crop_probability", 1.5),
        ("model.options.dropout_rate", 1.0),
        ("loss.head_weights", (1.0, -1.0)),
        ("domain_components", 65),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    config = configs.load("teacher")
    configs.validate(config, 256, 1)
    with config.unlocked():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=f"config {name} ") as caught:
        configs.validate(config, 256, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [path.stem for path in sorted(configs.folder().glob("*.py"))])
def test_all_configs_are_in_range(name):
    ranges.check(configs.to_json(configs.load(name)))


def test_a_number_that_overflows_is_refused_on_the_command_line():
    config = configs.load("teacher", ["optimizer.learning_rate=1e400"])
    with pytest.raises(InputError, match="learning_rate inf should be above 0"):
        configs.validate(config, 256, 1)
