# SPDX-License-Identifier: Apache-2.0
"""GPT-1's BPE against what OpenAI's text_utils.py gave, and against Hugging Face's library."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax.convert.vocabulary import write_vocabulary
from gpt2_jax.data.templates import ExampleEncoder, Message, load_template
from gpt2_jax.decoding.stream import StreamDecoder
from gpt2_jax.tokenizer import Gpt1Bpe, from_json, load_tokenizer, read_tokenizer_folder
from gpt2_jax.tokenizer.gpt1_bpe import OPENAI_FILES, TASK_TOKENS, standardize

DATA = pathlib.Path(os.environ.get("GPT2_JAX_TEST_DATA", "."))
pytestmark = pytest.mark.skipif(
  "GPT2_JAX_TEST_DATA" not in os.environ, reason="GPT2_JAX_TEST_DATA is not set: no vocabulary"
)

# What OpenAI's own code gave, with ftfy 6.3.1 and the English rules of spaCy 3.8.18.
ORIGINAL = {
  "Hello World, it's me.\n\n\"Don't\" --- she said\u2026 \u201cU.S.A.\u201d costs $5.50!": [
    *(3570, 1276, 240, 507, 535, 510, 239, 40477, 244, 587, 538, 244, 11395, 520, 603, 749),
    *(244, 25896, 14, 10311, 244, 12243, 289, 33468, 8393, 267),
  ],
  "a b\\c+d": [246, 21, 127, 263, 306, 248],
  "\u65e5\u672c": [0, 0],
  "can't won't I'm": [993, 538, 1497, 538, 249, 719],
  "caf\xe9 \ufb01ne\u2014x": [13550, 1614, 260, 272],
  "\n": [],
  "": [],
}
SHA256_OF_10000_LINES = "abcd8db5d863dff8e2915397231310fcf17355f4f54aba20410851be2ace0768"


@pytest.fixture(scope="module")
def published() -> Gpt1Bpe:
  return read_tokenizer_folder(DATA / "gpt1")


@pytest.fixture
def with_libraries():
  pytest.importorskip("ftfy")
  pytest.importorskip("spacy")


def test_ten_thousand_lines_have_the_ids_of_openais_code(with_libraries, published):
  for text, ids in ORIGINAL.items():
    assert published.encode(text) == ids, text
  shakespeare = (DATA / "shakespeare/tinyshakespeare.txt").read_text().split("\n")
  wikitext = (DATA / "wikitext2/wiki.valid.tokens").read_text().split("\n")
  lines = [line for line in shakespeare if line][:9500]
  lines += [line for line in wikitext if line.strip()][:500]

  # A line's ids, and -1 behind them.
  content = b"".join(
    np.array([*ids, -1], np.int32).tobytes() for ids in published.encode_batch(lines)
  )
  assert len(lines) == 10_000
  assert hashlib.sha256(content).hexdigest() == SHA256_OF_10000_LINES


def test_words_are_merged_as_hugging_faces_library_merges_them(published):
  """Of single words in lower case the two cut nothing."""
  tokenizers = pytest.importorskip("tokenizers")
  merges = [tuple(line.split()) for line in published.merges.split("\n")[1:-1]]
  vocab = json.loads(published.vocabulary)
  theirs = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>")
  )
  words = set((DATA / "shakespeare/tinyshakespeare.txt").read_text().lower().split())
  assert len(words) > 10_000
  for word in [*sorted(words)[::5], "antidisestablishmentarianism", "aaaaaaaa", "x", "\u65e5"]:
    assert published._encode_word(word) == theirs.encode(word).ids, word


def test_text_is_standardized():
  assert standardize("a\u2014b  \t c \n\n d") == "a - b c \n d"
  assert standardize('"(x)"...__') == '" ( x ) " ... __'
  assert standardize("a\\b ++ c") == "a\\b ++ c"  # a backslash is not set apart


def test_offsets_are_where_tokens_begin(with_libraries, published):
  text = "Hello \u2014 World\u2026  it's \ufb01ne.\n\nYes"
  ids, starts = published.encode_with_offsets(text)
  assert ids == published.encode(text) and (np.diff(starts) >= 0).all()
  by_word = dict(zip([published.decode([i]) for i in ids], starts.tolist(), strict=True))
  for word in ("hello", "world", "it", "yes"):
    assert by_word[word] == text.lower().index(word)
  assert by_word["-"] == text.index("\u2014") and by_word["..."] == text.index("\u2026")
  ids, starts = published.encode_with_offsets("")
  assert ids == [] and starts.shape == (0,)


def test_a_stream_has_spaces_between_words(published):
  """Without spaCy: the ids of "hello world , it 's", in portions of one."""
  ids = [3570, 1276, 240, 507, 535]
  assert published.decode(ids) == "hello world , it 's"
  stream = StreamDecoder(published, ids[:2])
  assert "".join(stream.push([i]) for i in ids[2:]) == " , it 's"
  assert published.decode([40478, 99_999]) == "" == published.token_bytes(40478).decode()


def test_it_is_the_same_in_json_and_in_every_folder(published, tmp_path):
  assert published.vocab_size == 40478 and published.eot is None
  tasks = published.with_tokens(TASK_TOKENS)
  assert tasks.vocab_size == 40481 and tasks.special_tokens == TASK_TOKENS
  assert tasks.special_id("_start_") == 40478 and published.special_id("_start_") is None
  for tokenizer in (published, tasks):
    assert from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer
    path = tmp_path / str(tokenizer.vocab_size)
    path.mkdir()
    write_vocabulary(tokenizer, path, 512)
    again = read_tokenizer_folder(path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special_tokens == tokenizer.special_tokens
  assert tasks.fingerprint != published.fingerprint


def test_transformers_reads_what_is_written_and_its_own_file_is_read(published, tmp_path):
  transformers = pytest.importorskip("transformers")
  tasks = published.with_tokens(TASK_TOKENS)
  write_vocabulary(tasks, tmp_path, 512)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert len(theirs) == 40481
  assert theirs.encode("hello _start_ world") == [3570, 40478, 1276]
  theirs.save_pretrained(tmp_path / "theirs")
  assert not (tmp_path / "theirs/merges.txt").exists()
  again = read_tokenizer_folder(tmp_path / "theirs")
  assert again.fingerprint == tasks.fingerprint and again.special_tokens == TASK_TOKENS


def test_special_tokens_are_parsed_only_where_they_are_asked_for(with_libraries, published):
  tasks = published.with_tokens(TASK_TOKENS)
  assert 40478 not in tasks.encode("_start_ hello")
  assert tasks.encode("_start_ hello", special=("_start_",)) == [40478, 3570]
  with pytest.raises(ValueError, match="'_start_' is none of the tokenizer's 0 special tokens"):
    published.encode("_start_", special=("_start_",))
  with pytest.raises(ValueError, match="has '_start_' already"):
    tasks.with_tokens(["_start_"])


def test_the_papers_tasks_are_a_template(with_libraries, published):
  """Figure 1: start, text, extract; start, premise, delimiter, hypothesis, extract."""
  encoder = ExampleEncoder(load_template("gpt1"), published.with_tokens(TASK_TOKENS), "all")
  text = encoder.encode((Message("text", "hello world"),))
  assert text.ids.tolist() == [40478, 3570, 1276, 40480]
  assert text.is_scored.tolist() == [False, True, True, True]
  pair = encoder.encode((Message("premise", "hello"), Message("hypothesis", "world")))
  assert pair.ids.tolist() == [40478, 3570, 40479, 1276, 40480]
  with pytest.raises(ValueError, match="inserts '_start_', and the tokenizer has no such token"):
    ExampleEncoder(load_template("gpt1"), published).encode((Message("text", "hello"),))


def test_without_its_libraries_it_says_what_to_install():
  program = (
    "import sys; sys.modules['spacy'] = None\n"
    "from gpt2_jax.tokenizer import load_tokenizer\n"
    f"try: load_tokenizer({str(DATA / 'gpt1')!r})\n"
    "except ImportError as error: print(error)\n"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert "pip install 'gpt2_jax[gpt1]'" in done.stdout and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
  "file, content, message",
  [
    (0, '{"a": 0, "b": 0}', "does not give each id from 0 on to one token"),
    (0, '{"a": true}', "does not give each id from 0 on to one token"),
    (0, "[1]", "GPT-1's vocabulary"),
    (1, "a b\n", "not a line of #version"),
    (1, "#version: 0.2\na b c\n", "not a line of #version, and pairs"),
  ],
)
def test_damaged_files_are_refused(file, content, message, tmp_path):
  for name in OPENAI_FILES:
    shutil.copy(DATA / "gpt1" / name, tmp_path / name)
  (tmp_path / OPENAI_FILES[file]).unlink()
  (tmp_path / OPENAI_FILES[file]).write_text(content)
  with pytest.raises(ValueError, match=message) as error:
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.fingerprint  # noqa: B018
  assert "\n" not in str(error.value)
