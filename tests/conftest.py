"""Settings of all tests: eight fake CPU devices, a compilation cache, and shape checks.

JAX_PLATFORMS chooses another platform. Compiling takes most of the tests' time: XLA optimises
nothing here, and compiled programs are kept for later tests, processes and runs. Annotations of
shapes are checked where EMU_CHECK_SHAPES=1 asks for it: `make test-shapes`.
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

# Tracing allocates much that is not garbage; looking for garbage took a twelfth of the tests' time.
gc.set_threshold(100_000, 20, 50)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # One test per core: do not compile a program on several.
        "--xla_cpu_parallel_codegen_split_count=1",
        # By default XLA aborts after 40 s, which a busy machine may need.
        "--xla_cpu_collective_call_terminate_timeout_seconds=1800",
    )
)
# The default emitters take twice as long to compile; later versions do not know the flag.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Compiled programs are kept from run to run, under the compiler and the flags that made them.
flags = hashlib.sha256(os.environ["XLA_FLAGS"].encode()).hexdigest()[:8]
cache = Path(__file__).parent.parent / f".cache/jax-tests/{version('jaxlib')}-{flags}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# The line of every operation took a twelfth of the time of tracing; no program depends on it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Every file of a checkpoint is synced to disk, which takes seconds; in memory it takes no time.
memory = Path("/dev/shm")
if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))

# Not types.py and loop.py: JAX rebuilds their structs with leaves that are not arrays.
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
# The checks run in every trace and import, a tenth of the tests' time.
if os.environ.get("EMU_CHECK_SHAPES") == "1":
    jaxtyping.install_import_hook([f"emu_jax.{name}" for name in CHECKED], "beartype.beartype")


def pytest_collection_modifyitems(items):
    """The longest tests first: at the end, the other workers would wait for them."""
    items.sort(key=lambda item: item.path.name not in ("test_processes.py", "test_torture.py"))


@pytest.fixture
def small_traces(monkeypatch):
    """Profiles omit the compiled programs: a run has a few, a process of tests thousands."""
    # Not before the settings above.
    import jax

    options = jax.profiler.ProfileOptions()
    options.enable_hlo_proto = False
    start = partial(jax.profiler.start_trace, profiler_options=options)
    monkeypatch.setattr(jax.profiler, "start_trace", start)


@pytest.fixture
def small_disk():
    """No file of this process can grow over 64 KiB: writes fail as they do on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
