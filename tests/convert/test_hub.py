# SPDX-License-Identifier: Apache-2.0
"""A fake of the Hub on this machine: the few addresses that huggingface_hub asks for a
snapshot."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import jax
import pytest

from gpt2_jax.convert import hf, hub, pretrained
from gpt2_jax.convert.weights import weights_sha256
from gpt2_jax.finetune.lora import LoraSettings, add_lora
from gpt2_jax.finetune.peft import write_adapter
from gpt2_jax.model import ModelConfig
from gpt2_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]
# Prints, a line for each name, revision and maybe adapter, the SHA-256 of the weights or the error.
READER = """
import json, sys
from gpt2_jax.convert import pretrained
from gpt2_jax.convert.weights import weights_sha256
for arguments in json.loads(sys.argv[1]):
  try:
    weights = pretrained.open_weights(*arguments)
    print(json.dumps([weights_sha256(weights), weights.source]))
  except (OSError, ValueError) as error:
    print(json.dumps(["error", str(error)]))
"""


def commit(name: str) -> str:
  return hashlib.sha1(name.encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
  """`server.commits`: {"owner/name": {revision: {file: bytes}}}; `server.log`: the files that were
  sent."""

  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  def answer(self, body: bytes, status: int = 200, **headers):
    self.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  def do_GET(self):
    parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    owner, name, verb, *rest = parts[2:] if api else parts
    revisions = self.server.commits.get(f"{owner}/{name}")
    if revisions is None:
      return self.answer(b'{"error": "Repository not found"}', 404, X_Error_Code="RepoNotFound")
    by_commit = {commit(f"{owner}/{name}/{key}"): files for key, files in revisions.items()}
    sha = rest[0] if rest[0] in by_commit else commit(f"{owner}/{name}/{rest[0]}")
    if sha not in by_commit:
      return self.answer(b'{"error": "Invalid rev id"}', 404, X_Error_Code="RevisionNotFound")
    files = by_commit[sha]
    if verb == "revision":
      about = {
        "id": f"{owner}/{name}",
        "sha": sha,
        "siblings": [{"rfilename": file} for file in files],
      }
      return self.answer(json.dumps(about).encode(), Content_Type="application/json")
    if verb == "tree":
      tree = [
        {"type": "file", "path": k, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
        for k, x in files.items()
      ]
      return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
    if rest[1] not in files:
      return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
    body = files[rest[1]]
    if self.command == "GET":
      self.server.log.append(rest[1])
    self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=sha)

  do_HEAD = do_GET


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def read(names: list, cache: pathlib.Path, endpoint: str, offline: bool = False) -> list:
  """What a new process finds for [name, revision], each a SHA-256 and a source, or "error" and its
  message."""
  environment = {
    key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))
  }
  environment |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
  environment |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": str(int(offline)),
    "HF_HUB_DISABLE_XET": "1",
  }
  command = [sys.executable, "-c", READER, json.dumps(names)]
  job = subprocess.run(
    command, env=environment, capture_output=True, text=True, timeout=100, cwd=cache
  )
  assert job.returncode == 0, job.stderr
  return [json.loads(line) for line in job.stdout.splitlines()]


def write_noisy_adapter(base: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """A LoRA adapter of the base, whose b is not zero."""
  model, _ = pretrained.load_pretrained(str(base), make_mesh(1, 1, 1, jax.devices()[:1]))
  with jax.set_mesh(model.mesh):
    model = add_lora(model, LoraSettings(2), jax.random.key(0))
    model = jax.tree.map(lambda x: x + 0.1, model)
  write_adapter(model, path, "owner/tiny")
  return path


@pytest.fixture
def server(made, tmp_path):
  """Serves owner/tiny in two revisions and with what nobody asks for, in three shards, as pickle
  alone; a llama."""
  torch = pytest.importorskip("torch")
  found = {}
  for name, seed in (("main", 0), ("v2", 1)):
    hf.write(made(ModelConfig(131, 16, 16, 4, 2), seed), tmp_path / name)
    found[name] = files_of(tmp_path / name) | {
      "tf_model.h5": b"large",
      "pytorch_model.bin": b"large",
    }
  weights = hf.read(tmp_path / "v2")
  tensors = {
    hf.names.translate_name(name, hf.names.TORCH): weights.read(name)
    for name in hf.names.shapes(weights.config)
  }
  torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, tmp_path / "x.bin")
  config = {"config.json": found["main"]["config.json"]}
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.log, server.commits = [], {"owner/tiny": found}
  server.commits["owner/pickled"] = {
    "main": config | {"pytorch_model.bin": (tmp_path / "x.bin").read_bytes()}
  }
  server.commits["owner/llama"] = {
    "main": found["main"] | {"config.json": b'{"model_type": "llama"}'}
  }
  adapter = write_noisy_adapter(tmp_path / "main", tmp_path / "adapter")
  server.commits["owner/adapter"] = {"main": files_of(adapter) | {"optimizer.pt": b"large"}}
  server.commits["owner/empty"] = {"main": {"README.md": b"nothing"}}
  server.commits["openai-community/gpt2"] = {"main": found["v2"]}
  server.sha256 = {name: weights_sha256(hf.read(tmp_path / name)) for name in ("main", "v2")}
  merged = pretrained.open_weights(str(tmp_path / "main"), adapter=str(adapter))
  server.sha256["merged"] = weights_sha256(merged)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  server.stop = lambda: (server.shutdown(), server.server_close(), thread.join())
  yield server
  server.stop()


def test_a_repository_is_fetched_once_and_then_read_without_the_hub(server, tmp_path):
  cache, endpoint = tmp_path / "cache", f"http://127.0.0.1:{server.server_address[1]}"
  cache.mkdir()
  one, two = server.sha256["main"], server.sha256["v2"]
  wanted = [["owner/tiny", None], ["owner/tiny", "v2"], ["owner/tiny", commit("owner/tiny/v2")]]
  wanted += [["owner/pickled", None], ["gpt2", None], ["124M", None]]
  wanted += [["owner/tiny", None, "owner/adapter"]]
  merged = server.sha256["merged"]
  found = [answer[0] for answer in read(wanted, cache, endpoint)]
  assert found == [one, two, two, two, two, two, merged]
  assert merged != one
  adapter = [server.log.pop(), server.log.pop()]
  assert sorted(adapter) == ["adapter_config.json", "adapter_model.safetensors"]
  assert sorted(set(server.log)) == ["config.json", "model.safetensors", "pytorch_model.bin"]
  assert server.log.count("pytorch_model.bin") == 1, "pickles only where there is nothing else"
  assert len(server.log) == 2 * 4 - 1, (
    "each file of four snapshots once; two of them share their config"
  )

  faults = [
    ["owner/gone", None],
    ["owner/tiny", "v9"],
    ["owner/llama", None],
    ["owner/empty", None],
  ]
  gone, revision, llama, empty = (
    found[1] for found in read(faults, cache, endpoint) if found[0] == "error"
  )
  assert gone.startswith(
    "owner/gone is no path here, and owner/gone cannot be had from the Hub (RepositoryNotFound"
  )
  assert revision.startswith(
    "owner/tiny is no path here, and owner/tiny at revision v9 cannot be had from the Hub"
  )
  assert "holds a model of type 'llama', not gpt2" in llama and "is no GPT-2 checkpoint" in empty

  server.stop()
  offline = read(wanted, cache, endpoint, offline=True)
  assert [answer[0] for answer in offline] == found
  faults = read(
    [["owner/new", None], ["gpt2-xl", None], ["owner/tiny", "v3"]], cache, endpoint, offline=True
  )
  assert all(
    kind == "error" and "cannot be had from the Hub" in message for kind, message in faults
  )
  faults = [gone, revision, llama, empty, *(message for _, message in faults)]
  assert not [message for message in faults if "\n" in message]


def test_a_name_that_is_also_a_path_is_an_error(tmp_path, monkeypatch):
  (tmp_path / "gpt2").mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    ValueError, match=r"give ./gpt2 for the path, or openai-community/gpt2 for the Hub's"
  ):
    pretrained.resolve_checkpoint("gpt2")
  assert pretrained.resolve_checkpoint("./gpt2").is_dir()


def test_published_names():
  """OpenAI's sizes by every name that they have, and distilgpt2."""
  assert (
    hub.PUBLISHED["gpt2"]
    == hub.PUBLISHED["124M"]
    == hub.PUBLISHED["117M"]
    == "openai-community/gpt2"
  )
  assert hub.PUBLISHED["gpt2-medium"] == hub.PUBLISHED["355M"] == "openai-community/gpt2-medium"
  assert hub.PUBLISHED["gpt2-large"] == hub.PUBLISHED["774M"] == "openai-community/gpt2-large"
  assert hub.PUBLISHED["gpt2-xl"] == hub.PUBLISHED["1558M"] == "openai-community/gpt2-xl"
  assert hub.PUBLISHED["distilgpt2"] == "distilbert/distilgpt2"


def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
  monkeypatch.setattr(hub, "fetch", lambda *args: pytest.fail("the Hub was asked"))
  monkeypatch.chdir(tmp_path)
  (tmp_path / "owner" / "tiny").mkdir(parents=True)
  assert (
    pretrained.resolve_checkpoint("owner/tiny")
    == pretrained.resolve_checkpoint(pathlib.Path("owner/tiny"))
    == pathlib.Path("owner/tiny")
  )
  for name in (str(tmp_path / "gone"), "./gone", "../gone", "a/b/c", "~/gone-from-home"):
    with pytest.raises(
      FileNotFoundError, match="is not there; give a checkpoint's folder or file, or a name"
    ):
      pretrained.resolve_checkpoint(name)
  with pytest.raises(ValueError, match="is a path, which has no revision 'v2'"):
    pretrained.resolve_checkpoint("owner/tiny", "v2")
