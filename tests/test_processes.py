"""`--distributed`: a signal to one process, its death or its failure ends all processes."""

import signal

import pytest
import toy
import two_commands

from maknet_jax import train

TRAIN = ["--config", "linear", "--workdir"]
FAIL = """
mixed_batches = pipeline.mixed_batches
def fail(*args, **options):
    for count, batch in enumerate(mixed_batches(*args, **options)):
        if number == {number} and count == 3:
            raise {error}
        yield batch
pipeline.mixed_batches = fail
"""


def changes(data, **values):
    """Options of a training of 4,000 steps that does not end by itself."""
    values = {"epochs": 800.0, "evaluate_every": 800.0, "checkpoint_every": 10_000} | values
    return [f"--config.{change}" for change in toy.overrides(data, "linear", **values)]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The workdir of a linear model on `data`, which also has unlabelled images."""
    toy.write_unlabelled(data / "unlabelled")
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.train(toy.config(data, "linear"), folder)
    return folder


def command(verb, data, run, out):
    """The arguments of a verb, and a file that it writes last."""
    explain = ["--model", run, "--split", "train", "--limit", "12", "--steps", "2", "--out", out]
    tiny = toy.overrides(data, "linear", epochs=3.2, checkpoint_every=5)
    tiny = [each for each in tiny if not each.startswith("data.path")]
    fields = {
        "labelled": data,
        "unlabelled": data / "unlabelled",
        "rounds": 1,
        "evaluate": ("val",),
    }
    fields |= {"teacher": "linear", "student": "linear", "teacher_changes": tuple(tiny)}
    fields |= {"student_changes": (*tiny, "pseudo.batch_size=16")}
    rounds = ["--config", "noisy_student", *(f"--config.{k}={v}" for k, v in fields.items())]
    return {
        "train": (["train", *TRAIN, out, *changes(data)], "checkpoints"),
        "evaluate": (
            ["evaluate", "--model", run, "--split", "train", "--batch-size", "2", "--out", out],
            "summary_train.json",
        ),
        "pseudo-label": (
            ["pseudo-label", "--model", run, "--records", data / "unlabelled", "--out", out],
            "pseudo.json",
        ),
        "attribute": (["attribute", *explain], "summary.json"),
        "noisy-student": (["noisy-student", *rounds, "--workdir", out], "summary.json"),
        "perturb": (["perturb", *explain, "--strategy", "attribution"], "summary.json"),
    }[verb]


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb, number, targets",
    [
        ("train", signal.SIGTERM, (0,)),
        ("train", signal.SIGUSR1, (1,)),
        ("train", signal.SIGHUP, (0, 1)),
        ("evaluate", signal.SIGTERM, (0,)),
        ("evaluate", signal.SIGTERM, (1,)),
        ("pseudo-label", signal.SIGTERM, (1,)),
        ("pseudo-label", signal.SIGUSR2, (0, 1)),
        ("attribute", signal.SIGTERM, (0,)),
        ("perturb", signal.SIGTERM, (1,)),
        ("noisy-student", signal.SIGTERM, (0,)),
        ("noisy-student", signal.SIGUSR1, (0, 1)),
    ],
)
def test_a_signal_ends_all_processes_and_the_command_resumes(
    data, run, tmp_path, verb, number, targets
):
    arguments, last = command(verb, data, run, tmp_path / "out")
    with two_commands.start(*arguments) as both:
        both.wait_for_batch(1 if verb == "pseudo-label" else 2)
        both.send(number, *targets)
        both.send(number, *targets)  # a second signal changes nothing
        codes, seconds = both.codes()
        assert codes == [75, 75], both.messages
        assert seconds < 30
        assert [len(both.lines(process)) for process in range(2)] == [1, 1], both.messages
    if verb == "train":
        arguments += ["--stop-after", "20s"]
    with two_commands.start(*arguments) as both:
        if verb == "train":
            both.wait_for_batch()
            assert "resuming from step" in both.messages[0]
            both.send(signal.SIGTERM, 0)
            assert both.codes()[0] == [75, 75], both.messages
        else:
            assert both.codes(120)[0] == [0, 0], both.messages
    assert (tmp_path / "out" / last).exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb, killed", [("train", 0), ("train", 1), ("pseudo-label", 1)])
def test_the_others_end_when_a_process_is_killed(data, run, tmp_path, verb, killed):
    arguments, _ = command(verb, data, run, tmp_path / "out")
    with two_commands.start(*arguments, "--heartbeat", "5s") as both:
        both.wait_for_batch(1)
        both.send(signal.SIGKILL, killed)
        codes, seconds = both.codes()
        other = 1 - killed
        assert codes[killed] == -9 and codes[other] == 75, both.messages
        assert seconds < 20
        (line,) = both.lines(other)
        assert f"process {killed} (pid {both.workers[killed].pid} on " in line
        assert "***" not in both.messages[other]  # the stack of an abort


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_the_others_end_with_the_reason_when_a_process_fails(data, tmp_path, failing):
    full = FAIL.format(number=failing, error="OSError(28, 'No space left on device', 'shards/x')")
    with two_commands.start("train", *TRAIN, tmp_path / "run", *changes(data), script=full) as both:
        codes, _ = both.codes()
        assert codes == [2, 2], both.messages
        for process in range(2):
            assert "shards/x: No space left on device" in both.lines(process)[0]
        assert f"process {failing} (pid" in both.lines(1 - failing)[0]


@pytest.mark.slow
def test_a_process_that_does_not_start_is_one_line_and_exit_code_2(data, tmp_path):
    absent = "if number == 1:\n    time.sleep(3600)\n"
    arguments = ["train", *TRAIN, tmp_path / "run", *changes(data), "--start-timeout", "2s"]
    with two_commands.start(*arguments, script=absent) as both:
        assert both.workers[0].wait(60) == 2
        assert "--start-timeout" in both.lines(0)[0]


DAMAGED = """
from maknet_jax.training import checkpoint
read = checkpoint.Checkpoints._read
def damaged(self, like, step):
    if number == {number} and step == 10:
        raise {error}
    return read(self, like, step)
checkpoint.Checkpoints._read = damaged
"""


@pytest.mark.slow
def test_all_processes_resume_from_what_process_0_has_read(data, tmp_path):
    short = changes(data, epochs=2.0, checkpoint_every=8)  # checkpoints 8 and 10
    arguments = ["train", *TRAIN, tmp_path / "run", *short]
    with two_commands.start(*arguments) as both:
        assert both.codes(120)[0] == [0, 0], both.messages
    broken = DAMAGED.format(number=1, error="ValueError('digest')")
    with two_commands.start(*arguments, script=broken) as both:
        assert both.codes(120)[0] == [2, 2], both.messages
        for process in range(2):
            (line,) = both.lines(process)
            assert "process 1 on " in line and "checkpoint 10 in " in line and "shared" in line
    assert (tmp_path / "run" / "checkpoints" / "10").is_dir()
    broken = DAMAGED.format(number=0, error="ValueError('digest')")
    with two_commands.start(*arguments, script=broken) as both:
        assert both.codes(120)[0] == [0, 0], both.messages
        assert all("resuming from step 8 of 10" in text for text in both.messages)
    assert (tmp_path / "run" / "checkpoints_damaged" / "10").is_dir()
    assert (tmp_path / "run" / "checkpoints" / "10").is_dir()


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_found_at_once(data, tmp_path):
    own = "sys.argv[sys.argv.index('--workdir') + 1] += str(number)\n"
    with two_commands.start("train", *TRAIN, tmp_path / "run", *changes(data), script=own) as both:
        assert both.codes()[0] == [2, 2], both.messages
        for process in range(2):
            (line,) = both.lines(process)
            assert "process 1 on " in line and "shared folder" in line
    assert not (tmp_path / "run1").exists() or not list((tmp_path / "run1").iterdir())
