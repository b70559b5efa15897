# SPDX-License-Identifier: Apache-2.0
"""Samples during training: at each evaluation the model continues the first validation window."""

import jax

from gpt2_jax.decoding.generate import generate
from gpt2_jax.model import GPT2
from gpt2_jax.runs.setup import Setup

# At most, and at most a quarter of the context.
PROMPT_TOKENS = 16

# Characters of the line that the terminal gets; boards get the text as it is.
LINE_LIMIT = 200


def sample_continuation(setup: Setup, model: GPT2) -> tuple[str, str]:
  """The prompt from the validation store, and the model's text after it. The seed is fixed.

  Raises FloatingPointError where a logit is not finite.
  """
  n_ctx = model.config.n_ctx
  length = max(1, min(PROMPT_TOKENS, n_ctx // 4))
  prompt = setup.validation.sample_prompt(length)
  n_new = min(setup.config.sample_tokens, n_ctx - len(prompt))

  (completion,) = generate(model, [prompt], n_new, temperature=0.8, top_k=40, seed=0)
  decode = setup.tokenizer.decode
  return decode(prompt), decode(completion.tokens)


def log_sample(setup: Setup, model: GPT2, step: int):
  """Shows a sample of `sample_tokens` tokens on the terminal and the boards; 0 is none.

  A run of several processes has none: no process sees all rows.
  """
  if not setup.config.sample_tokens or jax.process_count() > 1 or model.config.n_ctx == 1:
    return

  # The loss has said already that such a model is broken.
  try:
    prompt, text = sample_continuation(setup, model)
  except FloatingPointError as error:
    setup.metrics.say(f"step {step}: no sample, {error}")
    return
  setup.metrics.write_text(step, "eval/sample", f"{prompt}|{text}")
  setup.metrics.say(f"step {step}: sample {(prompt + '|' + text)[:LINE_LIMIT]!r}")
