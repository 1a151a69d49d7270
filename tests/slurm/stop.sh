#!/usr/bin/env bash
# stop.sh DIR: end the jobs and the daemons that start.sh DIR started.
SLURM_CONF=$1/slurm.conf timeout 20 scancel --user="$(id -un)" 2> /dev/null
for _ in $(seq 40); do [ -z "$(SLURM_CONF=$1/slurm.conf timeout 20 squeue -h 2> /dev/null)" ] && break; sleep 1; done
for file in "$1"/slurmd.*.pid "$1"/slurmctld.pid "$1"/munged.pid; do
  [ -s "$file" ] && kill "$(cat "$file")" 2> /dev/null
done
exit 0
