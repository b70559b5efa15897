# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import sys

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from gpt2_jax.evaluate.sources import decoded, load
from gpt2_jax.evaluate.task import Generated
from gpt2_jax.evaluate.tasks import summarization
from gpt2_jax.evaluate.tasks.summarization import METRICS, TASKS, WORDS, read, rouge, sentences

TLDR, NO_HINT, LEAD, RANDOM = TASKS
STORY = """LONDON, England (CNN) -- First line

It ended.

@highlight

One thing

@highlight

Another "thing"
"""
ROW = {
  "article": 'LONDON, England (CNN) -- First line. It ended. "So it did," Mr. Smith said. Then?',
  "highlights": "First line.\nThe end.",
}


def answer(text: str, truncated: bool = False) -> list[Generated]:
  return [Generated(text, 1.0, 1, truncated)]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
    ("It cost 3.5 million. 7 died.", ["It cost 3.5 million.", "7 died."]),
    (
      'He said "Go." "Why?" she asked. (Yes.) End',
      ['He said "Go."', '"Why?" she asked.', "(Yes.)", "End"],
    ),
    (
      "Mr. Smith met Dr. J. Jones of the U.S. Senate. Fine.",
      ["Mr. Smith met Dr. J. Jones of the U.S. Senate.", "Fine."],
    ),
    ("no capital. so one. e.g. this", ["no capital. so one. e.g. this"]),
    ("a line\n\n another. Third ", ["a line", "another.", "Third"]),
    (
      "Il dit : « Oui. » Était-ce vrai ? « Non ! »",
      ["Il dit : « Oui. »", "Était-ce vrai ?", "« Non ! »"],
    ),
    (" \n", []),
  ],
)
def test_sentences_by_rule(text, expected):
  assert sentences(text) == expected


def test_sentences_lose_nothing_but_white_space():
  text = " ".join(
    np.random.default_rng(0).choice(
      ["Mr.", "A", "end.", "he", "?", '"Yes."', "\n", "7", "J."], 2000
    )
  )
  assert "".join(sentences(text)).replace(" ", "") == "".join(text.split())


def test_the_prompt_has_the_article_and_the_hint():
  [with_hint], [without] = TLDR.requests(ROW), NO_HINT.requests(ROW)
  assert with_hint.text == ROW["article"] + "\nTL;DR:"
  assert without.text == ROW["article"]
  assert (
    (with_hint.n_new, with_hint.top_k, with_hint.stop)
    == (without.n_new, without.top_k, without.stop)
    == (100, 2, ())
  )
  assert TLDR.example(ROW) == with_hint.text + " First line. The end."
  assert LEAD.requests(ROW) == RANDOM.requests(ROW) == []


def test_a_long_article_keeps_its_beginning_and_the_hint_and_counts_as_truncated():
  long = ROW | {"article": " ".join(f"w{i}" for i in range(WORDS + 1))}
  [prompt] = TLDR.requests(long)
  assert prompt.text.startswith("w0 w1 ") and prompt.text.endswith(f" w{WORDS - 1}\nTL;DR:")
  assert TLDR.sums(long, answer("x"))["truncated"] == 1
  fits = ROW | {"article": " ".join(f"w{i}" for i in range(WORDS))}
  assert TLDR.sums(fits, answer("x"))["truncated"] == 0
  assert TLDR.sums(fits, answer("x", truncated=True))["truncated"] == 1
  assert LEAD.sums(long, [])["truncated"] == 0  # it reads all of it


def test_three_sentences_of_what_is_written_are_the_summary():
  exact = TLDR.sums(ROW, answer("\nFirst line. The\nend. Nobody reads this."))
  assert exact == {"rouge1": 1, "rouge2": pytest.approx(1), "rougeL": 1, "truncated": 0}
  longer = TLDR.sums(ROW, answer("First line. The end. More. Nobody reads this."))
  assert longer["rouge1"] == pytest.approx(2 * 4 / (4 + 5))
  assert TLDR.sums(ROW, answer(" ")) == {"rouge1": 0, "rouge2": 0, "rougeL": 0, "truncated": 0}


def test_rouge_of_a_hand_computed_case():
  # Words match in 3 of 4 and 3 of 6; bigrams in 1 of 3 and 1 of 5; each sentence shares its words
  # in order.
  scores = rouge(["The cats ran.", "Home"], "Dogs slept.\nHome, a cat ran.")
  assert scores["rouge1"] == pytest.approx(2 * 3 / (4 + 6))
  assert scores["rouge2"] == pytest.approx(2 * 1 / (3 + 5))
  assert scores["rougeL"] == pytest.approx(
    2 * 3 / (4 + 6)
  )  # as one line, home after ran, it were 2
  assert RougeScorer(["rougeL"], True).score("Dogs slept. Home, a cat ran.", "The cats ran. Home")[
    "rougeL"
  ].fmeasure == pytest.approx(2 * 2 / (4 + 6))


def test_baselines_take_sentences_of_the_article():
  article = sentences(ROW["article"])
  assert len(article) == 4
  for task, choices in (
    (LEAD, [article[:3]]),
    (RANDOM, [article[:i] + article[i + 1 :] for i in range(4)]),
  ):
    sums = task.sums(ROW, [])
    assert {key: sums[key] for key in ("rouge1", "rouge2", "rougeL")} in [
      rouge(choice, ROW["highlights"]) for choice in choices
    ]
    assert task.sums(ROW, []) == sums  # drawn by the article alone
  articles = [ROW["article"] + " End" * i for i in range(20)]
  drawn = [summarization._random({"article": article}, []) for article in articles]
  assert all(
    lines == sorted(lines, key=article.index)
    for lines, article in zip(drawn, articles, strict=True)
  )
  assert len(set(map(tuple, drawn))) > 3
  short = ROW | {"article": "Just one."}
  assert RANDOM.sums(short, []) == LEAD.sums(short, [])


def test_the_mean_of_the_three_is_the_first_metric():
  assert next(iter(METRICS)) == "rouge_mean"
  sums = {
    "rouge1": np.array([3.0]),
    "rouge2": np.array([0.0]),
    "rougeL": np.array([1.5]),
    "items": np.array([5.0]),
  }
  assert METRICS["rouge_mean"].value(sums) == pytest.approx([30])
  assert METRICS["rougeL"].value(sums) == pytest.approx([30])


def test_stories_by_list_and_json_lines_and_tfds_give_the_same_rows(tmp_path):
  urls = ["http://a.example/1", "http://b.example/2"]
  for url, site in zip(urls, ("cnn", "dailymail"), strict=True):
    path = tmp_path / "set" / site / "stories" / f"{hashlib.sha1(url.encode()).hexdigest()}.story"
    path.parent.mkdir(parents=True)
    path.write_text(STORY)
  (tmp_path / "set" / "all_test.txt").write_text("\n".join(urls) + "\n")
  record = {
    "article": "LONDON, England (CNN) -- First line. It ended.",
    "highlights": 'One thing.\nAnother "thing"',
  }
  (tmp_path / "test.jsonl").write_text(json.dumps(record | {"id": "x"}) + "\n")
  assert list(load(TLDR.source, str(tmp_path / "set"))) == [record, record]
  assert list(load(TLDR.source, str(tmp_path / "test.jsonl"))) == [record]
  assert TLDR.source.row(decoded({key: text.encode() for key, text in record.items()})) == record


def test_a_missing_or_malformed_story_is_refused(tmp_path):
  path = tmp_path / "all_test.txt"
  path.write_text("http://a.example/1\n")
  with pytest.raises(FileNotFoundError, match=r"all_test.txt:1: neither .*/cnn/stories/.*\.story"):
    list(read(path))
  story = tmp_path / "cnn" / "stories" / f"{hashlib.sha1(b'http://a.example/1').hexdigest()}.story"
  story.parent.mkdir(parents=True)
  for text, problem in (
    ("A line\n", "highlights are empty"),
    ("@highlight\n\nx\n", "article is empty"),
  ):
    story.write_text(text)
    with pytest.raises(ValueError, match=rf"\.story is malformed: its {problem}"):
      list(read(path))
  lines = tmp_path / "x.jsonl"
  lines.write_text('{"article": "a"}\n')
  with pytest.raises(ValueError, match=r"x.jsonl:1 is malformed: it has no 'highlights'"):
    list(read(lines))


def test_without_rouge_score_the_command_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
  with pytest.raises(ImportError, match=r"pip install 'gpt2_jax\[eval\]'"):
    summarization._rouge.__wrapped__()
