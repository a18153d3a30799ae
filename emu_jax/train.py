"""python -m emu_jax.train --config=configs/pretrain.py [--config.FIELD=VALUE ...]

Trains any stage: config -> plan (mesh, model) -> data -> state (resume, else weights, else
scratch) -> loop. Read next: loop.py.
"""

import logging
import os
import sys
import time
import traceback
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from emu_jax import cli, config, hooks, loop, processes, sharding
from emu_jax.checkpoint import CheckpointManager
from emu_jax.checks import check_paths, check_run
from emu_jax.config import UserError
from emu_jax.data import images, precomputed
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.loader import Loader
from emu_jax.generate import precompute
from emu_jax.initial import init_from_checkpoint, measure_visual_stats
from emu_jax.metric_writer import MetricWriter
from emu_jax.plan import RunPlan, abstract_params, make_plan, parameter_table
from emu_jax.step import State, init_params, init_state
from emu_jax.watchdog import Watchdog
from emu_jax.workdir import check_same_config, check_workdir, remove_if_empty, write_config

# Not __name__, which is "__main__" under `python -m`: main enables only the package's records.
log = logging.getLogger("emu_jax.train")

USAGE = """usage: python -m emu_jax.train --config=FILE[:SIZE] [--config.FIELD=VALUE ...]

Train a model, or resume the run in its workdir. Ctrl-C saves and stops. The config files are
configs/pretrain.py, decoder.py, instruct.py, clip.py and demo.py, or one of your own.

  python -m emu_jax.train --config=configs/pretrain.py --config.workdir=runs/emu
  python -m emu_jax.train --config=configs/pretrain.py:emu-1b --config.optim.steps=100 ...

Below are the fields of configs/base.py and their defaults. A config file may change a default or
add groups.
"""


def main(arguments: list[str] | None = None) -> int:
    """Train and return the exit status.

    0: trained, or stopped by a signal and saved. 1: an error, with a traceback. 2: a user's
    mistake. 130: Ctrl-C before training, or a second Ctrl-C.
    """
    # Set up logging here: absl would do it, but importing Orbax may have replaced absl's handler.
    logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s", stream=sys.stderr)
    logging.getLogger("emu_jax").setLevel(logging.INFO)
    images.silence_pillow()
    began = time.perf_counter()
    cli.start(arguments is None)
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        return cli.run(lambda _: print(config.help_text(USAGE)))
    try:
        if arguments is None:
            # This call is the command itself, and may be one of several processes.
            processes.initialize()
        c = config.load(sys.argv[1:] if arguments is None else arguments)
        if c.compile_cache and not jax.config.jax_compilation_cache_dir:  # ty: ignore[missing-attribute]
            # JAX_COMPILATION_CACHE_DIR takes precedence.
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(c.compile_cache))
        train(c, began)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        processes.exit_process(2)
        return 2
    except KeyboardInterrupt:
        # This is a Ctrl-C before training or a second one: the loop handles the first.
        print("error: stopped by SIGINT; the last checkpoint is unchanged", file=sys.stderr)
        processes.exit_process(130)
        if arguments is None:
            cli.exit_now(130)
        return 130
    except Exception as error:
        if message := cli.missing_extra(error):
            print(f"error: {message}", file=sys.stderr)
            processes.exit_process(2)
            return 2
        traceback.print_exc()
        processes.exit_process(1)
        return 1
    return 0


def train(c: ConfigDict, began: float | None = None) -> State:
    """Train the run that `c` describes in c.workdir, from its newest checkpoint if it has one.

    began: `perf_counter` at the start of the process; None: now. Returns the final state. Raises
    UserError.
    """
    print(parameter_table(abstract_params(c)), flush=True)
    check_paths(c)
    plan = make_plan(c)
    check_run(plan)

    workdir = Path(c.workdir)
    with jax.set_mesh(plan.mesh), ExitStack() as stack:
        # Data.
        tokenizer = tokenizers.load(c.data.tokenizer, c.model.llama.vocab)
        make_loader = loader_factory(plan, tokenizer)
        loader = stack.enter_context(closing(make_loader()))
        evaluators = []
        if c.data.eval_mixture:
            evaluators.append(hooks.held_out_evaluator(plan, make_loader(eval=True)))
        if c.eval.tasks:
            evaluators.append(hooks.benchmark_evaluator(plan, tokenizer))

        # State: resume, else weights, else scratch.
        stack.callback(remove_if_empty, workdir)
        check_workdir(workdir, c)
        watchdog = stack.enter_context(Watchdog(workdir, c.log.hang, began))
        checkpoints = CheckpointManager(
            c.checkpoint.to or c.workdir,
            keep=c.checkpoint.keep,
            keep_every=c.checkpoint.keep_every,
        )
        stack.enter_context(closing(checkpoints))
        resumed = checkpoints.restore(plan.state)
        if resumed is not None:
            step, state, data, saved_config = resumed
            check_resumed(c, step, saved_config)
            loader.restore(data)
            log.info("resumed at step %d of %d in %s", step, c.optim.steps, workdir)
        else:
            step = 0
            state = start_state(plan, make_loader)

        # Loop.
        if jax.process_index() == 0:
            # Check again: another run may have started here in the meantime.
            check_workdir(workdir, c)
            write_config(workdir, config.to_dict(c))
        writer = MetricWriter(workdir, start=step, steps=c.optim.steps)
        stack.enter_context(closing(writer))
        sampler = None
        if c.log.pictures_every and plan.program.stage.draws:
            sampler = hooks.image_sampler(plan, make_loader)
        elif c.log.pictures_every and plan.program.stage.answers:
            sampler = hooks.caption_sampler(plan, tokenizer)
        return loop.run(plan, state, loader, checkpoints, writer, watchdog, evaluators, sampler)


def loader_factory(plan: RunPlan, tokenizer: tokenizers.Tokenizer) -> partial[Loader]:
    """A function that makes loaders of this process's share of the batches."""
    c = plan.config
    stage = plan.program.stage
    model = stage.emu_config(plan.program.model_config)
    process, count = processes.data_shard(plan.mesh, c.data.batch)
    return partial(
        Loader,
        c.data,
        c.seed,
        tokenizer,
        model.resampler.tokens,
        stage.image_side(plan.program.model_config),
        process=process,
        processes=count,
        chats=model.llama.chats,
    )


def start_state(plan: RunPlan, make_loader: partial[Loader]) -> State:
    """The state at step 0: fresh parameters, or those of config.init where it has them."""
    c = plan.config
    for kind in precomputed.KINDS:
        if c.data[kind]:
            precompute.check_weights(c, kind)

    layout = sharding.shardings(plan.mesh, sharding.specs(plan.params))
    init = jax.jit(init_params, static_argnums=0, out_shardings=layout)
    params = init(plan.program, jax.random.key(c.seed))
    params, loaded = init_from_checkpoint(c.init, params)
    if "visual_stats" in params and "visual_stats/mean" not in loaded:
        loader = make_loader(process=0, processes=1)
        params["visual_stats"] = measure_visual_stats(
            plan.program, params, loader, layout["visual_stats"]
        )

    layout = jax.tree.map(lambda x: x.sharding, plan.state)
    finish = jax.jit(init_state, static_argnums=0, donate_argnums=1, out_shardings=layout)
    return finish(plan.program, params)


def check_resumed(c: ConfigDict, step: int, saved: dict) -> None:
    """Raise UserError if the checkpoint's config differs from `c`."""
    current = config.to_dict(c)
    # Ignore config.checkpoint: the checkpoint may have been copied here from another folder.
    saved = saved | {"checkpoint": current["checkpoint"]}
    check_same_config(f"the checkpoint of step {step}", saved, current)


if __name__ == "__main__":
    sys.exit(main())
