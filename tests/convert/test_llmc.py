# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from gpt2_jax.convert import llmc, pretrained
from gpt2_jax.convert.weights import weights_sha256
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters, Gpt2Bpe

torch = pytest.importorskip("torch")

# In the file's order, each for all layers at once; Conv1D's matrices are transposed.
LAYERS = "ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias".split()
LAYERS += "attn.c_proj.weight attn.c_proj.bias".split()
LAYERS += (
  "ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias".split()
)


@pytest.fixture(scope="module")
def theirs(random_gpt2):
  return random_gpt2()


def as_llmc(model, version: int) -> bytes:
  """The file that llm.c's train_gpt2.py writes of such a model: version 3 is float32, 5 is
  bfloat16."""
  state = {name: x.numpy() for name, x in model.transformer.state_dict().items()}
  dtype = {3: np.float32, 5: ml_dtypes.bfloat16}[version]
  c, rows = model.config, 256
  header = np.zeros(256, np.int32)
  header[:8] = 20240326, version, c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, rows
  parts = [np.pad(state["wte.weight"], ((0, rows - c.vocab_size), (0, 0))), state["wpe.weight"]]
  for name in LAYERS:
    for layer in range(c.n_layer):
      x = state[f"h.{layer}.{name}"]
      parts.append(x.T if x.ndim == 2 else x)
  parts += [state["ln_f.weight"], state["ln_f.bias"]]
  return header.tobytes() + b"".join(np.ascontiguousarray(part, dtype).tobytes() for part in parts)


def test_logits_are_transformers(theirs, random_gpt2, logits, their_logits, tmp_path):
  (tmp_path / "v3.bin").write_bytes(as_llmc(theirs, 3))
  (tmp_path / "v5.bin").write_bytes(as_llmc(theirs, 5))
  assert np.abs(logits(tmp_path / "v3.bin") - their_logits(theirs)).max() <= 1e-4
  rounded = random_gpt2().to(torch.bfloat16).float()
  assert np.abs(logits(tmp_path / "v5.bin") - their_logits(rounded)).max() <= 1e-4


@pytest.mark.parametrize(("version", "dtype"), [(3, "float32"), (5, "bfloat16")])
def test_what_is_written_is_llmcs(version, dtype, theirs, tmp_path):
  (tmp_path / "theirs.bin").write_bytes(as_llmc(theirs, 3))
  llmc.write(llmc.read(tmp_path / "theirs.bin"), tmp_path / "ours.bin", dtype)
  assert (tmp_path / "ours.bin").read_bytes() == as_llmc(theirs, version)


def test_what_llmc_cannot_hold(made, tmp_path):
  with pytest.raises(ValueError, match="has the erf GELU, and llm.c computes the tanh one"):
    llmc.write(made(ModelConfig(131, 16, 16, 4, 2, gelu="erf")), tmp_path / "ours.bin")
  with pytest.raises(ValueError, match="llm.c has no float16; it is float32 or bfloat16"):
    llmc.write(made(ModelConfig(131, 16, 16, 4, 2)), tmp_path / "ours.bin", "float16")
  assert not list(tmp_path.iterdir())


def test_absent_biases_are_zero(made, tmp_path):
  weights = made(ModelConfig(131, 16, 16, 4, 2, use_bias=False))
  llmc.write(weights, tmp_path / "ours.bin")
  found = llmc.read(tmp_path / "ours.bin")
  assert found.config.use_bias and not found.read("h.1.mlp.c_fc.b").any()
  assert weights_sha256(found) == weights_sha256(weights)


def test_gpt2s_tokenizer_is_the_default_for_its_vocabulary_size(made, tmp_path):
  llmc.write(made(ModelConfig(50257, 4, 2, 1, 1)), tmp_path / "ours.bin")
  assert llmc.read(tmp_path / "ours.bin").tokenizer == Gpt2Bpe()


@pytest.mark.parametrize(
  ("entry", "value", "message"),
  [
    (0, 20240520, "is no GPT-2 checkpoint"),
    (1, 1, "is of llm.c's version 1; 3 .float32. and 5 .bfloat16. hold a model"),
    (1, 5, "bytes, and its header speaks of .*; fetch it again"),
    (2, 0, "the header of .* n_ctx is '0'"),
    (4, 20_001, "the header of .* n_layer is '20001'"),
    (5, 0, "the header of .* n_head is '0'"),
    (5, 3, "the header of .* n_embd of 16 does not divide by n_head of 3"),
    (6, -16, "the header of .* n_embd is '-16'"),
    (7, 130, "pads 131 tokens to 130 rows"),
  ],
)
def test_a_damaged_header_is_one_line(entry, value, message, theirs, tmp_path, refused):
  header = np.frombuffer(as_llmc(theirs, 3), np.int32).copy()
  header[entry] = value
  (tmp_path / "x.bin").write_bytes(header.tobytes())
  refused(tmp_path / "x.bin", message)


@pytest.mark.parametrize("size", [4, 8, 500, 1024, 5000, -1])
def test_a_truncated_file_is_one_line(size, theirs, tmp_path, refused):
  (tmp_path / "x.bin").write_bytes(as_llmc(theirs, 3)[:size])
  refused(tmp_path / "x.bin", "fetch it again|version 0|sizes that no GPT-2 has")
  (tmp_path / "x.bin").write_bytes(as_llmc(theirs, 3) + b"\0")
  refused(tmp_path / "x.bin", "fetch it again")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is no JSON"),
    ("[" * 100_000, "nested too deep"),
    ('{"kind": "huggingface", "payload": "{}"}', "no tokenizer.json"),
    ('{"kind": "characters", "alphabet": "ba"}', "sorted characters"),
    (json.dumps({"kind": "characters", "alphabet": "".join(map(chr, range(32, 164)))}), "has 132"),
  ],
  ids=range(5),
)
def test_an_invalid_tokenizer_is_one_line(content, message, theirs, tmp_path, refused):
  """Told when the model is opened, not at its first text."""
  (tmp_path / "model.bin").write_bytes(as_llmc(theirs, 3))
  (tmp_path / "model.bin.tokenizer.json").write_text(content)
  refused(tmp_path / "model.bin", f"the vocabulary in .*model.bin.tokenizer.json.*{message}")


def test_another_models_tokenizer_is_not_taken_over(theirs, tmp_path):
  """The file beside that the new model would be read with; also if it comes while that is
  written."""
  (tmp_path / "theirs.bin").write_bytes(as_llmc(theirs, 3))
  weights = llmc.read(tmp_path / "theirs.bin")
  letters = Characters("ab")
  extra_file = tmp_path / "ours.bin.tokenizer.json"

  def read(name):
    extra_file.write_text(json.dumps(letters.to_json()))
    return weights.read(name)

  for tokenizer in (None, Gpt2Bpe(), Characters("cd")):
    late = dataclasses.replace(weights, read=read, tokenizer=tokenizer)
    extra_file.unlink(missing_ok=True)
    for _ in range(2):
      with pytest.raises(FileExistsError, match="ours.bin.tokenizer.json is there already"):
        pretrained.write(late, str(tmp_path / "ours.bin"), "llmc")
    assert not (tmp_path / "ours.bin").exists()
    assert json.loads(extra_file.read_text()) == letters.to_json()
