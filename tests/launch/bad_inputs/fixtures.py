# SPDX-License-Identifier: Apache-2.0
"""What the command lines are given: stores, a run, checkpoints and cells, each whole and damaged.

The whole ones are made by the commands themselves, so that each is a control, too.
"""

import gzip
import json
import math
import pathlib
import shlex
import shutil
import zipfile
from collections.abc import Callable

import numpy as np

from tests.launch.bad_inputs.runner import Sandbox, Worker

# The characters of a terminal, and as many again in no order.
TEXT = "".join(map(chr, range(32, 127))) + "".join(
  chr(32 + (i * i + i // 7) % 95) for i in range(4000)
)
STORY = "Once upon a time there was a cat that sat on a mat by the sea. " * 8
TOKENIZE = "--tokenizer=characters.json --processes=1"
DATA = "--config.data.train=train --config.data.validation=validation "
DATA += "--config.data.tokenizer=characters.json"
CALIBRATE = "--model=hf --calibrate=labelled.jsonl --false_positives=0.5"
SIZES = "--config.model.n_vocab=95 --config.model.n_ctx=32 --config.model.n_embd=8 "
SIZES += "--config.model.n_head=2 --config.model.n_layer=2"
STEPS = "--config.steps=4 --config.steps_per_call=2 --config.batch_size=2 --config.warmup_steps=1 "
STEPS += "--config.save_every=2 --config.eval_every=2 --config.log_every=1 --config.keep=3"
TRAIN = f"--config=configs/shakespeare.py {DATA} {SIZES} {STEPS}"
SWEEP = "--config.resamples=10 --config.batch_size=8"

# A home that is not there.
NOBODY = "~nobody_of_this_name"
# What is no checkpoint, for any command: a name, what the error says, and the path.
FEW = [
  ("a model that is not there", "gone", "./gone"),
  ("a name that is none", "gtp2", "gtp2"),
  ("a folder that is empty", "hollow", "hollow"),
  ("a text as model", "story.txt", "story.txt"),
  ("half of the weights", "model.safetensors", "hf-cut"),
  ("a model of nobody", "nobody_of_this_name", f"{NOBODY}/model"),
]

OWN = "gpt2_jax_tokenizer.json"
GPT1_VOCABULARY, GPT1_MERGES = "encoder_bpe_40000.json", "vocab_40000.bpe"
NO_TOKENIZER = dict.fromkeys((OWN, "tokenizer.json", "tokenizer_config.json"))  # files that go
DEEP = "[" * 100_000
# JSON that no file of this project is: of another kind, too deep, cut off, not text.
SHAPES = {
  "list": b"[1, 2]",
  "number": b"7",
  "null": b"null",
  "deep": DEEP.encode(),
  "cut": b'{"config": {"mod',
  "empty": b"",
  "bytes": b"\xff\xfe\x00{}",
}


class Maker:
  """Makes files in a sandbox, by commands or by hand."""

  def __init__(self, sandbox: Sandbox, worker: Worker):
    self.folder, self.worker = sandbox.folder, worker

  def run(self, script: str, flags: str) -> None:
    """Runs a command line, which has to work."""
    result = self.worker.run(script, shlex.split(flags), seconds=120)
    assert result.status == 0, (script, flags, result)

  def write(self, name: str, content: str | bytes) -> None:
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

  def copy(
    self, source: str, name: str, files: dict[str, str | bytes | None] | None = None
  ) -> pathlib.Path:
    """A copy of a folder in which some files have other contents; None is one that is gone."""
    shutil.copytree(self.folder / source, self.folder / name)
    for file, content in (files or {}).items():
      if content is None:
        (self.folder / name / file).unlink()
      else:
        self.write(f"{name}/{file}", content)
    return self.folder / name

  def edit(self, path: str, change: Callable[[dict], object]) -> None:
    """Changes a JSON file."""
    file = self.folder / path
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def make_stores(make: Maker) -> None:
  make.write("text.txt", TEXT)
  make.write("story.txt", STORY)
  make.run("tokenize", f"--files=text.txt --train_tokenizer=characters {TOKENIZE} --out=train")
  make.run("tokenize", f"--files=text.txt --characters=:1000 {TOKENIZE} --out=validation")


def make_run(make: Maker) -> None:
  make.run("train", f"{TRAIN} --workdir=run")


def make_checkpoints(make: Maker) -> None:
  make.run("convert", "--from=run --to=hf")
  make.run("convert", "--from=run --to=llm.bin --format=llmc")
  make.run("convert", "--from=run --to=nano --format=nanogpt --other_gelu")


def damage_stores(make: Maker) -> None:
  """Stores and tokenizers that are none, each in its own way."""
  make.run("tokenize", f"--files=text.txt --characters=:10 {TOKENIZE} --out=ten")
  make.write("abc.txt", "abc" * 50)
  make.run(
    "tokenize",
    "--files=abc.txt --train_tokenizer=characters --tokenizer=abc.json --processes=1 --out=abc",
  )
  for shape, content in SHAPES.items():
    make.copy("train", f"store-{shape}", {"manifest.json": content})
    make.write(f"tokenizer-{shape}.json", content)
  make.copy("train", "store-half", {"manifest.json": None})
  make.copy("train", "store-job", {"manifest.json": None, "job.json": DEEP})
  make.copy("train", "store-zarr", {"part-00000/zarr.json": "{}"})
  make.copy("train", "store-chunk", {"part-00000/c/0": b"no chunk"})
  shutil.rmtree(make.copy("train", "store-part") / "part-00000")

  def manifest(name, change):
    make.copy("train", f"store-{name}")
    make.edit(f"store-{name}/manifest.json", change)

  manifest("format", lambda x: x.update(format=99))
  manifest("no-parts", lambda x: x.pop("parts"))
  manifest("parts-empty", lambda x: x.update(parts={}))
  manifest("parts-list", lambda x: x.update(parts=[1]))
  manifest(
    "outside", lambda x: x.update(parts={"../validation/part-00000": x["parts"]["part-00000"]})
  )
  manifest("tokens", lambda x: x.update(tokens=10**6))
  manifest("sum", lambda x: x["parts"]["part-00000"].update(sha256="0" * 64))
  manifest("fingerprint", lambda x: x.update(tokenizer_fingerprint="0" * 64))
  make.write("tokenizer-surrogate.json", '{"kind": "characters", "alphabet": "\\ud800"}')
  make.write("tokenizer-other.json", '{"kind": "words", "words": []}')
  make.write("empty.model", b"")
  make.write("garbage.model", bytes(range(256)))


def damage_runs(make: Maker) -> None:
  """Workdirs whose newest checkpoint cannot be trusted, or none of them."""
  for shape, content in SHAPES.items():
    both = {f"checkpoints/{step}/about/metadata": content for step in (2, 4)}
    make.copy("run", f"run-about-{shape}", both)
    both = {f"checkpoints/{step}/sums/metadata": content for step in (2, 4)}
    make.copy("run", f"run-sums-{shape}", both)
  both = {f"checkpoints/{step}/state/manifest.ocdbt": b"x" for step in (2, 4)}
  make.copy("run", "run-manifest", both)
  run = make.copy("run", "run-renamed")
  (run / "checkpoints" / "4").rename(run / "checkpoints" / "9")
  shutil.rmtree(run / "checkpoints" / "2")
  for name, change in {
    "layers": lambda model: model.update(n_layer=4),
    "heads": lambda model: model.update(n_head=4),
    "context": lambda model: model.update(n_ctx=8),
    "gelu": lambda model: model.update(gelu="erf"),
    "width": lambda model: model.update(n_embd="wide"),
    "knob": lambda model: model.update(colour="blue"),
  }.items():
    make.copy("run", f"run-{name}")
    for step in (2, 4):
      make.edit(
        f"run-{name}/checkpoints/{step}/about/metadata",
        lambda about, change=change: change(about["config"]["model"]),
      )
  (make.folder / "run-none" / "checkpoints").mkdir(parents=True)


def damage_folders(make: Maker) -> None:
  """Folders of Hugging Face's that are no whole GPT-2."""
  weights = (make.folder / "hf" / "model.safetensors").read_bytes()
  for shape, content in SHAPES.items():
    make.copy("hf", f"hf-config-{shape}", {"config.json": content})
    make.copy("hf", f"hf-tokenizer-{shape}", {"tokenizer.json": content, OWN: None})
  for name, changes in {
    "type": {"model_type": "llama"},
    "layers": {"n_layer": 4},
    "heads": {"n_head": 3},
    "words": {"n_layer": "two"},
    "negative": {"n_embd": -8},
    "huge": {"n_layer": 10**9},
    "gelu": {"activation_function": "relu"},
    "eps": {"layer_norm_epsilon": 1e-3},
    "nested": {"n_layer": {"a": 1}},
  }.items():
    make.copy("hf", f"hf-{name}")
    make.edit(f"hf-{name}/config.json", lambda config, changes=changes: config.update(changes))
  make.copy("hf", "hf-cut", {"model.safetensors": weights[: len(weights) // 2]})
  make.copy("hf", "hf-long", {"model.safetensors": weights + b"more"})
  make.copy("hf", "hf-garbage", {"model.safetensors": bytes(range(256)) * 9})
  make.copy("hf", "hf-no-weights", {"model.safetensors": None})
  make.copy("hf", "hf-no-tokenizer", NO_TOKENIZER)
  for shape in ("list", "deep"):
    folder = f"hf-index-{shape}"
    make.copy("hf", folder, {"model.safetensors": None})
    make.write(f"{folder}/model.safetensors.index.json", SHAPES[shape])
  make.copy("hf", "hf-index-outside", {"model.safetensors": None})
  index = {"weight_map": {"wte.weight": "../hf/model.safetensors"}}
  make.write("hf-index-outside/model.safetensors.index.json", json.dumps(index))
  make.copy("hf", "hf-vocab", NO_TOKENIZER | {"vocab.json": '{"a": "b"}'})
  make.write("hf-vocab/merges.txt", "#version: 0.2\na b c d\n")
  _not_finite(make, "hf-nan", np.nan)
  _not_finite(make, "hf-inf", np.inf)
  (make.folder / "hollow").mkdir()


def _not_finite(make: Maker, name: str, value: float) -> None:
  """A checkpoint in which one weight is no number."""
  from safetensors.numpy import load_file, save_file

  path = str(make.copy("hf", name) / "model.safetensors")
  tensors = {key: np.array(x) for key, x in load_file(path).items()}
  next(x for key, x in tensors.items() if key.endswith("wte.weight"))[0, 0] = value
  save_file(tensors, path, {"format": "pt"})


def damage_files(make: Maker) -> None:
  """Files of nanoGPT and llm.c, and folders of OpenAI."""
  torch_file = (make.folder / "nano" / "ckpt.pt").read_bytes()
  make.copy("nano", "nano-cut", {"ckpt.pt": torch_file[: len(torch_file) // 2]})
  make.copy("nano", "nano-pickle", {"ckpt.pt": b"\x80\x04cos\nsystem\n(S'true'\ntR."})
  make.copy("nano", "nano-text", {"ckpt.pt": "no checkpoint"})
  make.copy("nano", "nano-meta", {"meta.pkl": b"\x80\x04N."})
  flipped = bytearray(torch_file)
  flipped[len(flipped) // 2] ^= 1
  make.copy("nano", "nano-flipped", {"ckpt.pt": bytes(flipped)})
  # Each member deflated: valid as a zip, but the bytes are no tensors any more.
  make.copy("nano", "nano-deflated")
  with zipfile.ZipFile(make.folder / "nano" / "ckpt.pt") as source:
    path = make.folder / "nano-deflated" / "ckpt.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
      for member in source.infolist():
        target.writestr(member.filename, source.read(member))

  binary = (make.folder / "llm.bin").read_bytes()
  header = np.frombuffer(binary[:1024], "<i4").copy()
  make.write("cut.bin", binary[:-100])
  make.write("long.bin", binary + bytes(100))
  make.write("head.bin", binary[:500])
  for name, (at, value) in {"version": (1, 99), "negative": (4, -1), "huge": (4, 1 << 30)}.items():
    changed = header.copy()
    changed[at] = value
    make.write(f"{name}.bin", changed.tobytes() + binary[1024:])
  make.write("nothing.bin", b"")
  make.write("openai/hparams.json", "{}")
  make.write("openai-deep/hparams.json", DEEP)
  sizes = {"n_vocab": 95, "n_ctx": 32, "n_embd": 8, "n_head": 2, "n_layer": 2}
  make.write("openai-index/hparams.json", json.dumps(sizes))
  make.write("openai-index/checkpoint", 'model_checkpoint_path: "model.ckpt"\n')
  make.write("openai-index/model.ckpt.index", bytes(range(200)))
  make.write("openai-index/model.ckpt.data-00000-of-00001", b"x")


def damage_gpt1(make: Maker) -> None:
  """OpenAI's folders of a GPT-1 of one layer, whole and damaged."""
  V, T, D = 95, 32, 64
  layer = [[1, D, 3 * D], [3 * D], [1, D, D], [D], [D], [D]]
  layer += [[1, D, 4 * D], [4 * D], [1, 4 * D, D], [D], [D], [D]]
  shapes = [[T, D], [V, D], *layer]
  n = sum(map(math.prod, shapes))
  numbers = np.random.default_rng(0).normal(0.0, 0.02, n).astype(np.float32)
  for number, part in enumerate(np.array_split(numbers, 10)):
    (make.folder / "gpt1").mkdir(exist_ok=True)
    np.save(make.folder / "gpt1" / f"params_{number}.npy", part)
  make.write("gpt1/params_shapes.json", json.dumps(shapes))
  make.write(f"gpt1/{OWN}", (make.folder / "characters.json").read_bytes())

  for shape, content in SHAPES.items():
    make.copy("gpt1", f"gpt1-shapes-{shape}", {"params_shapes.json": content})
    vocabulary = {OWN: None, GPT1_VOCABULARY: content, GPT1_MERGES: "#version: 0.2\n"}
    make.copy("gpt1", f"gpt1-vocabulary-{shape}", vocabulary)
  for name, changed in {
    "wide": [[T, D], [V, 2 * D], *layer],
    "heads": [[T, 65], [V, 65], *layer],
    "longer": [[T + 1, D], [V, D], *layer],
    "layer": [*shapes, *layer],
    "half": shapes[:-5],
    "turned": [[T, D], [V, D], [1, 3 * D, D], *layer[1:]],
  }.items():
    make.copy("gpt1", f"gpt1-{name}", {"params_shapes.json": json.dumps(changed)})
  make.copy("gpt1", "gpt1-nine", {"params_9.npy": None})
  make.copy("gpt1", "gpt1-gap", {"params_4.npy": None})
  part = (make.folder / "gpt1" / "params_3.npy").read_bytes()
  make.copy("gpt1", "gpt1-cut", {"params_3.npy": part[:-100]})
  make.copy("gpt1", "gpt1-garbage", {"params_3.npy": bytes(range(256))})
  for name, array in {
    "whole-numbers": np.arange(9),
    "square": np.zeros((3, 3), np.float32),
    "pickle": np.array([{}], object),
  }.items():
    np.save(make.copy("gpt1", f"gpt1-{name}") / "params_3.npy", array)

  # A vocabulary with more tokens than there are embeddings.
  tokens = [f"{chr(97 + i % 26)}{i}</w>" for i in range(V + 5)]
  vocabulary = json.dumps({token: i for i, token in enumerate(tokens)})
  files = {OWN: None, GPT1_VOCABULARY: vocabulary, GPT1_MERGES: "#version: 0.2\n"}
  make.copy("gpt1", "gpt1-more-tokens", files)
  files[GPT1_VOCABULARY] = json.dumps({token: i for i, token in enumerate(tokens[:V])})
  make.copy("gpt1", "gpt1-half-vocabulary", {OWN: None, GPT1_MERGES: "#version: 0.2\n"})
  make.copy("gpt1", "gpt1-no-merges", files | {GPT1_MERGES: "a b\n"})


def write_configs(make: Maker) -> None:
  """Config files with errors in them."""
  for name, source in {
    "syntax": "def get_config(:\n",
    "raises": "def get_config():\n  return 1 / 0\n",
    "top": "import no_such_module_anywhere\n",
    "recursion": "def get_config():\n  return get_config()\n",
    "nothing": "x = 1\n",
    "none": "def get_config():\n  pass\n",
    "dict": "def get_config():\n  return {'steps': 3}\n",
    "short": "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()\n",
    "exits": "raise SystemExit(0)\n",
    "bytes": "\x00\x01",
    "key": "from configs import gpt2\ndef get_config():\n  return {}['model']\n",
    "knob": (
      "from configs import gpt2\ndef get_config():\n  c = gpt2.get_config()\n"
      "  c.colour = 3\n  return c\n"
    ),
  }.items():
    make.write(f"bad/{name}.py", source)
  make.write("bad/text.txt", "learning_rate = three\n")


def write_examples(make: Maker) -> None:
  """Examples for fine-tuning, good ones and bad ones, and templates of one's own."""
  pair = {"prompt": "the ", "completion": "text"}
  lists = {
    "pairs": [pair],
    "silent": [pair, {"prompt": "the", "completion": ""}, {"prompt": "of", "completion": ""}],
    "roles": [pair, {"messages": [{"role": "tool", "content": "the"}]}],
    "fields": [pair, {"question": "the", "answer": "text"}],
    "labels": [pair | {"label": "good"}],
  }
  for name, records in lists.items():
    make.write(f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
  make.write("object.json", json.dumps(pair))
  make.write("half.json", json.dumps([pair, pair])[:-5])
  make.write("mute.json", json.dumps({"turns": {"user": ["", ""]}}))
  make.run("tokenize", f"--examples=pairs.jsonl {TOKENIZE} --n_ctx=8 --out=pairs")


def write_texts(make: Maker) -> None:
  """Texts and datasets with a fault in their second line, and whole files of another shape."""
  make.write("empty.txt", "")
  make.write("bytes.txt", b"a\xff\xfeb" * 50)
  make.write("accents.txt", "é" * 200)
  make.write("many/1.txt", "one")
  make.write("many/2.txt", "two")
  good = json.dumps({"text": STORY.strip()}).encode()
  for name, line in {
    "good": good,
    "null": b'{"text": null}',
    "words": b"no JSON",
    "deep": DEEP.encode(),
    "list": b'["text"]',
    "half": b'{"text": "a \\ud800 b"}',
    "bytes": b'{"text": "\xff"}',
  }.items():
    make.write(f"{name}.jsonl", b"\n".join([good, line, good, b""]))
  make.write("whole.jsonl.gz", gzip.compress(good))
  make.write("cut.jsonl.gz", gzip.compress(good)[:-9])
  make.write("cut.parquet", b"PAR1" + good)
  make.write("cut.json", b"[%s, %s" % (good, good))
  make.write("ids.bin", np.arange(50, dtype=np.uint16).tobytes())
  make.write("odd.bin", b"\0" * 9)
  make.write("llama.bin", np.array([20240801, 7, 1, 0], np.int32).tobytes())
  make.write("none.jsonl", '{"text": null}\n{"text": 3}\n')
  make.write("numbers.jsonl", '{"sentence_good": 3, "sentence_bad": 4}\n')
  make.write("coqa-list.json", "[1]")
  make.write("coqa-deep.json", DEEP)
  make.write("coqa-shape.json", '{"data": [{"story": 3, "questions": {}, "answers": "x"}]}')


def make_thresholds(make: Maker) -> None:
  """A detector's threshold, that of another criterion, and texts with labels, good and bad."""
  labelled = [{"text": STORY, "label": label} for label in ("human", "machine")] * 3
  make.write("labelled.jsonl", "".join(json.dumps(line) + "\n" for line in labelled))
  make.write("robot.jsonl", json.dumps({"text": STORY, "label": "robot"}))
  make.write("one.jsonl", json.dumps(labelled[0]))
  make.write("short.txt", "Once")
  make.write("one.txt", "O")
  for criterion in ("fast_detectgpt", "lrr"):
    make.run("detect", f"{CALIBRATE} --criterion={criterion} --threshold={criterion}.json")


def make_sweep(make: Maker) -> None:
  """A sweep of one cell, a filter and an overlap; and each of them damaged."""
  make.run("evaluate", f"{SWEEP} --model=hf --task=text --data=story.txt --out=sweep")
  corpus = "--corpus=text.txt --task=text --data=story.txt"
  make.run("contamination", f"{corpus} --filter=text.bloom --out=overlap.json")
  [cell] = (make.folder / "sweep" / "cells").glob("*.json")
  for shape, content in SHAPES.items():
    folder = make.copy("sweep", f"sweep-{shape}")
    (folder / "cells" / cell.name).write_bytes(content)
    make.write(f"overlap-{shape}.json", content)
  overlap = json.loads((make.folder / "overlap.json").read_text())
  make.write("overlap-words.json", json.dumps(overlap | {"ngrams": "many", "found": "none"}))
  make.write("overlap-short.json", json.dumps(overlap | {"ngrams": [], "found": [1]}))

  whole = (make.folder / "text.bloom").read_bytes()
  make.write("cut.bloom", whole[: len(whole) // 2])
  bits, about = np.ones(64, np.uint8), {"k": 27, "n": 8, "source": {}}
  for name, arrays in {
    "nobits": {"bits": bits[:0], "about": json.dumps(about)},
    "floats": {"bits": bits * 0.5, "about": json.dumps(about)},
    "probes": {"bits": bits, "about": json.dumps(about | {"k": -1})},
    "deep": {"bits": bits, "about": DEEP},
  }.items():
    np.savez(make.folder / f"{name}.npz", **arrays)


def write_arrays(make: Maker) -> None:
  """.npz files that are no logits, and no filter."""
  np.savez(make.folder / "other.npz", x=np.zeros(3))
  np.savez(make.folder / "shape.npz", tokens=np.zeros((2, 2, 2), int), logits=np.zeros(3))
  np.savez(make.folder / "pickle.npz", tokens=np.array([{}], object), logits=np.zeros(3))
