# SPDX-License-Identifier: Apache-2.0
"""Starts a training on a GKE cluster: fills in launch/gke.yaml and hands it to kubectl.

  python launch/gke.py --name=gpt2-xl --topology=v5e:8x8 --image=us-docker.pkg.dev/my-project/my-repo/gpt2_jax \\
    --workdir=gs://my-bucket/1542M --spot -- --config=configs/gpt2.py:1542M

--dry-run prints the commands instead, manifest and xpk's line included. Needs nothing but Python's standard library.
"""

import os
import sys

if __name__ == "__main__":  # the root in place of launch/, whose tokenize.py would hide the standard library's
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import subprocess

CHIPS = 4  # of one host, in every machine type that multi-host slices have
ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
XPK_TYPES = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}  # name, units a chip


class Parser(argparse.ArgumentParser):
  """One whose errors are one line."""

  def error(self, message):
    self.exit(2, f"error: {message}\n")


def parse(arguments: list[str]) -> argparse.Namespace:
  """The options, checked; train.py's flags, workdir included, as `flags`."""
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument("--name", required=True, help="of the JobSet: a-z, 0-9 and -, 40 at most")
  parser.add_argument("--topology", required=True, help="of one slice, as plan.py has it: v5e:8x8, v4:4x4x4")
  parser.add_argument("--slices", type=int, default=1, help="over the data-center network")
  parser.add_argument("--image", required=True, help="made by launch/Dockerfile")
  parser.add_argument("--workdir", required=True, help="gs://BUCKET/PATH")
  parser.add_argument("--spot", action="store_true", help="only on spot nodes")
  parser.add_argument("--restarts", type=int, default=100, help="of the whole JobSet, preemptions included")
  parser.add_argument("--cluster", default="CLUSTER", help="for xpk's line only")
  parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the commands and run none")
  cut = arguments.index("--") if "--" in arguments else len(arguments)
  options, flags = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name):
    parser.error(f"--name={options.name!r} has to be 1 to 40 of a-z, 0-9 and -, with a letter first and no - last")
  shape = re.fullmatch(r"(v4|v5e|v5p|v6e):(\d{1,2}x\d{1,2}(?:x\d{1,2})?)", options.topology)
  if not shape or shape[2].count("x") != (2 if shape[1] in ("v4", "v5p") else 1):
    parser.error(f"--topology={options.topology!r} is none; one looks like v5e:8x8, v6e:8x8, v4:4x4x4 or v5p:4x4x4")
  options.generation, options.shape = shape.groups()
  options.chips = math.prod(map(int, options.shape.split("x")))
  if not options.chips or options.chips % CHIPS:
    parser.error(f"--topology={options.topology}: {options.chips} chips are not whole hosts of {CHIPS}")
  if options.slices < 1 or options.restarts < 0:
    parser.error(f"--slices={options.slices} has to be 1 or more, --restarts={options.restarts} 0 or more")
  if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+/[^\x00-\x1f]+", options.workdir):
    parser.error(f"--workdir={options.workdir!r} has to be gs://BUCKET/PATH: pods and their disks go")
  if any(flag.split("=")[0] == "--workdir" for flag in flags) or not any(f.startswith("--config") for f in flags):
    parser.error("after -- come flags of launch/train.py: --config=... among them, --workdir before the --")
  options.flags = [f"--workdir={options.workdir}", *flags]
  return options


def manifest(options: argparse.Namespace) -> str:
  """launch/gke.yaml, filled in."""
  template = (pathlib.Path(__file__).parent / "gke.yaml").read_text()
  if not options.spot:
    template = "".join(line for line in template.splitlines(True) if "# only with --spot" not in line)
  values = {
    "NAME": options.name,
    "RESTARTS": options.restarts,
    "SLICES": options.slices,
    "HOSTS": options.chips // CHIPS,
    "ACCELERATOR": ACCELERATORS[options.generation],
    "TOPOLOGY": options.shape,
    "IMAGE": options.image,
    "FLAGS": options.flags,
    "CHIPS": CHIPS,
  }
  head, body = template.split("\napiVersion", 1)  # the comment speaks of ${...}
  filled = string.Template(body).substitute(
    {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
  )
  return f"{head}\napiVersion{filled}"


def after(options: argparse.Namespace) -> list[list[str]]:
  """Commands to follow the log of the first host, to look, and to delete."""
  first = f"jobset.sigs.k8s.io/jobset-name={options.name},jobset.sigs.k8s.io/job-index=0"
  return [
    ["kubectl", "logs", "--follow", f"--selector={first},batch.kubernetes.io/job-completion-index=0"],
    ["kubectl", "get", "jobset,pods", f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"],
    ["kubectl", "delete", "jobset", options.name],
  ]


def xpk(options: argparse.Namespace) -> list[str]:
  """The same run by xpk, on a cluster that xpk made."""
  name, units = XPK_TYPES[options.generation]
  flags = {
    "cluster": options.cluster,
    "workload": options.name,
    "tpu-type": f"{name}-{options.chips * units}",
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
    for command in after(options):
      print(shlex.join(command))
    print(f"# the same by xpk:\n{shlex.join(xpk(options))}")
    return 0
  try:
    status = subprocess.run(["kubectl", "apply", "--filename=-"], input=manifest(options), text=True).returncode
  except FileNotFoundError:
    print("error: no kubectl on the PATH; gcloud components install kubectl", file=sys.stderr)
    return 2
  if status == 0:
    print("follow, look, delete:", *map(shlex.join, after(options)), sep="\n  ")
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
