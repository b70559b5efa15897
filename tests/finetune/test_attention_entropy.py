# SPDX-License-Identifier: Apache-2.0
"""EAR: the entropy of attention against transformers' own attentions, and its gradient against
torch's."""

import jax
import numpy as np
import pytest

import gpt2_jax
from configs import finetune, gpt2
from gpt2_jax.attention import split_heads
from gpt2_jax.batch import Batch
from gpt2_jax.finetune.attention_entropy import NextTokenEntropy, attention_entropy
from gpt2_jax.finetune.objective import make_objective
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

V, T, WEIGHT = 61, 24, 0.3
CONFIG = ModelConfig(V, T, 12, 3, 2, dtype="float32", pad_heads=True)
BATCH = Batch(np.random.default_rng(0).integers(0, V, (4, T + 1)).astype(np.int32))


@pytest.fixture(scope="module")
def arrays(parameters):
  return parameters(CONFIG, scale=0.4)


@pytest.fixture(scope="module")
def theirs(arrays, place, mesh, tmp_path_factory):
  """(loss, entropies, gradient of c_attn's weights in both layers) of transformers' model."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  path = str(tmp_path_factory.mktemp("hf") / "model")
  with mesh(1, 1, 1):
    characters = Characters("".join(chr(48 + i) for i in range(V)))
    gpt2_jax.save_pretrained(place(CONFIG, arrays), characters, path)
  model = transformers.GPT2LMHeadModel.from_pretrained(path, attn_implementation="eager")
  model.eval()

  tokens = torch.tensor(BATCH.tokens_BT, dtype=torch.long)
  out = model(tokens[:, :-1], output_attentions=True)
  nats = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
  # Averaged over heads, summed over layers.
  p_LBTS = torch.stack(out.attentions).mean(2)
  entropy_BT = torch.special.entr(p_LBTS).sum(-1).sum(0)
  loss = nats - WEIGHT * entropy_BT.mean()
  # With torch's own gradient of x log x at 0, which is infinite, the causal mask would spoil it.
  visible = torch.where(p_LBTS > 0, p_LBTS, torch.ones(()))
  smooth = nats + WEIGHT * (visible * visible.log()).sum(-1).sum(0).mean()
  smooth.backward()
  gradients = [model.transformer.h[i].attn.c_attn.weight.grad.numpy() for i in range(2)]
  return float(loss.detach()), entropy_BT.detach().numpy(), gradients


def test_loss_and_gradient_are_torchs(theirs, arrays, place, mesh, unpadded):
  """The three heads are padded to four, over two devices."""
  loss, entropy_BT, gradients = theirs
  objective = NextTokenEntropy(WEIGHT)
  with mesh(1, 2, 2):
    model = place(CONFIG, arrays)
    compute = jax.jit(jax.value_and_grad(lambda m: mean_loss(objective, m, BATCH), has_aux=True))
    (ours, sums), grads = compute(model)
    plain = jax.jit(lambda m: NextToken()(m, BATCH))(model)

  assert float(ours) == pytest.approx(loss, abs=2e-5)
  assert float(sums["entropy_loss"]) == pytest.approx(-WEIGHT * entropy_BT.sum(), rel=1e-5)
  nats = float(sums["nats"] - sums["entropy_loss"])
  assert nats == pytest.approx(float(plain["nats"]), rel=1e-6)
  assert entropy_BT.mean() > 1, "attention is spread, so that the entropy is something"

  # Their columns are all queries, all keys, all values; ours run head by head.
  by_heads = unpadded(grads, arrays)["h.attn.c_attn.w"].reshape(2, 12, 3, 3, 4)
  ours_LDC = np.moveaxis(by_heads, 3, 2).reshape(2, 12, 36)
  np.testing.assert_allclose(ours_LDC, gradients, rtol=0, atol=2e-5 * np.abs(gradients).max())


def test_uniform_attention_has_the_entropy_of_what_is_seen(mesh, put):
  """Queries of zero see all keys alike: log of their number, which starts again with a segment."""
  segments_BT = np.array([[0] * 300 + [1] * 100], np.int32)
  with mesh(1, 1, 1):
    c_BTC = np.ones((1, 400, 3 * 8), np.float32)
    c_BTC[..., :4] = c_BTC[..., 12:16] = 0
    q_BTHK, k_BTHK, _ = split_heads(put(c_BTC, jax.sharding.PartitionSpec()), 4)
    whole = attention_entropy(q_BTHK, k_BTHK, 2)
    packed = attention_entropy(q_BTHK, k_BTHK, 2, put(segments_BT, jax.sharding.PartitionSpec()))
  np.testing.assert_allclose(whole[0], np.log(np.arange(1, 401)), atol=1e-5)
  counts = np.concatenate([np.arange(1, 301), np.arange(1, 101)])
  np.testing.assert_allclose(packed[0], np.log(counts), atol=1e-5)


def test_the_knob_chooses_the_objective():
  config = gpt2.get_config()
  assert make_objective(config) == NextToken()
  config.attention_entropy = 0.01
  assert make_objective(config) == NextTokenEntropy(0.01)


@pytest.mark.parametrize(
  ("knob", "value", "message"),
  [
    ("model.attention", "fused", "of plain attention alone, and not of model.attention=fused"),
    ("adapter.kind", "prefix", "and not of model.attention=auto, adapter.kind=prefix"),
    ("z_loss", 1e-4, "attention_entropy is 0.01 and z_loss is 0.0001: a run has one objective"),
    ("classify.classes", 2, "attention_entropy is 0.01 and classify.classes is 2"),
    ("distill.teacher", "gpt2", "attention_entropy is 0.01 and distill.teacher is gpt2"),
  ],
)
def test_what_has_no_plain_attention_or_another_objective_is_refused(knob, value, message):
  config = finetune.get_config("full")
  config.attention_entropy = 0.01
  config.update_from_flattened_dict({knob: value})
  with pytest.raises(ValueError, match=message) as error:
    make_objective(config)
  assert "\n" not in str(error.value)
