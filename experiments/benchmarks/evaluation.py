# SPDX-License-Identifier: Apache-2.0
"""Benchmark of evaluation: LAMBADA at 124M against lm-evaluation-harness's `hf` model.

Both sides have the same weights, batch size, dtype and requests.
"""

import dataclasses
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from experiments.benchmarks.opponent import our_model, their_model
from experiments.benchmarks.rounds import Row, alternate
from gpt2_jax.convert.pretrained import save_pretrained
from gpt2_jax.evaluate.loglikelihood import plan_on_mesh
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood
from gpt2_jax.model import ModelConfig
from gpt2_jax.sizes import model_config
from gpt2_jax.tokenizer import Gpt2Bpe

BATCH, TARGET = 32, 2.0
CHIPS = 8
CHIP_FLOPS = 197e12  # bfloat16 FLOP/s of a TPU v5e (Google's figure)
ASSUMED_MFU = 0.4  # the share of it that is assumed to be used


def last_word_pairs(path: str, passages: int) -> list[tuple[str, str]]:
  """Context and last word of so many LAMBADA passages, of all if 0.

  They are full batches of the file in the order of lengths, evenly spaced: what both sides compute
  of it.
  """
  with open(path, encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]

  if passages:
    lengths = map(len, Gpt2Bpe().encode_batch(texts))
    by_length = [text for _, text in sorted(zip(lengths, texts, strict=True))]
    n_batches = len(texts) // BATCH
    n_wanted = -(-passages // BATCH)
    texts = []
    for i in range(n_wanted):
      # The middle of the i-th of n_wanted equal parts.
      batch = (2 * i + 1) * n_batches // (2 * n_wanted)
      texts += by_length[batch * BATCH : (batch + 1) * BATCH]

  pairs = []
  for text in texts:
    begin = text.rindex(" ")
    pairs.append((text[:begin], text[begin:]))
  return pairs


def their_scores(path: str, pairs):
  """Makes the function that scores all pairs with lm-evaluation-harness, float32 on the CPU."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  theirs = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=BATCH)
  instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
  return lambda: theirs.loglikelihood(instances, disable_tqdm=True)


def with_cpu_time(call: Callable, seconds: list[float]) -> Callable:
  """CPU time of a call: wraps it so that each adds the CPU time of all its threads to `seconds`.

  What else runs on the machine disturbs that less than wall-clock time.
  """

  def run():
    begin = time.process_time()
    call()
    seconds.append(time.process_time() - begin)

  return run


def estimate_seconds(config: ModelConfig, lengths: list[int], scored: list[int]) -> float:
  """Estimated seconds for these passages on 8 chips: the FLOPs over what 8 chips are assumed to do.

  A token costs 2 FLOPs for each weight of the blocks, and 4 L D for each token that it attends to,
  half its passage on the mean. A scored one costs 2 V D more.
  """
  weights = 12 * config.n_layer * config.n_embd**2
  attended = 4 * config.n_layer * config.n_embd
  flops = 2 * config.n_vocab * config.n_embd * sum(scored)
  for n in lengths:
    flops += 2 * weights * n + attended * n * n / 2
  return flops / (CHIPS * CHIP_FLOPS * ASSUMED_MFU)


def bench_evaluate(rounds: int, path: str, passages: int) -> tuple[list[Row], dict]:
  """The row of the table, and other figures; `passages` of the file at `path`, all if 0."""
  # 1. Both sides, with the same weights.
  config = dataclasses.replace(model_config("124M"), dtype="float32")
  pairs = last_word_pairs(path, passages)
  requests = [Loglikelihood(*pair) for pair in pairs]
  model, tokenizer = our_model(their_model(config), config), Gpt2Bpe()
  scorer = Scorer(model, tokenizer, BATCH)
  with tempfile.TemporaryDirectory() as folder:
    save_pretrained(model, tokenizer, f"{folder}/124M")
    theirs = their_scores(f"{folder}/124M", pairs)

  # 2. The same results? This call compiles ours.
  compile_seconds = []

  def add_compile_time(event: str, seconds: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
      compile_seconds.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(add_compile_time)
  our_answers = scorer.answers(requests)
  max_delta, greedy_differ = compare_answers(our_answers, theirs())

  # 3. The time.
  cpu = {"ours": [], "lm_eval hf": []}
  sides = {
    "ours": with_cpu_time(lambda: scorer.answers(requests), cpu["ours"]),
    "lm_eval hf": with_cpu_time(theirs, cpu["lm_eval hf"]),
  }
  lengths = [len(tokenizer.encode(context + word)) - 1 for context, word in pairs]
  name = f"LAMBADA 124M batch {BATCH} float32"
  row = alternate(name, f"{TARGET} x", sum(lengths), sides, rounds, settle=0)

  # The first call of each side warms up.
  cpu_ratios = np.array(cpu["lm_eval hf"][1:]) / np.array(cpu["ours"][1:])
  figures = {
    "passages": len(pairs),
    "waste": plan_on_mesh(model, lengths, BATCH).padding_share,
    "max_delta_nats": max_delta,
    "greedy_differ": greedy_differ,
    "compile_s": sum(compile_seconds),
    "cpu_ratios": cpu_ratios.tolist(),
    "projected_s": estimate_seconds(config, lengths, [answer.tokens for answer in our_answers]),
  }
  print(describe(figures), flush=True)
  return [row], figures


def compare_answers(ours: list[Likelihood], theirs: list[tuple[float, bool]]) -> tuple[float, int]:
  """The largest difference in nats, and how many greedy flags differ."""
  max_delta = 0.0
  greedy_differ = 0
  for answer, (logprob, greedy) in zip(ours, theirs, strict=True):
    max_delta = max(max_delta, abs(answer.nats + logprob))
    greedy_differ += answer.greedy != greedy
  return max_delta, greedy_differ


def describe(figures: dict) -> str:
  """The figures in words."""
  ratios = figures["cpu_ratios"]
  return (
    f"LAMBADA, {figures['passages']:,} passages: max |delta nats| {figures['max_delta_nats']:.1e}, "
    f"greedy differs in {figures['greedy_differ']}; padding {figures['waste']:.1%}; compiling took "
    f"{figures['compile_s']:.1f} s, not in the ratio; in CPU time theirs takes "
    f"{statistics.median(ratios):.2f} x ours ({min(ratios):.2f}-{max(ratios):.2f}). An estimate, "
    f"not measured: {figures['projected_s']:.3f} s on {CHIPS} TPU v5e, at {ASSUMED_MFU:.0%} of "
    "197 TFLOP/s each"
  )
