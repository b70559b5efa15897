# SPDX-License-Identifier: Apache-2.0
"""The command as it is typed. What each format refuses stands in tests/convert; here, how that
looks from outside."""

import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from gpt2_jax.convert import llmc, pretrained
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "convert.py")
LETTERS = Characters("".join(map(chr, range(32, 127))))
# Runs many command lines in one process, for starting one takes seconds.
MANY = """
import contextlib, io, json, sys
from gpt2_jax.cli import convert, shell
for flags in json.loads(sys.argv.pop()):
  sys.argv, out, err, code = ["convert.py", *flags], io.StringIO(), io.StringIO(), 0
  shell.flags.FLAGS.unparse_flags()
  for name in convert.flags.FLAGS.flags_by_module_dict()["gpt2_jax.cli.convert"]:
    name.value, name.present = name.default, 0
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      shell.run(convert.main, '')
  except SystemExit as exit:
    code = exit.code
  print(json.dumps([code or 0, out.getvalue(), err.getvalue()]))
"""


def environment() -> dict[str, str]:
  usual = {
    key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "HF_"))
  }
  return usual | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}


def run(*flags: str, cwd: pathlib.Path = ROOT) -> tuple[int, str, str]:
  job = subprocess.run(
    [sys.executable, SCRIPT, *flags],
    cwd=cwd,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=100,
  )
  return job.returncode, job.stdout, job.stderr


def run_many(
  lines: list[list[str]], cwd: pathlib.Path, first: str = ""
) -> list[tuple[int, str, str]]:
  """Exit status, stdout and stderr of each command line; `first` is code that goes before them."""
  job = subprocess.run(
    [sys.executable, "-c", first + MANY, json.dumps(lines)],
    cwd=cwd,
    env=environment() | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert job.returncode == 0, job.stderr
  return [tuple(json.loads(line)) for line in job.stdout.splitlines()]


@pytest.fixture(scope="module")
def weights(mesh, parameters, place):
  config = ModelConfig(131, 16, 16, 4, 2)
  with mesh(1, 1, 1):
    return from_model(place(config, parameters(config)), LETTERS)


@pytest.fixture
def folder(weights, tmp_path):
  """Hugging Face's folder of a random model, in a folder to work in."""
  pretrained.write(weights, str(tmp_path / "theirs"), "hf")
  return tmp_path / "theirs"


def tree(path: pathlib.Path) -> list[str]:
  return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def test_converting_verifies_what_it_wrote(folder, weights, tmp_path):
  """Also to a folder called gpt2, which as a name would be the Hub's."""
  sha256 = weights_sha256(weights)
  code, out, err = run("--from=theirs", "--to=gpt2", cwd=tmp_path)
  assert (code, err) == (0, "")
  assert out.splitlines() == [
    "theirs (Hugging Face) -> gpt2 (hf, float32)",
    f"weights sha256 {sha256}: read back, the same",
  ]
  again = [["--from=theirs", f"--to=new/{form}", f"--format={form}"] for form in ("orbax", "llmc")]
  again += [["--from=theirs", "--to=half", "--dtype=bfloat16"], ["--from=half", "--to=whole"]]
  for code, out, err in run_many(again, tmp_path):
    assert (code, err) == (0, "") and "read back, the same" in out
    # llm.c has no file of a tokenizer.
    assert ("in this project's own form" in out) == ("(llmc," in out)
  assert weights_sha256(pretrained.open_weights(str(tmp_path / "new/orbax"))) == sha256
  assert weights_sha256(llmc.read(tmp_path / "new/llmc")) == sha256
  assert weights_sha256(pretrained.open_weights(str(tmp_path / "whole"))) != sha256


# A disk that keeps other bytes than it was given.
BAD_DISK = """
import safetensors.numpy
save = safetensors.numpy.save_file
def save_other_bytes(tensors, *args, **kwargs):
  save({k: x * 1.0001 for k, x in tensors.items()}, *args, **kwargs)
safetensors.numpy.save_file = save_other_bytes
"""


def test_other_weights_on_read_back_are_an_error(folder, tmp_path):
  [(code, out, err)] = run_many([["--from=theirs", "--to=to"]], tmp_path, BAD_DISK)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert err.startswith("error: to was written, but reads back as other weights")


def test_parity_is_printed_and_written(folder, weights, tmp_path):
  """Status 0 and the file where they are one model, status 1 and the file where they are not."""
  moved = np.array(weights.read("h.1.mlp.c_fc.w"))
  moved[0, 0] += 1e-2
  other = {"h.1.mlp.c_fc.w": moved}
  changed = type(weights)(
    weights.config, lambda name: other.get(name, weights.read(name)), LETTERS, "a test"
  )
  pretrained.write(changed, str(tmp_path / "changed"), "hf")
  pretrained.write(weights, str(tmp_path / "model.bin"), "llmc")
  (tmp_path / "text").write_text("Some text of two windows, or so.")
  code, out, err = run("--verify=theirs", "--against=changed", cwd=tmp_path)
  assert (code, err) == (1, "") and "verdict         NOT the same model" in out
  found = json.loads((tmp_path / "parity.json").read_text())
  assert not found["same_model"]
  assert found["a"]["sha256"] == weights_sha256(weights) != found["b"]["sha256"]
  lines = [
    ["--verify=theirs", "--against=model.bin", "--text=text", "--out=text.json"],
    ["--verify=theirs", "--against=changed", "--tolerance=10", "--out=loose.json"],
    ["--verify=theirs", "--against=model.bin"],
  ]
  same, loose, taken = run_many(lines, tmp_path)
  assert (
    same[0] == 0
    and "verdict         the same model" in same[1]
    and "written to text.json" in same[1]
  )
  found = json.loads((tmp_path / "text.json").read_text())
  assert (
    found["same_weights"] and found["max_abs_logit_difference"] == 0 and found["a"]["tokens"] == 31
  )
  assert loose[0] == 0 and not json.loads((tmp_path / "loose.json").read_text())["same_weights"]
  assert (
    taken[0] == 2
    and taken[2] == "error: parity.json is there already; take another --out, or move it away\n"
  )


class Payload:
  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


def test_code_in_a_pickle_is_not_run(folder, tmp_path):
  torch = pytest.importorskip("torch")
  (folder / "model.safetensors").unlink()
  torch.save({"wte.weight": Payload(tmp_path / "the-code-ran")}, folder / "pytorch_model.bin")
  before = tree(tmp_path)
  code, out, err = run("--from=theirs", "--to=to", cwd=tmp_path)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert err.startswith("error: ") and "pytorch_model.bin is refused" in err
  assert tree(tmp_path) == before
  with open(folder / "pytorch_model.bin", "wb") as file:
    pickle.dump(Payload(tmp_path / "the-code-ran"), file)
  (tmp_path / "theirs.pt").write_bytes((folder / "pytorch_model.bin").read_bytes())
  before = tree(tmp_path)
  for code, out, err in run_many(
    [[f"--from={name}", "--to=to"] for name in ("theirs", "theirs.pt")], tmp_path
  ):
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
  assert tree(tmp_path) == before


@pytest.fixture
def damaged(folder):
  """Beside `folder`: checkpoints that are none, each in its own way."""
  root, whole = folder.parent, (folder / "model.safetensors").read_bytes()
  config = json.loads((folder / "config.json").read_text())

  def copy(name, weights=whole, **changes):
    (root / name).mkdir()
    (root / name / "config.json").write_text(json.dumps(config | changes))
    (root / name / "model.safetensors").write_bytes(weights)

  copy("cut", whole[: len(whole) // 2])
  copy("garbage", os.urandom(5000))
  copy("llama", model_type="llama")
  copy("odd", n_layer="two", n_head=-1)
  copy("deep", n_layer=4)
  copy("outside")
  (root / "outside" / "model.safetensors").unlink()
  index = {"weight_map": {"wte.weight": "../theirs/model.safetensors"}}
  (root / "outside" / "model.safetensors.index.json").write_text(json.dumps(index))
  copy("words")
  (root / "words" / "tokenizer.json").write_text("{")
  (root / "v1.bin").write_bytes(np.array([20240326, 1] + [0] * 254, "<i4").tobytes())
  (root / "cut.bin").write_bytes(np.array([20240326, 3, 16, 131, 2, 4, 16, 256], "<i4").tobytes())
  (root / "openai").mkdir()
  (root / "openai" / "model.ckpt.index").write_text("x")
  (root / "file").write_text("mine")
  (root / "latin").write_bytes("\xe9".encode("latin-1"))
  (root / "deep.json").mkdir()
  (root / "deep.json" / "config.json").write_text("[" * 100_000)


CASES = [
  (["--from=cut"], "is no whole safetensors file"),
  (["--from=garbage"], "is no whole safetensors file"),
  (["--from=llama"], "holds a model of type 'llama'"),
  (["--from=odd"], "n_head is '-1', n_layer is 'two'"),
  (["--from=deep"], "missing: h.2-3.ln_1.weight"),
  (["--from=outside"], "some outside of its folder"),
  (["--from=words"], "the vocabulary in words cannot be used"),
  (["--from=v1.bin"], "llm.c's version 1"),
  (["--from=cut.bin"], "fetch it again"),
  (["--from=openai"], "hparams.json is not there"),
  (["--from=file"], "file is no GPT-2 checkpoint"),
  (["--from=./gone"], "gone is not there"),
  (["--from=theirs", "--to=file"], "file is there already; take another name"),
  (["--from=theirs", "--to=cut"], "cut is there already"),
  (["--from=theirs", "--to=file/to"], "file"),
  (["--from=theirs", "--to=/proc/to"], "/proc"),
  (["--from=theirs", "--to="], "--from wants a --to"),
  (["--from=theirs", "--to=gs://bucket/x"], "is a URL, and of what can be written only a workdir"),
  (["--from=theirs", "--to=s3://b/x", "--format=orbax"], "neither a local path nor gs://"),
  (["--from=theirs", "--to=~nobody-of-this-name/x"], "this machine has no such user"),
  (["--from=~nobody-of-this-name/x"], "this machine has no such user"),
  (["--from=deep.json"], "config.json is JSON that is nested too deep"),
  (["--from=./gone", "--format=llmc", "--dtype=float16"], "llm.c has no float16"),
  (["--from=./gone", "--to=file/to"], "file is a file, not a folder"),
  (["--from=theirs", "--text=file"], "--text is nothing to --from"),
  (["--from=theirs", "--format=openai"], "should be one of <hf|orbax|nanogpt|llmc|gpt1|peft>"),
  (["--from=theirs", "--format=nanogpt"], "nanoGPT computes the erf one"),
  (["--from=theirs", "--format=llmc", "--dtype=float16"], "llm.c has no float16"),
  (["--from=theirs", "--format=orbax", "--dtype=bfloat16"], "float32, not bfloat16"),
  (["--from=owner/model"], "cannot be had from the Hub"),
  (["--from=theirs", "--verify=theirs"], "give --from=... --to=... to convert, or --verify"),
  (["--verify=theirs"], "wants either --against=CHECKPOINT or --logits=FILE"),
  (["--verify=theirs", "--logits=file"], "file is no .npz file"),
  (["--verify=./gone", "--logits=none.npz"], "none.npz is no file"),
  (["--verify=./gone", "--logits="], "a path is empty"),
  (["--verify=theirs", "--against="], "a path is empty"),
  (["--verify=./gone", "--against=theirs", "--out="], "a path is empty"),
  (["--verify=./gone", "--against=theirs", "--out=file/x"], "file is a file, not a folder"),
  (["--verify=./gone", "--against=theirs", "--out=gs://b/x"], "is a URL, and only a local path"),
  (["--verify=./gone", "--against=theirs", "--text=latin"], "latin is not UTF-8 at byte 0"),
  (["--verify=theirs", "--against=theirs", "--text=latin", "--out=~nobody-of-this-name/x"], "user"),
  (["--verify=./gone", "--against=theirs", "--tolerance=nan"], "--tolerance is nan"),
  (["--verify=./gone", "--against=theirs", "--tolerance=-1"], "--tolerance is -1"),
  (["--verify=theirs", "--logits=file", "--oracle=transformers"], "leave --text and --oracle out"),
  (["--verify=theirs", "--against=theirs", "--dtype=float16"], "--dtype is nothing to --verify"),
  (["--verify=theirs", "--against=theirs", "--revision=x"], "--revision is nothing to --verify"),
  (["--verify=theirs", "--against=theirs", "--text=gone"], "gone"),
  (["--verify=theirs", "--against=cut"], "is no whole safetensors file"),
]


def test_invalid_input_is_one_line_and_status_2_and_writes_nothing(damaged, tmp_path):
  pytest.importorskip("torch")  # for nanoGPT's case
  before = tree(tmp_path)
  lines = [
    flags if any(x.startswith(("--to", "--verify")) for x in flags) else [*flags, "--to=to"]
    for flags, _ in CASES
  ]
  for (flags, message), (code, out, err) in zip(CASES, run_many(lines, tmp_path), strict=True):
    assert (code, out, err.count("\n")) == (2, "", 1), (flags, err)
    assert err.startswith("error: ") and message in err, (flags, err)
  assert tree(tmp_path) == before


def test_numbers_that_are_not_finite_are_told(folder, weights, tmp_path):
  """The conversion is done; status 0, and a line on stderr with the count and the place."""
  broken = np.array(weights.read("ln_f.g"))
  broken[3:5] = np.nan, -np.inf
  changed = dataclasses.replace(
    weights, read=lambda name: broken if name == "ln_f.g" else weights.read(name)
  )
  pretrained.write(changed, str(tmp_path / "broken"), "hf")
  lines = [["--from=theirs", "--to=x.bin", "--format=llmc"]]
  lines += [
    ["--from=broken", "--to=y.bin", "--format=llmc"],
    ["--verify=broken", "--against=y.bin"],
  ]
  whole, told, verified = run_many(lines, tmp_path)
  assert (whole[0], whole[2]) == (0, "")
  assert told[0] == 0 and "read back, the same" in told[1]
  assert told[2] == (
    "warning: 2 weights of broken (Hugging Face) are NaN or infinite, and written as they are: "
    "ln_f.g\n"
  )
  assert verified[0] == 2 and "gives logits that are not finite" in verified[2]


def test_paths_are_expanded_and_their_folders_made(folder, tmp_path):
  (tmp_path / "text").write_text("Some text.")
  lines = [
    ["--from=~/theirs", "--to=~/new/er/x.bin", "--format=llmc"],
    ["--verify=~/theirs", "--against=~/new/er/x.bin", "--out=~/of/all/x.json", "--text=~/text"],
  ]
  home = f"import os\nos.environ['HOME'] = {str(tmp_path)!r}\n"
  (tmp_path / "cwd").mkdir()
  for code, _, err in run_many(lines, tmp_path / "cwd", home):
    assert (code, err) == (0, "")
  assert json.loads((tmp_path / "of/all/x.json").read_text())["same_model"]
  assert not list((tmp_path / "cwd").iterdir())


def test_a_compressed_pickle_is_converted_to_the_same_weights(folder, weights, tmp_path):
  """As a folder that somebody packed anew. Its compressed bytes are numbers, too, but others."""
  torch = pytest.importorskip("torch")
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, tmp_path / "stored")
  with (
    zipfile.ZipFile(tmp_path / "stored") as stored,
    zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
  ):
    for member in stored.infolist():
      packed.writestr(member.filename, stored.read(member))
  [(code, out, err)] = run_many([["--from=theirs", "--to=to"]], tmp_path)
  assert (code, err) == (0, "") and f"weights sha256 {weights_sha256(weights)}" in out
