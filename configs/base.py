"""Every field of a run, its default and its reason. The stages' files say only what differs.

A value here is the paper's (arXiv 2307.05222) unless a comment says otherwise; "unpublished" marks what nobody has
said, so that it is a field. Override on the command line: --config.optim.steps=100.
"""
from ml_collections import ConfigDict

from configs.sizes import model


def get_config(size: str = "emu-14b") -> ConfigDict:
    c = ConfigDict()
    c.stage = "emu"                     # the loss: "emu" (next element), "contrastive" (warm-up of an encoder of your own) or "decoder" (pixels)
    c.workdir = ""                      # checkpoints, metrics.jsonl, TensorBoard; where a run resumes from
    c.seed = 0                          # of the initial weights, the data's order and dropout
    c.init = ""                         # directory of a checkpoint whose weights start this run (or several: "EMU,SD"); "" is from scratch
    c.frozen_dtype = "float32"          # of the matrices that do not train; "bfloat16" halves their memory
    c.model = model(size)               # configs/sizes.py: pretrain.py:emu-7b chooses another
    c.rules = rules()
    c.objective = objective()
    c.optim = optim()
    c.data = data()
    c.mesh = ConfigDict(dict(           # the devices; -1 in one of them: what is left
        data=1,                         #   copies of the parameters
        fsdp=-1,                        #   parameters, gradients and optimizer state sharded
        tensor=1))                      #   heads, ffn and vocabulary split
    c.compile_cache = "~/.cache/emu_jax"    # compiled programs, which the next start loads: a folder, or gs://...; "": none
    c.checkpoint = ConfigDict(dict(
        to="",                          # a folder or bucket (gs://...) in the place of workdir, for what is large
        every=1000,                     # steps between saves
        keep=3,                         # the last n are kept
        keep_every=0))                  # and every n-th step for good; 0: none
    c.log = ConfigDict(dict(
        every=1,                        # steps between lines of metrics.jsonl (a line is free: it is fetched a step late)
        hang=600.0,                     # seconds in one phase of a step after which a process says where it hangs; 0: never
        pictures_every=500,             # steps between images and captions in TensorBoard; 0: never
        max_bad_steps=10))              # stop after so many non-finite or spiking steps in all
    c.profile = ConfigDict(dict(
        steps=""))                      # "10:13": an XLA trace of the steps 10, 11 and 12, in workdir/profile
    c.drawing = ConfigDict(dict(        # decoder stage: how pictures are drawn, of log.pictures_every and by generate
        sampler="pndm",                 # or "ddim", "euler", "dpm++", "flow"
        steps=50, guidance=7.5,         # the release's
        rescale=0.0,                    # takes guidance's contrast back (arXiv 2305.08891); there: 0.7
        negative="empty"))              # guidance leads away from what the model makes of the empty prompt (the release), or from "zeros"
    c.eval = ConfigDict(dict(
        every=0,                        # steps between evaluations on the held-out split; 0: never
        batches=8,                      # how many global batches of it
        tasks=()))                      # and benchmarks, scored as emu_jax.evaluate does: (task, "FOLDER", its first N examples) rows
    return c


def rules() -> ConfigDict:
    """(regex over parameter paths, value) rows: the first full match wins. emu_jax/tree.py."""
    return ConfigDict(dict(
        train=((".*", True),),                        # everything end to end; ("vision/.*", False) freezes the encoder
        peak_lr=(("vision/.*", 4e-5),                 # visual encoder
                 ("llama/.*", 3e-5),
                 (".*", 1e-4)),                       # causal transformer; the other new layers as it (unpublished)
        decay=((".*(norm[^/]*|bias|cls|pos|queries|relative|added|ln_visual)(/.*)?", 0.0),  # unpublished; the usual exceptions
               (".*", 0.05)),
        # Towers whose gradient norms are logged apart.
        groups=(("vision/.*", "vision"), ("llama/.*", "llama"), (".*", "resampler"))))


def objective() -> ConfigDict:
    return ConfigDict(dict(
        text_weight=1.0,                # of the cross-entropy (unpublished)
        image_weight=1.0,               # of the regression (unpublished)
        regress_end=True,               # is the embedding of [/IMG] a 33rd target of an image? The release's mask: yes; the paper: unclear
        chunk=256,                      # tokens of a row whose logits exist at one time
        shift=0,                        # pixels by which training images are moved at random; the paper: no
        temperature=0.07,               # contrastive stage: of the softmax over the batch
        readout_weight=100.0,           # contrastive stage: of the linear reading of the pixels, whose squared error is soon some hundredths
        spread=10.0,                    # contrastive stage: of what the deviation of a visual token's dimension lacks of 1
        decorrelate=0.5,                # contrastive stage: of the correlations between a visual token's dimensions
        condition_drop=0.1,             # decoder stage: share of the images whose condition is dropped (for zeros: unpublished)
        encoded_share=0.0))             # decoder stage, condition="generated": share of the images that have their own encoded tokens instead


def optim() -> ConfigDict:
    return ConfigDict(dict(
        steps=10_000,
        schedule="cosine",              # "cosine", "linear", "constant" or "stepped", after the warm-up; times the peaks of rules.peak_lr
        warmup=0.2,                     # share of the steps
        final=0.0,                      # share of the peak that is left at the end
        boundaries=(),                  # "stepped": (step, share of the peak) pairs
        b1=0.9, b2=0.98, eps=1e-6,
        clip=5.0,                       # global norm; unpublished, the follow-up's value; 0: none
        accumulate=1,                   # micro-batches a step; the gradient is exactly that of the whole batch
        ema=0.0,                        # decay of an average of the parameters; 0: none
        spike=0.0))                     # skip a step whose gradient norm is over this many times its running mean; 0: never


def data() -> ConfigDict:
    return ConfigDict(dict(
        batch=256,                      # rows of a global batch
        tokens=2048,                    # T, tokens a row: LLaMA's context
        images=32,                      # I, images a row
        num_streams=256,                # logical streams of the data: divides batch, and is divided by every number of hosts to come
        packing="first_fit",            # or "best_fit": of those that wait, the one that uses tokens and images most evenly
        pack_lookahead=16,              # documents of a stream that wait to fill a row
        prefetch=2,                     # batches made ahead
        workers=4,                      # threads that fill rows, a host, and that read and decode where no processes do
        readers=0,                      # processes that read and decode for them: one may crash or hang, and no Python waits for another; 0: none
        max_bad_share=0.01,             # above this share of corrupt records the run stops
        patience=120.0,                 # seconds that a record may take to come from the file system; 0: for ever
        retries=2,                      # how often it is asked for again, if it does not come or the disk fails
        unreadable="skip",              # and then: "skip" it as corrupt, or "stop"
        conditions="",                  # decoder stage: directory of conditions that `generate precompute` made
        latents="",                     # decoder stage: directory that `generate precompute --latents` made; "": images are encoded in every step
        tokenizer="",                   # tokenizer.model (SentencePiece, LLaMA's) or tokenizer.json
        labels=("text", "</s>"),        # what counts as a label; with "[IMG]" the model decides when to draw. The release: these two
        system="release",               # conversations: begin with the release's system messages, which say what is coming, or with "none"
        image_first=0.5,                # of an image and its text, how often the image comes first
        fit="squash",                   # images to the model's square: "squash" (the release), "centre" or "random" cut of the shorter side
        mixture=(),                     # (name, weight, "FOLDER:SPLIT"[, rule]) a source: a tensorflow-datasets dataset; rule: data/sequence.py, Rule
        eval_mixture=()))               # the same, held out
