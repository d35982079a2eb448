"""The scripts that run inside Redis: each is one step that nobody can come between.

Amounts travel as strings of digits, because Redis' JSON keeps 14 digits of a number only.
Names below `{prefix}:`

- `a:ACCOUNT` hash: `s<start>` spent and `r<start>` reserved in the window (or piece of one)
  that starts then (later than now: a debt), `h` held by slices, `w` when a claim was refused while
  there were slices
- `own:OWNER` hash: claim → its lines; `sl:OWNER` hash: account → slice; `o:OWNER` hash: numbers
  of the last beat and of the last notes; `owners` sorted set: owner → end of its lease
- `heard`: when anybody was last heard of; `gone:ID`, `lapsed:ID`: what became of claims
- `n:NAME` hash: notes
- `t:TABLE` hash: record → its value; `tv:TABLE`: another one whenever a record changed
"""

from __future__ import annotations

from service.store.protocol import MOST_WINDOWS_OWED

PRELUDE = """
local P, A = ARGV[1], cjson.decode(ARGV[2])
local now = tonumber(A.now)
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local GAP_MS, DAY_S = 5000, 86400

local function key(name) return P .. ':' .. name end
local function int(x)
  if x == 0 then return '0' end  -- else it may be "-0"
  return string.format('%.0f', x)
end

local function give_back(lines)
  for _, line in ipairs(lines) do
    local name, field = key('a:' .. line[1]), 'r' .. line[2]
    if redis.call('HEXISTS', name, field) == 1 then
      redis.call('HINCRBY', name, field, int(-tonumber(line[3])))
    end
  end
end

local function release_owner(owner)
  local claims = redis.call('HGETALL', key('own:' .. owner))
  for i = 1, #claims, 2 do
    give_back(cjson.decode(claims[i + 1]))
    redis.call('SET', key('lapsed:' .. claims[i]), '1', 'EX', DAY_S)
  end
  local slices = redis.call('HGETALL', key('sl:' .. owner))
  for i = 1, #slices, 2 do
    redis.call('HINCRBY', key('a:' .. slices[i]), 'h', int(-tonumber(slices[i + 1])))
  end
  redis.call('DEL', key('own:' .. owner), key('sl:' .. owner), key('o:' .. owner))
  redis.call('ZREM', key('owners'), owner)
end

local function sweep()
  local heard = tonumber(redis.call('GET', key('heard')) or '0')
  if now - heard > GAP_MS then
    -- Nobody was heard of: it was the store that was away, not they.
    for _, owner in ipairs(redis.call('ZRANGE', key('owners'), 0, -1)) do
      redis.call('ZADD', key('owners'), int(now + A.lease), owner)
    end
  end
  if now - heard > 250 or now < heard then redis.call('SET', key('heard'), int(now)) end
  local dead = redis.call('ZRANGEBYSCORE', key('owners'), '-inf', int(now), 'LIMIT', 0, 1)
  if dead[1] then
    redis.call('SET', key('lapsed-owner:' .. dead[1]), '1', 'EX', DAY_S)
    release_owner(dead[1])
  end
end

-- An account's windows that count now; those that do not are forgotten.
local function load(acc)
  local start, finish, oldest = 0, 0, 0
  if acc.kind == 'sliding' then
    start = now - now % acc.part
    finish, oldest = start + acc.part, start - acc.length
  elseif acc.kind ~= 'now' then
    start = nil
    for _, span in ipairs(acc.spans) do
      if span[1] <= now and now < span[2] then start, finish = span[1], span[2] end
    end
    if not start then error('the clocks of gateway and store differ too much') end
    oldest = start
  end
  local c = {start = start, finish = finish, spent = 0, reserved = 0, held = 0, at = {}}
  local flat = redis.call('HGETALL', key('a:' .. acc.name))
  for i = 1, #flat, 2 do
    local field, value = flat[i], tonumber(flat[i + 1])
    if field == 'h' then
      c.held = value
    elseif field == 'w' then
      c.wanted = value
    else
      local at = tonumber(string.sub(field, 2))
      if at < oldest then
        redis.call('HDEL', key('a:' .. acc.name), field)
      else
        c.at[at] = (c.at[at] or 0) + value
        if string.sub(field, 1, 1) == 's' then c.spent = c.spent + value
        else c.reserved = c.reserved + value end
      end
    end
  end
  c.taken = c.spent + c.reserved + c.held
  return c
end

local function keep(acc, c)
  local left = math.max(c.finish - now, 2 * acc.length, 0) + DAY_S * 1000
  redis.call('PEXPIRE', key('a:' .. acc.name), int(left))
end

local function note(n)
  if not n then return end
  for _, pair in ipairs(n.counts) do
    redis.call('HINCRBY', key('n:' .. n.name), pair[1], pair[2])
  end
  redis.call('EXPIRE', key('n:' .. n.name), n.keep)
end
"""

RESERVE = (
    PRELUDE
    + """
sweep()
if redis.call('EXISTS', key('gone:' .. A.id)) == 1 then return cjson.encode({gone = true}) end

local function amount(line, tokens)
  return math.ceil(line.base + line.per_token * tokens - 1e-6)
end
local function affordable(line, room)
  if line.base > room then return -1 end
  if line.per_token <= 0 then return 2 ^ 53 end
  local tokens = math.floor((room - line.base) / line.per_token + 1e-6)
  if amount(line, tokens) <= room then return tokens end
  return tokens - 1
end
local function retry_ms(line, c)
  local acc, wanted = line.account, amount(line, A.least)
  if wanted > acc.limit then return -1, false end
  local missing = c.taken + wanted - acc.limit
  if missing <= c.held then return 1000, true end
  if acc.kind == 'sliding' then
    local starts = {}
    for at in pairs(c.at) do starts[#starts + 1] = at end
    table.sort(starts)
    local need = missing - c.held
    for _, at in ipairs(starts) do
      need = need - c.at[at]
      if need <= 0 then return at + acc.part + acc.length - now, false end
    end
  end
  if acc.kind == 'now' or missing <= c.reserved + c.held then return 1000, true end
  return c.finish - now, false
end

local tokens, worst, counts = A.tokens, nil, {}
for i, line in ipairs(A.lines) do
  local c = load(line.account)
  counts[i] = c
  local fits = affordable(line, line.account.limit - c.taken)
  if fits < A.least then
    local wait, busy = retry_ms(line, c)
    if c.held > 0 then
      -- Slices are for when there is enough: they are given back (see the beat).
      redis.call('HSET', key('a:' .. line.account.name), 'w', int(now))
    end
    if not worst or (worst.wait >= 0 and (wait < 0 or wait > worst.wait)) then
      worst = {account = line.account.name, wait = wait, busy = busy}
    end
  end
  tokens = math.min(tokens, fits)
end
if worst then return cjson.encode({refused = worst}) end
local record, amounts, starts = {}, {}, {}
for i, line in ipairs(A.lines) do
  local size, start = int(amount(line, tokens)), int(counts[i].start)
  local name = line.account.name
  redis.call('HINCRBY', key('a:' .. name), 'r' .. start, size)
  keep(line.account, counts[i])
  record[i] = {name, start, size}
  amounts[i], starts[i] = size, start
end
redis.call('HSET', key('own:' .. A.owner), A.id, cjson.encode(record))
if redis.call('ZSCORE', key('owners'), A.owner) == false then
  redis.call('ZADD', key('owners'), int(now + A.lease), A.owner)
end
return cjson.encode({tokens = int(tokens), amounts = amounts, starts = starts})
"""
)

# `lines`: {account, start, reserved, used, limit, length, part}; part is 0 but in a sliding window.
# `offline`: granted from a slice. `unknown`: whether the claim was ever granted is not known; if it
# comes later, it comes to nothing.
SETTLE = (
    PRELUDE
    + f"local MOST_OWED = {MOST_WINDOWS_OWED}"
    + """
local function add(line, start, amount)
  if amount == 0 then return end
  redis.call('HINCRBY', key('a:' .. line[1]), 's' .. start, int(amount))
  redis.call('EXPIRE', key('a:' .. line[1]), 70 * DAY_S, 'NX')
end
-- More was used than reserved: what this window has no room for is a debt of the next ones.
local function owe(line, over)
  local limit, length, part = tonumber(line[5]), tonumber(line[6]), tonumber(line[7])
  local piece = now - now % part
  local taken = {}
  local flat = redis.call('HGETALL', key('a:' .. line[1]))
  for i = 1, #flat, 2 do
    local kind, later = string.sub(flat[i], 1, 1), 0
    if kind == 's' or kind == 'r' then
      local at = tonumber(string.sub(flat[i], 2))
      if at < piece - length then later = nil
      elseif at > piece then later = math.min(math.ceil((at - piece) / length), MOST_OWED) end
    elseif kind ~= 'h' then
      later = nil
    end
    if later then taken[later] = (taken[later] or 0) + tonumber(flat[i + 1]) end
  end
  for later = 0, MOST_OWED do
    local put = math.min(over, math.max(0, limit - (taken[later] or 0)))
    if later == MOST_OWED then put = over end
    add(line, int(piece + later * length), put)
    over = over - put
    if over <= 0 then return end
  end
end
local function charge(line, counts)
  local reserved, used = tonumber(line[3]), tonumber(line[4])
  local within = used
  if line[7] ~= '0' then within = math.min(used, reserved) end
  if counts then add(line, line[2], within) end
  if used > within then owe(line, used - within) end
end
local function charge_all()
  for _, line in ipairs(A.lines) do charge(line, true) end
end

if A.offline then
  if not redis.call('SET', key('gone:' .. A.id), '1', 'EX', DAY_S, 'NX') then return 0 end
  charge_all()
elseif redis.call('HDEL', key('own:' .. A.owner), A.id) == 1 then
  for _, line in ipairs(A.lines) do
    local name, field = key('a:' .. line[1]), 'r' .. line[2]
    local counts = redis.call('HEXISTS', name, field) == 1
    if counts then redis.call('HINCRBY', name, field, int(-tonumber(line[3]))) end
    charge(line, counts)
  end
elseif redis.call('DEL', key('lapsed:' .. A.id)) == 1 then
  charge_all()
else
  if A.unknown then redis.call('SET', key('gone:' .. A.id), '1', 'EX', DAY_S) end
  return 0
end
note(A.note)
return 1
"""
)

UNDO = (
    PRELUDE
    + """
local record = redis.call('HGET', key('own:' .. A.owner), A.id)
if record then
  give_back(cjson.decode(record))
  redis.call('HDEL', key('own:' .. A.owner), A.id)
end
redis.call('SET', key('gone:' .. A.id), '1', 'EX', DAY_S)
return 1
"""
)

BEAT = (
    PRELUDE
    + """
sweep()
local me = key('o:' .. A.owner)
if tonumber(redis.call('HGET', me, 'beat') or '0') >= A.beat then
  return cjson.encode({stale = true})
end
local known = redis.call('ZSCORE', key('owners'), A.owner) ~= false
local lapsed = redis.call('DEL', key('lapsed-owner:' .. A.owner)) == 1
redis.call('ZADD', key('owners'), int(now + A.lease), A.owner)
redis.call('HSET', me, 'beat', A.beat)
if #A.notes > 0 and tonumber(redis.call('HGET', me, 'notes') or '0') < A.batch then
  for _, n in ipairs(A.notes) do note(n) end
  redis.call('HSET', me, 'notes', A.batch)
end
redis.call('EXPIRE', me, DAY_S)
local told = {}
for i, one in ipairs(A.slices) do
  local acc, slices = one.account, key('sl:' .. A.owner)
  local c = load(acc)
  local mine = tonumber(redis.call('HGET', slices, acc.name) or '0')
  local had = math.min(mine, one.have)
  local room = acc.limit - (c.taken - mine)
  if c.wanted and now - c.wanted < GAP_MS then room = 0 end
  local new = math.max(had, math.min(had + one.more, math.ceil(A.share * room)))
  if new ~= mine then
    redis.call('HINCRBY', key('a:' .. acc.name), 'h', int(new - mine))
    keep(acc, c)
  end
  if new > 0 then redis.call('HSET', slices, acc.name, int(new))
  else redis.call('HDEL', slices, acc.name) end
  told[i] = {acc.name, int(new), int(room)}
end
return cjson.encode({known = known, lapsed = lapsed, slices = told})
"""
)

LEAVE = (
    PRELUDE
    + """
release_owner(A.owner)
return 1
"""
)

# Claims that a store which lost its memory does not know any more.
RESTORE = (
    PRELUDE
    + """
for _, claim in ipairs(A.claims) do
  if redis.call('EXISTS', key('gone:' .. claim.id), key('lapsed:' .. claim.id)) == 0
    and redis.call('HSETNX', key('own:' .. A.owner), claim.id, cjson.encode(claim.lines)) == 1 then
    for _, line in ipairs(claim.lines) do
      redis.call('HINCRBY', key('a:' .. line[1]), 'r' .. line[2], line[3])
      redis.call('EXPIRE', key('a:' .. line[1]), 70 * DAY_S, 'NX')
    end
  end
end
return 1
"""
)

BALANCES = (
    PRELUDE
    + """
local told = {}
for i, acc in ipairs(A.accounts) do
  local c = load(acc)
  told[i] = {int(c.spent), int(c.reserved + c.held), int(c.start), int(c.finish)}
end
return cjson.encode(told)
"""
)

# A record of a table, if it still is what was read: ARGV[3], or nothing with `absent`.
REPLACE = """
local P, A = ARGV[1], cjson.decode(ARGV[2])
local records = P .. ':t:' .. A.table
local found = redis.call('HGET', records, A.id)
if A.absent then
  if found then return 0 end
elseif found ~= ARGV[3] then return 0 end
redis.call('HSET', records, A.id, ARGV[4])
redis.call('SET', P .. ':tv:' .. A.table, A.version)
return 1
"""
