# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math
import os
import pathlib

import numpy as np
import pytest

from gpt2_jax.convert import names, parity, pretrained
from gpt2_jax.convert.parity import Model
from gpt2_jax.convert.weights import from_model
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

CONFIG = ModelConfig(131, 16, 16, 4, 2)
LETTERS = Characters("".join(map(chr, range(32, 127))))


@pytest.fixture(scope="module")
def folder(mesh, parameters, place, tmp_path_factory):
  """folder(name, changes, config): Hugging Face's folder of a random model, single values of it
  changed."""
  root, arrays = tmp_path_factory.mktemp("models"), parameters(CONFIG)

  def make(name, changes=(), config=CONFIG):
    with mesh(1, 1, 1):
      weights = from_model(place(config, arrays), LETTERS)
    moved = {key: np.array(weights.read(key)) for key, _ in changes}
    for key, by in changes:
      moved[key].flat[0] += by
    changed = dataclasses.replace(weights, read=lambda key: moved.get(key, weights.read(key)))
    pretrained.write(changed, str(root / name), "hf")
    return str(root / name)

  return make


@pytest.fixture(scope="module")
def same(folder):
  return folder("same")


def table(logits: np.ndarray, config=CONFIG) -> Model:
  """A model whose forward pass gives `logits` [N, T, V], a row after the other."""
  rows = iter(logits)
  return Model(
    "a table", config, None, lambda: lambda tokens_BT: np.stack([next(rows) for _ in tokens_BT])
  )


def softmax(x):
  x = np.exp(x.astype(np.longdouble))
  return x / x.sum(-1, keepdims=True)


def test_figures_are_their_formulas():
  """KL(A || B), agreement and the largest difference of the windows that are kept, the loss of all,
  in long double."""
  rng = np.random.default_rng(0)
  x, y = (rng.normal(size=(3, 16, 131)).astype(np.float32) * 3 for _ in range(2))
  inputs, labels = rng.integers(0, 131, (2, 3, 16))
  labels[2, 5:] = -1
  result = parity.compare(table(x), table(y), inputs, labels, 1e-4, rows=2)
  p, q = softmax(x), softmax(y)
  kl = (p * np.log(p / q)).sum(-1)[: parity.KEPT]
  assert result["kl_nats_mean"] == pytest.approx(float(kl.mean()), rel=1e-9)
  assert result["kl_nats_max"] == pytest.approx(float(kl.max()), rel=1e-9)
  assert result["greedy_agreement"] == np.mean(x[:2].argmax(-1) == y[:2].argmax(-1))
  assert result["max_abs_logit_difference"] == np.abs(x - y)[:2].max()
  assert result["positions"] == 32 and result["same_weights"] is None and not result["same_model"]
  for letter, probabilities in (("a", p), ("b", q)):
    kept = [
      probabilities[i, j, labels[i, j]] for i in range(3) for j in range(16) if labels[i, j] >= 0
    ]
    assert result[letter]["loss_nats"] == pytest.approx(float(-np.log(kept).mean()), rel=1e-9)
    assert result[letter]["tokens"] == 37


def test_logits_are_kept_of_the_first_windows_and_losses_of_all():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(7, 16, 131)).astype(np.float32)
  labels = rng.integers(0, 131, (7, 16))
  for rows in (1, 3, 7):
    measured = parity.measure(table(x), labels, labels, rows)
    np.testing.assert_array_equal(measured.logits_NTV, x[: parity.KEPT])
    nats = -np.log(np.take_along_axis(softmax(x), labels[..., None], -1))[..., 0]
    np.testing.assert_allclose(measured.nats_NT, nats.astype(float), rtol=1e-6)


def test_the_tolerance_decides():
  x, tokens = np.zeros((1, 4, 131), np.float32), np.zeros((1, 4), np.int32)
  for delta, tolerance, expected in ((1e-3, 1e-4, False), (1e-3, 0.1, True)):
    y = x.copy()
    y[0, 3, 7] = delta
    assert parity.compare(table(x), table(y), tokens, tokens, tolerance)["same_model"] is expected
  y[0, 3, 7] = np.nan
  with pytest.raises(ValueError, match="a table gives logits that are not finite"):
    parity.compare(table(x), table(y), tokens, tokens, 1.0)


def test_a_difference_late_in_the_text_or_of_size_is_another_model():
  """Windows whose logits are not kept count by the loss of each of their tokens."""
  x, tokens = np.zeros((5, 4, 131), np.float32), np.zeros((5, 4), np.int32)
  y = x.copy()
  y[4, 3, 0] = 1e-2
  result = parity.compare(table(x), table(y), tokens, tokens, 1e-3)
  assert result["max_abs_logit_difference"] == 0 and not result["same_model"]
  assert result["max_abs_nats_difference"] == pytest.approx(1e-2, rel=0.02)
  for size in ({"n_vocab": 200}, {"n_ctx": 8}):
    other = table(x, dataclasses.replace(CONFIG, **size))
    assert not parity.compare(table(x), other, tokens, tokens, 1e-3)["same_model"]


def test_random_windows_reach_the_end_of_the_context():
  inputs, labels = parity.random_windows(131, 512)
  assert (
    inputs.shape == labels.shape == (parity.KEPT, 512) and (inputs[:, 1:] == labels[:, :-1]).all()
  )


def test_windows_predict_every_token_but_the_first_once():
  for length, T in ((2, 16), (17, 16), (18, 16), (100, 7), (33, 16)):
    tokens = np.arange(1, length + 1)
    inputs, labels = parity.token_windows(tokens, T)
    assert inputs.shape == labels.shape == (math.ceil((length - 1) / T), T)
    assert labels[labels >= 0].tolist() == tokens[1:].tolist()
    assert (inputs[labels >= 0] + 1 == labels[labels >= 0]).all()


def test_a_model_has_parity_with_itself(mesh, same):
  with mesh(1, 1, 1):
    models = parity.load_ours(same), parity.load_ours(same)
    result = parity.compare(*models, *parity.random_windows(131, 16), 1e-4)
  assert result["same_model"] and result["same_weights"] and result["config_differences"] == {}
  assert (
    result["max_abs_logit_difference"],
    result["kl_nats_max"],
    result["greedy_agreement"],
  ) == (
    0,
    0,
    1,
  )
  assert result["a"]["sha256"] == result["b"]["sha256"] and result["a"] == result["b"]
  assert result["a"]["parameters"] == sum(math.prod(x) for x in names.shapes(CONFIG).values())
  assert json.loads(json.dumps(result)) == result
  text = parity.table(result)
  assert "weights         identical" in text and "verdict         the same model" in text


def test_one_changed_weight_breaks_parity(mesh, same, folder):
  other = folder("changed", [("h.1.mlp.c_fc.w", 1e-3)])
  with mesh(1, 1, 1):
    result = parity.compare(
      parity.load_ours(same), parity.load_ours(other), *parity.random_windows(131, 16), 1e-5
    )
  assert not result["same_model"] and result["same_weights"] is False
  assert result["a"]["sha256"] != result["b"]["sha256"] and result["kl_nats_mean"] > 0
  text = parity.table(result)
  assert "weights         differ" in text and "verdict         NOT the same model" in text


def test_config_differences_are_listed(mesh, same, folder):
  other = folder("erf", config=dataclasses.replace(CONFIG, gelu="erf", attn_pdrop=0.1))
  with mesh(1, 1, 1):
    result = parity.compare(
      parity.load_ours(same), parity.load_ours(other), *parity.random_windows(131, 16), 1e-4
    )
  assert result["config_differences"] == {"gelu": ["tanh", "erf"]}, (
    "what is computed, not how it was trained"
  )
  assert not result["same_model"] and result["same_weights"]
  assert "config          gelu: tanh | erf" in parity.table(result)


def test_transformers_is_the_oracle(mesh, folder):
  """Without the dropout that the config has for training."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  same = folder(
    "dropout", config=dataclasses.replace(CONFIG, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
  )
  text = "A text of a few windows, the last of them not full."
  windows = parity.text_windows(text, LETTERS, 16)
  with mesh(1, 1, 1):
    result = parity.compare(parity.load_ours(same), parity.load_transformers(same), *windows, 1e-4)
  assert result["same_model"] and result["same_weights"] and result["max_abs_logit_difference"] > 0
  assert "transformers' forward" in result["b"]["source"]
  tokens = torch.tensor(LETTERS.encode(text))
  model, nats = transformers.GPT2LMHeadModel.from_pretrained(same), 0.0
  for start in range(0, len(tokens) - 1, 16):
    inputs, labels = tokens[start : start + 16], tokens[start + 1 : start + 17]
    logits = model(inputs[None, : len(labels)]).logits[0]
    nats += torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum").item()
  assert result["a"]["tokens"] == result["b"]["tokens"] == len(tokens) - 1
  for letter in "ab":
    assert result[letter]["loss_nats"] == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)
  broken = folder("broken", [("h.0.attn.c_attn.b", 0.5)])
  with mesh(1, 1, 1):
    result = parity.compare(
      parity.load_ours(broken), parity.load_transformers(same), *windows, 1e-4
    )
  assert not result["same_model"]


def test_recorded_logits(mesh, same, tmp_path):
  with mesh(1, 1, 1):
    model = parity.load_ours(same)
    tokens = np.random.default_rng(0).integers(0, 131, (6, 16))
    logits = parity.forward(pretrained.load_pretrained(same)[0])(tokens)
    np.savez(tmp_path / "right.npz", tokens=tokens, logits=logits)
    np.savez(tmp_path / "wrong.npz", tokens=tokens, logits=np.roll(logits, 1, axis=1))
    for name, expected in (("right", True), ("wrong", False)):
      other, windows = parity.load_recorded(str(tmp_path / f"{name}.npz"), model.config)
      result = parity.compare(model, other, *windows, 1e-4)
      assert result["same_model"] is expected and result["same_weights"] is None
      assert result["a"]["tokens"] == 6 * 15
      assert (abs(result["a"]["loss_nats"] - result["b"]["loss_nats"]) < 1e-6) is expected
  assert result["b"]["sha256"] is None and "not known" in parity.table(result)


def test_logits_of_every_recorded_window_may_be_compared(mesh, same, tmp_path):
  """The last position of a window predicts no label: only its logits tell the two apart."""
  with mesh(1, 1, 1):
    model = parity.load_ours(same)
    tokens = np.random.default_rng(0).integers(0, 131, (6, 16))
    logits = np.array(parity.forward(pretrained.load_pretrained(same)[0])(tokens))
    logits[5, 15, 3] += 1
    np.savez(tmp_path / "last.npz", tokens=tokens, logits=logits)
    results = []
    for kept in (parity.KEPT, 5, 6):
      other, windows = parity.load_recorded(str(tmp_path / "last.npz"), model.config)
      results.append(parity.compare(model, other, *windows, 1e-4, kept_windows=kept))
  assert [result["same_model"] for result in results] == [True, True, False]
  assert [result["positions"] for result in results] == [32, 80, 96]
  assert "96 positions, 6 of 6 windows" in parity.table(results[-1])


def test_all_windows_of_a_short_text_fit(monkeypatch):
  assert parity.windows_that_fit(7, 16, 131) == 7
  # a window of GPT-2 has 206 MB of logits
  assert parity.windows_that_fit(1742, 1024, 50257) == 5
  monkeypatch.setattr(parity, "KEPT_BYTES", 0)
  assert (
    parity.windows_that_fit(7, 16, 131) == parity.KEPT and parity.windows_that_fit(1, 8, 9) == 1
  )


def test_invalid_recordings_are_one_line(tmp_path):
  good = {"tokens": np.zeros((2, 4), np.int32), "logits": np.zeros((2, 4, 131), np.float32)}
  cases = [
    {"tokens": good["tokens"]},
    good | {"logits": good["logits"][..., :130]},
    {"tokens": good["tokens"][0], "logits": good["logits"][0]},
    {"tokens": good["tokens"][:, :1], "logits": good["logits"][:, :1]},
    good | {"tokens": np.array([{"an": "object"}])},
    good | {"tokens": good["tokens"] + 0.5},
    good | {"tokens": good["tokens"] + 131},
    {"tokens": good["tokens"][:0], "logits": good["logits"][:0]},
  ]
  for n, arrays in enumerate(cases):
    np.savez(tmp_path / f"{n}.npz", **arrays)
  np.savez(tmp_path / "cut.npz", **good)
  (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:700])
  np.save(tmp_path / "single.npy", good["tokens"])
  (tmp_path / "empty.npz").write_bytes(b"")
  for name in [*(f"{n}.npz" for n in range(len(cases))), "cut.npz", "single.npy", "empty.npz"]:
    with pytest.raises(ValueError, match=name) as error:
      parity.load_recorded(str(tmp_path / name), CONFIG)
    assert "\n" not in str(error.value), name
  with pytest.raises(FileNotFoundError):
    parity.load_recorded(str(tmp_path / "gone.npz"), CONFIG)


def test_a_text_needs_a_tokenizer_and_two_tokens():
  with pytest.raises(ValueError, match="no tokenizer to read the text with"):
    parity.text_windows("text", None, 16)
  with pytest.raises(ValueError, match="fewer than two tokens"):
    parity.text_windows("a", LETTERS, 16)


def test_recordings_of_no_numbers_are_one_line(tmp_path):
  tokens = np.zeros((1, 2), np.int32)
  for logits in (
    np.full((1, 2, 131), "a"),
    np.zeros((1, 2, 131), bool),
    np.zeros((1, 2, 131), "V2"),
  ):
    np.savez(tmp_path / "x.npz", tokens=tokens, logits=logits)
    with pytest.raises(ValueError, match="the logits in .*x.npz are .*, and no numbers"):
      parity.load_recorded(str(tmp_path / "x.npz"), CONFIG)


@pytest.mark.parametrize("form", ["llmc", "nanogpt", "orbax", "openai"])
def test_transformers_runs_the_weights_of_every_format(form, mesh, same, tmp_path):
  """transformers reads its own folders alone: of others it gets the weights that were read here."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  path = str(tmp_path / "copy")
  if form == "openai":
    path = os.path.join(os.environ.get("GPT2_JAX_TEST_DATA", ""), "checkpoints", "openai_tf")
    if not os.path.isdir(path):
      pytest.skip("GPT2_JAX_TEST_DATA is not set: no checkpoint of OpenAI's")
  else:
    pretrained.write(pretrained.open_weights(same), path, form, other_gelu=True)

  with mesh(1, 1, 1):
    ours, theirs = parity.load_ours(path), parity.load_transformers(path)
    windows = parity.random_windows(ours.config.n_vocab, 16)
    result = parity.compare(ours, theirs, *windows, 1e-4)
  assert result["same_model"] and result["same_weights"] and result["max_abs_logit_difference"] > 0
  assert result["b"]["source"] == f"{path} (transformers' forward)"


def test_what_transformers_cannot_load_is_one_line(folder):
  """A folder that was a GPT-2 when it was opened here."""
  pytest.importorskip("transformers")
  path = pathlib.Path(folder("changing"))
  model = parity.load_transformers(str(path))
  (path / "model.safetensors").write_bytes(b"x" * 100)
  with pytest.raises(ValueError, match="transformers cannot load .*changing: ") as error:
    model.load()
  assert "\n" not in str(error.value)
