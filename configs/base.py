"""Every field of a run, with its default and the reason for it.

The other files change only what differs. A value is the paper's (arXiv 2307.05222) unless its
comment says otherwise; "unpublished" means that neither the paper nor the release gives a value.
The comment above a field is its reference documentation (emu_jax/config.py, `fields`). Override a
field on the command line: --config.optim.steps=100. Read next: sizes.py.
"""

from ml_collections import ConfigDict

from configs.sizes import model


def get_config(size: str = "emu-14b") -> ConfigDict:
    c = ConfigDict()
    # Objective: "emu" (predict the next element), "contrastive" (warm up a vision encoder that
    # starts from scratch) or "decoder" (train the U-Net that turns visual tokens into pixels).
    c.stage = "emu"
    # Folder for checkpoints, metrics.jsonl and TensorBoard; a run resumes from the last checkpoint
    # in it. Required for training.
    c.workdir = ""
    # Random seed for the initial weights, the order of the data and dropout.
    c.seed = 0
    # Checkpoint folder whose weights start the run, or several separated by commas ("EMU,SD"); "":
    # random weights.
    c.init = ""
    # Dtype in which matrices that do not train are stored; "bfloat16" halves their memory.
    c.frozen_dtype = "float32"
    # Sizes of the model's towers (configs/sizes.py); --config=FILE:emu-7b chooses another size.
    c.model = model(size)
    # What trains, at which learning rate and weight decay, by parameter path.
    c.rules = rules()
    # Weights and options of the loss.
    c.objective = objective()
    # Optimizer (AdamW) and learning-rate schedule.
    c.optim = optim()
    # Sources, packing and loading of the training data.
    c.data = data()
    # Devices along each mesh axis; one axis may be -1: all remaining devices.
    c.mesh = ConfigDict(
        dict(
            # Data-parallel copies of the parameters. More copies need more memory, but weights are
            # gathered over fewer devices.
            data=1,
            # Shards of the parameters, gradients and optimizer state (FSDP).
            fsdp=-1,
            # Shards of the heads, the feed-forward layers and the vocabulary (tensor parallel).
            tensor=1,
        )
    )
    # Folder or gs:// bucket for compiled programs, which later starts reuse; "": no cache.
    c.compile_cache = "~/.cache/emu_jax"
    # Where and how often the training state is saved.
    c.checkpoint = ConfigDict(
        dict(
            # Folder or bucket (gs://...) for checkpoints in place of workdir; "": workdir.
            to="",
            # Steps between checkpoints.
            every=1000,
            # Number of most recent checkpoints to keep.
            keep=3,
            # Keep every checkpoint whose step is a multiple of this, too; 0: only the recent ones.
            keep_every=0,
        )
    )
    # Metrics and monitoring during training.
    c.log = ConfigDict(
        dict(
            # Steps between lines of metrics.jsonl. Even 1 does not slow a run down, because metrics
            # are fetched one step late.
            every=1,
            # Seconds in one phase (input, step, save, ...) after which the process logs where it
            # hangs; 0: never.
            hang=600.0,
            # Steps between sample images and captions in TensorBoard; 0: never.
            pictures_every=500,
            # Stop the run after this many non-finite or spiking steps in total.
            max_bad_steps=10,
        )
    )
    # Profiling of a few steps.
    c.profile = ConfigDict(
        dict(
            # Steps to trace with the XLA profiler, as FIRST:END: "10:13" writes steps 10, 11 and
            # 12 to workdir/profile; "": none.
            steps="",
        )
    )
    # Decoder stage: how images are sampled, by `generate` and for log.pictures_every.
    c.drawing = ConfigDict(
        dict(
            # Sampler: "pndm" (the release's), "ddim", "euler", "dpm++" or "flow".
            sampler="pndm",
            # Denoising steps per image; the release's value.
            steps=50,
            # Scale of classifier-free guidance; 1.0: off. The release's value.
            guidance=7.5,
            # Strength of guidance rescaling, 0 to 1, which reduces the excess contrast of guidance
            # (arXiv 2305.08891 uses 0.7); 0.0: off, as in the release.
            rescale=0.0,
            # Negative condition of guidance: "empty" (the visual tokens generated for the empty
            # prompt, as in the release) or "zeros".
            negative="empty",
        )
    )
    # Evaluation during training.
    c.eval = ConfigDict(
        dict(
            # Steps between evaluations on data.eval_mixture and eval.tasks; 0: never.
            every=0,
            # Global batches of data.eval_mixture per evaluation.
            batches=8,
            # Benchmarks to score as `emu_jax.evaluate` does: (task, "FOLDER", n) rows; only the
            # first n examples are scored.
            tasks=(),
        )
    )
    return c


def rules() -> ConfigDict:
    """(regex, value) rows over parameter paths; the first full match wins (emu_jax/tree.py)."""
    return ConfigDict(
        dict(
            # Which parameters train. Default: everything, end to end; a row ("vision/.*", False)
            # in front would freeze the vision encoder.
            train=((".*", True),),
            # Peak learning rates. The paper gives those of the vision encoder, LLaMA and the causal
            # transformer; other new layers get that of the causal transformer (unpublished).
            peak_lr=(
                ("vision/.*", 4e-5),
                ("llama/.*", 3e-5),
                (".*", 1e-4),
            ),
            # Weight decay: the paper's 0.05, and none for norms, biases, positions, queries and
            # added vocabulary rows (the exceptions are unpublished; these are the usual ones).
            decay=(
                (".*(norm[^/]*|bias|cls|pos|queries|relative|added|ln_visual)(/.*)?", 0.0),
                (".*", 0.05),
            ),
            # Groups of parameters whose gradient norms are logged separately; the value is the name
            # of the group.
            groups=(("vision/.*", "vision"), ("llama/.*", "llama"), (".*", "resampler")),
        )
    )


def objective() -> ConfigDict:
    """Weights and options of the loss."""
    return ConfigDict(
        dict(
            # Weight of the text loss, the mean cross-entropy (unpublished).
            text_weight=1.0,
            # Weight of the image loss, the mean squared error of visual tokens (unpublished).
            image_weight=1.0,
            # Whether an image has one more regression target, the embedding of [/IMG] after its
            # last visual token. The release's mask includes it; the paper does not mention it.
            regress_end=True,
            # Tokens of a row whose logits exist at a time; fewer need less memory. The result does
            # not depend on it.
            chunk=256,
            # The most pixels by which training images are shifted at random along each axis. The
            # paper uses none.
            shift=0,
            # Contrastive stage: temperature of the softmax over the batch; CLIP's starts at 0.07.
            temperature=0.07,
            # Contrastive stage: weight of the pixel read-out loss, a mean squared error that soon
            # falls below 0.1. Our choice.
            readout_weight=100.0,
            # Contrastive stage: weight of the variance hinge max(0, 1 - std) over each dimension of
            # a visual token (VICReg, arXiv 2105.04906). Our choice.
            spread=10.0,
            # Contrastive stage: weight of the squared correlations between the dimensions of a
            # visual token (VICReg's covariance term). Our choice.
            decorrelate=0.5,
            # Decoder stage: share of images whose condition is replaced by zeros, for
            # classifier-free guidance. The paper drops 10 % of the conditions; what replaces them
            # is unpublished.
            condition_drop=0.1,
            # Decoder stage with condition="generated": share of images conditioned on their own
            # encoded visual tokens instead. The paper uses none.
            encoded_share=0.0,
        )
    )


def optim() -> ConfigDict:
    """AdamW and its learning-rate schedule."""
    return ConfigDict(
        dict(
            # Training steps; the schedule spans all of them.
            steps=10_000,
            # Shape of the learning rate after the warm-up: "cosine", "linear", "constant" or
            # "stepped" (see boundaries).
            schedule="cosine",
            # Length of the linear warm-up, as a share of all steps.
            warmup=0.2,
            # Learning rate at the last step, as a share of the peak ("cosine" and "linear").
            final=0.0,
            # Schedule "stepped": (step, share of the peak) pairs; a share applies from its step
            # until the next pair's.
            boundaries=(),
            # AdamW's decay of the first moment.
            b1=0.9,
            # AdamW's decay of the second moment.
            b2=0.98,
            # AdamW's epsilon.
            eps=1e-6,
            # Clip the gradient to this global norm; 0: no clipping. Unpublished; this is Emu2's
            # value.
            clip=5.0,
            # Micro-batches per step. More need less memory; the gradient is that of the complete
            # batch.
            accumulate=1,
            # Decay of an exponential moving average of the trained parameters; 0: no average.
            ema=0.0,
            # Skip a step whose gradient norm exceeds this many times its running mean; 0: never.
            spike=0.0,
        )
    )


def data() -> ConfigDict:
    """Sources, packing and loading of the training data."""
    return ConfigDict(
        dict(
            # Rows of the global batch, over all devices.
            batch=256,
            # T, tokens per row: LLaMA's context length.
            tokens=2048,
            # I, the most images per row. With 32, pretraining leaves 9 % of the image slots empty
            # and pads 3 % of the tokens (benchmarks/results/fit.md).
            images=32,
            # Number of logical data streams, which must divide batch and be a multiple of every
            # number of hosts that the run may use: a resumed run then reads the same order on
            # another number of hosts.
            num_streams=256,
            # How documents are packed into rows: "first_fit", or "best_fit", which picks the
            # waiting document that uses tokens and images most evenly.
            packing="first_fit",
            # Number of waiting documents per stream from which rows are filled.
            pack_lookahead=16,
            # Batches prepared ahead of the step.
            prefetch=2,
            # Threads per host that fill rows. With readers=0 they also read and decode records.
            workers=4,
            # Processes per host that read and decode records; 0: the threads read. Processes use
            # more cores than threads can, and a run survives if a decoder crashes or hangs in one.
            readers=0,
            # Stop the run when more than this share of a source's records is corrupt.
            max_bad_share=0.01,
            # Seconds to wait for a record from the file system before it is requested again; 0: no
            # limit.
            patience=120.0,
            # Further attempts to read a record after a timeout or a disk error.
            retries=2,
            # What to do if these attempts fail, too: "skip" the record as corrupt, or "stop" the
            # run.
            unreadable="skip",
            # Decoder stage: folder of conditions written by `generate precompute`, which
            # model.decoder.condition="generated" needs; "" for the other conditions.
            conditions="",
            # Decoder stage: folder of VAE latents written by `generate precompute --latents`; "":
            # images are encoded in every step.
            latents="",
            # Tokenizer file: tokenizer.model (SentencePiece, LLaMA's) or tokenizer.json.
            tokenizer="",
            # Tokens that count as labels, among "text", "</s>", "[IMG]" and "[/IMG]". The default
            # is the release's; with "[IMG]" the model learns when to generate an image.
            labels=("text", "</s>"),
            # System message at the start of conversations: "release" (the release's, which
            # announces an image or a video) or "none".
            system="release",
            # Probability that the image of an image-text pair comes before its text.
            image_first=0.5,
            # How images become square: "squash" (the release's), "centre" or "random" (crops along
            # the longer side).
            fit="squash",
            # Sources to train on: (name, weight, "FOLDER:SPLIT"[, rule]) rows, each a
            # tensorflow-datasets folder; rule: a dict with fields of emu_jax/data/sequence.py's
            # SourceRule.
            mixture=(),
            # Sources to evaluate on, rows like those of mixture.
            eval_mixture=(),
        )
    )
