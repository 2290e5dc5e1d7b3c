"""What a training run leaves behind, and how the other verbs open it.

WORKDIR/config.json      the whole configuration
WORKDIR/dataset.json     labels, size and fingerprint of the data that it was trained on
WORKDIR/checkpoints/N    the last states; WORKDIR/best/N the one of the best validation AUC
WORKDIR/metrics.jsonl    training and validation metrics; tensorboard/ the same
WORKDIR/log.jsonl        what was said; summary.json how it ended
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from maknet_jax import console, files, models
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError
from maknet_jax.runs import config as configs
from maknet_jax.training import (
    augment,
    checkpoint,
    lesion_losses,
    losses,
    ranger,
    sgd,
    sharding,
    state,
    step,
    transfer,
)

OPTIMIZERS = {"ranger": ranger.ranger, "sgd": sgd.sgd}
LOSSES = {"weighted_focal": losses.focal_loss_fn, "lesion": lesion_losses.lesion_loss_fn}


def build_model(config, num_classes):
    """The network of a config; activations are bfloat16 on accelerators with precision auto.

    An optimiser whose `trunk_rate` is 0 freezes the trunk, its statistics too.
    """
    kinds = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    kinds["auto"] = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if config.precision not in kinds:
        raise InputError(f"precision {config.precision!r} is unknown: {', '.join(kinds)}")
    options = config.model.options.to_dict()
    if "trunk_rate" in config.optimizer and config.optimizer.trunk_rate == 0:
        options["frozen"] = True
    model = models.build(config.model.name, num_classes, dtype=kinds[config.precision], **options)
    moving = [f"{kind}_probability" for kind in ("rotation", "translation", "crop")]
    moved = [f"augment.{name}" for name in moving if config.augment[name] > 0]
    if moved and getattr(model, "takes_box", False):
        raise InputError(
            f"model {config.model.name} looks at boxes, which do not move with augmented images: "
            f"set {' and '.join(moved)} to 0"
        )
    return model


def build_optimizer(config, steps):
    """The optimiser of a config.

    The learning rate is constant, or from the share `decay_from` of all `steps` on (1: never) it
    falls to 0 along a half cosine; SGD's is `drop` times what it was from there on.
    """
    options = config.optimizer.to_dict()
    rate, decay_from = options.pop("learning_rate"), options.pop("decay_from")
    if not 0 <= decay_from <= 1:
        raise InputError(f"config optimizer.decay_from {decay_from} should lie in 0..1")
    flat = round(decay_from * steps)
    if "drop" in options:
        rate = optax.piecewise_constant_schedule(rate, {flat: options.pop("drop")})
    elif flat < steps:
        fall = optax.cosine_decay_schedule(rate, steps - flat)
        rate = optax.join_schedules([optax.constant_schedule(rate), fall], [flat])
    else:
        rate = optax.constant_schedule(rate)  # of the same state as the other
    return _build("optimizer", OPTIMIZERS, learning_rate=rate, **options)


def build_loss(config, label_counts, total, exclusive=None):
    """The loss of a config with class weights from the training split's counts.

    `exclusive` is `Vocabulary.exclusive`, which LesaNet's loss asks for.
    """
    options = config.loss.to_dict()
    pos_weight, neg_weight = losses.class_weights(
        np.asarray(label_counts), total, clamp=options.pop("clamp")
    )
    if config.loss.name == "lesion":
        options["exclusive"] = exclusive
    return _build("loss", LOSSES, pos_weight=pos_weight, neg_weight=neg_weight, **options)


def _build(what, known, *, name, **options):
    if name not in known:
        raise InputError(f"{what} {name!r} is unknown: choose one of {', '.join(known)}")
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} {name}: {error}") from None


def to_input(config):
    """int16 HU -> what the network sees, on the device."""
    return functools.partial(augment.to_unit, window=tuple(config.data.window))


def to_noisy_input(config, devices, **options):
    """The same with the page's augmentation, see `augment.make_augment`; None where it has none."""
    options |= {"to_input": to_input(config), "devices": devices}
    return augment.make_augment(**config.augment.to_dict(), **options)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network, ready to score.

    Attributes:
      config: the locked config.
      vocabulary: the labels in column order.
      variables: params and batch_stats.
      thresholds: float `[K]`, chosen on the validation split, or 0.5 where none were kept.
      step: how many updates the weights have seen.
      name: "best" or "last".
      model: the Flax module.
      mesh: over all devices.
      predict_step: the jitted predict_step(variables, images, box) -> logits, sharded over the
        mesh; box is None where the images have none.
    """

    config: ml_collections.ConfigDict
    vocabulary: Vocabulary
    variables: dict
    thresholds: np.ndarray
    step: int
    name: str
    model: object
    mesh: object
    predict_step: object

    def score(self, batch):
        """Logits `[B, K]` of a batch, on the devices: nothing waits for them."""
        batch = sharding.put_batch(self.mesh, batch)
        return self.predict_step(self.variables, batch["image"], batch.get("box"))

    @property
    def predict(self):
        """predict(variables, batch) -> dict of NumPy arrays, `evaluation.Evaluator`'s form."""
        return make_predict(self.predict_step, self.mesh)


def jit_train(config, model, optimizer, loss, mesh, *, rotation="auto"):
    """The training step of a config jitted over the mesh; the state that it is given is used up.

    `rotation` is the form of the augmentation, see `augment.make_augment`.
    """
    whole, rows = sharding.replicated(mesh), sharding.split(mesh)
    train_step = step.make_train_step(
        model,
        loss,
        optimizer,
        to_input=to_input(config),
        augment=to_noisy_input(config, mesh.size, form=rotation),
        ema_decay=config.ema_decay,
    )
    return jax.jit(
        train_step,
        in_shardings=(whole, rows, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )


def jit_predict(config, model, mesh):
    """The prediction step jitted over the mesh; without boxes pass None."""
    return jax.jit(
        step.make_predict_step(model, to_input=to_input(config)),
        in_shardings=(sharding.replicated(mesh), sharding.split(mesh), sharding.split(mesh)),
        out_shardings=sharding.split(mesh),
    )


def make_predict(predict_step, mesh):
    """predict(variables, batch): one step over the mesh, results on every process."""

    def predict(variables, batch):
        batch = sharding.put_batch(mesh, batch)
        images, box = batch.pop("image"), batch.pop("box", None)  # not worth the way back
        return sharding.gather(batch | {"logits": predict_step(variables, images, box)})

    return predict


def open_run(workdir, *, checkpoint_name="best", devices=None):
    """Opens a workdir for scoring.

    Args:
      workdir: a folder of `maknet train`.
      checkpoint_name: "best" or "last"; without a best one the last is taken.
      devices: to score on; None takes all of all processes.

    Raises:
      InputError: it is no workdir, or holds no whole checkpoint.
    """
    config, vocabulary, kept, meta, name = _read(pathlib.Path(workdir), checkpoint_name)
    model, mesh = build_model(config, len(vocabulary)), sharding.data_mesh(devices)
    return Run(
        config,
        vocabulary,
        sharding.put_state(mesh, kept.variables),
        np.asarray(meta.get("thresholds") or [0.5] * len(vocabulary)),
        int(kept.step),
        name,
        model,
        mesh,
        jit_predict(config, model, mesh),
    )


def open_weights(path, *, vocabulary=None):
    """Reads weights to start a training from.

    Args:
      path: a file of `maknet import-weights`, or a workdir: its best checkpoint, else its last.
      vocabulary: the labels that a workdir's head is wanted for; None where it is not.

    Returns:
      (params, batch_stats, about): NumPy arrays, and a dict of the path, the digest of the arrays
      and what they are.

    Raises:
      InputError: there is neither, it is damaged, or its head is of other labels.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        config, labels, kept, _, name = _read(path, "best")
        if vocabulary is not None and labels.names != vocabulary.names:
            raise InputError(
                f"{path} has other labels than the data: set init.head to False, or take data with "
                "the same"
            )
        params, batch_stats = kept.variables["params"], kept.variables["batch_stats"]
        about = {"model": config.model.name, "checkpoint": name, "step": int(kept.step)}
    else:
        params, batch_stats, about = transfer.read(path)
    about |= {"path": str(path), "digest": transfer.digest(params, batch_stats)}
    return params, batch_stats, about


def _read(workdir, checkpoint_name):
    """(config, vocabulary, state, meta, name of the checkpoint that was taken)."""
    if checkpoint_name not in ("best", "last"):
        raise InputError(f"checkpoint {checkpoint_name!r} is unknown: choose best or last")
    try:
        config = configs.from_json(files.read_json(workdir / "config.json"))
        about = files.read_json(workdir / "dataset.json")
    except FileNotFoundError:
        raise InputError(f"{workdir} is no workdir of `maknet train`: no config.json") from None
    vocabulary = Vocabulary.from_json(about["labels"])
    model = build_model(config, len(vocabulary))
    like = state.shapes(
        model, build_optimizer(config, 1), size=config.data.size, ema=config.ema_decay > 0
    )
    for name in dict.fromkeys((checkpoint_name, "last")):
        folder = workdir / FOLDERS[name]
        if folder.is_dir():
            saved = checkpoint.Checkpoints(folder)
            try:
                kept, meta, damaged = saved.restore(like)
            except InputError as error:
                if name == "last":
                    raise
                console.Log().say(f"{error}; taking the last checkpoint instead")
                continue
            finally:
                saved.close()
            for number, reason in damaged.items():
                console.Log().say(f"{folder / str(number)} is damaged, passed over: {reason}")
            if kept is not None:
                return config, vocabulary, kept, meta, name
    raise InputError(f"{workdir} holds no checkpoint yet: let `maknet train` run on")


FOLDERS = {"best": "best", "last": "checkpoints"}


def global_batch(batch_size, devices=None):
    """`batch_size` rounded up to a multiple of the devices (default: all), for scoring."""
    devices = devices or jax.device_count()
    return -(-batch_size // devices) * devices
