#!/usr/bin/env bash
# stop.sh DIR: end the jobs and the daemons that start.sh DIR started, and all that came from them.
dir=$(cd "$1" && pwd)
export SLURM_CONF=$dir/slurm.conf
timeout 20 scancel --user="$(id -un)" 2> /dev/null
for _ in $(seq 20); do [ -z "$(timeout 20 squeue -h 2> /dev/null)" ] && break; sleep 1; done
for file in "$dir"/slurmd.*.pid "$dir"/slurmctld.pid "$dir"/munged.pid; do
  [ -s "$file" ] && kill "$(cat "$file")" 2> /dev/null
done
sleep 2
for folder in /proc/[0-9]*; do      # a step of a node that was down outlives its daemon; all inherit SLURM_CONF
  pid=${folder#/proc/}
  [ "$pid" != $$ ] && grep -qsz "^SLURM_CONF=$SLURM_CONF$" "$folder/environ" && kill -9 "$pid" 2> /dev/null
done
exit 0
