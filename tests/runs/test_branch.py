# SPDX-License-Identifier: Apache-2.0
"""Branches: cooldowns from one trunk, which stays as it is, bit for bit; and what cannot branch."""

import hashlib
import json
import math
import shutil

import jax
import pytest

from configs import gpt2
from gpt2_jax import train
from gpt2_jax.data import TokenStore, encode_corpus
from gpt2_jax.loss import NextToken
from gpt2_jax.runs.checkpoint import Checkpoints, load
from gpt2_jax.runs.validation import validation_loss
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters

TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(3000))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  tokenizer = train_characters([TEXT])
  (folder / "characters.json").write_text(json.dumps(tokenizer.to_json()))
  for name, text in (("train", TEXT), ("validation", TEXT[1000:1300])):
    encode_corpus([text], tokenizer, str(folder / name), {"made": "for a test"}, processes=1)
  return folder


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """A run's mesh is over one of the eight."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(train, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=devices))
    yield


def config_for(data, **knobs):
  """Muon and a z-loss, so that a branch has all kinds of state."""
  config = gpt2.get_config()
  config.model.update(n_vocab=23, n_ctx=8, n_embd=16, n_head=2, n_layer=2, dtype="float32")
  config.model.update(resid_pdrop=0.1, use_bias=False)
  for name in ("train", "validation"):
    config.data[name] = str(data / name)
  config.data.tokenizer = str(data / "characters.json")
  config.mesh.update(replica=1, data=1, model=1)
  config.update(steps=16, batch_size=8, learning_rate=1e-2, warmup_steps=4, log_every=1)
  config.update(eval_every=8, eval_windows=0, save_every=4, keep=9, final_lr_fraction=0.0)
  config.update(schedule="wsd", decay_steps=4, optimizer="muon", z_loss=1e-3)
  config.update(knobs)
  return config


def lines(workdir, name) -> dict:
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row[name] for row in rows if name in row}


def files(folder) -> dict:
  contents = {}
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      contents[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
  return contents


@pytest.fixture(scope="module")
def trunk(data, tmp_path_factory):
  """A run of 16 steps that decays in the last four; its checkpoint 8 is in the stable part."""
  workdir = tmp_path_factory.mktemp("trunk")
  train.run(config_for(data), str(workdir))
  return workdir


NAMES = ("loss", "z_loss", "learning_rate", "batch_hash", "grad_norm", "tokens_seen")


def test_two_branches_of_one_trunk(trunk, data, tmp_path, capfd):
  """One decays at once. The other has the trunk's own config: it is the rest of the trunk, bit for
  bit, as if nothing had come between. The trunk's files stay."""
  before = files(trunk)
  early = config_for(data, steps=12, branch_from=f"{trunk}@8", eval_every=4)
  train.run(early, str(tmp_path / "early"))
  assert f"branches from {trunk}@8" in capfd.readouterr().err
  same = config_for(data, branch_from=f"{trunk}@8")
  train.run(same, str(tmp_path / "same"))
  assert files(trunk) == before

  for name in NAMES:
    expected = {step: x for step, x in lines(trunk, name).items() if step > 8}
    assert lines(tmp_path / "same", name) == expected, name
  sums = [Checkpoints(str(x), create=False).sums(16) for x in (trunk, tmp_path / "same")]
  assert sums[0] == sums[1] and "muon.mu.h.mlp.c_fc.w" in sums[0]

  # The data go on, and the rate falls as 1 - sqrt from the branch on, to 0.
  assert list(lines(tmp_path / "early", "loss")) == [9, 10, 11, 12]
  for step, rate in lines(tmp_path / "early", "learning_rate").items():
    assert rate == pytest.approx(1e-2 * (1 - math.sqrt((step - 9) / 4)), rel=1e-5)
    assert lines(tmp_path / "early", "batch_hash")[step] == lines(trunk, "batch_hash")[step]
  assert lines(tmp_path / "early", "loss")[9] == lines(trunk, "loss")[9]


def test_a_branch_resumes_without_its_trunk(trunk, data, tmp_path):
  """And a branch of a branch is one."""
  shutil.copytree(trunk, tmp_path / "trunk")
  config = config_for(data, branch_from=f"{tmp_path}/trunk@8")
  train.run(config, str(tmp_path / "branch"))
  shutil.rmtree(tmp_path / "trunk")
  shutil.rmtree(tmp_path / "branch/checkpoints/16")
  train.run(config, str(tmp_path / "branch"))
  assert lines(tmp_path / "branch", "loss")[16] == lines(trunk, "loss")[16]
  second = config_for(data, branch_from=f"{tmp_path}/branch@12")
  train.run(second, str(tmp_path / "second"))
  assert lines(tmp_path / "second", "loss") == {
    step: loss for step, loss in lines(trunk, "loss").items() if step > 12
  }


def test_a_validation_loss_is_without_the_z_loss(trunk, data):
  assert all(
    0 < z < loss
    for z, loss in zip(lines(trunk, "z_loss").values(), lines(trunk, "loss").values(), strict=True)
  )
  with jax.set_mesh(make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    model, _ = load(str(trunk))
    store = TokenStore.open(str(data / "validation"))
    plain = validation_loss(model, NextToken(), store, 8, 0)
  assert lines(trunk, "val_loss")[16] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
  "knobs, message",
  [
    ({"learning_rate": 1e-3}, r"holds a run with another config \(learning_rate: 0.01 -> 0.001\)"),
    ({"seed": 1, "batch_size": 16}, "batch_size: 8 -> 16; seed: 0 -> 1.; set these back, for a br"),
    ({"optimizer": "adamw"}, "optimizer: muon -> adamw"),
    ({"steps": 8, "decay_steps": 0}, "is of step 8, and the branch ends at steps of 8; set"),
    (
      {"steps": 11},
      "is of step 8, and the branch decays from step 7 on .* set --config.steps to 12",
    ),
    ({"branch_from": "TRUNK@7"}, r"no checkpoint of step 7 in .* there are \[16, 12, 8, 4\]"),
    ({"branch_from": "TRUNK/nothing@8"}, "nothing is not there; give the --workdir of a run"),
    ({"branch_from": "TRUNK/checkpoints@8"}, "holds no checkpoint; is this the --workdir of a run"),
  ],
)
def test_what_cannot_branch_is_refused_in_one_line(trunk, data, tmp_path, knobs, message):
  """Before anything is written."""
  before = files(trunk)
  knobs = {"branch_from": "TRUNK@8"} | knobs
  knobs["branch_from"] = knobs["branch_from"].replace("TRUNK", str(trunk))
  with pytest.raises((ValueError, OSError), match=message) as raised:
    train.run(config_for(data, **knobs), str(tmp_path / "run"))
  assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
  assert not (tmp_path / "run").exists() and files(trunk) == before


def test_a_run_does_not_branch_into_its_own_workdir(trunk, data):
  with pytest.raises(ValueError, match="branch_from:  -> .*take another --workdir"):
    train.run(config_for(data, branch_from=f"{trunk}@8"), str(trunk))
