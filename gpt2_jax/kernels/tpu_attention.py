# SPDX-License-Identifier: Apache-2.0
"""Causal attention for TPUs: a fused Pallas kernel of ours, and JAX's splash attention.

The fused kernel is one program each way, on the projection as `c_attn` leaves it. GPT-2's heads are
64 wide, half a lane tile, and in a context of 1,024 all keys of a head fit into VMEM. So one
program takes the columns of as many heads as fill whole tiles (two). Nothing is transposed to a
layout by heads or padded to 128, no maximum is carried along, and of what the mask hides only
the chunks on the diagonal are computed. Scores stand as [keys, queries]: maxima and sums run along
sublanes, and what belongs to a query is a row.

  # G group of heads  N heads in a group  C columns of q, k, v, head by head  X columns of heads
  # others as in model.py
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import BATCH, HEADS, HIDDEN, ROWS, padded, platform

LANES = 128
QUERIES = 256  # of one chunk; 128 and 512 take more instructions, by the compiler's count
LOG2_E = math.log2(math.e)
STATISTICS = P(ROWS, "model", None, None)  # [B, G, N, T]
SEGMENTS = P(ROWS, None, None)  # [B, 1, T]

product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
BY_COLUMNS = (((1,), (0,)), ((), ()))  # a b
BY_ROWS = (((1,), (1,)), ((), ()))  # a b'
OF_COLUMNS = (((0,), (0,)), ((), ()))  # a' b


def group_size(K: int) -> int:
  """Heads whose columns fill whole lane tiles: 2 where a head is 64 wide."""
  return LANES // math.gcd(LANES, K)


def fused_attention(c_BTC, K: int, segments_BT=None):
  """softmax(q k' / sqrt(K)) v of each head, [B, T, 3 H K] to [B, T, H K].

  The columns run head by head: q, k, v of each. With segments, a query sees the keys of its own.
  """
  # Padding comes after the last query, so that no query sees it.
  T = c_BTC.shape[1]
  room = ((0, 0), (0, padded(T, LANES) - T), (0, 0))
  segments_B1T = None if segments_BT is None else jnp.pad(segments_BT, room[:2])[:, None]
  return _fused(jnp.pad(c_BTC, room), segments_B1T, K)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fused(c_BTC, segments_B1T, K: int):
  return _fused_forward(c_BTC, segments_B1T, K)[0]


def _fused_forward(c_BTC, segments_B1T, K):
  forward = functools.partial(
    _on_groups, _forward_kernel, K, "fused_attention_forward", ("heads", "statistics")
  )
  on_shards = _on_shards(forward, (SEGMENTS, HIDDEN), (HIDDEN, STATISTICS))
  y_BTX, lse_BGNT = on_shards(segments_B1T, c_BTC)
  y_BTX, lse_BGNT = (checkpoint_name(x, "attend") for x in (y_BTX, lse_BGNT))
  return y_BTX, (segments_B1T, c_BTC, y_BTX, lse_BGNT)


def _fused_backward(K, saved, dy_BTX):
  backward = functools.partial(
    _on_groups, _backward_kernel, K, "fused_attention_backward", ("columns",)
  )
  on_shards = _on_shards(backward, (SEGMENTS, HIDDEN, HIDDEN, STATISTICS, HIDDEN), (HIDDEN,))
  return *on_shards(*saved, dy_BTX), None


_fused.defvjp(_fused_forward, _fused_backward)


def _on_shards(function, in_specs, out_specs):
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _on_groups(kernel, K: int, name: str, outputs: tuple[str, ...], segments_B1T, c_BTC, *others):
  """Runs a kernel: one program for each row and group of heads.

  A last group that lacks heads computes what is never written. A kernel gets None for segments that
  are None.
  """
  B, T, C = c_BTC.shape
  N = group_size(K)
  G = pl.cdiv(C, 3 * K * N)
  columns, heads = (pl.BlockSpec((1, T, n * K * N), lambda b, g: (b, 0, g)) for n in (3, 1))
  statistics = pl.BlockSpec((1, 1, N, T), lambda b, g: (b, g, 0, 0))
  segments = pl.BlockSpec((1, 1, T), lambda b, g: (b, 0, 0))
  segments = None if segments_B1T is None else segments

  # Each output with the block that a program writes of it.
  kinds = {
    "columns": (columns, jax.ShapeDtypeStruct((B, T, C), c_BTC.dtype)),
    "heads": (heads, jax.ShapeDtypeStruct((B, T, C // 3), c_BTC.dtype)),
    "statistics": (statistics, jax.ShapeDtypeStruct((B, G, N, T), jnp.float32)),
  }
  out_specs, out_shape = zip(*(kinds[kind] for kind in outputs), strict=True)

  # Programs are independent, and v4 and v5p have two cores to run them on.
  parallel = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"))
  return pl.pallas_call(
    functools.partial(kernel, K),
    grid=(B, G),
    in_specs=[segments, columns, heads, statistics, heads][: 2 + len(others)],
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=parallel,
    interpret=platform() != "tpu",
    name=name,
  )(segments_B1T, c_BTC, *others)


def _head(ref, head: int, K: int, parts: int):
  """The `parts` matrices [T, K] of a head in a block of columns."""
  first = head * parts * K
  return [ref[0, :, first + n * K : first + (n + 1) * K] for n in range(parts)]


def _chunks(T: int):
  """Queries [start, stop), and the spans of keys they read: before, and the diagonal square."""
  for start in range(0, T, QUERIES):
    stop = min(start + QUERIES, T)
    yield start, stop, [(0, start), (start, stop)] if start else [(start, stop)]


def _hide_future(x_SQ, value: float):
  """Causal mask of a square on the diagonal: `value` where the key comes after the query."""
  key, query = (jax.lax.broadcasted_iota(jnp.int32, x_SQ.shape, axis) for axis in (0, 1))
  return jnp.where(key <= query, x_SQ, value)


def _segment_hider(segments_ref):
  """hide(x_SQ, keys, queries, value): `value` where key and query, two spans, differ in segment.

  Without segments it hides nothing.
  """
  if segments_ref is None:
    return lambda x_SQ, keys, queries, value: x_SQ

  # The segment of a query is a row; that of a key is a column, of one tile that is transposed.
  segments_1T = segments_ref[0]
  segments_T8 = jnp.broadcast_to(segments_1T, (8, segments_1T.shape[1])).T

  def hide(x_SQ, keys, queries, value):
    (a, b), (start, stop) = keys, queries
    return jnp.where(segments_T8[a:b, :1] == segments_1T[:, start:stop], x_SQ, value)

  return hide


def _forward_kernel(K: int, segments_ref, c_ref, y_ref, lse_ref):
  scale = 1 / math.sqrt(K)
  hide_others = _segment_hider(segments_ref)
  for head in range(lse_ref.shape[2]):
    q_TK, k_TK, v_TK = _head(c_ref, head, K, 3)
    v_KT = v_TK.T
    for start, stop, spans in _chunks(q_TK.shape[0]):
      # Scores. Only the square on the diagonal has a future to hide.
      scores = [product(k_TK[a:b], q_TK[start:stop], BY_ROWS) for a, b in spans]
      scores[-1] = _hide_future(scores[-1], -jnp.inf)
      scores = [
        hide_others(x_SQ, keys, (start, stop), -jnp.inf)
        for keys, x_SQ in zip(spans, scores, strict=True)
      ]
      max_1Q = functools.reduce(jnp.maximum, [x_SQ.max(0, keepdims=True) for x_SQ in scores])

      # Softmax without its division, in base 2, times the values.
      sum_1Q, y_KQ = 0.0, 0.0
      for (a, b), x_SQ in zip(spans, scores, strict=True):
        e_SQ = jnp.exp2((x_SQ - max_1Q) * (scale * LOG2_E))
        sum_1Q += e_SQ.sum(0, keepdims=True)
        y_KQ += product(v_KT[:, a:b], e_SQ.astype(v_KT.dtype), BY_COLUMNS)

      # The division, and the logsumexp that the backward pass needs.
      y_ref[0, start:stop, head * K : (head + 1) * K] = (y_KQ / sum_1Q).T.astype(y_ref.dtype)
      lse_ref[0, 0, head : head + 1, start:stop] = max_1Q * scale + jnp.log(sum_1Q)


def _backward_kernel(K: int, segments_ref, c_ref, y_ref, lse_ref, dy_ref, dc_ref):
  """Computes the probabilities again from their logsumexp.

  Their gradient is that of FlashAttention (Dao et al. 2022), appendix B.
  """
  scale = 1 / math.sqrt(K)
  hide_others = _segment_hider(segments_ref)
  for head in range(lse_ref.shape[2]):
    q_TK, k_TK, v_TK = _head(c_ref, head, K, 3)
    (y_TK,), (dy_TK,) = _head(y_ref, head, K, 1), _head(dy_ref, head, K, 1)
    inner_1T = (y_TK.astype(jnp.float32) * dy_TK.astype(jnp.float32)).T.sum(0, keepdims=True)
    lse_1T = lse_ref[0, 0, head : head + 1, :] * LOG2_E
    first = head * 3 * K
    dk, dv = [], []  # chunk by chunk of keys
    for start, stop, spans in _chunks(q_TK.shape[0]):
      dq_QK = 0.0
      for a, b in spans:
        # Probabilities, and the gradient of the scores.
        p_SQ = jnp.exp2(
          product(k_TK[a:b], q_TK[start:stop], BY_ROWS) * (scale * LOG2_E) - lse_1T[:, start:stop]
        )
        p_SQ = _hide_future(p_SQ, 0.0) if a == start else p_SQ
        p_SQ = hide_others(p_SQ, (a, b), (start, stop), 0.0)
        dp_SQ = product(v_TK[a:b], dy_TK[start:stop], BY_ROWS)
        ds_SQ = (p_SQ * (dp_SQ - inner_1T[:, start:stop]) * scale).astype(q_TK.dtype)

        # Gradients of queries, keys and values.
        dq_QK += product(ds_SQ, k_TK[a:b], OF_COLUMNS)
        _add(dk, a, product(ds_SQ, q_TK[start:stop], BY_COLUMNS))
        _add(dv, a, product(p_SQ.astype(q_TK.dtype), dy_TK[start:stop], BY_COLUMNS))
      dc_ref[0, start:stop, first : first + K] = dq_QK.astype(dc_ref.dtype)

    # Keys and values gather gradients over all chunks of queries, so they are written last.
    for n, d in ((1, dk), (2, dv)):
      dc_ref[0, :, first + n * K : first + (n + 1) * K] = jnp.concatenate(d).astype(dc_ref.dtype)


def _add(chunks: list, start: int, x_SK) -> None:
  """Adds rows to a matrix that is kept chunk by chunk and grows at its end."""
  for n, first in enumerate(range(0, x_SK.shape[0], QUERIES), start // QUERIES):
    rows = x_SK[first : first + QUERIES]
    if n < len(chunks):
      chunks[n] += rows
    else:
      chunks.append(rows)


def splash_attention(q_BTHK, k_BTHK, v_BTHK, segments_BT=None):
  """JAX's own splash kernel, in blocks of up to 1,024 with one backward pass: the fastest of its
  forms at 1,024 tokens. Rows may be packed: it knows segments."""
  T, K = q_BTHK.shape[1], q_BTHK.shape[3]
  block = min(padded(T, LANES), 1024)
  length = padded(T, block)
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
  )

  def on_shard(q_BTHK, k_BTHK, v_BTHK, segments_BT):
    mask = splash_attention_mask.CausalMask((length, length))
    attend_HTK = splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * q_BTHK.shape[2]),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name="attend",
      interpret=platform() != "tpu",
    )

    # Padding comes after the last query: nobody sees it.
    room = ((0, 0), (0, 0), (0, length - T), (0, 0))
    q, k, v = (
      jnp.pad(jnp.swapaxes(x, 1, 2), room) for x in (q_BTHK / math.sqrt(K), k_BTHK, v_BTHK)
    )
    segments = None
    if segments_BT is not None:
      segments_BT = jnp.pad(segments_BT, room[::2])
      segments = splash_attention_kernel.SegmentIds(segments_BT, segments_BT)
    return jnp.swapaxes(jax.vmap(attend_HTK)(q, k, v, segments)[:, :, :T], 1, 2)

  attention = _on_shards(on_shard, (*(HEADS,) * 3, BATCH), HEADS)
  return attention(q_BTHK, k_BTHK, v_BTHK, segments_BT)
