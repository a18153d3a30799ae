"""Checkpoints in a bucket, on an emulator of Google Cloud Storage (make test-bucket).

A killed run resumes from the bucket on two processes, and skips an unfinished save.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import chex
import pytest

from emu_jax import checkpoint
from tests.support import fixtures
from tests.support.processes import (
    SHALLOW,
    assert_same_losses,
    command,
    environ,
    metrics,
    train_here,
)
from tests.support.runs import KILLED, arguments

pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")
objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
NotFound = pytest.importorskip("gcp_storage_emulator.exceptions").NotFound
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    to = tmp_path_factory.mktemp("data")
    fixtures.write_tiny(to)
    return to


@pytest.fixture
def bucket(monkeypatch):
    """The URL of a bucket that this process and those that it starts can reach."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    download = objects.download

    # Google sends the generation of an object, which the emulator does not. TensorStore needs it,
    # to overwrite only the version that it has read.
    def with_generation(request, response, storage, *rest, **named):
        with contextlib.suppress(NotFound):
            response["x-goog-generation"] = storage.get_file_obj(
                request.params["bucket_name"], request.params["object_id"]
            )["generation"]
        return download(request, response, storage, *rest, **named)

    monkeypatch.setattr(objects, "download", with_generation)
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="emu")
    server.start()
    yield "gs://emu"
    server.stop()


def test_a_killed_run_resumes_from_a_bucket(bucket, data, tmp_path):
    more = ("optim.steps=6", "checkpoint.every=2", "checkpoint.keep=2")
    undisturbed = tmp_path / "undisturbed"
    lines = train_here(data, undisturbed, 8, *more)
    data_state = checkpoint.read_metadata(str(undisturbed)).data

    to = f"checkpoint.to={bucket}/run"
    steps = checkpoint.paths.resolve(f"{bucket}/run/checkpoints")
    ended = steps / "4" / "commit_success.txt"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED,
            "5",
            str(ended),
            *arguments(data, tmp_path / "run", *SHALLOW, *more, to),
        ],
        env=environ(8),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert {path.name for path in steps.iterdir()} == {"2", "4"} and not (
        tmp_path / "run/checkpoints"
    ).exists()
    # The run now looks as if it was killed just before the save was complete.
    ended.unlink()
    assert checkpoint.latest_step(f"{bucket}/run") == 2

    done = subprocess.run(
        command(data, tmp_path / "run", 2, *more, to),
        env=environ(4),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert {path.name for path in steps.iterdir()} == {"4", "6"}
    assert_same_losses(metrics(tmp_path / "run"), lines, rtol=1e-4)
    assert checkpoint.read_metadata(f"{bucket}/run").data == data_state
    restored, want = (
        checkpoint.restore_params(path) for path in (f"{bucket}/run", str(undisturbed))
    )
    chex.assert_trees_all_close(restored, want, rtol=1e-7, atol=1e-4)


def test_a_missing_bucket_is_an_error_of_one_line(bucket, data, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "emu_jax.train",
            *arguments(data, tmp_path / "run", *SHALLOW, "checkpoint.to=gs://nobodys/run"),
        ],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "gs://nobodys/run" in done.stderr
    ), done.stderr[-3000:]
