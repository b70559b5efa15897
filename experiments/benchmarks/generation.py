# SPDX-License-Identifier: Apache-2.0
"""Decoding at 124M against transformers, how near it is to the memory's limit, int8, and speculative decoding."""

import copy
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import torch
import transformers

from experiments.benchmarks.opponent import our_model, their_model
from experiments.benchmarks.rounds import Row, alternate, forget, random_tokens
from gpt2_jax.decoding import generate, ready
from gpt2_jax.decoding.speculation import speculative
from gpt2_jax.model import GPT2, ModelConfig, model_config
from gpt2_jax.quantization import quantize

GENERATE_BATCHES = (1, 8, 32)
PROMPT, N_NEW = 32, 128
TARGETS = {"float32": 1.8, "bfloat16": 1.8}
INT8_TARGET = "1.5 x float32"


def their_generate(model, prompts_BT, compiled: bool = False):
  """The new tokens, [B, N_NEW]: DynamicCache, or transformers' compiled decoding with its static cache."""
  model.eval()
  prompts = torch.from_numpy(prompts_BT).long()
  how = {"max_new_tokens": N_NEW, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
  if compiled:
    compile_config = transformers.CompileConfig(mode="default", dynamic=False)
    compile_config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    how |= {"cache_implementation": "static", "compile_config": compile_config}
  with torch.no_grad():
    new = model.generate(prompts, **how)[:, PROMPT:]
  if new.shape != (len(prompts), N_NEW):
    raise RuntimeError(f"transformers made {tuple(new.shape)} tokens, not {(len(prompts), N_NEW)}")
  return new


def bandwidth() -> float:
  """Bytes/s at which this machine's memory is read: the fastest of several sums over 1 GiB."""
  x = jnp.ones(1 << 28, jnp.float32)
  total, best = jax.jit(jnp.sum), 0.0
  theirs = torch.ones(1 << 28)
  for read in 4 * (lambda: total(x).block_until_ready(), lambda: theirs.sum().item()):
    begin = time.perf_counter()
    read()
    best = max(best, x.nbytes / (time.perf_counter() - begin))
  return best


def bench_generate(rounds: int) -> tuple[list[Row], dict]:
  """Equal dtypes against transformers; int8 against our own float32; and what part of the memory's limit that is."""
  rows, read_rate = [], bandwidth()
  config = model_config("124M")
  theirs = their_model(config)
  decoders = {dtype: ready(our_model(theirs, dataclasses.replace(config, dtype=dtype))) for dtype in TARGETS}
  decoders["int8"] = ready(quantize(our_model(theirs, dataclasses.replace(config, dtype="float32"))))
  for dtype, target in TARGETS.items():
    theirs = theirs.to(getattr(torch, dtype))
    for B in GENERATE_BATCHES:
      prompts = random_tokens(B, PROMPT)
      sides = {
        "ours": functools.partial(generate, decoders[dtype], prompts.tolist(), N_NEW),
        "eager": functools.partial(their_generate, theirs, prompts),
        "compiled": functools.partial(their_generate, copy.deepcopy(theirs), prompts, compiled=True),
      }
      rows.append(alternate(f"generate 124M batch {B} {dtype}", f"{target} x", B * N_NEW, sides, rounds, settle=0))
      forget(sides)
  for B in GENERATE_BATCHES:
    prompts = random_tokens(B, PROMPT).tolist()
    sides = {"ours": functools.partial(generate, decoders["int8"], prompts, N_NEW)}
    sides["float32"] = functools.partial(generate, decoders["float32"], prompts, N_NEW)
    target = INT8_TARGET if B == 1 else "-"
    rows.append(alternate(f"generate 124M batch {B} int8", target, B * N_NEW, sides, rounds, settle=0))
  return rows, {"bandwidth": read_rate, "of_the_limit": limits(rows, decoders, read_rate)}


def limits(rows: list[Row], decoders: dict, read_rate: float) -> dict:
  """At batch 1, tokens/s over the rate at which the weights could be read once a token."""
  found = {}
  for row in rows:
    *_, batch, kind = row.name.split()
    if batch == "1":
      decoder = decoders[kind]
      weights = sum(x.nbytes for x in jax.tree.leaves((decoder.blocks, decoder.model.wte)))
      if kind == "bfloat16":  # the head's operand is cast once a call
        weights -= decoder.model.wte[...].nbytes // 2
      limit = read_rate / weights
      rate = statistics.median(row.rates["ours"])
      found[kind] = rate / limit
      print(
        f"batch 1 {kind}: {weights / 1e6:,.0f} MB of weights a token at {read_rate / 1e9:.1f} GB/s are at most "
        f"{limit:.0f} tokens/s; ours is {rate / limit:.0%} of that",
        flush=True,
      )
  return found


def agreeing(config: ModelConfig, layers: int, noise: float) -> tuple[GPT2, GPT2]:
  """A random target, and as its draft its first `layers`; what the other layers add is scaled by `noise`.

  Random models do not agree, and no trained pair is here: so the acceptance is set, and only the speed is measured.
  """
  theirs = their_model(config)
  with torch.no_grad():
    for block in theirs.transformer.h[layers:]:
      for projection in (block.attn.c_proj, block.mlp.c_proj):
        projection.weight.mul_(noise)
        projection.bias.mul_(noise)
  return our_model(theirs, config), our_model(theirs, dataclasses.replace(config, n_layer=layers))


def bench_speculative(rounds: int) -> tuple[list[Row], dict]:
  """Greedy decoding with and without a draft, the first 4 of 24 layers, batch 1, float32."""
  config = dataclasses.replace(model_config("345M"), dtype="float32")
  target, draft = map(ready, agreeing(config, 4, 0.02))
  prompts, found = random_tokens(1, PROMPT).tolist(), {}

  def with_draft():
    found["speculation"] = speculative(target, draft, prompts, N_NEW)

  sides = {"ours": with_draft, "plain": lambda: found.update(plain=generate(target, prompts, N_NEW))}
  row = alternate("speculative 345M batch 1 float32", "-", N_NEW, sides, rounds, settle=0)
  speculation, plain = found["speculation"], [row.tokens for row in found["plain"]]
  same = speculation.tokens == plain
  print(
    f"speculative: {speculation.acceptance:.0%} of the proposals accepted, {speculation.passes} passes of the target "
    f"for {N_NEW} tokens, the same tokens as without: {'yes' if same else 'NO'}",
    flush=True,
  )
  return [row], {"acceptance": speculation.acceptance, "passes": speculation.passes, "same": same}
