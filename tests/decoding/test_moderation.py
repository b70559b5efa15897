# SPDX-License-Identifier: Apache-2.0
"""The moderation filter: no banned word leaves, whatever the chunks are, and no half of one."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_jax.decoding import complete, stream, stream_rows
from gpt2_jax.decoding.moderation import REDACTED, Moderator, Policy, Rule, load_policy
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

WORDS = ("darn", "heck", "bad dog", "f**k", "é", "off")
ORACLE = re.compile(
  r"(?<![^\W_])(?:darn|heck|bad\s+dog|f\*\*k|off)(?![^\W_])", re.IGNORECASE | re.ASCII
)


def policy(action: str, words=WORDS, **options) -> Policy:
  return Policy((Rule("words", action, tuple(words)),), **options)


def pushed(moderator: Moderator, chunks: list[str]) -> list[str]:
  """The output after each chunk; the text ends with the last one, or with a refusal."""
  outputs, text = [], ""
  for index, chunk in enumerate(chunks):
    if moderator.stopped:
      break
    text += moderator.push(chunk, index == len(chunks) - 1)
    outputs.append(text)
  return outputs


def random_text(draw, length: int = 12) -> str:
  """Words, banned or nearly, with anything or nothing between them."""
  words = ["darn", "Heck", "BAD dog", "f**k", "off", "bad", "dog", "darned", "he", "ck", "x1", "_"]
  between = [" ", " ", "", "\n", ", ", "-", "  ", "."]
  return "".join(draw.choice(words) + draw.choice(between) for _ in range(length))


def cut(draw, text: str) -> list[str]:
  """The text in chunks of 0 to 4 characters."""
  ends = np.minimum(np.cumsum(draw.integers(0, 5, len(text) + 1)), len(text))
  return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=False)]


def test_streams_are_those_of_a_regular_expression():
  """Whatever the chunks are; and what is out at any time is a beginning of what is right."""
  draw = np.random.default_rng(0)
  n_matches = 0
  for _ in range(2_000):
    text = random_text(draw, 5)
    expected, n = ORACLE.subn(REDACTED, text)
    n_matches += n
    outputs = pushed(Moderator(policy("redact")), cut(draw, text))
    assert outputs[-1] == expected
    assert all(expected.startswith(output) for output in outputs)
  assert n_matches > 1_000


def test_a_refusal_ends_the_text_before_the_word():
  draw = np.random.default_rng(1)
  for _ in range(200):
    text = random_text(draw)
    match = ORACLE.search(text)
    outputs = pushed(Moderator(policy("refuse", refusal="No.")), cut(draw, text))
    assert outputs[-1] == (text[: match.start()] + "No." if match else text)


def test_a_flag_changes_nothing_and_counts():
  draw = np.random.default_rng(2)
  for _ in range(200):
    text, moderator = random_text(draw), Moderator(policy("flag"))
    assert pushed(moderator, cut(draw, text))[-1] == text
    assert moderator.counts["words"] == len(ORACLE.findall(text))


@pytest.mark.parametrize(
  "text",
  [
    "ＤＡＲＮ",
    "da\u200brn",
    "d\xadarn",
    "DaRN",
    "bad\u00a0\n dog",
    "\u200bheck",
    "e\u0301",
    "oﬀ",
    "É",
  ],
)
def test_other_ways_to_write_a_word_are_that_word(text):
  """Full width, invisible characters, case, other spaces, composed accents, ligatures."""
  for size in (1, 2, 100):
    whole = f"so {text}, yes"
    chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
    assert re.fullmatch(
      r"so \u200b?\[redacted\], yes", pushed(Moderator(policy("redact")), chunks)[-1]
    )


@given(
  st.text(alphabet="darnDＡ é\u0301\u200bﬀo ​\xad.-\u1100\u1161", max_size=30), st.integers(1, 4)
)
@example("o\u200bﬀ.", 1)
@settings(max_examples=200)
def test_chunks_do_not_matter(text, size):
  chunks = [text[i : i + size] for i in range(0, len(text), size)] or [""]
  outputs = pushed(Moderator(policy("redact")), chunks)
  whole = pushed(Moderator(policy("redact")), [text])[-1]
  assert outputs[-1] == whole
  assert all(whole.startswith(output) for output in outputs)


def test_a_word_that_begins_in_the_prompt_is_banned_and_what_is_out_stays():
  assert pushed(Moderator(policy("redact"), "oh da"), ["r", "n it"])[-1] == f"{REDACTED} it"
  assert pushed(Moderator(policy("redact"), "a bad "), [" dog", "s"])[-1] == " dogs"
  assert pushed(Moderator(policy("redact"), "oh darn"), ["ed it"])[-1] == "ed it"
  assert pushed(Moderator(policy("redact"), "x"), ["darn it"])[-1] == "darn it", "no border"


def test_text_that_can_begin_no_word_is_not_held_back():
  moderator = Moderator(policy("redact"))
  assert moderator.push("hello world, d") == "hello world, "
  assert moderator.push("og") == "do", "the last character may take an accent yet"
  assert moderator.push("", last=True) == "g"


def test_a_function_judges_sentences_and_none_is_out_before():
  seen = []

  def judge(sentence: str) -> bool:
    seen.append(sentence)
    return "secret" in sentence

  rules = (Rule("judge", "refuse", judge=judge), Rule("words", "redact", ("darn",)))
  moderator = Moderator(Policy(rules, refusal="No."))
  outputs = pushed(moderator, list("Hi there. Oh darn! A secret thing. More"))
  assert outputs[-1] == f"Hi there. Oh {REDACTED}! No."
  assert seen == ["Hi there. ", f"Oh {REDACTED}! ", "A secret thing. "]
  assert set(outputs) == {"", "Hi there. ", f"Hi there. Oh {REDACTED}! ", outputs[-1]}
  assert moderator.counts == {"judge": 1, "words": 1}


def test_the_log_holds_no_text(tmp_path):
  log = tmp_path / "log.jsonl"
  for text in ("darn this quiet place", "nothing here", "darn this quiet place"):
    Moderator(policy("redact", log=str(log))).push(text, last=True)
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  assert [line["rules"] for line in lines] == [{"words": 1}] * 2
  assert lines[0]["sha256"] == lines[1]["sha256"], "equal texts are told"
  assert not re.search("darn|quiet|place", log.read_text())

  Moderator(policy("flag", log=str(log), logs_text=True)).push("darn", last=True)
  assert json.loads(log.read_text().splitlines()[-1])["text"] == "darn"


TOML = """refusal = "No."
[[rules]]
name = "mild"
action = "redact"
words = ["darn", "heck"]
"""


def test_a_policy_is_read_from_toml_and_json(tmp_path):
  (tmp_path / "a.toml").write_text(TOML)
  rules = [{"name": "mild", "action": "redact", "words": ["darn", "heck"]}]
  (tmp_path / "a.json").write_text(json.dumps({"refusal": "No.", "rules": rules}))
  expected = Policy((Rule("mild", "redact", ("darn", "heck")),), "No.")
  assert load_policy(str(tmp_path / "a.toml")) == expected
  assert load_policy(str(tmp_path / "a.json")) == expected


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "the policy has no rule, and bans nothing"),
    (TOML.replace('["darn", "heck"]', "[]"), "'mild' has no words, and bans nothing"),
    (TOML.replace('"heck"', '" "'), "'mild' has ' ', which has no letter or digit and would ban"),
    (TOML.replace('"heck"', '"*"'), r"'mild' has '\*', which has no letter or digit"),
    (TOML.replace("redact", "delete"), "'delete'; it is one of refuse, redact, flag"),
    (TOML.replace("words", "word"), "a rule has word; its keys are name, action, words"),
    (TOML.replace('["darn", "heck"]', '"darn"'), "a rule has words that is no list"),
    (TOML.replace('name = "mild"\n', ""), "a rule has a name, an action, and words"),
    ("[[rules", "a.toml: "),
    ("rules = 3", "the policy has rules that is no list"),
  ],
)
def test_a_policy_that_is_none_is_one_line(tmp_path, text, message):
  (tmp_path / "a.toml").write_text(text)
  with pytest.raises(ValueError, match=message) as raised:
    load_policy(str(tmp_path / "a.toml"))
  assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


LETTERS = Characters("".join(sorted("abcdefghijklmnopqrstuvwxyz ,.\n")))
TINY = ModelConfig(n_vocab=30, n_ctx=64, n_embd=16, n_head=2, n_layer=1, dtype="float32")


def test_texts_of_a_model_follow_the_policy(mesh, parameters, place):
  """Each token is a character, so every word lies over the borders of tokens."""
  with mesh(1, 1, 1):
    model = place(TINY, parameters(TINY, scale=0.3))
  prompts, options = ["ab c", "x"], {"temperature": 3.0, "seed": 4}
  plain = complete(model, LETTERS, prompts, 40, **options)
  words = [re.findall(r"(?<=\W)\w+(?=\W)", text)[1] for text in plain]
  banned = re.compile(rf"\b(?:{'|'.join(words)})\b")
  expected = [banned.sub(REDACTED, text) for text in plain]
  assert all(x != y for x, y in zip(expected, plain, strict=True))

  options["moderation"] = policy("redact", words)
  assert complete(model, LETTERS, prompts, 40, **options) == expected
  assert "".join(stream(model, LETTERS, prompts[0], 40, **options)) == expected[0]
  rows = ["", ""]
  for row, chunk in stream_rows(model, LETTERS, prompts, 40, **options):
    rows[row] += chunk
    assert expected[row].startswith(rows[row])
  assert rows == expected

  options["moderation"] = policy("refuse", words[:1])
  refused = complete(model, LETTERS, prompts, 40, **options)
  assert refused[0] == plain[0][: banned.search(plain[0]).start()] + "[refused]"
