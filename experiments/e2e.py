# SPDX-License-Identifier: Apache-2.0
"""E2E data-to-text: prepares the examples, and scores a model's texts with BLEU.

COMMAND   python experiments/e2e.py --prepare=data/e2e/train.txt --out=data/e2e_examples/train.jsonl
          python experiments/e2e.py --model=runs/e2e_lora --test=data/e2e/test.txt
HARDWARE  to score: one device that holds the model; GPT-2 M takes minutes on a GPU or TPU
EXPECT    nothing yet: nobody has run GPT-2 M with this code. Hu et al. 2021 (table 3) report BLEU
          68.2 for all weights of GPT-2 M, and 70.4 +- 0.1 for LoRA of rank 4

The files are those of microsoft/LoRA (examples/NLG/data/e2e), a line `slots||text` each. As there,
an example is the slots, <|endoftext|>, a space and the text, <|endoftext|>; a text is decoded with
10 beams, a length penalty of 0.8 and at most 64 tokens. Two things differ: their decoding also bans
repeated 4-grams, and their BLEU is the E2E challenge's script. Ours is sacrebleu's over lower case,
which cuts words as that script's source (mteval-v13a) does.
"""

import json
import os
import sys

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from absl import flags
from tqdm import tqdm

from experiments.e2e_files import bleu, read_pairs, references, to_examples
from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, check_folder, local_path

_PREPARE = flags.DEFINE_string("prepare", None, "A file of `slots||text` lines to prepare.")
_OUT = flags.DEFINE_string("out", None, "What --prepare writes, or with --model its texts.")
_MODEL = flags.DEFINE_string("model", None, "A model to score: a name, a path or a workdir.")
_TEST = flags.DEFINE_string("test", None, "The file of `slots||text` lines to score it on.")
_LIMIT = flags.DEFINE_integer("limit", 0, "First inputs that are scored; 0 is all.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Inputs decoded at once.", lower_bound=1)

_BEAMS = flags.DEFINE_integer("beams", 10, "Beams of the search.", lower_bound=1)
_N_NEW = flags.DEFINE_integer("n_new", 64, "Tokens of a text, at most.", lower_bound=1)

LENGTH_PENALTY = 0.8


def decode_texts(model, tokenizer, inputs: list[str]) -> list[str]:
  """The model's text for each input, by beam search."""
  from gpt2_jax.decoding.beam import beam_search

  texts = []
  for first in tqdm(range(0, len(inputs), _BATCH.value), unit="batch", disable=None):
    batch = inputs[first : first + _BATCH.value]
    prompts = [[*tokenizer.encode(slots), tokenizer.eot] for slots in batch]
    rows = beam_search(
      model,
      prompts,
      _N_NEW.value,
      beams=_BEAMS.value,
      length_penalty=LENGTH_PENALTY,
      eot=tokenizer.eot,
    )
    texts += [tokenizer.decode(best.tokens).strip() for (best,) in rows]
  return texts


def score_model() -> str:
  """Decodes a text for each input of --test, and scores them all."""
  from gpt2_jax import load_pretrained

  texts_of = references(read_pairs(local_path(_TEST.value)))
  inputs = list(texts_of)[: _LIMIT.value or None]
  model, tokenizer = load_pretrained(_MODEL.value)
  texts = decode_texts(model, tokenizer, inputs)

  if _OUT.value:
    lines = [
      json.dumps({"slots": slots, "text": x}) for slots, x in zip(inputs, texts, strict=True)
    ]
    with atomic_write(local_path(_OUT.value)) as partial:
      partial.write_text("\n".join(lines) + "\n")
  return bleu(texts, [texts_of[slots] for slots in inputs])


def main() -> None:
  if _PREPARE.value and _OUT.value:
    out = local_path(_OUT.value)
    check_folder(out.parent)
    pairs = read_pairs(local_path(_PREPARE.value))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial:
      partial.write_text(to_examples(pairs))
    print(f"{out}: {len(pairs):,} examples of {len(references(pairs)):,} inputs")
  elif _MODEL.value and _TEST.value:
    print(score_model())
  else:
    raise ValueError("give --prepare and --out, or --model and --test")


if __name__ == "__main__":
  shell.run(main, __doc__)
