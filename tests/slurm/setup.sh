#!/usr/bin/env bash
# Debian's Slurm and munge for the tests; does nothing where they are installed. `make test` runs it.
set -euo pipefail
have() { for program in slurmctld slurmd munged mungekey sbatch srun; do PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || return 1; done; }
if have; then exit 0; fi
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "error: tests/slurm needs Slurm; install the packages slurm-wlm and munge (as root: apt-get install slurm-wlm munge)" >&2
  exit 1
fi
# No service is started here: the tests bring up daemons of their own, from a folder of their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
timeout 300 apt-get update -qq || echo "warning: apt-get update failed; trying with the lists that are there" >&2
timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
have
