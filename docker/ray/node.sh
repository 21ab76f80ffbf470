#!/bin/sh
# Makes this container a node of a Ray cluster. HEAD is the head's name and port.
#
#   ray-node head HEAD                 start the head, which manages the cluster and runs no model
#   ray-node worker HEAD               start a node for models, with RAY_CPUS CPUs and all GPUs of the container
#   ray-node join HEAD COMMAND …      start a node without resources, and run COMMAND, which uses the cluster
#
# A program uses a cluster through a node on its own machine, so `neuronlens serve --ray` and `fit --ray` need `join`.
set -eu

: "${RAY_AUTH_TOKEN:?is not set. All nodes need the same one: set it in .env to the output of openssl rand -hex 32}"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
role=$1
head=$2
shift 2

# the address in the head's network: a container may be in several networks, and Ray would choose any of them
address=$(python -c '
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as toward:
    toward.connect((sys.argv[1].rpartition(":")[0], 9))
    print(toward.getsockname()[0])
' "$head")
# the health check requests /api/healthz from the agent, which needs no token
node="--node-ip-address=$address --dashboard-agent-listen-port=${RAY_AGENT_PORT:-52365}"
node="$node --object-store-memory=${RAY_OBJECT_STORE_BYTES:-268435456}"

# shellcheck disable=SC2086  # $node is several words
case $role in
head) exec ray start --head --port="${head##*:}" --include-dashboard=false --num-cpus=0 $node --block ;;
worker) exec ray start --address="$head" --num-cpus="${RAY_CPUS:?is not set}" $node --block ;;
join)
  # SIGTERM is passed on to the command, whose end this script waits for. If the node ends first, for example since the
  # head is lost, `serve` ends by itself within 15 s; any other command might wait for ever, and is terminated. Then the
  # container's supervisor starts both again.
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
