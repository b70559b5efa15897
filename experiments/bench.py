# SPDX-License-Identifier: Apache-2.0
"""Benchmarks against Hugging Face transformers on the CPU: training, generation, data, evaluation.

  make bench                                         # installs torch and transformers first
  python experiments/bench.py                        # all of it
  python experiments/bench.py --only=generate --rounds=5 --json=bench.json

In every row the sides take turns on the same cores, with the same shapes and the same random
weights. Before that, the two models are shown to be the same: logits, greedy tokens, losses of
three training steps, all in float32. Ratio: ours over the faster of eager and compiled in the same
round; its median, least and greatest. A ratio holds for one kind of CPU, so each row names the
instruction set, and the first lines print the matmul rates of both libraries. An older CPU can be
imitated, for both sides at once:

  XLA_FLAGS=--xla_cpu_max_isa=AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
    MKL_ENABLE_INSTRUCTIONS=AVX2 python experiments/bench.py --only=train,generate

Theirs: GPT2LMHeadModel with sdpa attention, torch's faster AdamW (fused here), clipping. Training
in bfloat16 is by autocast over float32 weights, generation with bfloat16 weights, as ours
(`for_inference`) are. Our step unrolls its layers, as compiled torch does. Both sides run in one
process with glibc's huge pages, for which the script starts itself again. Compiled is
torch.compile(dynamic=False) for loss and backward, and transformers' own compiled decoding with a
static cache for generation (its prefill stays eager). The tiny opponent is a bare torch module, not
transformers.

The loop's share is not a difference of two noisy totals. The run's own loop, prefetch and Log are
timed: all that the host does except waiting for the device (next batch, dispatch, logging), over
the loop's time. Most of it happens while a step runs; how often it does is printed, too. It cannot
see a step that is itself slower inside the loop (prefetch threads on its cores, dispatch ahead):
that is in loop against bare steps. Reading is from a store of 32 Mi tokens just written, so from
the page cache and not from a disk.

Evaluation scores LAMBADA's last words in a sample of 256 passages (--passages=0 takes all 5,153) on
both sides, from text to log-likelihoods, tokenizing included: ours through `Scorer.answers`, theirs
through lm-evaluation-harness's own HFLM, at the same batch size. It needs lm_eval as well as torch,
and --lambada=FILE, OpenAI's lambada_test.jsonl.

LoRA (--only=lora, which needs peft as well) is compared with peft's and with our own full step.
int8 is compared with our own float32, speculative decoding with plain decoding, each the "others"
of its row. Load has processes of its own (experiments/benchmarks/loading.py).

SEEN  two cores of an AMD EPYC with AVX-512 bfloat16, Python 3.11, jax 0.10.2, torch 2.13.0,
transformers 5.23.0, three rounds: max |delta logit| 3.1e-06, all 256 greedy tokens agree. In
tokens/s; generation in float32 at 3212c9a, in bfloat16 at 960ee0f, the rest at 7e13454, int8 alone
in a process at 3212c9a:

  row                                ours  the others                   ratio  min-max    target
  generate 124M batch 1 float32        90  eager 48, compiled 51         1.87  1.74-2.19  1.8 x
  generate 124M batch 8 float32       339  eager 161, compiled 174       1.92  1.86-2.21  1.8 x
  generate 124M batch 32 float32      609  eager 324, compiled 341       1.79  1.64-1.79  1.8 x
  generate 124M batch 1 bfloat16       91  eager 73, compiled 79         1.16  1.06-1.19  1.8 x
  generate 124M batch 8 bfloat16      441  eager 385, compiled 377       1.15  1.13-1.17  1.8 x
  generate 124M batch 32 bfloat16     575  eager 670, compiled 623       0.86  0.83-0.88  1.8 x
  generate 124M batch 1 int8          162  float32 112                   1.47  1.41-1.55  1.5 x
  generate 124M batch 8 int8          444  float32 415                   1.06  1.05-1.11  -
  speculative 345M batch 1 float32     65  plain 32                      1.97  1.90-1.99  -
  train 124M 1 x 1024 float32         434  eager 238, compiled 235       1.82  1.76-1.84  1.5 x
  train 124M 4 x 256 float32          517  eager 249, compiled 262       1.98  1.77-1.99  1.5 x
  train 124M 1 x 1024 bfloat16        577  eager 630, compiled 595       0.92  0.90-0.95  1.0 x
  train 124M 4 x 256 bfloat16         723  eager 719, compiled 752       0.96  0.95-1.00  1.0 x
  train tiny 12 x 64 float32       50,915  eager 28,677, compiled 29,304  1.74  1.71-2.01  1.7 x

The target of tiny is 1.7 x or 40,000 tokens/s; that of int8 is over float32. The bfloat16 rows miss
their targets; in float32 at batch 32 and int8 at batch 1 only some rounds reach theirs. Data: 38.6
to 49.1 million tokens/s. Loop: the host works 0.28 % of the time.
"""

import dataclasses
import json
import os
import sys
import time

if __name__ == "__main__":
  # The root in place of experiments/.
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import jax
import numpy as np
from absl import app, flags

try:
  import torch
  import transformers
except ImportError as error:
  sys.exit(f"error: {error}; this comparison also needs torch and transformers, see the docstring")

from experiments.benchmarks.data import bench_data
from experiments.benchmarks.evaluation import bench_evaluate
from experiments.benchmarks.generation import (
  N_NEW,
  PROMPT,
  bench_generate,
  bench_speculative,
  their_generate,
)
from experiments.benchmarks.loading import bench_loading
from experiments.benchmarks.machine import describe_machine, gemm_rates, instruction_set
from experiments.benchmarks.opponent import our_model, their_model
from experiments.benchmarks.rounds import HEADER, Row, random_tokens
from experiments.benchmarks.training import bench_tiny, bench_train, our_train, their_train
from gpt2_jax.decoding import generate
from gpt2_jax.files import atomic_write, check_folder, local_path
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import make_mesh
from gpt2_jax.sizes import model_config

PARTS = ("load", "generate", "speculative", "train", "tiny", "data", "evaluate", "lora")
_ONLY = flags.DEFINE_list("only", list(PARTS[:-2]), f"Parts to run, of {', '.join(PARTS)}.")
_ROUNDS = flags.DEFINE_integer(
  "rounds", 3, "Rounds in which the sides of a row take turns.", lower_bound=1
)
_LAMBADA = flags.DEFINE_string("lambada", None, "OpenAI's lambada_test.jsonl, for evaluate.")
_PASSAGES = flags.DEFINE_integer(
  "passages", 256, "Passages of it, evenly spaced; 0 is all.", lower_bound=0
)
_JSON = flags.DEFINE_string("json", None, "Also write every round's tokens/s to this file.")


def prove_same() -> dict:
  """Shows that the two models are the same, in float32.

  Returns the greatest difference of logits and of three training losses, and the share of greedy
  tokens that agree.
  """
  config = dataclasses.replace(model_config("124M"), dtype="float32")
  theirs = their_model(config)
  ours = our_model(theirs, config)

  # 1. Logits.
  tokens_BT = random_tokens(2, 65)
  with torch.no_grad():
    their_logits = theirs(torch.from_numpy(tokens_BT[:, :64]).long()).logits.numpy()
  our_logits = np.asarray(jax.jit(GPT2.__call__)(ours, tokens_BT[:, :64]))[..., : config.n_vocab]

  # 2. Greedy tokens.
  prompts = random_tokens(2, PROMPT, seed=1)
  our_tokens = [row.tokens for row in generate(ours, prompts.tolist(), N_NEW)]
  agree = np.mean(np.array(our_tokens) == their_generate(theirs, prompts).numpy())

  # 3. Losses of training.
  our_step = our_train(ours, tokens_BT)
  their_step = their_train(theirs, tokens_BT, "float32", compiled=False)
  losses = [abs(our_step() - their_step()) for _ in range(3)]

  max_delta_logit = float(np.abs(our_logits - their_logits).max())
  is_close = "yes" if max_delta_logit < 1e-4 else "NO"
  print(
    f"same model, float32: max |delta logit| {max_delta_logit:.1e} (below 1e-4: {is_close}); "
    f"{agree:.0%} of {2 * N_NEW} greedy tokens agree; "
    f"max |delta loss| over three training steps {max(losses):.1e}",
    flush=True,
  )
  return {
    "max_delta_logit": max_delta_logit,
    "greedy_agreement": float(agree),
    "max_delta_loss": max(losses),
  }


def run_parts(parts: set[str], rounds: int) -> tuple[list[Row], dict]:
  """Runs the parts on a mesh of one device; returns the rows of the table and other results."""
  rows, results = [], {}
  if {"train", "generate"} & parts:
    results |= prove_same()

  if "generate" in parts:
    part_rows, results["generate"] = bench_generate(rounds)
    rows += part_rows
  if "speculative" in parts:
    part_rows, results["speculative"] = bench_speculative(rounds)
    rows += part_rows
  if "train" in parts:
    rows += bench_train(rounds)
  if "tiny" in parts:
    rows += bench_tiny(rounds)
  if "lora" in parts:
    # Imported here: it needs peft as well.
    from experiments.benchmarks.lora import bench_lora

    rows += bench_lora(rounds)
  if "evaluate" in parts:
    part_rows, results["evaluate"] = bench_evaluate(rounds, _LAMBADA.value, _PASSAGES.value)
    rows += part_rows
  if "data" in parts:
    results |= bench_data(rounds)
  return rows, results


def main(argv: list[str]) -> None:
  parts = set(_ONLY.value)
  if argv[1:] or parts - set(PARTS):
    sys.exit(f"error: --only takes some of {', '.join(PARTS)}, and no other arguments; see --help")
  if "evaluate" in parts and _LAMBADA.value is None:
    sys.exit("error: --only=evaluate reads OpenAI's lambada_test.jsonl: give its path as --lambada")
  try:
    # An hour later is too late for a path that cannot be written, or is not there.
    json_path = _JSON.value and local_path(_JSON.value)
    if json_path:
      check_folder(json_path.parent)
    lambada = _LAMBADA.value and local_path(_LAMBADA.value)
    if lambada and not lambada.is_file():
      raise FileNotFoundError(f"{lambada} is not there; --lambada is OpenAI's lambada_test.jsonl")
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")

  # 1. Both sides may use all cores.
  threads = len(os.sched_getaffinity(0))
  torch.set_num_threads(threads)
  transformers.logging.set_verbosity_error()
  versions = (
    f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
  )
  date = time.strftime("%Y-%m-%d")
  print(f"{versions}; {threads} threads, {_ROUNDS.value} rounds, {date}", flush=True)

  # 2. What the machine can do. Loading has processes of its own, outside of the mesh.
  rates = gemm_rates(_ROUNDS.value)
  print(describe_machine(rates), flush=True)
  results = {"versions": versions, "threads": threads}
  results |= {"instruction_set": instruction_set(), "gemm_gflops": rates}
  if "load" in parts:
    results["load"] = bench_loading(_ROUNDS.value)
  with jax.set_mesh(make_mesh(1, 1, 1)):
    rows, more = run_parts(parts, _ROUNDS.value)
  results |= more

  # 3. The table, and every round for --json.
  if rows:
    print("\n".join([HEADER, *map(str, rows)]))
  if json_path:
    results["rows"] = [dataclasses.asdict(row) | {"ratios": row.ratios()} for row in rows]
    with atomic_write(json_path, overwrite=True) as partial:
      partial.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
  # malloc reads it when a process starts, so this process starts again.
  if "GLIBC_TUNABLES" not in os.environ:
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)
  jax.config.update("jax_platforms", "cpu")
  app.run(main)
