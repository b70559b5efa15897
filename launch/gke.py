# SPDX-License-Identifier: Apache-2.0
"""Starts training or an evaluation on a GKE cluster: fills in launch/gke.yaml (a JobSet) and hands
it to kubectl.

  python launch/gke.py --name=gpt2-xl --topology=v5e:8x8 --spot \\
    --image=us-docker.pkg.dev/my-project/my-repo/gpt2_jax --workdir=gs://my-bucket/1542M \\
    -- --config=configs/gpt2.py:1542M
  python launch/gke.py --name=zero-shot --topology=v5e:4x4 --image=... \\
    -- evaluate --model=gs://my-bucket/1542M --task=lambada --out=gs://my-bucket/zero_shot

After -- come a command of gpt2-jax and its flags; without its name it is train. train and evaluate
run on any number of hosts as one run, the others where there is one host.

--dry-run prints the commands and runs none: the manifest, and the same run by xpk. Needs nothing
but Python's standard library.
"""

from __future__ import annotations  # `str | None` in Python 3.9, which macOS has

import os
import sys

if __name__ == "__main__":
  # The folder of chips.py: it is imported without the package, whose __init__ imports JAX. The
  # folder replaces launch/, whose tokenize.py would hide the standard library's.
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  sys.path[0] = os.path.join(root, "gpt2_jax")

import argparse
import json
import pathlib
import re
import shlex
import string
import subprocess

import chips


class Parser(argparse.ArgumentParser):
  """An ArgumentParser whose errors are one line."""

  def error(self, message):
    # What was typed is in it: of any length, and with any characters.
    line = "".join(c if c.isprintable() else " " for c in message)
    self.exit(2, f"error: {line[:1000]}\n")


def make_parser() -> Parser:
  """The flags before `--`."""
  # No abbreviations: a mistyped flag is an error, not another flag.
  parser = Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )

  # What to run, and where.
  parser.add_argument("--name", required=True, help="of the JobSet: a-z, 0-9 and -, 40 at most")
  parser.add_argument(
    "--topology", required=True, help="of one slice, as plan.py takes it: v5e:8x8, v4:4x4x4"
  )
  parser.add_argument("--slices", type=int, default=1, help="over the data-center network")
  parser.add_argument("--image", required=True, help="made by launch/Dockerfile")
  parser.add_argument("--workdir", help="gs://BUCKET/PATH, of training")

  # How to run it.
  parser.add_argument("--spot", action="store_true", help="only on spot nodes")
  parser.add_argument(
    "--restarts", type=int, default=100, help="of the whole JobSet, preemptions included"
  )
  parser.add_argument("--cluster", default="CLUSTER", help="for xpk's line only")
  parser.add_argument(
    "--dry-run", "--dry_run", action="store_true", help="print the commands and run none"
  )
  return parser


def parse(arguments: list[str]) -> argparse.Namespace:
  """Parses and checks the command line.

  `topology` of the answer is a chips.Topology; `words` are the command and its flags, with
  training's --workdir among them.
  """
  parser = make_parser()
  end = arguments.index("--") if "--" in arguments else len(arguments)
  options = parser.parse_args(arguments[:end])
  flags = arguments[end + 1 :]

  # Kubernetes makes the names of pods from this one, and those have to be short.
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name):
    parser.error(
      f"--name={options.name!r} has to be 1 to 40 of a-z, 0-9 and -, "
      "with a letter first and no - last"
    )

  # A node pool has a shape, so a number of chips (v5e-64) does not say enough.
  try:
    if ":" not in options.topology:
      raise ValueError
    topology = chips.parse_topology(options.topology)
  except ValueError:
    parser.error(
      f"--topology={options.topology!r} is not a topology; "
      "one looks like v5e:8x8, v6e:8x8, v4:4x4x4 or v5p:4x4x4"
    )
  if topology.chips % chips.CHIPS_PER_HOST:
    parser.error(
      f"--topology={options.topology}: {topology.chips} chips are not whole hosts "
      f"of {chips.CHIPS_PER_HOST}"
    )
  options.topology = topology
  if options.slices < 1 or options.restarts < 0:
    parser.error(
      f"--slices={options.slices} has to be 1 or more, --restarts={options.restarts} 0 or more"
    )

  _check_words(parser, options, flags)
  options.words = _command(parser, options, flags)
  return options


def _command(parser: Parser, options: argparse.Namespace, words: list[str]) -> list[str]:
  """The command and its flags, as the pods run them: checked, with its name and --workdir."""
  # 1. Its name.
  command = "train"
  if words and not words[0].startswith("-"):
    command, *words = words
  root = pathlib.Path(__file__).resolve().parents[1]
  places = (root / "launch" / f"{command}.py", root / "gpt2_jax" / "cli" / f"{command}.py")
  if not re.fullmatch("[a-z]+", command) or not all(map(os.path.exists, places)):
    parser.error(
      f"gpt2-jax has no command {command[:80]!r}; after -- comes train, evaluate, tokenize, "
      "sample, convert, plan or contamination, and its flags"
    )

  # 2. Where it writes: pods and their disks go.
  values = dict(word.partition("=")[::2] for word in words)
  if command == "train":
    _check_remote(parser, "--workdir", options.workdir)
    if "--workdir" in values or not any(name.startswith("--config") for name in values):
      parser.error(
        "after -- come flags of training: --config=... among them, --workdir before the --"
      )
    return [command, f"--workdir={options.workdir}", *words]
  if options.workdir is not None:
    parser.error(f"--workdir is training's; flags of {command} come after --")
  if command == "evaluate":
    values.setdefault("--out", "")
  for name in ("--out", "--to"):
    if name in values:
      _check_remote(parser, name, values[name])

  # 3. On how many hosts.
  hosts = options.topology.chips // chips.CHIPS_PER_HOST * options.slices
  if hosts > 1 and command != "evaluate":
    parser.error(
      f"{command} runs on one host, and {options.slices} x {options.topology.name} is {hosts}; "
      "take one of 4 chips. train and evaluate run on many"
    )
  return [command, *words]


def _check_remote(parser: Parser, name: str, path: str | None) -> None:
  if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+/[^\x00-\x1f]+", path or ""):
    parser.error(f"{name}={path or ''!r} has to be gs://BUCKET/PATH: pods and their disks go")


def _check_words(parser: Parser, options: argparse.Namespace, flags: list[str]) -> None:
  """Refuses what no manifest can hold."""
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", options.image):
    parser.error(
      f"--image={options.image!r} is no image's name; "
      "one looks like us-docker.pkg.dev/PROJECT/REPOSITORY/gpt2_jax"
    )
  for word in (*flags, options.workdir or "", options.cluster):
    try:
      word.encode()
    except UnicodeEncodeError:
      parser.error(f"{ascii(word)} is not valid Unicode (UTF-8)")


def manifest(options: argparse.Namespace) -> str:
  """The JobSet's manifest: launch/gke.yaml, filled in."""
  template = (pathlib.Path(__file__).parent / "gke.yaml").read_text()
  if not options.spot:
    lines = template.splitlines(keepends=True)
    template = "".join(line for line in lines if "# only with --spot" not in line)

  topology = options.topology
  values = {
    "NAME": options.name,
    "RESTARTS": options.restarts,
    "SLICES": options.slices,
    "HOSTS": topology.chips // chips.CHIPS_PER_HOST,
    "ACCELERATOR": topology.chip.gke_accelerator,
    "TOPOLOGY": topology.name.removeprefix(f"{topology.generation}:"),
    "IMAGE": options.image,
    "WORDS": options.words,
    "CHIPS": chips.CHIPS_PER_HOST,
  }
  # JSON is YAML: whatever a flag holds, it stays one value. Only the body is filled in, since the
  # comment at the head speaks of ${...}.
  encoded = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
  head, body = template.split("\napiVersion", 1)
  filled = string.Template(body).substitute(encoded)
  return f"{head}\napiVersion{filled}"


def follow_up_commands(options: argparse.Namespace) -> list[list[str]]:
  """kubectl commands that follow the log of the first host, list the pods, and delete the run."""
  # The first pod of the first slice writes the log.
  jobset = f"jobset.sigs.k8s.io/jobset-name={options.name}"
  first_host = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  return [
    ["kubectl", "logs", "--follow", f"--selector={jobset},{first_host}"],
    ["kubectl", "get", "jobset,pods", f"--selector={jobset}"],
    ["kubectl", "delete", "jobset", options.name],
  ]


def xpk_command(options: argparse.Namespace) -> list[str]:
  """The same run by xpk, on a cluster that xpk made."""
  topology = options.topology
  # 1 is a crash of training; 75 a lost host, or a command that was stopped and can resume.
  flags = {
    "cluster": options.cluster,
    "workload": options.name,
    "tpu-type": chips.accelerator_type(topology.generation, topology.chips),
    "num-slices": options.slices,
    "docker-image": options.image,
    "max-restarts": options.restarts,
    "restart-on-exit-codes": "1,75",
    "command": shlex.join(["bash", "launch/worker.sh", "run", *options.words]),
  }
  return ["xpk", "workload", "create", *(f"--{key}={value}" for key, value in flags.items())]


def main(arguments: list[str]) -> int:
  options = parse(arguments)

  if options.dry_run:
    print(f"kubectl apply --filename=- <<'END_OF_MANIFEST'\n{manifest(options)}END_OF_MANIFEST")
    for command in follow_up_commands(options):
      print(shlex.join(command))
    print(f"# the same by xpk:\n{shlex.join(xpk_command(options))}")
    return 0

  # The exit status is that of kubectl.
  try:
    status = subprocess.run(
      ["kubectl", "apply", "--filename=-"], input=manifest(options), text=True
    ).returncode
  except FileNotFoundError:
    print("error: no kubectl on the PATH; gcloud components install kubectl", file=sys.stderr)
    return 2
  except OSError as error:
    print(f"error: kubectl cannot be started: {error}", file=sys.stderr)
    return 2

  if status == 0:
    print("follow, look, delete:", *map(shlex.join, follow_up_commands(options)), sep="\n  ")
  return status


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
