# SPDX-License-Identifier: Apache-2.0
"""A training step of 124M and of nanoGPT's Shakespeare shape: the project's own, torch's eager and
compiled."""

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import optax
import torch
import torch.nn.functional as F
from jax.sharding import NamedSharding

from configs import shakespeare
from experiments.benchmarks.opponent import our_model, their_model
from experiments.benchmarks.rounds import Row, alternate, forget, random_tokens, tell
from gpt2_jax.batch import Batch
from gpt2_jax.compat import get_mesh
from gpt2_jax.finetune.trainable import partition, trainable_mask
from gpt2_jax.loss import NextToken
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.optimizer import adamw
from gpt2_jax.sharding import BATCH
from gpt2_jax.sizes import model_config
from gpt2_jax.train import TrainState, init_state, scan_steps, train_step

TRAIN_SHAPES = ((1, 1024), (4, 256))
TRAIN_TARGETS = {"float32": 1.5, "bfloat16": 1.0}
ADAMW = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
LEARNING_RATE = 3e-4


def our_train(model: GPT2, tokens_BT, trainable=("*",), updates: int = 1) -> Callable[[], float]:
  """`updates` a call, the last loss returned: the project's own step, the state donated."""
  optimizer = adamw(optax.constant_schedule(LEARNING_RATE), **ADAMW)
  options = {"optimizer": optimizer, "trainable": trainable}
  call = jax.jit(functools.partial(train_step, **options), donate_argnums=0)
  zero = jax.numpy.int32(0)
  model = jax.tree.map(jax.numpy.copy, model)  # the state is donated, the caller's model is not
  trained, _ = partition(model, trainable_mask(model, trainable))
  state = TrainState(
    zero, jax.numpy.copy(zero), jax.numpy.copy(zero), model, jax.jit(optimizer.init)(trained)
  )
  batch = Batch(jax.device_put(tokens_BT, NamedSharding(get_mesh(), BATCH)))

  def step():
    nonlocal state
    for _ in range(updates):
      state, metrics = call(state, batch, NextToken())
    return jax.block_until_ready((state, metrics))[1]["loss"].item()

  return step


def their_optimizer(model, **kind):
  """torch's AdamW with the same numbers: decay on matrices only."""
  parameters = [p for p in model.parameters() if p.requires_grad]
  groups = [
    {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": ADAMW["weight_decay"]},
    {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
  ]
  return torch.optim.AdamW(
    groups, lr=LEARNING_RATE, betas=(ADAMW["b1"], ADAMW["b2"]), eps=1e-8, **kind
  )


def their_loss(model, x_BT, y_BT):
  """Mean nats; the logits go to float32 first, as transformers' own loss does."""
  logits = model(input_ids=x_BT, use_cache=False).logits.float()
  return F.cross_entropy(logits.flatten(0, 1), y_BT.flatten())


def their_train(
  model, tokens_BT, dtype: str, compiled: bool, loss_of=their_loss, kind=None, updates: int = 1
) -> Callable[[], float]:
  """`updates` a call on the model's device, the last loss returned; bfloat16 is autocast over
  float32 parameters, as in nanoGPT."""
  model.train()
  optimizer = their_optimizer(model, **(kind or {"fused": True}))
  device = next(model.parameters()).device
  tokens_BT = torch.from_numpy(tokens_BT).long().to(device)
  loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of
  precision = contextlib.nullcontext()
  if dtype == "bfloat16":
    precision = torch.autocast(device.type, torch.bfloat16)

  def step():
    for _ in range(updates):
      with precision:
        loss = loss_of(model, tokens_BT[:, :-1], tokens_BT[:, 1:])
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["clip_norm"])
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return step


def faster_adamw(theirs) -> dict:
  """torch's faster form of AdamW here, each tried on gradients of zeros."""
  seconds = {}
  for kind in ("fused", "foreach"):
    optimizer = their_optimizer(theirs, **{kind: True})
    for _ in range(3):
      for parameter in theirs.parameters():
        parameter.grad = torch.zeros_like(parameter)
      begin = time.perf_counter()
      optimizer.step()
      seconds[kind] = time.perf_counter() - begin
  theirs.zero_grad(set_to_none=True)
  best = min(seconds, key=seconds.get)
  tell(
    "torch AdamW: "
    + ", ".join(f"{k} {s * 1e3:.0f} ms" for k, s in seconds.items())
    + f"; taken: {best}"
  )
  return {best: True}


def bench_train(rounds: int) -> list[Row]:
  rows, kind = [], None
  for dtype in TRAIN_TARGETS:
    for B, T in TRAIN_SHAPES:
      theirs = their_model(model_config("124M"))
      kind = kind or faster_adamw(theirs)
      config = model_config("124M")
      ours = our_model(theirs, dataclasses.replace(config, dtype=dtype, unroll=config.n_layer))
      tokens_BT = random_tokens(B, T + 1)
      sides = {"ours": our_train(ours, tokens_BT)}
      del ours
      for side in ("eager", "compiled"):
        model = copy.deepcopy(theirs)
        sides[side] = their_train(model, tokens_BT, dtype, side == "compiled", kind=kind)
      rows.append(
        alternate(
          f"train 124M {B} x {T} {dtype}", f"{TRAIN_TARGETS[dtype]} x", B * T, sides, rounds
        )
      )
      forget(sides)
  return rows


class Tiny(torch.nn.Module):
  """The same small GPT-2 with the least torch there can be, which is a harder opponent than
  transformers'."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    D, nn = config.n_embd, torch.nn
    self.wte, self.wpe = nn.Embedding(config.n_vocab, D), nn.Embedding(config.n_ctx, D)
    norms = {name: nn.LayerNorm(D) for name in ("ln_1", "ln_2")}
    sizes = {"c_attn": (D, 3 * D), "attn_proj": (D, D), "c_fc": (D, 4 * D), "mlp_proj": (4 * D, D)}
    block = nn.ModuleDict(norms | {name: nn.Linear(*size) for name, size in sizes.items()})
    self.h = nn.ModuleList(copy.deepcopy(block) for _ in range(config.n_layer))
    self.ln_f, self.n_head = nn.LayerNorm(D), config.n_head
    for parameter in self.parameters():
      if parameter.ndim == 2:
        nn.init.normal_(parameter, std=0.02)

  def forward(self, tokens_BT):
    B, T = tokens_BT.shape
    x = self.wte(tokens_BT) + self.wpe.weight[:T]
    for h in self.h:
      q, k, v = h["c_attn"](h["ln_1"](x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
      y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
      x = x + h["attn_proj"](y.transpose(1, 2).reshape(B, T, -1))
      x = x + h["mlp_proj"](F.gelu(h["c_fc"](h["ln_2"](x)), approximate="tanh"))
    return F.linear(self.ln_f(x), self.wte.weight)


def tiny_loss(model, x_BT, y_BT):
  return F.cross_entropy(model(x_BT).flatten(0, 1), y_BT.flatten())


def bench_tiny(rounds: int) -> list[Row]:
  config = shakespeare.get_config()
  model, S, B = ModelConfig(**config.model), config.steps_per_call, config.batch_size
  optimizer = adamw(optax.constant_schedule(LEARNING_RATE), **ADAMW)
  state = jax.jit(functools.partial(init_state, model_config=model, optimizer=optimizer))(
    jax.random.key(0)
  )
  call = jax.jit(functools.partial(scan_steps, optimizer=optimizer), donate_argnums=0)
  tokens_SBT = random_tokens(S, B, model.n_ctx + 1, n_vocab=model.n_vocab)

  def ours():
    nonlocal state
    state, _ = jax.block_until_ready(call(state, Batch(tokens_SBT), NextToken()))

  def loop(compiled: bool):
    step = their_train(Tiny(model), tokens_SBT[0], "float32", compiled, tiny_loss)
    return lambda: [step() for _ in range(S)]

  sides = {"ours": ours, "eager": loop(compiled=False), "compiled": loop(compiled=True)}
  name = f"train tiny {B} x {model.n_ctx} float32"
  row = alternate(name, "1.7 x or 40,000", S * B * model.n_ctx, sides, max(rounds, 5))
  forget(sides)
  return [row]
