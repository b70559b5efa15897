# SPDX-License-Identifier: Apache-2.0
"""GLTR's coloured view of a text (Gehrmann et al. 2019): each token by its rank under a model.

Green is among the 10 likeliest tokens, yellow among 100, red among 1,000, purple beyond. Machines
draw most tokens from the green ones; people surprise a model more often.
"""

import dataclasses
import html

import numpy as np

from gpt2_jax.evaluate.encoding import encode_with_starts
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Statistics, TokenStatistics
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import Tokenizer

# The largest rank of each class, and its colour: dark text is read on all of them.
CLASSES = ((10, "#b7e4a7"), (100, "#f7e38d"), (1000, "#f5a8a0"), (np.inf, "#cdb4f0"))
PLAIN_COLOR = "#e4e4e4"  # of the first token, which nothing predicts

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Ranks of tokens</title>
</head>
<body style="max-width: 60em; margin: 2em auto; padding: 0 1em; background: #fff">
{body}
</body>
</html>
"""


@dataclasses.dataclass(frozen=True, eq=False)
class RankedText:
  """A text with the statistics of its tokens; a notebook shows it in colours."""

  pieces: list[str]  # the text, token by token; a character of several tokens is the first one's
  statistics: Statistics  # of every token but the first
  title: str = ""

  @property
  def shares(self) -> list[float]:
    """The share of the scored tokens in each class."""
    classes = _classes(self.statistics.rank)
    return [float((classes == number).mean()) for number in range(len(CLASSES))]

  def _repr_html_(self) -> str:
    # 1. The legend.
    legend, low = [], 1
    for (high, color), share in zip(CLASSES, self.shares, strict=True):
      ranks = f"rank {low:,} to {high:,.0f}" if np.isfinite(high) else f"rank {low:,} and more"
      legend.append(_span(f" {ranks} ", color, f"{share:.1%} of the tokens") + f" {share:.0%}")
      low = int(high) + 1 if np.isfinite(high) else low

    # 2. The text. A token says its numbers when the pointer is over it.
    statistics = self.statistics
    spans = [_span(self.pieces[0], PLAIN_COLOR, "the first token: context only")]
    for number, piece in enumerate(self.pieces[1:]):
      note = (
        f"rank {statistics.rank[number]:,.0f}, p {np.exp(-statistics.nats[number]):.2g}, entropy "
        f"{statistics.entropy[number]:.2f} nats"
      )
      color = CLASSES[_classes(statistics.rank[number])][1]
      spans.append(_span(piece, color, note))
    heading = f"<h2>{html.escape(self.title)}</h2>\n" if self.title else ""
    return (
      f'<div style="font-family: sans-serif; color: #111">\n{heading}'
      f'<p style="font-size: 85%">{" &nbsp; ".join(legend)}</p>\n'
      f'<p style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7">'
      f"{''.join(spans)}</p>\n</div>"
    )

  def __repr__(self) -> str:
    shares = ", ".join(f"{share:.0%}" for share in self.shares)
    return f"RankedText({len(self.pieces):,} tokens; {shares} of rank 1-10, -100, -1,000, above)"


def rank_text(model: GPT2, tokenizer: Tokenizer, text: str, title: str = "") -> RankedText:
  """The ranks of a text's tokens under a model, each after all tokens before it.

  Raises ValueError for a text of fewer than two tokens.
  """
  _, starts = encode_with_starts(tokenizer, text)
  [statistics] = Scorer(model, tokenizer, batch_size=1).answers([TokenStatistics(text)])
  ends = [*starts[1:].tolist(), len(text)]
  pieces = [text[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]
  return RankedText(pieces, statistics, title)


def rank_page(texts: list[RankedText]) -> str:
  """A page of HTML of some texts. It loads nothing, and runs nothing."""
  return PAGE.format(body="\n".join(text._repr_html_() for text in texts))


def _classes(rank):
  """The class of a rank, or of an array of them."""
  return np.searchsorted([high for high, _ in CLASSES], rank)


def _span(text: str, color: str, note: str) -> str:
  return f'<span style="background: {color}" title="{html.escape(note)}">{html.escape(text)}</span>'
