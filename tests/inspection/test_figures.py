# SPDX-License-Identifier: Apache-2.0
"""Labels and pictures: readable at every value, whatever the text; no model is needed."""

import io
import string
import warnings

import matplotlib.style
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from gpt2_jax.inspection import figures
from gpt2_jax.inspection.heads import AttentionWeights
from gpt2_jax.inspection.labels import token_label, token_labels
from gpt2_jax.inspection.predictions import NextTokens, TokenScores
from gpt2_jax.tokenizer import EOT, Characters, HuggingFace, byte_alphabet, train_sentencepiece

HARD = [
  "$x_",
  "^{",
  "\\frac",
  "日本",
  "😀",
  "e\u0301",
  "\u202e",
  "\x00",
  "%",
  " ",
  "\n",
  "\t",
  "a" * 99,
]


def scores(labels, nats=None) -> TokenScores:
  nats = np.linspace(0, 12, len(labels)) if nats is None else np.array(nats)
  return TokenScores(list(range(len(labels))), labels, nats, nats < 1)


def attention(L=2, H=3, T=5, labels=None) -> AttentionWeights:
  weights_LHTS = np.tril(np.random.default_rng(0).random((L, H, T, T)))
  weights_LHTS /= weights_LHTS.sum(-1, keepdims=True)
  return AttentionWeights(list(range(T)), labels or ["\u2423the"] * T, weights_LHTS)


def prediction(labels) -> NextTokens:
  probabilities = np.sort(np.random.default_rng(0).dirichlet(np.ones(len(labels))))[::-1]
  return NextTokens("Once $upon_ \x00\n日本", list(range(len(labels))), labels, probabilities)


def draw(figure) -> bytes:
  """The picture; no character in it is without a glyph."""
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    return figure._repr_png_()


def texts(axes) -> list:
  return [text for text in axes.texts if text.get_text()]


# ---- labels


@pytest.mark.parametrize(
  "token, label",
  [
    (b" the", "\u2423the"),
    (b"\n\n\t", "\u23ce\u23ce\u21e5"),
    ("é—日".encode(), "é—日"),
    (b"\xe6", r"\xe6"),
    (b"a\xff", r"a\xff"),
    (b"\x00\x7f", r"\x00\x7f"),
    ("\u200b\u202e\u0301\u00a0".encode(), r"\u200b\u202e\u0301\xa0"),
  ],
)
def test_labels_are_printable(token, label):
  assert token_label(token) == label


def test_labels_of_every_tokenizer_show_spaces_and_bytes():
  characters = Characters("\n ab")
  assert token_labels(characters, [0, 1, 2, 4]) == ["\u23ce", "\u2423", "a", "<4>"]

  vocab = {character: byte for byte, character in byte_alphabet().items()}
  byte_bpe = HuggingFace.from_merges(vocab | {"\u0120t": 256, EOT: 257}, [("\u0120", "t")])
  ids = byte_bpe.encode(" té\ufffd")
  shown = ["\u2423t", r"\xc3", r"\xa9", r"\xef", r"\xbf", r"\xbd"]
  assert token_labels(byte_bpe, [*ids, 257, 300]) == [*shown, EOT, "<300>"]
  assert b"".join(map(byte_bpe.token_bytes, ids)) == " té\ufffd".encode()

  pieces = train_sentencepiece([string.printable * 5], vocab_size=400)
  text = "a b\té日"
  ids = pieces.encode(text)
  assert b"".join(map(pieces.token_bytes, ids)) == text.encode()
  assert "\u2423" in "".join(token_labels(pieces, ids)) and pieces.token_bytes(400) == b""
  assert token_labels(pieces, [pieces.eot]) == [EOT]


# ---- figures


def test_lines_break_between_words():
  assert [y for _, y in figures.lay_out(list("ab cd ef"), width=4)] == [0, 0, 0, 1, 1, 1, 2, 2]
  assert figures.lay_out([" the", " kings", "\u23ce", "x"], 11) == [(0, 0), (4, 0), (10, 0), (0, 1)]
  assert [y for _, y in figures.lay_out([" the", " ki", "ngs"], 8)] == [0, 1, 1]
  assert [y for _, y in figures.lay_out(list("abcdef"), 4)] == [0, 0, 0, 0, 1, 1]  # a long word


def test_text_has_contrast_on_every_colour():
  """WCAG's 4.5 for every value of the scale, and on the grey of a token without one."""

  def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return np.dot([0.2126, 0.7152, 0.0722], linear)

  figure = figures.draw_surprise(scores(["x"] * 400, [np.nan, *np.linspace(0, 9, 399)]))
  axes = figure.axes[0]
  colours = set()
  for cell, text in zip(axes.patches, axes.texts, strict=True):
    light, dark = sorted([luminance(cell.get_facecolor()), luminance(text.get_color())])[::-1]
    assert (light + 0.05) / (dark + 0.05) >= 4.5
    colours.add(text.get_color())
  assert colours == {"black", "white"}


def test_every_token_lies_in_its_cell_and_no_two_overlap():
  labels = ["\u2423" + "word"[: n % 5] + "\u23ce" * (n % 7 == 0) for n in range(100)]
  figure = figures.draw_surprise(scores(labels), width=30)
  axes = figure.axes[0]
  renderer = FigureCanvasAgg(figure).get_renderer()
  cells = set()
  for cell, text, label in zip(axes.patches, axes.texts, labels, strict=True):
    x, y, n = round(cell.get_x()), int(cell.get_y()), round(cell.get_width())
    assert n == len(label) and x + n <= 30
    own = {(x + i, y) for i in range(n)}
    assert not own & cells
    cells |= own
    # The text is no wider than its cell.
    if text.get_text().strip():
      drawn, room = text.get_window_extent(renderer), cell.get_window_extent(renderer)
      assert drawn.width <= room.width + 2


@pytest.mark.parametrize("nats", [[0.0] * 3, [1e-9] * 3, [np.nan, 5.0, 5.0], [300.0, 0.0, 1.0]])
def test_surprise_of_any_losses_is_drawn(nats):
  assert len(draw(figures.draw_surprise(scores(["a", "b", "c"], nats)))) > 3000


def test_one_scale_for_several_texts():
  drawn = [figures.draw_surprise(scores(["a"], [n]), max_nats=8) for n in (4.0, 8.0, 99.0)]
  colours = [figure.axes[0].patches[0].get_facecolor() for figure in drawn]
  assert colours[0] != colours[1] == colours[2]


def test_any_text_is_drawn():
  """Mathematics, letters the font lacks, controls and very long tokens: as characters."""
  labels = [token_label(token.encode()) for token in HARD] + [r"\xe6", "<50300>"]
  surprise = figures.draw_surprise(scores(labels))
  next_tokens = figures.draw_next_tokens(prediction(labels))
  heads = figures.draw_attention(attention(T=len(labels), labels=labels))
  assert min(map(len, map(draw, (surprise, next_tokens, heads)))) > 3000

  shown = [text.get_text() for text in texts(surprise.axes[0])]
  assert shown[0] == "$x_" and shown[3] == r"\u65e5\u672c" and len(shown[12]) <= 80
  ticks = [tick.get_text() for tick in next_tokens.axes[0].get_yticklabels()]
  assert ticks[0] == "$x_" and max(map(len, ticks)) <= figures.MAX_LABEL


def test_all_heads_of_a_layer_and_the_labels_of_their_tokens():
  figure = figures.draw_attention(attention(L=4, H=12, T=6, labels=list("abcdef")))
  titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
  assert titles == [f"layer 2, head {n}" for n in range(12)]
  first = figure.axes[0]
  assert [tick.get_text() for tick in first.get_yticklabels()] == list("abcdef")
  last = figure.axes[11]
  assert [tick.get_text() for tick in last.get_xticklabels()] == list("abcdef")

  image = first.images[0].get_array()
  assert image.mask[0, 1:].all() and not image.mask[5].any()  # the future is no weight of zero


def test_one_head_alone_and_from_the_end():
  figure = figures.draw_attention(attention(), layer=-1, head=-1)
  assert figure.axes[0].get_title() == "layer 1, head 2"
  np.testing.assert_array_equal(
    figure.axes[0].images[0].get_array().filled(0), attention().weights_LHTS[1, 2]
  )


def test_labels_of_many_tokens_do_not_overlap():
  figure = figures.draw_attention(attention(L=1, H=4, T=200))
  figure.draw_without_rendering()
  boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
  assert 10 < len(boxes) < 60
  assert all(above.y0 >= below.y1 - 1 for above, below in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_a_notebooks_style_is_followed(style):
  """Titles have the style's colour, on its background."""
  with matplotlib.style.context(style):
    figure = figures.draw_next_tokens(prediction(["a", "b"]))
    assert figure.axes[0].title.get_color() != figure.get_facecolor()
    assert to_rgb(figure.axes[0].title.get_color()) != to_rgb(figure.get_facecolor())


def test_a_notebook_shows_a_figure_and_pyplot_keeps_none():
  import matplotlib.pyplot as plt

  figure = figures.draw_surprise(scores(["a", "b"]))
  assert figure._repr_png_().startswith(b"\x89PNG") and not plt.get_fignums()
  figure.savefig(io.BytesIO(), format="pdf")


@pytest.mark.parametrize(
  "call, rule",
  [
    (lambda: figures.draw_surprise(scores(["a"] * 4097)), "4,097 tokens are too many"),
    (lambda: figures.draw_surprise(scores(["a"]), width=3), "a line of 3 characters"),
    (lambda: figures.draw_surprise(scores(["a"]), max_nats=0), "max_nats is 0; it is a finite"),
    (
      lambda: figures.draw_attention(attention(), layer=2),
      "layer 2 is not there; there are 2",
    ),
    (lambda: figures.draw_attention(attention(), head=-4), "head -4 is not there; there are 3"),
  ],
)
def test_what_cannot_be_drawn_is_refused(call, rule):
  with pytest.raises(ValueError, match=rule):
    call()
