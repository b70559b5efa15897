# SPDX-License-Identifier: Apache-2.0
"""Bad inputs of converting, of sampling and of the console: one line, and nothing lost."""

import pytest

from tests.launch.bad_inputs import fixtures
from tests.launch.bad_inputs.fixtures import FEW, NOBODY
from tests.launch.bad_inputs.runner import FIRST_TEXT, check, rows

# What is no checkpoint: its name, what the error says, and the path.
CHECKPOINTS = [
  ("one that is not there", "gone", "./gone"),
  ("a name that is none", "gtp2", "gtp2"),
  ("an empty name", "--from", ""),
  ("a repository of the Hub", "owner/model", "owner/model"),
  ("one of nobody", "nobody_of_this_name", f"{NOBODY}/model"),
  ("one on s3", "s3://", "s3://bucket/model"),
  ("one without a bucket", "gs://", "gs://"),
  ("a text", "story.txt", "story.txt"),
  ("an empty folder", "hollow", "hollow"),
  ("a store", "train", "train"),
  *((f"a config.json: {x}", "config.json", f"hf-config-{x}") for x in fixtures.SHAPES),
  *((f"a tokenizer.json: {x}", f"tokenizer-{x}", f"hf-tokenizer-{x}") for x in fixtures.SHAPES),
  ("another type of model", "llama", "hf-type"),
  ("more layers than tensors", "hf-layers", "hf-layers"),
  ("heads that do not divide", "n_head", "hf-heads"),
  ("a number in words", "two", "hf-words"),
  ("a width below zero", "n_embd", "hf-negative"),
  ("layers past memory", "hf-huge", "hf-huge"),
  ("an activation that is none", "relu", "hf-gelu"),
  ("another epsilon", "layer_norm_epsilon", "hf-eps"),
  ("an object for a number", "n_layer", "hf-nested"),
  ("half of the weights", "model.safetensors", "hf-cut"),
  ("more than the weights", "model.safetensors", "hf-long"),
  ("garbage for weights", "model.safetensors", "hf-garbage"),
  ("no weights", "hf-no-weights", "hf-no-weights"),
  ("an index that is a list", "index", "hf-index-list"),
  ("an index that is deep", "index", "hf-index-deep"),
  ("an index out of the folder", "outside", "hf-index-outside"),
  ("a vocabulary that is none", "hf-vocab", "hf-vocab"),
  ("half of a ckpt.pt", "ckpt.pt", "nano-cut"),
  ("code in a ckpt.pt", "ckpt.pt", "nano-pickle"),
  ("text as ckpt.pt", "ckpt.pt", "nano-text"),
  ("a flipped bit in a ckpt.pt", "ckpt.pt", "nano-flipped"),
  ("an llm.c file cut short", "cut.bin", "cut.bin"),
  ("an llm.c file too long", "long.bin", "long.bin"),
  ("half of an llm.c header", "head.bin", "head.bin"),
  ("another version of llm.c", "99", "version.bin"),
  ("an llm.c size below zero", "negative.bin", "negative.bin"),
  ("an llm.c size past memory", "huge.bin", "huge.bin"),
  ("an empty file", "nothing.bin", "nothing.bin"),
  ("OpenAI's without sizes", "hparams.json", "openai"),
  ("OpenAI's with deep sizes", "hparams.json", "openai-deep"),
  ("OpenAI's with a damaged index", "openai-index", "openai-index"),
  ("a workdir without a checkpoint", "run-none", "run-none"),
  ("a run with other layers", "checkpoint", "run-layers"),
  ("a run with other heads", "checkpoint", "run-heads"),
  ("a run with another context", "checkpoint", "run-context"),
  ("a run with another GELU", "checkpoint", "run-gelu"),
  ("a run with a width in words", "run-width", "run-width"),
  ("a run with a knob too many", "run-knob", "run-knob"),
  ("a run whose arrays are gone", "run-manifest", "run-manifest"),
  ("a run of another step", "9", "run-renamed"),
  *((f"a run with metadata: {x}", f"run-about-{x}", f"run-about-{x}") for x in fixtures.SHAPES),
  *((f"a run with checksums: {x}", f"run-sums-{x}", f"run-sums-{x}") for x in fixtures.SHAPES),
]

CONVERTS = rows(
  "convert",
  "",
  [
    ("to Hugging Face", None, "--from=run --to=new"),
    (
      "to a parent that is made",
      None,
      "--from=hf --to=new/parent/nano --format=nanogpt --other_gelu",
    ),
    ("to a home", None, "--from=hf --to=~/new --format=orbax"),
    ("the same model", None, "--verify=hf --against=llm.bin"),
    ("a deflated ckpt.pt", None, "--verify=nano-deflated --against=nano"),
    *((name, says, ["--to=new", f"--from={path}"]) for name, says, path in CHECKPOINTS),
    ("no flags", "--from", ""),
    ("nowhere to write", "--to", "--from=hf"),
    ("an empty place", "--to", "--from=hf --to="),
    ("nothing to convert", "--from", "--to=new"),
    ("both verbs", "--verify", "--from=hf --to=new --verify=hf"),
    ("onto a file", "text.txt", "--from=hf --to=text.txt"),
    ("onto a folder", "hollow", "--from=hf --to=hollow"),
    ("onto itself", "hf", "--from=hf --to=hf"),
    ("below a file", "text.txt", "--from=hf --to=text.txt/new"),
    ("into /proc", "/proc", "--from=hf --to=/proc/new"),
    ("to nobody", "nobody_of_this_name", f"--from=hf --to={NOBODY}/new"),
    ("to s3", "s3://", "--from=hf --to=s3://bucket/new"),
    ("folders to a bucket", "gs://", "--from=hf --to=gs://bucket/new"),
    ("a name of 300 letters", "name too long", f"--from=hf --to={'x' * 300}"),
    ("a format that is none", "openai", "--from=hf --to=new --format=openai"),
    ("a dtype that is none", "int8", "--from=hf --to=new --dtype=int8"),
    ("llm.c in float16", "float16", "--from=hf --to=new --format=llmc --dtype=float16"),
    ("a run in bfloat16", "bfloat16", "--from=hf --to=new --format=orbax --dtype=bfloat16"),
    ("nanoGPT with another GELU", "gelu", "--from=hf --to=new --format=nanogpt"),
    ("a GELU of what states its own", "gelu", "--from=hf --to=new --gelu=erf"),
    ("a GELU of a run", "gelu", "--from=run --to=new --gelu=erf"),
    ("a GELU that is none", "relu", "--from=nano --to=new --gelu=relu"),
    ("a GELU to verify", "--gelu", "--verify=nano --against=hf --gelu=tanh"),
    ("a revision of a path", "revision", "--from=hf --to=new --revision=main"),
    ("a flag misspelled", "formt", "--from=hf --to=new --formt=hf"),
    ("a word", "extra", "--from=hf --to=new extra"),
    ("nothing to compare with", "--against", "--verify=hf"),
    ("two to compare with", "--logits", "--verify=hf --against=hf --logits=logits.npz"),
    ("logits that are not there", "gone.npz", "--verify=hf --logits=gone.npz"),
    ("logits that are text", "story.txt", "--verify=hf --logits=story.txt"),
    ("logits that are a pickle", "pickle.npz", "--verify=hf --logits=pickle.npz"),
    ("logits of other names", "other.npz", "--verify=hf --logits=other.npz"),
    ("logits of another shape", "shape.npz", "--verify=hf --logits=shape.npz"),
    ("text with logits", "--text", "--verify=hf --logits=shape.npz --text=story.txt"),
    ("text that is not there", "gone.txt", "--verify=hf --against=hf --text=gone.txt"),
    ("text that is not UTF-8", "bytes.txt", "--verify=hf --against=hf --text=bytes.txt"),
    ("text that is empty", "empty.txt", "--verify=hf --against=hf --text=empty.txt"),
    ("text of other characters", "'é'", "--verify=hf --against=hf --text=accents.txt"),
    (
      "text without a tokenizer",
      "tokenizer",
      "--verify=hf-no-tokenizer --against=hf --text=story.txt",
    ),
    ("a tolerance of nan", "tolerance", "--verify=hf --against=hf --tolerance=nan"),
    ("a tolerance below zero", "tolerance", "--verify=hf --against=hf --tolerance=-1"),
    ("a result that is there", "text.txt", "--verify=hf --against=hf --out=text.txt"),
    ("a result below a file", "text.txt", "--verify=hf --against=hf --out=text.txt/parity.json"),
    (
      "a result of nobody",
      "nobody_of_this_name",
      f"--verify=hf --against=hf --out={NOBODY}/p.json",
    ),
    ("an empty result", "empty", "--verify=hf --against=hf --out="),
    ("an oracle that is none", "torch", "--verify=hf --against=hf --oracle=torch"),
    ("a revision to verify", "--revision", "--verify=hf --against=hf --revision=main"),
    ("verifies a damaged one", "hf-cut", "--verify=hf-cut --against=hf"),
    ("verifies against a damaged one", "hf-cut", "--verify=hf --against=hf-cut"),
  ],
)

SAMPLE = "--model=hf --n_new=4"
ONCE = f"{SAMPLE} --prompt=Once"
SAMPLES = rows(
  "sample",
  "",
  [
    ("a text", None, f"{SAMPLE} --prompt=Once"),
    ("the default of tokens on a short context", None, "--model=hf --prompt=Once"),
    ("texts of a run", None, "--model=run --n_new=4 --prompt=Once --prompt=Twice --samples=2"),
    *((name, says, ["--n_new=4", f"--model={path}"]) for name, says, path in FEW),
    ("no model", "--model", ""),
    ("a step of what is no run", "step", f"{ONCE} --step=3"),
    ("a step that was not saved", "3", "--model=run --n_new=4 --step=3"),
    ("a step below zero", "-1", "--model=run --n_new=4 --step=-1"),
    ("a step in words", "last", "--model=run --n_new=4 --step=last"),
    ("an empty step", "step", "--model=run --n_new=4 --step="),
    ("a revision of a path", "revision", f"{ONCE} --revision=main"),
    ("a dtype that is none", "float8", f"{ONCE} --dtype=float8"),
    ("a quantization that is none", "int3", f"{ONCE} --quantize=int3"),
    ("no samples", "samples", f"{ONCE} --samples=0"),
    ("samples in words", "many", f"{ONCE} --samples=many"),
    ("a weight of nan", "nan", "--model=hf-nan --n_new=4 --prompt=Once"),
    ("a weight of inf", "weights", "--model=hf-inf --n_new=4 --prompt=Once"),
    ("a weight of nan, greedily", "nan", "--model=hf-nan --n_new=4 --prompt=Once --greedy"),
    ("a weight of nan in two texts", "nan", "--model=hf-nan --n_new=4 --prompt=Once --samples=2"),
    ("no tokenizer", "tokenizer", "--model=hf-no-tokenizer --n_new=4"),
    ("no tokens", "new", "--model=hf --n_new=0 --prompt=Once"),
    ("tokens below zero", "new", "--model=hf --n_new=-5 --prompt=Once"),
    ("tokens in words", "many", "--model=hf --n_new=many"),
    ("more tokens than the context", "33", "--model=hf --n_new=33 --prompt=O"),
    ("more tokens than memory", "n_new", "--model=hf --n_new=100000000 --prompt=O"),
    ("a prompt longer than the context", "32", f"{SAMPLE} --prompt='{'long ' * 20}'"),
    ("a character that is none", "'ü'", f"{SAMPLE} --prompt=für"),
    ("a byte that is no character", "not valid Unicode", [*SAMPLE.split(), "--prompt=a\udcff"]),
    ("a prompt of nothing", "prompt", f"{SAMPLE} --prompt="),
    ("a special token that is none", "special tokens", f"{ONCE} --special='<|user|>'"),
    ("no special token", "special tokens", f"{ONCE} --special="),
    ("a message of a chat", None, f"{ONCE} --template=dialogpt"),
    ("no message of a chat", "--prompt", f"{SAMPLE} --template=dialogpt"),
    ("a template that is none", "dialogpt", f"{ONCE} --template=nothing"),
    ("an empty template", "dialogpt", f"{ONCE} --template="),
    ("a template that is not there", "gone.json", f"{ONCE} --template=gone.json"),
    ("a template of other tokens", "im_start", f"{ONCE} --template=chatml"),
    ("an answer of a recipe", None, f"{ONCE} --recipe=chat"),
    ("a recipe of fields", None, f"{SAMPLE} --recipe=chat --field=user=Once"),
    ("no message of a recipe", "--prompt", f"{SAMPLE} --recipe=chat"),
    ("a recipe that is none", "did you mean chat?", f"{ONCE} --recipe=chart"),
    ("a recipe beside a template", "leave out --template", f"{ONCE} --recipe=chat --template=chat"),
    ("a field that is none", "of a --recipe", f"{ONCE} --recipe=chat --field=mood=glad"),
    ("a field of no template", "there is none", f"{ONCE} --field=mood=glad"),
    ("a backward model without a chat", "--reverse", f"{ONCE} --reverse=hf"),
    ("answers by the backward model", None, f"{ONCE} --recipe=chat --reverse=hf --candidates=2"),
    (
      "a backward model that is gone",
      "gone",
      f"{ONCE} --recipe=chat --reverse=./gone --candidates=2",
    ),
    ("a weight beyond one", "reverse_weight", f"{ONCE} --recipe=chat --reverse_weight=2"),
    ("a template beside special tokens", "special", f"{ONCE} --template=tldr --special=all"),
    ("temperature below zero", "temperature", f"{ONCE} --temperature=-1"),
    ("temperature of nan", "temperature", f"{ONCE} --temperature=nan"),
    ("temperature of inf", "temperature", f"{ONCE} --temperature=inf"),
    ("top_k of zero", "top", f"{ONCE} --top_k=0"),
    ("top_k below zero", "top", f"{ONCE} --top_k=-3"),
    ("top_p of zero", "top", f"{ONCE} --top_p=0"),
    ("top_p above one", "top", f"{ONCE} --top_p=1.5"),
    ("top_p of nan", "top", f"{ONCE} --top_p=nan"),
    ("min_p above one", "min", f"{ONCE} --min_p=2"),
    ("typical of zero", "typical", f"{ONCE} --typical=0"),
    ("repetition of zero", "repetition", f"{ONCE} --repetition=0"),
    ("frequency of nan", "frequency", f"{ONCE} --frequency=nan"),
    ("presence of inf", "presence", f"{ONCE} --presence=inf"),
    ("a run of no tokens", "repeat", f"{ONCE} --no_repeat=0"),
    ("an empty stop", "stop", f"{ONCE} --stop="),
    ("a window of zero", "window", f"{ONCE} --window=0"),
    ("a window of all", "32", f"{ONCE} --window=32"),
    ("a seed below zero", "seed", f"{ONCE} --seed=-1"),
    ("a seed past 64 bits", "seed", f"{ONCE} --seed=99999999999999999999"),
    ("a mesh larger than the devices", "3", f"{ONCE} --mesh_data=3"),
    ("a mesh of zero", "0", f"{ONCE} --mesh_model=0"),
    ("a flag misspelled", "promt", f"{SAMPLE} --promt=x"),
    ("a word", "Once", f"{ONCE} Once"),
  ],
)


def session(lines: str) -> str:
  """A session at the console: a text, the bad lines, and all texts at the end."""
  return f"{FIRST_TEXT}\n{lines}\n/history\n"


# Of each: a name, what the line says, and what is typed.
TYPED = [
  ("a text", None, "A line"),
  ("a command that is none", "/nothing", "/nothing"),
  ("a slash alone", "/help", "/"),
  ("no setting", "setting", "/set"),
  ("a setting that is none", "colour", "/set colour red"),
  ("a setting without a value", "top_k", "/set top_k"),
  ("top_k in words", "top_k", "/set top_k many"),
  ("top_k of zero", "top", "/set top_k 0"),
  ("top_p above one", "top", "/set top_p 1.5"),
  ("top_p of nan", "top", "/set top_p nan"),
  ("min_p below zero", "min", "/set min_p -1"),
  ("typical of zero", "typical", "/set typical 0"),
  ("temperature of nan", "temperature", "/set temperature nan"),
  ("repetition of zero", "repetition", "/set repetition 0"),
  ("frequency of inf", "frequency", "/set frequency inf"),
  ("a run of no tokens", "repeat", "/set no_repeat 0"),
  ("greedy of maybe", "greedy", "/set greedy maybe"),
  ("a seed below zero", "seed", "/set seed -1"),
  ("a seed past 64 bits", "seed", "/set seed 99999999999999999999"),
  ("a special token that is none", "special tokens", "/special <s>"),
  ("no tokens", "n_new", "/set n_new 0"),
  ("tokens below zero", "n_new", "/set n_new -3"),
  ("half a token", "n_new", "/set n_new 1.5"),
  ("a window of zero", "window", "/set window 0"),
  ("an empty file", "/save", "/save"),
  ("a file that is there", "text.txt", "/save text.txt"),
  ("a folder as file", "hollow", "/save hollow"),
  ("a file below a file", "text.txt", "/save text.txt/x"),
  ("a file of nobody", "nobody_of_this_name", f"/save {NOBODY}/x"),
  ("a file in /proc", "/proc", "/save /proc/x"),
  ("a character that is none", "'ü'", "für"),
  ("a prompt longer than the context", None, "long " * 20),
  ("a prompt of all of the context", None, "x" * 32),
]
CONSOLE = rows(
  "console",
  f"{SAMPLE} --interactive",
  [(name, says, [], session(typed)) for name, says, typed in TYPED]
  + [
    ("more of nothing", "no text", [], f"/more\n{FIRST_TEXT}\n/history\n"),
    ("the last of nothing", "no text", [], f"/again\n{FIRST_TEXT}\n/history\n"),
    ("bytes that are no text", "", [], session("a\udcffb")),
  ],
)

TABLE = [*CONVERTS, *SAMPLES, *CONSOLE]


@pytest.fixture(scope="module")
def ready(make, sandbox):
  """The sandbox with all that the rows name."""
  pytest.importorskip("torch")  # for nanoGPT's files
  fixtures.make_stores(make)
  fixtures.make_run(make)
  fixtures.make_checkpoints(make)
  fixtures.damage_runs(make)
  fixtures.damage_folders(make)
  fixtures.damage_files(make)
  fixtures.write_texts(make)
  fixtures.write_arrays(make)
  sandbox.seal()


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_bad_input_is_one_line_and_writes_nothing(row, ready, worker, sandbox):
  check(row, worker, sandbox)
