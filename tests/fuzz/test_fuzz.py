# SPDX-License-Identifier: Apache-2.0
"""Fuzzing: of every container that is read, damaged copies are refused in one line, or are whole.

GPT2_JAX_MUTANTS=2000 tries that many mutants of each; the default is what takes a minute in all.
What a format has checksums for (torch's zips, workdirs, token stores, OpenAI's bundles, cells)
never gives anything but what was written. A mutant is made by its number alone: a failure names it.
"""

import collections
import contextlib
import dataclasses
import functools
import gzip
import json
import lzma
import os
import pathlib
import random
import signal
from collections.abc import Callable

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2_jax import tokenizer as tokenizer_lib
from gpt2_jax.convert import parity, pretrained
from gpt2_jax.convert.weights import Weights, from_model, weights_sha256
from gpt2_jax.data import TokenStore, encode_corpus
from gpt2_jax.data.readers import choose_reader
from gpt2_jax.evaluate import contamination, tasks
from gpt2_jax.evaluate.sweep import cells
from gpt2_jax.files import sha256
from gpt2_jax.gpt1 import new_model
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs import checkpoint
from gpt2_jax.runs.metrics import Metrics, plot_losses
from gpt2_jax.sharding import make_mesh
from tests.evaluate.sweep import test_cells
from tests.fuzz.mutants import copy_fresh, mutate_file

TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(3000))
CONFIG = ModelConfig(131, 16, 16, 4, 2)
SECONDS = 30  # of one mutant, after which it counts as hanging
LINE = 1000  # characters of an error's text


class Hanging(BaseException):
  """Not an Exception: nothing that is tested may catch it."""


@contextlib.contextmanager
def within(seconds: int):
  def give_up(*_):
    raise Hanging

  before = signal.signal(signal.SIGALRM, give_up)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@functools.cache
def one_device() -> jax.sharding.Mesh:
  return make_mesh(1, 1, 1, jax.devices()[:1])


def random_weights(seed: int = 0, **config) -> Weights:
  with jax.set_mesh(one_device()):
    model = new_model(dataclasses.replace(CONFIG, **config), jax.random.key(seed))
  return from_model(model, None)


@dataclasses.dataclass(frozen=True)
class Container:
  """A kind of file: how one is made, and what is seen of it when it is read, as a short text."""

  make: Callable[[pathlib.Path], None]
  read: Callable[[pathlib.Path], str]
  mutants: int  # by default
  pattern: str = "**/*"  # of the files that are damaged
  has_checksums: bool = False  # whether nothing but the truth may be read
  older: str = ""  # what may be read in its place, too
  is_beside: bool = False  # whether the damage lies beside what is read, and must not matter


# Checkpoints of others.


def save(form: str):
  """Makes a checkpoint of that form, with a tokenizer of 131 tokens in it."""

  def make(folder: pathlib.Path):
    tokenizer = tokenizer_lib.Characters("".join(map(chr, range(97, 97 + CONFIG.n_vocab))))
    options = {"nanogpt": {"gelu": "erf"}, "gpt1": {"family": "gpt1", "n_embd": 64, "n_head": 1}}
    weights = random_weights(**options.get(form, {}))
    weights = dataclasses.replace(weights, tokenizer=tokenizer)
    pretrained.write(weights, str(folder / "it"), form)

  return make


def save_byte_pairs(*kept: str):
  """Makes a Hugging Face folder with a byte-level BPE, of whose files some are kept."""

  def make(folder: pathlib.Path):
    merges = [("a", "b"), ("ab", "c"), ("d", "e")]
    alphabet = sorted(tokenizer_lib.byte_alphabet().values())
    words = [*alphabet, *map("".join, merges), tokenizer_lib.EOT]
    vocab = {word: i for i, word in enumerate(words)}

    tokenizer = tokenizer_lib.HuggingFace.from_merges(vocab, merges)
    weights = random_weights(n_vocab=len(vocab))
    pretrained.write(dataclasses.replace(weights, tokenizer=tokenizer), str(folder / "it"), "hf")
    (folder / "it/vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "it/merges.txt").write_text("\n".join(lines), encoding="utf-8")
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - set(kept):
      (folder / "it" / name).unlink()

  return make


def save_pickled(folder: pathlib.Path):
  """A Hugging Face folder of the older kind, pytorch_model.bin."""
  torch = pytest.importorskip("torch")
  safetensors_torch = pytest.importorskip("safetensors.torch")
  save("hf")(folder)
  tensors = safetensors_torch.load_file(folder / "it/model.safetensors")
  torch.save(tensors, folder / "it/pytorch_model.bin")
  (folder / "it/model.safetensors").unlink()


def copy_openai(folder: pathlib.Path):
  data = os.environ.get("GPT2_JAX_TEST_DATA")
  if not data:
    pytest.skip("GPT2_JAX_TEST_DATA names no folder of real checkpoints")
  copy_fresh(pathlib.Path(data) / "checkpoints/openai_tf", folder / "it")


def read_weights(folder: pathlib.Path) -> str:
  weights = pretrained.open_weights(str(folder / "it"))
  ids = weights.tokenizer.encode("abcd") if weights.tokenizer else None
  return f"{weights.config} {weights_sha256(weights)} {ids}"


# Runs.


def run_metadata() -> dict:
  config = {"seed": 1, "model": dataclasses.asdict(CONFIG)}
  return {"config": config, "tokenizer": tokenizer_lib.train_characters([TEXT]).to_json()}


def save_run(folder: pathlib.Path):
  """A workdir with two checkpoints, of steps 1 and 2, whose weights differ."""
  metadata = run_metadata()
  with jax.set_mesh(one_device()):
    checkpoints = checkpoint.Checkpoints(str(folder / "it"), 2)
    for step in (1, 2):
      model = GPT2(CONFIG, jax.random.key(step))
      checkpoints.save(step, {"model": model}, metadata, 1.0 / step)
    checkpoints.close()


def read_run(step: str):
  """Loads a step as evaluation and sampling do."""

  def read(folder: pathlib.Path) -> str:
    with jax.set_mesh(one_device()):
      model, tokenizer = checkpoint.load(str(folder / "it"), step)
    weights = from_model(model, tokenizer)
    return f"{weights.config} {weights_sha256(weights)} {tokenizer}"

  return read


def resume(folder: pathlib.Path) -> str:
  """Restores the newest whole checkpoint, as a run does; an older one is right, if it is itself."""
  with jax.set_mesh(one_device()):
    model = jax.eval_shape(functools.partial(GPT2, CONFIG), jax.random.key(0))
    checkpoints = checkpoint.Checkpoints(str(folder / "it"))
    state, step = checkpoints.restore_latest({"model": model}, run_metadata())
    checkpoints.close()
    saved = weights_sha256(from_model(GPT2(CONFIG, jax.random.key(step)), None))
  is_as_saved = weights_sha256(from_model(state["model"], None)) == saved
  return f"step {step}" if is_as_saved else f"step {step} with other weights"


def write_metrics(folder: pathlib.Path):
  lines = []
  for step in range(1, 30):
    line = {"step": step, "loss": 3 / step, "batch_hash": step * 77}
    lines.append(json.dumps(line | ({"val_loss": 4 / step} if step % 10 == 0 else {})))
  (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def read_metrics(folder: pathlib.Path) -> str:
  """What a run does that resumes at step 20, and the picture at its end."""
  Metrics(str(folder), 20, 30).close()
  plot_losses(str(folder))
  kept = (folder / "metrics.jsonl").read_text().splitlines()
  assert all(json.loads(line)["step"] <= 20 for line in kept)
  return sha256("".join(kept).encode())


# Data, results.


def write_store(folder: pathlib.Path):
  tokenizer = tokenizer_lib.train_characters([TEXT])
  documents = [TEXT[i : i + 500] for i in range(0, 3000, 500)]
  encode_corpus(documents, tokenizer, str(folder / "it"), {"kind": "test"}, 1, 2)


def read_store(folder: pathlib.Path) -> str:
  store = TokenStore.open(str(folder / "it"))
  store.verify()
  tokens = store.read([0], len(store))
  return f"{sha256(tokens.tobytes())} {store.tokenizer} {store.fingerprint}"


def write_cell(folder: pathlib.Path):
  cells.write(folder / "cell.json", test_cells.content())


def read_cell(folder: pathlib.Path) -> str:
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(tasks.TASKS, "toy", test_cells.TOY)
    content = cells.read(folder / "cell.json", test_cells.IDENTITY)
  sums = {name: values.tolist() for name, values in content["sums"].items()}
  return json.dumps([sums, content["metrics"]], sort_keys=True)


def write_filter(folder: pathlib.Path):
  words = " ".join(f"w{i}" for i in range(60))
  contamination.build_filter([words], 60, n=8, source={"a": 1}).save(str(folder / "filter.npz"))


def read_filter(folder: pathlib.Path) -> str:
  bloom = contamination.BloomFilter.load(str(folder / "filter.npz"))
  hashes = contamination.hash_ngrams(" ".join(f"w{i}" for i in range(30, 70)), bloom.n)
  return f"{[bloom.contains(part).tolist() for part in hashes]} {bloom.false_positive_rate}"


def write_logits(folder: pathlib.Path):
  tokens = np.arange(12).reshape(2, 6)
  logits = np.ones((2, 6, CONFIG.n_vocab), np.float32)
  np.savez(folder / "logits.npz", tokens=tokens, logits=logits)


def read_logits(folder: pathlib.Path) -> str:
  model, windows = parity.load_recorded(str(folder / "logits.npz"), CONFIG)
  return f"{windows} {model.load()(windows[0]).sum()}"


def write_sentencepiece(folder: pathlib.Path):
  (folder / "it.model").write_bytes(tokenizer_lib.train_sentencepiece([TEXT], 300).proto)


def write_characters(folder: pathlib.Path):
  (folder / "it.json").write_text(json.dumps(tokenizer_lib.train_characters([TEXT]).to_json()))


def write_folder(folder: pathlib.Path):
  """A vocabulary and its merges, with the files of transformers beside them."""
  save_byte_pairs("vocab.json", "merges.txt")(folder)
  for path in (folder / "it").iterdir():
    if path.name not in ("vocab.json", "merges.txt"):
      path.unlink()
  n_vocab = len(json.loads((folder / "it/vocab.json").read_text()))
  user = {"content": "<|user|>", "lstrip": True, "special": True}
  files = {
    "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    "special_tokens_map.json": {"eos_token": user, "additional_special_tokens": ["<|user|>"]},
    "added_tokens.json": {"<|user|>": n_vocab},
  }
  for name, content in files.items():
    (folder / "it" / name).write_text(json.dumps(content))


def write_word_pieces(folder: pathlib.Path):
  (folder / "it").mkdir()
  (folder / "it/vocab.txt").write_text("\n".join(["[UNK]", "[SEP]", "a", "##b", "##c", "abc"]))
  config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "eos_token": "[SEP]"}
  (folder / "it/tokenizer_config.json").write_text(json.dumps(config))


def write_gpt1_vocabulary(folder: pathlib.Path):
  """GPT-1's vocabulary and merges, by OpenAI's names."""
  parts = [*"abcd", *(f"{letter}</w>" for letter in "abcd"), "ab", "abc</w>", "bc</w>"]
  ids = {token: i for i, token in enumerate(["<unk>", *parts])}
  (folder / "it").mkdir()
  (folder / "it/encoder_bpe_40000.json").write_text(json.dumps(ids))
  merges = ["#version: 0.2", "a b", "b c</w>", "ab c</w>", ""]
  (folder / "it/vocab_40000.bpe").write_text("\n".join(merges))


def read_gpt1_vocabulary(folder: pathlib.Path) -> str:
  """Words are given as they are: to cut a text takes libraries that need not be there."""
  tokenizer = tokenizer_lib.read_tokenizer_folder(folder / "it")
  ids = [tokenizer._encode_word(word) for word in ("abc", "dabcd", "bc")]
  return f"{ids} {tokenizer.decode(range(12))!r} {tokenizer.fingerprint}"


def write_model_folder(folder: pathlib.Path):
  write_sentencepiece(folder)
  (folder / "it").mkdir()
  (folder / "it.model").rename(folder / "it/tokenizer.model")


def read_tokenizer(name: str):
  def read(folder: pathlib.Path) -> str:
    tokenizer = tokenizer_lib.load_tokenizer(str(folder / name))
    return f"{tokenizer.encode('abcabc')} {tokenizer.vocab_size} {tokenizer.fingerprint}"

  return read


ORBAX = "it/checkpoints/2/**/*"
# Files of documents.


def write_documents(folder: pathlib.Path):
  texts = [TEXT[i : i + 40] for i in range(0, 400, 40)]
  lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
  (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
  (folder / "a.jsonl.xz").write_bytes(lzma.compress(lines))
  (folder / "a.ndjson.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
  (folder / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
  pq.write_table(pa.table({"text": texts}), folder / "a.parquet")


def read_documents(folder: pathlib.Path) -> str:
  documents = []
  for path in sorted(map(str, folder.iterdir())):
    reader = choose_reader(path, "text", None)
    reader.digest(path)
    documents += map(str, dict(reader.records(path, "name")).values())
  return sha256("\n".join(documents).encode("utf-8", "surrogatepass"))


CONTAINERS = {
  "safetensors": Container(save("hf"), read_weights, 100, "it/model.safetensors"),
  "config.json": Container(save("hf"), read_weights, 100, "it/config.json"),
  "own tokenizer": Container(save("hf"), read_weights, 60, "it/gpt2_jax_tokenizer.json"),
  "tokenizer.json": Container(
    save_byte_pairs("tokenizer.json"), read_weights, 60, "it/tokenizer.json"
  ),
  "vocab and merges": Container(
    save_byte_pairs("vocab.json", "merges.txt"), read_weights, 60, "it/[mv]*s*"
  ),
  "llm.c": Container(save("llmc"), read_weights, 100),
  "GPT-1's shards": Container(save("gpt1"), read_weights, 60, "it/params_*"),
  "GPT-1's vocabulary": Container(write_gpt1_vocabulary, read_gpt1_vocabulary, 100),
  "ckpt.pt": Container(save("nanogpt"), read_weights, 80, "it/ckpt.pt", True),
  "pytorch_model.bin": Container(save_pickled, read_weights, 80, "it/*.bin", True),
  "OpenAI's bundle": Container(copy_openai, read_weights, 60, "it/model.ckpt*", True),
  "workdir, latest": Container(save_run, read_run("latest"), 20, ORBAX, True),
  "workdir, an older step": Container(save_run, read_run("1"), 8, ORBAX, True, "", True),
  "workdir, resumed": Container(save_run, resume, 12, ORBAX, True, "step 1"),
  "metrics.jsonl": Container(write_metrics, read_metrics, 20),
  "token store": Container(write_store, read_store, 60, "it/**/*", True),
  "documents": Container(write_documents, read_documents, 200),
  "cell": Container(write_cell, read_cell, 100, "*", True),
  "filter": Container(write_filter, read_filter, 100),
  "recorded logits": Container(write_logits, read_logits, 100),
  "sentencepiece": Container(write_sentencepiece, read_tokenizer("it.model"), 100),
  "tokenizer's folder": Container(write_folder, read_tokenizer("it"), 60, "it/*"),
  "WordPiece": Container(write_word_pieces, read_tokenizer("it"), 60, "it/*"),
  "SentencePiece's folder": Container(write_model_folder, read_tokenizer("it"), 30, "it/*"),
  "characters": Container(write_characters, read_tokenizer("it.json"), 100),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_damaged_file_is_refused_in_one_line_or_read_as_it_was(name, tmp_path, capsys):
  if name == "ckpt.pt":
    pytest.importorskip("torch")
  container = CONTAINERS[name]
  source, mutant = tmp_path / "source", tmp_path / "mutant"
  source.mkdir()
  container.make(source)
  files = sorted(path for path in source.glob(container.pattern) if path.is_file())
  names = [str(path.relative_to(source)) for path in files]
  copy_fresh(source, mutant)
  truth = container.read(mutant)

  counts, faults = collections.Counter(), []
  for number in range(int(os.environ.get("GPT2_JAX_MUTANTS", container.mutants))):
    copy_fresh(source, mutant)
    done = mutate_file(mutant, names, random.Random(f"{name} {number}"))
    outcome, fault = judge(container, mutant, truth)
    counts[outcome] += 1
    if fault:
      faults.append(f"{number} ({done}): {fault}")

  with capsys.disabled():
    if "GPT2_JAX_MUTANTS" in os.environ:
      print(f"\n{name}: {dict(counts)}")
  assert not faults, f"{len(faults)} faults: " + "\n".join(faults[:20])
  is_whole = counts["whole"] == counts.total()
  assert is_whole == container.is_beside, "no mutant was damaged enough, or a stranger to one was"


def judge(container: Container, folder: pathlib.Path, truth: str) -> tuple[str, str | None]:
  """What became of a mutant, and what is wrong with that."""
  try:
    with within(SECONDS):
      seen = container.read(folder)
  except (ValueError, OSError) as error:
    text = str(error)
    is_line = text.strip() and len(text) <= LINE and "\n" not in text
    return "refused", None if is_line else f"{type(error).__name__} of no one line: {text[:300]!r}"
  except Hanging:
    return "hanging", f"hangs for {SECONDS} s"
  except BaseException as error:
    return "crashed", f"{type(error).__name__}: {str(error)[:300]}"

  if seen == truth:
    return "whole", None
  if seen == container.older:
    return "older", None
  return "other", f"read as {seen[:200]}" if container.has_checksums else None
