# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib

import numpy as np
import pytest

from gpt2_jax.evaluate import sources
from gpt2_jax.evaluate.detokenizers import PTB, WIKITEXT, lossy_wikitext
from gpt2_jax.evaluate.runner import run, totals
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Likelihood
from gpt2_jax.evaluate.tasks import perplexity
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters, Gpt2Bpe

needs_data = pytest.mark.skipif(
  "GPT2_JAX_TEST_DATA" not in os.environ, reason="GPT2_JAX_TEST_DATA is not set"
)
needs_bpe = pytest.mark.skipif(
  "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set"
)

TASKS = {(task.name, task.protocol): task for task in perplexity.TASKS}
# tokens with <eos>, as the field counts them: Merity et al. 2016, table 1; Mikolov's PTB
COUNTS = {
  "wikitext2/wiki.test.tokens": 245_569,
  "wikitext2/wiki.valid.tokens": 217_646,
  "ptb/ptb.test.txt": 82_430,
  "ptb/ptb.valid.txt": 73_760,
}


def path(name: str) -> pathlib.Path:
  return pathlib.Path(os.environ["GPT2_JAX_TEST_DATA"]) / name


@functools.cache
def rows(name: str, protocol: str, file: str) -> sources.DatasetRows:
  return sources.load(TASKS[name, protocol].source, str(path(file)))


def request_texts(task, rows) -> str:
  return "".join(request.text for row in rows for request in task.requests(row))


def value(task, metric: str, items: list[dict]) -> float:
  sums = {key: np.array(sum(item[key] for item in items)) for key in items[0]}
  return float(task.metrics[metric].value(sums))


@needs_data
@pytest.mark.parametrize("file", COUNTS)
def test_words_are_the_field_s_count(file):
  name = file.partition("/")[0]
  loaded = rows(name, "raw", file)
  assert sum(perplexity.text_units(row["text"])["words"] for row in loaded) == COUNTS[file]
  assert (
    sum(perplexity.text_units(row["text"])["bytes"] for row in loaded) == path(file).stat().st_size
  )
  assert (
    len(loaded)
    == {"wikitext2": 60, "ptb": math.ceil(path(file).read_bytes().count(b"\n") / 20)}[name]
  )


@needs_data
def test_the_rows_of_a_contiguous_task_are_the_file_and_read_in_turn_its_natural_text():
  for name, file, detokenizer in (
    ("wikitext2", "wiki.test.tokens", WIKITEXT),
    ("ptb", "ptb.test.txt", PTB),
  ):
    text = path(f"{name}/{file}").read_bytes().decode()
    for protocol, natural in (("raw", str), ("invertible", detokenizer.detokenize)):
      task = TASKS[name, protocol]
      loaded = sources.load(task.source, str(path(".")))
      assert task.contiguous and "".join(row["text"] for row in loaded) == text
      assert request_texts(task, loaded[:5]) == natural("".join(row["text"] for row in loaded[:5]))


@needs_data
def test_megatron_s_rules_see_the_whole_file_and_rows_are_articles_all_the_same():
  task = TASKS["wikitext2", "megatron"]
  loaded = rows("wikitext2", "megatron", "wikitext2/wiki.test.tokens")
  text = path("wikitext2/wiki.test.tokens").read_bytes().decode()
  assert (
    request_texts(task, loaded)
    == lossy_wikitext(text)
    != "".join(lossy_wikitext(row["text"]) for row in loaded)
  )
  titles = [row["natural"].strip().split("\n")[0] for row in loaded]
  assert titles[:2] == ["= Robert <unk> =", "= Du Fu ="] and all(
    title.startswith("= ") for title in titles
  )
  assert [row["text"] for row in loaded] == [
    row["text"] for row in rows("wikitext2", "raw", "wikitext2/wiki.test.tokens")
  ]


@needs_data
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="could not import lm_eval")
def test_pages_and_counts_are_lm_evaluation_harness_s():
  folder = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
  spec = importlib.util.spec_from_file_location(
    "theirs", f"{folder}/tasks/wikitext/preprocess_wikitext.py"
  )
  theirs = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(theirs)
  task = TASKS["wikitext2", "lm_eval"]
  loaded = rows("wikitext2", "lm_eval", "wikitext2/wiki.test.tokens")
  assert len(loaded) == 62  # two formulas look like headings
  for row in loaded:
    page = {"page": row["text"]}
    expected = theirs.process_results(page, (-7.0,))
    sums = task.sums(row, [Likelihood(7.0, 3, False, False)])
    assert task.requests(row)[0].text == theirs.wikitext_detokenizer(page)
    assert (-sums["nats"], sums["words"]) == expected["word_perplexity"]
    assert (-sums["nats"], sums["bytes"]) == expected["bits_per_byte"]


def test_pages_lose_the_newline_between_them(tmp_path):
  (tmp_path / "wiki").write_text(" \n = One = \n \n a . \n = = Two = = \n \n = Three = \n b \n")
  assert [row["text"] for row in perplexity.harness_pages(tmp_path / "wiki")] == [
    " = One = \n \n a . \n = = Two = = \n ",
    " = Three = \n b \n",
  ]


def test_an_article_begins_at_a_heading_between_empty_lines(tmp_path):
  text = " \n = One = \n \n a \n = no heading = \n \n = = Two = = \n \n b \n"
  text += " \n = Three = \n \n c \n \n = 3 \n \n"
  (tmp_path / "wiki").write_text(text)
  parts = [row["text"] for row in perplexity.wikitext_articles(tmp_path / "wiki")]
  assert "".join(parts) == text and [part.strip()[:5] for part in parts] == ["= One", "= Thr"]
  for reader in (
    perplexity.wikitext_articles,
    perplexity.megatron_articles,
    perplexity.harness_pages,
    perplexity.read_lines,
  ):
    (tmp_path / "empty").write_text("")
    assert list(reader(tmp_path / "empty")) == []
  with pytest.raises(ValueError, match="empty is empty: there is nothing to score"):
    list(perplexity.whole_file(tmp_path / "empty"))


def test_the_units_are_those_of_the_published_text():
  task, row = TASKS["ptb", "invertible"], {"text": " it was n't \n é \n"}
  items = [task.sums(row, [Likelihood(12.0, 4, False, False)])]
  units = {"words": 6.0, "bytes": 18.0, "characters": 17.0}
  assert items == [{"nats": 12.0, "tokens": 4.0, "unscored": 0.0} | units]
  assert task.requests(row)[0].text == "it wasn't\né\n"
  assert value(task, "perplexity", items * 2) == pytest.approx(math.exp(2))
  assert value(task, "bits_per_byte", items) == pytest.approx(12 / math.log(2) / 18)
  assert value(task, "bits_per_character", items) == pytest.approx(12 / math.log(2) / 17)
  assert value(task, "nats_per_token", items) == 3


def test_each_task_leads_with_its_unit():
  leads = {name: next(iter(task.metrics)) for (name, _), task in TASKS.items()}
  assert (
    leads.pop("enwik8") == leads.pop("text") == "bits_per_byte"
    and leads.pop("text8") == "bits_per_character"
  )
  assert set(leads.values()) == {"perplexity"} and len(leads) == 4
  assert all(set(task.metrics) == set(perplexity.METRICS) for task in perplexity.TASKS)


@pytest.mark.parametrize(
  ("start", "end", "kept"),
  [
    (b"0123456789", b"abcdefghij", "abcdefghij"),
    # the split cuts é: its second byte is dropped
    ("012345678é".encode(), b"bcdefghij", "bcdefghij"),
    ("01234567€".encode()[:10], "€".encode()[2:] + b"bcdefghij", "bcdefghij"),
    (b"0123456789", "abcdefgh€".encode()[:10], "abcdefgh"),  # the file ends in a character
    (b"0123456789", "abcdefg😀".encode()[:10], "abcdefg"),
    (b"0123456789", "abcdef😀".encode(), "abcdef😀"),
    (b"0123456789", b"abcdefgh\r\n", "abcdefgh\r\n"),
  ],
)
def test_enwik8_ends_in_whole_characters(monkeypatch, tmp_path, start, end, kept):
  monkeypatch.setattr(perplexity, "SIZES", (20, 10))
  monkeypatch.setattr(perplexity, "HELD_OUT", 10)
  monkeypatch.setattr(perplexity, "ROW_CHARACTERS", 4)
  for content in (start + end, (start + end)[-10:]):
    (tmp_path / "enwik8").write_bytes(content)
    loaded = sources.load(TASKS["enwik8", "whole"].source, str(tmp_path))
    assert (
      "".join(row["text"] for row in loaded) == kept
      and max(len(row["text"]) for row in loaded) == 4
    )


def test_a_truncated_enwik8_is_refused(tmp_path):
  (tmp_path / "enwik8").write_bytes(b"x" * 5_000_001)
  with pytest.raises(
    ValueError, match="5,000,001 bytes; it takes all 100,000,000, or the last 5,000,000"
  ):
    sources.load(TASKS["enwik8", "whole"].source, str(tmp_path))


def test_sentences_of_one_billion_words_are_the_same_from_tfds(tmp_path):
  for i in range(50):
    (tmp_path / f"news.en.heldout-{i:05}-of-00050").write_text("")
  (tmp_path / "news.en.heldout-00000-of-00050").write_text("It 's one .\nAnd two\n")
  (tmp_path / "news.en.heldout-00001-of-00050").write_text("Three .\n")
  first, fifty = (TASKS["lm1b", protocol].source for protocol in ("invertible", "all_heldout"))
  assert list(sources.load(first, str(tmp_path))) == [
    {"text": "It 's one .\n"},
    {"text": "And two\n"},
  ]
  assert list(sources.load(fifty, str(tmp_path))) == [
    fifty.row({"text": line}) for line in ("It 's one .", "And two", "Three .")
  ]
  assert TASKS["lm1b", "invertible"].requests({"text": "It 's one .\n"})[0].text == "It's one.\n"


def test_a_text_is_read_as_it_is_or_refused(tmp_path):
  (tmp_path / "b.txt").write_bytes("é\r\n  ".encode())
  (tmp_path / "a.txt").write_bytes(b"a")
  task = TASKS["text", "whole"]
  loaded = sources.load(task.source, str(tmp_path))
  assert request_texts(task, loaded) == "aé\r\n  " and len(loaded) == 2 and not task.contiguous
  (tmp_path / "a.txt").write_bytes(b"a\xff")
  with pytest.raises(ValueError, match="a.txt is not UTF-8 at byte 1"):
    sources.load(task.source, str(tmp_path))


@pytest.fixture
def letters(mesh, parameters, place):
  """A uniform model of characters, whose tokenizer has no <|endoftext|>."""
  config = ModelConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=8, n_vocab=64, dtype="float32")
  characters = "\n" + "".join(map(chr, range(32, 95)))
  with mesh(1, 1, 1):
    model = place(config, {name: np.zeros_like(x) for name, x in parameters(config).items()})
    yield Scorer(model, Characters(characters), batch_size=4)


@pytest.mark.parametrize("contiguous", [True, False])
def test_what_has_no_score_is_in_no_denominator(letters, contiguous):
  """Each character costs a uniform model of 64 six bits, however many texts have no score for
  their first."""
  task = dataclasses.replace(TASKS["text", "whole"], contiguous=contiguous)
  texts = ["A", "AB C\nD", "E" * 20]
  items = run(task, [{"text": text} for text in texts], letters)
  sums = totals(items)
  for metric in ("bits_per_byte", "bits_per_character"):
    assert task.metrics[metric].value(sums) == pytest.approx(6, rel=1e-6)
  assert sums["tokens"] == sums["bytes"] == 27 - (1 if contiguous else 3)
  assert items["unscored"].tolist() == ([1, 0, 0] if contiguous else [1, 1, 1])


def test_a_text_of_which_nothing_has_a_score_has_no_bits_per_byte(letters):
  task = TASKS["text", "whole"]
  sums = {key: np.array(x) for key, x in totals(run(task, [{"text": "A"}], letters)).items()}
  with np.errstate(invalid="ignore"):
    assert np.isnan(task.metrics["bits_per_byte"].value(sums))


def test_the_place_in_the_published_text_is_after_as_many_characters():
  published = " = Robert <unk> = \n"
  assert perplexity.scored_text(published, "") == published
  assert perplexity.scored_text(published, " = Rob") == "ert <unk> = \n"
  # of a detokenized text, which has lost a space
  assert perplexity.scored_text(published, "= R") == "obert <unk> = \n"
  assert perplexity.scored_text("( a )", "(a") == " )"
  assert perplexity.scored_text("a", "abc") == ""


@needs_data
@needs_bpe
def test_a_uniform_model_s_perplexity_per_word_follows_from_counts_alone(mesh, parameters, place):
  config = ModelConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=32, n_vocab=50257, dtype="float32")
  tokenizer, few = Gpt2Bpe(), rows("ptb", "raw", "ptb/ptb.test.txt")[:1]
  text = "".join(row["text"] for row in few)
  with mesh(1, 1, 1):
    model = place(config, {name: np.zeros_like(x) for name, x in parameters(config).items()})
    scorer = Scorer(model, tokenizer, batch_size=8)
    for protocol, natural in (("raw", text), ("invertible", PTB.detokenize(text))):
      task = TASKS["ptb", protocol]
      sums = totals(run(task, few, scorer))
      tokens, words = len(tokenizer.encode(natural)), len(text.split()) + 20
      assert (sums["tokens"], sums["words"]) == (tokens, words)
      assert task.metrics["perplexity"].value(sums) == pytest.approx(
        50257 ** (tokens / words), rel=1e-5
      )
