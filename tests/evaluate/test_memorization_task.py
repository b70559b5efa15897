# SPDX-License-Identifier: Apache-2.0
"""The task `memorization`: greedy decoding itself, and passages that the training data have."""

import json

import numpy as np
import pytest

from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.decoding import generate
from gpt2_jax.evaluate import runner, sources, tasks
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import EOT, Characters, HuggingFace, byte_alphabet

ALPHABET = " .abcdefghijklmnopqrstuvwxyz"
TINY = ModelConfig(n_vocab=28, n_ctx=64, n_embd=16, n_head=4, n_layer=2, dtype="float32")


@pytest.fixture(scope="module")
def model(mesh, parameters, place):
  arrays = parameters(TINY, scale=0.5)
  with mesh(1, 1, 1):
    return place(TINY, arrays | {"wte": 4 * arrays["wte"]})


def test_what_greedy_decoding_writes_is_memorized(model):
  """And up to the token where it would have written another."""
  tokenizer = Characters(ALPHABET)
  prompts = np.random.default_rng(0).integers(0, 28, (4, 32)).tolist()
  rows, wanted = [], [32, 0, 11, 31]
  completions = generate(model, prompts, 32)
  for prompt, matched, completion in zip(prompts, wanted, completions, strict=True):
    tokens = completion.tokens
    if matched < 32:
      tokens[matched] = (tokens[matched] + 1) % 28
    rows.append({"text": tokenizer.decode(prompt + tokens)})
  # Beyond k + n tokens nothing counts, and with fewer nothing is scored.
  rows[0]["text"] += "abc abc abc"
  rows.append({"text": "too short"})

  task = tasks.get("memorization", "k32")
  items = runner.run(task, rows, Scorer(model, tokenizer))
  assert items["matched"].tolist() == [*wanted, 0]
  assert items["exact"].tolist() == [1, 0, 0, 0, 0]
  totals = runner.totals(items)
  assert task.metrics["exact_match"].value(totals) == 25
  assert task.metrics["matched_tokens"].value(totals) == sum(wanted) / 4


@pytest.mark.parametrize("kind", ["txt", "jsonl", "store"])
def test_passages_are_parts_of_one_training_text_in_its_tokens(tmp_path, kind):
  """Of files and of a store; none reaches over the end of a document."""
  alphabet = [*byte_alphabet().values(), EOT]
  tokenizer = HuggingFace.from_merges({token: i for i, token in enumerate(alphabet)}, [])
  words = np.random.default_rng(0).choice(["the", "cat", "sat", "éß"], 3000)
  documents = [" ".join(words[:2000]), "short", " ".join(words[2000:])]
  folder = tmp_path / "memorization"
  if kind == "store":
    encode_corpus(documents, tokenizer, str(folder), {}, processes=1)
  else:
    folder.mkdir()
    lines = [json.dumps({"text": document}) for document in documents]
    content = documents[0] if kind == "txt" else "\n".join(lines)
    (folder / f"a.{kind}").write_text(content)

  rows = sources.load(tasks.get("memorization", "k32").source, str(tmp_path))
  assert len(rows) > 5
  for row in rows:
    text = row["text"]
    assert len(tokenizer.encode(text)) >= 64
    assert text[0] == " " and any(text.strip("\ufffd") in document for document in documents)
