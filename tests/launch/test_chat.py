# SPDX-License-Identifier: Apache-2.0
"""Chats with fine-tuned models, text for text as transformers holds them.

The model is random and small; its tokenizer has the special tokens of chats.
"""

import io
import json

import pytest

from gpt2_jax import complete, load_pretrained, stream
from gpt2_jax.cli.console import Console
from gpt2_jax.cli.settings import Settings
from gpt2_jax.cli.terminal import Terminal
from gpt2_jax.cli.turns import prompt_ids
from gpt2_jax.data.templates import CHATML, DIALOGPT, Message, load_template, write_prompt
from gpt2_jax.tokenizer import EOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

N_NEW = 24
SAID = ("hello world", "the cat sat", f"a {EOT} that is text", "and <|user|> too")
GREEDY = Settings(n_new=N_NEW, greedy=True)
CHAT_TEMPLATE = (
  "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """A model and its tokenizer as transformers writes them, with the folder."""
  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=290,
    special_tokens=[EOT],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  library.train_from_iterator(["hello world the cat sat"] * 20, trainer)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=library, eos_token=EOT, bos_token=EOT
  )
  names = ["<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>"]
  tokenizer.add_special_tokens({"additional_special_tokens": names})

  torch.manual_seed(3)
  config = transformers.GPT2Config(
    vocab_size=300,
    n_positions=256,
    n_embd=32,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
  )
  model = transformers.GPT2LMHeadModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
    # What ends an answer is likely, so that some answers end before they are full.
    model.transformer.wte.weight[0] *= 2.5

  folder = tmp_path_factory.mktemp("chat")
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return model, tokenizer, folder


@pytest.fixture(scope="module")
def ours(theirs):
  return load_pretrained(str(theirs[2]))


def their_answer(theirs, prompt: str) -> str:
  """What transformers adds to a prompt in which special tokens are parsed, up to the first EOT."""
  model, tokenizer, _ = theirs
  ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
  with torch.no_grad():
    rows = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=N_NEW,
      do_sample=False,
      pad_token_id=0,
    )
  return tokenizer.decode(rows[0, ids.shape[1] :]).removesuffix(EOT)


def test_a_conversation_of_turns_that_end_in_endoftext(theirs, ours):
  """As DialoGPT's own code holds it: all turns so far, each with <|endoftext|> behind it."""
  history, answers = "", []
  for said in SAID[:2]:
    history += said + EOT
    answer = complete(*ours, history, N_NEW, greedy=True, special=(EOT,))
    assert answer == their_answer(theirs, history)
    assert answer == "".join(stream(*ours, history, N_NEW, greedy=True, special=True))
    answers.append(answer)
    history += answer + EOT
  assert len(set(answers)) == 2
  assert answers[0] != complete(*ours, SAID[0] + EOT, N_NEW, greedy=True), "letters, by default"


def test_a_chat_of_roles_in_special_tokens(theirs, ours):
  prompt = "<|user|>hello<|assistant|>the cat<|endoftext|><|user|>sat<|assistant|>"
  named = ("<|user|>", "<|assistant|>", EOT)
  answer = complete(*ours, prompt, N_NEW, greedy=True, special=named)
  assert answer == their_answer(theirs, prompt)
  assert answer == complete(*ours, [prompt], N_NEW, greedy=True, special=True)[0]
  ids = ours[1].encode(prompt, special=True)
  assert answer == complete(*ours, ids, N_NEW, greedy=True), "token ids are a prompt too"


def test_a_template_writes_what_transformers_chat_template_does(theirs, ours, tmp_path):
  pytest.importorskip("jinja2")
  _, tokenizer, _ = theirs
  markers = {role: [f"<|{role}|>\n", f"{EOT}\n"] for role in ("user", "assistant")}
  path = tmp_path / "roles.json"
  path.write_text(
    json.dumps({"turns": markers, "special_tokens": ["<|user|>", "<|assistant|>", EOT]})
  )

  said = ["hello", "the cat", "sat"]
  roles = ["user", "assistant", "user"]
  messages = [Message(role, text) for role, text in zip(roles, said, strict=True)]
  expected = tokenizer.apply_chat_template(
    [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)],
    chat_template=CHAT_TEMPLATE,
    add_generation_prompt=True,
    return_dict=False,
  )
  assert write_prompt(load_template(str(path)), ours[1], messages) == expected


class Typed(Terminal):
  """Lines that a person types."""

  def __init__(self, lines):
    super().__init__(io.StringIO())
    self.lines = iter(lines)

  def read(self, prompt, status=""):
    line = next(self.lines, None)
    if line is None:
      raise EOFError
    return line


def chat(ours, *lines, template=DIALOGPT, settings=GREEDY) -> tuple[str, Console]:
  terminal = Typed(lines)
  console = Console(*ours, settings, terminal, template)
  console.run()
  return terminal.output.getvalue(), console


def test_a_session_remembers_the_turns(theirs, ours):
  """Special tokens of the template are ids, and those that a person types are text."""
  text, console = chat(ours, *SAID)
  assert [said for said, _ in console.turns] == list(SAID)

  answers = [answer for _, answer in console.turns]
  for n in range(2):
    history = "".join(said + EOT + answer + EOT for said, answer in console.turns[:n])
    assert answers[n] == their_answer(theirs, history + SAID[n] + EOT)
    assert f"{SAID[n]}\n{answers[n]}\n" in text
  ids = prompt_ids(ours[1], GREEDY, DIALOGPT, console.turns[:2], SAID[2])
  assert ids.count(0) == 5, "an id for each turn, and none for what was typed"


def test_a_new_chat_forgets_and_again_takes_the_answer_back(ours):
  text, console = chat(ours, SAID[0], SAID[1], "/again", "/more", "/new", SAID[0])
  assert console.turns == [console.turns[0]], "the turns since /new"
  assert console.turns[0][0] == SAID[0]
  assert len(console.texts) == 4 and "error: an answer ends its turn" in text

  _, console = chat(ours, SAID[0], SAID[1], "/again")
  assert [said for said, _ in console.turns] == list(SAID[:2])
  assert console.turns[1][1] == console.texts[1][1], "greedy: the same answer to the same turns"
  assert "error: there is no message yet" in chat(ours, "/again")[0]


def test_an_answer_ends_where_the_template_says(ours):
  """At a stop string that is a special token, which is no end of text to the tokenizer."""
  model, tokenizer = ours
  ids = write_prompt(CHATML, tokenizer, [Message("user", "hello")])
  whole = complete(model, tokenizer, ids, N_NEW, greedy=True)
  assert len(whole) > 8
  # The first characters of an answer stand for the marker that a trained model would write.
  stops = load_template("chatml").stop
  assert stops == ("<|im_end|>",)
  settings = Settings(n_new=N_NEW, greedy=True, stop=(whole[4:6],))
  _, console = chat(ours, "hello", template=CHATML, settings=settings)
  assert console.turns == [("hello", whole[: whole.find(whole[4:6])])]


def test_special_tokens_are_a_setting(theirs, ours):
  prompt = "<|user|>hello<|assistant|>"
  text, console = chat(
    ours, "/special <user>", "/special all", prompt, "/special <|user|>", prompt, template=None
  )
  assert "error: '<user>' is none of the tokenizer's 5 special tokens; the nearest are" in text
  assert console.texts[0] == (prompt, their_answer(theirs, prompt))
  assert console.settings.special == ("<|user|>",)

  tokenizer = ours[1]
  both = Settings(special=("<|user|>,<|assistant|>",)).special_tokens(tokenizer)
  assert both == ("<|user|>", "<|assistant|>")
  assert Settings(special=("all",)).special_tokens(tokenizer) == tokenizer.special_tokens
  assert Settings().special_tokens(tokenizer) == ()


def test_a_template_and_special_tokens_do_not_go_together(ours):
  text, console = chat(ours, "/special all")
  assert "error: the template dialogpt writes special tokens" in text
  assert console.settings.special == ()
