"""A trained Emu in use: interleaved prompts in, text, images and rankings out; for the command
line, evaluation and serving.

Many prompts at once are sorted by length and batched; results do not depend on it. Everything is
compiled for powers of two: rows (up to `batch`), images encoded at once (up to `batch`), ids of a
prompt and of an answer (from 16 up to the context). So a kind of generation is compiled at most
log2(batch) x log2(context / 16)^2 times, in practice once or twice. Read next: processor.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from tqdm import tqdm

from emu_jax import checkpoint, sharding, tree
from emu_jax.config import UserError, from_dict
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.generate import decode_state, image_decoding, processor, text_decoding, trie
from emu_jax.generate.decode_state import DecodeState
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.logits_process import SamplingMetadata
from emu_jax.generate.processor import Part, Processor, Prompt
from emu_jax.generate.stream import TextStream, truncate_at_stop
from emu_jax.models import emu, module
from emu_jax.processes import to_host

# ids that a prompt or an answer is compiled for
MIN_LENGTH = 16
# images in an answer of a model that decides when to draw
MAX_STREAMED_IMAGES = 4
# ids between looks for a stop text
STOP_CHECK_EVERY = 8
Parts = Sequence[Part]


class GeneratedImage(NamedTuple):
    """An image that the model drew."""

    # a part of later prompts as it is
    visual: Float[np.ndarray, "N D"]
    # None without a decoder
    pixels: UInt8[np.ndarray, "h w 3"] | None


@dataclass(frozen=True)
class Prefix:
    """What prompts have in common, read once."""

    # of one row (or as many, all the same, as the mesh needs)
    state: DecodeState
    prompt: Prompt


class Session:
    """A model, its tokenizer, and what turns visual tokens into pixels: decode([M, N, D]) -> [M, h,
    w, 3], or None.
    """

    def __init__(
        self,
        model_config: emu.EmuConfig,
        params: tree.Tree,
        tokenizer: Tokenizer,
        *,
        context: int,
        image_decoder: Callable[[Float[np.ndarray, "M N D"]], UInt8[np.ndarray, "M h w 3"]]
        | None = None,
        mesh: jax.sharding.Mesh | None = None,
        batch: int = 32,
        truncate: str = "never",
        max_images: int = 0,
        system: str = "release",
    ):
        """context: elements that a row may have. batch: rows at once. truncate: "left" cuts prompts
        that are too long, else they are refused. max_images: images that a streamed answer may hold,
        unless it is said otherwise. system: what chats begin with, data.system.
        """
        self.model_config = model_config
        self.params = params
        self.tokenizer = tokenizer
        self.context = context
        self.image_decoder = image_decoder
        self.truncate = truncate
        self.mesh = mesh
        self.shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch = max(batch, self.shards)
        self.max_images = max_images
        self.vocab = model_config.llama.vocab + model_config.llama.added
        self.processor = Processor(
            tokenizer,
            model_config.resampler.tokens,
            model_config.vision.image,
            model_config.llama.width,
            model_config.llama.added,
            system,
        )

    @classmethod
    def load(
        cls,
        directory: str,
        *,
        ema: bool = False,
        tokenizer: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        **options,
    ) -> "Session":
        """From a run's workdir or one of its checkpoints, which knows its model, its tokenizer's
        path, its context, and whether the model was trained to say when it draws.

        Matrices are held in the dtype of the arithmetic. ema: the averaged weights. tokenizer:
        another path. options: of `Session`. Raises UserError for no checkpoint, one of a model that
        generates nothing, or no tokenizer.
        """
        config = checkpoint.read_config(directory)
        if not any(path.startswith("llama/") for path in checkpoint.param_shapes(directory)):
            raise UserError(
                f"the checkpoint in '{directory}' is of the stage {config['stage']!r}: it has no language model to generate with"
            )
        model_config = emu.EmuConfig.of(from_dict(config["model"]).to_dict())
        tokens = tokenizers.load(tokenizer or config["data"]["tokenizer"], model_config.llama.vocab)
        params = checkpoint.restore_params(directory, abstract_params(model_config, mesh), ema=ema)
        max_images = MAX_STREAMED_IMAGES if "[IMG]" in config["data"]["labels"] else 0
        return cls(
            model_config,
            params,
            tokens,
            context=config["data"]["tokens"],
            mesh=mesh,
            **{"max_images": max_images, "system": config["data"].get("system", "release")}
            | options,
        )

    # --- prompts ---

    def prompt(self, parts: Parts | Prompt) -> Prompt:
        """`<s>` and the parts as ids and images. Raises UserError for files that cannot be read."""
        return parts if isinstance(parts, Prompt) else self.processor.interleave(parts)

    def chat_prompt(self, parts: Parts, *, system: str | None = None) -> Prompt:
        """The first turn of a chat, up to where the answer begins. system: None for the release's
        message, "" for none.
        """
        return self.processor.chat_turn(parts, system=system, first=True)

    def prefill(self, parts: Parts | Prompt) -> Prefix:
        """A prefix for many prompts: a system message, few-shot examples. What follows it is given
        without `<s>`.
        """
        prompt = self.prompt(parts)
        with self._mesh():
            return Prefix(self._read([prompt], None, 0), prompt)

    # --- many at once ---

    def generate_texts(
        self,
        prompts: Sequence[Parts | Prompt],
        options: GenerationConfig | None = None,
        *,
        choices: Sequence[str] | None = None,
        prefix: Prefix | None = None,
        progress: str = "",
    ) -> list[str]:
        """The answer to each prompt. choices: the answers allowed. progress: the name of a progress
        bar.
        """
        options = options or GenerationConfig()
        ids = self.generate_ids(
            prompts,
            options,
            choices=choices and [self.tokenizer.encode(choice) for choice in choices],
            prefix=prefix,
            progress=progress,
        )
        return [truncate_at_stop(self.tokenizer.decode(row), options.stop) for row in ids]

    def generate_ids(
        self,
        prompts: Sequence[Parts | Prompt],
        options: GenerationConfig,
        *,
        choices: Sequence[Sequence[int]] | None = None,
        prefix: Prefix | None = None,
        added: bool = False,
        progress: str = "",
    ) -> list[list[int]]:
        """As `generate_texts`, in ids and not cut at stop texts, without `</s>`. added: the added tokens may
        be said too.
        """
        allowed = self._allowed() | added
        choice = None if choices is None else trie.build(choices, text_decoding.EOS)

        def generate(some: list[Prompt], numbers: list[int]) -> list[list[int]]:
            room = _bucket(options.max_new_tokens, MIN_LENGTH)
            context = self._read(some, prefix, room)
            metadata = self._rules(some, prefix, options, allowed, choice, len(context.lengths))
            if options.beams > 1:
                context = decode_state.expand(context, options.beams, context.cache.capacity)
                found = to_host(
                    text_decoding.beam_search(
                        self.model_config, self.params, context, options.beams, room, metadata
                    )
                )
            else:
                numbers = numbers + [numbers[-1]] * (len(context.lengths) - len(numbers))
                keys = jax.vmap(jax.random.fold_in, (None, 0))(
                    jax.random.key(options.seed), jnp.array(numbers)
                )
                found = self._write(
                    text_decoding.start(
                        self.model_config, self.params, context, keys, room, metadata
                    ),
                    metadata,
                    options,
                )
            return [
                text_decoding.until_end(row[:limit])
                for row, limit in zip(found, metadata.max_new_tokens, strict=True)
            ]

        return self._batched(prompts, prefix, 1, generate, progress)

    def generate_images(
        self, prompts: Sequence[Parts | Prompt], *, prefix: Prefix | None = None, progress: str = ""
    ) -> Float[np.ndarray, "M N D"]:
        """The visual tokens of the image that follows each prompt (and `[IMG]`, which is
        appended).
        """
        N = self.processor.n_visual
        start = Prompt([self.tokenizer.img])

        def generate(some: list[Prompt], _: list[int]) -> list[np.ndarray]:
            state = image_decoding.start(self.model_config, self._read(some, prefix, N))
            return list(
                to_host(
                    image_decoding.regress(
                        self.model_config, self.params, state, np.int32(N)
                    ).visual
                ).astype(np.float32)
            )

        opened = [
            processor.concatenate(
                self.prompt(parts) if prefix is None else self._after(parts), start
            )
            for parts in prompts
        ]
        return np.stack(self._batched(opened, prefix, N + 1, generate, progress))

    def encode_images(
        self, images: Iterable[np.ndarray], progress: str = ""
    ) -> Float[np.ndarray, "M N D"]:
        """The visual tokens of images, as the LLM gets them."""
        pixels = [self.processor.interleave([given]).images[0] for given in images]
        with self._mesh():
            return self._encoded(pixels, progress)

    def losses(
        self, parts: Parts | Prompt | Prefix, candidates: Sequence[str], *, end: bool = True
    ) -> Float[np.ndarray, "C"]:
        """The mean cross-entropy of each candidate's tokens as the answer: the least is the
        likeliest. end: its `</s>` counts too.
        """
        answers = [
            self.tokenizer.encode(candidate) + [text_decoding.EOS] * end for candidate in candidates
        ]
        if not answers or not all(answers):
            raise UserError("there are no candidates to rank, or one is empty")
        prefix = (
            parts
            if isinstance(parts, Prefix)
            else self.prefill(self._fitting(self.prompt(parts), 0, max(map(len, answers))))
        )

        def nlls(some: list[Prompt], _: list[int]) -> list[float]:
            tokens, lengths = _rows([answer.tokens for answer in some], self._rows(len(some)))
            slots = prefix.state.cache.capacity + tokens.shape[1]
            context = decode_state.expand(
                prefix.state, len(tokens) // len(prefix.state.lengths), slots
            )
            return (
                to_host(text_decoding.nll(self.model_config, self.params, context, tokens, lengths))
                / lengths
            ).tolist()

        return np.array(
            self._batched([Prompt(answer) for answer in answers], prefix, 0, nlls, ""), np.float32
        )

    # --- one, as it comes ---

    def stream(
        self,
        parts: Parts,
        options: GenerationConfig | None = None,
        *,
        chat: bool = False,
        system: str | None = None,
        images: int | None = None,
    ) -> Iterator[str | GeneratedImage]:
        """The answer to one prompt, piece by piece. images: so many may be drawn where the model
        says `[IMG]`; None: `max_images` of the session.
        """
        return Conversation(self, chat=chat, system=system).reply(parts, options, images=images)

    def decode_images(self, visual: Float[np.ndarray, "M N D"]) -> list[GeneratedImage]:
        """With their pixels, where there is a decoder."""
        pixels = [None] * len(visual) if self.image_decoder is None else self.image_decoder(visual)
        return [GeneratedImage(*pair) for pair in zip(visual, pixels, strict=True)]

    # --- within ---

    def _mesh(self):
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _rows(self, count: int) -> int:
        return _bucket(count, self.shards)

    def _allowed(self) -> Bool[np.ndarray, "V"]:
        """What an answer is made of: the vocabulary, not the added tokens."""
        return np.arange(self.vocab) < self.model_config.llama.vocab

    def _after(self, parts: Parts | Prompt) -> Prompt:
        """What follows a prefix: no `<s>`."""
        if isinstance(parts, Prompt):
            return parts
        whole = self.prompt(parts)
        return Prompt(whole.tokens[1:], whole.images, [slot - 1 for slot in whole.slots])

    def _fitting(self, given: Prompt, before: int, room: int) -> Prompt:
        """The prompt, cut if that is wanted, so that it leaves `room` in the context. Raises
        UserError for one that is too long.
        """
        if before + len(given) + room <= self.context:
            return given
        if self.truncate == "left" and before == 0 and room + 1 < self.context:
            return processor.truncate_left(given, self.context - room, self.processor.n_visual)
        raise UserError(
            f"the prompt has {before + len(given)} elements and its answer {room} or more, and the context holds {self.context}; "
            "shorten it, or cut its beginning with --truncate=left"
        )

    def _batched(
        self,
        prompts: Sequence[Parts | Prompt],
        prefix: Prefix | None,
        room: int,
        generate: Callable,
        progress: str,
    ) -> list:
        """generate(prompts, numbers) of prompts of about one length at a time; results in the order
        of the prompts.
        """
        before = len(prefix.prompt) if prefix else 0
        found = [
            self._fitting(self._after(parts) if prefix else self.prompt(parts), before, room)
            for parts in prompts
        ]
        order = sorted(range(len(found)), key=lambda number: len(found[number]))
        results: list = [None] * len(found)
        with self._mesh():
            for start in tqdm(
                range(0, len(order), self.batch),
                progress,
                unit=" batches",
                disable=None if progress else True,
            ):
                some = order[start : start + self.batch]
                # rows that fill up come last
                for number, result in zip(
                    some, generate([found[number] for number in some], some), strict=False
                ):
                    results[number] = result
        return results

    def _read(self, prompts: Sequence[Prompt], prefix: Prefix | None, room: int) -> DecodeState:
        """The context after `prefix` and each prompt, with exactly `room` slots free; rows are
        filled up with copies of the last.
        """
        rows = self._rows(len(prompts))
        prompts = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
        x, lengths = self._embedded(prompts)
        if prefix is None:
            context = decode_state.init(self.model_config, self.params, rows, x.shape[1] + room)
        else:
            old = prefix.state
            context = decode_state.expand(
                old, rows // len(old.lengths), old.cache.capacity + x.shape[1] + room
            )
        return decode_state.prefill(self.model_config, self.params, context, x, lengths)

    def _embedded(self, prompts: Sequence[Prompt]) -> tuple[Float[Array, "B T D"], np.ndarray]:
        """The LLM's input for prompts, and their lengths."""
        tokens, lengths = _rows([given.tokens for given in prompts], len(prompts))
        # one that many prompts share is encoded once
        every = {id(pixels): pixels for given in prompts for pixels in given.images}
        place = {key: number for number, key in enumerate(every)}
        most = _bucket(max(len(given.images) for given in prompts), 1)
        images = np.zeros((len(prompts), most), np.int32)
        slots = np.full((len(prompts), most), tokens.shape[1])
        for row, given in enumerate(prompts):
            images[row, : len(given.images)] = [place[id(pixels)] for pixels in given.images]
            slots[row, : len(given.images)] = given.slots
        return decode_state.embed(
            self.model_config,
            self.params,
            tokens,
            self._visual(list(every.values())),
            images,
            slots,
        ), lengths

    def _visual(self, images: list[np.ndarray]) -> Float[np.ndarray, "M N D"]:
        """Visual tokens of images, some of which are visual tokens already; padded to a power of
        two.
        """
        pixels = [given.dtype == np.uint8 for given in images]
        encoded = iter(
            self._encoded([given for given, is_pixels in zip(images, pixels) if is_pixels], "")
        )
        bank = np.zeros(
            (_bucket(len(images), 1), self.processor.n_visual, self.model_config.llama.width),
            np.float32,
        )
        for row, given, is_pixels in zip(bank, images, pixels, strict=False):
            row[:] = next(encoded) if is_pixels else given
        return bank.astype(self.model_config.compute)

    def _encoded(self, pixels: list[np.ndarray], progress: str) -> Float[np.ndarray, "M N D"]:
        found = [np.zeros((0, self.processor.n_visual, self.model_config.llama.width), np.float32)]
        for start in tqdm(
            range(0, len(pixels), self.batch),
            progress,
            unit=" batches",
            disable=None if progress else True,
        ):
            some = pixels[start : start + self.batch]
            stacked = np.stack(some + [some[-1]] * (self._rows(len(some)) - len(some)))
            found.append(
                to_host(decode_state.encode_images(self.model_config, self.params, stacked))[
                    : len(some)
                ].astype(np.float32)
            )
        return np.concatenate(found)

    def _rules(
        self,
        prompts: Sequence[Prompt],
        prefix: Prefix | None,
        options: GenerationConfig,
        allowed: Bool[np.ndarray, "V"],
        choice: trie.Trie | None,
        rows: int,
        ends: Sequence[int] = (text_decoding.EOS,),
    ) -> SamplingMetadata:
        before = prefix.prompt.tokens if prefix else []
        said, lengths = _rows([before + given.tokens for given in prompts], rows, fill=self.vocab)
        numbers = {
            name: np.float32(getattr(options, name))
            for name in ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty")
        }
        return SamplingMetadata(
            **numbers,
            top_k=np.int32(options.top_k),
            min_new_tokens=np.int32(options.min_new_tokens),
            max_new_tokens=np.minimum(options.max_new_tokens, self.context - lengths).astype(
                np.int32
            ),
            allowed=allowed,
            stop_ids=np.isin(np.arange(self.vocab), ends),
            prompt_ids=said,
            trie=choice,
        )

    def _write(
        self,
        state: text_decoding.TextDecodeState,
        metadata: SamplingMetadata,
        options: GenerationConfig,
    ) -> np.ndarray:
        """The ids of a state that is written to its end; with stop texts, a row ends soon after the
        first of them.
        """
        if not options.stop:
            return to_host(
                text_decoding.decode(
                    self.model_config,
                    self.params,
                    state,
                    np.int32(options.max_new_tokens),
                    metadata,
                ).ids
            )
        count = 1
        while count < options.max_new_tokens and not to_host(state.done).all():
            count = min(count + STOP_CHECK_EVERY, options.max_new_tokens)
            state = text_decoding.decode(
                self.model_config, self.params, state, np.int32(count), metadata
            )
            ids = to_host(state.ids)
            stopped = [
                any(stop in self.tokenizer.decode(row[:count].tolist()) for stop in options.stop)
                for row in ids
            ]
            state = state.replace(done=state.done | np.array(stopped))
        return to_host(state.ids)


class Conversation:
    """Turns of a chat, or one prompt and its answer: what was read stays read. An answer may hold
    text, images, and text again.
    """

    def __init__(self, session: Session, *, chat: bool, system: str | None = None):
        """system: None for the release's message, "" for none."""
        self._session = session
        self._chat = chat
        self._system = system
        self._state: DecodeState | None = None
        # all that was read, and the last id of an answer, which was not
        self._said = Prompt()
        self._unread = Prompt()

    def reply(
        self, parts: Parts, options: GenerationConfig | None = None, *, images: int | None = None
    ) -> Iterator[str | GeneratedImage]:
        """The answer, piece by piece. images: so many may be drawn where the model says `[IMG]`;
        None: the session's `max_images`.

        Raises UserError, before anything else, for a turn that cannot be read or does not fit the
        context.
        """
        options = options or GenerationConfig()
        if options.beams > 1:
            raise UserError("beams know the answer only when it is complete: it cannot be streamed")
        return self._answer(
            self._turn(parts, [], 1),
            options,
            self._session.max_images if images is None else images,
        )

    def generate_image(self, parts: Parts, *, progress: bool = False) -> GeneratedImage:
        """The image that follows the parts (and `[IMG]`)."""
        s = self._session
        given = self._turn(parts, [s.tokenizer.img], s.processor.n_visual + 1)
        with s._mesh():
            self._read(given, s.processor.n_visual + 1)
            drawing = self._drawn(progress)
        self._unread = Prompt([s.tokenizer.end_img])
        return drawing

    def _turn(self, parts: Parts, end: list[int], room: int) -> Prompt:
        """What is to be read: the turn, and before it the `</s>` of the answer before, if that
        lacks it.
        """
        s = self._session
        first = self._state is None
        given = (
            s.processor.chat_turn(parts, system=self._system, first=first)
            if self._chat
            else s.processor.interleave(parts)
            if first
            else s._after(parts)
        )
        lacks_end = self._chat and not first and self._unread.tokens[-1:] != [text_decoding.EOS]
        given = processor.concatenate(Prompt([text_decoding.EOS] * lacks_end), given, Prompt(end))
        return s._fitting(given, len(self._said) + len(self._unread), room)

    def _answer(
        self, given: Prompt, options: GenerationConfig, images: int
    ) -> Iterator[str | GeneratedImage]:
        s = self._session
        t = self._session.tokenizer
        N = self._session.processor.n_visual
        written = turn = 0
        while True:
            room = s.context - len(self._said) - len(self._unread) - len(given)
            left = min(options.max_new_tokens - written, room)
            # the end of an image is all that fits
            if left < 1:
                self._unread = given
                break
            with s._mesh():
                self._read(given, left)
            allowed = s._allowed() | (np.arange(s.vocab) == t.img) & (images > 0) & (room > N + 2)
            least = min(max(options.min_new_tokens - written, 0), left)
            written += yield from self._text(
                replace(
                    options, max_new_tokens=left, min_new_tokens=least, seed=options.seed + turn
                ),
                allowed,
            )
            if self._unread.tokens != [t.img]:
                break
            with s._mesh():
                self._read(Prompt(), N + 1)
                drawing = self._drawn(False)
            yield drawing
            given = Prompt([t.end_img])
            images = images - 1
            turn = turn + 1

    def _text(self, options: GenerationConfig, allowed: Bool[np.ndarray, "V"]) -> Iterator[str]:
        """Text up to `</s>`, `[IMG]`, a stop text or the limit, the last of which is not read yet;
        returns the number of ids.
        """
        s = self._session
        t = self._session.tokenizer
        rows = len(self._state.lengths)
        out = TextStream(t.decode, options.stop)
        metadata = s._rules(
            [self._said] * rows, None, options, allowed, None, rows, ends=(text_decoding.EOS, t.img)
        )
        keys = jnp.stack([jax.random.fold_in(jax.random.key(options.seed), 0)] * rows)
        with s._mesh():
            state = text_decoding.start(
                s.model_config,
                s.params,
                self._state,
                keys,
                _bucket(options.max_new_tokens, MIN_LENGTH),
                metadata,
            )
        ids: list[int] = []
        try:
            while True:
                ids.append(int(to_host(state.ids)[0, len(ids)]))
                if new := out.push(ids[-1]):
                    yield new
                if to_host(state.done)[0] or out.stopped:
                    break
                with s._mesh():
                    state = text_decoding.decode(
                        s.model_config, s.params, state, np.int32(len(ids) + 1), metadata
                    )
            if new := out.finish():
                yield new
        # also where nobody wants to hear more
        finally:
            self._state = state.llm
            self._said = processor.concatenate(self._said, Prompt(ids[:-1]))
            self._unread = Prompt(ids[-1:])
        return len(ids)

    def _drawn(self, progress: bool) -> GeneratedImage:
        s = self._session
        state = image_decoding.start(s.model_config, self._state)
        N = s.processor.n_visual
        for count in (
            tqdm(range(1, N + 1), "drawing", unit=" visual tokens", disable=None)
            if progress
            else [N]
        ):
            state = image_decoding.regress(s.model_config, s.params, state, np.int32(count))
            state.visual.block_until_ready()
        self._state = state.llm
        self._said = processor.concatenate(self._said, Prompt([s.tokenizer.image] * N))
        return s.decode_images(to_host(state.visual)[:1].astype(np.float32))[0]

    def _read(self, given: Prompt, room: int) -> None:
        """Reads what is unread and `given`, and makes `room` for what comes."""
        s = self._session
        given = processor.concatenate(self._unread, given)
        if self._state is None:
            self._state = s._read([given], None, _bucket(room, MIN_LENGTH))
        else:
            rows = len(self._state.lengths)
            x, lengths = s._embedded([given] * rows)
            slots = _bucket(int(self._state.cache.length) + x.shape[1] + room, MIN_LENGTH)
            self._state = decode_state.expand(
                self._state, 1, max(slots, self._state.cache.capacity)
            )
            self._state = decode_state.prefill(s.model_config, s.params, self._state, x, lengths)
        self._said = processor.concatenate(self._said, given)
        self._unread = Prompt()


def abstract_params(model_config: emu.EmuConfig, mesh: jax.sharding.Mesh | None) -> tree.Tree:
    """Shapes of the parameters as a session holds them: laid out by the table of training, matrices
    in the dtype of the arithmetic.
    """
    shapes = module.abstract(emu.Emu, model_config)
    if mesh:
        sharding.check_divides(mesh, shapes)
    places = dict(tree.leaves(sharding.shardings(mesh, sharding.specs(shapes)))) if mesh else {}

    def dtype(path, leaf):
        return model_config.compute if sharding.is_matrix(path) else leaf.dtype

    return tree.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype(path, leaf), sharding=places.get(path))
            for path, leaf in tree.leaves(shapes)
        }
    )


def mesh_of(directory: str, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh | None:
    """All devices for a session of the checkpoint in `directory`: as many side by side in a layer
    as divide its parameters, the others by rows. None for one device, and where nothing divides
    them.
    """
    count = len(jax.devices() if devices is None else devices)
    shapes = checkpoint.param_shapes(directory)
    table = dict(tree.leaves(sharding.specs(tree.unflatten(shapes))))
    for tensor in (n for n in range(count, 0, -1) if count % n == 0 and count > 1):
        sizes = dict(data=1, fsdp=count // tensor, tensor=tensor)
        if all(
            length % sizes.get(axis, 1) == 0
            for path, shape in shapes.items()
            for length, axis in zip(shape, table[path])
        ):
            return sharding.make_mesh(sizes, devices)
    return None


def _bucket(n: int, least: int) -> int:
    """`least` times a power of two, n or more."""
    while least < n:
        least *= 2
    return least


def _rows(ids: Sequence[Sequence[int]], rows: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids of different lengths as rows [rows, T], their lengths); T is a power of two, and the
    last row is repeated.
    """
    ids = [*ids, *[ids[-1]] * (rows - len(ids))]
    lengths = np.array([len(row) for row in ids], np.int32)
    out = np.full((rows, _bucket(int(lengths.max()), MIN_LENGTH)), fill, np.int32)
    for row, some in zip(out, ids, strict=True):
        row[: len(some)] = some
    return out, lengths
