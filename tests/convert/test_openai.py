# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax.convert import pretrained
from gpt2_jax.convert.vocabulary import write_vocabulary
from gpt2_jax.convert.weights import weights_sha256
from gpt2_jax.tokenizer import Gpt2Bpe
from tests.convert.tensor_bundles import write_bundle

DATA = os.environ.get("GPT2_JAX_TEST_DATA", "")
needs_data = pytest.mark.skipif(
  not DATA, reason="GPT2_JAX_TEST_DATA is not set: no checkpoint of OpenAI's"
)
CHECKPOINT = pathlib.Path(DATA) / "checkpoints" / "openai_tf"


@pytest.fixture
def folder(random_gpt2, tmp_path):
  """OpenAI's folder with the weights of `random_gpt2()`."""
  write(random_gpt2(), tmp_path / "124M")
  return tmp_path / "124M"


def write(model, folder: pathlib.Path, **others) -> None:
  """As OpenAI's graph names and shapes them: a convolution's matrix is [1, in, out]."""
  tensors = {}
  for name, x in model.transformer.state_dict().items():
    scope, kind = name.replace("h.", "h", 1).replace(".", "/").rsplit("/", 1)
    if scope in ("wte", "wpe"):
      tensors[f"model/{scope}"] = x.numpy()
    elif "ln_" in scope:
      tensors[f"model/{scope}/{'g' if kind == 'weight' else 'b'}"] = x.numpy()
    else:
      tensors[f"model/{scope}/{kind[0]}"] = x.numpy()[None] if kind == "weight" else x.numpy()
  tensors |= others
  folder.mkdir()
  write_bundle(folder / "model.ckpt", tensors)
  c = model.config
  sizes = {"n_vocab": c.vocab_size, "n_ctx": c.n_positions, "n_embd": c.n_embd, "n_head": c.n_head}
  (folder / "hparams.json").write_text(json.dumps(sizes | {"n_layer": c.n_layer}))


@needs_data
def test_logits_are_those_of_openais_graph(logits):
  expected = np.load(CHECKPOINT / "expected_logits.npz")
  assert np.abs(logits(CHECKPOINT, expected["tokens"]) - expected["logits"]).max() <= 2e-5


WITHOUT = """
import sys
for name in ("tensorflow", "torch", "transformers"):
  sys.modules[name] = None
from gpt2_jax.convert import pretrained, weights
print(weights.weights_sha256(pretrained.open_weights(sys.argv[1])))
"""


@needs_data
def test_tensorflow_need_not_be_installed():
  """Nor torch: an import of either fails in this process."""
  command = [sys.executable, "-c", WITHOUT, str(CHECKPOINT)]
  root = pathlib.Path(__file__).parents[2]
  process = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert process.returncode == 0, process.stderr[-2000:]
  assert process.stdout.strip() == weights_sha256(pretrained.open_weights(str(CHECKPOINT)))


def test_logits_are_transformers(folder, random_gpt2, logits, their_logits):
  assert np.abs(logits(folder) - their_logits(random_gpt2())).max() <= 1e-4


@pytest.mark.skipif(
  "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set: no vocabulary"
)
def test_the_vocabulary_in_the_folder_is_read(random_gpt2, tmp_path):
  """encoder.json and vocab.bpe are Hugging Face's two files by other names."""
  write(random_gpt2(n_head=1, K=2, n_layer=1, vocab_size=50257), tmp_path / "124M")
  assert pretrained.open_weights(str(tmp_path / "124M")).tokenizer == Gpt2Bpe(), (
    "without files, by its size"
  )
  write_vocabulary(Gpt2Bpe(), tmp_path, 16)
  shutil.copy(tmp_path / "vocab.json", tmp_path / "124M" / "encoder.json")
  shutil.copy(tmp_path / "merges.txt", tmp_path / "124M" / "vocab.bpe")
  found = pretrained.open_weights(str(tmp_path / "124M")).tokenizer
  assert found.fingerprint == Gpt2Bpe().fingerprint and found.encode("Hello world") == [15496, 995]


def test_missing_files_are_one_line(folder, tmp_path, refused):
  shutil.copytree(folder, tmp_path / "a")
  (tmp_path / "a" / "hparams.json").unlink()
  refused(tmp_path / "a", "hparams.json is not there; the checkpoint is not complete")
  (folder / "model.ckpt.data-00000-of-00001").rename(tmp_path / "data")
  refused(folder, "model.ckpt.data-00000-of-00001 is not there; the checkpoint is not complete")
  (folder / "model.ckpt.index").unlink()
  refused(folder, r"has 0 files \*.index; it takes one")


def test_damaged_files_are_one_line(folder, refused):
  """A short file is found at the start, a changed byte when its tensor is read."""
  data, index = folder / "model.ckpt.data-00000-of-00001", folder / "model.ckpt.index"
  whole = data.read_bytes()
  for size in (0, 100, len(whole) - 1):
    data.write_bytes(whole[:size])
    with pytest.raises(
      ValueError, match=f"{data} is damaged: it ends at byte {size:,}, and model/"
    ):
      pretrained.open_weights(str(folder))
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  data.write_bytes(flipped)
  refused(folder, f"{data} is damaged: model/h1/.* has another checksum; fetch it again")
  data.write_bytes(whole)
  weights_sha256(pretrained.open_weights(str(folder)))
  for content in (b"", b"junk" * 50, index.read_bytes()[:-10]):
    index.write_bytes(content)
    refused(folder, f"{index} is no whole TensorFlow checkpoint: it does not end as one; fetch it")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"n_layer": 5}, r"missing: model/h2-4/ln_1/g, "),
    ({"n_vocab": 257}, r"misshapen: model/wte is \[131, 16\], not \[257, 16\]"),
    ({"n_head": 0}, "hparams.json states sizes that no GPT-2 has: n_head is '0'"),
    ({"n_embd": "16", "n_ctx": 10**20}, "n_ctx is '100000000000000000000', n_embd is '16'"),
    ({"n_head": 3}, "n_embd of 16 does not divide by n_head of 3"),
  ],
)
def test_invalid_hparams_are_one_line(changes, message, folder, refused):
  hparams = json.loads((folder / "hparams.json").read_text())
  (folder / "hparams.json").write_text(json.dumps(hparams | changes))
  refused(folder, message)
  (folder / "hparams.json").write_text(json.dumps({"n_layer": 2, "n_head": 4}))
  refused(folder, "hparams.json says nothing of n_vocab, n_ctx, n_embd")


def test_unexpected_names_are_listed(random_gpt2, tmp_path, refused):
  others = {f"model/h{i}/ln_3/g": np.ones(2, np.float32) for i in range(2)}
  write(random_gpt2(), tmp_path / "other", **others)
  refused(tmp_path / "other", r"\(extra: model/h0-1/ln_3/g\)")


def test_what_fine_tuning_leaves_is_ignored(random_gpt2, folder, tmp_path, refused):
  """An optimizer's variables, and older checkpoints beside the one that the file `checkpoint`
  names."""
  one = np.ones(2, np.float32)
  write(
    random_gpt2(),
    tmp_path / "tuned",
    **{"model/h0/ln_1/g/Adam": one, "model/wpe/Adam_1": one, "beta1_power": one},
  )
  assert weights_sha256(pretrained.open_weights(str(tmp_path / "tuned"))) == weights_sha256(
    pretrained.open_weights(str(folder))
  )
  for file in list(folder.glob("model.ckpt.*")):
    shutil.copy(file, folder / file.name.replace("model.ckpt", "model-100"))
    file.write_bytes(b"older, and not read")
  refused(
    folder,
    r"has 2 files \*.index; it takes one, model.ckpt.index, or a file `checkpoint` that names one",
  )
  for prefix in ("model-100", "/some/where/else/model-100"):
    (folder / "checkpoint").write_text(
      f'model_checkpoint_path: "{prefix}"\nall_model_checkpoint_paths: "model.ckpt"\n'
    )
    assert weights_sha256(pretrained.open_weights(str(folder))) == weights_sha256(
      pretrained.open_weights(str(tmp_path / "tuned"))
    )
