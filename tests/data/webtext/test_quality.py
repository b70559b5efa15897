# SPDX-License-Identifier: Apache-2.0
"""Quality filters and redaction against datatrove's, on pages, WikiText and broken texts."""

import collections
import random
import re

import pytest

from gpt2_jax.data.webtext.document import Document, Drop
from gpt2_jax.data.webtext.punctuation import PUNCTUATION, SENTENCE_ENDS
from gpt2_jax.data.webtext.quality import C4Quality, FineWebQuality, GopherQuality, GopherRepetition
from gpt2_jax.data.webtext.redact import Redact

pytest.importorskip("datatrove")
pytest.importorskip("spacy")


@pytest.fixture(scope="module")
def texts(pages, data) -> list[str]:
  """More than 500 texts: full pages with their menus, main texts, WikiText, and bad ones."""
  html2text = pytest.importorskip("resiliparse.extract.html2text")
  full = [html2text.extract_plain_text(p.html.decode("utf-8", "replace"))[:2000] for p in pages]
  main = [page.gold[:1800] for page in pages]
  wiki = (data / "wikitext2" / "wiki.test.tokens").read_text(encoding="utf-8")
  articles = [part[:1500] for part in re.split(r"\n (?== [^=])", wiki) if len(part) > 100]
  broken = list(_break(main[:18], random.Random(0)))
  texts = [*full, *main, *articles, *broken]
  assert len(texts) >= 500
  return texts


def _break(texts, rng):
  """Texts that break one rule or another."""
  for text in texts:
    lines = text.splitlines()
    words = text.split()
    yield " ".join(words[: rng.randint(0, 60)])
    yield "\n".join(f"{rng.choice('•-')} {line}" for line in lines)
    yield "\n".join(f"{line}{rng.choice(['...', '…', ''])}" for line in lines)
    yield " ".join(word + rng.choice([" #", " ...", ""]) for word in words)
    yield " ".join(word[: rng.randint(1, 3)] for word in words)
    yield "".join(words)[:3000] + " " + " ".join(w * 6 for w in words)
    yield "\n".join(lines * rng.randint(1, 3))
    yield "\n\n".join(lines[:3] * rng.randint(1, 4))
    yield " ".join(words[:40] + words[:12] * rng.randint(1, 12))
    yield " ".join(words[:40] + words[3:6] * rng.randint(1, 90))
    yield re.sub(r"\w+", lambda m: m[0] if rng.random() < 0.6 else "12", text)
    yield re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "zu", text)
    yield text + rng.choice([" Lorem ipsum dolor sit.", " a {b} c.", "\nWe use cookies here.", ""])
    yield "\n".join(line[:25] for line in lines)
    yield re.sub(r"[.!?]", "", text)
    yield text + "\n[edit] IS_ALPHA JavaScript is off. [12]\n" + "x" * 1200 + " y z."


FILTERS = {
  "GopherQualityFilter": GopherQuality(),
  "GopherRepetitionFilter": GopherRepetition(),
  "C4QualityFilter": C4Quality(),
  "FineWebQualityFilter": FineWebQuality(),
}


@pytest.fixture(scope="module")
def verdicts(texts) -> list[tuple[str, str, tuple, tuple]]:
  """Name of the filter, text, and both verdicts: the reason, and the text that is kept."""
  filters = pytest.importorskip("datatrove.pipeline.filters")
  from datatrove.data import Document as TheirDocument

  oracles = {name: getattr(filters, name)() for name in FILTERS}
  verdicts = []
  for text in texts:
    # All four together: both sides keep the words of a text.
    for name, stage in FILTERS.items():
      document = TheirDocument(text, "id")
      theirs = oracles[name].filter(document)
      theirs = ("kept", document.text) if theirs is True else (theirs[1], None)
      result = stage(Document(text=text))
      ours = (result.reason, None) if isinstance(result, Drop) else ("kept", result.text)
      verdicts.append((name, text, ours, theirs))
  return verdicts


@pytest.mark.parametrize(
  "name, reasons",
  [
    ("GopherQualityFilter", 9),
    ("GopherRepetitionFilter", 10),
    ("C4QualityFilter", 4),
    ("FineWebQualityFilter", 5),
  ],
)
def test_verdict_and_reason_equal_datatroves(verdicts, name, reasons):
  """And the text, where a filter changes it; the texts break so many of its rules."""
  of_filter = [verdict for verdict in verdicts if verdict[0] == name]
  different = [(text[:80], ours, theirs) for _, text, ours, theirs in of_filter if ours != theirs]
  assert len(of_filter) >= 500 and not different
  counts = collections.Counter(theirs[0] for _, _, _, theirs in of_filter)
  print(f"{name}: {len(of_filter)} documents, 0 differences, {dict(counts)}")
  assert len(counts) >= reasons, counts


def test_punctuation_is_datatroves():
  from datatrove.utils import text

  assert set(text.TERMINAL_PUNCTUATION) == SENTENCE_ENDS and text.PUNCTUATION_SET == PUNCTUATION


def test_redaction_matches_what_datatrove_does(texts):
  from datatrove.pipeline.formatters.pii import PIIFormatter

  theirs = PIIFormatter(email_replacement="email@example.com", ip_replacement="192.0.2.1")
  text = "a.b+c@mail.example.org, x@[8.8.8.8], 8.8.8.8, 10.0.0.1, 999.1.1.1, 1.2.3, @home, v1.1"
  for each in [text, *texts]:
    assert Redact()(Document(text=each)).text == theirs.format(each)
  redacted = Redact()(Document(text=text)).text
  assert "mail.example.org" not in redacted and "10.0.0.1" in redacted
  assert Redact("", "")(Document(text=text)).text == text
