# SPDX-License-Identifier: Apache-2.0
"""Language modelling: how likely is a text, by the units in which it was published?

Nats are summed over the text that the model reads; words, bytes and characters are counted in the text as published,
before any detokenizer, so that protocols share their denominators: perplexity is per original token, as in the GPT-2
paper (section 3.1). A word is what stands between spaces, and each end of a line is one more, the field's `<eos>`.

Where a task is `joined`, its rows are one text and only there to be resampled; otherwise each is read on its own, after
`<|endoftext|>`. The paper says neither which it did nor with which stride. `<unk>` and PTB's N are read as they stand.
"""

import pathlib
import re
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate import detokenizers
from gpt2_jax.evaluate.metric import Metric, bits, mean, perplexity
from gpt2_jax.evaluate.sources import Row, Source
from gpt2_jax.evaluate.task import Answer, Passage, Request, Task

WIKITEXT = "https://wikitext.smerity.com/wikitext-{}-v1.zip"
PTB = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
LM1B = "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz"
MAHONEY = "http://mattmahoney.net/dc/{}.zip"

LINES = 20  # of PTB in a row; its documents are not marked
PIECE = 20_000  # characters of enwik8 and text8 in a row
HELD_OUT = 5_000_000  # bytes at the end of enwik8's and text8's 100,000,000 that the field tests on
SIZES = (100_000_000, HELD_OUT)  # of the published file, and of its end alone

INVERTIBLE = "the natural text from which the published tokens can be had back"
RAW = "the published tokens, with their spaces"
LOSSY = "lossy detokenizer"

HEADING = re.compile(r"(?<=\n \n) = (?!= )[^\n]* = \n(?= \n)")  # an article's, between empty lines
SEAM = "\ue000"  # a character for private use


# ---- files to rows


def read(path: pathlib.Path) -> str:
  """All of a file, its line ends and spaces as they are. Raises ValueError if it is not UTF-8."""
  return _decoded(path.read_bytes(), path)


def articles(path: pathlib.Path) -> Iterator[Row]:
  """WikiText by article; what stands before the first heading is the first one's."""
  text = read(path)
  yield from ({"text": part} for part in _cut(text, _seams(text)) if part)


def megatron_articles(path: pathlib.Path) -> Iterator[Row]:
  """The same, with what Megatron-LM makes of each: its rules see the whole file, and pair quotes across articles."""
  text = read(path)
  published = _cut(text, seams := _seams(text))
  marked = SEAM.join(_cut(text, [seam + len(" = ") for seam in seams]))
  natural = detokenizers.lossy_wikitext(marked).replace(f"= {SEAM}", f"{SEAM}= ").split(SEAM)
  yield from ({"text": part, "natural": own} for part, own in zip(published, natural, strict=True) if part)


def pages(path: pathlib.Path) -> Iterator[Row]:
  """The documents of EleutherAI/wikitext_document_level, on which lm-evaluation-harness's wikitext task is run.

  Its script (lm_eval/datasets/wikitext/wikitext.py) takes each line `= ... =` for a heading, two formulas of the test
  set among them, and loses the newline between pages.
  """
  page = []
  for line in read(path).split("\n"):
    heading = line.replace("= = =", "===").replace("= =", "==").strip()
    if heading.startswith("= ") and heading.endswith(" ="):
      if "\n".join(page).strip():
        yield {"text": "\n".join(page)}
      page = []
    page.append(line)
  if "\n".join(page).strip():
    yield {"text": "\n".join(page)}


def lines(path: pathlib.Path, n: int = 1) -> Iterator[Row]:
  """Lines, `n` to a row."""
  found = re.findall(r"[^\n]*\n|[^\n]+", read(path))
  yield from ({"text": "".join(found[i : i + n])} for i in range(0, len(found), n))


def end(path: pathlib.Path) -> Iterator[Row]:
  """The last 5,000,000 bytes of enwik8 or text8, in pieces.

  The first 90,000,000 are for training, the next 5,000,000 for validation, as in salesforce/awd-lstm-lm's
  prep_enwik8.py. What the split leaves of a character, up to three bytes at either end, is dropped. Raises ValueError
  for a file that has neither 100,000,000 bytes nor the 5,000,000 alone.
  """
  content = path.read_bytes()
  if len(content) not in SIZES:
    raise ValueError(f"{path} has {len(content):,} bytes; it takes all {SIZES[0]:,}, or the last {SIZES[1]:,}")
  text = _decoded(_whole_characters(content[-HELD_OUT:]), path)
  yield from ({"text": text[i : i + PIECE]} for i in range(0, len(text), PIECE))


def whole(path: pathlib.Path) -> Iterator[Row]:
  """A file as one row. Raises ValueError if it is empty."""
  if not (text := read(path)):
    raise ValueError(f"{path} is empty: there is nothing to score")
  yield {"text": text}


def _decoded(content: bytes, path: pathlib.Path) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 at byte {error.start:,}") from error


def _whole_characters(content: bytes) -> bytes:
  """Without the rest of a character at the start and the beginning of one at the end."""
  begin = re.match(rb"[\x80-\xbf]{0,3}", content).end()
  last = re.search(rb"(?:[\xc0-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf7][\x80-\xbf]{0,2})\Z", content)
  return content[begin : last.start() if last else None]


def _seams(text: str) -> list[int]:
  """Where articles begin, but for the first."""
  return [match.start() - 1 for match in HEADING.finditer("\n" + text)][1:]


def _cut(text: str, places: list[int]) -> list[str]:
  return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# ---- rows to requests and sums


def count(text: str) -> dict[str, float]:
  """The units of a text as published."""
  return {
    "words": float(len(text.split()) + text.count("\n")),
    "bytes": float(len(text.encode())),
    "characters": float(len(text)),
  }


def sums(row: Row, answers: list[Answer]) -> dict[str, float]:
  [answer] = answers
  return {"nats": answer.nats, "tokens": float(answer.tokens)} | count(row["text"])


def harness_sums(row: Row, answers: list[Answer]) -> dict[str, float]:
  """With lm-evaluation-harness's count of words, which has the empty string before and after a page's whitespace."""
  return sums(row, answers) | {"words": float(len(re.split(r"\s+", row["text"])))}


def asking(natural: Callable[[str], str]) -> Callable[[Row], list[Request]]:
  return lambda row: [Passage(natural(row["text"]))]


def read_by_megatron(row: Row) -> list[Request]:
  return [Passage(row["natural"])]


METRICS: dict[str, Metric] = {
  "perplexity": perplexity("words"),
  "bits_per_byte": bits("bytes"),
  "bits_per_character": bits("characters"),
  "nats_per_token": mean("nats", over="tokens", unit="nats per token", higher=False),
}


def led_by(name: str) -> dict[str, Metric]:
  """The metrics, the one of this name first."""
  return {name: METRICS[name]} | METRICS


# ---- the tasks


def wikitext(name: str, published: str) -> tuple[Task, ...]:
  """Its test set has 245,569 tokens with `<eos>`, in 60 articles; that of WikiText-103 differs in its `<unk>` alone."""
  url = WIKITEXT.format(published)
  source = Source(name, ("wiki.test.tokens",), articles, url)
  theirs = Source(name, ("wiki.test.tokens",), megatron_articles, url)
  raw = Source(name, ("wiki.test.raw",), pages, url.replace("-v1", "-raw-v1"))
  natural, lossy = asking(detokenizers.WIKITEXT.detokenize), asking(detokenizers.lossy_wikitext)
  return (
    Task(name, "invertible", INVERTIBLE, source, natural, sums, METRICS, joined=True),
    Task(name, "invertible_documents", f"{INVERTIBLE}; each article alone", source, natural, sums, METRICS),
    Task(name, "raw", RAW, source, asking(str), sums, METRICS, joined=True),
    Task(name, "megatron", f"Megatron-LM's {LOSSY}", theirs, read_by_megatron, sums, METRICS, joined=True),
    Task(name, "lm_eval", f"lm-evaluation-harness's {LOSSY}, pages and count", raw, lossy, harness_sums, METRICS),
  )


def ptb() -> tuple[Task, ...]:
  """Its test set has 82,430 tokens with `<eos>`, in 3,761 lines."""
  source = Source("ptb", ("ptb.test.txt",), lambda path: lines(path, LINES), PTB)
  natural, lossy = asking(detokenizers.PTB.detokenize), asking(detokenizers.lossy_ptb)
  return (
    Task("ptb", "invertible", INVERTIBLE, source, natural, sums, METRICS, joined=True),
    Task("ptb", "raw", RAW, source, asking(str), sums, METRICS, joined=True),
    Task("ptb", "megatron", f"Megatron-LM's {LOSSY}, 20 lines at a time", source, lossy, sums, METRICS, joined=True),
  )


def lm1b() -> tuple[Task, ...]:
  """Its sentences are shuffled. The field tests on the first of 50 held-out files; TFDS's `test` is all 50."""
  one = Source("lm1b", ("news.en.heldout-00000-of-00050",), lines, LM1B)
  fifty = Source(
    "lm1b", tuple(f"news.en.heldout-{i:05}-of-00050" for i in range(50)), lines, LM1B, tfds="lm1b", row=lm1b_row
  )
  natural = asking(detokenizers.ONE_BILLION.detokenize)
  alone = f"{INVERTIBLE}; each sentence alone"
  return (
    Task("lm1b", "invertible", INVERTIBLE, one, natural, sums, METRICS, joined=True),
    Task("lm1b", "invertible_documents", alone, one, natural, sums, METRICS),
    Task("lm1b", "raw", RAW, one, asking(str), sums, METRICS, joined=True),
    Task("lm1b", "all_heldout", f"{alone}, of all 50 held-out files", fifty, natural, sums, METRICS),
  )


def lm1b_row(record: dict) -> Row:
  """TFDS has stripped the line's end."""
  return {"text": record["text"] + "\n"}


def plain(name: str, source: Source, metric: str, about: str, joined: bool) -> Task:
  """Text that needs no detokenizer."""
  return Task(name, "whole", about, source, asking(str), sums, led_by(metric), joined=joined)


ENWIK8 = Source("enwik8", ("enwik8",), end, MAHONEY.format("enwik8"))
TEXT8 = Source("text8", ("text8",), end, MAHONEY.format("text8"))
FILES = Source("text", ("*.txt",), whole, "anywhere")

TASKS = (
  *wikitext("wikitext2", "2"),
  *wikitext("wikitext103", "103"),
  *ptb(),
  plain("enwik8", ENWIK8, "bits_per_byte", "the last 5,000,000 bytes as one text", joined=True),
  plain("text8", TEXT8, "bits_per_character", "the last 5,000,000 characters as one text", joined=True),
  *lm1b(),
  plain("text", FILES, "bits_per_byte", "any text files, each on its own", joined=False),
)
