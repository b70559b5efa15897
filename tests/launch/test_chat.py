# SPDX-License-Identifier: Apache-2.0
"""Chats with fine-tuned models, text for text as transformers holds them.

The model is small and knows three conversations by heart, so that its answers end as they should.
"""

import io
import json

import pytest

from gpt2_jax import complete, load_pretrained, stream
from gpt2_jax.cli.console import Console
from gpt2_jax.cli.settings import Settings
from gpt2_jax.cli.terminal import Terminal
from gpt2_jax.cli.turns import Answering, prompt_ids
from gpt2_jax.data.templates import CHATML, DIALOGPT, Message, load_template, write_prompt
from gpt2_jax.tokenizer import EOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

N_NEW = 15
SAID = ("hello world", "the cat")
ANSWERS = ("hello cat", "sat")
CONVERSATIONS = (
  "hello world{0}hello cat{0}the cat{0}sat{0}",
  "<|user|>hello<|assistant|>the cat{0}<|user|>sat<|assistant|>world{0}",
  "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld sat<|im_end|>\n",
)
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
  torch.set_num_threads(1)  # one is fastest for a model as small as this
  config = transformers.GPT2Config(
    vocab_size=300,
    n_positions=128,
    n_embd=32,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
  )
  model = transformers.GPT2LMHeadModel(config).eval()
  rows = [tokenizer(text.format(EOT), return_tensors="pt").input_ids for text in CONVERSATIONS]
  optimizer = torch.optim.Adam(model.parameters(), 1e-2)
  for _ in range(60):
    optimizer.zero_grad()
    sum(model(row, labels=row).loss for row in rows).backward()
    optimizer.step()

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
  history = ""
  for said, expected in zip(SAID, ANSWERS, strict=True):
    history += said + EOT
    answer = complete(*ours, history, N_NEW, greedy=True, special=(EOT,))
    assert answer == their_answer(theirs, history) == expected
    assert answer == "".join(stream(*ours, history, N_NEW, greedy=True, special=True))
    history += answer + EOT
  assert complete(*ours, SAID[0] + EOT, N_NEW, greedy=True) != ANSWERS[0], "letters, by default"


def test_a_chat_of_roles_in_special_tokens(theirs, ours):
  prompt = "<|user|>hello<|assistant|>the cat<|endoftext|><|user|>sat<|assistant|>"
  named = ("<|user|>", "<|assistant|>", EOT)
  answer = complete(*ours, prompt, N_NEW, greedy=True, special=named)
  assert answer == their_answer(theirs, prompt) == "world"
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
  console = Console(*ours, settings, terminal, Answering(template))
  console.run()
  return terminal.output.getvalue(), console


def test_a_session_remembers_the_turns(theirs, ours):
  """Special tokens of the template are ids, and those that a person types are text."""
  text, console = chat(ours, *SAID)
  assert console.turns == list(zip(SAID, ANSWERS, strict=True))
  for said, answer in console.turns:
    assert f"{said}\n{answer}\n" in text

  ids = prompt_ids(ours[1], GREEDY, DIALOGPT, console.turns, f"a {EOT} that is text")
  assert ids.count(0) == 5, "an id for each turn, and none for what was typed"


def test_a_new_chat_forgets_and_again_takes_the_answer_back(ours):
  _, console = chat(ours, *SAID, "/again")
  assert console.turns == list(zip(SAID, ANSWERS, strict=True)), "the same answer in its place"
  assert len(console.texts) == 3, "no text is lost"

  text, console = chat(ours, "/again", *SAID, "/more", "/new", SAID[0])
  assert console.turns == [(SAID[0], ANSWERS[0])]
  assert "error: there is no message yet" in text and "error: an answer ends its turn" in text


def test_an_answer_ends_where_the_template_says(ours):
  """At a special token that is no end of text to the tokenizer."""
  ids = write_prompt(CHATML, ours[1], [Message("user", "hello")])
  assert complete(*ours, ids, N_NEW, greedy=True).startswith("world sat<|im_end|>")
  _, console = chat(ours, "hello", template=CHATML)
  assert console.turns == [("hello", "world sat")]


def test_special_tokens_are_a_setting(theirs, ours):
  prompt = "<|user|>hello<|assistant|>"
  answer = their_answer(theirs, prompt)
  text, console = chat(
    ours, "/special <user>", "/special all", prompt, "/special <|user|>", prompt, template=None
  )
  assert "error: '<user>' is none of the tokenizer's 5 special tokens; the nearest are" in text
  assert console.texts[0] == (prompt, answer) and answer == "the cat"
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
