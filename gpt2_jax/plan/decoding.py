# SPDX-License-Identifier: Apache-2.0
"""Estimates decoding and evaluation on TPUs: a step of `generate`, and a batch of scored rows.

Both are the functions that run, compiled ahead of time as the training step is. The time of a
decoding step stands beside its HBM bound: every weight and the whole KV cache are read once a step,
whatever the number of rows. Every time is an estimate.

  B rows  S slots of a cache
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import gpt2_jax.quantization as quantization
from gpt2_jax.chips import GIB, Topology
from gpt2_jax.decoding.generate import _advance, _start
from gpt2_jax.decoding.kv_cache import for_inference_on_mesh
from gpt2_jax.decoding.samplers import Greedy
from gpt2_jax.evaluate.loglikelihood import _score, columns_at_once, nats_and_first_choice
from gpt2_jax.files import atomic_write
from gpt2_jax.gpt1 import new_model
from gpt2_jax.model import GPT2, ModelConfig, check_mesh
from gpt2_jax.plan.compiling import DoesNotFit, Scheduled, compile_lowered, open_topology
from gpt2_jax.plan.estimate import estimate_program
from gpt2_jax.runs.limits import local_bytes
from gpt2_jax.sharding import BATCH, ROWS, axis_size, concrete, make_mesh, padded

DTYPES = ("bfloat16", "float32", "int8")  # int8 weights, with activations in bfloat16

# A batch of LAMBADA as evaluation makes it: the commonest length of its padded rows with GPT-2's
# tokens, at 32 rows a batch, and the tokens of the last word that most rows have at most.
LAMBADA_LENGTH = 82
LAMBADA_LABELS = 4


@dataclasses.dataclass(frozen=True)
class Throughput:
  """The estimated time of one step, in which each row reads `tokens` tokens."""

  dtype: str
  batch_size: int
  tokens: int  # of a row: 1 in decoding
  step_seconds: tuple[float, float]  # the fast and the slow end
  call_seconds: tuple[float, float]  # beside its steps, once for any number of them
  bound_seconds: float  # weights and cache at the full HBM bandwidth, or FLOPs at the peak
  hbm_needed: float  # bytes a chip
  compile_seconds: float

  def facts(self) -> dict:
    """Everything as plain values."""
    fast, slow = self.step_seconds
    tokens = self.batch_size * self.tokens
    return dataclasses.asdict(self) | {
      "tokens_per_second": [tokens / slow, tokens / fast],
      "share_of_bound": [self.bound_seconds / slow, self.bound_seconds / fast],
    }


@dataclasses.dataclass(frozen=True)
class TooLarge:
  """A batch that the compiler could not place in HBM, and what it said."""

  dtype: str
  batch_size: int
  reason: str

  def facts(self) -> dict:
    """Everything as plain values."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is asked for: a model on a topology's mesh, decoding or scoring."""

  config: ConfigDict
  topology: Topology
  scores: bool  # a batch of LAMBADA in place of a step of `generate`

  def throughput(self, dtype: str, batch_size: int) -> Throughput | TooLarge:
    """Compiles and estimates one batch. Raises ValueError on a mesh or model that cannot be."""
    devices = open_topology(self.topology)
    mesh = make_mesh(**self.config.mesh, devices=devices)
    activations = "bfloat16" if dtype == "int8" else dtype
    config = dataclasses.replace(ModelConfig(**self.config.model), dtype=activations)
    with jax.set_mesh(mesh):
      check_mesh(config)
      B = padded(batch_size, axis_size(*ROWS))
      measure = _scoring if self.scores else _decoding
      try:
        return measure(config, self.topology, mesh, dtype, B)
      except DoesNotFit as error:
        return TooLarge(dtype, B, str(error).partition(";")[0])


def _decoding(
  config: ModelConfig, topology: Topology, mesh: Mesh, dtype: str, B: int
) -> Throughput:
  """A step of greedy decoding, half of the context behind it and its cache as large as that is."""
  # 1. Shapes of what `generate` hands to its loop, with shardings on the mesh: nothing is made.
  model = _model_shapes(config, dtype, mesh)
  decoder = concrete(jax.eval_shape(for_inference_on_mesh, model), mesh)
  half = config.n_ctx // 2
  tokens_BW = _rows((B, half + 1 + config.n_ctx - half), jnp.int32, mesh)
  numbers_B = _rows((B,), jnp.int32, mesh)
  is_done_B = _rows((B,), jnp.bool_, mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))

  start = functools.partial(_start, prompt_end=half + 1, samples=1, window=None, logprobs=False)
  arguments = (tokens_BW, numbers_B, numbers_B, is_done_B, None, None, key)
  state = concrete(jax.eval_shape(start, decoder, *arguments), mesh)

  # 2. Compile the loop.
  number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
  lowered = _advance.lower(decoder, state, number, number, Greedy(), None)
  scheduled, memory = compile_lowered(lowered, topology, mesh)

  # 3. The bound: of embeddings a lookup reads a few rows only.
  n_bytes = local_bytes((decoder.blocks, decoder.head, state.caches), mesh)
  return _throughput(scheduled, memory, dtype, (B, 1), n_bytes / topology.chip.hbm_bandwidth)


def _scoring(config: ModelConfig, topology: Topology, mesh: Mesh, dtype: str, B: int) -> Throughput:
  """A batch of LAMBADA, whose last words are scored."""
  # 1. Shapes of what evaluation dispatches.
  model = _model_shapes(config, dtype, mesh)
  T = min(LAMBADA_LENGTH, config.n_ctx)
  tokens_BT = _rows((B, T), jnp.int32, mesh)
  begin_B = _rows((B,), jnp.int32, mesh)
  rows_per_device = B // axis_size(*ROWS)
  columns = columns_at_once(T, rows_per_device, LAMBADA_LABELS)
  number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))

  # 2. Compile.
  options = {"columns": columns, "measure": nats_and_first_choice}
  lowered = _score.lower((model,), tokens_BT, tokens_BT, begin_B, None, number, **options)
  scheduled, memory = compile_lowered(lowered, topology, mesh)

  # 3. The bound: a multiply-add a weight and token, or the weights read once.
  chip = topology.chip
  n_weights = 12 * config.n_layer * config.n_embd**2
  flops = 2 * B * (n_weights * T + config.n_vocab * config.n_embd * columns)
  n_bytes = local_bytes((model.h, model.wte), mesh)
  bound = max(flops / chip.flops / topology.chips, n_bytes / chip.hbm_bandwidth)

  # The labels of all rows are within one step of the loop.
  measured = _throughput(scheduled, memory, dtype, (B, T), bound)
  both = tuple(map(sum, zip(measured.step_seconds, measured.call_seconds, strict=True)))
  return dataclasses.replace(measured, step_seconds=both, call_seconds=(0.0, 0.0))


def _model_shapes(config: ModelConfig, dtype: str, mesh: Mesh) -> GPT2:
  """The model's shapes with shardings on the mesh, quantized if the dtype is int8."""

  def make():
    model = new_model(config, jax.random.key(0))
    return quantization.quantize_on_mesh(model) if dtype == "int8" else model

  return concrete(jax.eval_shape(make), mesh)


def _rows(shape: tuple[int, ...], dtype, mesh: Mesh) -> jax.ShapeDtypeStruct:
  spec = P(BATCH[0], *[None] * (len(shape) - 1))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _throughput(
  scheduled: Scheduled, memory, dtype: str, sizes: tuple[int, int], bound: float
) -> Throughput:
  """The estimate of a compiled function, whose last loop makes the steps; sizes are [B, tokens]."""
  outside, body = split_last_loop(scheduled)
  B, tokens = sizes
  step, call = (estimate_program(part, 0.0, B * tokens) for part in (body, outside))
  hbm = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  return Throughput(
    dtype=dtype,
    batch_size=B,
    tokens=tokens,
    step_seconds=step.step,
    call_seconds=call.step,
    bound_seconds=bound,
    hbm_needed=hbm,
    compile_seconds=scheduled.seconds,
  )


def split_last_loop(scheduled: Scheduled) -> tuple[Scheduled, Scheduled]:
  """What a program does around its last loop, and the body of that loop.

  That loop ends by what it computes, so the program does not say how often it runs.
  """
  program = scheduled.program
  entry = program.computations[program.entry]
  loop = [instruction for instruction in entry if instruction.opcode == "while"][-1]
  rest = [instruction for instruction in entry if instruction is not loop]

  computations = program.computations | {program.entry: rest}
  outside = dataclasses.replace(program, computations=computations)
  body = dataclasses.replace(program, entry=loop.called("body")[0])
  return (
    dataclasses.replace(scheduled, program=outside),
    dataclasses.replace(scheduled, program=body),
  )


def parse_batches(texts: list[str]) -> list[int]:
  """Numbers of rows, as people type them. Raises ValueError for what is none."""
  for text in texts:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text.strip()):
      raise ValueError(
        f"--batch={text[:40]} is no number of rows from 1 to 999,999; give some, as in 1,8,64"
      )
  return list(map(int, texts))


def parse_dtypes(texts: list[str]) -> list[str]:
  """Dtypes, as people type them. Raises ValueError for what is none."""
  dtypes = [text.strip() for text in texts]
  for dtype in dtypes:
    if dtype not in DTYPES:
      raise ValueError(f"--dtype={dtype[:40]} is none of {', '.join(DTYPES)}; give some of them")
  return dtypes


def throughput_table(workload: Workload, rows: list[Throughput | TooLarge]) -> str:
  """The rows as text for a terminal."""
  model, chip = workload.config.model, workload.topology.chip
  what = f"{model.n_layer} layers x {model.n_embd} on {workload.topology}"
  if workload.scores:
    bound = f"{chip.flops / 1e12:,.0f} TFLOP/s, or weights at {chip.hbm_bandwidth / 1e9:,.0f} GB/s"
    head = f"scoring of LAMBADA's last words, {LAMBADA_LENGTH} tokens a row: {what}"
  else:
    bound = f"weights and KV cache at {chip.hbm_bandwidth / 1e9:,.0f} GB/s"
    head = f"greedy decoding, a KV cache of {model.n_ctx:,} slots: {what}"

  lines = [
    head,
    "dtype       rows  HBM, GiB       ms a step            tokens/s     bound, ms    of it"
    "   ms a call",
  ]
  for row in rows:
    name = f"{row.dtype:9.9}{row.batch_size:7,}"
    lines.append(f"{name}  {row.reason}" if isinstance(row, TooLarge) else name + _numbers(row))
  lines += [
    f"The bound: {bound}. A call: beside its steps, once for any number of them.",
    "All times are estimates; nothing ran on a TPU.",
  ]
  return "\n".join(lines)


def _numbers(row: Throughput) -> str:
  """HBM, times and rates of a row, as columns of the table."""
  facts = row.facts()
  fast, slow = (1e3 * seconds for seconds in row.step_seconds)
  low, high = facts["tokens_per_second"]
  least, most = facts["share_of_bound"]
  milliseconds = f"{fast:.3f}-{slow:.3f}"
  rates = f"{low:,.0f}-{high:,.0f}"
  return (
    f"{row.hbm_needed / GIB:10.2f}{milliseconds:>16}{rates:>20}{1e3 * row.bound_seconds:14.3f}"
    f"{f'{least:.0%}-{most:.0%}':>9}{1e3 * row.call_seconds[1]:12.3f}"
  )


def save(workload: Workload, rows: list[Throughput | TooLarge], folder: str) -> None:
  """Writes decoding.json or evaluation.json (atomically)."""
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  facts = {
    "topology": str(workload.topology),
    "chips": workload.topology.chips,
    "mesh": dict(workload.config.mesh),
    "model": dict(workload.config.model),
    "rows": [row.facts() for row in rows],
  }
  name = "evaluation.json" if workload.scores else "decoding.json"
  with atomic_write(path / name, overwrite=True) as partial:
    partial.write_text(json.dumps(facts, indent=1) + "\n")
