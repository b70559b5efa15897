# SPDX-License-Identifier: Apache-2.0
"""Bad inputs of training, of its plan and of its start on a cluster: one line, and nothing lost."""

import fcntl

import pytest

from tests.launch.bad_inputs import fixtures
from tests.launch.bad_inputs.runner import check, rows

SHAKESPEARE = "--config=configs/shakespeare.py --workdir=new"

COMMAND_LINES = rows(
  "train",
  "",
  [
    ("no flags", "is missing", ""),
    ("no workdir", "--workdir", "--config=configs/shakespeare.py"),
    ("no config", "--config", "--workdir=new"),
    ("a flag that is none", "wrokdir", f"{SHAKESPEARE} --wrokdir=x"),
    ("a word", "extra", f"{SHAKESPEARE} extra"),
    ("a flag without its value", "coordinator", f"{SHAKESPEARE} --coordinator"),
    ("a config that is not there", "gpt3.py", "--config=configs/gpt3.py --workdir=new"),
    ("an empty config", "empty", "--config= --workdir=new"),
    ("a folder as config", "configs", "--config=configs --workdir=new"),
    ("a config that is no Python", "bad/text.txt", "--config=bad/text.txt --workdir=new"),
    ("a size that is none", "117M", "--config=configs/gpt2.py:118M --workdir=new"),
    (
      "a recipe without its data",
      "no token store at data/story/train; write it: gpt2-jax tokenize --out=data/story/train",
      "--config=recipes/forkme:story --config.init_from=run --config.model.n_ctx=32 --workdir=new",
    ),
    ("a recipe that is none", "there are text, ", "--config=recipes/forkme:novel --workdir=new"),
    ("an empty size", "size", "--config=configs/gpt2.py: --workdir=new"),
    (
      "a size for a config without",
      "shakespeare",
      "--config=configs/shakespeare.py:117M --workdir=new",
    ),
    ("a config with a syntax error", "syntax.py", "--config=bad/syntax.py --workdir=new"),
    ("a config that raises", "raises.py", "--config=bad/raises.py --workdir=new"),
    ("a config that imports nothing", "no_such_module", "--config=bad/top.py --workdir=new"),
    ("a config that calls itself", "recursion", "--config=bad/recursion.py --workdir=new"),
    ("a config without get_config", "get_config", "--config=bad/nothing.py --workdir=new"),
    ("a config of None", "none.py", "--config=bad/none.py --workdir=new"),
    ("a config of a dict", "dict", "--config=bad/dict.py --workdir=new"),
    ("a config without knobs", "seed", "--config=bad/short.py --workdir=new"),
    ("a config that exits", "exits.py", "--config=bad/exits.py --workdir=new"),
    ("a config of bytes", "bytes.py", "--config=bad/bytes.py --workdir=new"),
    ("a config with a KeyError", "model", "--config=bad/key.py --workdir=new"),
    ("a config with a knob too many", "colour", "--config=bad/knob.py --workdir=new"),
    (
      "processes without a coordinator",
      "--coordinator",
      f"{SHAKESPEARE} --processes=2 --process=1",
    ),
    ("a coordinator alone", "--process", f"{SHAKESPEARE} --coordinator=host:1234"),
    (
      "a coordinator without a port",
      "HOST:PORT",
      f"{SHAKESPEARE} --coordinator=host --processes=2 --process=1",
    ),
    (
      "a port that is none",
      "65534",
      f"{SHAKESPEARE} --coordinator=host:70000 --processes=2 --process=1",
    ),
    (
      "a rank past the last",
      "--process=2",
      f"{SHAKESPEARE} --coordinator=host:1234 --processes=2 --process=2",
    ),
    ("no processes", "--processes", f"{SHAKESPEARE} --processes=0"),
    ("no time to start", "--start_within", f"{SHAKESPEARE} --start_within=0"),
    ("a number of processes in words", "two", f"{SHAKESPEARE} --processes=two"),
  ],
)

# Of each: a name, what the error says, and flags after those of a run that works.
KNOBS = rows(
  "train",
  f"{fixtures.TRAIN} --workdir=new",
  [
    ("a knob misspelled", "learning_rate", "--config.lerning_rate=1"),
    ("a knob that is none", "colour", "--config.colour=3"),
    ("a knob of the model misspelled", "n_head", "--config.model.n_heads=2"),
    ("a section misspelled", "model", "--config.modle.n_head=2"),
    ("a section as a number", "model", "--config.model=3"),
    ("a knob below a number", "steps", "--config.steps.more=3"),
    ("an empty number", "steps", "--config.steps="),
    ("steps in words", "many", "--config.steps=many"),
    ("half a step", "1.5", "--config.steps=1.5"),
    ("no step", "steps", "--config.steps=0"),
    ("steps below zero", "steps", "--config.steps=-1"),
    ("steps past 32 bits", "2^31", "--config.steps=2147483648"),
    ("steps past 64 bits", "steps", "--config.steps=99999999999999999999"),
    ("no batch", "batch_size", "--config.batch_size=0"),
    ("a batch below zero", "batch_size", "--config.batch_size=-2"),
    ("a batch larger than memory", "batch_size", "--config.batch_size=100000000"),
    (
      "microbatches that do not divide",
      "microbatches",
      "--config.batch_size=3 --config.microbatches=2",
    ),
    ("no microbatches", "microbatches", "--config.microbatches=0"),
    ("no steps in a call", "steps_per_call", "--config.steps_per_call=0"),
    ("options of the compiler in words", "NAME=VALUE", "--config.compiler_options=fast"),
    ("an option no compiler knows", "xla_faster", "--config.compiler_options=xla_faster=true"),
    ("a learning rate of zero", "learning_rate", "--config.learning_rate=0"),
    ("a learning rate of nan", "learning_rate", "--config.learning_rate=nan"),
    ("a learning rate of inf", "learning_rate", "--config.learning_rate=inf"),
    ("a learning rate past float32", "learning_rate", "--config.learning_rate=1e39"),
    ("a learning rate below zero", "learning_rate", "--config.learning_rate=-1e-3"),
    ("a learning rate in words", "high", "--config.learning_rate=high"),
    ("warmup below zero", "warmup_steps", "--config.warmup_steps=-1"),
    ("a final rate above the peak", "final_lr_fraction", "--config.final_lr_fraction=2"),
    ("b1 of one", "b1", "--config.b1=1"),
    ("b2 below zero", "b2", "--config.b2=-0.1"),
    ("weight decay below zero", "weight_decay", "--config.weight_decay=-1"),
    ("clipping at nan", "clip_norm", "--config.clip_norm=nan"),
    ("no skips", "max_skips", "--config.max_skips=0"),
    ("logs never", "log_every", "--config.log_every=0"),
    ("evaluations never", "eval_every", "--config.eval_every=0"),
    ("windows below zero", "eval_windows", "--config.eval_windows=-1"),
    ("saves below zero", "save_every", "--config.save_every=-1"),
    ("keeps none", "keep", "--config.keep=0"),
    ("profile below zero", "profile_steps", "--config.profile_steps=-1"),
    ("a seed below zero", "seed", "--config.seed=-1"),
    ("a seed past 32 bits", "seed", "--config.seed=4294967296"),
    ("a mesh larger than the devices", "3", "--config.mesh.data=3"),
    ("tensor parallelism larger than the devices", "model", "--config.mesh.model=2"),
    ("a mesh of zero", "(0, -1, 1)", "--config.mesh.replica=0"),
    ("a mesh of two rests", "-1", "--config.mesh.replica=-1"),
    ("another vocabulary", "n_vocab=95", "--config.model.n_vocab=91"),
    ("no vocabulary", "n_vocab", "--config.model.n_vocab=0"),
    ("no context", "n_ctx", "--config.model.n_ctx=0"),
    ("a context longer than the data", "validation", "--config.model.n_ctx=2000"),
    ("heads that do not divide", "n_head", "--config.model.n_head=3"),
    ("no heads", "n_head", "--config.model.n_head=0"),
    ("no width", "n_embd", "--config.model.n_embd=0"),
    ("a width larger than memory", "n_embd", "--config.model.n_embd=200000"),
    ("no layers", "n_layer", "--config.model.n_layer=0"),
    ("layers below zero", "n_layer", "--config.model.n_layer=-1"),
    ("layers past memory", "n_layer", "--config.model.n_layer=1000000000"),
    ("a dtype that is none", "dtype", "--config.model.dtype=float8"),
    ("a kernel that is none", "attention", "--config.model.attention=flash"),
    ("a kernel of another platform", "cudnn", "--config.model.attention=cudnn"),
    ("remat that is none", "remat", "--config.model.remat=some"),
    ("no unrolling", "unroll", "--config.model.unroll=0"),
    ("a GELU that is none", "gelu", "--config.model.gelu=relu"),
    ("bias of maybe", "use_bias", "--config.model.use_bias=maybe"),
    ("dropout of all", "embd_pdrop", "--config.model.embd_pdrop=1.5"),
    ("dropout below zero", "attn_pdrop", "--config.model.attn_pdrop=-0.1"),
    ("dropout of nan", "resid_pdrop", "--config.model.resid_pdrop=nan"),
    ("nothing to train", "trainable", "--config.trainable=()"),
    ("parameters that are none", "nothing", "--config.trainable=('nothing.*',)"),
    ("a teacher that is not there", "gone", "--config.distill.teacher=./gone"),
    ("a text as teacher", "story.txt", "--config.distill.teacher=story.txt"),
    ("a teacher of another vocabulary", "50,257", "--config.distill.teacher=gpt2"),
    (
      "a teacher in a dtype that is none",
      "int8",
      "--config.distill.teacher=gpt2 --config.distill.dtype=int4",
    ),
    ("a temperature of zero", "temperature", "--config.distill.temperature=0"),
    ("a weight below zero", "kl_weight", "--config.distill.kl_weight=-1"),
    ("layers of nothing", "init_from", "--config.distill.layers=0,1"),
  ],
)

PLACES = rows(
  "train",
  f"{fixtures.TRAIN} --workdir=new",
  [
    ("an empty workdir", "empty", "--workdir="),
    ("a file as workdir", "text.txt", "--workdir=text.txt"),
    ("a workdir below a file", "text.txt", "--workdir=text.txt/run"),
    ("a workdir in /proc", "/proc", "--workdir=/proc/run"),
    ("a workdir of nobody", "nobody_of_this_name", "--workdir=~nobody_of_this_name/run"),
    ("a workdir on s3", "s3://", "--workdir=s3://bucket/run"),
    ("a workdir without a bucket", "gs://", "--workdir=gs://"),
    ("a workdir with an empty bucket", "gs://", "--workdir=gs:///run"),
    ("a name of 300 letters", "name too long", f"--workdir={'x' * 300}"),
    ("a workdir in use", "in use", "--workdir=locked"),
    ("no training data", "gone", "--config.data.train=gone"),
    ("no validation data", "gone", "--config.data.validation=gone"),
    ("an empty path of data", "empty", "--config.data.train="),
    ("a file as data", "text.txt", "--config.data.train=text.txt"),
    ("data of nobody", "nobody_of_this_name", "--config.data.train=~nobody_of_this_name/train"),
    ("data on s3", "s3://", "--config.data.train=s3://bucket/train"),
    ("data without a bucket", "gs://", "--config.data.train=gs://"),
    ("data of another tokenizer", "tokenizer", "--config.data.train=abc"),
    ("training data too short", "ten", "--config.data.train=ten"),
    ("validation data too short", "ten", "--config.data.validation=ten"),
    ("half a store", "half-written", "--config.data.train=store-half"),
    ("half a store with a deep job", "store-job", "--config.data.train=store-job"),
    *(
      (f"a manifest: {shape}", f"store-{shape}", f"--config.data.train=store-{shape}")
      for shape in fixtures.SHAPES
    ),
    ("a store of another format", "99", "--config.data.train=store-format"),
    ("a manifest without parts", "store-no-parts", "--config.data.train=store-no-parts"),
    ("a manifest of no parts", "store-parts-empty", "--config.data.train=store-parts-empty"),
    ("parts as a list", "store-parts-list", "--config.data.train=store-parts-list"),
    ("parts outside of the store", "store-outside", "--config.data.train=store-outside"),
    ("more tokens than there are", "store-tokens", "--config.data.train=store-tokens"),
    ("another fingerprint", "fingerprint", "--config.data.train=store-fingerprint"),
    ("a part without its array", "store-part", "--config.data.train=store-part"),
    ("a part of another array", "store-zarr", "--config.data.train=store-zarr"),
    ("no tokenizer", "gone.json", "--config.data.tokenizer=gone.json"),
    ("an empty tokenizer", "tokenizer", "--config.data.tokenizer="),
    ("a folder as tokenizer", "tokenizer", "--config.data.tokenizer=train"),
    ("a tokenizer of a name", "gpt3", "--config.data.tokenizer=gpt3"),
    ("another tokenizer", "abc.json", "--config.data.tokenizer=abc.json"),
    ("a kind of tokenizer that is none", "words", "--config.data.tokenizer=tokenizer-other.json"),
    ("an alphabet of a surrogate", "surrogate", "--config.data.tokenizer=tokenizer-surrogate.json"),
    ("a garbage model", "garbage.model", "--config.data.tokenizer=garbage.model"),
    *(
      (f"a tokenizer: {shape}", f"{shape}.json", f"--config.data.tokenizer=tokenizer-{shape}.json")
      for shape in fixtures.SHAPES
    ),
  ],
)

RESUMES = rows(
  "train",
  f"{fixtures.TRAIN} --config.steps=4 --workdir=run",
  [
    ("resumes with another learning rate", "learning_rate", "--config.learning_rate=2e-3"),
    ("resumes with another model", "n_layer", "--config.model.n_layer=1"),
    ("resumes with another seed", "seed", "--config.seed=7"),
    ("resumes with other data", "data", "--config.data.train=validation"),
    ("resumes with other steps", "steps", "--config.steps=9"),
    ("resumes without a checkpoint's arrays", "run-manifest", "--workdir=run-manifest"),
    ("resumes a checkpoint of another name", "9", "--workdir=run-renamed"),
    *(
      (f"resumes with metadata: {shape}", "checkpoint", f"--workdir=run-about-{shape}")
      for shape in fixtures.SHAPES
    ),
    *(
      (f"resumes with checksums: {shape}", "checkpoint", f"--workdir=run-sums-{shape}")
      for shape in fixtures.SHAPES
    ),
  ],
)

DIVERGES = rows(
  "train",
  f"{fixtures.TRAIN} --workdir=new",
  [
    (
      "diverges",
      "skip",
      "--config.learning_rate=1e30 --config.steps=40 --config.max_skips=2 --config.warmup_steps=0",
    ),
    (
      "updates past float32",
      "finite",
      "--config.learning_rate=1e38 --config.steps=40 --config.max_skips=2",
    ),
  ],
  may_write=True,
)

TRAINS = rows(
  "train",
  f"{fixtures.TRAIN}",
  [
    ("a run", None, "--workdir=new"),
    ("a run in a home", None, "--workdir=~/new"),
    ("resumes", None, "--workdir=run"),
    ("resumes without the metrics of an old checkpoint", None, "--workdir=run-metrics"),
  ],
)

PLAN = "--config=configs/gpt2.py:117M --topology=v5e:2x2 --config.batch_size=16 "
PLAN += "--config.model.n_vocab=500 --config.model.n_ctx=128 --config.model.n_embd=256 "
PLAN += "--config.model.n_head=4 --config.model.n_layer=1"
PLANS = rows(
  "plan",
  "",
  [
    ("a plan", None, PLAN),
    ("no flags", "is missing", ""),
    ("no topology", "--topology", "--config=configs/gpt2.py:117M"),
    ("no config", "--config", "--topology=v5e:2x2"),
    ("a chip that is none", "v9z", f"{PLAN} --topology=v9z:2x2"),
    ("a shape of three chips", "v5e:3", f"{PLAN} --topology=v5e:3"),
    ("a shape of three axes", "v5e:2x2x2", f"{PLAN} --topology=v5e:2x2x2"),
    ("a shape of zero", "v5e:0x2", f"{PLAN} --topology=v5e:0x2"),
    ("a count that Google lacks", "v5e-3", f"{PLAN} --topology=v5e-3"),
    ("cores of v4", "v4-64", f"{PLAN} --topology=v4-64"),
    ("an empty topology", "topology", f"{PLAN} --topology="),
    ("a shape past all sense", "v5e:999999x999999", f"{PLAN} --topology=v5e:999999x999999"),
    ("no slices", "--slices=0", f"{PLAN} --slices=0"),
    ("slices without replicas", "replica", f"{PLAN} --slices=2"),
    ("a knob misspelled", "batch_size", f"{PLAN} --config.bacth_size=4"),
    ("a batch that does not divide", "batch_size", f"{PLAN} --config.batch_size=6"),
    ("a batch of zero", "batch_size", f"{PLAN} --config.batch_size=0"),
    ("heads that do not divide", "n_head", f"{PLAN} --config.model.n_head=7"),
    ("a mesh larger than the topology", "8", f"{PLAN} --config.mesh.data=8"),
    ("tokens below zero", "tokens", f"{PLAN} --tokens=-5"),
    ("no tokens", "tokens", f"{PLAN} --tokens=0"),
    ("tokens of nan", "tokens", f"{PLAN} --tokens=nan"),
    ("tokens of inf", "tokens", f"{PLAN} --tokens=inf"),
    ("a price below zero", "usd_per_chip_hour", f"{PLAN} --usd_per_chip_hour=-1"),
    ("a price of nan", "usd_per_chip_hour", f"{PLAN} --usd_per_chip_hour=nan"),
    ("none compiled", "compiled", f"{PLAN} --search --compiled=0"),
    ("a file as folder", "text.txt", f"{PLAN} --out=text.txt"),
    ("a folder below a file", "text.txt", f"{PLAN} --out=text.txt/plan"),
    ("a folder of nobody", "nobody_of_this_name", f"{PLAN} --out=~nobody_of_this_name/plan"),
    ("an empty folder", "empty", f"{PLAN} --out="),
    ("a folder on gs", "gs://", f"{PLAN} --out=gs://bucket/plan"),
    ("a config that raises", "raises.py", "--config=bad/raises.py --topology=v5e:2x2"),
    ("a size that is none", "117M", "--config=configs/gpt2.py:118M --topology=v5e:2x2"),
    ("a word", "extra", f"{PLAN} extra"),
    ("no learning rate", "learning_rate", f"{PLAN} --config.learning_rate=0"),
  ],
)

GKE = "--name=run --image=image --workdir=gs://bucket/run --topology=v5e:8x8 --dry-run"
CONFIG = "-- --config=configs/gpt2.py:1542M"
CLUSTERS = rows(
  "gke",
  "",
  [
    ("a manifest", None, f"{GKE} {CONFIG}"),
    ("no flags", "--name", ""),
    ("no flags of training", "--config", GKE),
    ("none after the dashes", "--config", f"{GKE} --"),
    ("a flag misspelled", "--spto", f"{GKE} --spto {CONFIG}"),
    ("a flag shortened", "--top", f"{GKE} --top=v5e:4x4 {CONFIG}"),
    ("a name with a space", "X y", f"{GKE} --name='X y' {CONFIG}"),
    ("an empty name", "--name", f"{GKE} --name= {CONFIG}"),
    ("a name of 41 letters", "40", f"{GKE} --name={'a' * 41} {CONFIG}"),
    ("a name with a digit first", "--name", f"{GKE} --name=1a {CONFIG}"),
    ("a name with a dash last", "--name", f"{GKE} --name=a- {CONFIG}"),
    ("a name of two lines", "--name", [*GKE.split(), "--name=a\nb", *CONFIG.split()]),
    ("a chip that is none", "v9z", f"{GKE} --topology=v9z:8x8 {CONFIG}"),
    ("a number of chips", "v5e:8x8", f"{GKE} --topology=v5e-64 {CONFIG}"),
    ("chips that are no hosts", "hosts", f"{GKE} --topology=v5e:9x9 {CONFIG}"),
    ("a shape of another chip", "v4:8x8", f"{GKE} --topology=v4:8x8 {CONFIG}"),
    ("an empty topology", "--topology", f"{GKE} --topology= {CONFIG}"),
    (
      "a shape with a newline",
      "--topology",
      [*GKE.split(), "--topology=v5e:8x8\n", *CONFIG.split()],
    ),
    ("no slices", "--slices=0", f"{GKE} --slices=0 {CONFIG}"),
    ("slices in words", "two", f"{GKE} --slices=two {CONFIG}"),
    ("restarts below zero", "--restarts=-1", f"{GKE} --restarts=-1 {CONFIG}"),
    ("a local workdir", "gs://BUCKET/PATH", f"{GKE} --workdir=/tmp/run {CONFIG}"),
    ("an empty workdir", "--workdir", f"{GKE} --workdir= {CONFIG}"),
    ("a workdir without a path", "gs://BUCKET/PATH", f"{GKE} --workdir=gs://bucket {CONFIG}"),
    (
      "a workdir of two lines",
      "--workdir",
      [*GKE.split(), "--workdir=gs://bucket/a\nb", *CONFIG.split()],
    ),
    ("an empty image", "--image", f"{GKE} --image= {CONFIG}"),
    ("two workdirs", "--workdir", f"{GKE} {CONFIG} --workdir=gs://bucket/other"),
    ("no kubectl", "kubectl", f"{GKE.removesuffix('--dry-run')} {CONFIG}"),
    ("a word", "extra", f"{GKE} extra {CONFIG}"),
  ],
)

TABLE = [*TRAINS, *COMMAND_LINES, *KNOBS, *PLACES, *RESUMES, *DIVERGES, *PLANS, *CLUSTERS]


@pytest.fixture(scope="module")
def ready(make, sandbox):
  """The sandbox with all that the rows name, and a workdir that another run holds."""
  fixtures.make_stores(make)
  fixtures.make_run(make)
  fixtures.damage_stores(make)
  fixtures.damage_runs(make)
  fixtures.write_configs(make)
  make.copy("run", "run-metrics", {"checkpoints/2/metrics/metrics": "{"})
  make.write("locked/lock", "another run")
  sandbox.seal()
  with open(sandbox.folder / "locked" / "lock", "a") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    yield


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_bad_input_is_one_line_and_writes_nothing(row, ready, worker, sandbox):
  check(row, worker, sandbox)
