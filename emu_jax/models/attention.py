"""Attention: one function and one mask for every tower, backed by accelerator kernels.

`attention` is softmax(scale * q k + bias) v over the keys that a `Mask` allows. The kernel "dense"
is the reference: tests/models/test_attention.py checks that every other kernel equals it on packed
rows, forward and backward. Read next: layers.py, then llama.py.
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

# The kernels splash and pallas pad rows to a multiple of this length.
BLOCK = 128
# The GPU kernels support heads up to this width; wider heads overflow some GPUs' shared memory.
WIDEST = 128
GPU = ("gpu", "cuda", "rocm")
# The platforms of each kernel, in the order in which "auto" tries the kernels. On CPU, a kernel is
# interpreted, which is slow and only for tests.
PLATFORMS = {"splash": ("tpu", "cpu"), "cudnn": GPU, "pallas": (*GPU, "cpu")}


@flax.struct.dataclass
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class Mask:
    """Which keys each query sees.

    A query sees the keys of its own segment, and a causal mask hides those at later positions.
    `kv_segments` is None if the keys have the segments of the queries. Without segments all keys
    are in one segment. Without positions, `causal` compares indices in the row, which is equivalent
    in packed rows. Examples, with one row per query and one column per key:

      self_mask()                          1 . .       one document
                                           1 1 .
                                           1 1 1

      self_mask(causal=False), or None     1 1 1       the patches of an image
                                           1 1 1
                                           1 1 1

      self_mask([[1, 1, 2, 2, 0]])         1 . . . .   two documents packed in a row, and padding,
                                           1 1 . . .   which sees itself, because every query
                                           . . 1 . .   needs a key
                                           . . 1 1 .
                                           . . . . 1

      Mask([[1, 1]], [[1, 1, 1, 0]],       1 1 . .     tokens 1 and 2 of a document, with a cache
           [[1, 2]], [[0, 1, 2, 0]],       1 1 1 .     that has room for 4
           causal=True)
    """

    q_segments: Int[Array, "B T"] | None = None
    kv_segments: Int[Array, "B S"] | None = None
    q_positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)


def self_mask(segments: Int[Array, "B T"] | None = None, *, causal: bool = True) -> Mask:
    """Make the mask of self-attention, in which each packed document sees only itself."""
    return Mask(q_segments=segments, causal=causal)


def allowed(mask: Mask | None, T: int, S: int) -> Bool[Array, "B T S"]:
    """Expand the mask: does query t see key s? B is 1 if all rows have the same mask."""
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
    """Compute softmax(scale * q k + bias) v over the keys that `mask` allows.

    B rows have T queries and S keys. Each of the G key heads serves H / G of the H query heads
    (grouped-query attention). The softmax is in float32, and the output of a query without keys is
    zero. If `key` is given, dropout applies to the probabilities.

    The kernel "dense" supports all arguments. The kernels "splash" (TPU), "pallas" and "cudnn"
    (GPU) never store a T x S array. "auto" picks a kernel of the platform that supports the
    arguments, or else "dense". Raises UserError if a named kernel does not support the arguments.
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
    """Return the platform of the mesh in use, or JAX's default platform without a mesh.

    A mesh may describe devices that this machine lacks, so the default would be wrong for it.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _obstacle(platform, q, k, mask, bias, dropout, kernel) -> str:
    """The reason why `kernel` does not support these arguments, or "" if it does."""
    T = q.shape[1]
    S = k.shape[1]
    width = q.shape[-1]
    if kernel == "dense":
        return ""
    if kernel not in PLATFORMS:
        return f"does not exist; the kernels are dense, {', '.join(PLATFORMS)}"
    if platform not in PLATFORMS[kernel]:
        return f"runs on {PLATFORMS[kernel][0]}, not on {platform}"
    if bias is not None or dropout:
        return "supports neither bias nor dropout"
    cross = any(x is not None for x in (mask.kv_segments, mask.q_positions, mask.kv_positions))
    if cross or (mask.causal and T != S):
        return "supports self-attention masks only (self_mask)"
    if kernel in ("cudnn", "pallas") and width > WIDEST:
        return f"takes heads of at most {WIDEST} channels, not {width}"
    if kernel == "cudnn" and width % 8:
        return f"takes heads whose channels are a multiple of 8, not {width}"
    if kernel == "pallas" and T != S:
        return f"needs as many queries as keys, not {T} and {S}"
    if kernel == "cudnn" and mask.q_segments is not None:
        return "takes no segments: it would be silently wrong on packed rows"
    if kernel == "cudnn" and q.dtype.itemsize != 2:
        return f"computes in 16 bits, not in {q.dtype}"
    return ""


def _pays(platform, q, k) -> bool:
    """Return whether "auto" should try the kernels at all, instead of "dense".

    Short rows stay dense because kernels would mostly compute padding. Float32 stays dense because
    a user who chooses it wants exact results. CPUs stay dense because they only interpret kernels.
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
    # A query without keys gives zero; the softmax alone would be uniform.
    probs = jnp.where(ok, jax.nn.softmax(logits, axis=-1), 0.0)
    if dropout:
        probs *= jax.random.bernoulli(key, 1 - dropout, probs.shape) / (1 - dropout)
    return rearrange(
        einsum("BGrTS,BSGd->BTGrd", probs.astype(v.dtype), v), "B T G r d -> B T (G r) d"
    )


def _cudnn(q, k, v, scale, causal):
    """Run cuDNN's flash attention.

    cuDNN has no gradient for rows of odd length, so such rows get one more element, which the
    sequence lengths mask out.
    """
    B, T = q.shape[:2]
    S = k.shape[1]
    q_lengths = None
    kv_lengths = None
    if T % 2 or S % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
        q_lengths = jnp.full(B, T, jnp.int32)
        kv_lengths = jnp.full(B, S, jnp.int32)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        implementation="cudnn",
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=kv_lengths,
    )
    return out[:, :T]


def _splash(q, k, v, segments, *, scale, causal, interpret):
    """Run JAX's sparse flash attention for TPU, which skips blocks that are masked entirely."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H = q.shape[1:3]
    q_ids, kv_ids = _ids(q, k, segments, causal)
    ids = None if kv_ids is None else splash.SegmentIds(q_ids, kv_ids)
    q, k, v = (rearrange(_padded(x), "B T H d -> B H T d") for x in (q * scale, k, v))
    shape = (q.shape[2], k.shape[2])
    bq, bk = map(_block_size, shape)
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(
            block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    out = jax.vmap(kernel)(q, k, v, ids)
    return rearrange(out, "B H T d -> B T H d")[:, :T]


def _pallas(q, k, v, segments, *, scale, causal, interpret):
    """Run JAX's flash attention for GPU, which supports segments (cuDNN's does not)."""
    from jax.experimental.pallas.ops.gpu import attention as gpu

    T, H = q.shape[1:3]
    _, ids = _ids(q, k, segments, causal)
    k, v = (repeat(x, "B S G d -> B S (G r) d", r=H // k.shape[2]) for x in (k, v))
    # Float32 needs smaller blocks: 128 x 128 of them do not fit an H100's shared memory.
    b = BLOCK // 2 if q.dtype.itemsize > 2 else BLOCK
    blocks = gpu.BlockSizes(
        block_q=b, block_k=b, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32
    )
    out = gpu.mha(
        *map(_padded, (q, k, v)),
        ids,
        sm_scale=scale,
        causal=causal,
        block_sizes=blocks,
        interpret=interpret,
    )
    return out[:, :T]


def _block_size(length: int) -> int:
    """Return the largest multiple of BLOCK, up to 4 * BLOCK, that divides `length`."""
    return max(block for block in (BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK) if length % block == 0)


def _padded(x, value=0):
    """Pad x [B, T, ...] along T to a multiple of BLOCK."""
    widths = [(0, 0), (0, -x.shape[1] % BLOCK)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)


def _ids(q, k, segments, causal):
    """Return the segments of the padded queries and keys, or (None, None) if none are needed.

    Padded queries also need a key, since their gradient would be 0/0 without one. With `segments`
    they see the padded keys, and without `segments` they see the real keys.
    """
    if segments is not None:
        ids = _padded(segments, -1)
        return ids, ids
    # Nothing needs to be masked: the causal mask hides padded keys, which follow every real query,
    # or there are no padded keys.
    if causal or k.shape[1] % BLOCK == 0:
        return None, None
    zeros = partial(jnp.zeros, dtype=jnp.int32)
    return _padded(zeros(q.shape[:2])), _padded(zeros(k.shape[:2]), -1)


def _sharded(run, q, k, v, mask):
    """Run the kernel on each device's rows and heads.

    The split must be explicit because XLA does not partition Pallas calls.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q, k, v, mask.q_segments)
    spec = _spec(mesh, q.shape[0], k.shape[2], mask.causal)
    sharded = jax.shard_map(
        run, in_specs=(spec, spec, spec, P(spec[0])), out_specs=spec, check_vma=False
    )
    return sharded(q, k, v, mask.q_segments)


def _spec(mesh, B: int, G: int, causal: bool) -> P:
    """Choose the sharding of [B, T, H, d].

    A causal mask means text: rows are split as in `sharding.constrain_rows`, and heads over the
    mesh axis "tensor". Without a causal mask the rows are images, which are split over all mesh
    axes as in `sharding.constrain_images`. If B or the heads cannot be split evenly, they are split
    over fewer mesh axes or replicated.
    """
    heads = "tensor" if causal and G % mesh.shape["tensor"] == 0 else None
    rows = sharding.ROWS if heads else sharding.AXES
    for axes in (rows, sharding.ROWS):
        if B % prod(mesh.shape[axis] for axis in axes) == 0:
            return P(axes, None, heads, None)
    return P(None, None, heads, None)
