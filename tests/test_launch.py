"""The templates of `launch/` run as they are, with stand-ins for the tools of a cluster."""

import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys

import pytest
import toy
import yaml

from maknet_jax import cli

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
# Starts the command twice, as two tasks of one node; ends with the highest code, as srun does.
SRUN = """#!/bin/bash
echo "$@" >> "$RECORD/srun"
while [[ $1 == --* ]]; do shift; done
[ -n "${CODE:-}" ] && exit "$CODE"
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
for number in 0 1; do
    SLURM_PROCID=$number SLURM_LOCALID=$number "$@" &
    started[number]=$!
done
result=0
for process in "${started[@]}"; do
    wait "$process"; code=$?
    [ "$code" -gt "$result" ] && result=$code
done
exit "$result"
"""
RECORDED = """#!/bin/bash
printf '%s\\n' "$@" >> "$RECORD/$(basename "$0")"
"""


@pytest.fixture
def launch(tmp_path):
    """launch(script, *arguments, **variables) -> the finished process, with stand-ins on PATH."""
    tools, record = tmp_path / "tools", tmp_path / "record"
    tools.mkdir()
    record.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", RECORDED), ("gcloud", RECORDED)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(script, *arguments, **variables):
        environment = os.environ | {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(LAUNCH.parent),
            "MAKNET": f"{sys.executable} -m maknet_jax",
            "RECORD": str(record),
            "XLA_FLAGS": "",
            "JAX_PLATFORMS": "cpu",
        }
        command = ["bash", str(LAUNCH / script), *map(str, arguments)]
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=300
        )

    run.record = record
    return run


def slurm_job():
    """A job whose coordinator, as JAX derives it from the number, has a free port."""
    for job in range(4096):
        with socket.socket() as free:
            try:
                free.bind(("", job + 65535 - 2**12 + 1))
            except OSError:
                continue
            return str(job)
    raise AssertionError("no free port")


def test_slurm_trains_on_all_tasks(launch, data, tmp_path):
    overrides = [f"--config.{text}" for text in toy.overrides(data, "linear", epochs=0.4)]
    arguments = ["train", "--config", "linear", "--workdir", tmp_path / "run", *overrides]
    done = launch("slurm.sh", *arguments, SLURM_JOB_ID=slurm_job())
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["devices"].startswith("2 x ")
    assert not (launch.record / "scontrol").exists()
    assert "--kill-on-bad-exit=0" in (launch.record / "srun").read_text()


@pytest.mark.parametrize("code", [75, 2])
def test_slurm_queues_a_stopped_job_again_and_no_other(launch, code):
    done = launch("slurm.sh", "train", CODE=str(code), SLURM_JOB_ID="17")
    assert done.returncode == code
    requeued = launch.record / "scontrol"
    assert requeued.exists() == (code == 75)
    if code == 75:
        assert requeued.read_text().split() == ["requeue", "17"]
    assert "#SBATCH --signal=USR1@120\n" in (LAUNCH / "slurm.sh").read_text()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_box_passes_on_arguments_and_the_exit_code(launch, processes):
    script = (
        "import os, sys\n"
        "line = f'{sys.argv[1:]} {os.environ.get(\"JAX_PROCESS_ID\")}\\n'\n"
        "os.write(1, line.encode())  # both processes write at once\n"
        "sys.exit(75)\n"
    )
    tool = launch.record / "tool.py"
    tool.write_text(script)
    variables = {"MAKNET": f"{sys.executable} {tool}", "PROCESSES": processes}
    done = launch("box.sh", "train", "--workdir", "a b", **variables)
    assert done.returncode == 75
    lines = sorted(done.stdout.splitlines())
    if processes == "1":
        assert lines == ["['train', '--workdir', 'a b'] None"]
    else:
        whole = "['train', '--workdir', 'a b', '--distributed']"
        assert lines == [f"{whole} {number}" for number in "01"]


def test_a_tpu_pod_runs_one_command_on_all_workers(launch):
    arguments = ["train", "--config", "teacher", "--workdir", "/mnt/a b"]
    done = launch("tpu_pod.sh", *arguments, TPU="slice", ZONE="zone", MAKNET="maknet")
    assert done.returncode == 0, done.stderr
    *options, command = (launch.record / "gcloud").read_text().splitlines()
    assert options[-3:] == ["slice", "--zone=zone", "--worker=all"]
    words = shlex.split(command.removeprefix("--command="))
    assert words[words.index("maknet") :] == ["maknet", *arguments, "--distributed"]
    missing = launch("tpu_pod.sh", *arguments, TPU="slice")
    assert missing.returncode != 0 and "ZONE" in missing.stderr


def test_the_job_of_kubernetes_has_one_pod_per_host():
    service, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    hosts = spec["completions"]
    assert hosts == spec["parallelism"] == int(variables["JAX_NUM_PROCESSES"])
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == hosts * container["resources"]["limits"]["google.com/tpu"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert variables["JAX_COORDINATOR_ADDRESS"].startswith(f"{first}:")
    assert "JAX_PROCESS_ID" in variables and pod["subdomain"] == service["metadata"]["name"]
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert rules["FailJob"]["onExitCodes"]["values"] == [2]
    assert rules["Ignore"]["onExitCodes"]["values"] == [75]
    # The command line is one that maknet takes.
    assert container["command"] == ["maknet"] and "--distributed" in container["args"]
    checked = [text for text in container["args"] if text != "--distributed"]
    assert cli.main([*checked, "--print-config"]) == 0
