#!/bin/bash
# A real Slurm (Debian's: munged, slurmctld, one slurmd for each virtual node) on this machine, for tests.
#
#   slurm.sh up DIR [OPTION...]  starts it and prints shell assignments: SLURM_CONF=FILE, SLURM_PID=PID. With SLURM_CONF
#                                exported, sbatch, scancel, sinfo and scontrol speak to this one
#     --nodes N                  nodes h1 to hN (3), each with GPUs that Slurm hands out and nothing is behind
#     --gpus N                   how many of them on each node (8)
#     --prolog FILE              a Prolog, run as root on a node ahead of each job
#   slurm.sh lose DIR NODE       ends the slurmd of a node, and nothing else there; `return` starts it again
#   slurm.sh return DIR NODE
#   slurm.sh down DIR            ends it, jobs included
#
# All of it is in one PID namespace, so that one signal ends it. The nodes share this kernel, its file system and its host
# name; SLURMD_NODENAME is what tells them apart. No cgroups, no accounting: finished jobs are in `scontrol show job`, and
# in DIR/jobs.log. Missing packages are installed (root on Debian or Ubuntu; in a CI runner only with INSTALL_ENGINE=1).
set -euo pipefail

HERE=$(dirname "$(readlink -f "$0")")
. "$HERE/../packages.sh"

usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }

inside() { nsenter --pid --mount --target "$(cat "/proc/$(cat "$DIR/pid")/task/$(cat "$DIR/pid")/children" | cut -d' ' -f1)" "$@"; }

configure() {
  local i socket=$DIR/munge.sock base
  # A unix socket's path has at most 107 bytes.
  [ ${#socket} -le 100 ] || socket=/tmp/warm-cache-munge-$(printf %s "$DIR" | sha256sum | cut -c1-12).sock
  echo "$socket" >"$DIR/socket"
  base=$(shuf -i 30000-59000 -n 1)   # slurmctld's port, then one for each node
  for ((i = 0; i < GPUS; i++)); do mknod "$DIR/dev/nvidia$i" c 1 3; done   # GRES counts files that exist
  [ -e "$DIR/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$DIR/munge.key")
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=standin
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld
SlurmdLogFile=$DIR/log/%n
# Several slurmd on one kernel: no cgroups, and a job's processes are found by their parents.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,bf_interval=1
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/jobs.log
MinJobAge=3600
# A data centre has KillWait=30 and SlurmdTimeout=300.
KillWait=10
SlurmdTimeout=10
BatchStartTimeout=10
ReturnToService=2
GresTypes=gpu
NodeName=h[1-$NODES] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((base + 1))-$((base + NODES))] CPUs=16 RealMemory=8192 Gres=gpu:h200:$GPUS State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
${PROLOG:+Prolog=$PROLOG}
CONF
  echo "NodeName=h[1-$NODES] Name=gpu Type=h200 File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >"$DIR/gres.conf"
}

# The first process of the namespace. -f of munged is "force": its own directories would have to belong to a user munge.
KEEPER='cd "$0"
  socket=$(cat socket)
  munged -F --force --socket "$socket" --key-file "$0/munge.key" --pid-file "$0/munged.pid" --log-file "$0/log/munged" --seed-file "$0/munge.seed" &
  until [ -S "$socket" ]; do sleep 0.02; done
  slurmctld -D -c & ctld=$!
  for ((n = 1; n <= NODES; n++)); do slurmd -D -c -N h$n & done
  wait $ctld'

up() {   # up DIR [OPTION...]
  local pid tries
  DIR=$1 NODES=3 GPUS=8 PROLOG=''
  shift
  while [ $# -gt 1 ]; do
    case $1 in
      --nodes) NODES=$2 ;;
      --gpus) GPUS=$2 ;;
      --prolog) PROLOG=$(readlink -f "$2") ;;
      *) fail "there is no option $1" ;;
    esac
    shift 2
  done
  [ $# -eq 0 ] || fail "there is no option $1, or it has no value"
  { [ "$NODES" -gt 1 ] && [ "$GPUS" -gt 1 ]; } || fail "at least two nodes with two GPUs are wanted"
  [ "$(id -u)" = 0 ] || fail "slurmd wants root"
  install_packages slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge unshare:util-linux
  mkdir -p "$DIR" || fail "cannot make Slurm's directory $DIR"
  DIR=$(readlink -f "$DIR")
  rm -rf "$DIR"/{state,spool,dev}
  mkdir -p "$DIR"/{state,spool,dev,log}
  configure
  export NODES SLURM_CONF=$DIR/slurm.conf
  setsid unshare --pid --mount --fork --kill-child=SIGKILL --mount-proc -- bash -c "$KEEPER" "$DIR" >>"$DIR/log/up" 2>&1 </dev/null &
  pid=$!
  echo "$pid" >"$DIR/pid"
  for ((tries = 0; tries < 300; tries++)); do
    kill -0 "$pid" 2>/dev/null || break
    if [ "$(sinfo -h -N -o %T 2>/dev/null | grep -c '^idle$')" = "$NODES" ]; then
      echo "SLURM_CONF=$SLURM_CONF"
      echo "SLURM_PID=$pid"
      return
    fi
    sleep 0.1
  done
  tail -n 5 "$DIR"/log/* >&2
  kill -9 "$pid" 2>/dev/null || :
  fail "Slurm does not start; its logs are in $DIR/log"
}

lose() {   # lose DIR NODE
  DIR=$(readlink -f "$1")
  inside kill -KILL "$(cat "$DIR/$2.pid")"
}

return_node() {   # return_node DIR NODE
  DIR=$(readlink -f "$1")
  SLURM_CONF=$DIR/slurm.conf inside setsid slurmd -c -N "$2"
}

down() {
  local pid
  pid=$(cat "$1/pid" 2>/dev/null) || return 0
  # Pids are used again: only a process of this folder is ended.
  if tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qxF -- "$(readlink -f "$1")"; then
    kill -KILL "$pid" 2>/dev/null || :
    # Of a process that has ended and whose parent does not ask for it, no command line is left.
    while grep -q . "/proc/$pid/cmdline" 2>/dev/null; do sleep 0.02; done
  fi
  rm -f "$1/pid"
}

case ${1:-} in
  up) [ $# -ge 2 ] || usage; shift; up "$@" ;;
  lose) [ $# = 3 ] || usage; lose "$2" "$3" ;;
  return) [ $# = 3 ] || usage; return_node "$2" "$3" ;;
  down) [ $# = 2 ] || usage; down "$2" ;;
  *) usage ;;
esac
