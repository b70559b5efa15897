# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of generation at 124M: transformers, memory bandwidth, int8, speculative decoding."""

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
from gpt2_jax.decoding import for_inference, generate
from gpt2_jax.decoding.speculative import speculative
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.quantization import quantize
from gpt2_jax.sizes import model_config

GENERATE_BATCHES = (1, 8, 32)
PROMPT, N_NEW = 32, 128
TARGETS = {"float32": 1.8, "bfloat16": 1.8}
INT8_TARGET = "1.5 x float32"


def their_generate(model, prompts_BT, compiled: bool = False):
  """The new tokens of transformers, [B, N_NEW]: a DynamicCache, or compiled with a static one."""
  model.eval()
  prompts = torch.from_numpy(prompts_BT).long().to(model.device)
  options = {
    "max_new_tokens": N_NEW,
    "do_sample": False,
    "attention_mask": torch.ones_like(prompts),
  }

  # By itself transformers compiles on accelerators only; there it records CUDA graphs.
  if compiled:
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    compile_config = transformers.CompileConfig(mode=mode, dynamic=False)
    compile_config._compile_all_devices = True
    options |= {"cache_implementation": "static", "compile_config": compile_config}

  with torch.no_grad():
    new = model.generate(prompts, **options)[:, PROMPT:]

  # An early end would count tokens that were never made.
  if new.shape != (len(prompts), N_NEW):
    raise RuntimeError(f"transformers made {tuple(new.shape)} tokens, not {(len(prompts), N_NEW)}")
  return new


def bandwidth() -> float:
  """Memory bandwidth of this machine, bytes/s: the fastest of several sums over 1 GiB."""
  x = jnp.ones(1 << 28, jnp.float32)
  x_torch = torch.ones(1 << 28)
  total = jax.jit(jnp.sum)

  # Neither library reads at the full rate on every machine: the faster one counts.
  best = 0.0
  for read in 4 * (lambda: total(x).block_until_ready(), lambda: x_torch.sum().item()):
    begin = time.perf_counter()
    read()
    best = max(best, x.nbytes / (time.perf_counter() - begin))
  return best


def bench_generate(rounds: int) -> tuple[list[Row], dict]:
  """Equal dtypes against transformers; int8 against our own float32; both against the memory."""
  rows, read_rate = [], bandwidth()

  # 1. The same weights in every form.
  config = model_config("124M")
  theirs = their_model(config)
  decoders = {}
  for dtype in TARGETS:
    decoders[dtype] = for_inference(our_model(theirs, dataclasses.replace(config, dtype=dtype)))
  float32 = our_model(theirs, dataclasses.replace(config, dtype="float32"))
  decoders["int8"] = for_inference(quantize(float32))

  # 2. Against transformers.
  for dtype, target in TARGETS.items():
    theirs = theirs.to(getattr(torch, dtype))
    for B in GENERATE_BATCHES:
      prompts = random_tokens(B, PROMPT)
      sides = {
        "ours": functools.partial(generate, decoders[dtype], prompts.tolist(), N_NEW),
        "eager": functools.partial(their_generate, theirs, prompts),
        "compiled": functools.partial(
          their_generate, copy.deepcopy(theirs), prompts, compiled=True
        ),
      }
      rows.append(
        alternate(
          f"generate 124M batch {B} {dtype}", f"{target} x", B * N_NEW, sides, rounds, settle=0
        )
      )
      forget(sides)

  # 3. int8: batch 1 is bound by the memory, and has a target; others have none.
  for B in GENERATE_BATCHES:
    prompts = random_tokens(B, PROMPT).tolist()
    sides = {"ours": functools.partial(generate, decoders["int8"], prompts, N_NEW)}
    sides["float32"] = functools.partial(generate, decoders["float32"], prompts, N_NEW)
    target = INT8_TARGET if B == 1 else "-"
    rows.append(
      alternate(f"generate 124M batch {B} int8", target, B * N_NEW, sides, rounds, settle=0)
    )
  return rows, {"bandwidth": read_rate, "of_the_limit": limits(rows, decoders, read_rate)}


def limits(rows: list[Row], decoders: dict, read_rate: float) -> dict:
  """At batch 1, tokens/s over the rate at which the weights could be read once a token."""
  fractions = {}
  for row in rows:
    *_, batch, dtype = row.name.split()
    if batch != "1":
      continue

    # A token reads every weight once.
    decoder = decoders[dtype]
    weights = sum(x.nbytes for x in jax.tree.leaves((decoder.blocks, decoder.head)))

    limit = read_rate / weights
    rate = statistics.median(row.rates["ours"])
    fractions[dtype] = rate / limit
    print(
      f"batch 1 {dtype}: {weights / 1e6:,.0f} MB of weights a token "
      f"at {read_rate / 1e9:.1f} GB/s are at most {limit:.0f} tokens/s; "
      f"ours is {rate / limit:.0%} of that",
      flush=True,
    )
  return fractions


def agreeing(config: ModelConfig, layers: int, noise: float) -> tuple[GPT2, GPT2]:
  """A random target, and as its draft its first `layers`; what the other layers add is scaled by
  `noise`.

  Random models do not agree, and no trained pair is here: so the acceptance is set, and only the
  speed is measured.
  """
  theirs = their_model(config)

  # Before the split into two models, so that they share all that they have in common.
  with torch.no_grad():
    for block in theirs.transformer.h[layers:]:
      for projection in (block.attn.c_proj, block.mlp.c_proj):
        projection.weight.mul_(noise)
        projection.bias.mul_(noise)
  return our_model(theirs, config), our_model(theirs, dataclasses.replace(config, n_layer=layers))


def bench_speculative(rounds: int) -> tuple[list[Row], dict]:
  """Greedy decoding with and without a draft, the first 4 of 24 layers, batch 1, float32."""
  config = dataclasses.replace(model_config("345M"), dtype="float32")
  target, draft = map(for_inference, agreeing(config, 4, 0.02))
  prompts = random_tokens(1, PROMPT).tolist()

  # The last results of both sides are kept, to be compared.
  results = {}

  def with_draft():
    results["speculation"] = speculative(target, draft, prompts, N_NEW)

  def without_draft():
    results["plain"] = generate(target, prompts, N_NEW)

  sides = {"ours": with_draft, "plain": without_draft}
  row = alternate("speculative 345M batch 1 float32", "-", N_NEW, sides, rounds, settle=0)

  speculation = results["speculation"]
  same = speculation.completions == results["plain"]
  print(
    f"speculative: {speculation.acceptance:.0%} of the proposals accepted, "
    f"{speculation.passes} passes of the target for {N_NEW} tokens, "
    f"the same tokens as without: {'yes' if same else 'NO'}",
    flush=True,
  )
  return [row], {"acceptance": speculation.acceptance, "passes": speculation.passes, "same": same}
