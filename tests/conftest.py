"""Settings of all tests: eight fake CPU devices, a compilation cache, and shape checks.

JAX_PLATFORMS chooses another platform. Compiling takes most of the tests' time, so XLA optimises
nothing, and compiled programs are cached for later tests, processes and runs. Annotations of shapes
are checked only with EMU_CHECK_SHAPES=1 (`make test-shapes`).
"""

import gc
import hashlib
import os
import resource
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jaxtyping
import pytest

# Tracing allocates many objects that are not garbage. Searching for garbage took a twelfth of the
# tests' time.
gc.set_threshold(100_000, 20, 50)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # Tests run one per core, so compile each program on one core.
        "--xla_cpu_parallel_codegen_split_count=1",
        # By default XLA aborts after 40 s, which a busy machine may need.
        "--xla_cpu_collective_call_terminate_timeout_seconds=1800",
    )
)
# The default emitters of jaxlib 0.10 take twice as long to compile. Later versions do not know the
# flag.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Compiled programs are kept between runs, in a folder named after the compiler and its flags.
flags = hashlib.sha256(os.environ["XLA_FLAGS"].encode()).hexdigest()[:8]
cache = Path(__file__).parent.parent / f".cache/jax-tests/{version('jaxlib')}-{flags}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Recording the source line of each operation takes a twelfth of the tracing time, and no program
# needs it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Every file of a checkpoint is synced to disk, which takes seconds; in memory it takes no time.
memory = Path("/dev/shm")
if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))

# types.py and loop.py are not checked: JAX rebuilds their structs with leaves that are not arrays.
CHECKED = (
    "models",
    "data",
    "generate",
    "weights",
    "evaluate",
    "demo",
    "verify",
    "losses",
    "sharding",
    "stages",
    "optim",
    "tree",
    "config",
    "html",
    "checkpoint",
    "metric_writer",
    "initial",
    "train",
)
# The checks run in every trace and import and take a tenth of the tests' time.
if os.environ.get("EMU_CHECK_SHAPES") == "1":
    jaxtyping.install_import_hook([f"emu_jax.{name}" for name in CHECKED], "beartype.beartype")


def pytest_collection_finish():
    """Never search what was imported for garbage."""
    gc.freeze()


def pytest_sessionfinish():
    """Leave all objects to the end of the process: pytest would search them for garbage."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that no worker waits for them at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_processes.py", "test_torture.py"))


@pytest.fixture
def small_traces(monkeypatch):
    """Leave programs and Python calls out of profiles, since writing them takes seconds."""
    # Import JAX only after the settings above.
    import jax

    options = jax.profiler.ProfileOptions()
    options.enable_hlo_proto = False
    options.python_tracer_level = 0
    start = partial(jax.profiler.start_trace, profiler_options=options)
    monkeypatch.setattr(jax.profiler, "start_trace", start)


@pytest.fixture
def small_disk():
    """Limit the files of this process to 64 KiB, so that writes fail as on a full disk.

    The test calls the value to lift the limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
