#!/bin/sh
# Makes this container a node of a Ray cluster. HEAD is the head's name and port.
#
#   ray-node head HEAD                 the head itself: it keeps the cluster's books, and runs no model
#   ray-node worker HEAD               a node that models run on: RAY_CPUS CPUs, and the GPUs that it finds
#   ray-node join HEAD COMMAND …      a node that offers nothing, and on it COMMAND, which uses the cluster
#
# A program uses a cluster through a node beside itself, so `neuronlens serve --ray` and `fit --ray` need the third.
set -eu

: "${RAY_AUTH_TOKEN:?is not set. All nodes need the same one: set it in .env to the output of openssl rand -hex 32}"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
role=$1
head=$2
shift 2

# the address on the network that the head is on: a container may be on several, and Ray would take any of them
address=$(python -c '
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as toward:
    toward.connect((sys.argv[1].rpartition(":")[0], 9))
    print(toward.getsockname()[0])
' "$head")
# at the agent's port the health check asks /api/healthz, which needs no token
node="--node-ip-address=$address --dashboard-agent-listen-port=${RAY_AGENT_PORT:-52365}"
node="$node --object-store-memory=${RAY_OBJECT_STORE_BYTES:-268435456}"

# shellcheck disable=SC2086  # $node is several words
case $role in
head) exec ray start --head --port="${head##*:}" --include-dashboard=false --num-cpus=0 $node --block ;;
worker) exec ray start --address="$head" --num-cpus="${RAY_CPUS:?is not set}" $node --block ;;
join)
  # Told to stop, it tells the command, and waits for it. If the node ends first, as when the head is lost, `serve` ends
  # by itself, within 15 s and with an exit code that says so; another command might wait for ever, and is ended too.
  # Whoever supervises the container starts both again.
  "$@" &
  command=$!
  trap 'kill -TERM "$command"' TERM INT
  {
    ray start --address="$head" --num-cpus=0 --num-gpus=0 $node --block || true
    sleep 20
    kill -TERM "$command"
    sleep 5
    kill -KILL "$command"
  } &
  status=0
  while kill -0 "$command" 2>/dev/null; do
    status=0
    wait "$command" || status=$?
  done
  exit "$status"
  ;;
*)
  echo "ray-node: no such role: $role" >&2
  exit 2
  ;;
esac
