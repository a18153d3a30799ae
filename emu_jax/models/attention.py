"""Attention: one function and one mask language for every tower; the accelerators' kernels stand
behind it.

`attention` softmaxes scale * q k (+ bias) over the keys that a `Mask` allows. "dense" is the
reference, to which every other kernel is held on packed rows, forward and backward
(tests/models/test_attention.py). Read next: layers.py, then llama.py.
"""

from functools import partial
from math import prod
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from emu_jax import sharding
from emu_jax.config import UserError

# rows are padded to a multiple of it for splash and pallas
BLOCK = 128
# channels of a head for which the kernels of every GPU have room
WIDEST = 128
GPU = ("gpu", "cuda", "rocm")
# as "auto" prefers them; on a CPU: interpreted
PLATFORMS = {"splash": ("tpu", "cpu"), "cudnn": GPU, "pallas": (*GPU, "cpu")}


@flax.struct.dataclass
# JAX rebuilds it with what are no arrays
@no_type_check
class Mask:
    """Who may look at whom: the same segment and, when causal, not a later position.

    `kv_*` describe the keys where these are not the queries themselves. None restricts nothing;
    without positions, causal goes by the place in the row, which in packed rows is the same thing.
    Queries down, keys across:

      self_mask()                          1 . .     a document alone
                                           1 1 .
                                           1 1 1

      self_mask(causal=False), or None     1 1 1     an image's patches
                                           1 1 1
                                           1 1 1

      self_mask([[1, 1, 2, 2, 0]])         1 . . . .   two documents packed in a row, and padding,
                                           1 1 . . .   which looks at itself: no query is without a
                                           key . . 1 . . . . 1 1 . . . . . 1

      Mask([[1, 1]], [[1, 1, 1, 0]],       1 1 . .   tokens 1 and 2 of a document against a cache
      with room for 4
           [[1, 2]], [[0, 1, 2, 0]],       1 1 1 .
           causal=True)
    """

    q_segments: Int[Array, "B T"] | None = None
    kv_segments: Int[Array, "B S"] | None = None
    q_positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)


def self_mask(segments: Int[Array, "B T"] | None = None, *, causal: bool = True) -> Mask:
    """The mask of rows that look at themselves, each packed document only at itself."""
    return Mask(q_segments=segments, causal=causal)


def allowed(mask: Mask | None, T: int, S: int) -> Bool[Array, "B T S"]:
    """The mask written out: may query t look at key s? B is 1 where the mask says nothing of
    rows.
    """
    ok = jnp.ones((1, T, S), bool)
    if mask is None:
        return ok
    if mask.q_segments is not None:
        kv = mask.q_segments if mask.kv_segments is None else mask.kv_segments
        ok &= mask.q_segments[:, :, None] == kv[:, None, :]
    if mask.causal:
        q = jnp.arange(T)[None] if mask.q_positions is None else mask.q_positions
        kv = jnp.arange(S)[None] if mask.kv_positions is None else mask.kv_positions
        ok &= kv[:, None, :] <= q[:, :, None]
    return ok


def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S G d"],
    v: Float[Array, "B S G d"],
    mask: Mask | None = None,
    *,
    scale: float,
    bias: Float[Array, "H T S"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    kernel: str = "auto",
) -> Float[Array, "B T H d"]:
    """softmax(scale * q k + bias) v over the keys that `mask` allows; softmax in float32, zero
    where a query has no key.

    G divides H: each key head serves H / G query heads (grouped-query attention). Dropout is on the
    probabilities, where there is a key for it. Kernels: "dense" does everything; "splash" (TPU),
    "pallas" and "cudnn" (GPU) never hold T x S; "auto" takes the one for the platform that can do
    what is asked, else dense. Raises UserError for one that cannot.
    """
    mask = Mask() if mask is None else mask
    dropout = dropout if key is not None else 0.0
    platform = platform_in_use()
    obstacle = partial(_obstacle, platform, q, k, mask, bias, dropout)
    if kernel == "auto":
        kernel = next(
            (name for name in PLATFORMS if not obstacle(name) and _pays(platform, q, k)), "dense"
        )
    elif obstacle(kernel):
        raise UserError(f"attention kernel {kernel!r} {obstacle(kernel)}; use 'dense' or 'auto'")

    if kernel == "dense":
        return _dense(q, k, v, mask, scale, bias, dropout, key)
    if kernel == "cudnn":
        return _cudnn(q, k, v, scale, mask.causal)
    run = partial(
        _splash if kernel == "splash" else _pallas,
        scale=scale,
        causal=mask.causal,
        interpret=platform == "cpu",
    )
    return _sharded(run, q, k, v, mask)


def platform_in_use() -> str:
    """The platform that is traced for: that of the mesh in use, which may be of devices that are
    not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _obstacle(platform, q, k, mask, bias, dropout, kernel) -> str:
    """Why `kernel` cannot do this; "" if it can."""
    T = q.shape[1]
    S = k.shape[1]
    if kernel == "dense":
        return ""
    if kernel not in PLATFORMS:
        return f"is not there: there are dense, {', '.join(PLATFORMS)}"
    if platform not in PLATFORMS[kernel]:
        return f"runs on {PLATFORMS[kernel][0]}, not on {platform}"
    if bias is not None or dropout:
        return "has neither bias nor dropout"
    if any(x is not None for x in (mask.kv_segments, mask.q_positions, mask.kv_positions)) or (
        mask.causal and T != S
    ):
        return "knows only the masks of rows that look at themselves (self_mask)"
    if kernel in ("cudnn", "pallas") and q.shape[-1] > WIDEST:
        return f"takes heads of at most {WIDEST} channels, and was given {q.shape[-1]}"
    if kernel == "cudnn" and q.shape[-1] % 8:
        return f"takes heads whose channels 8 divides, and was given {q.shape[-1]}"
    if kernel == "pallas" and T != S:
        return f"needs as many queries as keys, and was given {T} and {S}"
    if kernel == "cudnn" and mask.q_segments is not None:
        return "takes no segments: it would be wrong on packed rows without a word"
    if kernel == "cudnn" and q.dtype.itemsize != 2:
        return f"computes in 16 bits, not in {q.dtype}"
    return ""


def _pays(platform, q, k) -> bool:
    """Short rows would be mostly padding, float32 is asked for to be exact, and on a CPU kernels
    are only interpreted.
    """
    return platform != "cpu" and q.dtype.itemsize == 2 and min(q.shape[1], k.shape[1]) >= BLOCK


def _dense(q, k, v, mask, scale, bias, dropout, key):
    G = k.shape[2]
    einsum = partial(jnp.einsum, precision="highest" if q.dtype == jnp.float32 else None)
    q = rearrange(q, "B T (G r) d -> B T G r d", G=G)
    logits = scale * einsum("BTGrd,BSGd->BGrTS", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += rearrange(bias.astype(jnp.float32), "(G r) T S -> G r T S", G=G)
    ok = allowed(mask, q.shape[1], k.shape[1])[:, None, None]
    logits = jnp.where(ok, logits, jnp.finfo(jnp.float32).min)
    # zero, not uniform, for a query without keys
    probs = jnp.where(ok, jax.nn.softmax(logits, axis=-1), 0.0)
    if dropout:
        probs *= jax.random.bernoulli(key, 1 - dropout, probs.shape) / (1 - dropout)
    return rearrange(
        einsum("BGrTS,BSGd->BTGrd", probs.astype(v.dtype), v), "B T G r d -> B T (G r) d"
    )


def _cudnn(q, k, v, scale, causal):
    """cuDNN's flash attention. It has no gradient for rows of an odd length: those get one more
    place, which it is told to leave out.
    """
    (B, T) = q.shape[:2]
    S = k.shape[1]
    lengths = {}
    if T % 2 or S % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = {
            "query_seq_lengths": jnp.full(B, T, jnp.int32),
            "key_value_seq_lengths": jnp.full(B, S, jnp.int32),
        }
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn", **lengths
    )[:, :T]


def _splash(q, k, v, segments, *, scale, causal, interpret):
    """JAX's sparse flash attention for TPU: whole blocks that causality forbids are skipped."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H = q.shape[1:3]
    q_ids, kv_ids = _ids(q, k, segments, causal)
    ids = None if kv_ids is None else splash.SegmentIds(q_ids, kv_ids)
    q, k, v = (rearrange(_padded(x), "B T H d -> B H T d") for x in (q * scale, k, v))
    shape = q.shape[2], k.shape[2]
    bq, bk = map(_block, shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask(shape) if causal else masks.FullMask(shape)] * H),
        block_sizes=splash.BlockSizes(
            block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return rearrange(jax.vmap(kernel)(q, k, v, ids), "B H T d -> B T H d")[:, :T]


def _pallas(q, k, v, segments, *, scale, causal, interpret):
    """JAX's flash attention for GPU, which takes segments (cuDNN's does not)."""
    from jax.experimental.pallas.ops.gpu import attention as gpu

    T, H = q.shape[1:3]
    _, ids = _ids(q, k, segments, causal)
    k, v = (repeat(x, "B S G d -> B S (G r) d", r=H // k.shape[2]) for x in (k, v))
    # 128 x 128 of float32 do not fit an H100's shared memory
    b = BLOCK // 2 if q.dtype.itemsize > 2 else BLOCK
    blocks = gpu.BlockSizes(
        block_q=b, block_k=b, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32
    )
    return gpu.mha(
        *map(_padded, (q, k, v)),
        ids,
        sm_scale=scale,
        causal=causal,
        block_sizes=blocks,
        interpret=interpret,
    )[:, :T]


def _block(length: int) -> int:
    return max(block for block in (BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK) if length % block == 0)


def _padded(x, value=0):
    """[B, T, ...] with T padded to a multiple of BLOCK."""
    return jnp.pad(
        x, [(0, 0), (0, -x.shape[1] % BLOCK)] + [(0, 0)] * (x.ndim - 2), constant_values=value
    )


def _ids(q, k, segments, causal):
    """Segments of the padded queries and keys; (None, None) where they would say nothing.

    No query may be without a key, padding included, or 0/0 would come back through the gradient:
    padding looks at itself, but where only the keys tell padding apart, at the real keys.
    """
    if segments is not None:
        ids = _padded(segments, -1)
        return ids, ids
    # the padding's keys are later than every query, or there are none
    if causal or k.shape[1] % BLOCK == 0:
        return None, None
    zeros = partial(jnp.zeros, dtype=jnp.int32)
    return _padded(zeros(q.shape[:2])), _padded(zeros(k.shape[:2]), -1)


def _sharded(run, q, k, v, mask):
    """The kernel on each device's rows and heads: a Pallas call does not partition by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q, k, v, mask.q_segments)
    spec = _spec(mesh, q.shape[0], k.shape[2], mask.causal)
    return jax.shard_map(
        run, in_specs=(spec, spec, spec, P(spec[0])), out_specs=spec, check_vma=False
    )(q, k, v, mask.q_segments)


def _spec(mesh, B: int, G: int, causal: bool) -> P:
    """Where [B, T, H, d] lies: text as `sharding.constrain_rows` has it, heads over tensor; what is not
    causal is images, whose rows `sharding.constrain_images` lays over all axes. Rows or heads that do not
    divide stay whole.
    """
    heads = "tensor" if causal and G % mesh.shape["tensor"] == 0 else None
    rows = sharding.ROWS if heads else sharding.AXES
    fits = [
        axes for axes in (rows, sharding.ROWS) if B % prod(mesh.shape[axis] for axis in axes) == 0
    ]
    return P(fits[0] if fits else None, None, heads, None)
