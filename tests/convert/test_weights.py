# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import hashlib
import warnings
import weakref

import jax
import numpy as np
import pytest

from gpt2_jax.convert import names
from gpt2_jax.convert.weights import (
  Weights,
  cast_weights,
  count_nonfinite,
  from_model,
  to_model,
  weights_sha256,
)
from gpt2_jax.model import GPT2, ModelConfig, name_of
from gpt2_jax.quantization import quantize
from gpt2_jax.sharding import make_mesh

FIVE = ModelConfig(
  n_vocab=131, n_ctx=16, n_embd=40, n_head=5, n_layer=2
)  # heads and vocabulary need padding
MESHES = [(1, 1, 1), (1, 4, 2), (2, 2, 2)]


def mesh_of(sizes):
  return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def five(made) -> Weights:
  """In memory, as a file would give them."""
  source = made(FIVE)
  arrays = {name: source.read(name) for name in names.shapes(FIVE)}
  return Weights(FIVE, arrays.__getitem__, None, "a test")


@pytest.fixture(scope="module")
def loaded(five):
  return {sizes: to_model(five, mesh_of(sizes), "float32") for sizes in MESHES}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_same_logits(sizes, loaded, tokens):
  from gpt2_jax.convert.parity import forward

  tokens_BT = tokens(4, 16, 131)
  expected = forward(loaded[1, 1, 1])(tokens_BT)
  assert np.abs(forward(loaded[sizes])(tokens_BT) - expected).max() <= 1e-5


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_device_holds_its_shards_alone(sizes, loaded):
  """Of the specs that training has; over (1, 4, 2) no device holds the whole of a matrix or a
  table."""
  model = loaded[sizes]
  with jax.set_mesh(mesh_of(sizes)):
    fresh = jax.eval_shape(lambda: GPT2(model.config, jax.random.key(0)))
  expected = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)}
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    name = name_of(path)
    assert (leaf.shape, leaf.dtype, leaf.sharding.spec) == (
      expected[name].shape,
      np.float32,
      expected[name].sharding.spec,
    )
    held = [shard.data.size for shard in leaf.addressable_shards]
    parts = {"wte": sizes[1] * sizes[2], "wpe": sizes[1]}.get(name)
    parts = sizes[1] * sizes[2] if name.endswith(".w") else parts
    if parts:
      assert set(held) == {leaf.size // parts}, name


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_round_trip_is_bit_identical(sizes, loaded, five):
  found = from_model(loaded[sizes], None)
  for name, shape in names.shapes(FIVE).items():
    assert found.read(name).shape == shape
    np.testing.assert_array_equal(found.read(name), five.read(name), err_msg=name)
  assert weights_sha256(found) == weights_sha256(five)


def test_padding_is_zero(loaded, five):
  leaves = jax.tree_util.tree_leaves_with_path(loaded[2, 2, 2])
  arrays = {name_of(path): np.asarray(leaf) for path, leaf in leaves}
  assert arrays["wte"].shape[0] > 131 and not arrays["wte"][131:].any()
  c_attn = arrays["h.attn.c_attn.w"]
  assert (
    c_attn.shape[2] == 6 * 3 * 8
    and c_attn[..., : 5 * 3 * 8].all()
    and not c_attn[..., 5 * 3 * 8 :].any()
  )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_int8_while_loading_is_quantizing_what_was_loaded(sizes, loaded, five):
  """Bit for bit, in the same shards; padding too."""
  expected = quantize(loaded[sizes])
  model = to_model(five, mesh_of(sizes), "float32", quantize=True)
  assert jax.tree.structure(model) == jax.tree.structure(expected)
  for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
    assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_int8_while_loading_holds_one_layer_of_float32(sizes, five):
  """Of all that is on the devices when a tensor is read, no float32 array is as large as two layers
  of a matrix."""
  layer = 4 * FIVE.n_embd * FIVE.n_embd

  def read(name):
    held = [x.size for x in jax.live_arrays() if x.dtype == np.float32 and id(x) not in before]
    assert max(held, default=0) < 2 * layer, f"while {name} is read"
    return five.read(name)

  before = set(map(id, jax.live_arrays()))
  to_model(dataclasses.replace(five, read=read), mesh_of(sizes), "float32", quantize=True)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_each_tensor_is_read_once_the_largest_parameters_first(sizes, five):
  """And what was read is let go: the host holds no two parameters."""
  reads, alive = [], []

  def read(name):
    held = {other for other, ref in alive if ref() is not None}
    assert len(held) <= 2, f"{sorted(held)} are held while {name} is read"
    array = five.read(name).copy()
    reads.append(name)
    alive.append((name, weakref.ref(array)))
    return array

  to_model(dataclasses.replace(five, read=read), mesh_of(sizes), "float32")
  assert collections.Counter(reads) == collections.Counter(names.shapes(FIVE).keys())
  of = [
    name if not name.startswith("h.") else name.replace(f"h.{name.split('.')[1]}.", "h.", 1)
    for name in reads
  ]
  order = list(dict.fromkeys(of))
  assert of == sorted(of, key=order.index), "all layers of a parameter, then the next"
  size = {
    name: sum(five.read(x).size for x, y in zip(reads, of, strict=True) if y == name)
    for name in order
  }
  sizes_in_order = [size[name] for name in order if name not in ("wte", "wpe")]
  assert sizes_in_order == sorted(sizes_in_order, reverse=True)
  assert (
    order.index("h.mlp.c_fc.w") < order.index("wte") < order.index("wpe") < order.index("ln_f.b")
  )


@pytest.mark.parametrize(
  ("zero", "absent"), [(None, None), ("ln_f.g", None), ("h.0.mlp.c_fc.b", "h.0.mlp.c_fc.b")]
)
def test_the_sha256_is_that_of_the_float32_values(zero, absent, five):
  """By a second hand; a bias of zeros counts as none, a gain of zeros counts."""
  sha, read = hashlib.sha256(), lambda name: five.read(name) * np.float32(name != zero)
  for name in sorted(set(names.shapes(FIVE)) - {absent}):
    sha.update(
      f"{name} {list(names.shapes(FIVE)[name])}\n".encode() + read(name).astype("<f4").tobytes()
    )
  assert weights_sha256(dataclasses.replace(five, read=read)) == sha.hexdigest()


def test_one_changed_value_changes_the_sha256(five):
  for changed in ("wte", "h.1.attn.c_attn.b", "ln_f.g"):
    other = {changed: np.nextafter(five.read(changed), np.float32(9))}
    assert weights_sha256(
      dataclasses.replace(five, read=lambda name, o=other: o.get(name, five.read(name)))
    ) != weights_sha256(five)
  swapped = {"h.0.ln_1.g": "h.1.ln_1.g", "h.1.ln_1.g": "h.0.ln_1.g"}
  assert weights_sha256(
    dataclasses.replace(five, read=lambda name: five.read(swapped.get(name, name)))
  ) != weights_sha256(five)


def test_zero_biases_count_as_none(five):
  without = dataclasses.replace(five, config=dataclasses.replace(FIVE, use_bias=False))
  zeros = dataclasses.replace(
    five, read=lambda name: five.read(name) * (0.0 if name.endswith(".b") else 1.0)
  )
  assert weights_sha256(without) == weights_sha256(zeros) != weights_sha256(five)


def test_cast_weights_are_what_a_file_of_that_dtype_holds(five):
  torch = pytest.importorskip("torch")
  for dtype in ("float16", "bfloat16"):
    x = five.read("wpe")
    expected = torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy()
    cast = cast_weights(five, dtype).read("wpe").astype(np.float32)
    np.testing.assert_array_equal(cast, expected)


def test_numbers_that_are_not_finite_are_counted_by_tensor(five):
  """However often a tensor is read, and whatever kind of NaN it has."""
  broken = {name: np.array(five.read(name)) for name in ("h.1.attn.c_attn.w", "ln_f.g")}
  broken["h.1.attn.c_attn.w"][0, :3] = np.nan, np.inf, -np.inf
  broken["ln_f.g"].view(np.uint32)[1] = 0x7F800001  # a signalling NaN

  def read(name):
    return broken.get(name, five.read(name))

  counted, counts = count_nonfinite(dataclasses.replace(five, read=read))
  with warnings.catch_warnings(action="error"):
    assert weights_sha256(counted) == weights_sha256(counted) != weights_sha256(five)
    weights_sha256(cast_weights(counted, "bfloat16"))
  assert counts == {"h.1.attn.c_attn.w": 3, "ln_f.g": 1}
  counted, counts = count_nonfinite(five)
  assert weights_sha256(counted) == weights_sha256(five) and not counts
