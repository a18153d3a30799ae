"""Every field of a run, its default and its reason. The stages' files say only what differs.

A value here is the paper's (arXiv 2307.05222) unless a comment says otherwise; "unpublished" marks
what nobody has said, so that it is a field. Override on the command line: --config.optim.steps=100.
"""

from ml_collections import ConfigDict

from configs.sizes import model


def get_config(size: str = "emu-14b") -> ConfigDict:
    c = ConfigDict()
    # the loss: "emu" (next element), "contrastive" (warm-up of an encoder of your own) or "decoder"
    # (pixels)
    c.stage = "emu"
    # checkpoints, metrics.jsonl, TensorBoard; where a run resumes from
    c.workdir = ""
    # of the initial weights, the data's order and dropout
    c.seed = 0
    # directory of a checkpoint whose weights start this run (or several: "EMU,SD"); "" is from
    # scratch
    c.init = ""
    # of the matrices that do not train; "bfloat16" halves their memory
    c.frozen_dtype = "float32"
    # configs/sizes.py: pretrain.py:emu-7b chooses another
    c.model = model(size)
    c.rules = rules()
    c.objective = objective()
    c.optim = optim()
    c.data = data()
    # the devices; -1 in one of them: what is left
    c.mesh = ConfigDict(
        dict(
            # copies of the parameters
            data=1,
            # parameters, gradients and optimizer state sharded
            fsdp=-1,
            # heads, ffn and vocabulary split
            tensor=1,
        )
    )
    # compiled programs, which the next start loads: a folder, or gs://...; "": none
    c.compile_cache = "~/.cache/emu_jax"
    c.checkpoint = ConfigDict(
        dict(
            # a folder or bucket (gs://...) in the place of workdir, for what is large
            to="",
            # steps between saves
            every=1000,
            # the last n are kept
            keep=3,
            # and every n-th step for good; 0: none
            keep_every=0,
        )
    )
    c.log = ConfigDict(
        dict(
            # steps between lines of metrics.jsonl (a line is free: it is fetched a step late)
            every=1,
            # seconds in one phase of a step after which a process says where it hangs; 0: never
            hang=600.0,
            # steps between images and captions in TensorBoard; 0: never
            pictures_every=500,
            # stop after so many non-finite or spiking steps in all
            max_bad_steps=10,
        )
    )
    c.profile = ConfigDict(
        dict(
            # "10:13": an XLA trace of the steps 10, 11 and 12, in workdir/profile
            steps=""
        )
    )
    # decoder stage: how pictures are drawn, of log.pictures_every and by generate
    c.drawing = ConfigDict(
        dict(
            # or "ddim", "euler", "dpm++", "flow"
            sampler="pndm",
            # the release's
            steps=50,
            guidance=7.5,
            # takes guidance's contrast back (arXiv 2305.08891); there: 0.7
            rescale=0.0,
            # guidance leads away from what the model makes of the empty prompt (the release), or
            # from "zeros"
            negative="empty",
        )
    )
    c.eval = ConfigDict(
        dict(
            # steps between evaluations on the held-out split; 0: never
            every=0,
            # how many global batches of it
            batches=8,
            # and benchmarks, scored as emu_jax.evaluate does: (task, "FOLDER", its first N
            # examples) rows
            tasks=(),
        )
    )
    return c


def rules() -> ConfigDict:
    """(regex over parameter paths, value) rows: the first full match wins. emu_jax/tree.py."""
    return ConfigDict(
        dict(
            # everything end to end; ("vision/.*", False) freezes the encoder
            train=((".*", True),),
            # visual encoder
            peak_lr=(
                ("vision/.*", 4e-5),
                ("llama/.*", 3e-5),
                # causal transformer; the other new layers as it (unpublished)
                (".*", 1e-4),
            ),
            # unpublished; the usual exceptions
            decay=(
                (".*(norm[^/]*|bias|cls|pos|queries|relative|added|ln_visual)(/.*)?", 0.0),
                (".*", 0.05),
            ),
            # Towers whose gradient norms are logged apart.
            groups=(("vision/.*", "vision"), ("llama/.*", "llama"), (".*", "resampler")),
        )
    )


def objective() -> ConfigDict:
    return ConfigDict(
        dict(
            # of the cross-entropy (unpublished)
            text_weight=1.0,
            # of the regression (unpublished)
            image_weight=1.0,
            # is the embedding of [/IMG] a 33rd target of an image? The release's mask: yes; the
            # paper: unclear
            regress_end=True,
            # tokens of a row whose logits exist at one time
            chunk=256,
            # pixels by which training images are moved at random; the paper: no
            shift=0,
            # contrastive stage: of the softmax over the batch
            temperature=0.07,
            # contrastive stage: of the linear reading of the pixels, whose squared error is soon
            # some hundredths
            readout_weight=100.0,
            # contrastive stage: of what the deviation of a visual token's dimension lacks of 1
            spread=10.0,
            # contrastive stage: of the correlations between a visual token's dimensions
            decorrelate=0.5,
            # decoder stage: share of the images whose condition is dropped (for zeros: unpublished)
            condition_drop=0.1,
            # decoder stage, condition="generated": share of the images that have their own encoded
            # tokens instead
            encoded_share=0.0,
        )
    )


def optim() -> ConfigDict:
    return ConfigDict(
        dict(
            steps=10_000,
            # "cosine", "linear", "constant" or "stepped", after the warm-up; times the peaks of
            # rules.peak_lr
            schedule="cosine",
            # share of the steps
            warmup=0.2,
            # share of the peak that is left at the end
            final=0.0,
            # "stepped": (step, share of the peak) pairs
            boundaries=(),
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            # global norm; unpublished, the follow-up's value; 0: none
            clip=5.0,
            # micro-batches a step; the gradient is exactly that of the whole batch
            accumulate=1,
            # decay of an average of the parameters; 0: none
            ema=0.0,
            # skip a step whose gradient norm is over this many times its running mean; 0: never
            spike=0.0,
        )
    )


def data() -> ConfigDict:
    return ConfigDict(
        dict(
            # rows of a global batch
            batch=256,
            # T, tokens a row: LLaMA's context
            tokens=2048,
            # I, images a row
            images=32,
            # logical streams of the data: divides batch, and is divided by every number of hosts to
            # come
            num_streams=256,
            # or "best_fit": of those that wait, the one that uses tokens and images most evenly
            packing="first_fit",
            # documents of a stream that wait to fill a row
            pack_lookahead=16,
            # batches made ahead
            prefetch=2,
            # threads that fill rows, a host, and that read and decode where no processes do
            workers=4,
            # processes that read and decode for them: one may crash or hang, and no Python waits
            # for another; 0: none
            readers=0,
            # above this share of corrupt records the run stops
            max_bad_share=0.01,
            # seconds that a record may take to come from the file system; 0: for ever
            patience=120.0,
            # how often it is asked for again, if it does not come or the disk fails
            retries=2,
            # and then: "skip" it as corrupt, or "stop"
            unreadable="skip",
            # decoder stage: directory of conditions that `generate precompute` made
            conditions="",
            # decoder stage: directory that `generate precompute --latents` made; "": images are
            # encoded in every step
            latents="",
            # tokenizer.model (SentencePiece, LLaMA's) or tokenizer.json
            tokenizer="",
            # what counts as a label; with "[IMG]" the model decides when to draw. The release:
            # these two
            labels=("text", "</s>"),
            # conversations: begin with the release's system messages, which say what is coming, or
            # with "none"
            system="release",
            # of an image and its text, how often the image comes first
            image_first=0.5,
            # images to the model's square: "squash" (the release), "centre" or "random" cut of the
            # shorter side
            fit="squash",
            # (name, weight, "FOLDER:SPLIT"[, rule]) a source: a tensorflow-datasets dataset; rule:
            # data/sequence.py, SourceRule
            mixture=(),
            # the same, held out
            eval_mixture=(),
        )
    )
