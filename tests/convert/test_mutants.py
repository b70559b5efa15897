# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of every file of a foreign checkpoint: a mutant is refused in one line, or gives the true
weights wherever the format can tell.

GPT2_JAX_MUTANTS is the number of mutants of each file, 40 by default.
"""

import json
import os
import random
import shutil

import pytest

from gpt2_jax.convert import hf, llmc, nanogpt, pretrained
from gpt2_jax.convert.weights import weights_sha256
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters, HuggingFace, byte_alphabet

torch = pytest.importorskip("torch")

COUNT = int(os.environ.get("GPT2_JAX_MUTANTS", "40"))
CONFIG = ModelConfig(131, 16, 8, 2, 2, gelu="erf")
TEXT = "An ab, a\n"

# Values that no file should have where it has a number, a name, or more of its own.
ODD_VALUES = [
  None,
  True,
  -1,
  0,
  10**12,
  1.5,
  float("nan"),
  "",
  "x" * 9_000,
  "\ud800",
  [],
  {},
  [[1]],
]


def flip(content: bytearray, rng: random.Random) -> None:
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def overwrite(content: bytearray, rng: random.Random) -> None:
  at = rng.randrange(len(content))
  length = min(rng.choice([1, 2, 4, 8, 64]), len(content) - at)
  content[at : at + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])


def cut(content: bytearray, rng: random.Random) -> None:
  del content[rng.randrange(len(content)) :]


def remove(content: bytearray, rng: random.Random) -> None:
  at = rng.randrange(len(content))
  del content[at : at + rng.choice([1, 2, 8, 100])]


def repeat(content: bytearray, rng: random.Random) -> None:
  at = rng.randrange(len(content))
  content[at:at] = content[at : at + rng.choice([1, 2, 8, 100])]


def swap_digit(content: bytearray, rng: random.Random) -> None:
  digits = [at for at, byte in enumerate(content) if byte in b"0123456789"]
  if digits:
    content[rng.choice(digits)] = rng.choice(b"0123456789")


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
  """One to three small damages anywhere, or a cut."""
  mutant = bytearray(content)
  for _ in range(rng.choice([1, 1, 1, 2, 3])):
    damage = rng.choice([flip, flip, overwrite, cut, remove, repeat, swap_digit])
    if mutant:
      damage(mutant, rng)
  return bytes(mutant)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
  """One entry anywhere in a JSON file away, doubled, or of another shape; sometimes as bytes."""
  shape = rng.random()
  if shape < 0.3:
    return mutate_bytes(content, rng)
  if shape < 0.35:
    return rng.choice([b"", b"[]", b"null", b"3", b'"a"', b"[" * 50_000, b'{"a":' * 50_000, b"{}"])

  payload = json.loads(content)
  entries = []
  stack = [payload]
  while stack:
    node = stack.pop()
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items)[:40]:
      entries.append((node, key))
      if isinstance(value, dict | list):
        stack.append(value)

  node, key = rng.choice(entries)
  if rng.random() < 0.2:
    del node[key]
  else:
    node[key] = rng.choice(ODD_VALUES)
  return json.dumps(payload).encode()


def small_bpe() -> HuggingFace:
  vocab = {token: i for i, token in enumerate([*list(byte_alphabet().values())[:120], "ab"])}
  return HuggingFace.from_merges(vocab, [("a", "b")])


@pytest.fixture(scope="module")
def checkpoints(made, tmp_path_factory):
  """A folder for each container: a checkpoint of the same random model."""
  root = tmp_path_factory.mktemp("checkpoints")
  weights = made(CONFIG)
  with_bpe = type(weights)(CONFIG, weights.read, small_bpe(), "a test")
  with_letters = type(weights)(CONFIG, weights.read, Characters("\n ,Aabn"), "a test")

  # 1. Hugging Face's: whole, in shards, and pickled.
  hf.write(with_bpe, root / "hf")
  hf.write(with_letters, root / "own_tokenizer")
  (root / "words").mkdir()
  for name in ("config.json", "model.safetensors"):
    shutil.copy(root / "hf" / name, root / "words" / name)
  vocab = json.loads(small_bpe().payload)["model"]["vocab"]
  (root / "words" / "vocab.json").write_text(json.dumps(vocab))
  (root / "words" / "merges.txt").write_text("#version: 0.2\na b\n")

  shard, hf.SHARD = hf.SHARD, "8KB"
  hf.write(with_bpe, root / "shards")
  hf.SHARD = shard
  nanogpt.write(with_letters, root / "nanogpt")
  state = {}
  for name, tensor in torch.load(root / "nanogpt" / "ckpt.pt")["model"].items():
    is_linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    state[name] = tensor.T.contiguous() if is_linear else tensor
  for name, new in (("bin", True), ("old_bin", False)):
    (root / name).mkdir()
    shutil.copy(root / "hf" / "config.json", root / name)
    torch.save(state, root / name / "pytorch_model.bin", _use_new_zipfile_serialization=new)

  # 2. llm.c's, whose GELU is the other.
  tanh = type(weights)(
    ModelConfig(131, 16, 8, 2, 2), weights.read, with_letters.tokenizer, "a test"
  )
  (root / "llmc").mkdir()
  llmc.write(tanh, root / "llmc" / "model.bin")
  return root


# The folder, the file in it, how it is mutated, and whether its format can tell all other weights.
CONTAINERS = {
  "safetensors": ("hf", "model.safetensors", mutate_bytes, False),
  "config.json": ("hf", "config.json", mutate_json, True),
  "tokenizer.json": ("hf", "tokenizer.json", mutate_json, True),
  "own tokenizer": ("own_tokenizer", "gpt2_jax_tokenizer.json", mutate_json, True),
  "vocab.json": ("words", "vocab.json", mutate_json, True),
  "merges.txt": ("words", "merges.txt", mutate_bytes, True),
  "index": ("shards", "model.safetensors.index.json", mutate_json, True),
  "ckpt.pt": ("nanogpt", "ckpt.pt", mutate_bytes, True),
  "meta.pkl": ("nanogpt", "meta.pkl", mutate_bytes, True),
  "pytorch_model.bin": ("bin", "pytorch_model.bin", mutate_bytes, True),
  "pytorch_model.bin before torch 1.6": ("old_bin", "pytorch_model.bin", mutate_bytes, False),
  "llm.c": ("llmc", "model.bin", mutate_bytes, False),
  "llm.c's tokenizer": ("llmc", "model.bin.tokenizer.json", mutate_json, True),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_mutant_is_one_line_or_the_true_weights(container, checkpoints, tmp_path, capfd):
  folder, name, mutate, can_tell = CONTAINERS[container]
  copy = shutil.copytree(checkpoints / folder, tmp_path / "copy")
  path = copy / "model.bin" if folder == "llmc" else copy
  whole = (copy / name).read_bytes()
  true_sha256 = weights_sha256(pretrained.open_weights(str(path)))

  counts = {"refused": 0, "true": 0, "other weights": 0}
  for seed in range(COUNT):
    mutant = mutate(whole, random.Random(f"{container} {seed}"))
    (copy / name).write_bytes(mutant)
    try:
      weights = pretrained.open_weights(str(path))
      is_true = weights_sha256(weights) == true_sha256
      if weights.tokenizer is not None:
        weights.tokenizer.decode(weights.tokenizer.encode(TEXT))
    except (ValueError, OSError) as error:
      assert "\n" not in str(error) and len(str(error).replace(str(tmp_path), "")) < 600, seed
      counts["refused"] += 1
    else:
      assert is_true or not can_tell, f"mutant {seed} has other weights"
      counts["true" if is_true else "other weights"] += 1

  assert sum(counts.values()) == COUNT and counts["refused"]
  assert "panicked" not in capfd.readouterr().err
  with capfd.disabled():
    if "GPT2_JAX_MUTANTS" in os.environ:
      print(f"\n{container}: {counts}")
