# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as they lie in the folders of GPT-2s: each is read as transformers reads it, is
written so that transformers reads the same, or is refused in one line."""

import dataclasses
import io
import json
import pathlib
import random

import pytest

from gpt2_jax.convert import pretrained
from gpt2_jax.convert.vocabulary import as_tokenizer_json, read_vocabulary, write_vocabulary
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.metadata import content_differences
from gpt2_jax.tokenizer import (
  Characters,
  Gpt2Bpe,
  HuggingFace,
  SentencePiece,
  from_json,
  load_tokenizer,
  train_sentencepiece,
)

T = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

EOT, N_VOCAB = "<|endoftext|>", 4096
CORPUS = [
  "the cat sat on the mat, and the dog ran after 12 of them.",
  "def run(self, x): return self.x + 1  # adds\n    import os\n",
  "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e Caf\u00e9 na\u00efve \ufb01ne",
] * 20
PARTS = [*" .,;()'\n\t", "  ", "\r\n", "the cat", "The CAT", "sat", "mats", "self.x", "12", "2024"]
PARTS += [
  "\u4f60\u597d",
  "\u65e5\u672c\u8a9e",
  "\u4e16\u754cx",
  "Caf\u00e9",
  "cafe\u0301",
  "\ufb01ne",
]
PARTS += [
  "\U0001f600",
  "\u2581",
  "\u00a0",
  "\uff21",
  "don't",
  "covfefe",
  "\u200b",
  "xyzzy",
  "\u0301",
]


def random_texts(specials: tuple[str, ...] = (), n: int = 200) -> list[str]:
  draw = random.Random(0)
  parts = PARTS + list(specials) * 4
  texts = []
  for _ in range(n):
    words = [draw.choice(parts) + draw.choice(["", " "]) for _ in range(draw.randrange(12))]
    texts.append("".join(words))
  return texts


def put(folder: pathlib.Path, **files) -> None:
  """Writes files, of which the first dot of a name is a double underscore."""
  for name, content in files.items():
    path = folder / name.replace("__", ".", 1)
    if isinstance(content, bytes):
      path.write_bytes(content)
    else:
      text = content if isinstance(content, str) else json.dumps(content)
      path.write_bytes(text.encode())


def byte_level(**options) -> "T.Tokenizer":
  tokenizer = T.Tokenizer(T.models.BPE())
  tokenizer.pre_tokenizer = T.pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
  tokenizer.decoder = T.decoders.ByteLevel()
  alphabet = sorted(T.pre_tokenizers.ByteLevel.alphabet())
  trainer = T.trainers.BpeTrainer(
    vocab_size=400, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  return tokenizer


BYTE_LEVEL = json.loads(byte_level().to_str())
N_BASE = len(BYTE_LEVEL["model"]["vocab"])
PAIR = {
  "vocab__json": BYTE_LEVEL["model"]["vocab"],
  "merges__txt": "\n".join(["#version: 0.2", *map(" ".join, BYTE_LEVEL["model"]["merges"]), ""]),
}
MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False}
NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
PIECES = [
  "[PAD]",
  "[UNK]",
  "[CLS]",
  "[SEP]",
  "[MASK]",
  *"abcdefghijklmnopqrstuvwxyzCT.,()12\u4f60\u597d",
]
PIECES += [
  "caf\u00e9",
  "cafe",
  "the",
  "cat",
  "##s",
  "##e",
  "##\u597d",
  "\u65e5\u672c\u8a9e",
  "\u65e5",
]
PIECES += [f"##{letter}" for letter in "atnx2"]


def words(**settings) -> "T.Tokenizer":
  vocab = {piece: i for i, piece in enumerate(PIECES)}
  tokenizer = T.Tokenizer(T.models.WordPiece(vocab, unk_token="[UNK]"))
  tokenizer.normalizer = T.normalizers.BertNormalizer(**settings)
  tokenizer.pre_tokenizer = T.pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = T.decoders.WordPiece()
  return tokenizer


def metaspace(model, trainer) -> "T.Tokenizer":
  tokenizer = T.Tokenizer(model)
  tokenizer.pre_tokenizer = T.pre_tokenizers.Metaspace()
  tokenizer.decoder = T.decoders.Metaspace()
  tokenizer.train_from_iterator(CORPUS, trainer)
  return tokenizer


def unigram() -> "T.Tokenizer":
  specials = ["<unk>", "<s>", "</s>", "<pad>"]
  trainer = T.trainers.UnigramTrainer(
    vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False
  )
  return metaspace(T.models.Unigram(), trainer)


def byte_fallback() -> "T.Tokenizer":
  """As Llama's: bytes for what has no piece, a space before the text."""
  data = [f"<0x{byte:02X}>" for byte in range(256)]
  trainer = T.trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
  )
  trained = metaspace(T.models.BPE(unk_token="<unk>"), trainer)
  content = json.loads(trained.to_str())
  vocab = content["model"]["vocab"]
  for token in data:
    vocab[token] = len(vocab)
  content["model"] |= {"byte_fallback": True, "fuse_unk": True}
  tokenizer = T.Tokenizer.from_str(json.dumps(content))
  decoders = [T.decoders.Replace("\u2581", " "), T.decoders.ByteFallback(), T.decoders.Fuse()]
  tokenizer.decoder = T.decoders.Sequence([*decoders, T.decoders.Strip(" ", 1, 0)])
  return tokenizer


def word_level() -> "T.Tokenizer":
  vocab = {"[UNK]": 0, "the": 1, "cat": 2, ".": 3, EOT: 4}
  tokenizer = T.Tokenizer(T.models.WordLevel(vocab, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = T.pre_tokenizers.Whitespace()
  return tokenizer


def other_cut() -> "T.Tokenizer":
  tokenizer = byte_level()
  digits = T.pre_tokenizers.Digits(individual_digits=True)
  tokenizer.pre_tokenizer = T.pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
  tokenizer.normalizer = T.normalizers.NFC()
  return tokenizer


def lower_case() -> "T.Tokenizer":
  tokenizer = byte_level()
  tokenizer.normalizer = T.normalizers.Lowercase()
  return tokenizer


def fast(tokenizer: "T.Tokenizer", **names):
  """A folder as transformers saves a tokenizer of its general class."""

  def save(folder):
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(folder)

  return save


def sentencepiece_model(**options) -> bytes:
  sentencepiece = pytest.importorskip("sentencepiece")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=4, num_threads=1, **options
  )
  return model.getvalue()


def sentencepiece_folder(name: str, tokenizer_class: str, **options):
  def save(folder):
    (folder / name).write_bytes(sentencepiece_model(**options))
    put(folder, tokenizer_config__json={"tokenizer_class": tokenizer_class, "extra_ids": 0})

  return save


def files(**content):
  return lambda folder: put(folder, **content)


def resaved(**content):
  """Files that transformers read and saved again, as it does today."""

  def save(folder):
    put(folder, **content)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)

  return save


def written(tokenizer):
  """As this project writes it; its own file is taken away."""

  def save(folder):
    write_vocabulary(tokenizer, folder, 64)
    (folder / "gpt2_jax_tokenizer.json").unlink(missing_ok=True)

  return save


GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
BERT = {"vocab__txt": "\n".join(PIECES) + "\n"}
ADDED = {
  "added_tokens__json": {"<|user|>": N_BASE, "covfefe": N_BASE + 1},
  "special_tokens_map__json": NAMES | {"additional_special_tokens": ["<|user|>"]},
}
DECODER = {
  str(N_BASE): MASK | {"single_word": False, "special": True},
  str(N_BASE + 1): {"content": "covfefe", "special": False, "rstrip": True, "single_word": True},
}
LEADS_WITH_SPACE = BYTE_LEVEL | {
  "pre_tokenizer": BYTE_LEVEL["pre_tokenizer"] | {"add_prefix_space": True}
}

ROBERTA = {"<s>" if token == EOT else token: i for token, i in PAIR["vocab__json"].items()}
ROBERTA |= {"</s>": N_BASE, "<pad>": N_BASE + 1, "<unk>": N_BASE + 2, "<mask>": N_BASE + 3}

KINDS = {
  "vocabulary and merges": files(**PAIR),
  "slow, added tokens": files(**PAIR, **ADDED, tokenizer_config__json=GPT2),
  "slow, no config of its own": files(**PAIR, **ADDED),
  "added tokens with flags": files(
    **PAIR,
    tokenizer_config__json=GPT2 | NAMES | {"added_tokens_decoder": DECODER, "mask_token": "<mask>"},
  ),
  "a token of a map with flags": files(
    **PAIR,
    tokenizer_config__json=GPT2,
    special_tokens_map__json={"mask_token": MASK | {"single_word": False}},
  ),
  "a pad token that was added": files(**PAIR, tokenizer_config__json=GPT2 | {"pad_token": "<pad>"}),
  "a field of its own names a token": files(
    **PAIR, tokenizer_config__json=GPT2 | {"user_token": "<|user|>"}
  ),
  "prefix space": files(**PAIR, tokenizer_config__json=GPT2 | {"add_prefix_space": True}),
  "a template with BOS": files(**PAIR, tokenizer_config__json=GPT2 | {"add_bos_token": True}),
  "a chat template": files(
    **PAIR, tokenizer_config__json=GPT2 | {"chat_template": CHAT, "model_max_length": 77}
  ),
  "a chat template's file": files(
    **PAIR, chat_template__jinja=CHAT, tokenizer_config__json=GPT2 | {"padding_side": "left"}
  ),
  "Roberta's names": files(
    vocab__json=ROBERTA,
    merges__txt=PAIR["merges__txt"],
    tokenizer_config__json={"tokenizer_class": "RobertaTokenizer"},
  ),
  "fast, saved today": resaved(**PAIR, **ADDED, tokenizer_config__json=GPT2),
  "fast, no config": files(tokenizer__json=BYTE_LEVEL),
  "fast, no config, prefix space": files(tokenizer__json=LEADS_WITH_SPACE),
  "fast, the config has no prefix space": files(
    tokenizer__json=LEADS_WITH_SPACE, tokenizer_config__json=GPT2 | {"add_prefix_space": False}
  ),
  "fast, slow's files beside it": files(
    tokenizer__json=BYTE_LEVEL, **PAIR, **ADDED, tokenizer_config__json=GPT2
  ),
  "digits apart, normalized": fast(other_cut(), eos_token=EOT),
  "lower case, GPT-2's names": fast(lower_case(), **NAMES),
  "WordPiece, class in config.json": files(
    **BERT, config__json={"model_type": "gpt2", "tokenizer_class": "BertTokenizer"}
  ),
  "WordPiece, cased": files(
    **BERT, tokenizer_config__json={"tokenizer_class": "BertTokenizer", "do_lower_case": False}
  ),
  "WordPiece, accents kept, Chinese whole": files(
    **BERT,
    tokenizer_config__json={
      "tokenizer_class": "BertTokenizerFast",
      "strip_accents": False,
      "tokenize_chinese_chars": False,
    },
  ),
  "WordPiece, fast, other settings in the config": files(
    tokenizer__json=words(lowercase=True).to_str(),
    tokenizer_config__json={"tokenizer_class": "BertTokenizer", "do_lower_case": False},
  ),
  "WordPiece, general class": fast(
    words(), unk_token="[UNK]", eos_token="[SEP]", pad_token="[PAD]"
  ),
  "unigram": fast(unigram(), eos_token="</s>", bos_token="<s>", unk_token="<unk>"),
  "byte fallback": fast(byte_fallback(), eos_token="</s>", bos_token="<s>", unk_token="<unk>"),
  "words": fast(word_level(), eos_token=EOT, unk_token="[UNK]"),
  "SentencePiece, unigram": sentencepiece_folder(
    "tokenizer.model", "PreTrainedTokenizerFast", vocab_size=50
  ),
  "SentencePiece, unigram with byte fallback": sentencepiece_folder(
    "tokenizer.model", "TokenizersBackend", vocab_size=310, byte_fallback=True
  ),
  "SentencePiece, BPE": sentencepiece_folder(
    "tokenizer.model", "PreTrainedTokenizerFast", vocab_size=150, model_type="bpe"
  ),
  "SentencePiece, BPE with byte fallback and the user's pieces": sentencepiece_folder(
    "tokenizer.model",
    "PreTrainedTokenizerFast",
    vocab_size=400,
    model_type="bpe",
    byte_fallback=True,
    user_defined_symbols=["<u>", "sat"],
  ),
  "characters": written(Characters("".join(sorted(set("".join(random_texts())))))),
}


@pytest.fixture
def folder(tmp_path):
  """A folder with the config.json of a GPT-2."""
  path = tmp_path / "model"
  path.mkdir()
  put(path, config__json={"model_type": "gpt2", "vocab_size": N_VOCAB})
  return path


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_transformers_and_what_is_written_keeps_them(kind, folder, tmp_path):
  KINDS[kind](folder)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = read_vocabulary(folder, N_VOCAB)
  check_same_ids(ours, theirs)
  check_literal(ours, theirs)
  named = {name: theirs.convert_tokens_to_ids(t) for name, t in theirs.special_tokens_map.items()}
  assert named.get("eos_token") == ours.eot

  out = tmp_path / "out"
  out.mkdir()
  write_vocabulary(ours, out, 64)
  put(out, config__json={"model_type": "gpt2", "vocab_size": N_VOCAB})
  again = transformers.AutoTokenizer.from_pretrained(out)
  check_same_ids(ours, again)
  check_same_ids(read_vocabulary(out, N_VOCAB), again)
  assert again.special_tokens_map == theirs.special_tokens_map
  assert {
    name: again.convert_tokens_to_ids(t) for name, t in again.special_tokens_map.items()
  } == named
  assert set(again.all_special_tokens) == set(theirs.all_special_tokens)
  assert again("the cat").input_ids == theirs("the cat").input_ids, "BOS and the like"
  for field in ("chat_template", "padding_side"):
    assert again.init_kwargs.get(field) == theirs.init_kwargs.get(field)


def check_same_ids(ours, theirs) -> None:
  """Ids of 200 texts; of 200 with special tokens, which are parsed."""
  for text in random_texts():
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
  for text in random_texts(ours.special_tokens):
    ids = ours.encode(text, special=True)
    assert ids == theirs(text, add_special_tokens=False).input_ids, text
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def check_literal(ours, theirs) -> None:
  """No text has a special token in it, but for the one that stands for what is unknown."""
  special = set(theirs.all_special_ids) - {theirs.unk_token_id}
  if theirs.unk_token == EOT:
    special.add(theirs.unk_token_id)
  for text in random_texts(tuple(theirs.all_special_tokens)):
    try:
      ids = ours.encode(text)
    except ValueError:
      # Characters and words that the vocabulary lacks.
      continue
    assert not special & set(ids), text
    assert ours.encode_batch([text, ""]) == [ids, []]
    assert ours.encode_with_offsets(text)[0] == ids


CLASS = {"tokenizer_class": "CTRLTokenizer"}
GPT1_CLASS = {"tokenizer_class": "OpenAIGPTTokenizer"}
SMALL = {"a": 0, "b": 1, "ab": 2}
DROPOUT = BYTE_LEVEL | {"model": BYTE_LEVEL["model"] | {"dropout": 0.1}}
EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
SHIFTED = {"added_tokens_decoder": {str(N_BASE + 5): {"content": "<x>"}}}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"vocab__json": SMALL}, "vocab.json is there and merges.txt is not"),
    ({"merges__txt": "a b"}, "merges.txt is there and vocab.json is not"),
    ({"encoder__json": SMALL}, "encoder.json is there and vocab.bpe is not"),
    (PAIR | {"tokenizer_config__json": CLASS}, "'CTRLTokenizer' reads vocab.json, merges.txt"),
    (PAIR | {"tokenizer_config__json": GPT1_CLASS}, "has no token that ends a word, with </w>"),
    (
      {"spiece__model": b"x", "tokenizer_config__json": {"tokenizer_class": "AlbertTokenizer"}},
      "'AlbertTokenizer' reads spiece.model in a way of its own",
    ),
    (BERT | {"tokenizer_config__json": {"tokenizer_class": "BertJapaneseTokenizer"}}, "Japanese"),
    (BERT | {"tokenizer_config__json": {"do_basic_tokenize": False}}, "do_basic_tokenize is false"),
    ({"tokenizer__model": b"IQ== 0\nIg== 1\n"}, "14 bytes are no SentencePiece model"),
    ({"cl100k_base__tiktoken": "IQ== 0"}, "of a kind that is not read .cl100k_base.tiktoken"),
    ({"vocab__model": b"x"}, "of a kind that is not read .vocab.model"),
    ({"dict__txt": "a 1"}, "of a kind that is not read .dict.txt"),
    ({"tokenizer_config__json": {"tokenizer_class": "BertTokenizer"}}, "its vocabulary is not"),
    ({"added_tokens__json": {"<x>": 50257}}, "its vocabulary is not"),
    ({"tokenizer__json": DROPOUT}, "has BPE dropout 0.1"),
    ({"tokenizer__json": EMPTY}, "tokenizer.json has no tokens"),
    ({"vocab__json": {}, "merges__txt": ""}, "vocab.json has no tokens"),
    ({"vocab__txt": ""}, "vocab.txt has no tokens"),
    ({"vocab__txt": "\u4f60".encode("gbk")}, "vocab.txt is not UTF-8 at byte 0"),
    (PAIR | {"added_tokens__json": {"<x>": N_BASE + 5}}, f"'<x>' the id {N_BASE + 5}, and after"),
    (PAIR | {"tokenizer_config__json": SHIFTED}, f"'<x>' the id {N_BASE + 5}, and after"),
    (PAIR | {"added_tokens__json": {"<x>": "seven"}}, "the id 'seven'; ids count from 0"),
    (PAIR | {"added_tokens__json": {"": N_BASE}}, "a token is an empty string"),
    (PAIR | {"special_tokens_map__json": {"eos_token": 7}}, "a token is a string or an object"),
    (
      PAIR | {"special_tokens_map__json": {"additional_special_tokens": "<x>"}},
      "no list of tokens",
    ),
    (PAIR | {"special_tokens_map__json": {"eos_token": MASK | {"lstrip": 1}}}, "is '1', no bool"),
    (PAIR | {"tokenizer_config__json": {"add_prefix_space": 2}}, "add_prefix_space is '2'"),
    (PAIR | {"tokenizer_config__json": {"added_tokens_decoder": []}}, "is a list, not an object"),
    (PAIR | {"tokenizer_config__json": "{"}, "tokenizer_config.json is no JSON"),
    (PAIR | {"chat_template__jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
  ],
)
@pytest.mark.parametrize("n_vocab", [50257])
def test_what_is_not_read_is_one_line_and_never_gpt2s(content, message, n_vocab, tmp_path):
  put(tmp_path, **content)
  for read in (lambda: read_vocabulary(tmp_path, n_vocab), lambda: load_tokenizer(str(tmp_path))):
    with pytest.raises(ValueError, match=message) as error:
      read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_token_that_was_added_without_resizing(folder, tmp_path, capsys):
  """The model loads, a line says which ids it lacks, and a text that holds one is refused."""
  put(folder, **PAIR, tokenizer_config__json=GPT2 | {"pad_token": "<pad>"})
  ours = read_vocabulary(folder, N_BASE)
  error = capsys.readouterr().err
  assert f"1 added tokens beyond the model's {N_BASE:,} ('<pad>' {N_BASE})" in error
  assert ours.vocab_size == N_BASE
  assert ours.encode("the cat<pad>") == read_vocabulary(folder, N_BASE + 1).encode("the cat<pad>")
  with pytest.raises(ValueError, match=f"token '<pad>' with id {N_BASE}, and the model {N_BASE}"):
    ours.encode("the cat<pad>", special=True)
  assert from_json(ours.to_json()) == ours

  # What is written has the token again.
  (tmp_path / "out").mkdir()
  write_vocabulary(ours, tmp_path / "out", 64)
  put(tmp_path / "out", config__json={"model_type": "gpt2"})
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert (theirs.pad_token, theirs.pad_token_id) == ("<pad>", N_BASE)

  # One that every text could have is refused at once.
  put(folder, tokenizer_config__json=GPT2 | {"added_tokens_decoder": DECODER})
  assert read_vocabulary(folder, N_BASE).encode("mats") == ours.encode("mats")
  with pytest.raises(ValueError, match="token 'covfefe' with id"):
    read_vocabulary(folder, N_BASE).encode("so covfefe it is")
  with pytest.raises(ValueError, match=f"has {N_BASE} tokens, and the model {N_BASE - 1}"):
    put(folder, tokenizer_config__json=GPT2)
    read_vocabulary(folder, N_BASE - 1)


@pytest.mark.parametrize(
  ("content", "file"),
  [
    ({"tokenizer__json": LEADS_WITH_SPACE, "tokenizer_config__json": GPT2}, "tokenizer.json"),
    (BERT | {"tokenizer_config__json": {"do_lower_case": False}}, "vocab.txt"),
    (PAIR | ADDED, ""),
  ],
)
def test_a_tokenizer_is_loaded_by_its_path(content, file, tmp_path):
  """A file is read with what lies beside it, and so is its folder."""
  put(tmp_path, **content)
  expected = read_vocabulary(tmp_path, N_VOCAB)
  for path in (tmp_path / file, tmp_path):
    assert load_tokenizer(str(path)) == expected


def test_a_vocabulary_of_gpt2s_size_without_a_tokenizer_is_told(tmp_path, capsys):
  assert read_vocabulary(tmp_path, 50257) == Gpt2Bpe()
  assert "has no tokenizer and 50,257 tokens: GPT-2's are assumed" in capsys.readouterr().err
  assert read_vocabulary(tmp_path, 50258) is None and not capsys.readouterr().err
  with pytest.raises(ValueError, match="the folder has no tokenizer"):
    load_tokenizer(str(tmp_path))


def test_more_chat_templates_than_one_are_kept(folder, tmp_path):
  put(folder, **PAIR, chat_template__jinja="D", tokenizer_config__json=GPT2)
  (folder / "additional_chat_templates").mkdir()
  (folder / "additional_chat_templates" / "tools.jinja").write_text("T")
  (tmp_path / "out").mkdir()
  write_vocabulary(read_vocabulary(folder, N_VOCAB), tmp_path / "out", 64)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert theirs.chat_template == {"default": "D", "tools": "T"}


def sentencepieces() -> dict[str, SentencePiece]:
  """Models of this project's own training, and of others that it holds."""
  lossless = train_sentencepiece(CORPUS, 320)
  return {
    "lossless": lossless,
    "unigram": SentencePiece(sentencepiece_model(vocab_size=50)),
    "blanks kept": SentencePiece(
      sentencepiece_model(vocab_size=60, model_type="bpe", remove_extra_whitespaces=False)
    ),
  }


@pytest.mark.parametrize("kind", ["lossless", "unigram", "blanks kept"])
def test_a_sentencepiece_model_is_written_for_transformers(kind, folder):
  ours = sentencepieces()[kind]
  write_vocabulary(ours, folder, 64)
  assert read_vocabulary(folder, N_VOCAB) == ours, "as it was, for this project"
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eot
  for text in random_texts():
    # A space symbol is a space to the library; this project writes it in bytes, apart from a space.
    text = text.replace("\u2581", "")
    ids = theirs(text).input_ids
    assert ids == ours.encode(text)
    if kind == "lossless":
      assert theirs.decode(ids) == text


@pytest.mark.parametrize("options", [{"model_type": "char"}, {"treat_whitespace_as_suffix": True}])
def test_a_model_without_a_form_for_others_is_kept_for_this_project(options, folder):
  ours = SentencePiece(sentencepiece_model(vocab_size=50, **options))
  assert as_tokenizer_json(ours) is None
  write_vocabulary(ours, folder, 64)
  assert {path.name for path in folder.iterdir()} == {"config.json", "gpt2_jax_tokenizer.json"}
  assert read_vocabulary(folder, N_VOCAB) == ours


@pytest.mark.parametrize("form", ["hf", "orbax", "nanogpt", "llmc"])
def test_no_pair_is_written_that_is_not_read(form, made, tmp_path):
  if form == "nanogpt":
    pytest.importorskip("torch")
  weights = made(ModelConfig(n_vocab=N_BASE - 1, n_ctx=8, n_embd=8, n_head=2, n_layer=1))
  merges = HuggingFace(json.dumps(BYTE_LEVEL))
  for tokenizer, message in (
    (merges, f"ids up to {N_BASE - 1}, and the model {N_BASE - 1} tokens"),
    (Characters("".join(map(chr, range(N_BASE)))), f"ids up to {N_BASE - 1}, and"),
    (HuggingFace(json.dumps(DROPOUT)), "BPE dropout 0.1"),
  ):
    with pytest.raises(ValueError, match=message):
      pair = dataclasses.replace(weights, tokenizer=tokenizer)
      pretrained.write(pair, str(tmp_path / "out"), form, other_gelu=True)
    assert not list(tmp_path.iterdir())


def test_a_run_from_before_the_config_was_kept_resumes(folder):
  """What lies beside a tokenizer changes no id, and an older run did not record it."""
  put(folder, **PAIR, tokenizer_config__json=GPT2 | {"chat_template": CHAT})
  recorded = read_vocabulary(folder, N_VOCAB).to_json()
  older = {key: value for key, value in recorded.items() if key != "config"}
  assert older != recorded and from_json(older).end == from_json(recorded).end
  assert content_differences({"tokenizer": older}, {"tokenizer": recorded}) == []
  other = older | {"end": 1}
  assert len(content_differences({"tokenizer": other}, {"tokenizer": recorded})) == 1
