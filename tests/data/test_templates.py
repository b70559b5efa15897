# SPDX-License-Identifier: Apache-2.0
import json
import os

import numpy as np
import pytest

from gpt2_jax.data import templates
from gpt2_jax.data.example_records import parse_record, plain_record, write_record
from gpt2_jax.data.import_tfds import import_tfds
from gpt2_jax.data.templates import (
  CHAT,
  CHATML,
  DIALOGPT,
  DIALOGPT_REVERSE,
  GPT1_TASKS,
  PLAIN,
  TEMPLATES,
  TLDR,
  ExampleEncoder,
  Message,
  Template,
  Turn,
  load_template,
  stop_strings,
  write_prompt,
)
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace

# The tokens of a byte-level vocabulary without merges, and two special ones.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = [*map(chr, range(33, 127)), "\u0120", "\u010a"]
VOCAB = {token: i for i, token in enumerate([*LETTERS, *SPECIALS])}
# Those of a user and an assistant: GPT-1's tasks have other turns.
CHATS = [template for template in TEMPLATES if template is not GPT1_TASKS]


def tokenizer(specials=SPECIALS) -> HuggingFace:
  """Bytes, and special tokens as a chat model's tokenizer.json declares them."""
  vocab = {token: i for i, token in enumerate([*LETTERS, *specials])}
  payload = json.loads(HuggingFace.from_merges(vocab, []).payload)
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  payload["added_tokens"] = [
    {"id": vocab[token], "content": token, "special": True} | flags for token in specials
  ]
  return HuggingFace(json.dumps(payload))


def spell(encoded, vocab=VOCAB) -> str:
  """Tokens as they are written; what is scored in capitals, special tokens as |, [ and ]."""
  written = {i: token for token, i in vocab.items()}
  signs = {"\u0120": " ", "\u010a": "\n"} | dict(zip(SPECIALS, "|[]", strict=True))
  signs_scored = {"|": "!", "]": ")", " ": "_", ":": "="}
  text = ""
  for i, is_scored in zip(encoded.ids.tolist(), encoded.is_scored, strict=True):
    sign = signs.get(written[i], written[i])
    text += signs_scored.get(sign, sign.upper()) if is_scored else sign
  return text


HELLO = (
  Message("user", "hi"),
  Message("assistant", "yo"),
  Message("user", "ok?"),
  Message("assistant", "ja"),
)


@pytest.mark.parametrize(
  ("template", "expected"),
  [
    (PLAIN, "hiYO!ok?JA!"),
    (DIALOGPT, "hi|YO!ok?|JA!"),
    (TLDR, "hi\nTL;DR:_YO!ok?\nTL;DR:_JA!"),
    (CHAT, "User: hi\nAssistant:_YO!User: ok?\nAssistant:_JA!"),
    (CHATML, "[user\nhi]\n[assistant\nYO)\n[user\nok?]\n[assistant\nJA)\n"),
  ],
)
def test_markers_stand_around_turns_and_responses_are_scored(template, expected):
  encoded = ExampleEncoder(template, tokenizer()).encode(HELLO)
  # A scored line end is written as one that is not.
  assert spell(encoded) == expected
  scored_from = encoded.last_response
  assert encoded.is_scored[scored_from] and not encoded.is_scored[scored_from - 1]
  assert spell(encoded)[scored_from:].strip("\n_!)") == "JA"


# As model cards write them, with what a response generates between `generation` and its end.
JINJA = {
  "dialogpt": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
  "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
  "{% endfor %}",
  "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
  "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' + '\n' }}"
  "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("template", [DIALOGPT, CHATML], ids=lambda template: template.name)
def test_tokens_and_masks_are_those_of_transformers(template):
  transformers = pytest.importorskip("transformers")
  tokenizers = pytest.importorskip("tokenizers")
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer().payload), eos_token=SPECIALS[0]
  )
  messages = [{"role": message.role, "content": message.text} for message in HELLO]
  expected = theirs.apply_chat_template(
    messages,
    chat_template=JINJA[template.name],
    return_dict=True,
    return_assistant_tokens_mask=True,
  )
  encoded = ExampleEncoder(template, tokenizer()).encode(HELLO)
  assert encoded.ids.tolist() == expected["input_ids"]
  assert encoded.is_scored.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("template", CHATS, ids=lambda template: template.name)
def test_a_prompt_is_what_stands_before_a_response(template):
  """Of any turn: so a model continues what it was trained on."""
  encoder = ExampleEncoder(template, tokenizer())
  for n in (1, 3):
    turns = template.ordered(HELLO[: n + 1])
    encoded = encoder.encode(turns)
    prompt = write_prompt(template, tokenizer(), turns[:-1])
    assert prompt == encoded.ids[: encoded.last_response].tolist()

  # Where <|endoftext|> is a token, it ends a text by its id.
  assert stop_strings(template, tokenizer()) == tuple(t for t in template.stop if t != SPECIALS[0])
  assert stop_strings(template, Characters("a")) == template.stop


def test_all_tokens_but_the_first_can_be_scored():
  encoded = ExampleEncoder(DIALOGPT, tokenizer(), "all").encode(HELLO)
  assert spell(encoded) == "hI!YO!OK?!JA!"


def test_a_response_of_no_weight_is_context():
  turns = (HELLO[0], Message("assistant", "yo", is_scored=False), *HELLO[2:])
  assert spell(ExampleEncoder(DIALOGPT, tokenizer()).encode(turns)) == "hi|yo|ok?|JA!"


@pytest.mark.parametrize("template", CHATS, ids=lambda template: template.name)
def test_a_text_cannot_pretend_to_be_a_turn(template):
  """Special tokens are ids where a marker spells them, and characters where a text does."""
  special_ids = {VOCAB[token] for token in SPECIALS}
  encoder = ExampleEncoder(template, tokenizer())
  plain = encoder.encode((Message("user", "x"), Message("assistant", "y")))
  evil = encoder.encode((Message("user", "".join(SPECIALS)), Message("assistant", SPECIALS[2])))
  counts = [sum(i in special_ids for i in encoded.ids.tolist()) for encoded in (plain, evil)]
  assert counts[0] == counts[1] > 0
  assert len(evil.ids) - len(plain.ids) == sum(map(len, SPECIALS)) - 1 + len(SPECIALS[2]) - 1


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set")
def test_gpt2s_tokens_are_those_of_the_text_and_a_response_begins_with_its_space():
  """A marker's last space goes to the response's first token, unless that begins with its own."""
  bpe = Gpt2Bpe()
  encoder = ExampleEncoder(CHAT, bpe)
  for text in ("hello there", " hello there"):
    encoded = encoder.encode((Message("user", "Who is it?"), Message("assistant", text)))
    prompt = bpe.encode("User: Who is it?\nAssistant:")
    assert encoded.ids.tolist() == [*prompt, *bpe.encode(" hello there"), bpe.eot]
    assert encoded.is_scored.tolist() == [False] * len(prompt) + [True] * 3
    assert encoded.last_response == len(prompt)


def test_a_vocabulary_without_an_end_leaves_it_out_and_without_another_token_is_refused():
  encoder = ExampleEncoder(DIALOGPT, Characters("aby"))
  assert encoder.encode((Message("user", "ab"), Message("assistant", "y"))).ids.tolist() == [
    0,
    1,
    2,
  ]
  for vocabulary in (Characters("aby"), tokenizer(SPECIALS[:1]), tokenizer(SPECIALS[:2])):
    with pytest.raises(ValueError, match=r"inserts '<\|im_.*\|>', and the tokenizer has no such"):
      _ = ExampleEncoder(CHATML, vocabulary).special_ids


def test_a_template_without_a_response_is_refused():
  with pytest.raises(ValueError, match="template q has no turn of 'assistant', only of user"):
    Template("q", (Turn("user"),))
  with pytest.raises(ValueError, match="has no turn of 'user', only of assistant"):
    Template("q", (Turn("assistant"),))
  Template("q", (Turn("Q"), Turn("A")), prompt="Q", response="A")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_a_template_comes_back_from_its_json(template, tmp_path):
  (tmp_path / "t.json").write_text(json.dumps(template.to_json()))
  assert load_template(str(tmp_path / "t.json")) == template == load_template(template.name)


def test_ones_own_roles_are_a_file_of_turns(tmp_path):
  turns = {"user": ["Q: ", "\n"], "assistant": ["A: ", "<|endoftext|>"]}
  (tmp_path / "own.json").write_text(json.dumps({"turns": turns}))
  template = load_template(str(tmp_path / "own.json"))
  encoded = ExampleEncoder(template, tokenizer()).encode(HELLO[:2])
  assert template.name == "own" and spell(encoded) == "Q: hi\nA:_YO!"


@pytest.mark.parametrize(
  ("payload", "message"),
  [
    ([], "no turns of a template"),
    ({}, "no turns of a template"),
    ({"turns": {}}, "no turns of a template"),
    ({"turns": {"user": ["a"]}}, "no turns of a template"),
    ({"turns": {"user": ["a", 5]}}, "no turns of a template"),
    ({"turns": {"user": ["", ""]}}, "has no turn of 'assistant'"),
    ({"turns": {"user": ["", ""], "assistant": ["", ""]}, "stop": "x"}, "has 'stop' as 'x'"),
    ({"turns": {"user": ["", ""], "assistant": ["", ""]}, "sotp": ["x"]}, "has 'sotp' as"),
  ],
)
def test_a_file_of_another_shape_is_one_line(tmp_path, payload, message):
  path = tmp_path / "own.json"
  path.write_text(json.dumps(payload))
  with pytest.raises(ValueError, match="own") as error:
    templates.template_from_json(payload, str(path))
  assert (
    message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600
  )


def test_a_name_that_is_none_lists_the_names():
  with pytest.raises(ValueError, match="'x' is none of plain, tldr, dialogpt, chat, chatml"):
    load_template("x")
  with pytest.raises(FileNotFoundError, match="no such file"):
    load_template("none.json")


@pytest.mark.parametrize(
  ("record", "expected"),
  [
    ({"text": "x"}, [(None, "x", True)]),
    ({"prompt": "p", "completion": "c"}, [("user", "p", True), ("assistant", "c", True)]),
    ({"prompt": "", "completion": "c"}, [("assistant", "c", True)]),
    # Fields by the template's roles, in its order.
    (
      {"assistant": "a", "user": "u", "mood": "x", "text": "t"},
      [("user", "u", True), ("assistant", "a", True)],
    ),
    # What is in a prompt is context, an assistant's turn, too.
    (
      {
        "prompt": [{"role": "assistant", "content": "p"}],
        "completion": [{"role": "assistant", "content": "c"}],
      },
      [("assistant", "p", False), ("assistant", "c", True)],
    ),
    # A record that has several is read as messages first.
    (
      {"text": "x", "prompt": "p", "messages": [{"role": "assistant", "content": "m"}]},
      [("assistant", "m", True)],
    ),
    # OpenAI's weights; a sequence of records as TFDS has it.
    (
      {
        "messages": [
          {"role": "assistant", "content": "m", "weight": 0},
          {"role": "assistant", "content": "n", "weight": 1},
        ]
      },
      [("assistant", "m", False), ("assistant", "n", True)],
    ),
    (
      {"messages": {"role": ["user", "assistant"], "content": ["m", "n"]}},
      [("user", "m", True), ("assistant", "n", True)],
    ),
  ],
)
def test_the_conventions_of_records(record, expected):
  example = parse_record(write_record(record, "a:1"), PLAIN, "responses")
  assert [(m.role, m.text, m.is_scored) for m in example.messages] == expected
  assert (example.place, example.label) == ("a:1", None)


def test_a_reversed_template_predicts_what_was_said():
  """The last turn comes first, and a prompt is what is learned from its completion."""
  encoder = ExampleEncoder(DIALOGPT_REVERSE, tokenizer())
  pair = {"prompt": "p", "completion": "c"}
  turns = [{"role": m.role, "content": m.text} for m in HELLO]
  for record, expected in ((pair, "c|P!"), ({"messages": turns}, "ja|OK?!yo|HI!")):
    example = parse_record(write_record(record, "a:1"), DIALOGPT_REVERSE, "responses")
    assert spell(encoder.encode(example.messages)) == expected


def test_records_of_tfds_are_examples(tmp_path):
  """As TFDS reads them: bytes, NumPy numbers, and a sequence of records."""
  from gpt2_jax.data import corpus

  tfds = import_tfds()

  class Chats(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two chats with a label each."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
      turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
      features = {
        "messages": tfds.features.Sequence(turn),
        "label": tfds.features.ClassLabel(num_classes=2),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(2):
        turns = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
        yield i, {"messages": turns, "label": i}

  Chats(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
  documents = corpus.tfds_documents("chats", "train", None, str(tmp_path))
  examples = [parse_record(document, PLAIN, "responses") for document in documents]
  assert sorted((e.label, *(m.text for m in e.messages)) for e in examples) == [
    (0, "q0", "a0"),
    (1, "q1", "a1"),
  ]
  assert "record 0 of chats" in examples[0].place
  assert plain_record({"a": np.float32(0.5), "b": b"x"}) == {"a": 0.5, "b": "x"}
