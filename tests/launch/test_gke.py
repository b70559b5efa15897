# SPDX-License-Identifier: Apache-2.0
"""The GKE manifest and the SkyPilot task: what they ask for, and that no flag of training changes
it."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml

from gpt2_jax import chips

ROOT = pathlib.Path(__file__).parents[2]
RUN = ["--name=gpt2-xl", "--image=registry/gpt2_jax", "--workdir=gs://bucket/run"]
NASTY = [
  "--a='$(id)' \"x\" `id`",
  "--b=line\n  replicas: 9\nEND_OF_MANIFEST\n",
  "--c=${NAME} {{}} #: é😀",
  "--d=",
]
FLAGS = ["--config=configs/gpt2.py:1542M", *NASTY]


def gke(*arguments: str, status: int = 0, **environment) -> tuple[str, str]:
  command = [sys.executable, ROOT / "launch" / "gke.py", *arguments]
  done = subprocess.run(
    command, capture_output=True, text=True, env=os.environ | environment, timeout=60
  )
  assert done.returncode == status, done.stderr
  return done.stdout, done.stderr


def dry_run(*arguments: str) -> tuple[dict, list[list[str]]]:
  """The manifest, and the commands after it, as a shell reads them."""
  out, _ = gke(*RUN, *arguments, "--dry-run", "--", *FLAGS)
  subprocess.run(["bash", "-n"], input=out, text=True, check=True)
  apply, rest = out.split("\n", 1)
  assert shlex.split(apply)[:3] == ["kubectl", "apply", "--filename=-"]
  manifest, commands = rest.split("\nEND_OF_MANIFEST\n", 1)
  echo = 'kubectl() { printf "%s\\0" kubectl "$@" END; }; xpk() { printf "%s\\0" xpk "$@" END; }\n'
  shown = subprocess.run(
    ["bash"], input=echo + commands, text=True, capture_output=True, check=True
  ).stdout
  return yaml.safe_load(manifest), [command.split("\0") for command in shown.split("\0END\0")[:-1]]


@pytest.mark.parametrize(
  "topology, accelerator, shape, hosts, xpk",
  [
    ("v5e:8x8", "tpu-v5-lite-podslice", "8x8", 16, "v5litepod-64"),
    ("v4:4x4x4", "tpu-v4-podslice", "4x4x4", 16, "v4-128"),
    ("v5p:4x4x4", "tpu-v5p-slice", "4x4x4", 16, "v5p-128"),
    ("v6e:16x16", "tpu-v6e-slice", "16x16", 64, "v6e-256"),
  ],
)
def test_the_manifest_asks_for_every_host_of_every_slice(topology, accelerator, shape, hosts, xpk):
  manifest, commands = dry_run(f"--topology={topology}", "--slices=3", "--spot")
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (job,) = manifest["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  assert (job["replicas"], spec["parallelism"], spec["completions"]) == (3, hosts, hosts)
  selector = {"accelerator": accelerator, "topology": shape}
  selector = {f"cloud.google.com/gke-tpu-{name}": value for name, value in selector.items()}
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"] == selector | {"cloud.google.com/gke-spot": "true"}
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert commands[-1][:3] == ["xpk", "workload", "create"] and f"--tpu-type={xpk}" in commands[-1]


def test_flags_of_training_arrive_as_they_were_given():
  manifest, commands = dry_run("--topology=v5e:8x8")
  pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
  (container,) = pod["containers"]
  assert container["command"] == ["bash", "launch/worker.sh", "run"]
  assert container["args"] == ["train", "--workdir=gs://bucket/run", *FLAGS]
  (command,) = [word for word in commands[-1] if word.startswith("--command=")]
  assert shlex.split(command.removeprefix("--command=")) == container["command"] + container["args"]


def test_another_command_takes_the_place_of_training_with_its_flags_alone():
  flags = ["evaluate", "--model=gs://bucket/run", "--out=gs://bucket/sweep", *NASTY]
  out, _ = gke(*RUN[:2], "--topology=v5e:8x8", "--dry-run", "--", *flags)
  manifest = yaml.safe_load(out.split("\n", 1)[1].split("\nEND_OF_MANIFEST\n", 1)[0])
  pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["containers"][0]["args"] == flags

  # One host is enough for any command.
  out, _ = gke(*RUN[:2], "--topology=v5e:2x2", "--dry-run", "--", "tokenize", "--out=gs://bucket/x")
  assert '"tokenize", "--out=gs://bucket/x"' in out


def test_a_lost_host_restarts_all_and_bad_input_does_not():
  manifest, _ = dry_run("--topology=v5e:8x8", "--restarts=7")
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert (
    rule["action"] == "FailJob"
    and rule["onExitCodes"]["values"] == [2]
    and job["backoffLimit"] == 0
  )
  assert job["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy asks for
  assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
  (rule,) = manifest["spec"]["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_kubectl_gets_the_manifest_of_the_dry_run(tmp_path):
  kubectl = tmp_path / "kubectl"
  kubectl.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\ncat >{tmp_path}/manifest\n')
  kubectl.chmod(0o755)
  out, _ = gke(*RUN, "--topology=v5e:8x8", "--", *FLAGS, PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert (
    tmp_path / "arguments"
  ).read_text() == "apply --filename=-\n" and "kubectl delete jobset gpt2-xl" in out
  assert yaml.safe_load((tmp_path / "manifest").read_text()) == dry_run("--topology=v5e:8x8")[0]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--topology=v5e:9x9"], "81 chips are not whole hosts of 4"),
    (["--topology=v5e-64"], "one looks like v5e:8x8"),
    (["--topology=v4:8x8"], "one looks like v5e:8x8"),
    (["--topology=v5e:8x8", "--name=X y"], "--name='X y'"),
    (["--topology=v5e:8x8", "--workdir=/tmp"], "gs://BUCKET/PATH"),
    (["--topology=v5e:8x8", "--slices=0"], "--slices=0"),
    (["--topology=v5e:8x8", "--spto"], "--spto"),
    (["--topology=v5e:8x8", "--"], "--config"),
    (["--topology=v5e:8x8", "--image="], "--image='' is no image's name"),
    (["--topology=v5e:8x8", "--image=a b"], "--image='a b' is no image's name"),
    (["--topology=v5e:8x8", "--one\nof two lines"], "unrecognized arguments: --one of two lines"),
    (["--topology=" + "x" * 5000], "--topology='xxx"),
    (["--topology=v5e:8x8", "--", "--config=a\udcff"], "is not valid Unicode"),
    (["--topology=v5e:8x8", "--", *FLAGS, "--workdir=gs://b/c"], "--workdir before the --"),
    (["--topology=v5e:8x8", "--", "evalute"], "has no command 'evalute'"),
    (["--topology=v5e:8x8", "--", "gke"], "has no command 'gke'"),
    (["--topology=v5e:8x8", "--", "evaluate"], "--workdir is training's"),
  ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message):
  _, err = gke(*RUN, *arguments, *([] if "--" in arguments else ["--", *FLAGS]), status=2)
  assert message in err and len(err.splitlines()) == 1 and len(err) < 1100


@pytest.mark.parametrize(
  "flags, message",
  [
    (["evaluate"], "--out='' has to be gs://BUCKET/PATH"),
    (["evaluate", "--out=/tmp/x"], "--out='/tmp/x' has to be gs://BUCKET/PATH"),
    (["convert", "--to=x"], "--to='x' has to be gs://BUCKET/PATH"),
    (["sample"], "sample runs on one host, and 1 x v5e:8x8 is 16"),
    (["--config=x"], "--workdir='' has to be gs://BUCKET/PATH"),
  ],
)
def test_a_command_that_does_not_fit_is_one_line_and_status_2(flags, message):
  _, err = gke(*RUN[:2], "--topology=v5e:8x8", "--", *flags, status=2)
  assert message in err and len(err.splitlines()) == 1


def test_the_skypilot_task_runs_the_same_commands(tmp_path):
  task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
  v5e = chips.TPUS["v5e"]
  assert task["resources"]["accelerators"] == f"tpu-{chips.accelerator_type('v5e', 64)}"
  assert task["resources"]["accelerator_args"] == {"runtime_version": v5e.runtime_version}
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "worker.sh").write_text('printf "%s\\0" "$@"')
  environment = {"WORKDIR": "gs://bucket/a run", "DATA": "gs://bucket", "PATH": os.environ["PATH"]}

  def ran(part: str, **variables: str) -> list[str]:
    done = subprocess.run(
      ["bash", "-c", task[part]],
      cwd=tmp_path,
      env=task["envs"] | environment | variables,
      capture_output=True,
      text=True,
    )
    return done.stdout.split("\0")[:-1]

  training = ["run", "train", "--workdir=gs://bucket/a run", "--config=configs/gpt2.py:1542M"]
  training += [
    "--config.data.train=gs://bucket/train",
    "--config.data.validation=gs://bucket/validation",
  ]
  assert ran("setup") == ["install"] and ran("run") == training

  # What is in FLAGS is split at spaces, and nothing of it is run or expanded.
  more = "--model=$(id) --task=* `id` ; id"
  assert ran("run", FLAGS=more) == [*training, *more.split(" ")]
  evaluation = ["run", "evaluate", "--out=gs://bucket/a run", "--data=gs://bucket"]
  assert ran("run", COMMAND="evaluate", FLAGS=more) == [*evaluation, *more.split(" ")]
  assert ran("run", COMMAND="fly") == []
  assert json.dumps(task)  # plain values only
