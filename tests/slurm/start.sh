#!/usr/bin/env bash
# start.sh DIR: a Slurm of two nodes, n1 and n2, on this machine, all of whose files are in DIR; prints the SLURM_CONF of
# its commands. Needs root and Debian's packages slurm-wlm and munge.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
host=$(hostname)
mkdir -p "$dir/state" /run/munge && chown munge:munge /run/munge
if ! munge -n > /dev/null 2>&1; then
  runuser -u munge -- /usr/sbin/munged --force --pid-file=/run/munge/tests.pid
  cp /run/munge/tests.pid "$dir/munged.pid"     # ours to stop
fi
free='import socket; print(*(server.getsockname()[1] for server in [socket.create_server(("", 0)) for _ in range(3)]))'
read -r -a port < <(python3 -c "$free")
{
  cat << CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${port[0]}
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool.%n
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=0
PartitionName=main Nodes=n[1-2] Default=YES State=UP
CONF
  for number in 1 2; do
    echo "NodeName=n$number NodeHostname=$host NodeAddr=127.0.0.1 Port=${port[number]} CPUs=$(nproc) RealMemory=2000"
  done
} > "$dir/slurm.conf"
export SLURM_CONF=$dir/slurm.conf
slurmctld > /dev/null
for node in n1 n2; do slurmd -N $node > /dev/null; done
for _ in $(seq 60); do
  [ "$(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l)" = 2 ] && echo "$SLURM_CONF" && exit
  sleep 0.5
done
tail "$dir"/*.log >&2
exit 1
