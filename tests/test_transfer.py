"""Initial weights: each array is placed or refused, and the run records their origin."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toy
from test_train import signal_after

from maknet_jax import files, models, train
from maknet_jax.errors import InputError, Stopped
from maknet_jax.runs import build, workdir
from maknet_jax.training import checkpoint, ranger, sharding, state, transfer

TINY = {"stem": 8, "blocks": (1,), "growth_rates": (8,), "widths": (8,)}


def network(labels=4, **changes):
    """A tiny MAKNet and its variables' shapes."""
    model = models.build("maknet", labels, **(TINY | changes))
    return model, state.shapes(model, ranger.ranger(0.1), size=32).variables


def drawn(shapes, seed=0):
    """Other variables of the same shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def named(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def equal(one, two):
    return checkpoint.digests(one) == checkpoint.digests(two)


def test_a_networks_own_weights_change_nothing():
    variables = drawn(network()[1])
    placed, names, fresh = transfer.place(variables, **variables, head=True)
    assert equal(placed, variables) and jax.tree.structure(placed) == jax.tree.structure(variables)
    assert names == sorted(named(variables)) and fresh == []


def test_without_the_head_all_but_the_head_is_placed():
    variables, new = (
        drawn(network(labels=4)[1]),
        drawn(network(labels=9)[1], seed=1),
    )  # other labels
    placed, names, fresh = transfer.place(variables, **new, head=False)
    assert fresh == [
        f"params/{part}/{leaf}"
        for part in ("classifier", "spl/dense")
        for leaf in ("bias", "kernel")
    ]
    assert "batch_stats/input/mean" in names and set(names) | set(fresh) == set(named(variables))
    for name, leaf in named(placed).items():
        source = variables if name in fresh else new
        np.testing.assert_array_equal(leaf, named(source)[name])


def test_a_trunk_alone_leaves_the_rest_as_it_is():
    variables = drawn(network()[1])
    stem = {"stem": drawn(variables["params"]["stem"], seed=1)}
    placed, names, fresh = transfer.place(variables, stem, {}, head=True)
    assert names == [f"params/stem/{leaf}" for leaf in ("conv/kernel", "norm/bias", "norm/scale")]
    assert equal(placed["params"]["stem"], stem["stem"])
    assert (
        equal(placed["batch_stats"], variables["batch_stats"])
        and len(fresh) == len(named(variables)) - 3
    )


def test_weights_that_do_not_fit_are_refused_in_one_line():
    _, variables = network()
    wide = drawn(network(stem=16)[1])
    message = r"params/stem/conv/kernel is \(7, 7, 3, 16\) .*\(7, 7, 3, 8\)"
    with pytest.raises(InputError, match="batch_stats/stem/norm/mean "):
        transfer.place(variables, **wide, head=False)
    with pytest.raises(InputError, match=message):
        transfer.place(variables, {"stem": wide["params"]["stem"]}, {}, head=False)
    more = drawn(network(labels=9)[1])
    with pytest.raises(InputError, match=r"classifier/bias is \(9,\).*init.head"):
        transfer.place(variables, **more, head=True)
    deeper = drawn(network(blocks=(2,))[1])
    with pytest.raises(InputError, match="block_0/makconv_1/") as line:
        transfer.place(variables, deeper["params"], {}, head=False)
    assert "\n" not in str(line.value)
    head = {"classifier": deeper["params"]["classifier"]}
    with pytest.raises(InputError, match="no counterpart"):
        transfer.place(variables, head, {}, head=False)


def test_the_optimiser_starts_from_the_placed_weights():
    model, shapes = network()
    new, recipe = drawn(shapes), (model, ranger.ranger(0.1))

    def place(variables):
        return transfer.place(variables, **new, head=False)[0]

    plain = state.create(*recipe, size=32, seed=3)
    created = state.create(*recipe, size=32, seed=3, place=place)
    assert equal(created.variables, place(plain.variables))
    assert equal(created.opt_state[-1].slow, created.params) and int(created.step) == 0
    assert jax.tree.structure(created) == jax.tree.structure(plain)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(created)]
    assert len(set(pointers)) == len(pointers)  # else a step could not donate it
    spent = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(created.params)
    assert equal(spent, jax.tree.map(np.negative, place(plain.variables)["params"]))
    assert equal(new, drawn(shapes))  # its memory was not lent


def test_weights_survive_a_file(tmp_path):
    new = drawn(network()[1])
    kernel = new["params"]["stem"]["conv"]["kernel"]
    new["params"]["stem"]["conv"]["kernel"] = kernel.transpose(1, 0, 2, 3)  # not contiguous
    written = transfer.write(tmp_path / "w.safetensors", **new, metadata={"model": "maknet"})
    params, batch_stats, metadata = transfer.read(tmp_path / "w.safetensors")
    assert equal({"params": params, "batch_stats": batch_stats}, new)
    assert metadata == written and written["model"] == "maknet"
    assert written["digest"] == transfer.digest(**new)
    assert written["digest"] != transfer.digest(new["params"], {})
    assert "params/stem/conv/kernel" in safetensors.numpy.load_file(tmp_path / "w.safetensors")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    transfer.write(path, {"w": np.ones((4, 4), np.float32)}, {}, {})
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x00")  # a flipped bit, which safetensors does not see
    with pytest.raises(InputError, match="w.safetensors is damaged.* digest"):
        transfer.read(path)
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="w.safetensors is not a valid safetensors file"):
        transfer.read(path)
    safetensors.numpy.save_file({"conv1.weight": np.ones(3, np.float32)}, path)
    with pytest.raises(
        InputError, match="w.safetensors is not in maknet-jax format: run `maknet import-weights`"
    ):
        transfer.read(path)


# Through the loop: a learning rate that moves nothing shows where a run began.
STILL = {"epochs": 1.0, "optimizer.learning_rate": 1e-300}


def trained(data, folder, **changes):
    """Trains five steps on one device; returns (page, summary)."""
    page = toy.config(data, "smoke", STILL | changes)
    return page, train.train(page, folder, devices=jax.devices()[:1])


def weights(folder):
    """What a run would start from."""
    return dict(zip(("params", "batch_stats"), workdir.open_weights(folder)[:2], strict=True))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A workdir of five steps from another seed."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    trained(data, folder, seed=5)
    return folder


def test_a_run_starts_from_another_and_resumes_without_it(teacher, data, tmp_path, monkeypatch):
    source, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, source)
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        with pytest.raises(Stopped, match="step 2 of 5"):
            trained(data, run, **{"init.path": str(source)})
    new = weights(source)
    shutil.rmtree(source)
    page, summary = trained(data, run, **{"init.path": str(source)})
    result = weights(run)
    fresh = build.assemble(page, 4, sharding.data_mesh()).create(page.seed).params
    for part, leaves in result["params"].items():
        assert equal(leaves, (fresh if part in transfer.HEAD else new["params"])[part]), part
    assert not equal(result["params"]["stem"], fresh["stem"])
    assert equal(result["batch_stats"]["input"], new["batch_stats"]["input"])
    start = summary["init"]
    assert start["digest"] == transfer.digest(**new) and start["path"] == str(source)
    assert start["fresh"] == ["classifier", "spl"] and start["checkpoint"] == "best"
    assert json.loads((run / "summary.json").read_text())["init"] == start
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (event,) = [event for event in entries if "init" in event]
    assert event["init"] == start and start["placed"] == len(named(new)) - 4
    for part in (str(source), str(start["placed"]), "classifier, spl"):
        assert part in event["message"]


def test_with_the_head_a_run_starts_as_the_other_ended(teacher, data, tmp_path):
    _, summary = trained(data, tmp_path / "run", **{"init.path": str(teacher), "init.head": True})
    assert equal(weights(tmp_path / "run")["params"], weights(teacher)["params"])
    assert summary["init"]["fresh"] == []


def test_unusable_weights_are_refused_before_anything_is_written(teacher, data, tmp_path):
    def refused(match, data, name="smoke", **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        with pytest.raises(InputError, match=match):
            train.train(toy.config(data, name, changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    teacher = str(teacher)
    refused("nowhere not found: pass a .safetensors", data, init__path=str(tmp_path / "nowhere"))
    refused("has no config.json", data, init__path=str(tmp_path))
    refused("no counterpart in this network", data, "linear", init__path=teacher)
    refused("stem", data, init__path=teacher, model__options__stem=16)
    shutil.copytree(data, tmp_path / "renamed")
    info = files.read_json(data / "dataset.json")
    info["labels"][3]["name"] = "bottom middle"
    files.write_json(tmp_path / "renamed" / "dataset.json", info)
    refused(
        "init.head",
        tmp_path / "renamed",
        init__path=teacher,
        init__head=True,
    )
