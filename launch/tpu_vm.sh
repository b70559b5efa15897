#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains or evaluates on Cloud TPU VMs (queued resources): creates the machine, installs, runs the
# command, starts it again after preemption, deletes the machine. See launch/README.md, or --help.
# Written for bash 3.2 and later, as macOS has it.
set -euo pipefail

ROOT="$(cd "$(dirname "$0")/.." && pwd)"
POLL="${GPT2_JAX_POLL:-30}" # seconds between two queries of the machine's state
EXIT_TIMEOUT="${GPT2_JAX_EXIT_TIMEOUT:-120}" # seconds for the other workers to end after one has
PREFIX=gpt2-jax- # of every name that this script makes, and deletes
LABEL=gpt2_jax   # a label of its machines; what does not have it is not deleted
# A lost machine is noticed in a minute.
KEEP_ALIVE='-o ServerAliveInterval=15 -o ServerAliveCountMax=4'

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh VERB [NAME] --project=ID --zone=ZONE [options] [-- [COMMAND] FLAGS]

  train   all of it: create the machine, wait, install, run the command, follow its log, delete the
          machine; after a preemption or a lost host it starts again, and the command resumes
  up      create the machine and wait until it is there
  run     copy this tree to every worker, install it, start the command, detached from this terminal
  logs    follow the log of worker 0 until the command ends
  status  the state of the machine and of the command on each worker
  stop    stop the command on every worker, training with its step saved; the machine stays
  down    delete the machine; nothing happens if there is none

After -- come a command of gpt2-jax and its flags, as they are typed elsewhere. Without its name it
is `train`. `train` and `evaluate` run on any number of hosts as one run, and resume from gs://; the
others (tokenize, convert, sample, ...) run where there is one host.

  --project=ID         Google Cloud project
  --zone=ZONE          us-west4-a, say; the bucket should be in its region
  --topology=TYPE      v5e-64, v6e-64 (chips), v4-128, v5p-64 (cores, two a chip);
                       or plan.py's form, v5e:8x8, v4:4x4x4
  --workdir=gs://...   where checkpoints and metrics of training go
  --slices=N           N such machines as one, over the data-center network (1)
  --spot               cheaper, and may be preempted at any time; the default is on demand
  --name=NAME          as NAME after the verb: tells machines of one project apart (your user name);
                       the machine is gpt2-jax-NAME
  --retries=N          restarts in a row without a newer checkpoint, or without another finished
                       cell of an evaluation, before `train` gives up (5)
  --wait_hours=N       how long to wait in the queue for the machine (24)
  --keep               `train` does not delete the machine at its end
  --service_account=EMAIL, --network=NAME, --subnetwork=NAME, --runtime_version=NAME
                       passed to gcloud
  --dry-run            print the commands, ready to paste, and run none

`train` may be interrupted (Ctrl-C) and started again: it finds the machine and the command as they
are. At its end it deletes the machine, however the command ended, unless --keep was given or `stop`
stopped it; the other verbs only do their part.
Exit status: 0 done, 1 gave up, 2 bad input (the command's own included) or a part of the work that
could not be done, 3 quota, 130 interrupted.

  launch/tpu_vm.sh train --project=my-project --zone=us-west4-a --topology=v5e-64 --spot \
    --workdir=gs://my-bucket/1542M -- --config=configs/gpt2.py:1542M \
    --config.data.train=gs://my-bucket/train --config.data.validation=gs://my-bucket/validation
  launch/tpu_vm.sh run my-name --project=my-project --zone=us-west4-a -- evaluate \
    --model=gs://my-bucket/1542M --task=lambada --out=gs://my-bucket/zero_shot
EOF
}

say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
# One line of bounded length, whatever was typed.
refuse() {
  local line="${*//[[:cntrl:]]/ }"
  printf 'error: %s\n' "${line:0:1000}" >&2
  exit 2
}
is_integer() { case "$1" in '' | *[!0-9]* | 0[0-9]*) return 1 ;; esac; }

# ---- Input

read_flags() {
  verb='' project='' zone='' topology='' workdir='' job=train out=''
  slices=1 spot='' retries=5 wait_hours=24 keep='' dry_run=''
  name=$(id -un | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9\n' -)
  service_account='' network='' subnetwork='' runtime_version=''
  command_flags=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --) shift; command_flags=("$@"); break ;;
      -h | --help | help) usage; exit 0 ;;
      --project=* | --zone=* | --topology=* | --workdir=* | --slices=* | --name=* | \
        --retries=* | --wait_hours=* | \
        --service_account=* | --network=* | --subnetwork=* | --runtime_version=*)
        local key="${1%%=*}"
        printf -v "${key#--}" '%s' "${1#*=}" ;;
      --spot) spot=yes ;;
      --keep) keep=yes ;;
      --dry-run | --dry_run) dry_run=yes ;;
      -*) refuse "$1 is not a flag of tpu_vm.sh; those of the command come after --;" \
        "--help shows all" ;;
      train | up | run | logs | status | stop | down)
        [ -z "$verb" ] || refuse "one verb at a time: $verb or $1"
        verb="$1" ;;
      *) if [ -z "$verb" ]; then verb="$1"; else name="$1"; fi ;;
    esac
    shift
  done
}

check_input() {
  case "$verb" in
    train | up | run | logs | status | stop | down) ;;
    '') refuse "say what to do: train, up, run, logs, status, stop or down; --help explains" ;;
    *) refuse "no verb $verb; there are train, up, run, logs, status, stop, down" ;;
  esac
  [[ "$project" =~ ^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$ ]] ||
    refuse "--project='$project' is not a project id"
  [[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] ||
    refuse "--zone='$zone' is not a zone; one looks like us-west4-a"
  [[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    refuse "--name='$name' has to be 1 to 40 of a-z, 0-9 and -, with a letter first and no - last"
  is_integer "$slices" && [ "$slices" -ge 1 ] ||
    refuse "--slices='$slices' has to be a whole number from 1"
  is_integer "$retries" || refuse "--retries='$retries' has to be a whole number"
  is_integer "$wait_hours" || refuse "--wait_hours='$wait_hours' has to be a whole number of hours"

  # Only what makes a machine has to know its type; the other verbs read it from the machine.
  machine="$PREFIX$name"
  generation='' chips='' cents=''
  case "$verb" in train | up) read_topology ;; *) [ -z "$topology" ] || read_topology ;; esac
  case "$verb" in
    train | run) check_command ;;
    *) [ ${#command_flags[@]} -eq 0 ] || refuse "only train and run take flags after --" ;;
  esac
  [ -z "$dry_run" ] || return 0
  command -v gcloud >/dev/null ||
    refuse "no gcloud on the PATH; see https://cloud.google.com/sdk/docs/install"
  case "$verb" in train | run) [ "${chips:-8}" -le 4 ] || check_key ;; esac
}

# If an ssh agent holds any keys, gcloud reaches several workers only with a key that it holds.
# Checked here, since otherwise it shows only after the wait for the machine.
check_key() {
  local key="$HOME/.ssh/google_compute_engine" held fingerprint
  held=$(ssh-add -l 2>/dev/null) || return 0
  [ -e "$key.pub" ] ||
    refuse "no $key yet, and the ssh agent has to hold it: ssh-keygen -t rsa -f $key; ssh-add $key"
  fingerprint=$(ssh-keygen -lf "$key.pub" | cut -d ' ' -f 2)
  case "$held" in
    *"$fingerprint"*) ;;
    *) refuse "the ssh agent does not hold gcloud's key: ssh-add $key" ;;
  esac
}

# Sets job, the command's name, and command_flags, which begin with it.
check_command() {
  job=train
  case "${command_flags[0]:-}" in
    -* | '') ;;
    *) set -- "${command_flags[@]}"; job="$1"; shift; command_flags=(${1+"$@"}) ;;
  esac
  [[ "$job" =~ ^[a-z]+$ && -e "$ROOT/launch/$job.py" && -e "$ROOT/gpt2_jax/cli/$job.py" ]] ||
    refuse "gpt2-jax has no command '$job'; after -- comes train, evaluate, tokenize, sample," \
      "convert, plan or contamination, and its flags"
  case "$job" in
    train) check_training ;;
    evaluate) check_evaluation ;;
    *) check_other ;;
  esac
  command_flags=("$job" ${command_flags[@]+"${command_flags[@]}"})
  git -C "$ROOT" rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
    refuse "$ROOT is no git checkout; the machine gets what git archive makes of one"
}

GS_PATH='^gs://[a-z0-9][a-z0-9._-]+/[^][:cntrl:]*?[]+$'

check_training() {
  [[ "$workdir" =~ $GS_PATH ]] ||
    refuse "--workdir='$workdir' has to be gs://BUCKET/PATH: machines and their disks go," \
      "and every worker writes there"
  local flag config=''
  for flag in ${command_flags[@]+"${command_flags[@]}"}; do
    case "$flag" in
      --workdir | --workdir=*) refuse "give --workdir before the --, to tpu_vm.sh" ;;
      --config | --config=*) config=yes ;;
    esac
  done
  [ -n "$config" ] ||
    refuse "no --config=... after --; for instance: -- --config=configs/gpt2.py:1542M"
  command_flags=("--workdir=$workdir" "${command_flags[@]}")
}

# Sets `out`, where its cells are counted.
check_evaluation() {
  local flag
  out=''
  for flag in ${command_flags[@]+"${command_flags[@]}"}; do
    case "$flag" in --out=*) out="${flag#--out=}" ;; esac
  done
  [[ "$out" =~ $GS_PATH ]] ||
    refuse "evaluate's --out='$out' has to be gs://BUCKET/PATH: machines and their disks go," \
      "and every worker writes there"
  [ -z "$workdir" ] || refuse "--workdir is training's; flags of evaluate come after --"
}

check_other() {
  local flag
  [ -z "$workdir" ] || refuse "--workdir is training's; flags of $job come after --"
  [ -z "$chips" ] || must_have_one_host
  [ "$verb" = train ] && [ -z "$keep" ] || return 0
  for flag in ${command_flags[@]+"${command_flags[@]}"}; do
    case "$flag" in
      --out=gs://* | --to=gs://*) ;;
      --out=* | --to=*)
        refuse "$flag is on the machine, which is deleted at the end; give gs://BUCKET/PATH, or" \
          "--keep" ;;
    esac
  done
}

must_have_one_host() {
  case "$job" in train | evaluate) return 0 ;; esac
  [ $((hosts * slices)) -eq 1 ] ||
    refuse "$job runs on one host, and $slices x $accelerator is $((hosts * slices)) hosts; take" \
      "one of 4 chips, or a machine without TPUs. train and evaluate run on many"
}

# Sets generation, accelerator (Google's type), runtime_version, chips and hosts (of one slice) and
# cents (the list price of a chip-hour), as the table in gpt2_jax/chips.py has them.
read_topology() {
  local answer default_runtime
  command -v python3 >/dev/null || refuse "no python3 on the PATH, which reads gpt2_jax/chips.py"
  answer=$(python3 -I "$ROOT/gpt2_jax/chips.py" accelerator "$topology") || exit 2
  read -r generation accelerator default_runtime chips cents hosts <<<"$answer"
  runtime_version="${runtime_version:-$default_runtime}"
}

# What the machine costs; nothing if the topology is not known.
price() {
  [ -n "$chips" ] || return 0
  local all=$((chips * slices * cents))
  printf ', and while ACTIVE costs about %d.%02d USD an hour at list price (%d chips x %d.%02d%s)' \
    $((all / 100)) $((all % 100)) \
    $((chips * slices)) $((cents / 100)) $((cents % 100)) "${spot:+; spot is less}"
}

# ---- Commands: each sets `command`, which is run or, with --dry-run, printed

add_location() { command+=("--project=$project" "--zone=$zone"); }

to_create() {
  command=(gcloud compute tpus queued-resources create "$machine")
  add_location
  command+=("--accelerator-type=$accelerator" "--runtime-version=$runtime_version"
    "--labels=$LABEL=tpu_vm" --scopes=https://www.googleapis.com/auth/cloud-platform)
  if [ "$slices" -gt 1 ]; then
    command+=("--node-count=$slices" "--node-prefix=$machine")
  else
    command+=("--node-id=$machine")
  fi
  [ -z "$spot" ] || command+=(--spot)
  [ -z "$service_account" ] || command+=("--service-account=$service_account")
  [ -z "$network" ] || command+=("--network=$network")
  [ -z "$subnetwork" ] || command+=("--subnetwork=$subnetwork")
  command+=(--quiet)
}

to_describe() {
  command=(gcloud compute tpus queued-resources describe "$machine")
  add_location
  command+=("--format=value[separator=\",\"]($1)")
}

to_describe_node() {
  command=(gcloud compute tpus tpu-vm describe "$1")
  add_location
  command+=('--format=value(state)')
}

to_copy() {
  command=(gcloud compute tpus queued-resources scp "$1" "$machine:gpt2_jax.tar.gz")
  add_location
  command+=(--worker=all --node=all --quiet)
}

to_ssh() { # all | 0, and a shell line in which every word that came from outside is quoted
  command=(gcloud compute tpus queued-resources ssh "$machine")
  add_location
  command+=("--worker=$1" "--node=$1" "--ssh-flag=$KEEP_ALIVE" --quiet "--command=$2")
}

to_delete() {
  command=(gcloud compute tpus queued-resources delete "$machine")
  add_location
  command+=(--force --quiet)
}

WORKER='bash gpt2_jax/launch/worker.sh'
INSTALL="rm -rf gpt2_jax && mkdir gpt2_jax && tar -xzf gpt2_jax.tar.gz -C gpt2_jax && \
$WORKER install"
STATE="if [ -d gpt2_jax ]; then $WORKER state; else echo @worker \$(hostname) none; fi"

to_start() {
  local line="$WORKER start" word flag
  for flag in "${command_flags[@]}"; do
    printf -v word '%q' "$flag"
    line="$line $word"
  done
  to_ssh all "$line"
}

# Packs the tracked files as they are on disk, uncommitted changes included; `git stash create` does
# not touch the tree.
pack() {
  local commit
  commit=$(git -C "$ROOT" -c user.name=tpu_vm -c user.email=tpu_vm@localhost stash create)
  git -C "$ROOT" archive --format=tar.gz --output="$1" "${commit:-HEAD}"
  local untracked
  untracked=$(git -C "$ROOT" ls-files --others --exclude-standard | wc -l | tr -d ' ')
  [ "$untracked" = 0 ] ||
    say "note: $untracked untracked files stay here; git add them if the run needs them"
}

# ---- State of the machine

output="" # a file: the output of the last quiet command
quietly() { "${command[@]}" >"$output" 2>&1; }
last_lines() { grep -v '^[[:space:]]*$' "$output" | tail -n "${1:-3}" >&2 || true; }

# Sets qr_state to the state of the queued resource (NONE if there is none), `nodes` to its slices,
# and `owned` to nothing if this script did not make it. Takes --topology and --slices from it if
# they were not given; refuses it if they were given and differ.
query_state() {
  local tries=0 line label type
  to_describe "state.state,tpu.nodeSpec[0].node.labels.$LABEL,\
tpu.nodeSpec[0].node.acceleratorType.basename(),tpu.nodeSpec[].nodeId"
  while ! line=$("${command[@]}" 2>"$output"); do
    if grep -q 'NOT_FOUND' "$output"; then
      qr_state=NONE owned=''
      return
    fi
    tries=$((tries + 1))
    if [ "$tries" -ge 4 ]; then
      last_lines 1
      say "Google Cloud does not tell the state of $machine"
      leave_in_place 1
    fi
    back_off "$tries"
  done

  IFS=, read -r qr_state label type nodes <<<"$line"
  nodes="${nodes//;/ }"
  owned=$([ "$label" != tpu_vm ] || echo yes)

  local count
  count=$(wc -w <<<"${nodes:-$(seq "$slices")}" | tr -d ' ')
  [ -n "$chips" ] || { topology="$type" slices="$count"; read_topology; }
  [ "$type,$count" = "$accelerator,$slices" ] ||
    refuse "$machine is there as $count of $type, not $slices of $accelerator;" \
      "ask for that, or give another --name"
}

# Status 0 if every slice is READY, 2 if one was preempted or deleted, 1 if that is not known yet. A
# preempted slice may show here minutes before its queued resource is SUSPENDED.
nodes_ready() {
  local node node_state
  for node in $nodes; do
    to_describe_node "$node"
    node_state=$("${command[@]}" 2>"$output") || node_state=UNKNOWN
    case "$node_state" in
      READY) ;;
      PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING)
        say "$node is $node_state"
        return 2 ;;
      *) return 1 ;; # UNKNOWN, REPAIRING, RESTARTING, ...
    esac
  done
}

back_off() { # POLL seconds, doubled each time, 32 of them at most
  local count=$((1 << ($1 < 6 ? $1 - 1 : 5))) i
  for ((i = 0; i < count; i++)); do sleep "$POLL"; done
}

# How far the command is, by what lies on gs://: training's newest checkpoint, an evaluation's
# finished cells; 0 if there is none, and for other commands.
progress() {
  case "$job" in
    train) newest_checkpoint ;;
    evaluate)
      gcloud storage ls "$out/cells/" "--project=$project" 2>/dev/null |
        grep -c '\.json$' || true ;;
    *) echo 0 ;;
  esac
}

newest_checkpoint() { # its step, 0 if there is none
  gcloud storage ls "$workdir/checkpoints/" "--project=$project" 2>/dev/null |
    sed -n 's|.*/checkpoints/\([0-9][0-9]*\)/$|\1|p' | sort -n | tail -n 1 | grep . || echo 0
}

# ---- The machine

create() {
  local count
  count=$([ "$slices" -eq 1 ] || echo ", $slices slices")
  say "creating $machine: $accelerator${spot:+, spot}$count in $zone"
  exists=maybe
  to_create
  if ! quietly; then
    refuse_quota
    last_lines
    # Only what may pass is tried again.
    local transient='UNAVAILABLE|INTERNAL|DEADLINE|RESOURCE_EXHAUSTED|ALREADY_EXISTS|capacity'
    grep -qE "$transient|[Tt]imed out" "$output" || exit 1
    return 1
  fi
  exists=yes created=yes installed=''
}

# Exits with status 3 if the last command failed for quota. A quota of requests a minute passes.
refuse_quota() {
  local line
  line=$(grep -i 'quota' "$output" | grep -vi 'per minute' | head -n 1 | grep .) || return 0
  say "quota: ${line#ERROR: }"
  local other_quota
  other_quota=$([ -n "$spot" ] && echo 'leave --spot out' || echo 'add --spot')
  say "that is the limit of project $project for $generation${spot:+, spot,} in $zone. \
Ask for more at \
https://console.cloud.google.com/iam-admin/quotas?project=$project (filter: tpu.googleapis.com), \
take another zone, a smaller --topology, or $other_quota: each has a quota of its own"
  delete_quietly || true
  exit 3
}

delete_quietly() { # a refused or dead queued resource counts against the quota until it is gone
  to_delete
  quietly || return 1
  exists=''
}

# Returns when the machine is ACTIVE and every slice READY. Creates it if there is none, and
# replaces one that was preempted or failed.
ensure_machine() {
  local tries=0 said='' end=$((SECONDS + wait_hours * 3600))
  while :; do
    query_state
    if [ "$qr_state" != NONE ]; then
      exists=yes
      [ "$qr_state" = "$said" ] || say "$machine: $qr_state$([ "$qr_state" != ACTIVE ] || price)"
    fi
    said="$qr_state"
    case "$qr_state" in
      NONE)
        if ! create; then
          tries=$((tries + 1))
          [ "$tries" -le "$retries" ] || { say "gave up after $tries refusals"; exit 1; }
          back_off "$tries"
        fi ;;
      ACTIVE)
        local ready=0
        nodes_ready || ready=$?
        case "$ready" in
          0) return ;;
          2) replace ;;
          *) wait_until "$end" ;;
        esac ;;
      FAILED)
        to_describe state.failedData.error.message
        quietly || true
        last_lines 1
        must_own
        refuse_quota
        tries=$((tries + 1))
        [ "$tries" -le "$retries" ] || { say "gave up after $tries failures"; down; exit 1; }
        replace
        back_off "$tries" ;;
      SUSPENDED) replace ;;
      *) # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, CREATING, SUSPENDING, DELETING
        wait_until "$end" ;;
    esac
  done
}

wait_until() {
  if [ "$SECONDS" -ge "$1" ]; then
    say "$machine is still $qr_state after $wait_hours hours (--wait_hours)"
    finish 1
  fi
  sleep "$POLL"
}

replace() {
  must_own
  say "$machine was preempted or failed; deleting what is left and creating it again"
  installed=''
  delete_quietly || { last_lines 1; wait_until "$end"; }
}

must_own() {
  [ -z "$owned$created" ] || return 0
  to_delete
  refuse "$machine has no label $LABEL=tpu_vm: not made by this script, so not deleted;" \
    "by hand: ${command[*]}"
}

down() {
  query_state
  if [ "$qr_state" = NONE ]; then
    say "there is no $machine in $zone; nothing to delete"
    return
  fi
  must_own
  say "deleting $machine"
  to_delete
  if ! quietly; then
    last_lines
    query_state
    case "$qr_state" in
      NONE | DELETING) ;;
      *) say "$machine is still $qr_state; run down again"; exit 1 ;;
    esac
  fi
  exists=''
  say "$machine is deleted"
}

# ---- The command

# Copies and installs on all workers; one retry, since new machines may not be reachable at once.
prepare() {
  local try
  pack "$scratch/gpt2_jax.tar.gz"
  for try in 1 2; do
    say "copying the tree to every worker and installing it$([ "$try" = 1 ] || echo ', once more')"
    to_copy "$scratch/gpt2_jax.tar.gz"
    if quietly; then
      to_ssh all "$INSTALL"
      if quietly; then
        installed=yes
        return
      fi
    fi
    # The reason, then the workers.
    grep -vE '^(@worker |#+ |Using |SSH: |SCP: )' "$output" | tail -n 3 >&2 || true
    grep -E '^@worker .* install failed|Command execution on worker' "$output" |
      sort -u >&2 || true
  done
  say "installing failed twice; the workers named above need a look"
  return 1
}

what() { if [ "$job" = train ]; then echo training; else echo "$job"; fi; }

start() {
  local refusal
  to_start
  if ! quietly; then
    if refusal=$(grep '^@worker .* refused' "$output"); then
      printf '%s\n' "$refusal" >&2
      return 2
    fi
    last_lines
    return 1
  fi
  say "$(what) runs on every worker"
}

follow() {
  to_ssh 0 "$WORKER follow"
  "${command[@]}" 2>"$output" || true # every worker is asked afterwards how it ended
}

# Sets workers to the @worker lines of all of them. Status 1 if one cannot be reached.
ask_workers() {
  to_ssh all "$STATE"
  quietly || return 1
  workers=$(grep '^@worker ' "$output" || true)
  [ -n "$workers" ]
}

# The line of the first worker in a state, if any.
first_worker() { printf '%s\n' "$workers" | grep -E "^@worker [^ ]+ ($1)" | head -n 1; }
any_worker() { first_worker "$1" >/dev/null; }

# Sets outcome: finished | refused | stopped | running | retry | unreachable | none
query_outcome() {
  outcome=unreachable
  ask_workers || return 0
  if any_worker running; then outcome=running
  elif any_worker stopped; then outcome=stopped
  elif any_worker 'ended 2$'; then outcome=refused
  elif any_worker 'ended [1-9]|lost'; then outcome=retry
  elif any_worker none; then outcome=none
  else outcome=finished
  fi
}

# Follows until the command has ended on all workers. Once it has on one, the others have
# EXIT_TIMEOUT seconds to notice; then they are stopped.
follow_to_end() {
  local end=''
  while :; do
    [ -n "$end" ] || follow
    query_outcome
    [ "$outcome" = running ] || return 0
    if any_worker 'ended|lost'; then
      end="${end:-$((SECONDS + EXIT_TIMEOUT))}"
      if [ "$SECONDS" -ge "$end" ]; then
        say "stopping what still runs without the others: $(first_worker running)"
        to_ssh all "$WORKER stop 30"
        quietly || true
        query_outcome
        [ "$outcome" != stopped ] || outcome=retry
        return
      fi
    fi
    sleep "$POLL"
  done
}

# Leaves a running command alone: no new code under a process, and no second command.
attach() {
  query_outcome
  case "$outcome" in
    none | unreachable) ;;
    running) say "$machine is at work already"; installed=yes ;;
    *) say "the last command on $machine: $(first_worker '.*')" ;;
  esac
}

# Installs, starts, follows; sets outcome.
attempt() {
  local status=0
  if [ -z "$installed" ] && ! prepare; then
    outcome=unreachable
    query_state
    # On a machine that is well, installing would fail again.
    if [ "$qr_state" = ACTIVE ] && nodes_ready; then finish 1; fi
    return 0
  fi
  start || status=$?
  case "$status" in
    0) follow_to_end ;;
    2) leave_in_place 2 ;;
    *) outcome=unreachable ;;
  esac
}

train() {
  local failures=0 step newest=-1
  ensure_machine
  [ -n "$created" ] || attach
  while :; do
    attempt
    case "$outcome" in
      finished) say "$(what) is done: ${workdir:-${out:-see above}}"; finish 0 ;;
      stopped) say "$(what) was stopped as asked: $(first_worker stopped)"; leave_in_place 0 ;;
      refused)
        say "$(what) refused its input, or a part could not be done, see above; not tried again" \
          "($(first_worker 'ended 2$'))"
        finish 2 ;;
      retry) say "$(what) ended early: $(first_worker 'ended [1-9]|lost')" ;;
      none) installed='' ;;
      *) say "$machine, or one of its workers, cannot be reached" ;;
    esac

    # Only ends without progress count: a long run may be preempted any number of times.
    step=$(progress)
    failures=$((step > newest ? 1 : failures + 1))
    newest=$((step > newest ? step : newest))
    if [ "$failures" -gt "$retries" ]; then
      case "$job" in
        train) say "$failures ends in a row without a checkpoint after step $newest; gave up" ;;
        *) say "$failures ends in a row, and $newest finished cells; gave up" ;;
      esac
      finish 1
    fi
    case "$job" in
      train) say "resuming from the newest checkpoint (step $newest), try $failures of $retries" ;;
      *) say "starting $job again ($newest finished cells), try $failures of $retries" ;;
    esac
    back_off "$failures"
    ensure_machine
  done
}

# The end of `train`.
finish() {
  if [ -n "$keep" ]; then leave_in_place "$1"; fi
  down
  exit "$1"
}

leave_in_place() {
  if [ -n "$exists" ]; then
    say "$machine $([ "$exists" = maybe ] && echo 'may be' || echo is) there$(price)"
    say "to delete it: launch/tpu_vm.sh down --project=$project --zone=$zone --name=$name"
  fi
  exit "$1"
}

interrupted() {
  trap '' INT TERM HUP
  echo >&2
  say "interrupted. What runs on the machine continues; the same command follows it again"
  leave_in_place 130
}

status() {
  query_state
  say "$machine: $qr_state$([ "$qr_state" != ACTIVE ] || price)"
  [ "$qr_state" = ACTIVE ] || return 0
  if ask_workers; then printf '%s\n' "$workers" | sort; else last_lines; exit 1; fi
}

must_be_active() {
  query_state
  [ "$qr_state" = ACTIVE ] || { say "$machine is $qr_state; \`up\` brings it"; exit 1; }
  exists=yes
}

# ---- --dry-run

quote() { # for a person to read and a shell to accept
  local head=''
  case "$1" in --*=*) head="${1%%=*}=" ;; esac
  case "$head" in *[!a-z=-]*) head='' ;; esac
  printf '%s' "$head"
  set -- "${1#"$head"}"
  case "$1" in
    '' | *[!A-Za-z0-9_./:=@%+,-]*)
      case "$1" in
        *"'"* | *[[:cntrl:]]*) printf '%q' "$1" ;;
        *) printf "'%s'" "$1" ;;
      esac ;;
    *) printf '%s' "$1" ;;
  esac
}

show() {
  local word line=''
  for word in "${command[@]}"; do line="$line${line:+ }$(quote "$word")"; done
  printf '%s\n' "$line"
}

show_pack() {
  local git
  git="git -C $(quote "$ROOT")"
  printf '%s archive --format=tar.gz --output=/tmp/gpt2_jax.tar.gz ' "$git"
  # shellcheck disable=SC2016 # to be expanded where it is pasted
  printf '"$(%s stash create | grep . || echo HEAD)"\n' "$git"
}

dry_run() {
  case "$verb" in train | up)
    echo "# Create the machine; it is queued for$(price)"; to_create; show
    echo "# Wait until it is there"
    to_describe state.state
    # shellcheck disable=SC2016 # to be expanded where it is pasted
    printf 'until [ "$(%s)" = ACTIVE ]; do sleep %s; done\n' "$(show)" "$POLL" ;;
  esac
  case "$verb" in train | run)
    echo "# Copy the tracked files, changes included, to every worker; install"; show_pack
    to_copy /tmp/gpt2_jax.tar.gz; show
    to_ssh all "$INSTALL"; show
    echo "# Run $job on every worker, detached; again after a preemption or a lost host"
    to_start; show ;;
  esac
  case "$verb" in train | logs) echo "# Follow worker 0"; to_ssh 0 "$WORKER follow"; show ;; esac
  case "$verb" in status) to_describe state.state; show ;; esac
  case "$verb" in train | status)
    echo "# The state of the command on every worker"; to_ssh all "$STATE"; show ;;
  esac
  case "$verb" in stop) to_ssh all "$WORKER stop"; show ;; esac
  case "$verb" in train | down) echo "# Delete it"; to_delete; show ;; esac
}

# ---- Start

read_flags "$@"
check_input
if [ -n "$dry_run" ]; then
  dry_run
  exit
fi
exists='' created='' installed='' nodes='' workers='' outcome=''
scratch=$(mktemp -d)
output="$scratch/output"
trap 'rm -rf "$scratch"' EXIT
trap interrupted INT TERM HUP
case "$verb" in
  train) train ;;
  up) ensure_machine ;;
  run)
    must_be_active
    must_have_one_host
    attach
    { [ -n "$installed" ] || prepare; } && start || exit $? ;;
  logs) must_be_active; follow ;;
  status) status ;;
  stop) must_be_active; to_ssh all "$WORKER stop"; "${command[@]}" ;;
  down) down ;;
esac
