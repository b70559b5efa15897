# SPDX-License-Identifier: Apache-2.0
"""Figures of token losses, next tokens and attention weights, by matplotlib.

pyplot has no part in them: nothing is shown or kept by the way, and a notebook shows a figure that
is a cell's last value. `figure.savefig("surprise.png")` writes one.
"""

import functools
import io
import math

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from gpt2_jax.inspection.heads import AttentionWeights
from gpt2_jax.inspection.labels import SPACE, escape, token_label
from gpt2_jax.inspection.predictions import NextTokens, TokenScores

# matplotlib brings this font. Its characters are all 0.602 of the font size wide.
FONT = "DejaVu Sans Mono"
CHARACTER = 0.602 / 72  # inches, for each point of the font size

MAX_TOKENS = 4096  # of a picture of a text, which is a page of 200 lines then
MAX_LABEL = 16  # characters of a label at an axis
LABEL = 0.135  # inches from label to label
UNSCORED = "#e4e4e4"
FUTURE = "#efefef"


class Picture(Figure):
  """A figure that a notebook shows by itself."""

  def _repr_png_(self) -> bytes:
    buffer = io.BytesIO()
    self.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def draw_surprise(scores: TokenScores, width: int = 80, max_nats: float | None = None) -> Picture:
  """Draws a text, each token on a colour for its loss; the loss is the surprise of a reader.

  `width` is the number of characters in a line. Colours go from 0 to `max_nats`, by default the
  greatest loss of the text: give it to compare texts. Raises ValueError for a text of too many
  tokens.
  """
  if len(scores.tokens) > MAX_TOKENS:
    raise ValueError(
      f"{len(scores.tokens):,} tokens are too many for a picture, which holds {MAX_TOKENS:,}; "
      f"score a part of the text"
    )
  if width < 20:
    raise ValueError(f"a line of {width} characters is too short; give 20 or more")
  if max_nats is not None and not 0 < max_nats < math.inf:
    raise ValueError(f"max_nats is {max_nats}; it is a finite number above 0")

  # 1. The figure is as large as its characters, in inches. A cell is a character.
  texts = [drawable(label).replace(SPACE, " ") for label in scores.labels]
  texts = [shortened(text, width) for text in texts]
  places = lay_out(texts, width)
  n_lines = places[-1][1] + 1
  size, margin, line_height, legend = 10, 0.15, 0.24, 0.75
  text_width, text_height = width * size * CHARACTER, n_lines * line_height
  height = text_height + legend + 2 * margin
  figure = Picture((text_width + 2 * margin, height), dpi=100)
  across = text_width / (text_width + 2 * margin)
  left = (1 - across) / 2
  axes = figure.add_axes((left, (legend + margin) / height, across, text_height / height))
  axes.set(xlim=(0, width), ylim=(n_lines, 0))
  axes.axis("off")

  # 2. The tokens.
  highest = max(np.nanmax(scores.nats), 1e-6) if max_nats is None else max_nats
  scale = ScalarMappable(Normalize(0, highest, clip=True), matplotlib.colormaps["YlOrRd"])
  for place, text, nats in zip(places, texts, scores.nats, strict=True):
    _draw_token(axes, place, text, nats, scale, size)

  # 3. The legend.
  bar = figure.add_axes((left, 0.45 / height, across / 2, 0.12 / height))
  figure.colorbar(scale, cax=bar, orientation="horizontal")
  bar.set_xlabel("loss of a token, in nats (0: certain of it)", fontsize=8, labelpad=2)
  bar.tick_params(labelsize=8)
  summary = f"loss {scores.loss:.3f}   perplexity {scores.perplexity:.2f}   {len(texts):,} tokens"
  figure.text(1 - left, 0.5 / height, summary, fontsize=9, ha="right", va="center")
  return figure


def _draw_token(axes, place: tuple[int, int], text: str, nats, scale: ScalarMappable, size: int):
  """Draws a token's text in its cell. Nothing predicts the first of some texts: its loss is NaN."""
  x, y = place
  colour = UNSCORED if np.isnan(nats) else scale.to_rgba(nats)

  # White edges keep two tokens of one colour apart.
  cell = Rectangle((x, y + 0.08), len(text), 0.84, facecolor=colour, edgecolor="white", lw=0.8)
  axes.add_patch(cell)
  style = {"family": FONT, "fontsize": size, "va": "center", "parse_math": False}
  axes.text(x, y + 0.5, text, color=text_colour(colour), **style)


def draw_next_tokens(prediction: NextTokens) -> Picture:
  """Draws the most likely next tokens and their probabilities, as bars."""
  labels = [shortened(drawable(label), MAX_LABEL) for label in prediction.labels]
  percents = 100 * prediction.probabilities
  places = np.arange(len(labels))

  figure = Picture((6, 0.9 + 0.26 * len(labels)), dpi=100, layout="constrained")
  axes = figure.subplots()
  axes.barh(places, percents, color="#3b75af", height=0.75)
  axes.set_yticks(places, labels, family=FONT, fontsize=10, parse_math=False)
  axes.invert_yaxis()

  # The numbers stand outside the bars, where they are readable beside the shortest.
  room = percents.max() * 1.16
  for place, percent in zip(places, percents, strict=True):
    axes.text(percent + 0.01 * room, place, f"{percent:.3g} %", va="center", fontsize=9)
  axes.set_xlim(0, room)
  axes.xaxis.set_major_formatter(PercentFormatter(decimals=None))
  axes.spines[["top", "right"]].set_visible(False)

  end = drawable(token_label(prediction.text[-40:].encode())).replace(SPACE, " ")
  before = f"... {end}" if len(prediction.text) > 40 else end
  axes.set_title(f"next token after: {before}", fontsize=9, loc="left", parse_math=False)
  return figure


def draw_attention(
  attention: AttentionWeights, layer: int | None = None, head: int | None = None
) -> Picture:
  """Draws the attention of all heads of a layer (default: the middle one), or of one head.

  A row is a query, a column is a key; the future is grey. The colour scale runs as the square root,
  so that weak attention is visible too. Raises ValueError for a layer or head that is not there.
  """
  L, H, T, _ = attention.weights_LHTS.shape
  layer = _check_index(L // 2 if layer is None else layer, L, "layer")
  heads = range(H) if head is None else [_check_index(head, H, "head")]

  # 1. Panels in rows of about as many as there are rows; each is as large as its labels need.
  columns = 1 if head is not None else math.ceil(math.sqrt(H)) if H > 4 else min(H, 2)
  rows = -(-len(heads) // columns)
  largest = {1: 8.0, 2: 5.4}.get(columns, 3.2)
  side = min(largest, max(2.0, LABEL * T))
  every = math.ceil(LABEL * T / side)  # of so many tokens one has its label
  size = (columns * side + 1.7, rows * (side + 0.25) + 1.2)
  figure = Picture(size, dpi=90, layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False)

  # 2. Draw. Keys after a query are masked: they are no weights of zero.
  norm, colours = PowerNorm(0.5, 0, 1), matplotlib.colormaps["Blues"].with_extremes(bad=FUTURE)
  is_future_TS = ~np.tri(T, dtype=bool)
  for panel in panels.flat:
    panel.axis("off")
  for number, panel in zip(heads, panels.flat, strict=False):
    panel.axis("on")
    weights_TS = np.ma.masked_where(is_future_TS, attention.weights_LHTS[layer, number])
    panel.imshow(weights_TS, norm=norm, cmap=colours, interpolation="nearest")
    panel.set_title(f"layer {layer}, head {number}", fontsize=9)

  # 3. Labels: of queries on the left, of keys under the lowest panel of each column.
  ticks = np.arange(0, T, every)
  labels = [shortened(drawable(attention.labels[i]), MAX_LABEL) for i in ticks]
  style = {"family": FONT, "fontsize": 8, "parse_math": False}
  for n, panel in enumerate(panels.flat[: len(heads)]):
    is_lowest = n + columns >= len(heads)
    panel.set_xticks(ticks, labels if is_lowest else [""] * len(ticks), rotation=90, **style)
    panel.set_yticks(ticks, labels if n % columns == 0 else [""] * len(ticks), **style)
    panel.tick_params(length=2)
  figure.supxlabel("key: the token that is attended to", fontsize=9)
  figure.supylabel("query: the token that attends", fontsize=9)
  bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, shrink=0.6, aspect=30)
  bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
  bar.ax.tick_params(labelsize=8)
  return figure


# ---- text


def text_colour(background) -> str:
  """Black or white, whichever has more contrast on a background.

  The relative luminance of WCAG 2 (https://www.w3.org/TR/WCAG22/#dfn-relative-luminance). The
  contrast of the better one is 4.58 at least, and WCAG asks for 4.5.
  """
  linear = []
  for channel in to_rgb(background):
    linear.append(channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4)
  luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
  return "black" if luminance > math.sqrt(1.05 * 0.05) - 0.05 else "white"


def lay_out(texts: list[str], width: int) -> list[tuple[int, int]]:
  """Column and line of each token's text, in lines of `width` characters.

  A line breaks after the text's own line end, else between words, else between tokens.
  """
  places = []
  x, y = 0, 0
  for text, word_length in zip(texts, _word_lengths(texts), strict=True):
    # A word that is wider than a line is broken where the line is full.
    needed = word_length if len(text) < word_length <= width else len(text)
    if x and x + needed > width:
      x, y = 0, y + 1
    places.append((x, y))
    x += len(text)
    if text.endswith("\u23ce"):
      x, y = 0, y + 1
  return places


def _word_lengths(texts: list[str]) -> list[int]:
  """The length of the word that each token begins; 0 for a token inside a word.

  A word ends before a token that begins with a space, and after a space or a line's end.
  """
  lengths = [0] * len(texts)
  begin = 0
  for i, text in enumerate(texts):
    if i and (text.startswith(" ") or texts[i - 1].endswith((" ", "\u23ce"))):
      begin = i
    lengths[begin] += len(text)
  return lengths


def drawable(text: str) -> str:
  """The text with an escape in place of each character that the font lacks."""
  if text.isascii():
    return text
  return "".join(c if _font().get_char_index(ord(c)) else escape(c) for c in text)


@functools.cache
def _font() -> FT2Font:
  return FT2Font(font_manager.findfont(FONT))


def shortened(text: str, length: int) -> str:
  """The text, with dots in its middle if it is too long."""
  if len(text) <= length:
    return text
  half = (length - 1) // 2
  return f"{text[:half]}\u2026{text[-half:]}"


def _check_index(index: int, count: int, what: str) -> int:
  """A layer's or head's number from 0; negative ones count from the end. Raises ValueError."""
  if not -count <= index < count:
    raise ValueError(f"{what} {index} is not there; there are {count}, from 0 to {count - 1}")
  return index % count
