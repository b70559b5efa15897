# SPDX-License-Identifier: Apache-2.0
"""What the tests of several formats share: transformers as the oracle, and what a refusal looks
like."""

import functools

import jax
import numpy as np
import pytest

from gpt2_jax.convert.pretrained import load_pretrained, open_weights
from gpt2_jax.convert.weights import Weights, from_model, weights_sha256
from gpt2_jax.sharding import BATCH, make_mesh

N_VOCAB, N_CTX = 131, 16
TOKENS = np.random.default_rng(1).integers(0, N_VOCAB, (2, N_CTX))


@functools.partial(jax.jit)
def _forward(model, tokens_BT):
  return model(tokens_BT)


def _logits(path, tokens=TOKENS) -> np.ndarray:
  """What the checkpoint at `path` says to `tokens`, on one device."""
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  model, _ = load_pretrained(str(path), mesh)
  with jax.set_mesh(mesh):
    placed = jax.device_put(tokens.astype(np.int32), jax.sharding.NamedSharding(mesh, BATCH))
    return np.asarray(_forward(model, placed))[..., : model.config.n_vocab]


def _random_gpt2(n_head=4, K=4, n_layer=2, seed=0, **config):
  """A transformers GPT-2 whose every tensor is moved off its init: N(0, 0.3^2), gains around 1, no
  bias of zero."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  sizes = {"n_embd": n_head * K, "n_head": n_head, "n_layer": n_layer} | {
    "vocab_size": N_VOCAB,
    "n_positions": N_CTX,
  }
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | config)).eval()
  draw = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(
        torch.randn(parameter.shape, generator=draw) * 0.3 + (".ln_" in name and "weight" in name)
      )
  return model


def _their_logits(model, tokens=TOKENS) -> np.ndarray:
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    return model(torch.from_numpy(tokens)).logits.numpy()


def _refused(path, message: str) -> None:
  """Reading `path` whole raises one line that has `message` in it."""
  with pytest.raises((ValueError, OSError), match=message) as error:
    weights_sha256(open_weights(str(path)))
  assert "\n" not in str(error.value)


@pytest.fixture(scope="session")
def tokens_NT():
  return TOKENS


@pytest.fixture(scope="session")
def logits():
  return _logits


@pytest.fixture(scope="session")
def random_gpt2():
  return _random_gpt2


@pytest.fixture(scope="session")
def their_logits():
  return _their_logits


@pytest.fixture(scope="session")
def refused():
  return _refused


@pytest.fixture(scope="session")
def made(mesh, parameters, place):
  """made(config): the Weights of a random model of ours, with a seed of its own."""

  def make(config, seed: int = 0) -> Weights:
    with mesh(1, 1, 1):
      return from_model(place(config, parameters(config, seed=seed)), None)

  return make


class Payload:
  """A pickle that runs code when it is read: it makes the file `path`."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


@pytest.fixture
def payload(tmp_path):
  """An object whose pickle makes a file when it is read; fails the test if that file is there at
  its end."""
  trap = tmp_path / "the-code-ran"
  yield Payload(trap)
  assert not trap.exists()
