# SPDX-License-Identifier: Apache-2.0
"""launch/tpu_vm.sh and worker.sh against a fake gcloud (fakes.py): its workers run what is sent."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = ["--project=my-project", "--zone=us-west4-a", "--name=test"]
TRAIN = [*MACHINE, "--topology=v5e-16", "--workdir=gs://bucket/run"]
FLAGS = ["--", "--config=configs/gpt2.py:117M"]
EVALUATE = ["--", "evaluate", "--model=gs://bucket/run", "--out=gs://bucket/sweep"]


class FakeCloud:
  """A folder with a fake gcloud, its machine, and a log of the calls."""

  def __init__(self, path: pathlib.Path, tree: pathlib.Path):
    self.path, self.script = path, tree / "launch" / "tpu_vm.sh"
    for folder, names in (("local", ["gcloud", "ssh-add"]), ("remote", ["python3", "hostname"])):
      (path / folder).mkdir()
      for name in names:
        text = (pathlib.Path(__file__).parent / "fakes.py").read_text()
        (path / folder / name).write_text(
          text.replace("#!/usr/bin/env python3", f"#!{sys.executable} -IS")
        )
        (path / folder / name).chmod(0o755)

  def start(self, *arguments: str, **scenario) -> subprocess.Popen:
    (self.path / "scenario.json").write_text(
      json.dumps({"workers": 1, "train": [[200, "done"]]} | scenario)
    )
    environment = os.environ | {
      "FAKE_CLOUD": str(self.path),
      "PATH": f"{self.path}/local:{os.environ['PATH']}",
    }
    environment |= {"HOME": str(self.path), "GPT2_JAX_POLL": "0.02", "GPT2_JAX_EXIT_TIMEOUT": "1"}
    pipes = {
      "stdout": subprocess.PIPE,
      "stderr": subprocess.PIPE,
      "stdin": subprocess.DEVNULL,
      "text": True,
    }
    return subprocess.Popen(
      ["bash", self.script, *arguments],
      env=environment,
      start_new_session=True,
      # A suite that runs in the background passes SIG_IGN on.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
      **pipes,
    )

  def run(self, *arguments: str, status: int = 0, **scenario) -> tuple[str, str]:
    process = self.start(*arguments, **scenario)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    return out, err

  def lines(self, name: str) -> list:
    path = self.path / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def calls(self, verb: str | None = None) -> list[list[str]]:
    return [call for call in self.lines("calls.jsonl") if verb is None or call[3] == verb]

  def trained(self, worker: str = "gpt2-jax-test-w-0") -> list[list[str]]:
    """The arguments of each train.py on a worker."""
    return self.lines(f"trained-{worker}.jsonl")

  def place(self, labels: dict):
    """A machine that is there already."""
    machine = {
      "type": "v5litepod-16",
      "nodes": ["gpt2-jax-test"],
      "states": ["ACTIVE"],
      "lost": False,
    }
    (self.path / "machine.json").write_text(json.dumps(machine | {"labels": labels}))

  @property
  def there(self) -> bool:
    return (self.path / "machine.json").exists()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """A checkout with one change that is not committed and one file that git does not know."""
  root = tmp_path_factory.mktemp("tree")
  scripts = ["launch/tpu_vm.sh", "launch/worker.sh", "launch/gke.py", "gpt2_jax/chips.py"]
  for command in ("train", "evaluate", "tokenize"):
    scripts += [f"launch/{command}.py", f"gpt2_jax/cli/{command}.py"]
  for name in scripts:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, root / name)
  (root / "change").write_text("old")
  for command in (
    "init --quiet",
    "add .",
    "-c user.name=a -c user.email=a@b commit --quiet --message=tree",
  ):
    subprocess.run(["git", "-C", root, *command.split()], check=True)
  (root / "change").write_text("new")
  (root / "unknown").write_text("")
  return root


@pytest.fixture
def cloud(tmp_path, tree):
  cloud = FakeCloud(tmp_path, tree)
  yield cloud
  end = time.monotonic() + 5
  while (left := processes_of(tmp_path)) and time.monotonic() < end:
    time.sleep(0.05)
  for process in left:
    process.kill()
  assert not left, "left behind"


def processes_of(path: pathlib.Path) -> list[psutil.Process]:
  """Those that were started, however indirectly, with this folder as their fake cloud."""
  processes = []
  for process in psutil.process_iter(["environ", "name"]):
    if (process.info["environ"] or {}).get("FAKE_CLOUD") == str(path):
      processes.append(process)
  return processes


def test_one_command_asks_waits_installs_trains_follows_and_deletes(cloud):
  out, err = cloud.run("train", *TRAIN, "--spot", *FLAGS, workers=2)
  verbs = [call[3] for call in cloud.calls()]
  assert [verb for i, verb in enumerate(verbs) if verb != verbs[i - 1]][1:4] == [
    "create",
    "describe",
    "scp",
  ]
  create = cloud.calls("create")[0]
  for flag in (
    "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite",
    "--spot",
  ):
    assert flag in create
  for state in (
    "WAITING_FOR_RESOURCES",
    "PROVISIONING",
    "ACTIVE",
    "training is done",
    "is deleted",
  ):
    assert state in err
  assert "loss 3.0" in out
  assert [len(cloud.trained(f"gpt2-jax-test-w-{w}")) for w in range(2)] == [1, 1]
  assert not cloud.there


def test_flags_arrive_as_they_were_given_and_run_nothing_and_the_tree_has_its_changes(cloud):
  mark = cloud.path / "mark"
  nasty = [
    f"--a=$(touch {mark})",
    f"--b=`touch {mark}`",
    f"--c='; touch {mark}; '",
    "--d=two  spaces",
    "--e=line\nline\n",
  ]
  nasty += ['--f="quoted" \\ $HOME *', "--g=", "", "--h=é~#!", "--spot"]
  _, err = cloud.run("train", *TRAIN, "--keep", *FLAGS, *nasty)
  assert cloud.trained() == [["launch/train.py", "--workdir=gs://bucket/run", FLAGS[1], *nasty]]
  assert not mark.exists() and "--spot" not in cloud.calls("create")[0]
  tree = cloud.path / "workers" / "gpt2-jax-test-w-0" / "gpt2_jax"
  assert (tree / "change").read_text() == "new" and not (tree / "unknown").exists()
  assert "1 untracked files stay here" in err
  assert cloud.there and "to delete it: launch/tpu_vm.sh down" in err


def test_a_preempted_machine_is_replaced_and_training_resumes_with_the_same_flags(cloud):
  _, err = cloud.run(
    "train", *TRAIN, "--spot", *FLAGS, train=[[100, "preempted"], [300, "done"]], workers=2
  )
  assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 2
  first, second = cloud.trained()
  assert (
    first == second
    and "resuming from the newest checkpoint (step 100)" in err
    and "training is done" in err
  )
  assert not cloud.there


def test_preemption_without_progress_has_a_limit(cloud):
  _, err = cloud.run("train", *TRAIN, "--retries=1", *FLAGS, train=[[0, "preempted"]], status=1)
  assert len(cloud.trained()) == 2 and "without a checkpoint after step 0; gave up" in err
  assert not cloud.there


def test_a_lost_host_starts_the_same_command_again_on_the_same_machine(cloud):
  # Each with a newer checkpoint, so none counts against --retries.
  train = [[100, 75], [200, 1], [300, "done"]]
  _, err = cloud.run("train", *TRAIN, "--retries=1", *FLAGS, train=train)
  assert len(cloud.calls("create")) == len(cloud.calls("scp")) == 1 and len(cloud.trained()) == 3
  assert "ended 75" in err and not cloud.there


def test_a_quota_refusal_says_which_and_is_not_retried(cloud):
  limit = "Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded."
  limit += " Limit: 0 in zone us-west4-a."
  _, err = cloud.run("up", *TRAIN, create=[f"RESOURCE_EXHAUSTED: {limit}"], status=3)
  assert limit in err and "iam-admin/quotas?project=my-project" in err
  assert len(cloud.calls("create")) == 1


def test_a_request_that_fails_for_quota_later_is_deleted_too(cloud):
  failure = "Quota 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' exhausted."
  failure += " Limit 32 in region us-west4"
  _, err = cloud.run("up", *TRAIN, states=[["PROVISIONING", "FAILED"]], failure=failure, status=3)
  assert failure in err and not cloud.there


def test_no_capacity_is_retried_and_other_refusals_are_not(cloud):
  failed = [["PROVISIONING", "FAILED"], ["PROVISIONING", "ACTIVE"]]
  cloud.run(
    "up",
    *TRAIN,
    states=failed,
    failure="There is no more capacity in the zone",
    create=["UNAVAILABLE", "ok"],
  )
  assert len(cloud.calls("create")) == 3 and cloud.there
  cloud.run("down", *MACHINE)
  _, err = cloud.run(
    "up", *TRAIN, create=["PERMISSION_DENIED: Cloud TPU API has not been used"], status=1
  )
  assert "PERMISSION_DENIED" in err and len(cloud.calls("create")) == 4


def test_a_quota_of_requests_a_minute_is_waited_for(cloud):
  busy = "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Create node requests'"
  busy += " and limit 'per minute'"
  cloud.run("up", *TRAIN, create=[busy, "ok"])
  assert len(cloud.calls("create")) == 2 and cloud.there


def test_a_key_that_the_agent_lacks_is_said_before_the_machine_is_asked_for(cloud):
  (cloud.path / "agent").write_text("256 SHA256:other other (RSA)")
  _, err = cloud.run("train", *TRAIN, *FLAGS, status=2)
  assert f"ssh-add {cloud.path}/.ssh/google_compute_engine" in err and not cloud.calls()


def test_a_worker_that_cannot_install_is_named_and_retried_once_and_then_all_ends(cloud):
  bad = "gpt2-jax-test-w-1"
  _, err = cloud.run("train", *TRAIN, *FLAGS, install_fails=[[bad]], workers=2, status=1)
  assert (
    f"@worker {bad} install failed at: python3 -m uv pip install" in err and "no space left" in err
  )
  assert len(cloud.calls("scp")) == 2 and not cloud.trained() and not cloud.there


def test_one_failed_install_is_not_the_end(cloud):
  cloud.run("train", *TRAIN, *FLAGS, install_fails=[["gpt2-jax-test-w-0"], []])
  assert len(cloud.calls("scp")) == 2 and len(cloud.trained()) == 1


def test_input_that_training_refuses_is_not_retried(cloud):
  out, err = cloud.run("train", *TRAIN, *FLAGS, train=[[0, 2]], status=2)
  assert "error: status 2 it is" in out and "refused its input" in err
  assert len(cloud.trained()) == 1 and not cloud.there


def test_workers_that_hang_after_one_was_lost_are_stopped_and_all_start_again(cloud):
  hangs = {"train-gpt2-jax-test-w-1": [[0, "hangs"], [0, "done"]]}
  _, err = cloud.run("train", *TRAIN, *FLAGS, train=[[100, 75], [200, "done"]], workers=2, **hangs)
  assert "without the others: @worker gpt2-jax-test-w-1 running" in err
  assert [len(cloud.trained(f"gpt2-jax-test-w-{w}")) for w in range(2)] == [2, 2]


def test_slices_are_one_request_and_every_worker_of_each_trains(cloud):
  cloud.run("train", *TRAIN, "--slices=2", *FLAGS, workers=2)
  assert {"--node-count=2", "--node-prefix=gpt2-jax-test"} < set(cloud.calls("create")[0])
  assert all(
    len(cloud.trained(f"gpt2-jax-test-{node}-w-{w}")) == 1 for node in range(2) for w in range(2)
  )


def test_ctrl_c_leaves_all_in_place_and_the_same_command_follows_again_until_stopped(cloud):
  process = cloud.start("train", *TRAIN, *FLAGS, train=[[100, "SIGTERM"]])
  wait_for(
    lambda: len(cloud.trained()) == 1 and any("follow" in call[-1] for call in cloud.calls("ssh"))
  )

  # A shell that is about to start `tail` may hand it no signal: it has to run first.
  wait_for(lambda: any(child.info["name"] == "tail" for child in processes_of(cloud.path)))
  os.killpg(process.pid, signal.SIGINT)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 130 and cloud.there
  assert (
    "19.20 USD an hour" in err
    and "tpu_vm.sh down --project=my-project --zone=us-west4-a --name=test" in err
  )

  copies = len(cloud.calls("scp"))
  process = cloud.start("train", *TRAIN, *FLAGS, train=[[100, "SIGTERM"]])
  calls = len(cloud.calls("ssh"))
  wait_for(lambda: any("follow" in call[-1] for call in cloud.calls("ssh")[calls:]))
  out, err = cloud.run("status", *MACHINE, train=[[100, "SIGTERM"]])
  assert (
    re.findall("^@worker .* running$", out, re.M)
    and "19.20 USD" in err
    and len(cloud.trained()) == 1
    and len(cloud.calls("scp")) == copies
  )
  _, err = cloud.run("run", *TRAIN, *FLAGS, "--config.seed=1", status=2)
  assert "other flags" in err
  out, _ = cloud.run("stop", *MACHINE)
  assert out.count("stopped 75") == 1
  _, err = process.communicate(timeout=20)
  assert process.returncode == 0 and cloud.there and "stopped as asked" in err
  cloud.run("down", *MACHINE)


# ---- other commands than training


def test_an_evaluation_runs_on_every_worker_with_its_flags_and_nothing_of_training(cloud):
  nasty = ["--config.models=('a b',)", "--x=$(touch /tmp/x)", "", "--y='"]
  out, err = cloud.run(
    "train", *MACHINE, "--topology=v5e-16", "--spot", *EVALUATE, *nasty, workers=2
  )
  for worker in range(2):
    assert cloud.trained(f"gpt2-jax-test-w-{worker}") == [
      ["launch/evaluate.py", *EVALUATE[2:], *nasty]
    ]
  assert "evaluate is done: gs://bucket/sweep" in err and not cloud.there and "loss 3.0" in out


def test_a_preempted_evaluation_is_started_again_while_it_finishes_cells(cloud):
  train = [[100, "preempted"], [300, 75], [400, 137], [500, "done"]]
  machine = [*MACHINE, "--topology=v5e-16", "--spot"]
  _, err = cloud.run("train", *machine, "--retries=1", *EVALUATE, train=train)
  assert len(cloud.trained()) == 4 and len(cloud.calls("create")) == 2 and not cloud.there
  assert "starting evaluate again (2 finished cells), try 1 of 1" in err

  # Without another cell there is a limit.
  cloud.run("train", *machine, "--retries=1", *EVALUATE, train=[[0, 75]], status=1)


def test_a_part_that_could_not_be_done_is_not_tried_again(cloud):
  """Status 1 of an evaluation: the report is written, and says which cells have no score."""
  machine = [*MACHINE, "--topology=v5e-16"]
  _, err = cloud.run("train", *machine, *EVALUATE, train=[[100, 1]], workers=2, status=2)
  assert len(cloud.trained()) == 1 and "a part could not be done" in err and not cloud.there


def test_the_name_may_follow_the_verb_and_run_starts_any_command(cloud):
  cloud.place(labels={"gpt2_jax": "tpu_vm"})
  place = MACHINE[:2]
  _, err = cloud.run("run", "test", *place, *EVALUATE, train=[[100, "SIGTERM"]])
  assert "evaluate runs on every worker" in err
  wait_for(lambda: cloud.trained() == [["launch/evaluate.py", *EVALUATE[2:]]])
  _, err = cloud.run("run", "test", *TRAIN, *FLAGS, status=2, train=[[100, "SIGTERM"]])
  assert "refused: another command, or the same with other flags, runs here" in err
  out, _ = cloud.run("stop", "test", *place, train=[[100, "SIGTERM"]])
  assert out.count("stopped 0") == 1
  _, err = cloud.run("run", "test", *place, "--", "tokenize", "--files=a", status=2)
  assert "tokenize runs on one host, and 1 x v5litepod-16 is 4 hosts" in err


def test_a_command_for_one_host_runs_where_there_is_one(cloud):
  machine = [*MACHINE, "--topology=v5e-8"]
  _, err = cloud.run("train", *machine, "--", "tokenize", "--files=a b", "--out=gs://bucket/x")
  assert cloud.trained() == [["launch/tokenize.py", "--files=a b", "--out=gs://bucket/x"]]
  assert "tokenize is done" in err and not cloud.there


def test_down_twice_is_down_once_and_only_what_the_script_made(cloud):
  cloud.place(labels={"gpt2_jax": "tpu_vm"})
  cloud.run("down", *MACHINE)
  _, err = cloud.run("down", *MACHINE)
  assert "there is no gpt2-jax-test" in err and len(cloud.calls("delete")) == 1
  cloud.place(labels={})
  _, err = cloud.run("down", *MACHINE, status=2)
  assert "not made by this script" in err and cloud.there


def test_a_machine_of_another_type_is_not_used(cloud):
  cloud.place(labels={"gpt2_jax": "tpu_vm"})
  _, err = cloud.run(
    "train", *MACHINE, "--topology=v5e-64", "--workdir=gs://bucket/run", *FLAGS, status=2
  )
  assert "1 of v5litepod-16, not 1 of v5litepod-64" in err and cloud.there


def test_a_queue_that_does_not_move_has_a_limit_and_leaves_no_request(cloud):
  _, err = cloud.run("up", *TRAIN, "--wait_hours=0", states=[["WAITING_FOR_RESOURCES"]], status=1)
  assert "still WAITING_FOR_RESOURCES after 0 hours" in err and not cloud.there


@pytest.mark.parametrize("verb", ["train", "up", "run", "logs", "status", "stop", "down"])
def test_a_dry_run_calls_nothing_and_prints_what_a_shell_accepts(cloud, verb):
  training = [*TRAIN, *FLAGS, "--a=b c'd\n$(e)"] if verb in ("train", "run") else TRAIN
  out, _ = cloud.run(verb, "--dry-run", *training)
  assert not cloud.calls() and "gcloud" in out
  subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_the_dry_run_prints_the_calls_that_are_made(cloud):
  command = ["train", *TRAIN, "--spot", "--slices=2", *FLAGS, "--a=b c'd\n$(e)"]
  out, _ = cloud.run(*command, "--x=y")
  made = [["gcloud", *call] for call in cloud.calls()]
  out, _ = cloud.run(command[0], "--dry-run", *command[1:], "--x=y")
  shown = [
    shlex.split(line.replace("$'", "'"))[:5]
    for line in out.splitlines()
    if line.startswith("gcloud")
  ]
  assert {tuple(call[:5]) for call in shown} <= {tuple(call[:5]) for call in made}
  script = out.replace("until [", "while false && [").replace(
    "/tmp/gpt2_jax.tar.gz", f"{cloud.path}/tree.tar.gz"
  )
  script = re.sub("^git.*$", "", script, flags=re.M)
  (cloud.path / "local" / "gcloud").write_text(
    '#!/bin/bash\nprintf "%s\\0" "$@" END >>"$FAKE_CLOUD/pasted"\n'
  )
  environment = os.environ | {
    "FAKE_CLOUD": str(cloud.path),
    "PATH": f"{cloud.path}/local:{os.environ['PATH']}",
  }
  subprocess.run(["bash"], input=script, text=True, check=True, env=environment)
  pasted = (
    (cloud.path / "pasted")
    .read_text()
    .replace(f"{cloud.path}/tree.tar.gz", "")
    .split("\0END\0")[:-1]
  )
  made = {
    "\0".join(re.sub(r"^/.*/gpt2_jax.tar.gz$", "", word) for word in call[1:]) for call in made
  }
  assert len(pasted) == 7 and set(pasted) <= made


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "say what to do"),
    (["fly"], "no verb fly"),
    (["up", "--projct=x"], "--projct=x is not a flag"),
    (["up", "--two\nlines"], "--two lines is not a flag"),
    (["up", "--project=" + "x" * 5000], "--project='xxx"),
    (["up", "--project=My Project"], "is not a project id"),
    (["up", *MACHINE, "--zone=us-west4"], "is not a zone"),
    (["up", *MACHINE, "--topology=v5e-63"], "comes in 1, 4, 8, 16, 32, 64, 128 or 256 chips"),
    (["up", *MACHINE, "--topology=v4-4"], "multiples of 8 cores"),
    (["up", *MACHINE, "--topology=v4:2x4x8"], "not the default shape"),
    (["up", *MACHINE, "--topology=h100-8"], "--topology='h100-8' is not a topology"),
    (["up", *MACHINE, "--name=x;id"], "--name='x;id'"),
    (["up", *TRAIN, "--slices=0"], "--slices='0'"),
    (["up", *TRAIN, *FLAGS], "only train and run take flags"),
    (["train", *TRAIN, "--workdir=/tmp/run", *FLAGS], "has to be gs://BUCKET/PATH"),
    (["train", *TRAIN, "--workdir=gs://bucket/*", *FLAGS], "has to be gs://BUCKET/PATH"),
    (["train", *TRAIN], "no --config"),
    (["train", *TRAIN, *FLAGS, "--workdir=gs://b/c"], "before the --"),
    (["train", *TRAIN, "--", "evalute", "--out=gs://b/c"], "has no command 'evalute'"),
    (["train", *TRAIN, "--", "gke"], "has no command 'gke'"),
    (["train", *TRAIN, "--", "../x;id"], "has no command '../x;id'"),
    (["train", *TRAIN, *EVALUATE], "--workdir is training's"),
    (["train", *MACHINE, "--topology=v5e-16", "--", "evaluate"], "evaluate's --out=''"),
    (["train", *MACHINE, "--topology=v5e-16", *EVALUATE, "--out=/tmp/x"], "--out='/tmp/x'"),
    (["train", *MACHINE, "--topology=v5e-16", "--", "tokenize"], "is 4 hosts; take one"),
    (["train", *MACHINE, "--topology=v5e-8", "--slices=2", "--", "tokenize"], "is 2 hosts"),
    (["train", *MACHINE, "--topology=v5e-8", "--", "tokenize", "--out=/tmp/x"], "or --keep"),
    (["run", "other", *MACHINE[:2], "X", *FLAGS], "--name='X'"),
  ],
)
def test_bad_input_is_one_line_and_status_2(cloud, arguments, message):
  _, err = cloud.run(*arguments, status=2)
  assert message in err and len(err.splitlines()) == 1 and not cloud.calls()
  assert len(err) < 1100


@pytest.mark.parametrize(
  "topology, accelerator, runtime, usd",
  [
    ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite", "76.80"),
    ("v5e:8x8", "v5litepod-64", "v2-alpha-tpuv5-lite", "76.80"),
    ("v4:4x4x4", "v4-128", "tpu-ubuntu2204-base", "206.08"),
    ("v5p-64", "v5p-64", "v2-alpha-tpuv5", "134.40"),
    ("v6e-64", "v6e-64", "v2-alpha-tpuv6e", "172.80"),
  ],
)
def test_topologies_are_named_as_google_names_them(cloud, topology, accelerator, runtime, usd):
  out, _ = cloud.run("up", "--dry-run", *MACHINE, f"--topology={topology}")
  assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"} < set(out.split())
  assert f"{usd} USD an hour" in out


@pytest.mark.parametrize("words", [[], ["train"]])
def test_a_container_passes_sigterm_on_and_its_status_asks_to_be_started_again(cloud, words):
  (cloud.path / "scenario.json").write_text(json.dumps({"train": [[100, "SIGTERM"]]}))
  home = cloud.path / "pod-w-0"
  (home / "gpt2_jax_env" / "bin").mkdir(parents=True)
  shutil.copy(cloud.path / "remote" / "python3", home / "gpt2_jax_env" / "bin" / "python")
  environment = os.environ | {
    "HOME": str(home),
    "FAKE_CLOUD": str(cloud.path),
    "GPT2_JAX_POLL": "0.02",
  }
  command = [
    "bash",
    ROOT / "launch" / "worker.sh",
    "run",
    *words,
    "--workdir=gs://b/run",
    "--x=a b",
  ]
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  wait_for(
    lambda: cloud.trained("pod-w-0") == [["launch/train.py", "--workdir=gs://b/run", "--x=a b"]]
  )
  heard = [process.pid]
  # systemd signals all processes when a machine shuts down.
  if pathlib.Path("/proc/1/comm").read_text().strip() == "systemd":
    heard.append(int((home / "gpt2_jax_state" / "pid").read_text()))
  for pid in heard:
    os.kill(pid, signal.SIGTERM)
  out, _ = process.communicate(timeout=20)
  assert process.returncode == 75 and "loss 3.0" in out and "stopped and saved at step 7" in out


@pytest.mark.parametrize(
  "words, ended, status",
  [
    (["train"], 1, 1),
    (["train"], 2, 2),
    (["evaluate"], 1, 2),
    (["evaluate"], 143, 75),
    (["evaluate"], 75, 75),
    (["tokenize"], 0, 0),
  ],
)
def test_the_status_of_a_container_says_whether_to_start_again(cloud, words, ended, status):
  done = worker(cloud, *words, "--x=y", train=[[100, ended or "done"]])
  assert done.returncode == status and "loss 3.0" in done.stdout


@pytest.mark.parametrize(
  "variable, value",
  [("TPU_WORKER_HOSTNAMES", "a,b"), ("MEGASCALE_NUM_SLICES", "2"), ("SKYPILOT_NUM_NODES", "4")],
)
def test_a_container_of_several_hosts_refuses_a_command_for_one(cloud, variable, value):
  done = worker(cloud, "tokenize", **{variable: value})
  assert done.returncode == 2 and not cloud.trained("pod-w-0")
  assert "refused: tokenize runs on one host, and this is one of several" in done.stdout
  assert worker(cloud, "evaluate", **{variable: value}).returncode == 0


def test_a_container_refuses_what_is_no_command(cloud):
  done = worker(cloud, "gke")
  assert done.returncode == 2 and "refused: gpt2-jax has no command gke" in done.stdout


def worker(cloud, *words: str, train=((100, "done"),), **variables) -> subprocess.CompletedProcess:
  """`worker.sh run` in a container whose python is the fake one."""
  (cloud.path / "scenario.json").write_text(json.dumps({"train": train}))
  home = cloud.path / "pod-w-0"
  (home / "gpt2_jax_env" / "bin").mkdir(parents=True, exist_ok=True)
  shutil.copy(cloud.path / "remote" / "python3", home / "gpt2_jax_env" / "bin" / "python")
  environment = os.environ | {"HOME": str(home), "FAKE_CLOUD": str(cloud.path)} | variables
  return subprocess.run(
    ["bash", ROOT / "launch" / "worker.sh", "run", *words],
    env=environment | {"GPT2_JAX_POLL": "0.02"},
    capture_output=True,
    text=True,
    timeout=60,
  )


def wait_for(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)
