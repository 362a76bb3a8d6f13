#!/bin/bash
# Checks one node before the processes of a run meet there: its GPUs, its disks, its versions. One process a node.
#
#     preflight.sh FOLDER GPUS FREE_GIB USED_GPU_MIB CELSIUS RUN PYTHON...
#
# Writes FOLDER/NODE: `problem TEXT` for whatever is wrong, `version NAME VALUE` for what must be equal everywhere, and
# `checked` last. A node that does not come so far is unfit as well.

set -u
# The run, which follows, is told of the end of its time; this is not.
trap '' USR1
folder=$1 gpus=$2 free_gib=$3 used_gpu_mib=$4 celsius=$5 run=$6
shift 6
node=${SLURMD_NODENAME:-$(hostname)}
report=$folder/$node.part
: > "$report" || exit 1

problem() { echo "problem $*" >> "$report"; }
version() { echo "version $*" >> "$report"; }

check_gpus() {
    local found index used errors slow temperature clock driver
    if ! found=$(timeout 60 nvidia-smi --format=csv,noheader,nounits --query-gpu=index,memory.used,$errors_field,$slow_field,temperature.gpu,clocks.max.sm,driver_version 2>&1); then
        problem "nvidia-smi fails: $(head -n 1 <<< "$found")"
        return
    fi
    if [ "$(wc -l <<< "$found")" -lt "$gpus" ]; then
        problem "$(wc -l <<< "$found") of $gpus GPUs are there"
    fi
    while IFS=, read -r index used errors slow temperature clock driver; do
        [ "${used// /}" -le "$used_gpu_mib" ] || problem "GPU $index:$used MiB are in use by another program"
        # [N/A] where a GPU does not count them.
        [[ "$errors" =~ ^\ *(0|\[N/A\])$ ]] || problem "GPU $index:$errors uncorrected errors of its memory"
        [ "$slow" != " Active" ] || problem "GPU $index is slowed down by its hardware"
        [ "${temperature// /}" -le "$celsius" ] || problem "GPU $index:$temperature degrees Celsius"
        version "GPU-clock$clock MHz, driver$driver"
    done <<< "$found"
}
errors_field=ecc.errors.uncorrected.volatile.total
slow_field=clocks_throttle_reasons.hw_slowdown

check_disk() {
    local free
    if ! touch "$1/.$node.$$" 2>/dev/null; then
        problem "$1 cannot be written to"
        return
    fi
    rm -f "$1/.$node.$$"
    free=$(df --output=avail --block-size=1M "$1" | tail -n 1)
    awk -v free="$free" -v wanted="$free_gib" 'BEGIN { exit !(free >= wanted * 1024) }' \
        || problem "$1 has $((free / 1024)) GiB free, $free_gib are wanted"
}

[ "$gpus" = 0 ] || check_gpus
check_disk "$run"
check_disk "$(dirname "$(mktemp -u)")"
if versions=$("$@" -c '
import platform
from importlib import metadata
print("version python", platform.python_version())
for package in ("torch", "triton", "deepspeed", "numpy"):
    try:
        print("version", package, metadata.version(package))
    except metadata.PackageNotFoundError:
        print("version", package, "missing")
' 2>&1); then
    echo "$versions" >> "$report"
else
    problem "$1 does not run: $(tail -n 1 <<< "$versions")"
fi
echo checked >> "$report"
mv "$report" "$folder/$node"
