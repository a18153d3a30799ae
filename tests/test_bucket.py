"""Checkpoints in a bucket, against an emulator of Google's storage (make test-bucket): a run that
is killed goes on from there, in two processes, and a save that did not end is passed over.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from test_processes import SHALLOW, assert_same_losses, command, data, environ, trained  # noqa: F401
from test_train import KILLED, arguments

from emu_jax import checkpoint, tree

pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")
objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
NotFound = pytest.importorskip("gcp_storage_emulator.exceptions").NotFound
pytestmark = pytest.mark.long


@pytest.fixture
def bucket(monkeypatch):
    """The name of a bucket that Orbax, TensorStore and gcsfs find, here and in the processes that a
    test starts.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    download = objects.download

    # as Google's does; TensorStore overwrites what it read, nothing newer
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


def test_a_killed_run_goes_on_from_a_bucket(bucket, data, tmp_path):  # noqa: F811
    more = ("optim.steps=6", "checkpoint.every=2", "checkpoint.keep=2")
    whole, there = trained(data, tmp_path / "whole", 1, 8, *more)

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
    # as if it had been killed a moment before
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
    assert_same_losses(
        [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()],
        whole,
        rtol=1e-4,
    )
    assert checkpoint.read_metadata(f"{bucket}/run").data == there
    restored, want = (
        list(tree.leaves(checkpoint.restore_params(path)))
        for path in (f"{bucket}/run", str(tmp_path / "whole"))
    )
    for (name, here), (other, leaf) in zip(restored, want, strict=True):
        assert name == other
        np.testing.assert_allclose(here, leaf, atol=1e-4, err_msg=name)


def test_a_bucket_that_is_not_there_is_one_line(bucket, data, tmp_path):  # noqa: F811
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
