"""The letters of dimensions, and the data types that modules exchange.

B rows of a batch      T tokens of a row       I images of a row     N visual tokens of an image
P patches of an image  D width of the LLM      E width of the encoder  C width of the resampler
H heads                d width of a head       F width of an ffn     V vocabulary      L depth
K regressed positions of a row                 h w c pixels          S length of the keys

Read next: tree.py, then models/emu.py.
"""

import flax.struct
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

# Every metric is (sum, weight) until the host divides, so that no mean of means is ever taken.
Metrics = dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]


@flax.struct.dataclass
class Batch:
    """Packed rows of interleaved documents, which every language-model stage reads.

    Shapes are static. Data code fills NumPy arrays; the loop puts them on devices. Row b holds
    documents 1, 2, ... one after another. The N visual tokens of its i-th image start at index
    `image_slots[b, i]`, just after an `[IMG]`; the value is T if the row has no i-th image.
    """

    # Ids; [PAD] after the last document of a row.
    tokens: Int[Array, "B T"]
    # 1, 2, ... for the packed documents of a row; 0 for padding.
    segments: Int[Array, "B T"]
    # Positions restart at 0 in every document.
    positions: Int[Array, "B T"]
    # Weight of tokens[b, t] as a label (predicted from t - 1); 0 at a document's first token.
    text_weights: Float[Array, "B T"]
    # RGB, 0 to 255.
    images: UInt8[Array, "B I h w 3"]
    # Index of the first visual token of each image; T for no image.
    image_slots: Int[Array, "B I"]
    # 1 if the image is regressed, else 0.
    image_weights: Float[Array, "B I"]
    # Index of the document's source in the mixture, for losses per source.
    sources: Int[Array, "B T"]

    @property
    def has_image(self) -> Bool[Array | np.ndarray, "B I"]:
        """Whether a row has an i-th image."""
        return self.image_slots < self.tokens.shape[1]


@flax.struct.dataclass
class DecoderBatch(Batch):
    """A batch with arrays precomputed once per image (data/precomputed.py).

    If a field is None, its arrays are computed in every step.
    """

    # Visual tokens that the LLM generated.
    conditions: Float[Array, "B I N D"] | None = None
    # Means of the autoencoder's latents, then their log variances: m = 2 c.
    latents: Float[Array, "B I y x m"] | None = None


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers for what an LLM has read, with free slots for more.

    The first `length` of the S slots are in use in every row. `segments` is 0 in slots that hold
    nothing: the padding of a shorter prompt, or a free slot. G: heads of keys and values.
    """

    k: Float[Array, "L B S G d"]
    v: Float[Array, "L B S G d"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]
    # Whether nothing has been read yet. Then the first elements attend only to one another, and any
    # attention kernel can be used.
    empty: bool = flax.struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        return self.k.shape[2]
