# SPDX-License-Identifier: Apache-2.0
"""Starts training on a GKE cluster: fills in launch/gke.yaml (a JobSet) and hands it to kubectl.

  python launch/gke.py --name=gpt2-xl --topology=v5e:8x8 --spot \\
    --image=us-docker.pkg.dev/my-project/my-repo/gpt2_jax --workdir=gs://my-bucket/1542M \\
    -- --config=configs/gpt2.py:1542M

--dry-run prints the commands and runs none: the manifest, and the same run by xpk. Needs nothing
but Python's standard library.
"""

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
  parser.add_argument("--workdir", required=True, help="gs://BUCKET/PATH")

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

  `topology` of the answer is a chips.Topology; `flags` are those of train.py, --workdir included.
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

  if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+/[^\x00-\x1f]+", options.workdir):
    parser.error(
      f"--workdir={options.workdir!r} has to be gs://BUCKET/PATH: pods and their disks go"
    )
  _check_words(parser, options, flags)
  names = [flag.split("=")[0] for flag in flags]
  if "--workdir" in names or not any(name.startswith("--config") for name in names):
    parser.error(
      "after -- come flags of launch/train.py: --config=... among them, --workdir before the --"
    )
  options.flags = [f"--workdir={options.workdir}", *flags]
  return options


def _check_words(parser: Parser, options: argparse.Namespace, flags: list[str]) -> None:
  """Refuses what no manifest can hold."""
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", options.image):
    parser.error(
      f"--image={options.image!r} is no image's name; "
      "one looks like us-docker.pkg.dev/PROJECT/REPOSITORY/gpt2_jax"
    )
  for word in (*flags, options.workdir, options.cluster):
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
    "FLAGS": options.flags,
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
  # 1 is a crash; 75 a lost host, or training that was stopped and saved.
  flags = {
    "cluster": options.cluster,
    "workload": options.name,
    "tpu-type": chips.accelerator_type(topology.generation, topology.chips),
    "num-slices": options.slices,
    "docker-image": options.image,
    "max-restarts": options.restarts,
    "restart-on-exit-codes": "1,75",
    "command": shlex.join(["bash", "launch/worker.sh", "run", *options.flags]),
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
