# SPDX-License-Identifier: Apache-2.0
"""Continues prompts with a model that launch/train.py trained.

python launch/sample.py --workdir=runs/117M --prompt='Once upon a time' --n_new=100 --temperature=0.8 --top_k=40
"""

import os
import sys

if __name__ == "__main__":  # the root in place of launch/, whose tokenize.py would hide the standard library's
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import jax
from absl import flags

from gpt2_jax.checkpoint import load
from gpt2_jax.generate import Greedy, Sample, Temperature, TopK, TopP, generate
from gpt2_jax.sharding import make_mesh
from launch import shell

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_STEP = flags.DEFINE_string("step", "latest", "Which checkpoint: latest, best (least validation loss), or a step.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue; may be repeated. Default: <|endoftext|>.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Continuations of each prompt.", lower_bound=1)
_N_NEW = flags.DEFINE_integer("n_new", 100, "Tokens to add, at most.", lower_bound=1)
_GREEDY = flags.DEFINE_bool("greedy", False, "Take the likeliest token each time.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Below 1 is surer, above 1 is wilder.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k likeliest tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens that hold this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute dtype (default: the run's).")
_DATA = flags.DEFINE_integer("mesh_data", -1, "Size of the data axis; -1 takes the devices that are left.")
_MODEL = flags.DEFINE_integer("mesh_model", 1, "Size of the model axis.")


def sampler():
  """The sampler of the flags."""
  filters = [Temperature(_TEMPERATURE.value)]
  filters += [TopK(_TOP_K.value)] if _TOP_K.value is not None else []
  filters += [TopP(_TOP_P.value)] if _TOP_P.value is not None else []
  return Greedy() if _GREEDY.value else Sample(tuple(filters))


def main() -> None:
  with jax.set_mesh(make_mesh(1, _DATA.value, _MODEL.value)):
    model, tokenizer = load(_WORKDIR.value, _STEP.value, _DTYPE.value)
    texts = [text for text in _PROMPT.value for _ in range(_SAMPLES.value)]
    prompts = [tokenizer.encode(text) for text in texts]
    if not prompts:
      if tokenizer.eot is None:
        raise ValueError("this tokenizer has no <|endoftext|> to begin with; give a --prompt")
      texts, prompts = [""] * _SAMPLES.value, [[tokenizer.eot]] * _SAMPLES.value
    continuations = generate(model, prompts, _N_NEW.value, sampler(), _SEED.value, tokenizer.eot)
  for text, tokens in zip(texts, continuations, strict=True):
    print("-" * 80)
    print(text + tokenizer.decode(tokens))


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir"])
  shell.run(main)
