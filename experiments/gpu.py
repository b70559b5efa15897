# SPDX-License-Identifier: Apache-2.0
"""One NVIDIA GPU: training and decoding of 117M and 1542M in bfloat16, beside transformers.

COMMAND   python experiments/gpu.py --json=gpu.json
              all rows; --only=train,generate and --sizes=117M,1542M take some of them
HARDWARE  a GPU with some 120 GB for training 1542M, 90 GB for 117M; it needs torch and transformers
EXPECT    README.md, "One GPU"

In every row the sides take turns on the same card, with the same shapes and the same random
weights. Before that, the two models are shown to be the same in float32. Training: ten updates a
call at T = 1,024, ours with twelve layers a step of the scan; theirs is GPT2LMHeadModel with
torch's scaled_dot_product_attention under autocast, and fused AdamW. 117M is compiled whole; of
1542M each block is compiled, and the head with the loss, which is torch's own advice for models of
many equal blocks. Another row has our step with attention in plain JAX against cuDNN's. Decoding is
greedy with bfloat16 weights, 32 + 128 tokens. Compiled is transformers' own static cache with CUDA
graphs. Ratio: ours over the fastest of the others in the same round.
"""

import copy
import dataclasses
import functools
import json
import os
import statistics
import sys

if __name__ == "__main__":
  # The root in place of experiments/; both libraries have to fit the card.
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from absl import flags

from experiments.benchmarks.generation import N_NEW, PROMPT, their_generate
from experiments.benchmarks.opponent import our_model, their_model
from experiments.benchmarks.rounds import HEADER, Row, alternate, forget, random_tokens
from experiments.benchmarks.training import our_train, their_train
from gpt2_jax.cli import shell
from gpt2_jax.decoding import for_inference, generate
from gpt2_jax.files import atomic_write, check_folder, local_path
from gpt2_jax.model import GPT2
from gpt2_jax.runs.metrics import mfu
from gpt2_jax.sharding import make_mesh
from gpt2_jax.sizes import model_config

TRAIN_BATCHES = {"117M": 32, "1542M": 4}
GENERATE_BATCHES = (1, 8, 64)
UPDATES, T = 10, 1024
UNROLL = 12

_ONLY = flags.DEFINE_list("only", ["generate", "train"], "Parts: train, generate.")
_SIZES = flags.DEFINE_list("sizes", list(TRAIN_BATCHES), "Sizes: 117M, 1542M.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
_COMPILED = flags.DEFINE_bool("compiled", True, "Also torch's compiled forms, which take minutes.")
_JSON = flags.DEFINE_string("json", None, "Also write every round's tokens/s to this file.")


def prove_same(theirs, config) -> None:
  """Prints the greatest difference of logits, both in true float32."""
  tokens_BT = random_tokens(2, 64)
  with torch.no_grad():
    their_logits = theirs(torch.from_numpy(tokens_BT).long().to(theirs.device)).logits.cpu().numpy()
  ours = our_model(copy.deepcopy(theirs).cpu(), dataclasses.replace(config, dtype="float32"))
  with jax.default_matmul_precision("highest"):
    logits = np.asarray(jax.jit(GPT2.__call__)(ours, tokens_BT))[..., : config.n_vocab]
  print(f"same model, float32: max |delta logit| {np.abs(logits - their_logits).max():.1e}")


class ByBlock(torch.nn.Module):
  """A GPT2LMHeadModel whose blocks, and head with loss, are compiled each by itself."""

  def __init__(self, model):
    super().__init__()
    self.model = model
    for block in model.transformer.h:
      block.compile(dynamic=False)
    self.head_loss = torch.compile(self.plain_head_loss, dynamic=False)

  @staticmethod
  def plain_head_loss(hidden_BTD, wte_VD, y_BT):
    logits = F.linear(hidden_BTD, wte_VD).float()
    return F.cross_entropy(logits.flatten(0, 1), y_BT.flatten())

  def loss(self, x_BT, y_BT):
    hidden_BTD = self.model.transformer(input_ids=x_BT, use_cache=False).last_hidden_state
    return self.head_loss(hidden_BTD, self.model.lm_head.weight, y_BT)


def block_loss(model: ByBlock, x_BT, y_BT):
  return model.loss(x_BT, y_BT)


def bench_train(size: str, rounds: int) -> list[Row]:
  """Our step against torch's, and with plain attention against cuDNN's."""
  # 1. The same weights on both sides, in float32.
  config = model_config(size)
  theirs = their_model(config)
  B = TRAIN_BATCHES[size]
  tokens_BT = random_tokens(B, T + 1)
  sides = {}

  def our_side(attention: str):
    options = {"dtype": "bfloat16", "unroll": UNROLL, "attention": attention}
    model = our_model(theirs, dataclasses.replace(config, **options))
    return our_train(model, tokens_BT, updates=UPDATES)

  # 2. Against torch. Eager and compiled share their weights, for two more copies would not fit.
  attentions = {"cudnn": our_side("auto"), "chunked": our_side("chunked")}
  sides["ours"] = attentions["cudnn"]
  their_side = functools.partial(their_train, dtype="bfloat16", compiled=False, updates=UPDATES)
  if size == "117M":
    theirs = theirs.cuda()
    sides["eager"] = their_side(theirs, tokens_BT)
    if _COMPILED.value:
      sides["compiled"] = their_side(theirs, tokens_BT, compiled=True)
  else:
    model = ByBlock(theirs).cuda()
    sides["by block"] = their_side(model, tokens_BT, loss_of=block_loss)
  tokens = UPDATES * B * T
  rows = [alternate(f"train {size} {B} x {T} bfloat16", "-", tokens, sides, rounds)]
  forget(sides)
  torch.cuda.empty_cache()

  # 3. Attention in plain JAX against cuDNN's.
  sides = {"ours": attentions["chunked"], "cudnn": attentions["cudnn"]}
  rows.append(alternate(f"train {size} {B} x {T}, no cuDNN", "-", tokens, sides, rounds))
  for row in rows:
    rate = statistics.median(row.rates["ours"])
    ms = 1e3 * B * T / rate
    print(f"{row.name}: {ms:.1f} ms a step, MFU {mfu(config, rate):.1%}", flush=True)
  return rows


def bench_generate(size: str, rounds: int) -> list[Row]:
  """Greedy decoding in bfloat16 against transformers."""
  config = model_config(size)
  theirs = their_model(config)
  model = for_inference(our_model(theirs, dataclasses.replace(config, dtype="bfloat16")))
  theirs = theirs.cuda()
  if size == "117M":
    prove_same(theirs, config)
  theirs = theirs.to(torch.bfloat16)

  rows = []
  for B in GENERATE_BATCHES:
    prompts = random_tokens(B, PROMPT)
    sides = {
      "ours": functools.partial(generate, model, prompts.tolist(), N_NEW),
      "eager": functools.partial(their_generate, theirs, prompts),
    }
    if _COMPILED.value:
      compiled = functools.partial(their_generate, copy.deepcopy(theirs), prompts, compiled=True)
      sides["compiled"] = compiled
    rows.append(alternate(f"generate {size} batch {B} bfloat16", "-", B * N_NEW, sides, rounds))
    forget(sides)
  return rows


def main() -> None:
  # 1. What can be known at the start.
  parts = {"train": bench_train, "generate": bench_generate}
  if set(_ONLY.value) - set(parts) or set(_SIZES.value) - set(TRAIN_BATCHES):
    raise ValueError("--only takes train and generate, --sizes takes 117M and 1542M; see --help")
  if jax.default_backend() != "gpu" or not torch.cuda.is_available():
    raise ValueError(
      f"jax computes on {jax.default_backend()}, torch.cuda.is_available() is "
      f"{torch.cuda.is_available()}; this comparison needs both on one GPU; see bench.py for a CPU"
    )
  path = _JSON.value and local_path(_JSON.value)
  if path:
    check_folder(path.parent)

  # 2. The rows. The file is written after each, so that a run which is cut off leaves them.
  transformers.logging.set_verbosity_error()
  torch_version, their_version = torch.__version__, transformers.__version__
  print(f"jax {jax.__version__}, torch {torch_version}, transformers {their_version}")
  rows = []
  with jax.set_mesh(make_mesh(1, 1, 1)):
    for part in _ONLY.value:
      for size in _SIZES.value:
        rows += parts[part](size, _ROUNDS.value)
        if path:
          lines = [dataclasses.asdict(row) | {"ratios": row.ratios()} for row in rows]
          with atomic_write(path, overwrite=True) as partial:
            partial.write_text(json.dumps(lines, indent=1))
  print("\n".join([HEADER, *map(str, rows)]))


if __name__ == "__main__":
  shell.run(main, __doc__)
