# SPDX-License-Identifier: Apache-2.0
"""The same documents in every format that people have: equal tokens, or one line."""

import bz2
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import tracemalloc

import numpy as np
import pytest

from gpt2_jax.data import corpus, encode_corpus
from gpt2_jax.data.compression import open_decompressed
from gpt2_jax.data.readers import JsonList, Parquet, choose_reader, split_stream
from gpt2_jax.data.skipped import BadRecord
from gpt2_jax.data.token_files import copy_tokens, token_documents
from gpt2_jax.tokenizer import Characters, load_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

EOT = "<|endoftext|>"
DOCUMENTS = [
  "A plain text.",
  "Two lines\nof text.\n",
  "na\xefve caf\xe9 \u65e5\u672c\u8a9e \U0001f600",
  'quotes " and \\ and \u2028',
  " leading and trailing ",
  *(f"document {i} of many" for i in range(20)),
]


def zstd(content: bytes) -> bytes:
  sink = pa.BufferOutputStream()
  with pa.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(content)
  return sink.getvalue().to_pybytes()


def lines(key: str = "text") -> bytes:
  return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in DOCUMENTS).encode()


def json_list(**kwargs) -> bytes:
  return json.dumps([{"text": text, "id": 1} for text in DOCUMENTS], **kwargs).encode()


def parquet(texts=DOCUMENTS, **kwargs) -> bytes:
  sink = io.BytesIO()
  columns = {"id": list(range(len(texts))), "text": texts}
  pq.write_table(pa.table(columns), sink, row_group_size=7, **kwargs)
  return sink.getvalue()


def joined(separator: str = EOT) -> bytes:
  return separator.join(DOCUMENTS).encode()


def in_two(compress, content: bytes) -> bytes:
  """Two members, as `cat a.gz b.gz` gives."""
  half = len(content) // 2
  return compress(content[:half]) + compress(content[half:])


# Formats whose tokens are those of a.jsonl, in the same order.
SAME_ORDER = {
  "a.ndjson": lines(),
  "a.json": json_list(),
  "pretty/a.json": json_list(indent=2, ensure_ascii=False),
  "lines/a.json": lines(),  # as C4 has them
  "a.jsonl.gz": gzip.compress(lines()),
  "members/a.jsonl.gz": in_two(gzip.compress, lines()),
  "a.json.gz": gzip.compress(lines()),
  "a.ndjson.bz2": bz2.compress(lines()),
  "a.jsonl.XZ": lzma.compress(lines()),
  "a.jsonl.zst": zstd(lines()),
  "frames/a.jsonl.zst": in_two(zstd, lines()),
  "a.parquet": parquet(),
  "dictionary/a.parquet": parquet(compression="zstd", use_dictionary=True),
}
# Formats of texts that are joined.
JOINED = {
  "a.txt": joined() + EOT.encode() + b"\n",
  "a.txt.gz": in_two(gzip.compress, joined()),
  "a.txt.zst": zstd(joined()),
}


@pytest.fixture(scope="module")
def tokenizer():
  if "TIKTOKEN_CACHE_DIR" not in os.environ:
    pytest.skip("TIKTOKEN_CACHE_DIR is not set: no vocabulary of GPT-2")
  return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tokenizer) -> np.ndarray:
  """The tokens of a.jsonl."""
  return tokens_of_file(tmp_path_factory.mktemp("jsonl"), "a.jsonl", lines(), tokenizer)


def write_file(folder: pathlib.Path, name: str, content: bytes) -> pathlib.Path:
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  return path


def read(path: object, folder: pathlib.Path, **kwargs) -> corpus.Documents:
  return corpus.file_documents(str(path), data_dir=str(folder / "prepared"), **kwargs)


def tokens_of(documents, tokenizer, folder: pathlib.Path) -> np.ndarray:
  store = encode_corpus(documents, tokenizer, str(folder / "store"), documents.source, 1)
  return store.read([0], len(store))[0]


def tokens_of_file(folder, name, content, tokenizer, **kwargs) -> np.ndarray:
  return tokens_of(read(write_file(folder, name, content), folder, **kwargs), tokenizer, folder)


def one_line(error) -> str:
  assert "\n" not in str(error.value) and len(str(error.value)) < 600
  return str(error.value)


@pytest.mark.parametrize("name", SAME_ORDER)
def test_records_of_every_format_give_the_tokens_of_jsonl(tmp_path, name, tokenizer, expected):
  tokens = tokens_of_file(tmp_path, name, SAME_ORDER[name], tokenizer)
  np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("name", JOINED)
def test_texts_that_are_joined_give_the_tokens_of_jsonl(tmp_path, name, tokenizer, expected):
  tokens = tokens_of_file(tmp_path, name, JOINED[name], tokenizer, split_on=EOT)
  np.testing.assert_array_equal(tokens, expected)


def test_a_file_each_holds_the_same_documents(tmp_path):
  for i, text in enumerate(DOCUMENTS):
    write_file(tmp_path, f"files/{i}.txt", text.encode())
    write_file(tmp_path, f"gz/{i}.txt.gz", gzip.compress(text.encode()))
  plain = list(read(tmp_path / "files/*", tmp_path))
  assert sorted(plain) == sorted(DOCUMENTS)
  assert list(read(tmp_path / "gz/*", tmp_path)) == plain
  upper = write_file(tmp_path, "A.JSONL", lines())
  assert sorted(read(upper, tmp_path)) == sorted(DOCUMENTS)


def test_fingerprints_of_corpora_are_those_of_older_versions(tmp_path):
  """Computed by the version before this one read other formats."""
  write_file(tmp_path, "old/a.txt", b"one\n")
  write_file(tmp_path, "old/deep/b.jsonl", b'{"text": "two"}\n\n{"text": "three"}\n')
  write_file(tmp_path, "old/c.json", b'{"text": "four"}')
  write_file(tmp_path, "old/d.json", b'["five", "six"]')
  documents = read(tmp_path / "old/**/*", tmp_path)
  fingerprint = "12367f8089730f9110ad034e04ef037423b6d67a8baa5576cb6caa1f7a7b35d6"
  assert documents.source["sha256"] == fingerprint
  assert list(documents) == ['{"text": "four"}', '["five", "six"]', "three", "one\n", "two"]


def test_a_json_file_that_holds_no_records_is_one_text(tmp_path):
  texts = [
    '{"text": "a"}',
    '{\n "text": "a"\n}',
    "[1, 2]",
    '["text"]',
    '[{"name": "x"}]',
    "[{",
    "{}",
  ]
  for i, text in enumerate(texts):
    write_file(tmp_path, f"files/{i}.json", text.encode())
  assert sorted(read(tmp_path / "files/*", tmp_path)) == sorted(texts)


def test_files_of_one_name_in_several_formats_are_all_read(tmp_path, capsys):
  for name in ("a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json", "a.parquet"):
    content = {"a.jsonl": lines(), **SAME_ORDER}[name]
    write_file(tmp_path, f"files/{name}", content)
  assert sorted(read(tmp_path / "files/*", tmp_path)) == sorted(DOCUMENTS * 5)
  assert "1 .json files hold records, each with a document under 'text'" in capsys.readouterr().err


def test_examples_are_read_from_every_format(tmp_path):
  chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
  records = [chat, {"prompt": "p", "completion": "c", "label": 1}]
  sink = io.BytesIO()
  rows = [chat | {"prompt": None, "completion": None, "label": None, "image": b"\xff"}, records[1]]
  pq.write_table(pa.Table.from_pylist(rows), sink)
  formats = {
    "a.jsonl": "\n".join(map(json.dumps, records)).encode(),
    "a.ndjson.gz": gzip.compress("\n".join(map(json.dumps, records)).encode()),
    "a.json": json.dumps(records).encode(),
    "a.json.zst": zstd(json.dumps(records).encode()),
    "a.parquet": sink.getvalue(),
  }
  for name, content in formats.items():
    documents = read(write_file(tmp_path, name, content), tmp_path, text_key=None)
    parsed = [json.loads(document)[1] for document in documents]
    assert sorted(parsed, key=len) == records, name


def damaged(table: bytes) -> bytes:
  """Another byte in the last page of the texts, which only its checksum tells."""
  column = pq.ParquetFile(io.BytesIO(table)).metadata.row_group(2).column(1)
  place = column.data_page_offset + column.total_compressed_size // 2
  return table[:place] + bytes([table[place] ^ 1]) + table[place + 1 :]


CHECKED_TABLE = parquet(use_dictionary=False, write_page_checksum=True)
BAD_FILES = {
  "cut.jsonl.gz": (gzip.compress(lines())[:-30], "truncated, damaged or no .gz file"),
  "cut.jsonl.zst": (zstd(lines())[:-30], "truncated, damaged or no .zst file"),
  "cut.txt.xz": (lzma.compress(joined())[:-30], "truncated, damaged or no .xz file"),
  "cut.txt.bz2": (bz2.compress(joined())[:-30], "truncated, damaged or no .bz2 file"),
  "plain.txt.gz": (b"not compressed", "truncated, damaged or no .gz file"),
  "tail.txt.zst": (zstd(b"text") + b"rubbish", "truncated, damaged or no .zst file"),
  "cut.parquet": (parquet()[:-30], "truncated, damaged or none"),
  "page.parquet": (
    damaged(parquet(use_dictionary=False, write_page_checksum=True)),
    "truncated, damaged or none",
  ),
  "no.parquet": (b"text", "truncated, damaged or none"),
  "a.parquet.gz": (gzip.compress(parquet()), "is a compressed Parquet file"),
  "a.tar.gz": (gzip.compress(b"a" * 600), "is an archive; unpack it"),
  "a.zip": (b"PK\3\4\xff", "unpack the archive"),
  "train.bin": (b"\xff\xff", "tokens are read with --tokens"),
  "cut.json": (json_list()[:-30], "is no JSON after item 24 of its list"),
  "comma.json": (b'[{"text": "a"} {"text": "b"}]', "item 1 of its list: a comma or the end"),
  "more.json": (b'[{"text": "a"}] []', "something follows the end of the list"),
  "deep.json": (b'[{"text": "a"},' + b"[" * 200000, "nested too deep"),
  "digits.json": (b'[{"text": "a"},' + b"1" * 20000 + b"]", "limit"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name):
  content, message = BAD_FILES[name]
  with pytest.raises(ValueError) as error:
    read(write_file(tmp_path, name, content), tmp_path)
  assert message in one_line(error) and name in one_line(error)


def test_records_without_text_are_counted_and_the_first_is_named(tmp_path, capsys):
  table = pa.table({"text": ["a", None, "b", None]})
  pq.write_table(table, tmp_path / "a.parquet")
  binary = pa.table({"text": pa.array([b"c", b"\xff"], pa.binary())})
  pq.write_table(binary, tmp_path / "b.parquet")
  write_file(tmp_path, "c.json", b'[{"text": "d"}, 7, {"title": "x"}, {"text": "\\ud800"}]')
  assert sorted(read(tmp_path / "*.parquet", tmp_path)) == ["a", "b", "c"]
  line = "2 files; skipped 3 records, the first: a.parquet, row 2 has NoneType under 'text'"
  assert line in capsys.readouterr().err
  assert list(read(tmp_path / "c.json", tmp_path)) == ["d"]
  assert "skipped 3 records, the first: c.json, item 2 is a int" in capsys.readouterr().err
  with pytest.raises(BadRecord, match="a.parquet, row 2 has NoneType"):
    read(tmp_path / "*.parquet", tmp_path, strict=True)

  with pytest.raises(ValueError) as error:
    read(tmp_path / "a.parquet", tmp_path, text_key="body")
  assert "has no column body (of text); see --text_key" in one_line(error)


def test_a_separator_that_is_nowhere_is_an_error(tmp_path):
  path = write_file(tmp_path, "a.txt", b"one\n\ntwo")
  with pytest.raises(ValueError) as error:
    read(path, tmp_path, split_on=EOT)
  assert "no text holds '<|endoftext|>'" in one_line(error)
  assert sorted(read(path, tmp_path, split_on="\n\n")) == ["one", "two"]
  assert list(read(path, tmp_path)) == ["one\n\ntwo"]
  with pytest.raises(ValueError, match="hold records"):
    read(write_file(tmp_path, "a.jsonl", lines()), tmp_path, split_on=EOT)


def test_a_document_that_is_not_utf8_is_skipped_in_a_joined_text(tmp_path, capsys):
  path = write_file(tmp_path, "a.txt", b"one||t\xffwo||three")
  assert sorted(read(path, tmp_path, split_on="||")) == ["one", "three"]
  assert "a.txt, document 2 is not UTF-8 at byte 1 of it" in capsys.readouterr().err


class Trickle(io.RawIOBase):
  """A stream that gives a few bytes at a time, wherever that cuts."""

  def __init__(self, content: bytes, seed: int):
    self._rest = content
    self._random = random.Random(seed)

  def readable(self):
    return True

  def read(self, size=-1):
    count = self._random.randint(1, 7)
    piece, self._rest = self._rest[:count], self._rest[count:]
    return piece


@pytest.mark.parametrize("separator", [b"|", b"<>", b"aab"])
def test_a_text_is_split_wherever_the_chunks_end(separator):
  for seed in range(200):
    letters = random.Random(seed).choices("ab|<>", k=60)
    content = "".join(letters).encode()
    pieces = list(split_stream(Trickle(content, seed), separator, "x"))
    assert pieces == content.split(separator)


def test_a_json_list_is_parsed_wherever_the_chunks_end(tmp_path, monkeypatch):
  """Chunks that grow from one character: values are cut at every place."""
  monkeypatch.setattr("gpt2_jax.data.readers.CHUNK_BYTES", 1)
  values = [{"text": 'a\\u00e9\\n" }],['}, {"text": "\u65e5", "n": -1.5e-7, "b": [True, None, {}]}]
  content = json.dumps(values, indent=1)
  for value in (content, content.replace("\n", ""), "\ufeff" + content):
    path = write_file(tmp_path, "a.json", value.encode())
    records = [json.loads(text)[1] for _, text in JsonList(None).records(str(path), "a")]
    assert records == values


def test_streams_are_read_a_little_at_a_time(tmp_path):
  """20 MB of records in each format, read with a fraction of them in memory."""
  text = "word " * 800
  record = json.dumps({"text": text}).encode()
  n = 5000
  contents = {
    "a.json": b"[" + b",\n".join([record] * n) + b"]",
    "a.jsonl.gz": gzip.compress(b"\n".join([record] * n), 1),
    "a.txt": b"||".join([text.encode()] * n),
  }
  for name, content in contents.items():
    path = str(write_file(tmp_path, name, content))
    reader = choose_reader(path, "text", "||")
    tracemalloc.start()
    assert reader.digest(path)
    assert sum(len(document) for _, document in reader.records(path, "a")) == n * len(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6, (name, peak)


def test_a_row_group_is_read_a_little_at_a_time(tmp_path):
  """30 MB in one row group, of which a few pages are in Arrow's memory."""
  letters = random.Random(0).choices("abcdefgh ", k=100_000)
  texts = ["".join(letters[i:]) for i in range(300)]
  path = str(tmp_path / "a.parquet")
  pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, write_batch_size=8)
  before = pa.total_allocated_bytes()
  for number, document in Parquet("text").records(path, "a"):
    assert document == texts[number]
    assert pa.total_allocated_bytes() - before < 15e6, number


def test_a_compressed_text_of_2_gib_is_refused_by_its_length(tmp_path, monkeypatch):
  monkeypatch.setattr("gpt2_jax.data.readers.MAX_BYTES", 1000)
  path = write_file(tmp_path, "bomb.txt.gz", gzip.compress(b"a" * 1001))
  with pytest.raises(ValueError) as error:
    read(path, tmp_path)
  assert "2 GiB of text or more" in one_line(error)


def nanogpt(ids_of_documents, eot: int) -> bytes:
  """As nanoGPT's prepare.py writes them: each document, then its end."""
  return np.array([i for ids in ids_of_documents for i in [*ids, eot]], np.uint16).tobytes()


def llmc(tokens: np.ndarray, magic=20240520, version=1, count=None) -> bytes:
  """As llm.c's write_datafile writes them."""
  header = np.zeros(256, np.int32)
  header[:3] = magic, version, len(tokens) if count is None else count
  return header.tobytes() + tokens.astype(np.uint16).tobytes()


@pytest.fixture
def ids(tokenizer) -> list[list[int]]:
  return [tokenizer.encode(text) for text in DOCUMENTS]


def copied(patterns, folder, tokenizer, split="train"):
  documents = token_documents(str(patterns), split, tokenizer)
  return copy_tokens(documents, tokenizer, str(folder), 1)


def test_token_files_give_the_store_of_their_text(tmp_path, tokenizer, ids):
  """nanoGPT's train.bin, llm.c's shards (cut anywhere) and .npy: every token in its order."""
  content = nanogpt(ids, tokenizer.eot)
  expected = np.frombuffer(content, np.uint16)
  starting = np.roll(expected, 1)  # llm.c has the end of text before each document
  write_file(tmp_path, "n/train.bin", content)
  for i, shard in enumerate(np.array_split(starting, 5)):
    write_file(tmp_path, f"c/shard_{i:06d}.bin", llmc(shard))
    (tmp_path / "b").mkdir(exist_ok=True)
    np.save(tmp_path / f"b/shard_{i:06d}.npy", shard)
  stores = [copied(tmp_path / f"{name}/*", tmp_path / f"s{name}", tokenizer) for name in "ncb"]

  n_bytes = sum(len(text.encode()) for text in DOCUMENTS)
  for store in stores:
    np.testing.assert_array_equal(store.read([0], len(store))[0], expected)
    assert store.manifest["documents"] == len(DOCUMENTS) and store.manifest["bytes"] == n_bytes
    store.verify()


def test_the_split_of_token_files_is_of_documents_in_order(tmp_path, tokenizer, ids):
  path = write_file(tmp_path, "train.bin", nanogpt(ids, tokenizer.eot))
  first = token_documents(str(path), "train[:80%]", tokenizer)
  rest = token_documents(str(path), "train[80%:]", tokenizer)
  assert [list(tokens) for tokens in [*first, *rest]] == ids and len(first) == 20
  for split in ("test", "train[:0]", "train[x]", ""):
    with pytest.raises(ValueError) as error:
      token_documents(str(path), split, tokenizer)
    assert "split" in one_line(error)


def test_files_of_nanogpt_end_their_documents_and_empty_ones_are_dropped(tmp_path):
  tokenizer = Characters("ab")
  write_file(tmp_path, "train.bin", np.array([0, 1, 1], np.uint16).tobytes())
  write_file(tmp_path, "val.bin", np.array([1], np.uint16).tobytes())
  write_file(tmp_path, "x.bin", b"")
  documents = token_documents(f"{tmp_path}/*.bin", "train", tokenizer)
  assert [list(tokens) for tokens in documents] == [[0, 1, 1], [1]]
  store = copy_tokens(documents, tokenizer, str(tmp_path / "store"), 1)
  assert store.read([0], 4)[0].tolist() == [0, 1, 1, 1]


def test_documents_without_a_token_are_left_out_aloud(tmp_path, tokenizer, capsys):
  path = write_file(tmp_path, "train.bin", nanogpt([[], [5], [], [], [6, 7], []], tokenizer.eot))
  documents = token_documents(str(path), "train", tokenizer)
  assert [list(tokens) for tokens in documents] == [[5], [6, 7]]
  assert "3 documents without a token, left out" in capsys.readouterr().err


BAD_TOKENS = {
  "odd.bin": (b"abc", "3 bytes, and tokens have two each"),
  "text.bin": (b"a text that is no tokens" * 3, "holds text, and no tokens"),
  "text.txt": (b"a text that is no tokens" * 3, "by its name no token file"),
  "others.bin": (bytes(range(200)), "ids are beyond the tokenizer's 2"),
  "int32.bin": (np.zeros(100, np.uint32).tobytes(), "four bytes each"),
  "cut.bin": (llmc(np.zeros(100, np.uint16))[:-2], "1,222 bytes, and 1,224 with the 100 tokens"),
  "negative.bin": (llmc(np.zeros(9, np.uint16), count=-9), "get it again"),
  "version.bin": (llmc(np.zeros(9, np.uint16), version=2), "version 2; 1 is read"),
  "llama.bin": (llmc(np.zeros(9, np.uint16), magic=20240801, version=7), "Llama 3's tokens"),
  "model.bin": (llmc(np.zeros(9, np.uint16), magic=20240326), "a model's weights"),
  "empty.bin": (b"", "no document"),
  "no.npy": (b"text", "cannot be read as .npy"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_a_file_of_no_tokens_is_one_line(tmp_path, name):
  content, message = BAD_TOKENS[name]
  path = write_file(tmp_path, name, content)
  with pytest.raises(ValueError) as error:
    token_documents(str(path), "train", Characters("ab"))
  assert message in one_line(error)


def test_arrays_that_are_no_tokens_are_refused(tmp_path):
  arrays = {"a": np.zeros((2, 2), np.uint16), "b": np.zeros(3), "c": np.array([{}], object)}
  for name, array in arrays.items():
    np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(ValueError) as error:
      token_documents(f"{tmp_path}/{name}.npy", "train", Characters("ab"))
    assert "npy" in one_line(error)


def test_tokens_beyond_the_vocabulary_are_counted_and_placed(tmp_path):
  tokens = np.array([0, 1, 0, 2, 9], np.uint16)
  path = write_file(tmp_path, "a.bin", tokens.tobytes())
  with pytest.raises(ValueError) as error:
    token_documents(str(path), "train", Characters("ab"))
  assert f"2 ids are beyond the tokenizer's 2, the first: {path} has id 2 at token 3" in str(
    error.value
  )


def test_a_stream_that_is_not_compressed_is_read_as_it_is(tmp_path):
  path = write_file(tmp_path, "a.txt", b"gz")
  with open_decompressed(str(path)) as file:
    assert file.read() == b"gz"
