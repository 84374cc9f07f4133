"""Transformer-XL attention for TPUs in which no array of the scores' size ever is in memory (Pallas, Mosaic).

The scores of a tile of queries and keys are formed, used and forgotten in the chip's own memory, as in FlashAttention
(Dao 2023, https://arxiv.org/abs/2307.08691). What is new here is the position term. The row of query i needs the
products (q_i + w) · r at other columns than the row before, shifted by one; a tile of BQ queries and BK keys therefore
needs BQ + BK columns of r, whose products are skewed in registers: row i is rotated by i. The backward pass skews the
scores' gradients back, before it multiplies them with r and with q + w.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from davae_jax.parallel.sharding import partition_spec

LANES = 128
BQ = LANES  # queries of a tile; the skew of the backward pass rotates within 128 lanes
VMEM = 48 << 20  # bytes on the chip that a kernel may take; from v5e on, every chip has more
MASKED = -10000.0  # as published, instead of −inf: a query that sees no key attends to all alike
NN = (((1,), (0,)), ((), ()))  # contracted axes of a · b
NT = (((1,), (1,)), ((), ()))  # of a · bᵀ
TN = (((0,), (0,)), ((), ()))  # of aᵀ · b


class Sizes(NamedTuple):
    """What a kernel is compiled for. Queries and keys are padded to whole tiles."""

    T: int
    K: int
    T_padded: int
    K_padded: int
    BK: int  # keys of a tile
    scale: float
    interpret: bool  # as a program for any device, for tests

    @property
    def R_padded(self) -> int:
        """The columns of r: one for each difference of a padded key and a padded query."""
        return self.T_padded + self.K_padded


def relative_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N K H"],
    v: Float[Array, "B N K H"],
    r: Float[Array, "N K H"],
    r_w_bias: Float[Array, "N H"],
    r_r_bias: Float[Array, "N H"],
    mask: Bool[Array, "*#B T K"],
    *,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Returns what `attention.relative_attention` returns.

    The compiler does not partition kernels, so that this is done here, over the mesh of `jax.set_mesh`: texts over the
    axes of the batch, and heads over `tensor` if it divides their number.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:])  # [B or 1, 1, T, K]
    attend = functools.partial(_on_one_device, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q, k, v, r, r_w_bias, r_r_bias, mask)
    texts = partition_spec(("batch", "head"), q.shape[:2], mesh.shape)
    heads = PartitionSpec(texts[1])
    of_mask = PartitionSpec(texts[0] if mask.shape[0] > 1 else None)
    specs = (texts, texts, texts, heads, heads, heads, of_mask)
    # The kernels do not say over which axes their results vary, which would let it be checked.
    sharded = jax.shard_map(attend, in_specs=specs, out_specs=texts, check_vma=False)
    return sharded(q, k, v, r, r_w_bias, r_r_bias, mask)


def _on_one_device(q, k, v, r, r_w_bias, r_r_bias, mask, *, interpret: bool) -> Float[Array, "B N T H"]:
    T, H = q.shape[2:]
    K = k.shape[2]
    T_padded, K_padded = _round_up(T, BQ), _round_up(K, LANES)
    BK = 2 * LANES if K_padded % (2 * LANES) == 0 else LANES
    sizes = Sizes(T, K, T_padded, K_padded, BK, H**-0.5, interpret)
    u, w = (bias.astype(q.dtype)[:, None] for bias in (r_w_bias, r_r_bias))
    mask = _pad(mask[:, 0].astype(jnp.int8), {1: T_padded - T, 2: K_padded - K})
    # Key j and query i use column j + T_padded − i of the padded r. The one column more than is needed in front makes
    # the first column of every tile a multiple of 128.
    front = T_padded - T + 1
    r = jnp.pad(r, ((0, 0), (front, sizes.R_padded - K - front), (0, 0)))
    q = _pad(q, {2: T_padded - T})
    k, v = (_pad(x, {2: K_padded - K}) for x in (k, v))
    return _attention(sizes, q, k, v, r, u, w, mask)[:, :, :T]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(x: Array, amounts: dict[int, int]) -> Array:
    """Returns x with zeros at the ends of some axes: axis → number."""
    return jnp.pad(x, [(0, amounts.get(axis, 0)) for axis in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sizes: Sizes, q, k, v, r, u, w, mask):
    return _forward(sizes, q, k, v, r, u, w, mask)[0]


def _attention_fwd(sizes: Sizes, q, k, v, r, u, w, mask):
    out, softmax = _forward(sizes, q, k, v, r, u, w, mask)
    return out, (q, k, v, r, u, w, mask, out, softmax)


def _attention_bwd(sizes: Sizes, saved, d_out):
    return *_backward(sizes, *saved, d_out), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _specs(sizes: Sizes, B_mask: int, H: int):
    """Returns the blocks of q, k, v, r, u, w and the mask on the grid (N, B, tiles of queries)."""
    per_query = pl.BlockSpec((None, None, BQ, H), lambda n, b, t: (b, n, t, 0))
    per_key = pl.BlockSpec((None, None, sizes.K_padded, H), lambda n, b, t: (b, n, 0, 0))
    per_distance = pl.BlockSpec((None, sizes.R_padded, H), lambda n, b, t: (n, 0, 0))
    per_head = pl.BlockSpec((None, 1, H), lambda n, b, t: (n, 0, 0))
    mask = pl.BlockSpec((None, BQ, sizes.K_padded), lambda n, b, t: (b if B_mask > 1 else 0, t, 0))
    return per_query, per_key, per_distance, per_head, mask


def _dot(sizes: Sizes, a, b, contraction):
    if sizes.interpret:  # XLA's CPU backend has no product of bfloat16 with a sum in float32
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(a, b, contraction, preferred_element_type=jnp.float32)


def _tile_scores(sizes: Sizes, i0, j0, qu, qw, k_ref, r_ref, mask_ref):
    """Returns the scores of a tile, float32 [BQ, BK], and which of them the mask does not hide."""
    BK = sizes.BK
    content = _dot(sizes, qu, k_ref[pl.ds(j0, BK), :], NT)
    columns = pl.multiple_of(j0 + sizes.T_padded - i0 - BQ, LANES)
    position = _dot(sizes, qw, r_ref[pl.ds(columns, BQ + BK), :], NT)
    # Row i begins at column BQ − i: a rotation to the right by BK + i of BQ + BK columns.
    position = pltpu.roll(position, BK, 1, stride=1, stride_axis=0)[:, :BK]
    seen = mask_ref[:, pl.ds(j0, BK)].astype(jnp.int32) != 0
    scores = jnp.where(seen, (content + position) * sizes.scale, MASKED)
    if sizes.K_padded > sizes.K:
        key = j0 + lax.broadcasted_iota(jnp.int32, (BQ, BK), 1)
        scores = jnp.where(key < sizes.K, scores, -jnp.inf)
    return scores, seen


def _forward(sizes: Sizes, q, k, v, r, u, w, mask):
    B, N, _, H = q.shape
    per_query, per_key, per_distance, per_head, per_mask = _specs(sizes, mask.shape[0], H)
    # The largest score of each query and the sum of its exponentials. Their logarithm's sum would be one number, but
    # of a query that sees no key it would have lost the sum.
    softmax = jax.ShapeDtypeStruct((B, N, 2, sizes.T_padded), jnp.float32)
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes),
        grid=(N, B, sizes.T_padded // BQ),
        in_specs=[per_query, per_key, per_key, per_distance, per_head, per_head, per_mask],
        out_specs=[per_query, pl.BlockSpec((None, None, 2, BQ), lambda n, b, t: (b, n, 0, t))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), softmax],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM
        ),
        interpret=sizes.interpret,
        name="relative_attention_forward",
    )(q, k, v, r, u, w, mask)


def _forward_kernel(sizes: Sizes, q_ref, k_ref, v_ref, r_ref, u_ref, w_ref, mask_ref, out_ref, softmax_ref):
    BK, H = sizes.BK, q_ref.shape[-1]
    i0 = pl.program_id(2) * BQ
    qu, qw = q_ref[...] + u_ref[...], q_ref[...] + w_ref[...]

    def add_tile(tile, carry):
        total, largest, context = carry
        j0 = pl.multiple_of(tile * BK, LANES)
        scores, _ = _tile_scores(sizes, i0, j0, qu, qw, k_ref, r_ref, mask_ref)
        new = jnp.maximum(largest, scores.max(axis=1, keepdims=True))
        rescale, p = jnp.exp(largest - new), jnp.exp(scores - new)
        values = v_ref[pl.ds(j0, BK), :]
        context = context * rescale + _dot(sizes, p.astype(values.dtype), values, NN)
        return total * rescale + p.sum(axis=1, keepdims=True), new, context

    start = (jnp.zeros((BQ, 1)), jnp.full((BQ, 1), -jnp.inf), jnp.zeros((BQ, H)))
    total, largest, context = lax.fori_loop(0, sizes.K_padded // BK, add_tile, start)
    out_ref[...] = (context / total).astype(out_ref.dtype)
    softmax_ref[...] = jnp.concatenate([_as_row(largest), _as_row(total)])


def _backward(sizes: Sizes, q, k, v, r, u, w, mask, out, softmax, d_out):
    B, N, _, H = q.shape
    per_query, per_key, per_distance, per_head, per_mask = _specs(sizes, mask.shape[0], H)
    per_softmax = pl.BlockSpec((None, None, 2, BQ), lambda n, b, t: (b, n, 0, t))
    f32 = jnp.float32
    return pl.pallas_call(
        functools.partial(_backward_kernel, sizes),
        grid=(N, B, sizes.T_padded // BQ),
        in_specs=[per_query, per_key, per_key, per_distance, per_head, per_head, per_mask]
        + [per_query, per_softmax, per_query],
        out_specs=[per_query, per_key, per_key, per_distance, per_head, per_head],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, r, u, w)],
        scratch_shapes=[pltpu.VMEM((sizes.K_padded, H), f32)] * 2
        + [pltpu.VMEM((sizes.R_padded, H), f32)]
        + [pltpu.VMEM((1, H), f32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=sizes.interpret,
        name="relative_attention_backward",
    )(q, k, v, r, u, w, mask, out, softmax, d_out)


def _backward_kernel(
    sizes: Sizes,
    q_ref,
    k_ref,
    v_ref,
    r_ref,
    u_ref,
    w_ref,
    mask_ref,
    out_ref,
    softmax_ref,
    d_out_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dr_ref,
    du_ref,
    dw_ref,
    dk_sum,
    dv_sum,
    dr_sum,
    du_sum,
    dw_sum,
):
    BK, H = sizes.BK, q_ref.shape[-1]
    b, t = pl.program_id(1), pl.program_id(2)
    i0 = t * BQ
    qu, qw = q_ref[...] + u_ref[...], q_ref[...] + w_ref[...]
    d_out = d_out_ref[...]
    largest, total = _as_column(softmax_ref[:1]), _as_column(softmax_ref[1:])
    delta = (out_ref[...].astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=1, keepdims=True)

    @pl.when(t == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when((t == 0) & (b == 0))
    def _():
        dr_sum[...] = jnp.zeros_like(dr_sum)
        du_sum[...] = jnp.zeros_like(du_sum)
        dw_sum[...] = jnp.zeros_like(dw_sum)

    def add_tile(tile, carry):
        dqu, dqw = carry
        j0 = pl.multiple_of(tile * BK, LANES)
        scores, seen = _tile_scores(sizes, i0, j0, qu, qw, k_ref, r_ref, mask_ref)
        keys, values = pl.ds(j0, BK), v_ref[pl.ds(j0, BK), :]
        p = jnp.exp(scores - largest) / total
        dv_sum[keys, :] += _dot(sizes, p.astype(values.dtype), d_out, TN)
        dp = _dot(sizes, d_out, values, NT)
        ds = jnp.where(seen, p * (dp - delta) * sizes.scale, 0.0)
        columns = pl.ds(pl.multiple_of(j0 + sizes.T_padded - i0 - BQ, LANES), BQ + BK)
        skewed = _skew_back(ds).astype(qw.dtype)
        ds = ds.astype(qu.dtype)
        dk_sum[keys, :] += _dot(sizes, ds, qu, TN)
        dr_sum[columns, :] += _dot(sizes, skewed, qw, TN)
        dqu += _dot(sizes, ds, k_ref[keys, :], NN)
        dqw += _dot(sizes, skewed, r_ref[columns, :], NN)
        return dqu, dqw

    start = (jnp.zeros((BQ, H)), jnp.zeros((BQ, H)))
    dqu, dqw = lax.fori_loop(0, sizes.K_padded // BK, add_tile, start)
    dq_ref[...] = (dqu + dqw).astype(dq_ref.dtype)
    du_sum[...] += dqu.sum(axis=0, keepdims=True)
    dw_sum[...] += dqw.sum(axis=0, keepdims=True)

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when((t == pl.num_programs(2) - 1) & (b == pl.num_programs(1) - 1))
    def _():
        dr_ref[...] = dr_sum[...].astype(dr_ref.dtype)
        du_ref[...] = du_sum[...].astype(du_ref.dtype)
        dw_ref[...] = dw_sum[...].astype(dw_ref.dtype)


def _as_row(x: Float[Array, "BQ 1"]) -> Float[Array, "1 BQ"]:
    return jnp.broadcast_to(x, (BQ, LANES)).T[:1]


def _as_column(x: Float[Array, "1 BQ"]) -> Float[Array, "BQ 1"]:
    return jnp.broadcast_to(x, (LANES, BQ)).T[:, :1]


def _skew_back(ds: Float[Array, "BQ BK"]) -> Float[Array, "BQ BQ+BK"]:
    """Returns the gradient of what `_tile_scores` skews: row i begins at column BQ − i, with zeros beside it.

    A rotation of each 128 columns to the left by the row's number, and then a choice between two adjacent columns.
    """
    blocks = ds.shape[1] // LANES
    source = sum(lax.broadcasted_iota(jnp.int32, (BQ, LANES), axis) for axis in (0, 1))
    rotated = [
        jnp.take_along_axis(ds[:, i * LANES : (i + 1) * LANES], source & (LANES - 1), axis=1) for i in range(blocks)
    ]
    zero = jnp.zeros((BQ, LANES), ds.dtype)
    return jnp.concatenate(
        [
            jnp.where(source < LANES, left, right)
            for left, right in zip([zero, *rotated], [*rotated, zero], strict=True)
        ],
        axis=1,
    )
