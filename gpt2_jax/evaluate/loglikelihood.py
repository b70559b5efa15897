# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood of tokens under a model, in nats: rows in batches of few shapes, over the mesh.

scorers.py makes the rows of contexts and continuations, and sums their tokens.

Logits exist only where tokens are scored. Rows are padded on the right, where a causal model cannot
see it, so neither their order nor their batch changes a result. Letters as in model.py; C columns
of scored tokens whose logits exist at once, P columns of scored tokens in all.
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

from gpt2_jax.attention import by_heads, causal_attention
from gpt2_jax.evaluate.batching import BatchPlan, PaddedBatch, plan_batches
from gpt2_jax.files import announce, progress
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH, ROWS, padded, unshard

# Rows of logits that a device holds at once. Few are enough for short continuations, and waste
# little; long texts keep the matmul of the head busy with many.
SHORT_LOGIT_ROWS = 128
LONG_LOGIT_ROWS = 1024

Ids = Sequence[int]
# Of each scored token what a measure returns; of `nats_and_first_choice` -log p, in nats, and
# whether it was the model's first choice.
Scores = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredRow:
  """Tokens to read (`inputs`), and what follows each of the last of them (`labels`, the scored).

  For tree attention, `tree` [2, T] has the position of each token and the number of its branch. A
  token attends to its own branch and to branch 0, the shared prefix.
  """

  inputs: np.ndarray
  labels: np.ndarray
  tree: np.ndarray | None = None


def score_last(tokens: np.ndarray, count: int) -> ScoredRow:
  """The row that scores the last `count` tokens."""
  return ScoredRow(tokens[:-1], tokens[len(tokens) - count :])


def sliding_windows(tokens: np.ndarray, n_ctx: int, stride: int) -> list[ScoredRow]:
  """Sliding windows over a long text: rows that score every token but the first, once each.

  The first window predicts n_ctx tokens. Each later one predicts `stride` more, from the n_ctx
  tokens before the last of them. A stride of n_ctx gives lm-evaluation-harness's windows; with a
  stride of 1 each token has all the context there is.
  """
  rows = []
  n_scored = 0
  while n_scored < len(tokens) - 1:
    step = stride if n_scored else n_ctx
    end = min(len(tokens) - 1, n_scored + step)
    begin = max(0, end - n_ctx)
    rows.append(score_last(tokens[begin : end + 1], end - n_scored))
    n_scored = end
  return rows


def tree_row(context: Ids, continuations: Sequence[Ids]) -> ScoredRow:
  """Tree attention: one row that scores several continuations of a shared prefix, read once.

  The continuations follow one another as branches. Each branch begins with the last token of the
  context, so that each of its tokens is predicted from a place in its own branch.
  """
  n_prefix = len(context) - 1
  inputs = list(context[:-1])
  positions = list(range(n_prefix))
  branches = [0] * n_prefix
  labels = []

  for branch, continuation in enumerate(continuations, 1):
    inputs.extend([context[-1], *continuation[:-1]])
    positions.extend(range(n_prefix, n_prefix + len(continuation)))
    branches.extend([branch] * len(continuation))
    labels.extend(continuation)

  tree = np.array([positions, branches], np.int32)
  return ScoredRow(np.array(inputs, np.int32), np.array(labels, np.int32), tree)


def score_rows(
  model: GPT2,
  rows: Sequence[ScoredRow],
  batch_size: int,
  measure: Callable | None = None,
  reference: GPT2 | None = None,
) -> list[Scores]:
  """What `measure` says of each row's labels, by default -log p and whether they are the argmax.

  `measure(models, hidden, label_BC) -> (-log p, ...)`, each [B, C], has the logits of some columns
  at once; `models` are the model and, if there is one, a `reference` with the same tokens, and
  `hidden` their last hidden states. Rows have at most n_ctx tokens, and either all of them have a
  tree or none. Raises ValueError for tokens outside the vocabulary, FloatingPointError where logits
  are not finite.
  """
  if not rows:
    return []
  lengths = [len(row.inputs) for row in rows]
  plan = plan_on_mesh(model, lengths, batch_size)
  models = (model,) if reference is None else (model, reference)
  measure = measure or nats_and_first_choice

  def dispatch(batch: PaddedBatch):
    return _dispatch(models, [rows[i] for i in batch.rows], plan.size, batch.length, measure)

  scores = {}
  for batch, on_device in _pipelined(model, plan, dispatch):
    # The batch may have more rows than sequences: the rest only fill it up.
    for i, *scores_P in zip(batch.rows, *jax.device_get(on_device), strict=False):
      n = len(rows[i].labels)
      # An infinite logit beside the label's leaves no NaN: the label's -log p is infinite then.
      if not np.isfinite(scores_P[0][:n]).all():
        raise FloatingPointError(
          "the model's logits are not finite numbers (NaN or infinite); are its weights?"
        )
      # Copies, so that the batch's arrays are freed.
      scores[i] = tuple(score_P[:n].copy() for score_P in scores_P)
  return [scores[i] for i in range(len(rows))]


def plan_on_mesh(model: GPT2, lengths: Sequence[int], batch_size: int) -> BatchPlan:
  """Batch plan for a mesh: `batch_size` rows, or as many as there are, rounded up.

  The size is a multiple of the mesh's axes over which rows are sharded.
  """
  multiple = math.prod(model.mesh.shape[name] for name in ROWS)
  size = min(padded(batch_size, multiple), padded(len(lengths), multiple))
  return plan_batches(lengths, size)


def _pipelined(model: GPT2, plan: BatchPlan, dispatch: Callable) -> Iterator:
  """Asynchronous dispatch: the next batch is under way before the results of one are read."""
  previous = None
  with jax.set_mesh(model.mesh):
    for batch in progress(plan.batches, "scoring"):
      with announce("compiling the scoring, up to a minute for each new length"):
        current = (batch, dispatch(batch))
      if previous:
        yield previous
      previous = current

    if previous:
      yield previous


def _dispatch(
  models: tuple[GPT2, ...], rows: Sequence[ScoredRow], B: int, T: int, measure: Callable
):
  """Puts rows on the mesh in force, padded to [B, T], and dispatches their scoring."""
  model = models[0]

  # 1. Pad on the right. Labels are in the column of the token that predicts them.
  tokens_BT, labels_BT, position_BT, branch_BT = np.zeros((4, B, T), np.int32)
  begin_B = np.zeros(B, np.int32)
  for i, row in enumerate(rows):
    n = len(row.inputs)
    begin_B[i] = n - len(row.labels)
    tokens_BT[i, :n] = row.inputs
    labels_BT[i, begin_B[i] : n] = row.labels
    if row.tree is not None:
      position_BT[i, :n], branch_BT[i, :n] = row.tree

  # 2. Check the range here: an index out of range is no error on the device.
  low = min(tokens_BT.min(), labels_BT.min())
  high = max(tokens_BT.max(), labels_BT.max())
  n_vocab = model.config.n_vocab
  if low < 0 or high >= n_vocab:
    raise ValueError(
      f"tokens {low} to {high}, and the vocabulary is {n_vocab}; is it the right tokenizer?"
    )

  # 3. Choose how many columns have their logits at once. The number of steps is traced and the
  #    columns are static, so that few programs are compiled.
  most_labels = max(len(row.labels) for row in rows)
  rows_per_device = B // math.prod(model.mesh.shape[name] for name in ROWS)
  columns = columns_at_once(T, rows_per_device, most_labels)
  steps = np.int32(-(-most_labels // columns))

  tree = None if rows[0].tree is None else (position_BT, branch_BT)
  arrays = jax.device_put((tokens_BT, labels_BT, begin_B, tree), NamedSharding(model.mesh, P(ROWS)))
  return _score(models, *arrays, steps, columns, measure)


def columns_at_once(T: int, rows_per_device: int, most_labels: int) -> int:
  """Of how many of a row's T columns the logits exist at once, if it has that many labels."""
  is_long = rows_per_device * most_labels > SHORT_LOGIT_ROWS
  logit_rows = LONG_LOGIT_ROWS if is_long else SHORT_LOGIT_ROWS
  return min(T, max(1, logit_rows // rows_per_device))


@functools.partial(jax.jit, static_argnames=("columns", "measure"))
def _score(models, tokens_BT, labels_BT, begin_B, tree, steps, columns: int, measure: Callable):
  """What `measure` says of the labels from column `begin_B` of each row on.

  Each [B, P], from column 0 on. Logits are computed for `columns` tokens a row at a time, in
  `steps` steps.
  """
  B, T = tokens_BT.shape
  hidden = []
  for model in models:
    if tree is None:
      hidden.append(model.hidden(model.embed(tokens_BT))[0])
    else:
      hidden.append(_hidden(model, tokens_BT, *tree))
    # All-gather the head's weights outside the loop: once, not once a step.
    model.wte = jax.tree.map(unshard, model.wte)

  def take_columns(x, columns_C):
    return x[columns_C]

  def measured(i):
    # This step's columns. Beyond a row's labels they repeat the last one.
    column_BC = jnp.minimum(begin_B[:, None] + i * columns + jnp.arange(columns), T - 1)
    parts = [jax.vmap(take_columns)(x_BTD, column_BC) for x_BTD in hidden]
    return measure(models, parts, jax.vmap(take_columns)(labels_BT, column_BC))

  def step(i, scores):
    # The results go behind those of the steps before.
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(score_BP, score_BC, i * columns, 1)
      for score_BP, score_BC in zip(scores, measured(i), strict=True)
    )

  room_BP = jnp.zeros((B, padded(T, columns)), out_sharding=BATCH)
  scores = tuple(room_BP.astype(x.dtype) for x in jax.eval_shape(measured, jnp.int32(0)))
  return jax.lax.fori_loop(0, steps, step, scores)


def nats_and_first_choice(models, hidden, label_BC):
  """-log p of each label, in nats, and whether it is the argmax; of equal logits the first wins."""
  [model], [x_BCD] = models, hidden
  logits_BCV, n_vocab = model.head(x_BCD), model.config.n_vocab
  token_V = jnp.arange(logits_BCV.shape[-1])
  # The padded vocabulary is masked: its logits may exceed all others.
  real_BCV = jnp.where(token_V < n_vocab, logits_BCV, -jnp.inf)
  # The first choice is the smallest token of the largest logit. Max and min are plain reductions
  # over the vocabulary, which the mesh's model axis may shard.
  likeliest_BCV = jnp.where(real_BCV == real_BCV.max(-1, keepdims=True), token_V, token_V.size)
  return cross_entropy(logits_BCV, label_BC, n_vocab), likeliest_BCV.min(-1) == label_BC


def _hidden(model: GPT2, tokens_BT, position_BT, branch_BT):
  """Tree attention: `model.hidden` where tokens see their own branch and branch 0, the prefix."""

  def visible(start: int, stop: int):
    query_BT1, key_B1S = branch_BT[:, start:stop, None], branch_BT[:, None, :stop]
    return (query_BT1 == key_B1S) | (key_B1S == 0)

  def attention(q_BTHK, k_BTHK, v_BTHK):
    return causal_attention(q_BTHK, k_BTHK, v_BTHK, visible=visible), None

  attend = by_heads(attention, model.config.head_size)
  return model.hidden(model.embed(tokens_BT, position_BT), attend=attend)[0]
