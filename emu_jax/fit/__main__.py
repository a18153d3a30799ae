"""Report whether a run fits and how fast it can be; needs no hardware.

python -m emu_jax.fit --config=FILE --topology=NAME [--search] [--json=FILE]
    [--config.FIELD=VALUE ...]

NAME is v5e:16x16, 2xv5e:8x16 (two slices), h100:8x8 (nodes x GPUs), ... No data is opened.
Read next: report.py.
"""

import argparse
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from emu_jax import cli, config, files, hardware
from emu_jax.config import UserError
from emu_jax.fit.compile import quick_attempt
from emu_jax.fit.report import format_report, make_report
from emu_jax.fit.search import COMPILATIONS, changes, search_batch, with_change
from emu_jax.hardware import GIB, Accelerator
from emu_jax.plan import RunPlan, batch_shards, make_plan, parameter_table


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 if it fits, 1 if it does not, 2 for a user's mistake."""
    return cli.run(command, arguments)


def command(arguments: list[str]) -> int:
    flags, rest = _parse(arguments)
    if flags.json and not os.access(Path(flags.json).absolute().parent, os.W_OK):
        raise UserError(f"--json={flags.json} cannot be written: its folder must exist")
    c = config.load(rest)
    _use_no_devices()
    _use_few_arenas()
    accelerator, devices = hardware.topology_devices(flags.topology)
    answer = search_batch if flags.search else fit
    found = answer(c, accelerator, devices)
    if flags.json:
        with files.atomic_write(flags.json) as file:
            file.write(json.dumps({"topology": flags.topology} | found, indent=1) + "\n")
    return 0 if found["fits"] else 1


def fit(
    c: ConfigDict, accelerator: Accelerator | None, devices: list[jax.Device]
) -> dict[str, Any]:
    """Print and return the report on `c`; if `c` does not fit, try changes that save memory."""
    p = make_plan(c, devices)
    print(parameter_table(p.params))
    print(_run_line(p), flush=True)
    if accelerator:
        _check_state(p, accelerator)
    found = make_report(p, accelerator)
    print(format_report(found, accelerator), flush=True)
    if found["fits"]:
        return found
    found["changes"] = []
    for change in changes(c, p.mesh):
        tried = quick_attempt(make_plan(with_change(c, change), devices), accelerator)
        flags = " ".join(f"--config.{field}={value}" for field, value in change.items())
        print(f"with {flags}: {tried}", flush=True)
        found["changes"].append({"change": change, "peak": tried.peak, "fits": tried.fits})
        if tried.fits:
            break
    return found


def _run_line(p: RunPlan) -> str:
    """A line of text with the devices, mesh and batch of a run."""
    data = p.config.data
    parts = p.config.optim.accumulate
    micro = f", in {parts} micro-batches" if parts > 1 else ""
    return (
        f"{p.mesh.size} x {p.mesh.devices.flat[0].device_kind}, mesh {dict(p.mesh.shape)}; "
        f"{data.batch} rows of {data.tokens} tokens and {data.images} images, "
        f"{data.batch // batch_shards(p.mesh)} per device{micro}\n"
    )


def _check_state(p: RunPlan, accelerator: Accelerator) -> None:
    """Raise UserError if the state alone is too large; no change to the step could then help."""
    limit = accelerator.memory
    if p.state_bytes > limit:
        needed = -(-p.state_bytes * p.mesh.size // limit)
        raise UserError(
            f"the parameters and the optimizer alone need {p.state_bytes / GIB:.1f} GiB per device "
            f"and a device has {limit / GIB:.1f} GiB: take at least {needed} devices, more "
            "mesh.fsdp, or a smaller model (pretrain.py:emu-1b)"
        )


def _use_no_devices() -> None:
    """Leave this machine's accelerators free, and keep libtpu from asking a metadata server."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {hardware.ABSENT_GPU_FLAGS}",
    )
    jax.config.update("jax_platforms", "cpu")


def _use_few_arenas() -> None:
    """On glibc, use two malloc arenas: an arena per thread costs a sixth more memory."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        # From malloc.h: M_ARENA_MAX is -8, M_TRIM_THRESHOLD -1, M_MMAP_THRESHOLD -3.
        for option, value in ((-8, 2), (-1, GIB), (-3, GIB // 32)):
            mallopt(option, value)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags, arguments of the config)."""
    assert __doc__
    parser = cli.Parser(
        prog="python -m emu_jax.fit",
        usage="python -m emu_jax.fit --config=FILE --topology=NAME [--search] [--json=FILE] "
        "[--config.FIELD=VALUE ...]",
        description=__doc__.splitlines()[0],
        epilog="--config=FILE and --config.FIELD=VALUE as in python -m emu_jax.train --help",
    )
    parser.add_argument(
        "--topology", required=True, help="v5e:16x16, v5p:4x4x4, 2xv5e:8x16, h100:8x8, cpu:8, ..."
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report to this file")
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the largest batch for each remat policy, in at most "
        f"{COMPILATIONS} compilations",
    )
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
