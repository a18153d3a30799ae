"""The Python API of generation: a `Session` is a trained Emu that takes prompts.

Many prompts at once are sorted by length and batched, which does not change the results. Sizes are
rounded up to powers of two before compilation: rows and images up to `batch`, ids of a prompt and
of an answer from 16 up to the context. So each kind of generation is compiled at most log2(batch) x
log2(context / 16)^2 times, in practice once or twice. Read next: processor.py, conversation.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from tqdm import tqdm

from emu_jax import checkpoint, tree
from emu_jax.batching import pad_batch, power_of_two
from emu_jax.config import UserError, from_dict
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.tokenizer import EOS, Tokenizer
from emu_jax.generate import decode_state, image_decoding, text_decoding, trie
from emu_jax.generate.decode_state import DecodeState
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.image_decoding import GeneratedImage
from emu_jax.generate.logits_process import SamplingMetadata
from emu_jax.generate.placement import abstract_params
from emu_jax.generate.processor import Parts, Processor, Prompt, concatenate, truncate_left
from emu_jax.generate.stream import truncate_at_stop
from emu_jax.generate.trie import Trie
from emu_jax.models import module
from emu_jax.models.emu import Emu, EmuConfig
from emu_jax.processes import to_host

# The smallest number of ids for which programs are compiled.
MIN_LENGTH = 16
# The most images in a streamed answer, for a model that was trained to emit `[IMG]`.
MAX_STREAMED_IMAGES = 4
# Number of ids between two searches for a stop string.
STOP_CHECK_EVERY = 8

ImageDecoder = Callable[[Float[np.ndarray, "M N D"]], UInt8[np.ndarray, "M h w 3"]]


@dataclass(frozen=True)
class Prefix:
    """The common beginning of several prompts, prefilled once."""

    # One row, or as many equal rows as the mesh needs.
    state: DecodeState
    prompt: Prompt


class Session:
    """A trained Emu that generates text and images from interleaved prompts.

    A prompt is a sequence of parts in reading order: texts, paths of image or video files, pixels
    (uint8 [h, w, 3]) and visual tokens (float [N, D], as `generate_images` returns them). Most
    methods also take a `Prompt` in place of parts.

        session = Session.load("runs/emu")
        photo = Path("photo.jpg")
        [caption] = session.generate_texts([[photo]])
        visual = session.generate_images([["a photo of a dog"], [photo, "in the snow"]])
        for piece in session.stream(["What is this?", photo], chat=True):
            print(piece, end="", flush=True)

    Methods raise UserError, with a message of one line, for a file that cannot be read, for an
    array that is not an image, and for a prompt that does not fit the context. Shapes in docstrings
    use the letters of types.py: M images of N visual tokens of width D.
    """

    def __init__(
        self,
        model_config: EmuConfig,
        params: tree.Tree,
        tokenizer: Tokenizer,
        *,
        context: int,
        image_decoder: ImageDecoder | None = None,
        mesh: jax.sharding.Mesh | None = None,
        batch: int = 32,
        truncate: str = "never",
        max_images: int = 0,
        system: str = "release",
    ):
        """Make a session from parameters in memory; `Session.load` reads a checkpoint.

        params: of the module Emu, laid out as `placement.abstract_params` if there is a mesh.
        context: the most elements (ids and visual tokens) of a prompt and its answer together.
        image_decoder: visual tokens to pixels, such as a `DiffusionDecoder`.
        batch: the most prompts, and the most images to encode, at once.
        truncate: "left" cuts the beginning of prompts that are too long, "never" refuses them.
        max_images: the most images in a streamed answer, unless the call gives a number.
        system: config.data.system, which decides the default system message of chats.
        """
        self.model_config = model_config
        self.params = params
        self.tokenizer = tokenizer
        self.context = context
        self.image_decoder = image_decoder
        self.truncate = truncate
        self.mesh = mesh
        # The rows of a batch must divide into this many shards.
        self.shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch = max(batch, self.shards)
        self.max_images = max_images
        self.vocab = model_config.llama.vocab + model_config.llama.added
        self.processor = Processor(
            tokenizer,
            n_visual=model_config.resampler.tokens,
            image_size=model_config.vision.image,
            width=model_config.llama.width,
            added=model_config.llama.added,
            system=system,
        )

    @classmethod
    def load(
        cls,
        directory: str,
        *,
        ema: bool = False,
        tokenizer: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        **options: Any,
    ) -> "Session":
        """Load a session from a run's workdir or one of its checkpoints.

        The checkpoint contains the model's config, the tokenizer's path, the context length and
        whether the model was trained to generate images by itself. Matrices are loaded in the
        model's compute dtype.

        ema: load the moving average of the weights. tokenizer: path of tokenizer.model or
        tokenizer.json, if the one in the config has moved. mesh: None for one device; see
        `placement.inference_mesh`. options: keyword arguments of `Session`.
        Raises UserError for a missing checkpoint, one without a language model or without an
        average, and a missing tokenizer.
        """
        config = checkpoint.read_config(directory)
        if not any(path.startswith("llama/") for path in checkpoint.param_shapes(directory)):
            raise UserError(
                f"the checkpoint in '{directory}' is of the stage {config['stage']!r}: "
                "it has no language model to generate with"
            )
        model_config = EmuConfig.of(from_dict(config["model"]).to_dict())
        tokens = tokenizers.load(tokenizer or config["data"]["tokenizer"], model_config.llama.vocab)
        shapes = abstract_params(module.abstract(Emu, model_config), mesh, model_config.compute)
        params = checkpoint.restore_params(directory, shapes, ema=ema)
        defaults: dict[str, Any] = {
            "context": config["data"]["tokens"],
            "max_images": MAX_STREAMED_IMAGES if "[IMG]" in config["data"]["labels"] else 0,
            "system": config["data"].get("system", "release"),
        }
        keywords = defaults | options
        return cls(model_config, params, tokens, mesh=mesh, **keywords)

    # Prompts

    def prompt(self, parts: Parts | Prompt) -> Prompt:
        """`<s>` and the parts as ids, images and slots; a Prompt is returned as it is."""
        return parts if isinstance(parts, Prompt) else self.processor.interleave(parts)

    def chat_prompt(self, parts: Parts, *, system: str | None = None) -> Prompt:
        """The first turn of a chat, up to where the answer begins.

        system: None for the system message that the model was tuned with, "" for none. Raises
        UserError for a model that was not tuned to chat.
        """
        return self.processor.chat_turn(parts, system=system, first=True)

    def prefill(self, parts: Parts | Prompt) -> Prefix:
        """Read the common beginning of many prompts once: a system prompt, few-shot examples.

        Prompts that are used with it must not repeat it, nor begin with `<s>`.
        """
        prompt = self.prompt(parts)
        with self.mesh_context():
            return Prefix(self.prefill_batch([prompt]), prompt)

    # Many prompts at once

    def generate_texts(
        self,
        prompts: Sequence[Parts | Prompt],
        config: GenerationConfig | None = None,
        *,
        choices: Sequence[str] | None = None,
        prefix: Prefix | None = None,
        progress: str = "",
    ) -> list[str]:
        """Generate the answer to each prompt, as text without special tokens.

        config: greedy and at most 128 tokens by default. choices: the only answers allowed.
        prefix: what all prompts begin with. progress: label of a progress bar.
        """
        config = config or GenerationConfig()
        answers = None
        if choices is not None:
            answers = [self.tokenizer.encode(choice) for choice in choices]
        ids = self.generate_ids(prompts, config, choices=answers, prefix=prefix, progress=progress)
        return [truncate_at_stop(self.tokenizer.decode(row), config.stop) for row in ids]

    def generate_ids(
        self,
        prompts: Sequence[Parts | Prompt],
        config: GenerationConfig,
        *,
        choices: Sequence[Sequence[int]] | None = None,
        prefix: Prefix | None = None,
        added: bool = False,
        progress: str = "",
    ) -> list[list[int]]:
        """Generate the ids of each answer, without `</s>` and not cut at stop strings.

        choices: ids of the only answers allowed. added: allow the added tokens, such as `[IMG]`,
        too. Other arguments: as in `generate_texts`. With a temperature, the answer to a prompt
        depends on config.seed and on the prompt's index in `prompts`.
        """
        allowed = self.text_ids() | added
        answers = None if choices is None else trie.build(choices, EOS)

        def generate(some: list[Prompt], indices: list[int]) -> list[list[int]]:
            room = power_of_two(config.max_new_tokens, MIN_LENGTH)
            state = self.prefill_batch(some, prefix=prefix, room=room)
            metadata = self.sampling_metadata(
                some,
                config,
                rows=len(state.lengths),
                prefix=prefix,
                allowed=allowed,
                choices=answers,
            )
            if config.beams > 1:
                ids = self._beam_search(state, room, config, metadata)
            else:
                ids = self._decode(state, room, indices, config, metadata)
            limits = metadata.max_new_tokens
            return [
                text_decoding.until_end(row[:limit]) for row, limit in zip(ids, limits, strict=True)
            ]

        return self._batched(prompts, prefix, 1, generate, progress)

    def generate_images(
        self, prompts: Sequence[Parts | Prompt], *, prefix: Prefix | None = None, progress: str = ""
    ) -> Float[np.ndarray, "M N D"]:
        """Generate the visual tokens of the image that follows each prompt.

        `[IMG]` is appended to the prompts. `decode_images` turns the result into pixels.
        """
        N = self.processor.n_visual
        opening = Prompt([self.tokenizer.img])

        def generate(some: list[Prompt], _: list[int]) -> list[np.ndarray]:
            state = self.prefill_batch(some, prefix=prefix, room=N)
            images = image_decoding.start(self.model_config, state)
            images = image_decoding.regress(self.model_config, self.params, images, np.int32(N))
            return list(to_host(images.visual).astype(np.float32))

        if not len(prompts):
            return np.zeros((0, N, self.model_config.llama.width), np.float32)
        opened = []
        for parts in prompts:
            prompt = self.prompt(parts) if prefix is None else self.continuation(parts)
            opened.append(concatenate(prompt, opening))
        return np.stack(self._batched(opened, prefix, N + 1, generate, progress))

    def encode_images(
        self, images: Iterable[np.ndarray], progress: str = ""
    ) -> Float[np.ndarray, "M N D"]:
        """Encode images (uint8 [h, w, 3] of any size) as the visual tokens that the LLM reads."""
        pixels = [self.processor.interleave([image]).images[0] for image in images]
        with self.mesh_context():
            return self._encode(pixels, progress)

    def decode_images(self, visual: Float[np.ndarray, "M N D"]) -> list[GeneratedImage]:
        """Pair visual tokens with their pixels; the pixels are None without an image decoder."""
        pixels: Iterable = [None] * len(visual)
        if self.image_decoder is not None:
            pixels = self.image_decoder(visual)
        return [GeneratedImage(*pair) for pair in zip(visual, pixels, strict=True)]

    def losses(
        self, parts: Parts | Prompt | Prefix, candidates: Sequence[str], *, end: bool = True
    ) -> Float[np.ndarray, "C"]:
        """Mean cross-entropy of each candidate's tokens as the answer to one prompt.

        The candidate with the lowest loss is the likeliest. end: include its `</s>`. Raises
        UserError for no candidates or an empty one.
        """
        answers = [self.tokenizer.encode(candidate) + [EOS] * end for candidate in candidates]
        if not answers or not all(answers):
            raise UserError("losses needs at least one candidate, and none may be empty")
        if isinstance(parts, Prefix):
            prefix = parts
        else:
            longest = max(map(len, answers))
            prefix = self.prefill(self.fit_prompt(self.prompt(parts), 0, longest))

        def mean_nll(some: list[Prompt], _: list[int]) -> list[float]:
            rows = power_of_two(len(some), self.shards)
            tokens, lengths = pad_ids([answer.tokens for answer in some], rows)
            capacity = prefix.state.cache.capacity + tokens.shape[1]
            repeats = rows // len(prefix.state.lengths)
            state = decode_state.expand(prefix.state, repeats, capacity)
            nll = text_decoding.nll(self.model_config, self.params, state, tokens, lengths)
            return (to_host(nll) / lengths).tolist()

        prompts = [Prompt(answer) for answer in answers]
        return np.array(self._batched(prompts, prefix, 0, mean_nll, ""), np.float32)

    # One prompt, streamed

    def stream(
        self,
        parts: Parts,
        config: GenerationConfig | None = None,
        *,
        chat: bool = False,
        system: str | None = None,
        images: int | None = None,
    ) -> Iterator[str | GeneratedImage]:
        """Yield the answer to one prompt piece by piece: texts, and images where `[IMG]` comes.

        chat: use the chat format; for several turns use a `Conversation`. system: as in
        `chat_prompt`. images: the most images in the answer; None for the session's `max_images`.
        Raises UserError for beam search, which cannot be streamed.
        """
        # Imported here, since conversation.py imports this module.
        from emu_jax.generate.conversation import Conversation

        return Conversation(self, chat=chat, system=system).reply(parts, config, images=images)

    # Building blocks, for conversation.py and benchmarks. Those that compute need mesh_context().

    def mesh_context(self) -> AbstractContextManager:
        """The context in which to call the session's compiled functions."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def text_ids(self) -> Bool[np.ndarray, "V"]:
        """Mask of the ids of text: the vocabulary without the added tokens."""
        return np.arange(self.vocab) < self.model_config.llama.vocab

    def continuation(self, parts: Parts | Prompt) -> Prompt:
        """The parts as the continuation of a prefix, that is, without `<s>`."""
        if isinstance(parts, Prompt):
            return parts
        prompt = self.prompt(parts)
        return Prompt(prompt.tokens[1:], prompt.images, [slot - 1 for slot in prompt.slots])

    def fit_prompt(self, prompt: Prompt, before: int, room: int) -> Prompt:
        """Return the prompt if the context holds `before` elements, the prompt and `room` more.

        With truncate="left" a prompt that is too long is cut, unless `before` is not 0. Otherwise
        raises UserError.
        """
        if before + len(prompt) + room <= self.context:
            return prompt
        if self.truncate == "left" and before == 0 and room + 1 < self.context:
            return truncate_left(prompt, self.context - room, self.processor.n_visual)
        raise UserError(
            f"the prompt has {before + len(prompt)} elements and its answer at least {room}, but "
            f"the context holds {self.context}; shorten the prompt, or set truncate=left to cut "
            "its beginning"
        )

    def prefill_batch(
        self, prompts: Sequence[Prompt], *, prefix: Prefix | None = None, room: int = 0
    ) -> DecodeState:
        """Read prompts, after a prefix if given, and leave exactly `room` slots of the cache free.

        The rows are padded with copies of the last prompt to a power of two.
        """
        rows = power_of_two(len(prompts), self.shards)
        x, lengths = self.embed(pad_batch(prompts, rows))
        capacity = x.shape[1] + room
        if prefix is None:
            state = decode_state.init(self.model_config, self.params, rows, capacity)
        else:
            repeats = rows // len(prefix.state.lengths)
            capacity += prefix.state.cache.capacity
            state = decode_state.expand(prefix.state, repeats, capacity)
        return decode_state.prefill(self.model_config, self.params, state, x, lengths)

    def embed(
        self, prompts: Sequence[Prompt]
    ) -> tuple[Float[Array, "B T D"], Int[np.ndarray, "B"]]:
        """The LLM's input for prompts, padded to a power of two, and their lengths."""
        tokens, lengths = pad_ids([prompt.tokens for prompt in prompts], len(prompts))
        # An image that several prompts share is encoded once.
        images = {id(image): image for prompt in prompts for image in prompt.images}
        rows_of_visual = {key: row for row, key in enumerate(images)}
        most = power_of_two(max(len(prompt.images) for prompt in prompts))
        indices = np.zeros((len(prompts), most), np.int32)
        slots = np.full((len(prompts), most), tokens.shape[1])
        for row, prompt in enumerate(prompts):
            count = len(prompt.images)
            indices[row, :count] = [rows_of_visual[id(image)] for image in prompt.images]
            slots[row, :count] = prompt.slots
        visual = self.visual_tokens(list(images.values()))
        x = decode_state.embed(self.model_config, self.params, tokens, visual, indices, slots)
        return x, lengths

    def visual_tokens(self, images: Sequence[np.ndarray]) -> Float[np.ndarray, "M N D"]:
        """Visual tokens of images (pixels or visual tokens), padded to a power of two."""
        are_pixels = [image.dtype == np.uint8 for image in images]
        pixels = [image for image, is_pixels in zip(images, are_pixels) if is_pixels]
        encoded = iter(self._encode(pixels, ""))
        rows = power_of_two(len(images))
        shape = (rows, self.processor.n_visual, self.model_config.llama.width)
        visual = np.zeros(shape, np.float32)
        for row, (image, is_pixels) in enumerate(zip(images, are_pixels)):
            visual[row] = next(encoded) if is_pixels else image
        return visual.astype(self.model_config.compute)

    def sampling_metadata(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig,
        *,
        rows: int,
        allowed: Bool[np.ndarray, "V"],
        prefix: Prefix | None = None,
        choices: Trie | None = None,
        stop_ids: Sequence[int] = (EOS,),
    ) -> SamplingMetadata:
        """The config, limits and masks for the answers to prompts, as arrays.

        rows: number of rows in the batch, at least that of prompts. allowed: mask of the ids that
        may be chosen. choices: the only answers allowed. stop_ids: ids that end an answer.
        """
        before = prefix.prompt.tokens if prefix else []
        prompt_ids, lengths = pad_ids(
            [before + prompt.tokens for prompt in prompts], rows, fill=self.vocab
        )
        limits = np.minimum(config.max_new_tokens, self.context - lengths)
        return SamplingMetadata(
            temperature=np.array(config.temperature, np.float32),
            top_k=np.array(config.top_k, np.int32),
            top_p=np.array(config.top_p, np.float32),
            min_p=np.array(config.min_p, np.float32),
            repetition_penalty=np.array(config.repetition_penalty, np.float32),
            length_penalty=np.array(config.length_penalty, np.float32),
            min_new_tokens=np.array(config.min_new_tokens, np.int32),
            max_new_tokens=limits.astype(np.int32),
            allowed=allowed,
            stop_ids=np.isin(np.arange(self.vocab), stop_ids),
            prompt_ids=prompt_ids,
            trie=choices,
        )

    # Helpers

    def _batched(
        self,
        prompts: Sequence[Parts | Prompt],
        prefix: Prefix | None,
        room: int,
        generate: Callable[[list[Prompt], list[int]], Iterable],
        progress: str,
    ) -> list:
        """Results of generate(prompts, their indices) for batches of prompts of similar length.

        The results are in the order of the prompts. room: the least number of elements that an
        answer needs. `generate` may return more results than prompts; those of padding come last.
        """
        before = len(prefix.prompt) if prefix else 0
        fitted = []
        for parts in prompts:
            prompt = self.continuation(parts) if prefix else self.prompt(parts)
            fitted.append(self.fit_prompt(prompt, before, room))
        order = sorted(range(len(fitted)), key=lambda index: len(fitted[index]))
        results: list = [None] * len(fitted)
        with self.mesh_context():
            for start in _progress(range(0, len(order), self.batch), progress):
                indices = order[start : start + self.batch]
                found = generate([fitted[index] for index in indices], indices)
                for index, result in zip(indices, found, strict=False):
                    results[index] = result
        return results

    def _encode(self, pixels: Sequence[np.ndarray], progress: str) -> Float[np.ndarray, "M N D"]:
        """Visual tokens of images in the model's size, in float32."""
        shape = (0, self.processor.n_visual, self.model_config.llama.width)
        found = [np.zeros(shape, np.float32)]
        for start in _progress(range(0, len(pixels), self.batch), progress):
            some = pixels[start : start + self.batch]
            images = np.stack(pad_batch(some, power_of_two(len(some), self.shards)))
            visual = to_host(decode_state.encode_images(self.model_config, self.params, images))
            found.append(visual[: len(some)].astype(np.float32))
        return np.concatenate(found)

    def _beam_search(
        self, state: DecodeState, room: int, config: GenerationConfig, metadata: SamplingMetadata
    ) -> Int[np.ndarray, "B n"]:
        state = decode_state.expand(state, config.beams, state.cache.capacity)
        ids = text_decoding.beam_search(
            self.model_config, self.params, state, config.beams, room, metadata
        )
        return to_host(ids)

    def _decode(
        self,
        state: DecodeState,
        room: int,
        indices: Sequence[int],
        config: GenerationConfig,
        metadata: SamplingMetadata,
    ) -> Int[np.ndarray, "B n"]:
        """Ids of answers; the key of a row comes from the seed and its index."""
        indices = pad_batch(indices, len(state.lengths))
        seed = jax.random.key(config.seed)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(seed, jnp.array(indices))
        answers = text_decoding.start(self.model_config, self.params, state, keys, room, metadata)
        limit = config.max_new_tokens
        if not config.stop:
            answers = text_decoding.decode(
                self.model_config, self.params, answers, np.int32(limit), metadata
            )
            return to_host(answers.ids)
        # A stop string may span several ids, so the text is searched every few ids.
        count = 1
        while count < limit and not to_host(answers.done).all():
            count = min(count + STOP_CHECK_EVERY, limit)
            answers = text_decoding.decode(
                self.model_config, self.params, answers, np.int32(count), metadata
            )
            texts = [self.tokenizer.decode(row[:count].tolist()) for row in to_host(answers.ids)]
            stopped = [truncate_at_stop(text, config.stop) != text for text in texts]
            answers = replace(answers, done=answers.done | np.array(stopped))
        return to_host(answers.ids)


def pad_ids(
    ids: Sequence[Sequence[int]], rows: int, fill: int = 0
) -> tuple[Int[np.ndarray, "rows T"], Int[np.ndarray, "rows"]]:
    """Ids of different lengths as an array, and the lengths.

    T is a power of two, at least MIN_LENGTH. Copies of the last row make up `rows`.
    """
    ids = pad_batch(ids, rows)
    lengths = np.array([len(row) for row in ids], np.int32)
    padded = np.full((rows, power_of_two(int(lengths.max()), MIN_LENGTH)), fill, np.int32)
    for row, values in zip(padded, ids, strict=True):
        row[: len(values)] = values
    return padded, lengths


def _progress(starts: range, label: str) -> Iterable[int]:
    """The starts of batches, with a progress bar on a terminal if there is a label."""
    return tqdm(starts, label, unit=" batches", disable=None if label else True)
