# SPDX-License-Identifier: Apache-2.0
"""Converts GPT-2 checkpoints between all formats, and proves that two of them are one model.

python launch/convert.py --from=gpt2 --to=out/gpt2 --format=hf             # or orbax, nanogpt, llmc
python launch/convert.py --verify=out/gpt2 --against=gpt2 --oracle=transformers --text=book.txt
python launch/convert.py --verify=models/124M --logits=expected_logits.npz  # logits that somebody recorded

--from, --verify and --against take a published name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2), a repository
of the Hugging Face Hub, or a path: Hugging Face's folder, OpenAI's, nanoGPT's ckpt.pt, llm.c's .bin, a workdir.
--verify writes a certificate (JSON) and prints it; it exits with 1 if they are not the same model.
"""

import json
import os
import pathlib
import sys

if __name__ == "__main__":  # the root in place of launch/, whose tokenize.py would hide the standard library's
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from absl import flags

from gpt2_jax import certificate, pretrained
from gpt2_jax.convert.files import whole
from gpt2_jax.convert.weights import digest, rounded
from gpt2_jax.tokenizer import Gpt2Bpe, HuggingFace
from launch import shell

_FROM = flags.DEFINE_string("from", None, "The checkpoint to convert: a name or a path.")
_TO = flags.DEFINE_string("to", None, "The folder (llmc: the file) to write; it must not be there.")
_FORMAT = flags.DEFINE_enum("format", "hf", pretrained.WRITABLE, "The format to write.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16"], "Of the weights that are written.")
_OTHER_GELU = flags.DEFINE_bool("other_gelu", False, "Write nanoGPT's format though it will compute another GELU.")
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of the Hub's repository.")
_VERIFY = flags.DEFINE_string("verify", None, "The checkpoint to prove.")
_AGAINST = flags.DEFINE_string("against", None, "The checkpoint it should equal.")
_ORACLE = flags.DEFINE_enum("oracle", "ours", ["ours", "transformers"], "Whose forward pass --against runs through.")
_LOGITS = flags.DEFINE_string("logits", None, "In place of --against: an .npz file of tokens and recorded logits.")
_TEXT = flags.DEFINE_string("text", None, "A file of text to compare on; default: 2 windows of random tokens.")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "The largest difference of logits that is the same model.")
_OUT = flags.DEFINE_string("out", "certificate.json", "Where the certificate goes; it must not be there.")


def convert() -> None:
  """Writes --to, reads it back, and compares."""
  if not _TO.value:
    raise ValueError("--from wants a --to: the folder or file to write")
  to = pathlib.Path(_TO.value).expanduser().absolute()  # as a name, gpt2 would be the Hub's
  if to.exists():
    raise FileExistsError(f"{_TO.value} is there already; take another --to, or move it away")
  weights = pretrained.open_weights(_FROM.value, _REVISION.value)
  pretrained.write(weights, str(to), _FORMAT.value, _DTYPE.value, _OTHER_GELU.value)
  before, after = digest(rounded(weights, _DTYPE.value)), digest(pretrained.open_weights(str(to)))
  if before != after:
    raise ValueError(f"{_TO.value} was written, but reads back as other weights ({after[:16]}, not {before[:16]})")
  print(f"{weights.source} -> {_TO.value} ({_FORMAT.value}, {_DTYPE.value})")
  print(f"weights sha256 {after}: read back, the same")
  if before != (unrounded := digest(weights)):
    print(f"rounded from {unrounded}: --verify will say so, and how far the logits are apart")
  if weights.tokenizer is None:
    print("there was no tokenizer to write")
  elif _FORMAT.value != "orbax" and not isinstance(weights.tokenizer, Gpt2Bpe | HuggingFace):
    print("its tokenizer lies beside the weights in this project's own form, which others do not read")


def verify() -> None:
  """Prints the certificate and writes it; exits with 1 where the sides differ."""
  out = pathlib.Path(_OUT.value)
  if out.exists():
    raise FileExistsError(f"{out} is there already; take another --out, or move it away")
  if (_AGAINST.value is None) == (_LOGITS.value is None):
    raise ValueError("--verify wants either --against=CHECKPOINT or --logits=FILE")
  if _REVISION.value:
    raise ValueError("--revision is for --from; convert that revision first, and verify what was written")
  if _TEXT.value and _LOGITS.value:
    raise ValueError("recorded logits are for their own tokens; leave --text out")
  a = certificate.ours(_VERIFY.value)
  if _LOGITS.value:
    b, windows = certificate.recorded(_LOGITS.value, a.config)
  else:
    b = {"ours": certificate.ours, "transformers": certificate.transformers}[_ORACLE.value](_AGAINST.value)
    n_vocab, n_ctx = (min(getattr(side.config, size) for side in (a, b)) for size in ("n_vocab", "n_ctx"))
    windows = certificate.random_windows(n_vocab, n_ctx)
  if _TEXT.value:
    text = pathlib.Path(_TEXT.value).read_text(encoding="utf-8")
    windows = certificate.text_windows(text, pretrained.open_weights(_VERIFY.value).tokenizer, n_ctx)
  found = certificate.certify(a, b, *windows, _TOLERANCE.value)
  with whole(out) as partial:
    partial.write_text(json.dumps(found, indent=2) + "\n")
  print(certificate.table(found))
  print(f"written to {out}")
  if not found["same_model"]:
    sys.exit(1)


def main() -> None:
  if bool(_FROM.value) == bool(_VERIFY.value):
    raise ValueError("give --from=... --to=... to convert, or --verify=... --against=... to prove; see --help")
  convert() if _FROM.value else verify()


if __name__ == "__main__":
  shell.run(main)
