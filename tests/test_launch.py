"""The scripts of launch/: what they start, and that a failure or a signal ends all of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from emu_jax import config

SCRIPTS = sorted(path for path in Path("launch").iterdir() if path.suffix in (".sh", ".sbatch"))


def local(count, script, environ=None, **more):
    return subprocess.Popen(
        ["launch/local.sh", str(count), "bash", "-c", script],
        env=os.environ | {"GRACE": "1"} | (environ or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) == 4
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, Path("launch/gke.yaml")], ids=lambda path: path.name)
def test_each_states_its_needs_at_the_top(path):
    head = path.read_text().split("set -euo")[0].split("apiVersion")[0]
    assert "\n# Needs" in head


def test_each_process_knows_its_number_and_its_lines_are_marked():
    run = local(
        3,
        'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at ${JAX_COORDINATOR_ADDRESS%:*}"\n'
        "echo bad >&2",
    )
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0 and sorted(out.splitlines()) == [
        f"[{k}] {k} of 3 at 127.0.0.1" for k in range(3)
    ]
    assert sorted(err.splitlines()) == [f"[{k}] bad" for k in range(3)]


def test_a_failed_process_ends_the_others():
    began = time.time()
    run = local(2, 'trap "" TERM; if [ $JAX_PROCESS_ID = 1 ]; then exit 3; fi; exec sleep 100')
    run.wait(60)
    assert run.returncode == 3 and time.time() - began < 30


def test_a_signal_reaches_all_processes():
    run = local(2, 'sleep 100 & trap "echo stopped; kill $!; exit 0" TERM; echo ready; wait')
    assert {run.stdout.readline(), run.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and sorted(out.splitlines()) == ["[0] stopped", "[1] stopped"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["launch/local.sh"], "usage: launch/local.sh N COMMAND"),
        (["launch/local.sh", "0", "true"], "usage: "),
        (["launch/slurm.sbatch"], "usage: sbatch launch/slurm.sbatch --config="),
        (["launch/pipeline.sh"], "usage: launch/pipeline.sh demo"),
        (["launch/pipeline.sh", "paper"], "set RAW to the folder of the downloads"),
        (["launch/tpu_pod.sh", "emu", "--config=a"], "set PROJECT"),
    ],
)
def test_a_missing_argument_is_an_error_of_one_line(argv, message):
    done = subprocess.run(argv, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


ARGUMENTS = """#!/usr/bin/env bash
echo "$@" >> calls
for argument in "$@"; do
  if [[ $argument == --to=* ]]; then mkdir -p "${argument#--to=}/checkpoints"; fi
done
"""


def test_the_pipeline_runs_in_order_and_each_stage_finds_its_inputs(tmp_path):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(ARGUMENTS)
    python.chmod(0o755)
    (tmp_path / "raw").mkdir()
    # The second time, the script runs only commands that skip finished work themselves.
    for _ in range(2):
        subprocess.run(
            [Path("launch/pipeline.sh").resolve(), "paper"],
            cwd=tmp_path,
            env=os.environ | {"RAW": "raw", "SIZE": "debug"},
            check=True,
        )
    calls = [call.split()[1:] for call in (tmp_path / "calls").read_text().splitlines()]
    first = calls[:-6]
    again = calls[-6:]
    assert [name.removeprefix("emu_jax.") for name, *_ in again] == [
        "train",
        "generate",
        "train",
        "generate",
        "train",
        "evaluate",
    ]
    made = [
        argument.removeprefix("--to=")
        for _, *arguments in first
        for argument in arguments
        if argument.startswith("--to=")
    ]
    for name, *arguments in again:
        if name == "emu_jax.train":
            c = config.load([argument for argument in arguments if argument != "precompute"])
            assert {path.split(":")[0] for _, _, path, *_ in c.data.mixture} <= set(made) and set(
                c.init.split(",")
            ) <= {*made, "runs/emu"}
            assert c.data.conditions in ("", *made)


# The variables that `srun` sets for its tasks, on one machine.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for k in 0 1; do
  SLURM_JOB_ID=$$ SLURM_NTASKS=2 SLURM_PROCID=$k SLURM_LOCALID=$LOCAL \\
  SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=$PER_NODE "$@" &
  LOCAL=$((LOCAL + STEP))
done
wait
"""
TASK = """#!/usr/bin/env bash
exec PYTHON -c 'import sys, jax
from emu_jax import processes
processes.initialize()
found = f"{jax.process_count()} {processes.allgather_json(sys.argv[2])} {sys.argv[1:3]}"
open(f"FOUND{jax.process_index()}", "w").write(found)' "$@"
"""


@pytest.mark.parametrize(("tasks", "step"), [("1(x2)", 0), ("2", 1)])
def test_tasks_of_slurm_find_one_another(tmp_path, tasks, step):
    """Run one process per node, or several on one node, with srun's own variables only."""
    for path, text in (
        ("bin/srun", SRUN),
        (
            ".venv/bin/python",
            TASK.replace("PYTHON", sys.executable).replace("FOUND", f"{tmp_path}/found"),
        ),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    environ = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "PYTHONPATH": os.getcwd(),
        "LOCAL": "0",
        "STEP": str(step),
        "PER_NODE": tasks,
    }
    done = subprocess.run(
        ["launch/slurm.sbatch", "--config=a"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for process in range(2):
        assert (
            tmp_path / f"found{process}"
        ).read_text() == "2 ['emu_jax.train', 'emu_jax.train'] ['-m', 'emu_jax.train']"


def test_the_jobset_starts_an_existing_config():
    jobset = yaml.safe_load(Path("launch/gke.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert (
        container["args"][:3] == ["python", "-m", "emu_jax.train"]
        and job["parallelism"] == job["completions"]
    )
    c = config.load(container["args"][3:])
    assert (
        c.checkpoint.to.startswith("gs://")
        and jobset["spec"]["replicatedJobs"][0]["replicas"] == c.mesh.data
    )


def test_a_stopped_pod_fails_so_that_the_set_restarts():
    pod = yaml.safe_load(Path("launch/gke.yaml").read_text())["spec"]["replicatedJobs"][0][
        "template"
    ]["spec"]["template"]["spec"]["containers"][0]

    def start(script):
        return subprocess.Popen(
            [*pod["command"], "bash", "-c", script], stdout=subprocess.PIPE, text=True
        )

    for status in (0, 2):
        assert start(f"exit {status}").wait(60) == status
    run = start('sleep 100 & trap "sleep 0.2; echo saved; kill $!; exit 0" TERM; echo ready; wait')
    assert run.stdout and run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[0] == "saved\n" and run.returncode == 143


def test_a_stopped_slurm_job_is_queued_again(tmp_path):
    fakes = {
        "bin/srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "bin/scontrol": 'echo "$@"',
        "bin/scancel": "kill -TERM $(cat pid)",
        ".venv/bin/python": "echo $$ > pid\nsleep 100 &\n"
        'trap "sleep 0.2; echo saved; kill $!; exit 0" TERM\necho ready\nwait',
    }
    for path, text in fakes.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / path).chmod(0o755)
    environ = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "71",
    }
    run = subprocess.Popen(
        ["launch/slurm.sbatch", "--config=a"], env=environ, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout and run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[0] == "saved\nrequeue 71\n" and run.returncode == 0


GCLOUD = """
echo "$3 $4 $5" >> calls
case $3 in
  queued-resources)
    case $4 in
      create) echo WAITING > state ;;
      delete) rm -f state ;;
      describe) cat state 2>/dev/null || exit 1; sed -i "s/WAITING/ACTIVE/" state ;;
    esac ;;
  tpu-vm)
    echo "${@: -1}" >> commands
    # Preempted: it saves and exits with 0.
    if [[ ${@: -1} == *emu_jax.train* && ! -e again ]]; then
      touch again; echo SUSPENDED > state
    fi ;;
esac
"""


def test_a_preempted_tpu_pod_is_requested_again(tmp_path):
    for name, text in (("gcloud", GCLOUD), ("sleep", "")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PROJECT": "p",
        "ZONE": "z",
        "TYPE": "v5p-128",
        "RUNTIME": "r",
        "NODES": "2",
        "REPO": "url",
        "REF": "commit",
    }
    done = subprocess.run(
        [
            Path("launch/tpu_pod.sh").resolve(),
            "emu",
            "--config=configs/pretrain.py",
            "--config.checkpoint.to=gs://b/a run",
        ],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "resumes from its last checkpoint" in done.stderr
    calls = [
        call for call in (tmp_path / "calls").read_text().splitlines() if "describe" not in call
    ]
    requested = "queued-resources create emu"
    trained = ["tpu-vm ssh emu-0", "tpu-vm ssh emu-1"]
    assert (
        calls[0] == calls[6] == requested
        and calls[5] == calls[-1] == "queued-resources delete emu"
        and len(calls) == 12
    )
    assert sorted(calls[1:5]) == sorted(calls[7:11]) == sorted(trained * 2)
    commands = (tmp_path / "commands").read_text()
    assert (
        commands.count("git checkout -q 'commit'") == 4
        and commands.count(r"--config.checkpoint.to=gs://b/a\ run") == 4
    )
    assert (
        commands.count("rm -rf emu ") == 4
        and commands.count("cd emu && exec") == commands.count("--config.workdir=../run ") == 4
    )
