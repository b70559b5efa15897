# SPDX-License-Identifier: Apache-2.0
"""Memorized text: which texts are verbatim in a training corpus, and which a model gives away.

  # how many documents have each line of a file
  gpt2-jax memorization --store=data/books/train --texts=lines.txt

  # samples of a model, ranked by what may be memorized; how much of them is in the corpus
  gpt2-jax memorization --model=runs/books --smaller=gpt2 --samples=1000 --top=20 \\
    --store=data/books/train --out=runs/extraction.jsonl

The search goes over the store once for all texts, and its memory does not grow with the store. It
finds exact copies. It misses a text that begins or ends inside one of the store's tokens.
"""

import json

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, check_folder, local_path, read_text, user_path

_STORE = flags.DEFINE_string("store", None, "The corpus: a token store of gpt2-jax tokenize.")
_TEXTS = flags.DEFINE_string(
  "texts", None, 'A file of texts: lines, or .jsonl with the key "text". With --model: no samples.'
)
_MODEL = flags.DEFINE_string("model", None, "A published name, a checkpoint's path, or a workdir.")
_SMALLER = flags.DEFINE_multi_string(
  "smaller", [], "A smaller model with the same tokens, for a ratio."
)
_SAMPLES = flags.DEFINE_integer("samples", 100, "Samples of the model.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a sample.", lower_bound=2)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "What samples continue; several take turns. Default: <|endoftext|>."
)
_TOP_K = flags.DEFINE_integer("top_k", 40, "Samples draw among the k likeliest.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples.")
_TOP = flags.DEFINE_integer("top", 10, "Texts that are shown by each metric.", lower_bound=1)
_MATCH = flags.DEFINE_integer("match", 50, "Tokens in a row that are no chance.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Where to write all of it, as JSON lines.")

SHOWN = 60  # characters of a text


def main() -> None:
  from gpt2_jax.data.token_store import TokenStore

  # 1. What cannot be is refused before anything is loaded.
  if _MODEL.value is None and None in (_STORE.value, _TEXTS.value):
    raise ValueError("give --store and --texts for a search, or --model for an extraction")
  if _MODEL.value is None and _SMALLER.value:
    raise ValueError("--smaller is compared with --model; give that, too")
  out = local_path(_OUT.value) if _OUT.value is not None else None
  if out is not None:
    check_folder(out.parent)
    if out.exists():
      raise FileExistsError(f"{out} is there already; take another name, or move it away")
  texts = _read_texts() if _TEXTS.value is not None else None
  store = TokenStore.open(_STORE.value) if _STORE.value is not None else None

  # 2. Search, or extract.
  rows = _search(store, texts) if _MODEL.value is None else _extract(store, texts)
  if out is not None:
    with atomic_write(out) as partial:
      partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read_texts() -> list[str]:
  """The texts of the flag's file. Raises ValueError for a file without any."""
  from gpt2_jax.evaluate.sources import json_lines, text_field

  path = local_path(_TEXTS.value)
  if path.suffix == ".jsonl":
    texts = [row["text"] for row in json_lines(path, lambda row: {"text": text_field(row, "text")})]
  else:
    texts = read_text(path).splitlines()
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise ValueError(f"--texts={path} has no text; give one on each line")
  return texts


def _search(store, texts: list[str]) -> list[dict]:
  """Prints how often each text is in the store."""
  from gpt2_jax.evaluate.memorization.search import find_texts

  rows = []
  print(f"{'documents':>9} {'times':>9}  text")
  for text, found in zip(texts, find_texts(store, texts), strict=True):
    documents = "?" if found.documents is None else f"{found.documents:,}"
    print(f"{documents:>9} {found.count:9,}  {_shown(text)}")
    counts = {"count": found.count, "documents": found.documents, "places": found.places}
    rows.append({"text": text} | counts)
  return rows


def _extract(store, texts: list[str] | None) -> list[dict]:
  """Prints the first texts of each ranking, and what of them is verbatim in the store."""
  from gpt2_jax.evaluate.memorization.extraction import (
    extraction_metrics,
    find_verbatim,
    rank_texts,
    sample_texts,
  )
  from gpt2_jax.evaluate.memorization.search import check_store

  # 1. The models; another tokenizer's store is refused before hours of sampling.
  scorer = _scorer(_MODEL.value)
  if store is not None:
    check_store(store, scorer.tokenizer)
  smaller = {name: _scorer(name) for name in _SMALLER.value}

  # 2. Score. A text of one token has no score.
  if texts is None:
    texts = sample_texts(scorer, _SAMPLES.value, _LENGTH.value, _PROMPT.value or [""], _TOP_K.value)
  texts = [text for text in texts if len(scorer.tokenizer.encode(text)) > 1]
  metrics = extraction_metrics(scorer, texts, smaller)
  verbatim = (
    find_verbatim(store, scorer.tokenizer, texts, _MATCH.value) if store is not None else None
  )

  # 3. Print the rankings.
  for name, metric_N in metrics.items():
    print(f"\n{name:>11} {'verbatim':>9} {'documents':>9}  text")
    for i in rank_texts(texts, metric_N, _TOP.value):
      found = ("-", "-") if verbatim is None else (verbatim[i].tokens, verbatim[i].documents)
      tokens, documents = ("?" if value is None else value for value in found)
      print(f"{metric_N[i]:11.4g} {tokens:>9} {documents:>9}  {_shown(texts[i])}")
  return _rows(texts, metrics, verbatim)


def _scorer(name: str):
  from gpt2_jax.convert.pretrained import load_pretrained
  from gpt2_jax.evaluate.scorers import Scorer

  model, tokenizer = load_pretrained(user_path(name))
  if tokenizer is None:
    raise ValueError(f"{name} has no tokenizer; put its files beside the checkpoint")
  return Scorer(model, tokenizer, seed=_SEED.value)


def _rows(texts, metrics, verbatim) -> list[dict]:
  """All texts with their metrics, for --out."""
  rows = []
  for i, text in enumerate(texts):
    row = {"text": text} | {name: float(metric_N[i]) for name, metric_N in metrics.items()}
    if verbatim is not None:
      row |= {"verbatim": verbatim[i].tokens, "documents": verbatim[i].documents}
    rows.append(row)
  return rows


def _shown(text: str) -> str:
  """The beginning of a text, on one line."""
  text = repr(text)[1:-1]
  return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def run() -> None:
  shell.run(main, __doc__, imports=("gpt2_jax.evaluate.scorers",))
