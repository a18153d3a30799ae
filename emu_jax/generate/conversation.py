"""A conversation: turns of a chat, or one prompt and its answer, streamed.

Everything read stays in the KV cache, so a turn costs only its own length. An answer may contain
text, images, and text again. Read next: stream.py, text_decoding.py.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from tqdm import tqdm

from emu_jax.batching import power_of_two
from emu_jax.config import UserError
from emu_jax.data.tokenizer import EOS
from emu_jax.generate import decode_state, image_decoding, text_decoding
from emu_jax.generate.decode_state import DecodeState
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.image_decoding import GeneratedImage
from emu_jax.generate.processor import Parts, Prompt, concatenate
from emu_jax.generate.session import MIN_LENGTH, Session
from emu_jax.generate.stream import TextStream
from emu_jax.processes import to_host


class Conversation:
    """Turns that build on one another.

        conversation = Conversation(session, chat=True)
        for question in (["What is this?", Path("photo.jpg")], ["And what colour is it?"]):
            print("".join(conversation.reply(question, images=0)))

    Each turn must be read to its end, or abandoned, before the next one begins.
    """

    def __init__(self, session: Session, *, chat: bool, system: str | None = None):
        """chat: use the chat format; without, turns are simply joined.

        system: None for the system message that the model was tuned with, "" for none.
        """
        self._session = session
        self._chat = chat
        self._system = system
        # None before the first turn.
        self._state: DecodeState | None = None
        # Everything that the LLM has read.
        self._history = Prompt()
        # What the LLM reads next, such as the last id of an answer.
        self._pending = Prompt()

    def reply(
        self, parts: Parts, config: GenerationConfig | None = None, *, images: int | None = None
    ) -> Iterator[str | GeneratedImage]:
        """Yield the answer to a turn piece by piece: texts, and images where `[IMG]` comes.

        images: the most images in the answer; None for the session's `max_images`. Raises
        UserError, before anything is generated, for a turn that cannot be read or does not fit the
        context, and for beam search.
        """
        config = config or GenerationConfig()
        if config.beams > 1:
            raise UserError(
                f"beams={config.beams}: beam search knows its answer only at the end, so it "
                "cannot be streamed"
            )
        most = self._session.max_images if images is None else images
        return self._answer(self._turn(parts, [], 1), config, most)

    def generate_image(self, parts: Parts, *, progress: bool = False) -> GeneratedImage:
        """Generate the image that follows the parts; `[IMG]` is appended to them.

        progress: show a progress bar on a terminal.
        """
        session = self._session
        room = session.processor.n_visual + 1
        turn = self._turn(parts, [session.tokenizer.img], room)
        with session.mesh_context():
            image = self._regress(self._read(turn, room), progress)
        self._pending = Prompt([session.tokenizer.end_img])
        return image

    def _turn(self, parts: Parts, end: list[int], room: int) -> Prompt:
        """The prompt to read for a turn, with the ids `end` appended.

        If the previous answer was cut off before its `</s>`, the prompt begins with `</s>`.
        """
        session = self._session
        first = self._state is None
        if self._chat:
            turn = session.processor.chat_turn(parts, system=self._system, first=first)
        else:
            turn = session.prompt(parts) if first else session.continuation(parts)
        was_cut = self._chat and not first and self._pending.tokens[-1:] != [EOS]
        turn = concatenate(Prompt([EOS] * was_cut), turn, Prompt(end))
        return session.fit_prompt(turn, len(self._history) + len(self._pending), room)

    def _answer(
        self, turn: Prompt, config: GenerationConfig, images: int
    ) -> Iterator[str | GeneratedImage]:
        """Alternate text and up to `images` images until the answer ends."""
        session = self._session
        tokenizer = session.tokenizer
        N = session.processor.n_visual
        vocab = np.arange(session.vocab)
        written = 0
        drawn = 0
        while True:
            room = session.context - len(self._history) - len(self._pending) - len(turn)
            left = min(config.max_new_tokens - written, room)
            # The context has no room for an id after the `[/IMG]` of the last image.
            if left < 1:
                self._pending = turn
                break
            with session.mesh_context():
                state = self._read(turn, left)
            may_draw = drawn < images and room > N + 2
            allowed = session.text_ids() | ((vocab == tokenizer.img) & may_draw)
            step_config = replace(
                config,
                max_new_tokens=left,
                min_new_tokens=min(max(config.min_new_tokens - written, 0), left),
                seed=config.seed + drawn,
            )
            written += yield from self._text(state, step_config, allowed)
            if self._pending.tokens != [tokenizer.img]:
                break
            with session.mesh_context():
                image = self._regress(self._read(Prompt(), N + 1), False)
            yield image
            turn = Prompt([tokenizer.end_img])
            drawn += 1

    def _text(
        self, state: DecodeState, config: GenerationConfig, allowed: Bool[np.ndarray, "V"]
    ) -> Generator[str, None, int]:
        """Yield text up to `</s>`, `[IMG]`, a stop string or the limit; return the number of ids.

        The LLM has not read the last id when this returns; it is in `_pending`.
        """
        session = self._session
        tokenizer = session.tokenizer
        rows = len(state.lengths)
        metadata = session.sampling_metadata(
            [self._history] * rows,
            config,
            rows=rows,
            allowed=allowed,
            stop_ids=(EOS, tokenizer.img),
        )
        # All rows are copies of one, so they share a key.
        keys = jnp.stack([jax.random.fold_in(jax.random.key(config.seed), 0)] * rows)
        room = power_of_two(config.max_new_tokens, MIN_LENGTH)
        with session.mesh_context():
            answer = text_decoding.start(
                session.model_config, session.params, state, keys, room, metadata
            )
        stream = TextStream(tokenizer.decode, config.stop)
        ids: list[int] = []
        try:
            while True:
                ids.append(int(to_host(answer.ids)[0, len(ids)]))
                if new := stream.push(ids[-1]):
                    yield new
                if to_host(answer.done)[0] or stream.stopped:
                    break
                until = np.int32(len(ids) + 1)
                with session.mesh_context():
                    answer = text_decoding.decode(
                        session.model_config, session.params, answer, until, metadata
                    )
            if new := stream.finish():
                yield new
        # This also runs if the caller stops iterating.
        finally:
            self._state = answer.llm
            self._history = concatenate(self._history, Prompt(ids[:-1]))
            self._pending = Prompt(ids[-1:])
        return len(ids)

    def _regress(self, state: DecodeState, progress: bool) -> GeneratedImage:
        """Generate the image that begins where `state` ends."""
        session = self._session
        N = session.processor.n_visual
        image = image_decoding.start(session.model_config, state)
        # With a progress bar, one visual token is generated at a time.
        counts = [N]
        if progress:
            counts = tqdm(range(1, N + 1), "drawing", unit=" visual tokens", disable=None)
        for count in counts:
            image = image_decoding.regress(
                session.model_config, session.params, image, np.int32(count)
            )
            image.visual.block_until_ready()
        self._state = image.llm
        self._history = concatenate(self._history, Prompt([session.tokenizer.image] * N))
        visual = to_host(image.visual)[:1].astype(np.float32)
        return session.decode_images(visual)[0]

    def _read(self, prompt: Prompt, room: int) -> DecodeState:
        """Read what is pending and `prompt`, and make `room` for what comes next."""
        session = self._session
        prompt = concatenate(self._pending, prompt)
        if self._state is None:
            state = session.prefill_batch([prompt], room=power_of_two(room, MIN_LENGTH))
        else:
            x, lengths = session.embed([prompt] * len(self._state.lengths))
            cache = self._state.cache
            needed = power_of_two(int(cache.length) + x.shape[1] + room, MIN_LENGTH)
            state = decode_state.expand(self._state, 1, max(needed, cache.capacity))
            state = decode_state.prefill(session.model_config, session.params, state, x, lengths)
        self._state = state
        self._history = concatenate(self._history, prompt)
        self._pending = Prompt()
        return state
