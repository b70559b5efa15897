# SPDX-License-Identifier: Apache-2.0
"""Converts GPT-2 checkpoints between all formats, and checks the parity of two checkpoints.

gpt2-jax convert --from=gpt2 --to=out/gpt2 --format=hf       # or orbax, nanogpt, llmc, gpt1
gpt2-jax convert --from=gpt2 --adapter=adapters/mine --to=out/merged      # peft's LoRA, merged
gpt2-jax convert --from=runs/lora --to=adapters/mine --format=peft        # what a run trained
gpt2-jax convert --verify=out/gpt2 --against=gpt2 --oracle=transformers --text=book.txt
gpt2-jax convert --verify=models/124M --logits=expected_logits.npz # or recorded logits

--from, --verify and --against take a published name (gpt2, gpt2-medium, gpt2-large, gpt2-xl,
distilgpt2), a repository of the Hugging Face Hub, or a path: Hugging Face's folder, OpenAI's,
nanoGPT's ckpt.pt, llm.c's .bin, a workdir. --verify compares logits, loss and the SHA-256 of the
weights, prints the result and writes it to parity.json; it exits with 1 if the two are not the
same model.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, check_writable, local_path, read_text

if TYPE_CHECKING:
  from gpt2_jax.convert import parity

# What convert.pretrained can write.
FORMATS = ("hf", "orbax", "nanogpt", "llmc", "gpt1")

_FROM = flags.DEFINE_string("from", None, "The checkpoint to convert: a name or a path.")
_TO = flags.DEFINE_string(
  "to", None, "The folder (llmc: the file; orbax: or gs://) to write; it must not exist."
)
_FORMAT = flags.DEFINE_enum(
  "format", "hf", (*FORMATS, "peft"), "The format to write; peft is a run's adapter alone."
)
_ADAPTER = flags.DEFINE_string("adapter", None, "A folder of peft's with a LoRA adapter to merge.")
_MERGE = flags.DEFINE_bool("merge", False, "Merge the LoRA adapter that the run of --from trained.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "float16", "bfloat16"], "The dtype of the weights to write."
)
_OTHER_GELU = flags.DEFINE_bool(
  "other_gelu", False, "Write nanoGPT's format although nanoGPT computes another GELU."
)
_GELU = flags.DEFINE_enum(
  "gelu", None, ["tanh", "erf"], "The GELU of nanoGPT's --from, which its file does not state."
)
_TASK_TOKENS = flags.DEFINE_bool(
  "task_tokens", False, "Add _start_, _delimiter_ and _classify_ to a GPT-1, for --template=gpt1."
)
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of the Hub's repository.")
_VERIFY = flags.DEFINE_string("verify", None, "The checkpoint to check: a name or a path.")
_AGAINST = flags.DEFINE_string("against", None, "The checkpoint it should equal.")
_ORACLE = flags.DEFINE_enum(
  "oracle", "ours", ["ours", "transformers"], "Whose forward pass --against runs through."
)
_LOGITS = flags.DEFINE_string(
  "logits", None, "In place of --against: an .npz file of tokens and recorded logits."
)
_TEXT = flags.DEFINE_string(
  "text", None, "A text file whose tokens both run over; default: 2 windows of random tokens."
)
_WINDOWS = flags.DEFINE_integer(
  "windows",
  None,
  "Windows whose logits are compared; 0 is all. Default: all of --logits, and of a text as many as "
  "1 GiB holds, two at least. The loss is compared in all.",
  lower_bound=0,
)
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 1e-4, "The largest difference of logits that counts as the same model."
)
_OUT = flags.DEFINE_string("out", "parity.json", "Where the result goes; it must not exist.")

# Of a flag of the other half of this script, nothing would be heard.
_ONLY_FROM = (_TO, _FORMAT, _ADAPTER, _MERGE, _DTYPE, _OTHER_GELU, _GELU)
_ONLY_FROM += (_TASK_TOKENS, _REVISION)
_ONLY_VERIFY = (_AGAINST, _ORACLE, _LOGITS, _TEXT, _WINDOWS, _TOLERANCE, _OUT)


def convert() -> None:
  """Converts --from to --to, reads it back, and compares the SHA-256 of the weights."""
  from gpt2_jax.convert import gpt1_files, pretrained
  from gpt2_jax.convert.weights import cast_weights, weights_sha256
  from gpt2_jax.runs.workdir import is_remote

  # 1. Refuse what can be told before the weights are read.
  if not _TO.value:
    raise ValueError("--from wants a --to: the folder or file to write")
  if _FORMAT.value == "peft":
    return _write_adapter()
  to = pretrained.check_target(_TO.value, _FORMAT.value, _DTYPE.value)
  if not is_remote(to):
    # Absolute, since as a name, gpt2 would be the Hub's.
    to = os.path.abspath(to)
    check_writable(pathlib.Path(to))

  # 2. Write.
  weights = pretrained.open_weights(
    _FROM.value, _REVISION.value, _ADAPTER.value, _MERGE.value, _GELU.value
  )
  if _TASK_TOKENS.value:
    weights = gpt1_files.add_task_tokens(weights)
  pretrained.write(weights, to, _FORMAT.value, _DTYPE.value, _OTHER_GELU.value)

  # 3. Read back from disk: what is announced as written has been read.
  written = weights_sha256(cast_weights(weights, _DTYPE.value))
  read_back = weights_sha256(pretrained.open_weights(to))
  if written != read_back:
    raise ValueError(
      f"{_TO.value} was written, but reads back as other weights "
      f"({read_back[:16]}, not {written[:16]})"
    )

  # 4. Report.
  print(f"{weights.source} -> {_TO.value} ({_FORMAT.value}, {_DTYPE.value})")
  print(f"weights sha256 {read_back}: read back, the same")
  original = weights_sha256(weights)
  if written != original:
    print(f"rounded from {original}: --verify shows by how much the logits differ")
  if weights.tokenizer is None:
    print("there was no tokenizer to write")
  elif _has_own_form(weights.tokenizer):
    print(
      "its tokenizer lies beside the weights in this project's own form, which others do not read"
    )


def _has_own_form(tokenizer) -> bool:
  """Whether the tokenizer was written in a form that only this project reads."""
  from gpt2_jax.convert.vocabulary import as_tokenizer_json
  from gpt2_jax.tokenizer import Gpt1Bpe, Gpt2Bpe, HuggingFace

  if _FORMAT.value in ("hf", "gpt1") and isinstance(tokenizer, Gpt1Bpe):
    return False
  if _FORMAT.value == "hf":
    return not isinstance(tokenizer, Gpt2Bpe) and as_tokenizer_json(tokenizer) is None
  return _FORMAT.value != "orbax" and not isinstance(tokenizer, Gpt2Bpe | HuggingFace)


def _write_adapter() -> None:
  """Writes the adapter that the run of --from trained as a folder of peft's, and reads it back."""
  from gpt2_jax.convert import pretrained
  from gpt2_jax.convert.peft_files import read_adapter

  unused = (_ADAPTER, _MERGE, _DTYPE, _OTHER_GELU, _GELU, _TASK_TOKENS, _REVISION)
  if names := [f"--{flag.name}" for flag in unused if flag.present]:
    raise ValueError(f"{', '.join(names)} is nothing to --format=peft; leave it out")
  base = pretrained.save_adapter(_FROM.value, _TO.value)
  adapter = read_adapter(os.path.abspath(local_path(_TO.value)))
  print(f"{_FROM.value} -> {_TO.value} (peft)")
  print(f"{len(adapter.lora)} matrices beside those of {base['name']}, read back")
  print(f"the base's weights sha256 {base['sha256']}")


def _verify() -> None:
  """Compares two models, prints the result and writes --out; exits with 1 if they differ."""
  from gpt2_jax.convert import parity

  # 1. Refuse flags that contradict each other, and what is not there, before anything is loaded.
  if (_AGAINST.value is None) == (_LOGITS.value is None):
    raise ValueError("--verify wants either --against=CHECKPOINT or --logits=FILE")
  if _LOGITS.present and (_TEXT.present or _ORACLE.present):
    raise ValueError("recorded logits have their own tokens; leave --text and --oracle out")
  if not 0 <= _TOLERANCE.value < math.inf:
    raise ValueError(f"--tolerance is {_TOLERANCE.value}; it is a difference of logits, from 0 on")
  out = local_path(_OUT.value)
  if out.exists():
    raise FileExistsError(f"{out} is there already; take another --out, or move it away")
  check_writable(out)
  if _LOGITS.present and not local_path(_LOGITS.value).is_file():
    raise FileNotFoundError(f"{_LOGITS.value} is no file; give an .npz of tokens and logits")
  text = read_text(local_path(_TEXT.value)) if _TEXT.present else None

  # 2. The two models, and windows of tokens that both have.
  a = parity.load_ours(_VERIFY.value)
  if _LOGITS.present:
    b, windows = parity.load_recorded(_LOGITS.value, a.config)
  else:
    load = parity.load_transformers if _ORACLE.value == "transformers" else parity.load_ours
    b = load(_AGAINST.value)
    windows = _windows(a, b, text)

  # 3. Compare and report. Recorded logits are in memory already, all of them.
  n_windows, T = windows[0].shape
  kept = _WINDOWS.value
  if kept is None and not _LOGITS.present:
    kept = parity.windows_that_fit(n_windows, T, max(a.config.n_vocab, b.config.n_vocab))
  result = parity.compare(a, b, *windows, _TOLERANCE.value, kept_windows=kept or n_windows)
  with atomic_write(out) as partial:
    partial.write_text(json.dumps(result, indent=2) + "\n")
  print(parity.table(result))
  print(f"written to {out}")
  if not result["same_model"]:
    sys.exit(1)


def _windows(a: parity.Model, b: parity.Model, text: str | None):
  """Token windows of a text by the tokenizer of --verify, or else of random tokens."""
  from gpt2_jax.convert import parity, pretrained

  n_ctx = min(a.config.n_ctx, b.config.n_ctx)
  n_vocab = min(a.config.n_vocab, b.config.n_vocab)
  if text is None:
    return parity.random_windows(n_vocab, n_ctx)

  tokenizer = pretrained.open_weights(_VERIFY.value).tokenizer
  try:
    windows = parity.text_windows(text, tokenizer, n_ctx)
  except ValueError as error:
    raise ValueError(f"--text={_TEXT.value}: {error}") from error
  if windows[0].max() >= n_vocab or windows[1].max() >= n_vocab:
    raise ValueError(
      f"--text={_TEXT.value} has tokens past {n_vocab:,}, the smaller vocabulary of the two; "
      f"leave it out: the tokens are random ones then, that both have"
    )
  return windows


def main() -> None:
  if bool(_FROM.value) == bool(_VERIFY.value):
    raise ValueError(
      "give --from=... --to=... to convert, or --verify=... --against=... to compare; see --help"
    )
  half, foreign = ("--from", _ONLY_VERIFY) if _FROM.value else ("--verify", _ONLY_FROM)
  if unused := [f"--{flag.name}" for flag in foreign if flag.present]:
    raise ValueError(f"{', '.join(unused)} is nothing to {half}; leave it out, see --help")
  if _FROM.value:
    convert()
  else:
    _verify()


def run() -> None:
  shell.run(main, __doc__, imports=("gpt2_jax.convert.parity",))
