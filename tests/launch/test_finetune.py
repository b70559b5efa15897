# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on two processes, from a checkpoint in a bucket: each reads its shards."""

import json

import jax
import numpy as np

from gpt2_jax.convert import pretrained
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.data import TokenStore, encode_corpus
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.runs.checkpoint import Checkpoints
from gpt2_jax.runs.validation import validation_loss
from gpt2_jax.tokenizer import train_characters
from tests.launch.test_distributed import Run

TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(3000))
BASE = ModelConfig(23, 8, 32, 2, 1, dtype="float32")
FLAGS = (
  "--config.adapter.kind=lora",
  "--config.steps=2",
  "--config.warmup_steps=1",
  "--config.eval_every=2",
  "--config.save_every=2",
  "--config.learning_rate=0.01",
)


def test_two_processes_start_from_a_checkpoint_in_a_bucket(
  bucket, mesh, parameters, place, tmp_path
):
  """With LoRA: at the loss of the checkpoint, whose SHA-256 is that of its weights anywhere; the
  run loads with its base."""
  tokenizer = train_characters([TEXT])
  (tmp_path / "characters.json").write_text(json.dumps(tokenizer.to_json()))
  for name, text in (("train", TEXT), ("validation", TEXT[:257])):
    encode_corpus([text], tokenizer, str(tmp_path / name), {"made": "for a test"}, processes=1)
  with mesh(1, 1, 1):
    model = place(BASE, parameters(BASE))
    base = from_model(model, tokenizer)
    pretrained.write(base, "gs://bucket/base", "orbax")
    store = TokenStore.open(str(tmp_path / "validation"))
    loss = validation_loss(model, NextToken(), store, 8, 0)

  run = Run(tmp_path, "gs://bucket/run", 2, 1, *FLAGS, "--config.init_from=gs://bucket/base@latest")
  for status, err in run.end():
    assert status == 0, err

  lines = list(map(json.loads, bucket.objects["run/metrics.jsonl"].decode().splitlines()))
  assert [line["step"] for line in lines] == [0, 1, 2, 2]
  assert abs(lines[0]["val_loss"] - loss) < 1e-6 * loss and lines[3]["val_loss"] < loss
  start = Checkpoints("gs://bucket/run", create=False).metadata(2)["init_from"]
  assert start == {"name": "gs://bucket/base@0", "sha256": weights_sha256(base)}

  adapted, _ = pretrained.load_pretrained("gs://bucket/run")
  arrays = {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(adapted)}
  assert np.asarray(arrays["h.attn.c_attn.w.lora_b"]).any()
