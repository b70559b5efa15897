# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from gpt2_jax.batch import Batch
from gpt2_jax.compat import get_mesh
from gpt2_jax.data import corpus, zarr_files
from gpt2_jax.data.example_records import MAX_LABELS, write_record
from gpt2_jax.data.examples import ExampleStore, unpack
from gpt2_jax.data.pack_examples import encode_examples
from gpt2_jax.data.poisson import PADDING, PoissonExamples
from gpt2_jax.data.stores import open_store, open_stores
from gpt2_jax.data.templates import CHAT, DIALOGPT, PLAIN, ExampleEncoder
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.validation import validation_loss
from gpt2_jax.tokenizer import HuggingFace, from_json

N_CTX = 16
SOURCE = {"kind": "list"}
# A byte-level vocabulary without merges: each ASCII character is a token, and 95 ends a text.
VOCAB = {chr(i): i - 32 for i in range(33, 127)} | {"\u0120": 0, "<|endoftext|>": 95, "\u010a": 96}
TOKENIZER = HuggingFace.from_merges(VOCAB, [])
EOT = 95
CHARACTERS = "abcdefghij"


def ids(text: str) -> list[int]:
  return [{"\n": 96, "|": EOT}.get(c, ord(c) - 32) for c in text]


def records(n: int, seed: int = 0) -> list[dict]:
  """Prompts and completions of 1 to 9 characters each: with their end they may be cut."""
  rng = np.random.default_rng(seed)
  texts = ["".join(rng.choice(list(CHARACTERS), rng.integers(1, 10))) for _ in range(2 * n)]
  return [{"prompt": p, "completion": c} for p, c in zip(texts[:n], texts[n:], strict=True)]


def write(path, rows: list[dict], template=PLAIN, loss="responses", **options) -> ExampleStore:
  documents = [write_record(row, f"a.jsonl:{i}") for i, row in enumerate(rows, 1)]
  encoder = ExampleEncoder(template, options.pop("tokenizer", TOKENIZER), loss)
  options = {"n_ctx": N_CTX, "processes": 1, "source": SOURCE} | options
  return encode_examples(documents, encoder, str(path), **options)


def examples_of(batch: Batch) -> list[tuple]:
  """Each segment with a weight: its tokens, and which of them are scored."""
  found = []
  for tokens, weights, segments in zip(
    batch.tokens_BT, batch.weights_BT, batch.segments_BT, strict=True
  ):
    scored = np.concatenate([[0], weights])[:-1]
    for segment in range(segments.max() + 1):
      inside = segments == segment
      if scored[inside].any():
        found.append((tuple(tokens[:-1][inside].tolist()), tuple(scored[inside].tolist())))
  return found


def contents(folder) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def one_line(error) -> str:
  text = str(error.value)
  assert "\n" not in text and len(text) < 600
  return text


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ExampleStore:
  return write(tmp_path_factory.mktemp("stores") / "pairs", records(40), examples_per_part=16)


def sharding(shape: tuple[int, int, int], *spec) -> NamedSharding:
  return NamedSharding(jax.make_mesh(shape, ("replica", "data", "model")), PartitionSpec(*spec))


def test_the_loss_mask_of_three_examples_by_hand(tmp_path):
  """A prompt with its completion, a dialogue of three turns, a text."""
  turns = [("user", "hi"), ("assistant", "yo"), ("user", "so")]
  rows = [
    {"prompt": "ab", "completion": "cd"},
    {"messages": [{"role": role, "content": text} for role, text in turns]},
    {"text": "xyz"},
  ]
  # <|endoftext|> is written as |. Under each input token: is what follows it scored?
  batch = write(tmp_path / "s", rows, DIALOGPT, n_ctx=20).read_rows(np.array([0]))
  assert batch.tokens_BT[0].tolist() == ids("ab|cd|hi|yo|so|xyz|") + [0, 0]
  expected = {
    #           ab|cd|hi|yo|so|xyz|.
    "weights": "00111000111000011100",
    "segments": "00000011111111122223",
    "positions": "01234501234567801230",
  }
  assert "".join(str(int(w)) for w in batch.weights_BT[0]) == expected["weights"]
  assert "".join(map(str, batch.segments_BT[0])) == expected["segments"]
  assert "".join(map(str, batch.positions_BT[0])) == expected["positions"]


def test_all_but_the_first_token_of_each_example_is_scored(tmp_path):
  store = write(tmp_path / "s", [{"prompt": "ab", "completion": "cd"}, {"text": "xyz"}], loss="all")
  batch = store.read_rows(np.array([0]))
  assert batch.tokens_BT[0].tolist() == ids("abcd|xyz|") + [0] * 8
  assert "".join(str(int(w)) for w in batch.weights_BT[0]) == "1111011100000000"
  assert store.manifest["scored"] == 7


def test_every_example_is_in_the_store_once_with_its_mask(store):
  expected = []
  for row in records(40):
    tokens = ids(row["prompt"] + row["completion"]) + [EOT]
    scored = [0.0] * len(row["prompt"]) + [1.0] * (len(row["completion"]) + 1)
    front = min(max(0, len(tokens) - N_CTX), len(row["prompt"]) - 1)
    expected.append((tuple(tokens[front:][:N_CTX]), tuple(scored[front:][:N_CTX])))
  rows = store.read_rows(np.arange(store.manifest["rows"]))
  assert sorted(examples_of(rows)) == sorted(expected)

  counts = store.manifest
  assert counts["examples"] == 40 and counts["example_tokens"] == sum(len(e[0]) for e in expected)
  assert counts["scored"] == sum(sum(e[1]) for e in expected)
  lost = sum(len(r["prompt"] + r["completion"]) + 1 for r in records(40)) - counts["example_tokens"]
  assert counts["cut_tokens"] == lost > 0 and counts["cut"] > 0
  assert store.padding == pytest.approx(1 - counts["example_tokens"] / len(store))


def test_the_store_takes_at_most_a_byte_a_token_more(store):
  for part, entry in store.manifest["parts"].items():
    marks = zarr_files.open_arrays(store.path, {f"marks-{part[5:]}": entry["tokens"]}, "uint8", 0)
    assert marks[0].shape == (entry["tokens"],) and marks[0].dtype.name == "uint8"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
def test_segments_positions_and_weights_of_any_row(rows):
  """Against a loop over the examples of each row, whose lengths are drawn; then comes padding."""
  T = max(map(sum, rows)) + 1
  tokens = np.arange(1, len(rows) * T + 1, dtype=np.uint16).reshape(len(rows), T)
  marks = np.zeros(tokens.shape, np.uint8)
  expected = np.zeros((3, *tokens.shape), int)
  for row, lengths in enumerate(rows):
    start = 0
    for segment, length in enumerate([*lengths, T - sum(lengths)]):
      marks[row, start : start + length] = 1
      marks[row, start] = 2
      for time in range(length):
        is_predicted = time < length - 1
        expected[:, row, start + time] = is_predicted, segment, time
      start += length
  batch = unpack(tokens, marks, has_labels=False)
  np.testing.assert_array_equal(batch.weights_BT, expected[0])
  np.testing.assert_array_equal(batch.segments_BT, expected[1])
  np.testing.assert_array_equal(batch.positions_BT, expected[2])
  np.testing.assert_array_equal(batch.tokens_BT[:, :-1], tokens)


@pytest.mark.parametrize("loss", ["responses", "all"])
def test_the_first_token_of_an_example_is_no_label_of_the_one_before(tmp_path, loss):
  """And it is not counted, also where it is the first because those before it were cut."""
  turns = [{"role": "assistant", "content": "abcdefghij"}, {"role": "assistant", "content": "kl"}]
  rows = [*records(40), {"messages": turns}]
  store = write(tmp_path / "s", rows, DIALOGPT, loss, n_ctx=12)
  assert store.manifest["cut"] > 5
  batch = store.read_rows(np.arange(store.manifest["rows"]))
  is_last = np.diff(batch.segments_BT, axis=1) != 0
  assert is_last.sum() > 10
  assert not batch.weights_BT[:, :-1][is_last].any() and not batch.weights_BT[:, -1].any()
  assert batch.weights_BT.sum() == store.manifest["scored"]


def test_packed_rows_are_scored_as_each_example_alone(tmp_path, mesh, parameters, place):
  """Sums of nats and of tokens, by the objective of training; and the validation loss of a run."""
  config = ModelConfig(n_vocab=97, n_ctx=N_CTX, n_embd=16, n_head=2, n_layer=2, dtype="float32")
  store = write(tmp_path / "s", records(9))
  objective = jax.jit(NextToken())
  with mesh(1, 1, 1):
    model = place(config, parameters(config))
    rows = store.read_rows(np.arange(store.manifest["rows"]))
    packed = objective(model, jax.tree.map(jax.numpy.asarray, rows))
    alone = np.zeros(2)
    for tokens, scored in examples_of(rows):
      row = np.zeros((1, N_CTX + 1), np.int32)
      row[0, : len(tokens)] = tokens
      weights = np.zeros((1, N_CTX), np.float32)
      weights[0, : len(tokens) - 1] = scored[1:]
      sums = objective(model, Batch(row, weights))
      alone += float(sums["nats"]), float(sums["tokens"])
    mean = validation_loss(model, NextToken(), store, 1, 0)
  assert mean == pytest.approx(alone[0] / alone[1], rel=1e-5)
  assert len(examples_of(rows)) == 9 > store.manifest["rows"]
  assert float(packed["tokens"]) == alone[1] == store.manifest["scored"]
  assert float(packed["nats"]) == pytest.approx(alone[0], rel=1e-5)


def test_an_example_loses_its_front_and_then_the_end_of_its_last_response(tmp_path):
  rows = [
    {"prompt": "abcdef", "completion": "gh"},  # 9 tokens with its end: the front goes
    {"prompt": "ab", "completion": "cdefghij"},  # 11: all of the prompt but a token, then the end
    {"text": "abcdefghij"},  # 11: the end
    {"text": "abcdefghij", "label": 1},  # the last token stays
  ]
  batch = write(tmp_path / "s", rows, n_ctx=6).read_rows(np.arange(4))
  assert sorted(e[0] for e in examples_of(batch)) == sorted(
    tuple(ids(text)) for text in ("defgh|", "bcdefg", "abcdef", "abcde|")
  )
  counts = ExampleStore.open(str(tmp_path / "s")).manifest
  assert (counts["cut"], counts["cut_tokens"]) == (4, 3 + 5 + 5 + 5)


def test_labels_lie_at_the_last_tokens(tmp_path):
  labels = [0, 1, 62, 63, 64, MAX_LABELS - 1, None]
  rows = [{"text": "ab" * (i + 1)} | {"label": label} for i, label in enumerate(labels)]
  store = write(tmp_path / "s", rows, n_ctx=24)
  batch = store.read_rows(np.arange(store.manifest["rows"]))
  at = np.nonzero(batch.extras["labels_BT"] >= 0)
  assert set(batch.tokens_BT[:, :-1][at]) == {EOT}
  lengths = batch.positions_BT[at] + 1
  found = dict(zip(lengths.tolist(), batch.extras["labels_BT"][at].tolist(), strict=True))
  assert found == {2 * i + 3: label for i, label in enumerate(labels[:-1])}
  assert store.n_classes == MAX_LABELS and store.manifest["labelled"] == 6


def test_a_batch_is_a_pure_function_of_seed_and_step(store):
  """An epoch is every row once; seeds differ; another store object gives the same."""
  n_rows = store.manifest["rows"]
  source = store.batches(N_CTX, 4, seed=3)
  assert source.n_rows == n_rows
  steps = 3 * n_rows // 4
  order = np.concatenate([source.windows_at(step) for step in range(steps)])
  for epoch in range(2):
    assert sorted(order[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))
  again = open_store(store.path).batches(N_CTX, 4, seed=3)
  np.testing.assert_array_equal(again.rows(5, 1, 3), source.rows(5, 0, 4)[1:3])
  assert store.batches(N_CTX, 4, seed=4).windows_at(0).tolist() != order[:4].tolist()


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_the_mesh_has_no_say_in_the_batches(store, shape):
  source = store.batches(N_CTX, 8, seed=5)
  spec = sharding(shape, None, ("replica", "data"), None)
  calls = list(source.prefetch(2, 7, 2, spec))
  assert [len(call.tokens_BT) for call in calls] == [2, 2, 1]
  for leaf in ("tokens_BT", "weights_BT", "segments_BT", "positions_BT"):
    arrays = [getattr(call, leaf) for call in calls]
    assert all(array.sharding == spec for array in arrays)
    steps = [getattr(store.read_rows(source.windows_at(step)), leaf) for step in range(2, 7)]
    np.testing.assert_array_equal(np.concatenate(arrays), steps)
    assert arrays[0].dtype == steps[0].dtype


@pytest.mark.parametrize("max_rows", [None, 5])
def test_an_evaluation_scores_every_row_once(store, max_rows):
  spec = sharding((1, 8, 1), ("replica", "data"), None)
  n_rows = min(store.manifest["rows"], max_rows or 1000)
  assert n_rows % 8
  batches = list(store.evaluation_batches(N_CTX, 8, spec, max_rows))
  expected = store.read_rows(np.arange(n_rows))
  for leaf in ("tokens_BT", "weights_BT", "segments_BT"):
    rows = np.concatenate([getattr(batch, leaf) for batch in batches])
    np.testing.assert_array_equal(rows[:n_rows], getattr(expected, leaf))
  weights = np.concatenate([batch.weights_BT for batch in batches])
  assert weights.shape[0] % 8 == 0 and not weights[n_rows:].any()


def test_what_fills_up_an_evaluation_has_no_label(tmp_path):
  store = write(tmp_path / "s", [{"text": "abcdefghij", "label": i % 2} for i in range(5)])
  (batch,) = store.evaluation_batches(N_CTX, 8, sharding((1, 8, 1), ("replica", "data"), None))
  assert (np.asarray(batch.extras["labels_BT"]) >= 0).sum() == 5


def test_a_sample_continues_a_prompt(tmp_path):
  prompts = write(tmp_path / "a", [{"prompt": "abcde", "completion": "fgh"}])
  assert prompts.sample_prompt(2) == ids("abcde")
  assert write(tmp_path / "b", [{"text": "abcdefgh"}]).sample_prompt(2) == ids("ab")
  long = write(tmp_path / "c", [{"prompt": "abcdefghijabc", "completion": "f"}])
  assert long.sample_prompt(2) == ids("fghijabc")


def test_the_same_job_writes_the_same_bytes_and_repairs_what_is_damaged(tmp_path):
  rows = records(40)
  write(tmp_path / "a", rows, examples_per_part=16)
  before = contents(tmp_path / "a")
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  write(tmp_path / "b", rows, examples_per_part=16)
  assert contents(tmp_path / "b") == before

  # Two processes write the same. What is gone, or was changed, is written again.
  write(tmp_path / "c", rows, examples_per_part=16, processes=2)
  assert contents(tmp_path / "c") == before
  for damage in ("manifest.json", "part-00001.json", "marks-00001/c/0", "part-00000/c/0"):
    path = tmp_path / "b" / damage
    if damage.endswith(".json"):
      path.unlink()
    else:
      content = bytearray(path.read_bytes())
      content[3] ^= 1
      path.write_bytes(content)
      with pytest.raises(ValueError, match="1 of 3 parts are damaged"):
        ExampleStore.open(str(tmp_path / "b")).verify()
    write(tmp_path / "b", rows, examples_per_part=16)
    assert contents(tmp_path / "b") == before, damage


def test_another_loss_template_or_row_is_another_job(store, tmp_path):
  shutil.copytree(store.path, tmp_path / "s")
  before = contents(tmp_path / "s")
  for change, name in (
    ({"loss": "all"}, "its loss is"),
    ({"template": CHAT}, "its template's"),
    ({"n_ctx": 20}, "its n_ctx is 16, this one's 20"),
  ):
    with pytest.raises(ValueError, match="holds another job") as error:
      write(tmp_path / "s", records(40), examples_per_part=16, **change)
    assert name in one_line(error)
  assert contents(tmp_path / "s") == before


def test_a_store_says_what_it_holds(store, tmp_path):
  text = encode_corpus(["ab" * 30], TOKENIZER, str(tmp_path / "text"), SOURCE, 1)
  assert isinstance(open_store(store.path), ExampleStore)
  assert type(open_store(text.path)) is TokenStore
  for kind, path in ((TokenStore, store.path), (ExampleStore, text.path)):
    with pytest.raises(ValueError, match="format .* this version reads"):
      kind.open(path)
  (tmp_path / "t.json").write_text(json.dumps(TOKENIZER.to_json()))
  train, validation, _ = open_stores(store.path, text.path, str(tmp_path / "t.json"), 97)
  assert (type(train), type(validation)) == (ExampleStore, TokenStore)


def test_rows_longer_than_the_context_are_refused_and_shorter_ones_are_not(store):
  with pytest.raises(ValueError, match="rows of 16 tokens, the context is 8; .* --n_ctx=8"):
    store.batches(8, 4, 0)
  with pytest.raises(ValueError, match="rows of 16 tokens, the context is 8; .* --n_ctx=8"):
    store.evaluation_batches(8, 8, sharding((1, 8, 1), ("replica", "data"), None))
  assert store.batches(32, 4, 0).rows(0, 0, 4).shape == (4, N_CTX + 1)


def test_a_damaged_manifest_is_one_line(store, tmp_path):
  shutil.copytree(store.path, tmp_path / "s")
  path = tmp_path / "s" / "manifest.json"
  original = json.loads(path.read_text())
  parts = original["parts"]
  wrong_rows = {"part-00000": parts["part-00000"] | {"rows": 1}}
  no_hash = {"part-00000": {k: v for k, v in parts["part-00000"].items() if k != "marks_sha256"}}
  for change in (
    {"n_ctx": None},
    {"n_ctx": True},
    {"n_ctx": 1},
    {"rows": -1},
    {"scored": original["scored"] + 1},
    {"parts": parts | wrong_rows},
    {"parts": parts | no_hash},
  ):
    path.write_text(json.dumps(original | change))
    with pytest.raises(ValueError, match=r"manifest\.json") as error:
      open_store(str(tmp_path / "s"))
    one_line(error)


BAD = [
  ({"prompt": "a", "completion": ""}, "no scored token: there is no response with a text"),
  ({"text": ""}, "no scored token"),
  ({"messages": [{"role": "user", "content": "a"}]}, "no scored token"),
  (
    {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
    "no scored token",
  ),
  (
    {"messages": [{"role": "tool", "content": "a"}]},
    "a role 'tool', and template plain knows system, user, assistant",
  ),
  ({"messages": []}, "an empty list under 'messages'"),
  ({"messages": "a"}, "a str under 'messages'"),
  ({"messages": [{"role": "user"}]}, "no message as item 1 of 'messages'"),
  (
    {"prompt": "a"},
    "no text, no prompt with completion, no messages, and no 'assistant' of template "
    "plain (of prompt)",
  ),
  ({"prompt": "a", "completion": ["b"]}, "a str under 'prompt'"),
  ({"text": 5}, "no text"),
  ({}, "(of no field)"),
  ({"text": "ab", "label": "good"}, "has the label 'good'; labels are numbers from 0 to 4094"),
  ({"text": "ab", "label": True}, "has the label 'True'"),
  ({"text": "ab", "label": 4095}, "has the label '4095'"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_what_is_no_example_is_counted_and_the_first_is_named_and_nothing_is_written(
  tmp_path, record, message
):
  rows = [{"text": "ab"}, record, {"text": "cd"}, {"x" * 5000: 1}]
  with pytest.raises(
    ValueError, match="2 of 4 examples cannot be used; the first: a.jsonl:2 "
  ) as e:
    write(tmp_path / "s", rows)
  assert message in one_line(e)
  assert not list(tmp_path.iterdir())


def test_examples_are_read_from_files(tmp_path):
  """Lines of .jsonl, an item of a list in a .json; what is no record is skipped and counted."""
  pairs = [{"prompt": "ab", "completion": "cd"}, {"text": "ef"}]
  (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, pairs), "no json", ""]))
  (tmp_path / "b.json").write_text(json.dumps([pairs[0] | {"prompt": "x"}, 3]))
  documents = corpus.file_documents(
    f"{tmp_path}/a.jsonl,{tmp_path}/b.json", text_key=None, data_dir=str(tmp_path / "prepared")
  )
  assert documents.skipped.count == 2 and len(documents) == 3
  places = sorted(json.loads(document)[0] for document in documents)
  assert places == ["a.jsonl:1", "a.jsonl:2", "b.json, item 1"]
  encoder = ExampleEncoder(PLAIN, TOKENIZER)
  store = encode_examples(
    documents, encoder, str(tmp_path / "s"), documents.source, N_CTX, 1, skipped=documents.skipped
  )
  assert store.manifest["examples"] == 3 and store.skipped.count == 2

  (tmp_path / "c.txt").write_text("text")
  with pytest.raises(ValueError, match=r"c\.txt holds no examples"):
    corpus.file_documents(f"{tmp_path}/c.txt", text_key=None, data_dir=str(tmp_path / "prepared"))


def test_a_store_in_a_bucket_is_the_one_on_disk(tmp_path, store, bucket):
  remote = write("gs://bucket/pairs", records(40), examples_per_part=16)
  assert remote.manifest == store.manifest
  rows = np.array([[0, 3], [5, 1]])
  for ours, theirs in zip(
    jax.tree.leaves(remote.read_rows(rows)), jax.tree.leaves(store.read_rows(rows)), strict=True
  ):
    assert ours.shape[:2] == (2, 2)
    np.testing.assert_array_equal(ours, theirs)


def test_the_tokenizer_of_a_store_is_its_own(store):
  assert store.tokenizer.fingerprint == TOKENIZER.fingerprint
  assert from_json(store.manifest["tokenizer"]).encode("ab") == ids("ab")


def test_examples_may_have_a_row_each_and_are_drawn_by_poisson_sampling(tmp_path, mesh):
  """Each row is one example, as in the file; what is not drawn has no weight and no label."""
  rows = [{**record, "label": i % 3} for i, record in enumerate(records(20))]
  store = write(tmp_path / "alone", rows, packed=False)
  assert store.manifest["rows"] == store.manifest["examples"] == 20
  batch = store.read_rows(np.arange(20))
  assert (batch.segments_BT.max(1) <= 1).all(), "an example, and padding"
  packed = write(tmp_path / "packed", rows)
  packed = packed.read_rows(np.arange(packed.manifest["rows"]))
  assert sorted(examples_of(batch)) == sorted(examples_of(packed))

  sampled = PoissonExamples(store, N_CTX, 16, 3, 5)
  with mesh(1, 4, 1):
    sharding = NamedSharding(get_mesh(), PartitionSpec(None, ("replica", "data"), None))
    (batch,) = sampled.prefetch(2, 3, 1, sharding)
    drawn = sampled.windows_at(2)
    is_real = drawn != PADDING
    tokens_BT, weights_BT = np.asarray(batch.tokens_BT[0]), np.asarray(batch.weights_BT[0])
    labels_BT = np.asarray(batch.extras["labels_BT"][0])
  assert 0 < is_real.sum() < 16
  np.testing.assert_array_equal(tokens_BT[is_real], store.read_rows(drawn[is_real]).tokens_BT)
  assert (weights_BT.any(1) == is_real).all()
  assert ((labels_BT >= 0).any(1) == is_real).all()


def test_packed_rows_are_refused_for_private_training(tmp_path):
  store = write(tmp_path / "packed", records(20))
  with pytest.raises(ValueError, match="has 20 examples packed into .* with --nopack$"):
    PoissonExamples(store, N_CTX, 16, 3, 5)
