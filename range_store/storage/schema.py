"""What the store keeps in Redis: the names of its keys, and the Lua scripts that change them atomically.

The scripts decide by ids and lengths only. Python validates what a range set or a live state contains.
"""

import json
from dataclasses import dataclass

PREFIX = "neuronlens:"
CHANGES = f"{PREFIX}changes"
"""Pub/sub channel; a message names the model that changed, and readers then read the store."""
API_KEYS = f"{PREFIX}keys"
"""The API keys of all servers on this Redis, as JSON."""
RANGE_SET = f"{PREFIX}rangeset:"
"""Prefix of the keys of all parts of range sets; the id follows."""


@dataclass(frozen=True)
class ModelKeys:
    """The keys of one served model."""

    model: str

    @property
    def range_sets(self) -> str:
        """Sorted set of the ids of published range sets, by time of publication."""
        return f"{PREFIX}rangesets:{self.model}"

    @property
    def live(self) -> str:
        """The live state, as JSON."""
        return f"{PREFIX}live:{self.model}"

    @property
    def audit(self) -> str:
        """Capped stream of changes to the live state."""
        return f"{PREFIX}audit:{self.model}"

    @property
    def replicas(self) -> str:
        """Hash of each replica's status as JSON, by replica name; the field `since` is the time of the first status."""
        return f"{PREFIX}replicas:{self.model}"

    @property
    def jobs(self) -> str:
        """The fits started over HTTP, as JSON."""
        return f"{PREFIX}jobs:{self.model}"

    @property
    def job_lease(self) -> str:
        """The status of the server that runs the fits, as JSON; expires unless it is renewed."""
        return f"{PREFIX}job-lease:{self.model}"

    @property
    def hint(self) -> str:
        """The message on `CHANGES` that makes readers of this model read again."""
        return json.dumps({"model": self.model})


def part_key(range_set: str, part: str) -> str:
    """Key of one part of a range set, by its name in `range_store.storage.codec`, e.g. "layer:3:serve"."""
    return f"{RANGE_SET}{range_set}:{part}"


def metadata_key(range_set: str) -> str:
    """Key of a range set's provenance and part digests, as JSON."""
    return part_key(range_set, "meta")


_LIBRARY = """
-- the active range set, and whether the live state is readable
local function active_range_set(live_key)
  local live = redis.call('GET', live_key)
  if not live then return nil, true end
  local readable, state = pcall(cjson.decode, live)
  if not readable or type(state) ~= 'table' then return nil, false end
  return state['range_set'], true
end

local function release(model, range_sets, prefix, id)
  redis.call('ZREM', range_sets, id)
  redis.call('SREM', prefix .. id .. ':models', model)
  if redis.call('SCARD', prefix .. id .. ':models') > 0 then return end
  local meta = redis.call('GET', prefix .. id .. ':meta')
  local readable, decoded = pcall(cjson.decode, meta or '')
  if readable and type(decoded) == 'table' and type(decoded['parts']) == 'table' then
    for part in pairs(decoded['parts']) do
      redis.call('UNLINK', prefix .. id .. ':' .. part)
      local piece = 1
      while redis.call('UNLINK', prefix .. id .. ':' .. part .. ':' .. piece) == 1 do piece = piece + 1 end
    end
  end
  redis.call('UNLINK', prefix .. id .. ':meta')
end
"""

LIST = """
-- KEYS: range sets. ARGV: prefix. Returns id, time and metadata ('' if lost) of each, newest first.
local found = {}
local listed = redis.call('ZREVRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #listed, 2 do
  found[#found + 1] = {listed[i], listed[i + 1], redis.call('GET', ARGV[1] .. listed[i] .. ':meta') or ''}
end
return found
"""

PUT_PART = """
-- KEYS: part. ARGV: bytes, seconds until an unpublished part expires.
-- A stored part is repaired if it differs. A published part never gets an expiry.
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2]) then return 1 end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then redis.call('SET', KEYS[1], ARGV[1], 'KEEPTTL') end
if redis.call('PTTL', KEYS[1]) >= 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
# KEEPTTL needs Redis 6.0, the oldest version that is supported

PUBLISH = (
    _LIBRARY
    + """
-- KEYS: range sets, live, then every part. ARGV: id, model, prefix, range sets to keep, channel, hint, every length.
-- Returns the key of a part that is missing or has another length, or an empty string.
for i = 3, #KEYS do
  if redis.call('STRLEN', KEYS[i]) ~= tonumber(ARGV[i + 4]) then return KEYS[i] end
end
for i = 3, #KEYS do redis.call('PERSIST', KEYS[i]) end
local now = redis.call('TIME')
redis.call('SADD', ARGV[3] .. ARGV[1] .. ':models', ARGV[2])
redis.call('ZADD', KEYS[1], now[1] .. '.' .. string.format('%06d', now[2]), ARGV[1])
local active, readable = active_range_set(KEYS[2])
if readable then
  for _, id in ipairs(redis.call('ZREVRANGE', KEYS[1], ARGV[4], -1)) do
    if id ~= active then release(ARGV[2], KEYS[1], ARGV[3], id) end
  end
end
redis.call('PUBLISH', ARGV[5], ARGV[6])
return ''
"""
)

REMOVE = (
    _LIBRARY
    + """
-- KEYS: range sets, live. ARGV: id, model, prefix, channel, hint.
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 'unknown' end
local active, readable = active_range_set(KEYS[2])
if active == ARGV[1] or not readable then return 'active' end
release(ARGV[2], KEYS[1], ARGV[3], ARGV[1])
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 'removed'
"""
)

CHANGE_LIVE = """
-- KEYS: live, audit, range sets. ARGV: expected live state ('' if absent), new live state, id of a range set that must
-- be published ('' if none), channel, hint, length of the audit, request id ('' if none), then every new audit entry.
-- A client may send a change again whose reply was lost: that is 'done' too.
local current = redis.call('GET', KEYS[1]) or ''
if current == ARGV[2] then return 'done' end
if current ~= ARGV[1] then return 'conflict' end
if ARGV[3] ~= '' and not redis.call('ZSCORE', KEYS[3], ARGV[3]) then return 'unpublished' end
redis.call('SET', KEYS[1], ARGV[2])
for i = 8, #ARGV do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[6], '*', 'change', ARGV[i], 'request', ARGV[7])
end
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 'done'
"""

CHANGE_DOCUMENT = """
-- KEYS: a document. ARGV: expected document ('' if absent), new document, channel, hint.
local current = redis.call('GET', KEYS[1]) or ''
if current == ARGV[2] then return 'done' end
if current ~= ARGV[1] then return 'conflict' end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[3], ARGV[4])
return 'done'
"""

HOLD_LEASE = """
-- KEYS: lease. ARGV: holder, report as JSON with the holder as `runner`, milliseconds that the lease lasts.
-- Returns 1 if the caller holds the lease now, 0 while another one does.
local held = redis.call('GET', KEYS[1])
if held then
  local readable, report = pcall(cjson.decode, held)
  if readable and type(report) == 'table' and report['runner'] ~= ARGV[1] then return 0 end
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""

REPORT = """
-- KEYS: replicas. ARGV: name, generation ('' before the first), range set ('' if none), seconds until the status
-- expires, address of the replica's metrics ('' if none), dtype of the model's parameters ('' if unknown).
-- A call also removes expired statuses; in a large fleet only some calls do, so that the cost per call stays the same.
-- Returns the number of live replicas, or of stored statuses where it did not look for expired ones.
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
redis.call('HSETNX', KEYS[1], 'since', string.format('%.6f', now))
local generation, range_set, metrics, dtype = ARGV[2], ARGV[3], ARGV[5], ARGV[6]
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode({
  generation = generation ~= '' and generation or cjson.null,
  range_set = range_set ~= '' and range_set or cjson.null,
  metrics = metrics ~= '' and metrics or nil,
  dtype = dtype ~= '' and dtype or nil,
  at = now,
  expires = now + tonumber(ARGV[4]),
}))
local size = redis.call('HLEN', KEYS[1])
if tonumber(time[2]) % size >= 64 then
  return size - 1
end
local live = 0
local held = redis.call('HGETALL', KEYS[1])
for i = 1, #held, 2 do
  if held[i] ~= 'since' then
    local readable, report = pcall(cjson.decode, held[i + 1])
    if readable and type(report) == 'table' and type(report['expires']) == 'number' and report['expires'] > now then
      live = live + 1
    else
      redis.call('HDEL', KEYS[1], held[i])
    end
  end
end
return live
"""
