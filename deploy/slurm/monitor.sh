#!/bin/bash
# Runs the monitor of one node beside a Slurm job, and tells Prometheus where it is, for as long as it runs.
#
#   srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 monitor.sh &
#
# GRADIOMETER_DIR      where the job's runs of this node live (required)
# GRADIOMETER_CONFIG   config of the monitor; with auth.tokens_file and TLS if Prometheus is on another host, whose token needs
#                      the role 'metrics'
# GRADIOMETER_HOST     address to serve on; 127.0.0.1 unless given, 'auto' for the node's own
# GRADIOMETER_TARGETS  directory of target files that Prometheus reads (file_sd_configs); none are written without it
set -euo pipefail

: "${GRADIOMETER_DIR:?say where the runs of the job live}"
node=${SLURMD_NODENAME:-$(hostname -s)}
job=${SLURM_JOB_ID:-none}
host=${GRADIOMETER_HOST:-127.0.0.1}
[ "$host" = auto ] && host=$node

scratch=$(mktemp -d "${TMPDIR:-/tmp}/gradiometer-monitor.XXXXXX")
port_file=$scratch/port
target=
monitor=

leave() {
    trap '' TERM INT HUP
    if [ -n "$target" ]; then rm -f -- "$target"; fi
    if [ -n "$monitor" ]; then
        kill -TERM "$monitor" 2>/dev/null || true
        wait "$monitor" || true
    fi
    rm -rf -- "$scratch"
}
trap leave EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'exit 129' HUP

(umask 077 && mkdir -p -- "$GRADIOMETER_DIR")
# Port 0: several jobs may share a node. The state is that of the job, and goes with it.
gradiometer monitor --dir "$GRADIOMETER_DIR" --host "$host" --port 0 --port-file "$port_file" \
    --state-dir "$scratch/state" ${GRADIOMETER_CONFIG:+--config "$GRADIOMETER_CONFIG"} &
monitor=$!

for _ in $(seq 600); do
    [ -s "$port_file" ] && break
    kill -0 "$monitor" 2>/dev/null || { wait "$monitor"; exit 1; }
    sleep 0.1
done
[ -s "$port_file" ] || { echo "monitor.sh: the monitor of $node did not start within a minute" >&2; exit 1; }

if [ -n "${GRADIOMETER_TARGETS:-}" ]; then
    name=$GRADIOMETER_TARGETS/gradiometer-$job-$node.json
    # A run that is not seen whole must not be read: written beside, then put in place.
    printf '[{"targets": ["%s:%s"], "labels": {"slurm_job_id": "%s", "node": "%s", "user": "%s"}}]\n' \
        "$host" "$(cat "$port_file")" "$job" "$node" "$(id -un)" >"$name.tmp"
    chmod 0644 "$name.tmp"
    mv -f -- "$name.tmp" "$name"
    target=$name
fi
wait "$monitor"
