# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import resource
import threading
import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from configs import gpt2
from gpt2_jax import distributed
from gpt2_jax.batch import Batch
from gpt2_jax.compat import get_mesh
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs import metrics as metrics_lib
from gpt2_jax.runs.metrics import (
  Log,
  Metrics,
  best_and_last,
  evaluations_since_best,
  flops_per_token,
  mfu,
  plot_losses,
)
from gpt2_jax.runs.setup import log_data
from gpt2_jax.runs.tensorboard import TAGS, TensorBoard
from gpt2_jax.sharding import concrete
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
    model = concrete(jax.eval_shape(lambda: GPT2(config, jax.random.key(0))), get_mesh())
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
  monkeypatch.setattr(distributed, "is_primary", lambda: False)
  metrics = Metrics(str(tmp_path), 0, 10)
  metrics.write(1, loss=1.0)
  metrics.show(1, loss=1.0)
  metrics.say("nothing")
  metrics.close()
  assert not list(tmp_path.iterdir())


DAMAGED = [
  b"5",
  b"[1, 2]",
  b'{"loss": 1.0}',
  b'{"step": "2", "loss": 1.0}',
  b'{"step": true}',
  b'{"step": 2, "loss": "\xff\xfe"}',
  b"[" * 100_000,
  b'{"step": 2, "loss": 1.\x00}',
]


@pytest.mark.parametrize("row", DAMAGED)
def test_a_damaged_line_costs_that_line_and_is_said(tmp_path, capsys, row):
  """The other lines stay as they are, byte for byte: for the next run, and for the picture."""
  first, last = b'{"loss":  4.0, "step": 1}\n', b'{"step": 3, "loss": 3.0}\n'
  (tmp_path / "metrics.jsonl").write_bytes(first + row + b"\n" + last)
  assert plot_losses(str(tmp_path))
  Metrics(str(tmp_path), 3, 10).close()
  assert (tmp_path / "metrics.jsonl").read_bytes() == first + last
  said = capsys.readouterr().err
  assert "metrics.jsonl: 1 damaged lines are left out, the first is line 2" in said


@pytest.mark.parametrize(
  "losses, waited", [([], 0), ([3.0], 0), ([3.0, 2.0], 0), ([2.0, 2.0, 2.5], 2), ([3, 1, 2, 1], 2)]
)
def test_patience_counts_the_evaluations_that_were_no_better_than_one_before(
  tmp_path, losses, waited
):
  """Lines of training in between do not count; equal is no better."""
  rows = []
  for step, loss in enumerate(losses):
    rows += [{"step": step, "val_loss": float(loss)}, {"step": step + 1, "loss": 1.0}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert evaluations_since_best(str(tmp_path)) == waited


@pytest.mark.parametrize("windows, is_few", [(400, True), (4000, False)])
def test_a_run_over_a_few_batches_is_told_that_it_may_overfit(windows, is_few):
  """Ten batches that are seen ten times; not where the steps see a part of the data."""
  said, config = [], gpt2.get_config()
  config.update(batch_size=40, steps=100)
  log_data(types.SimpleNamespace(say=said.append), config, windows, 10)
  assert f"data: {windows:,} windows, {4000 / windows:.2f} epochs in 100 steps" in said[0]
  assert (len(said) == 2 and "10.0 batches, and each is seen 10 times" in said[1]) is is_few


def test_a_run_that_is_nothing_but_nan_has_a_picture_without_a_warning(tmp_path):
  rows = ['{"step": 1, "loss": null}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": "x"}']
  (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    plot_losses(str(tmp_path))
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@contextlib.contextmanager
def largest_file(nbytes: int):
  """A disk on which no file can be larger; Python raises OSError as on a full one."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensorboard_on_a_full_disk_is_given_up_once_and_starts_no_thread(tmp_path):
  """The queue of a writer that is dead must never fill: there is none."""
  said, threads = [], threading.active_count()
  with largest_file(2000):
    board = TensorBoard(str(tmp_path / "tensorboard"), 0, said.append)
    for step in range(1000):
      board.write(step, {"loss": 1.0, "grad_norm": float("nan")})
      board.flush()
    board.close()
  assert len(said) == 1 and "File too large" in said[0] and "the run goes on" in said[0]
  assert threading.active_count() == threads


def read_events(folder):
  from tensorboardX.proto.event_pb2 import Event

  (file,) = folder.iterdir()
  content, events = file.read_bytes(), []
  while content:  # a record: length, its checksum, the event, its checksum
    length = int.from_bytes(content[:8], "little")
    events.append(Event.FromString(content[12 : 12 + length]))
    content = content[16 + length :]
  return events


def test_tensorboard_reads_back_what_was_written(tmp_path):
  board = TensorBoard(str(tmp_path), 4, print)
  board.write(5, {"loss": 2.5, "batch_hash": 7, "skips": 0, "accuracy": 0.5, "val_loss": 3.0})
  board.write_text(6, "eval/sample", "# no title\n<b>")
  board.close()
  version, start, layout, *scalars, text = read_events(tmp_path)
  assert version.file_version == "brain.Event:2"
  assert start.session_log.status == 1 and start.step == 5  # START: purges from there on
  values = [
    (event.step, *((v.tag, v.simple_value) for v in event.summary.value)) for event in scalars
  ]
  assert values == [(5, ("train/loss", 2.5)), (5, ("train/accuracy", 0.5)), (5, ("eval/loss", 3.0))]
  (value,) = text.summary.value
  assert (
    value.tag == "eval/sample/text_summary" and value.metadata.plugin_data.plugin_name == "text"
  )
  assert value.tensor.string_val == [b"    # no title\n    <b>"]  # not as Markdown


def test_one_chart_of_tensorboard_has_both_losses(tmp_path):
  from tensorboardX.proto.layout_pb2 import Layout

  TensorBoard(str(tmp_path), 0, print).close()
  (value,) = read_events(tmp_path)[2].summary.value
  assert value.tag == "custom_scalars__config__"
  (category,) = Layout.FromString(value.tensor.string_val[0]).category
  assert [list(chart.multiline.tag) for chart in category.chart] == [["train/loss", "eval/loss"]]


def test_the_losses_are_the_first_groups_of_tensorboard():
  groups = sorted({tag.split("/")[0] for tag in TAGS.values()})
  assert groups[:2] == ["eval", "train"] and TAGS["loss"] == "train/loss"


def test_best_and_last_validation_loss_of_an_old_file_and_of_none(tmp_path):
  rows = [
    '{"step": 1, "loss": 1.0}',
    '{"step": 2, "val_loss": 3.5}',
    '{"step": 4, "val_loss": 3.0}',
  ]
  rows += ["torn", '{"step": 6, "val_loss": null}', '{"step": 8, "val_loss": 3.25}']
  (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
  assert best_and_last(str(tmp_path)) == ((4, 3.0), (8, 3.25))
  (tmp_path / "metrics.jsonl").write_text(rows[0] + "\n")
  assert best_and_last(str(tmp_path)) is None


def test_metrics_on_a_full_disk_end_the_run_in_one_line_and_keep_the_lines(tmp_path):
  metrics = Metrics(str(tmp_path), 0, 10**6)
  with (
    largest_file(4000),
    pytest.raises(OSError, match=r"metrics.jsonl cannot be written .*File too large.*make room"),
  ):
    for step in range(1, 1000):
      metrics.write(step, loss=1.0)
  metrics.close()
  assert [line["step"] for line in lines(tmp_path)] == list(range(1, step + 1))


@pytest.mark.parametrize(
  "steps, skips, line",
  [
    ([], [1, 2], "no checkpoint was saved before;"),
    ([40, 20], [0, 1, 2], "checkpoint 40 is good;"),
    ([40, 20], [1, 2], "no update after checkpoint 40 was finite: move it away to resume from"),
  ],
)
def test_the_line_of_a_run_that_diverged_vouches_only_for_what_it_knows(
  tmp_path, steps, skips, line
):
  config = gpt2.get_config()
  config.update(max_skips=2, log_every=1)
  metrics = Metrics(str(tmp_path), 40, 100)
  checkpoints = types.SimpleNamespace(steps=lambda: steps)
  log = Log(metrics, config, SIZES["117M"], checkpoints)
  log.start_clock()
  stacked = {"loss": jnp.full(len(skips), 3.0), "skips": jnp.array(skips)}
  with pytest.raises(FloatingPointError, match=line) as raised:
    log.read(40 + len(skips), stacked)
  assert "2 updates in a row were not finite" in str(raised.value) and len(str(raised.value)) < 400
  metrics.close()


def test_the_mean_of_the_picture_is_over_what_came_before():
  assert metrics_lib._running_mean([4.0, 2.0, 3.0, 7.0], 2).tolist() == [4.0, 3.0, 2.5, 5.0]
  assert metrics_lib._running_mean([4.0, 2.0], 1).tolist() == [4.0, 2.0]
