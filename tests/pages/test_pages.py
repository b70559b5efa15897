# SPDX-License-Identifier: Apache-2.0
"""Every command and snippet of every page works as it stands, in a folder that holds what it names.

Published names are a small local checkpoint, models and step counts are small, the cloud's programs
only record how they are called. What a page shows in a `text` block is not run.
"""

import gzip
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gpt2_jax
from gpt2_jax.gpt1 import new_model
from gpt2_jax.tokenizer import read_tokenizer_folder
from tests.launch.bad_inputs.runner import Worker
from tests.pages import commands
from tests.pages.markdown import ROOT, blocks, inline_commands, links, page_names

DATA = os.environ.get("GPT2_JAX_TEST_DATA")
needs_data = pytest.mark.skipif(
  not (DATA and os.environ.get("TIKTOKEN_CACHE_DIR")),
  reason="GPT2_JAX_TEST_DATA and TIKTOKEN_CACHE_DIR name no data",
)
STORY = "Once upon a time there was a cat that sat on a mat by the sea, and it was glad. " * 6


class PageWorker(Worker):
  """A worker with eight devices, GPT-2's vocabulary and the fake bucket."""

  more: dict[str, str] = {}

  def environment(self) -> dict[str, str]:
    return super().environment() | self.more


@pytest.fixture(scope="module")
def setting(tmp_path_factory, _server):
  """(worker, sandbox, shims): the folder that the pages speak of, as a reader would have it."""
  top = tmp_path_factory.mktemp("pages")
  sandbox, shims, streams = top / "sandbox", top / "shims", top / "streams"
  for folder in (sandbox, shims, streams, sandbox / "home", sandbox / "tmp", sandbox / "data"):
    folder.mkdir()
  worker = PageWorker(sandbox, streams)
  worker.more = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "TIKTOKEN_CACHE_DIR": os.environ["TIKTOKEN_CACHE_DIR"],
    "STORAGE_EMULATOR_HOST": _server.url,
    "TENSORSTORE_GCS_HTTP_URL": _server.url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a token",
  }
  _server.reset()

  # 1. Texts, and the evaluation sets.
  (sandbox / "books").mkdir()
  for number in range(200):
    (sandbox / "books" / f"{number:03}.txt").write_text(f"{number}. {STORY}")
  (sandbox / "book.txt").write_text(STORY * 20)
  (sandbox / "story.txt").write_text(STORY)
  write_corpora(sandbox)
  (sandbox / "e2e.txt").write_text(
    "name : Aromi | area : riverside||Aromi is by the river .\n" * 20
  )
  for folder in pathlib.Path(DATA).iterdir():
    if folder.name != "lambada":
      (sandbox / "data" / folder.name).symlink_to(folder)

  # A snippet scores every passage of LAMBADA that there is.
  (sandbox / "data" / "lambada").mkdir()
  for path in (pathlib.Path(DATA) / "lambada").glob("*.jsonl"):
    head = path.read_text().splitlines(keepends=True)[:100]
    (sandbox / "data" / "lambada" / path.name).write_text("".join(head))

  # 2. A run, and a checkpoint that stands for the published ones.
  def make(line: str) -> None:
    [call] = commands.record(line, sandbox, shims)
    commands.run(call, worker, sandbox)

  commands.make_shims(shims, sandbox)
  make("gpt2-jax tokenize --files='books/**/*.txt' --split='train[:99%]' --out=data/train")
  make("gpt2-jax tokenize --files='books/**/*.txt' --split='train[99%:]' --out=data/validation")
  for workdir in ("runs/117M", "runs/demo", "gs://bucket/1542M"):
    make(f"gpt2-jax train --config=gpt2:117M --workdir={workdir}")
  save_small_gpt2(sandbox / "gpt2")
  save_small_gpt1(sandbox / "models" / "gpt1")
  yield worker, sandbox, shims
  worker.close()


def write_labelled(path: pathlib.Path) -> None:
  """Ten documents, each with a person's text and a machine's."""
  lines = []
  for document in range(10):
    for label in ("human", "machine"):
      lines.append({"text": f"{label} {STORY}", "label": label, "document": document})
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_corpora(folder: pathlib.Path) -> None:
  """Corpora in the formats of other projects, and texts with labels."""
  write_labelled(folder / "labelled.jsonl")
  (folder / "fineweb").mkdir()
  pq.write_table(pa.table({"text": [STORY] * 3}), folder / "fineweb" / "000_00000.parquet")
  (folder / "stories.txt.gz").write_bytes(gzip.compress(f"{STORY}<|endoftext|>\n".encode() * 3))
  (folder / "openwebtext").mkdir()
  (folder / "crawl").mkdir()
  head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
  page = head + f"<html><body><article><p>{STORY}</p></article></body></html>".encode()
  record = "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://a.example.org/1\r\n"
  record += "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
  record += "Content-Type: application/http; msgtype=response\r\n"
  record = f"{record}Content-Length: {len(page)}\r\n\r\n".encode() + page + b"\r\n\r\n"
  (folder / "crawl" / "a.warc.gz").write_bytes(gzip.compress(record))
  post = '{"url": "https://a.example.org/1", "score": 3, "is_self": false}\n'
  with pa.output_stream(str(folder / "RS_2017-01.zst"), compression="zstd") as stream:
    stream.write(post.encode())
  np.array([464, 50256] * 9, np.uint16).tofile(folder / "openwebtext" / "train.bin")


def save_small_gpt2(folder: pathlib.Path) -> None:
  """A GPT-2 with random weights: the vocabulary of the published ones, small else."""
  config = gpt2_jax.ModelConfig(n_ctx=256, n_layer=1, n_embd=16, n_head=2, dtype="float32")
  with jax.set_mesh(gpt2_jax.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    model = gpt2_jax.GPT2(config, jax.random.key(0))
  tokenizer = gpt2_jax.load_tokenizer("gpt2")
  gpt2_jax.save_pretrained(model, tokenizer, str(folder), form="hf")


def save_small_gpt1(folder: pathlib.Path) -> None:
  """OpenAI's files of a GPT-1 of one layer with random weights, and its vocabulary."""
  sizes = {"n_vocab": 40478, "n_ctx": 64, "n_embd": 64, "n_head": 1, "n_layer": 1}
  config = gpt2_jax.ModelConfig(**sizes, dtype="float32", family="gpt1")
  with jax.set_mesh(gpt2_jax.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    model = new_model(config, jax.random.key(0))
  tokenizer = read_tokenizer_folder(pathlib.Path(DATA) / "gpt1")
  gpt2_jax.save_pretrained(model, tokenizer, str(folder), form="gpt1")


@pytest.mark.parametrize("page", page_names())
def test_every_link_leads_somewhere(page):
  for target in links(page):
    file, _, anchor = target.partition("#")
    path = (ROOT / page).parent / file if file else ROOT / page
    assert path.exists(), f"{page}: {target}"
    if anchor:
      headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
      slugs = [re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings]
      assert anchor in slugs, f"{page}: {target} is none of {slugs}"


def test_every_block_says_what_it_is():
  for page in page_names():
    blocks(page)


def shell_blocks() -> list:
  found = []
  for page in page_names():
    found += [block for block in blocks(page) if block.language == "bash"]
    # CONTRIBUTING speaks of files that are not there: tests/cli/test_contributing.py writes them.
    if page != "CONTRIBUTING.md":
      found += inline_commands(page)
  return found


def python_pages() -> list[str]:
  # CONTRIBUTING has files of the project as code: tests/cli/test_contributing.py places them.
  pages = [page for page in page_names() if page != "CONTRIBUTING.md"]
  return [p for p in pages if any(block.language == "python" for block in blocks(p))]


@needs_data
@pytest.mark.parametrize("block", shell_blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_a_command_works(block, setting):
  worker, sandbox, shims = setting
  calls = commands.record(block.text, sandbox, shims)
  assert calls, "no command is in it"
  for call in calls:
    forget_outputs(call, sandbox)
    commands.run(call, worker, sandbox)


def forget_outputs(call: commands.Call, sandbox: pathlib.Path) -> None:
  """Removes what a page before has written where this call writes, other than a run it resumes."""
  for flag in call.arguments:
    name, _, value = flag.partition("=")
    if name in ("--out", "--to", "--workdir", "--filter") and "://" not in value:
      path = sandbox / value
      if path.is_dir():
        shutil.rmtree(path)
      elif path.exists():
        path.unlink()


@needs_data
@pytest.mark.parametrize("page", python_pages())
def test_a_snippet_works(page, setting):
  _, sandbox, _ = setting
  source = "import gpt2_jax\nmodel, tokenizer = gpt2_jax.load_pretrained('./gpt2')\n"
  source += "\n".join(block.text for block in blocks(page) if block.language == "python")
  source = re.sub(r'"(gpt2|gpt2-xl|distilgpt2)"', '"./gpt2"', source)
  # The context is a quarter of theirs: a window, and what outgrows it, are a quarter as well.
  source = source.replace("SlidingWindow(512)", "SlidingWindow(128)")
  source = source.replace("n_new=2000", "n_new=500")
  job = subprocess.run(
    [sys.executable, "-c", source],
    cwd=sandbox,
    env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert job.returncode == 0, job.stderr[-1500:]
