# SPDX-License-Identifier: Apache-2.0
"""LAMBADA at 124M beside lm-evaluation-harness's `hf` model: the same weights, batch size, dtype and requests."""

import dataclasses
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable

import jax

from experiments.benchmarks.opponent import our_model, their_model
from experiments.benchmarks.rounds import Row, alternate
from gpt2_jax.evaluate.likelihood import planned_for
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Continuation
from gpt2_jax.model import ModelConfig, model_config
from gpt2_jax.pretrained import save_pretrained
from gpt2_jax.tokenizer import Gpt2Bpe

BATCH, TARGET = 32, 2.0
CHIP, USED = 197e12, 0.4  # bfloat16 FLOP/s of a TPU v5e (Google's figure), and the share of it that is assumed


def requests(path: str, passages: int) -> list[tuple[str, str]]:
  """Context and last word of so many passages, of all if 0.

  They are whole batches of the file in the order of lengths, evenly spaced: what both sides compute of it.
  """
  with open(path, encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
  if passages:
    texts = [text for _, text in sorted(zip(map(len, Gpt2Bpe().encode_batch(texts)), texts, strict=True))]
    batches = [texts[i : i + BATCH] for i in range(0, len(texts) - BATCH + 1, BATCH)]
    wanted = -(-passages // BATCH)
    texts = [text for i in range(wanted) for text in batches[(2 * i + 1) * len(batches) // (2 * wanted)]]
  return [(text[: text.rindex(" ")], text[text.rindex(" ") :]) for text in texts]


def their_scores(path: str, pairs):
  """Makes the function that scores all pairs through lm-evaluation-harness, in float32 on the CPU."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  theirs = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=BATCH)
  instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
  return lambda: theirs.loglikelihood(instances, disable_tqdm=True)


def clocked(call: Callable, seconds: list[float]) -> Callable:
  """The call, which also notes the CPU time of all its threads: what others do on the machine disturbs that less."""

  def run():
    begin = time.process_time()
    call()
    seconds.append(time.process_time() - begin)

  return run


def projection(config: ModelConfig, lengths: list[int], scored: list[int]) -> float:
  """Seconds for these passages on 8 chips: an estimate, the FLOPs over what 8 chips are assumed to do.

  A token costs 2 FLOPs for each weight of the blocks and 4 L D for each token that it sees (half its passage, on the
  mean); a scored one 2 V D more.
  """
  weights, seen = 12 * config.n_layer * config.n_embd**2, 4 * config.n_layer * config.n_embd
  flops = sum(2 * weights * n + seen * n * n / 2 for n in lengths) + 2 * config.n_vocab * config.n_embd * sum(scored)
  return flops / (8 * CHIP * USED)


def bench_evaluate(rounds: int, path: str, passages: int) -> tuple[list[Row], dict]:
  """The row, and what else was found; `passages` of the file at `path`, all if 0."""
  config = dataclasses.replace(model_config("124M"), dtype="float32")
  pairs = requests(path, passages)
  asked = [Continuation(*pair) for pair in pairs]
  model, tokenizer = our_model(their_model(config), config), Gpt2Bpe()
  scorer = Scorer(model, tokenizer, BATCH)
  with tempfile.TemporaryDirectory() as folder:
    save_pretrained(model, tokenizer, f"{folder}/124M")
    theirs = their_scores(f"{folder}/124M", pairs)
  compiling = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiling.append(seconds) if event.startswith("/jax/core/compile/") else None
  )
  ours = scorer.answers(asked)
  compared = list(zip(ours, theirs(), strict=True))
  cpu = {"ours": [], "lm_eval hf": []}
  sides = {
    "ours": clocked(lambda: scorer.answers(asked), cpu["ours"]),
    "lm_eval hf": clocked(theirs, cpu["lm_eval hf"]),
  }
  lengths = [len(tokenizer.encode(context + word)) - 1 for context, word in pairs]
  row = alternate(f"LAMBADA 124M batch {BATCH} float32", f"{TARGET} x", sum(lengths), sides, rounds, settle=0)
  found = {
    "passages": len(pairs),
    "waste": planned_for(model, lengths, BATCH).waste,
    "max_delta_nats": max(abs(mine.nats + logp) for mine, (logp, _) in compared),
    "greedy_differ": sum(mine.greedy != greedy for mine, (_, greedy) in compared),
    "compile_s": sum(compiling),
    "cpu_ratios": [hf / mine for mine, hf in zip(*cpu.values(), strict=True)][1:],  # the first call warms up
    "projected_s": projection(config, lengths, [answer.tokens for answer in ours]),
  }
  ratios = found["cpu_ratios"]
  print(
    f"LAMBADA, {found['passages']:,} passages: max |delta nats| {found['max_delta_nats']:.1e}, greedy differs in "
    f"{found['greedy_differ']}; padding {found['waste']:.1%}; compiling took {found['compile_s']:.1f} s, not in the "
    f"ratio; in CPU time theirs takes {statistics.median(ratios):.2f} x ours ({min(ratios):.2f}-{max(ratios):.2f}). "
    f"An estimate, not measured: {found['projected_s']:.3f} s on 8 TPU v5e, at {USED:.0%} of 197 TFLOP/s each",
    flush=True,
  )
  return [row], found
