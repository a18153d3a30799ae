"""The alphabet of dimensions, and the values that travel between the parts.

B rows of a batch      T tokens of a row       I images of a row     N visual tokens of an image
P patches of an image  D width of the LLM      E width of the encoder  C width of the resampler
H heads                d width of a head       F width of an ffn     V vocabulary      L depth
K regressed positions of a row                 h w c pixels          S length of the keys

Read next: tree.py, then models/emu.py.
"""

import flax.struct
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

# A loss or a metric is (sum, weight) until the host divides: never a mean of means.
Metrics = dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]


@flax.struct.dataclass
class Batch:
    """Packed rows of interleaved documents, which every language-model stage reads.

    Shapes are static. Data code fills NumPy arrays; the loop puts them on devices. Row b holds
    documents 1, 2, ... one after another. `image_slots[b, i]` is the index in the row of the first
    of the N slots of its i-th image, just after its `[IMG]`; it is T if the row has fewer images.
    """

    # ids; [PAD] where a row ends
    tokens: Int[Array, "B T"]
    # 1, 2, ... per packed document; 0 is padding
    segments: Int[Array, "B T"]
    # restart at 0 in every document
    positions: Int[Array, "B T"]
    # weight of tokens[b, t] as a label (predicted from t - 1); 0 at a document's first token
    text_weights: Float[Array, "B T"]
    # RGB, 0 to 255
    images: UInt8[Array, "B I h w 3"]
    # T for no image
    image_slots: Int[Array, "B I"]
    # 1 where the image is regressed
    image_weights: Float[Array, "B I"]
    # index of the document's source in the mixture, for losses per source
    sources: Int[Array, "B T"]

    @property
    def has_image(self) -> Bool[Array | np.ndarray, "B I"]:
        """Whether a row has an i-th image."""
        return self.image_slots < self.tokens.shape[1]


@flax.struct.dataclass
class DecoderBatch(Batch):
    """A batch with arrays precomputed once per image (data/precomputed.py).

    None: each step computes them itself.
    """

    # what the LLM regressed
    conditions: Float[Array, "B I N D"] | None = None
    # means of the autoencoder's latents, and their log variances: m = 2 c
    latents: Float[Array, "B I y x m"] | None = None


@flax.struct.dataclass
class KVCache:
    """Keys and values, of every layer, of what an LLM has read, with free slots for more.

    The first `length` of the S slots are in use, in every row; `segments` is 0 where a slot of a
    row holds nothing: the padding of a shorter prompt, or a free slot. G: heads of keys and values.
    """

    k: Float[Array, "L B S G d"]
    v: Float[Array, "L B S G d"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]
    # nothing was read yet: the first elements attend to themselves alone, with any kernel
    empty: bool = flax.struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        return self.k.shape[2]
