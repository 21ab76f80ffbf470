"""The atomic steps of the store, in Lua: Redis runs each as a whole or not at all.

Only ids and lengths are decided here; what a range set or a live state is, Python knows.
"""

_LIBRARY = """
local function active_range_set(live_key)
  local live = redis.call('GET', live_key)
  if not live then return nil, true end
  local readable, state = pcall(cjson.decode, live)
  if not readable or type(state) ~= 'table' then return nil, false end
  return state['range_set'], true
end

local function let_go(model, range_sets, prefix, id)
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
-- KEYS: range sets. ARGV: prefix. Gives id, time and meta data ('' if lost) of each, newest first.
local found = {}
local listed = redis.call('ZREVRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #listed, 2 do
  found[#found + 1] = {listed[i], listed[i + 1], redis.call('GET', ARGV[1] .. listed[i] .. ':meta') or ''}
end
return found
"""

PUT_PART = """
-- KEYS: part. ARGV: bytes, seconds that it lasts unless published.
-- A part that is there already is repaired if it differs, and never given an end if it is published.
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2]) then return 1 end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then redis.call('SET', KEYS[1], ARGV[1], 'KEEPTTL') end
if redis.call('PTTL', KEYS[1]) >= 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
# Redis 6.0 brought KEEPTTL, the oldest version that the store runs on.

PUBLISH = (
    _LIBRARY
    + """
-- KEYS: range sets, live, then every part. ARGV: id, model, prefix, how many to keep, channel, hint, then every length.
-- Gives the name of a part that is missing or of another length, else an empty string.
for i = 3, #KEYS do
  if redis.call('STRLEN', KEYS[i]) ~= tonumber(ARGV[i + 4]) then return KEYS[i] end
end
for i = 3, #KEYS do redis.call('PERSIST', KEYS[i]) end
local now = redis.call('TIME')
redis.call('SADD', ARGV[3] .. ARGV[1] .. ':models', ARGV[2])
redis.call('ZADD', KEYS[1], now[1] .. '.' .. string.format('%06d', now[2]), ARGV[1])
local active, known = active_range_set(KEYS[2])
if known then
  for _, id in ipairs(redis.call('ZREVRANGE', KEYS[1], ARGV[4], -1)) do
    if id ~= active then let_go(ARGV[2], KEYS[1], ARGV[3], id) end
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
local active, known = active_range_set(KEYS[2])
if active == ARGV[1] or not known then return 'active' end
let_go(ARGV[2], KEYS[1], ARGV[3], ARGV[1])
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 'removed'
"""
)

CHANGE_LIVE = """
-- KEYS: live, audit, range sets. ARGV: live as it was read ('' if absent), live as it is to be, id that must be
-- published ('' if none must), channel, hint, length of the audit, request ('' if none asked), then every entry of the
-- audit.
-- A change whose answer was lost on the way may be sent again: it is then found done.
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
-- KEYS: a document. ARGV: it as it was read ('' if absent), as it is to be, channel, hint.
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
-- KEYS: replicas. ARGV: name, generation ('' before the first), range set ('' if none), seconds that the report holds,
-- address of its metrics ('' if they are not served), type of the model's parameters ('' if unknown).
-- Who reports sweeps out what nobody renewed: each one where they are few, one in so many where they are more, so that
-- a report costs no more in a large fleet. Gives how many replicas report now; those to be swept out may be among them.
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
