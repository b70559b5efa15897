# SPDX-License-Identifier: Apache-2.0
import json

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax.batch import Batch
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs import metrics as metrics_lib
from gpt2_jax.runs.metrics import Metrics, flops_per_token, mfu
from gpt2_jax.sizes import SIZES


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_flops_per_token_by_hand():
  """117M: 84,934,656 in the blocks' matrices, 38,597,376 in the head; attention 12 * 12 * 1024 *
  768."""
  assert (
    flops_per_token(SIZES["117M"]) == 6 * (84_934_656 + 38_597_376) + 113_246_208 == 854_438_400
  )


def test_flops_per_token_are_those_of_an_unrolled_compile(mesh):
  """XLA counts a scanned layer once, so the layers are unrolled. It counts one product of attention
  more, the scores again in the backward pass, a sixth of what attention takes, and elementwise
  operations, below 1 % of it all."""
  config = ModelConfig(
    n_vocab=2048, n_ctx=128, n_embd=256, n_head=4, n_layer=2, unroll=2, dtype="float32"
  )
  with mesh(1, 1, 1):
    model = jax.eval_shape(lambda: GPT2(config, jax.random.key(0)))
    tokens_BT = jax.ShapeDtypeStruct((2, 129), jnp.int32)
    compiled = (
      jax.jit(jax.value_and_grad(lambda m, t: mean_loss(NextToken(), m, Batch(t))[0]))
      .lower(model, tokens_BT)
      .compile()
    )
  attention = 12 * 2 * 128 * 256 / flops_per_token(config)
  counted = compiled.cost_analysis()["flops"] / (2 * 128 * flops_per_token(config))
  assert 1 + attention / 6 <= counted < 1 + attention / 6 + 0.01


def test_mfu_is_unknown_on_a_cpu():
  assert mfu(SIZES["117M"], 1e6) is None


def test_mfu_counts_every_device(monkeypatch):
  monkeypatch.setattr(metrics_lib, "peak_flops", lambda kind: 1e12)
  assert mfu(SIZES["117M"], 1000.0) == pytest.approx(854_438_400 * 1000 / 8e12)


def test_a_line_for_each_write(tmp_path):
  metrics = Metrics(str(tmp_path), 0, 10)
  metrics.write(1, loss=2.5, skips=0, mfu=None)
  metrics.write(2, loss=float("nan"), grad_norm=float("inf"))
  assert lines(tmp_path)[0] == {"step": 1, "loss": 2.5, "skips": 0}, (
    "a kill must not lose what is written"
  )
  metrics.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  assert "NaN" not in text and "Infinity" not in text  # neither is JSON
  assert lines(tmp_path)[1] == {"step": 2, "loss": None, "grad_norm": None}


def test_going_on_keeps_whole_lines_up_to_the_step(tmp_path):
  whole = ['{"step": 1, "loss": 4.0}', '{"step": 2, "loss": 3.0}', '{"step": 2, "val_loss": 3.5}']
  torn = ['{"step": 3, "lo', '{"st{"step": 2, "loss": 3.0}', "", "{", "\x00\x00"]
  later = ['{"step": 4, "loss": 1.0}', '{"step": 3, "loss": 2.0}']
  (tmp_path / "metrics.jsonl").write_text(
    "\n".join(torn + whole[:2] + later + whole[2:] + ['{"step": 1'])
  )
  metrics = Metrics(str(tmp_path), 2, 10)
  metrics.write(3, loss=2.0)
  metrics.close()
  assert lines(tmp_path) == [json.loads(line) for line in whole] + [{"step": 3, "loss": 2.0}]
  assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]


def test_a_fresh_run_has_an_empty_file(tmp_path):
  Metrics(str(tmp_path), 0, 10).close()
  assert lines(tmp_path) == []


def test_say_and_show_go_to_the_terminal_not_to_the_file(tmp_path, capsys):
  metrics = Metrics(str(tmp_path), 0, 10)
  metrics.show(4, loss=2.0, mfu=None)
  assert metrics.bar.n == 4
  metrics.say("all is well")
  metrics.close()
  said = capsys.readouterr()
  assert "all is well\n" in said.err and not said.out
  assert lines(tmp_path) == []


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  metrics = Metrics(str(tmp_path), 0, 10)
  metrics.write(1, loss=1.0)
  metrics.show(1, loss=1.0)
  metrics.say("nothing")
  metrics.close()
  assert not list(tmp_path.iterdir())
