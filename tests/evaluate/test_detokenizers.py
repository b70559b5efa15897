# SPDX-License-Identifier: Apache-2.0
import functools
import importlib.util
import os
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.evaluate.detokenizers import (
  ONE_BILLION,
  PTB,
  VERBATIM,
  WIKITEXT,
  edit_share,
  lossy_ptb,
  lossy_wikitext,
)

needs_data = pytest.mark.skipif(
  "GPT2_JAX_TEST_DATA" not in os.environ, reason="GPT2_JAX_TEST_DATA is not set"
)

# with the detokenizer and the largest number of lines in which a token may need a mark
PUBLISHED = {
  "wikitext2/wiki.test.tokens": (WIKITEXT, 1),
  "wikitext2/wiki.valid.tokens": (WIKITEXT, 3),
  "ptb/ptb.test.txt": (PTB, 0),
  "ptb/ptb.valid.txt": (PTB, 0),
}

TOKENS = (
  "the boys No. No U.S. Mr. co. N 1 000 5 <unk> <unk>. a-b 1,000 1.5 @-@ @,@ @.@ - -- , . .. ... "
  "; : ! ? ' '' \" "
  "( ) [ ] $ us$ % & AT T / \\/ * \\* – — ° C ’ “ ” 's 't n't 'awiil 'em "
  "can not cannot don't gon na `` = _ < > @ # é ١ \t \r \u00a0 "
).split(" ") + [VERBATIM, f"{VERBATIM}x", f"x{VERBATIM}"]

lines = st.one_of(
  st.lists(st.sampled_from(TOKENS), max_size=12).map(" ".join),
  st.lists(st.sampled_from(TOKENS), min_size=1, max_size=12).map(
    lambda tokens: f" {' '.join(tokens)} "
  ),
  st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
  st.text(" '\".,-@<>n\u2060", max_size=12),
)


@functools.cache
def published(name: str) -> tuple[str, str]:
  """The file, and its natural text."""
  text = (pathlib.Path(os.environ["GPT2_JAX_TEST_DATA"]) / name).read_bytes().decode()
  return text, PUBLISHED[name][0].detokenize(text)


@needs_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_line_comes_back(name):
  detokenizer, most = PUBLISHED[name]
  text, natural = published(name)
  assert detokenizer.retokenize(natural).split("\n") == text.split("\n")
  marked = sum(VERBATIM in line for line in natural.split("\n"))
  share = edit_share(text, natural)
  n_lines = text.count("\n")
  print(f"\n{name}: {share:.2%} of the bytes changed, {marked} of {n_lines:,} lines have a mark")
  assert marked <= most and 0.02 < share < 0.05


@needs_data
def test_natural_text_has_no_tokenized_punctuation():
  natural = published("wikitext2/wiki.test.tokens")[1]
  assert not any(
    token in natural
    for token in (" @-@ ", " @,@ ", " @.@ ", " , ", " 's ", " 't ", " ( ", " ) ", " ; ")
  )
  assert natural.count(" . ") == 0 and natural.count(' " ') < 10
  natural = published("ptb/ptb.test.txt")[1]
  assert not any(token in natural for token in (" n't", " 's", "$ N", "\\/"))


@pytest.mark.parametrize(
  "detokenizer", [WIKITEXT, PTB, ONE_BILLION], ids=["wikitext", "ptb", "1bw"]
)
@settings(max_examples=400, deadline=None)
@given(parts=st.lists(lines, max_size=3))
def test_any_text_comes_back(detokenizer, parts):
  text = "\n".join(parts)
  assert detokenizer.retokenize(detokenizer.detokenize(text)) == text


WIKITEXT_LINES = {
  " \n": "\n",
  " = = Early life = = \n": "= = Early life = =\n",
  ' He said , " I don \'t . " \n': 'He said, "I don\'t."\n',
  " a well @-@ known 1 @,@ 000 @.@ 5 km ( 3 mi ) \n": "a well-known 1,000.5 km (3 mi)\n",
  " Teddy 's and the players ' ' Jinx ' \n": "Teddy's and the players' 'Jinx'\n",
  " <unk> 's <unk> , <unk> @-@ <unk> . \n": "<unk>'s <unk>, <unk>-<unk>.\n",
  " 1990 – 95 , a – b , at 10 : 30 : x \n": "1990–95, a – b, at 10:30: x\n",
  " U.S. No. 5 , Mr. Fox 's $ 5 of 5 % at 6 ° C , 9 ° N \n": (
    "U.S. No. 5, Mr. Fox's $5 of 5% at 6 °C, 9° N\n"
  ),
  " A & M and Q & A , Simon & Schuster \n": "A&M and Q&A, Simon & Schuster\n",
  " it doesn ’ t — or ... does it ? \n": "it doesn’t—or ... does it?\n",
  " as ' new ' as it was in the ' 90s \n": "as 'new' as it was in the '90s\n",
  ' one " two " three " four \n': 'one "two" three " four\n',
}
PTB_LINES = {
  " it was n't the dow 's $ N a share \n": "it wasn't the dow's $N a share\n",
  " we ca n't and can not say us$ N or # N \n": "we can't and cannot say us$N or #N\n",
  " cities\\/abc and the banks ' <unk> 's N N \n": "cities/abc and the banks' <unk>'s N N\n",
}
ONE_BILLION_LINES = {
  '" We don \'t , " he said .\n': '"We don\'t," he said.\n',
  "Shares of Acme Corp. rose 2.5 % to $ 1,000 .\n": "Shares of Acme Corp. rose 2.5% to $1,000.\n",
  "A long-term deal -- in the U.S. -- for AT & T ( it ) .\n": (
    "A long-term deal -- in the U.S. -- for AT&T (it).\n"
  ),
}
CASES = [
  (d, *pair)
  for d, pairs in ((WIKITEXT, WIKITEXT_LINES), (PTB, PTB_LINES), (ONE_BILLION, ONE_BILLION_LINES))
  for pair in pairs.items()
]


@pytest.mark.parametrize(("detokenizer", "line", "natural"), CASES)
def test_a_line_as_natural_text(detokenizer, line, natural):
  assert detokenizer.detokenize(line) == natural and detokenizer.retokenize(natural) == line


@pytest.mark.parametrize(
  ("line", "natural"),
  [
    (" the 1,000th \n", f"the {VERBATIM}1,000th\n"),  # else 1 @,@ 000th
    ("no spaces around\n", f"{VERBATIM} no spaces around\n"),
    (" Plan A . \n", "Plan A .\n"),  # A. is an initial
    (f" {VERBATIM} \n", f"{VERBATIM}{VERBATIM}\n"),
  ],
)
def test_what_would_not_be_invertible_is_kept_verbatim(line, natural):
  assert WIKITEXT.detokenize(line) == natural and WIKITEXT.retokenize(natural) == line


def test_a_dot_before_a_lower_case_word_belongs_to_its_word():
  assert (
    ONE_BILLION.retokenize("Acme Inc. said so to Acme Inc. Then")
    == "Acme Inc. said so to Acme Inc . Then"
  )


@needs_data
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="could not import lm_eval")
@pytest.mark.parametrize("name", ["wikitext2/wiki.test.tokens", "ptb/ptb.test.txt"])
def test_the_lossy_rules_are_lm_evaluation_harness_s(name):
  folder = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
  spec = importlib.util.spec_from_file_location(
    "theirs", f"{folder}/tasks/wikitext/preprocess_wikitext.py"
  )
  theirs = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(theirs)
  text, _ = published(name)
  assert lossy_wikitext(text) == theirs.wikitext_detokenizer({"page": text})
  for line in (*text.split("\n"), " x ; : y @,@ @-@ z [ { ' 1 ' } ] /' 5/ = = = = 5 ° C N "):
    assert lossy_wikitext(line) == theirs.wikitext_detokenizer({"page": line})
  print(
    f"\n{name}: the lossy rules change {edit_share(text, lossy_wikitext(text)):.2%} of the bytes"
  )


def test_the_lossy_rules_for_ptb():
  assert (
    lossy_ptb(" the dow 's N points was n't $ N or # 1 N \n a")
    == " the dow's1 points wasn't $1 or #1 N\na"
  )


def test_the_share_of_bytes_changed():
  assert edit_share(" a , b \n", "a, b\n") == 3 / 8
  assert edit_share("é", "e") == 3 / 2  # two bytes dropped, one put in
