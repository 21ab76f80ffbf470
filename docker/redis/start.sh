#!/bin/sh
# Starts Redis with redis.conf and the users of users.acl, both beside this script. Their passwords come from the
# environment, and only their SHA-256 is written, to REDIS_ACL_FILE. Data lie in REDIS_DATA_DIR. Further arguments go
# to redis-server.
set -eu

: "${REDIS_SERVICE_PASSWORD:?is not set}" "${REDIS_OPERATOR_PASSWORD:?is not set}" "${REDIS_MONITOR_PASSWORD:?is not set}"
here=$(cd "$(dirname "$0")" && pwd)
acl=${REDIS_ACL_FILE:-/tmp/users.acl}
sha256() { printf %s "$1" | sha256sum | cut -d ' ' -f 1; }

umask 077
sed \
  -e '/^#/d' \
  -e "s/@SERVICE@/$(sha256 "$REDIS_SERVICE_PASSWORD")/" \
  -e "s/@OPERATOR@/$(sha256 "$REDIS_OPERATOR_PASSWORD")/" \
  -e "s/@MONITOR@/$(sha256 "$REDIS_MONITOR_PASSWORD")/" \
  "$here/users.acl" >"$acl"
unset REDIS_SERVICE_PASSWORD REDIS_OPERATOR_PASSWORD REDIS_MONITOR_PASSWORD
cd "${REDIS_DATA_DIR:-/data}"
exec redis-server "$here/redis.conf" --aclfile "$acl" "$@"
