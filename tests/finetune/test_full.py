# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning from a Hugging Face folder: a whole run against a torch loop."""

import json

import jax
import numpy as np
import pytest

from configs import finetune
from gpt2_jax import train
from gpt2_jax.data import TokenStore, encode_corpus
from gpt2_jax.schedules import cosine
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Characters
from tests.finetune.conftest import N_VOCAB

STEPS, RATE = 20, 1e-2


def torch_losses(model, store) -> list[float]:
  """The loop as nanoGPT has it: AdamW with decay on matrices, clipping, warmup and a cosine."""
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)
  matrices = [p for p in model.parameters() if p.ndim > 1]
  others = [p for p in model.parameters() if p.ndim == 1]
  groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
  rate = cosine(RATE, STEPS, 4, 0.0)

  losses = []
  batches = store.batches(16, 4, 0)
  for step in range(STEPS):
    rows = torch.from_numpy(batches.rows(step, 0, 4)).long()
    logits = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, N_VOCAB), rows[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
      group["lr"] = float(rate(step))
    optimizer.step()
    losses.append(loss.item())
  return losses


def test_twenty_steps_of_a_run_equal_a_torch_loop(base_folder, their_base, monkeypatch, tmp_path):
  """From the same weights, over the same batches, with the recipe of configs/finetune.py."""
  monkeypatch.setattr(
    train, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:1])
  )
  tokenizer = Characters("".join(map(chr, range(65, 65 + N_VOCAB))))
  (tmp_path / "characters.json").write_text(json.dumps(tokenizer.to_json()))
  ids = np.random.default_rng(3).integers(0, N_VOCAB, 1500) // 3
  text = "".join(chr(65 + i) for i in ids)
  encode_corpus([text], tokenizer, str(tmp_path / "store"), {"made": "for a test"}, processes=1)

  config = finetune.get_config("full")
  config.init_from = str(base_folder)
  config.data.update(
    train=str(tmp_path / "store"),
    validation=str(tmp_path / "store"),
    tokenizer=str(tmp_path / "characters.json"),
  )
  config.update(steps=STEPS, batch_size=4, warmup_steps=4, learning_rate=RATE, log_every=1)
  config.model.dtype = "float32"
  config.update(eval_every=100, save_every=100, eval_windows=4)
  train.run(config, str(tmp_path / "run"))

  lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
  losses = [line["loss"] for line in lines if "loss" in line]
  expected = torch_losses(their_base, TokenStore.open(str(tmp_path / "store")))
  np.testing.assert_allclose(losses, expected, atol=1e-4)
  assert losses[0] - losses[-1] > 0.5
