# SPDX-License-Identifier: Apache-2.0
"""A different adapter in each row of a batch: each row generates what it generates alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding import SlidingWindow, complete, for_inference, generate, stream, stream_rows
from gpt2_jax.finetune.lora import LoRA, block_linears, copied, matrix_layout
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

TINY = ModelConfig(n_vocab=97, n_ctx=32, n_embd=16, n_head=4, n_layer=2, dtype="float32")
N, RANK = 3, 2
ADAPTERS = [0, 1, 2, 1, 2, 0]  # of the prompts
LENGTHS = (1, 9, 20, 5, 31, 12)


@pytest.fixture(scope="module")
def weights(loud_parameters):
  return loud_parameters(TINY)


@pytest.fixture(scope="module")
def models(mesh, weights, place):
  with mesh(1, 1, 1):
    return with_adapters(place(TINY, weights))


@pytest.fixture(scope="module")
def prompts(tokens):
  rows = tokens(len(LENGTHS), 32, 97)
  return [row[:length].tolist() for row, length in zip(rows, LENGTHS, strict=True)]


def with_adapters(model):
  """The model with a bank, of which number 0 does nothing; and one model for each of its adapters.

  The model's mesh is in force.
  """
  rng = np.random.default_rng(0)
  mesh = model.mesh
  bank, *lone = [copied(model) for _ in range(1 + N)]
  for name, linear in block_linears(model.h).items():
    (I, O), (in_axis, out_axis) = matrix_layout(linear.w[...])  # noqa: E741
    a, b = (rng.normal(size=(TINY.n_layer, N, *shape)) for shape in ((I, RANK), (RANK, O)))
    b[:, 0] = 0
    scale = np.full((TINY.n_layer, N), 0.5)

    def put(array, *spec):
      sharding = jax.sharding.NamedSharding(mesh, P(*spec))
      return jax.device_put(np.float32(array), sharding)

    block_linears(bank.h)[name].w = nnx.Param(
      LoRA(
        linear.w[...],
        put(a, None, None, in_axis, None),
        put(b, None, None, None, out_axis),
        put(scale, None, None),
      )
    )
    for n in range(N):
      block_linears(lone[n].h)[name].w = nnx.Param(
        LoRA(
          linear.w[...],
          put(a[:, n], None, in_axis, None),
          put(b[:, n], None, None, out_axis),
          put(scale[:, n], None),
        )
      )
  return bank, lone


def test_each_row_generates_what_its_own_adapter_does(models, prompts):
  """Prompts of any lengths, two samples of each, with a window: rows are read again on the way."""
  bank, lone = models
  options = {"n_new": 20, "window": SlidingWindow(8), "logprobs": True}
  rows = generate(bank, prompts, samples=2, adapters=ADAPTERS, **options)
  assert rows[::2] == rows[1::2] and len({tuple(row.tokens) for row in rows}) == len(prompts)
  for number in range(N):
    own = [index for index, adapter in enumerate(ADAPTERS) if adapter == number]
    alone = generate(lone[number], [prompts[index] for index in own], **options)
    for index, expected in zip(own, alone, strict=True):
      assert rows[2 * index].tokens == expected.tokens
      np.testing.assert_allclose(rows[2 * index].logprobs, expected.logprobs, atol=1e-4)


def test_an_adapter_s_number_is_what_tells_rows_apart(models):
  """The same prompt through each adapter: of texts, whole and streamed, with one number for all."""
  bank, tokenizer = models[0], Characters("".join(map(chr, range(32, 129))))
  options = {"n_new": 12, "greedy": True}
  texts = complete(bank, tokenizer, ["ab"] * N, adapters=range(N), **options)
  assert len(set(texts)) == N
  streamed = [""] * N
  for row, chunk in stream_rows(bank, tokenizer, ["ab"] * N, adapters=[2, 0, 1], **options):
    streamed[row] += chunk
  assert streamed == [texts[2], texts[0], texts[1]]
  assert complete(bank, tokenizer, ["ab"] * N, adapters=1, **options) == [texts[1]] * N
  with pytest.raises(ValueError, match="adapter 3 is not in a bank of 3"):
    stream(bank, tokenizer, "ab", adapters=3, **options)


def test_adapters_are_the_same_on_a_mesh(models, mesh, weights, place, prompts):
  """And rows that only fill the mesh change nothing."""
  with mesh(1, 4, 2):
    bank, _ = with_adapters(place(TINY, weights))
  few, numbers = prompts[:3], [2, 1, 0]
  expected = generate(models[0], few, 8, adapters=numbers)
  assert generate(bank, few, 8, adapters=numbers) == expected


@pytest.mark.parametrize(
  "adapters, message",
  [
    (None, "a bank of 3 adapters; give the number of one for each prompt"),
    ([0, 1], "2 prompts|3 prompts; give one number for each"),
    (3, "adapter 3 is not in a bank of 3; the numbers are 0 to 2"),
    ([0, -1, 0], "adapter -1 is not in a bank"),
    (["a", 0, 0], "adapter a is not in a bank"),
    ("abc", "give one number for each"),
  ],
)
def test_numbers_that_the_bank_does_not_have_are_refused(models, prompts, adapters, message):
  decoder = for_inference(models[0])
  with pytest.raises(ValueError, match=message) as error:
    generate(decoder, prompts[:3], 2, adapters=adapters)
  assert "\n" not in str(error.value)


def test_a_model_without_a_bank_has_no_numbers(models, prompts):
  for model in (models[1][0], models[1][1]):
    with pytest.raises(ValueError, match="the model has none; see stack_adapters"):
      generate(model, prompts[:1], 2, adapters=0)


def test_adapters_are_cast_and_gathered_once(models, mesh, weights, place):
  """As matrices are: whole over `data`, in the compute dtype; scales stay float32."""
  with mesh(1, 4, 2):
    bank, _ = with_adapters(place(TINY, weights))
  c_fc = for_inference(bank).blocks[0].mlp.c_fc.w[...]
  assert c_fc.lora_a.shape == (N, 16, RANK) and c_fc.scale.dtype == jnp.float32
  for leaf in (c_fc.lora_a, c_fc.lora_b):
    assert "data" not in leaf.sharding.spec
