# SPDX-License-Identifier: Apache-2.0
"""GLTR's view: the text as it is, each token in the colour of its rank, and nothing that runs."""

import html.parser

import numpy as np
import pytest

from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Statistics, TokenStatistics
from gpt2_jax.inspection.gltr import CLASSES, PLAIN_COLOR, RankedText, rank_page, rank_text
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

TEXT = '</p><script>alert("&amp;")</script>\n two  lines & more'
COLORS = [color for _, color in CLASSES]


class Reader(html.parser.HTMLParser):
  """What a browser makes of a page: its elements, and the coloured spans of the text."""

  def __init__(self, page: str):
    super().__init__(convert_charrefs=True)
    self.tags, self.spans, self.texts = set(), [], []
    self.feed(page)

  def handle_starttag(self, tag, attributes):
    self.tags.add(tag)
    if tag == "p":
      self.spans, self.texts = [], []
    if tag == "span":
      attributes = dict(attributes)
      self.spans.append((attributes["style"].removeprefix("background: "), attributes["title"]))

  def handle_data(self, data):
    self.texts.append(data)


def statistics(ranks) -> Statistics:
  ranks = np.array(ranks, float)
  return Statistics(np.log(ranks + 1), ranks, ranks * 0 + 2.5, ranks, ranks)


def test_each_token_has_the_colour_of_its_rank():
  ranks = [1, 10, 11, 100, 101, 1000, 1001, 50000]
  text = RankedText(list("abcdefghi"), statistics(ranks), "a <title>")
  page = Reader(rank_page([text]))
  assert "".join(page.texts).strip() == "abcdefghi"
  colors = [color for color, _ in page.spans]
  assert colors == [PLAIN_COLOR, *(color for color in COLORS for _ in range(2))]
  assert page.spans[-1][1] == "rank 50,000, p 2e-05, entropy 2.50 nats"
  assert text.shares == [0.25] * 4


def test_a_text_stays_a_text(mesh, parameters, place):
  tokenizer = Characters("".join(sorted(set(TEXT))))
  config = ModelConfig(
    n_vocab=tokenizer.vocab_size, n_ctx=16, n_embd=16, n_head=2, n_layer=1, dtype="float32"
  )
  with mesh(1, 1, 1):
    model = place(config, parameters(config))
  ranked = rank_text(model, tokenizer, TEXT, title="</h2><script>")
  page = Reader(rank_page([ranked]))
  assert "script" not in page.tags and "link" not in page.tags
  shown = "".join(page.texts)
  assert shown.strip() == TEXT.strip()
  [answer] = Scorer(model, tokenizer).answers([TokenStatistics(TEXT)])
  np.testing.assert_array_equal(ranked.statistics.rank, answer.rank)
  assert len(page.spans) == len(TEXT)
  with pytest.raises(ValueError, match="has 1 tokens"):
    rank_text(model, tokenizer, "t")
