# SPDX-License-Identifier: Apache-2.0
"""-log p of tokens, row by row: in batches of few shapes, over the mesh, with logits where they are scored alone.

Rows are padded on the right, where a causal model cannot see it, so neither their order nor their company changes a
result. Letters as in model.py; C columns of scored tokens whose logits exist at once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import QUERIES, attend
from gpt2_jax.convert.weights import progress
from gpt2_jax.decoding.cache import apply_block
from gpt2_jax.evaluate.batching import Plan, plan
from gpt2_jax.linear import whole
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH, ROWS, padded

FEW, MANY = 128, 1024  # rows of logits that a device holds at once: for short continuations, and for passages

Ids = Sequence[int]
Scores = tuple[np.ndarray, np.ndarray]  # of each scored token -log p, in nats, and whether it was the first choice


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """Tokens to read, and what follows each of the last of them: those are scored.

  Where several continuations stand in the row, one after the other, `tree` [2, T] has each token's position, and the
  number of its continuation; tokens see their own, and what has number 0.
  """

  inputs: np.ndarray
  labels: np.ndarray
  tree: np.ndarray | None = None


def tail(tokens: np.ndarray, count: int) -> Row:
  """The row that scores the last `count` tokens."""
  return Row(tokens[:-1], tokens[len(tokens) - count :])


def windows(tokens: np.ndarray, n_ctx: int, stride: int) -> list[Row]:
  """Rows that score every token but the first, once each.

  The first predicts n_ctx tokens, each later one `stride` more, from the n_ctx tokens before the last of them. With a
  stride of n_ctx these are lm-evaluation-harness's windows; with 1 each token has all the context there is.
  """
  rows, done = [], 0
  while done < len(tokens) - 1:
    end = min(len(tokens) - 1, done + (stride if done else n_ctx))
    rows.append(tail(tokens[max(0, end - n_ctx) : end + 1], end - done))
    done = end
  return rows


def branches(context: Ids, continuations: Sequence[Ids]) -> Row:
  """The row that scores several continuations, one after the other, and reads their context once.

  Each begins with the context's last token, so that every one of its tokens has its own place to be predicted from.
  """
  parts = [[context[-1], *continuation[:-1]] for continuation in continuations]
  sizes = [len(context) - 1, *map(len, parts)]
  positions = [*range(len(context) - 1), *(len(context) - 1 + i for part in parts for i in range(len(part)))]
  labels = np.concatenate([np.array(continuation, np.int32) for continuation in continuations])
  tree = np.array([positions, np.repeat(np.arange(len(sizes)), sizes)], np.int32)
  return Row(np.array([*context[:-1], *(token for part in parts for token in part)], np.int32), labels, tree)


def score(model: GPT2, rows: Sequence[Row], batch_size: int) -> list[Scores]:
  """The scores of each row's labels. Rows have n_ctx tokens at most, and all of them a tree or none.

  Raises ValueError for tokens outside the vocabulary, FloatingPointError where logits are NaN.
  """
  if not rows:
    return []
  planned = planned_for(model, [len(row.inputs) for row in rows], batch_size)

  def dispatch(batch):
    return _dispatch(model, [rows[i] for i in batch.rows], planned.size, batch.length)

  scores = {}
  for batch, found in _in_turn(model, planned, dispatch):
    for i, nats_P, first_P in zip(batch.rows, *jax.device_get(found), strict=False):  # the rest only fill the batch
      scores[i] = tuple(x_P[: len(rows[i].labels)].copy() for x_P in (nats_P, first_P))
      if np.isnan(scores[i][0]).any():
        raise FloatingPointError("the model's logits are not numbers (NaN); are its weights?")
  return [scores[i] for i in range(len(rows))]


def planned_for(model: GPT2, lengths: Sequence[int], batch_size: int) -> Plan:
  """Batches of `batch_size` rows, or as many as there are, rounded up to what the mesh divides."""
  multiple = math.prod(model.mesh.shape[name] for name in ROWS)
  return plan(lengths, min(padded(batch_size, multiple), padded(len(lengths), multiple)))


def _in_turn(model: GPT2, planned: Plan, dispatch: Callable) -> Iterator:
  """Each batch with what was dispatched for it; the next one is dispatched before a batch is given out."""
  held = None
  with jax.set_mesh(model.mesh):
    for batch in progress(planned.batches, "scoring"):
      last, held = held, (batch, dispatch(batch))
      if last:
        yield last
    if held:
      yield held


def _dispatch(model: GPT2, rows: Sequence[Row], B: int, T: int):
  """Puts rows on the mesh in force, padded to [B, T], and sets off what scores them."""
  tokens_BT, labels_BT, position_BT, branch_BT = np.zeros((4, B, T), np.int32)
  begin_B = np.zeros(B, np.int32)
  for i, row in enumerate(rows):
    n = len(row.inputs)
    begin_B[i] = n - len(row.labels)
    tokens_BT[i, :n], labels_BT[i, begin_B[i] : n] = row.inputs, row.labels
    if row.tree is not None:
      position_BT[i, :n], branch_BT[i, :n] = row.tree
  low, high, n_vocab = (
    min(tokens_BT.min(), labels_BT.min()),
    max(tokens_BT.max(), labels_BT.max()),
    model.config.n_vocab,
  )
  if low < 0 or high >= n_vocab:
    raise ValueError(f"tokens {low} to {high}, and the vocabulary is {n_vocab}; is it the right tokenizer?")
  most = max(len(row.labels) for row in rows)
  here = B // math.prod(model.mesh.shape[name] for name in ROWS)
  columns = min(T, max(1, (MANY if here * most > FEW else FEW) // here))
  tree = None if rows[0].tree is None else (position_BT, branch_BT)
  arrays = jax.device_put((tokens_BT, labels_BT, begin_B, tree), NamedSharding(model.mesh, P(ROWS)))
  return _score(model, *arrays, np.int32(-(-most // columns)), columns)


@functools.partial(jax.jit, static_argnames="columns")
def _score(model: GPT2, tokens_BT, labels_BT, begin_B, tree, steps, columns: int):
  """-log p of the labels from column `begin_B` of each row on, in nats, and whether each is the likeliest token.

  [B, P] both, from column 0 on. Logits are computed for `columns` tokens a row at a time, `steps` times.
  """
  B, T = tokens_BT.shape
  x_BTD = model.hidden(tokens_BT)[0] if tree is None else _hidden(model, tokens_BT, *tree)
  model.wte = jax.tree.map(whole, model.wte)  # once, not once a step

  def step(i, found):
    place_BC = jnp.minimum(begin_B[:, None] + i * columns + jnp.arange(columns), T - 1)
    x_BCD, label_BC = (jax.vmap(lambda x, at: x[at])(x, place_BC) for x in (x_BTD, labels_BT))
    new = _judged(model, x_BCD, label_BC)
    return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, i * columns, 1) for x, y in zip(found, new, strict=True))

  room_BP = jnp.zeros((B, padded(T, columns)), out_sharding=BATCH)
  return jax.lax.fori_loop(0, steps, step, (room_BP, room_BP > 0))


def _judged(model: GPT2, x_BCD, label_BC):
  """-log p of each label, in nats, and whether it is the likeliest token, the first of those that are."""
  logits_BCV, n_vocab = model.head(x_BCD), model.config.n_vocab
  token_V = jnp.arange(logits_BCV.shape[-1])
  real_BCV = jnp.where(token_V < n_vocab, logits_BCV, -jnp.inf)
  likeliest_BCV = jnp.where(real_BCV == real_BCV.max(-1, keepdims=True), token_V, token_V.size)
  return cross_entropy(logits_BCV, label_BC, n_vocab), likeliest_BCV.min(-1) == label_BC


def _hidden(model: GPT2, tokens_BT, position_BT, branch_BT):
  """`model.hidden` where tokens see what came before in their own branch, and in branch 0."""
  T = tokens_BT.shape[1]

  def attention(q_BTHK, k_BTHK, v_BTHK):
    parts = []
    for begin in range(0, T, QUERIES):
      end = min(begin + QUERIES, T)
      of_query_BT1, of_key_B1S = branch_BT[:, begin:end, None], branch_BT[:, None, :end]
      seen_BTS = (of_query_BT1 == of_key_B1S) | (of_key_B1S == 0)
      seen_BTS &= jnp.arange(end) <= jnp.arange(begin, end)[:, None]
      parts.append(attend(q_BTHK[:, begin:end], k_BTHK[:, :end], v_BTHK[:, :end], seen_BTS[:, None]))
    return jnp.concatenate(parts, axis=1), None

  x_BTD = model.embed(tokens_BT, position_BT)
  x_BTD, _ = jax.lax.scan(lambda x_BTD, block: apply_block(block, x_BTD, attention), x_BTD, model.h)
  return model.ln_f(x_BTD)
