-- The beginning of every script. ARGV[1]: prefix of all names; ARGV[2]: arguments as JSON.
-- Amounts travel as strings of digits, because Redis' JSON keeps 14 digits of a number only.

local PREFIX, args = ARGV[1], cjson.decode(ARGV[2])
local HEARTBEAT_GAP_MS, DAY_S = 5000, 86400
-- How long an item of work is remembered, which is longer than any batch may take.
local WORK_DAYS = 70

-- Tests give the time; otherwise it is the server's.
local now = tonumber(args.now)
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local function key(name) return PREFIX .. ':' .. name end
local function account_key(account) return key('a:' .. account) end

local function int(number)
  if number == 0 then return '0' end  -- else it may be "-0"
  return string.format('%.0f', number)
end

-- Fields of an account's hash.
local HELD_FIELD, WANTED_FIELD = 'h', 'w'
local function spent_field(start) return 's' .. start end
local function reserved_field(start) return 'r' .. start end

-- A line of a stored claim: {account, start of its window, amount reserved}.
local function release_lines(lines)
  for _, line in ipairs(lines) do
    local account, start, amount = line[1], line[2], tonumber(line[3])
    local field = reserved_field(start)
    if redis.call('HEXISTS', account_key(account), field) == 1 then
      redis.call('HINCRBY', account_key(account), field, int(-amount))
    end
  end
end

local function release_owner(owner)
  local claims = redis.call('HGETALL', key('own:' .. owner))
  for i = 1, #claims, 2 do
    local claim_id, lines = claims[i], claims[i + 1]
    release_lines(cjson.decode(lines))
    redis.call('SET', key('lapsed:' .. claim_id), '1', 'EX', DAY_S)
  end
  local quotas = redis.call('HGETALL', key('sl:' .. owner))
  for i = 1, #quotas, 2 do
    local account, amount = quotas[i], tonumber(quotas[i + 1])
    redis.call('HINCRBY', account_key(account), HELD_FIELD, int(-amount))
  end
  redis.call('DEL', key('own:' .. owner), key('sl:' .. owner), key('o:' .. owner))
  redis.call('ZREM', key('owners'), owner)
end

-- Release one owner whose lease has expired, if there is one.
local function release_expired_owner()
  local heard = tonumber(redis.call('GET', key('heard')) or '0')
  if now - heard > HEARTBEAT_GAP_MS then
    -- No owner sent anything: Redis was away, not the owners. All leases start again.
    for _, owner in ipairs(redis.call('ZRANGE', key('owners'), 0, -1)) do
      redis.call('ZADD', key('owners'), int(now + args.lease), owner)
    end
  end
  if now - heard > 250 or now < heard then redis.call('SET', key('heard'), int(now)) end
  local expired = redis.call('ZRANGEBYSCORE', key('owners'), '-inf', int(now), 'LIMIT', 0, 1)[1]
  if expired then
    redis.call('SET', key('lapsed-owner:' .. expired), '1', 'EX', DAY_S)
    release_owner(expired)
  end
end

-- Start and end of the current window (of its current part, if it slides), and the oldest start
-- that still counts.
local function current_window(account)
  if account.kind == 'now' then return 0, 0, 0 end
  if account.kind == 'sliding' then
    local start = now - now % account.part
    return start, start + account.part, start - account.length
  end
  local start, finish
  for _, span in ipairs(account.spans) do
    if span[1] <= now and now < span[2] then start, finish = span[1], span[2] end
  end
  if not start then error('the clocks of gateway and store differ too much') end
  return start, finish, start
end

-- Read an account's counts in the windows that count now, and delete the older ones.
local function load_account(account)
  local start, finish, oldest = current_window(account)
  local counts = {
    start = start, finish = finish, spent = 0, reserved = 0, held = 0, wanted = nil, by_start = {},
  }
  local by_start = counts.by_start
  local fields = redis.call('HGETALL', account_key(account.name))
  for i = 1, #fields, 2 do
    local field, value = fields[i], tonumber(fields[i + 1])
    if field == HELD_FIELD then
      counts.held = value
    elseif field == WANTED_FIELD then
      counts.wanted = value
    else
      local field_start = tonumber(string.sub(field, 2))
      if field_start < oldest then
        redis.call('HDEL', account_key(account.name), field)
      else
        by_start[field_start] = (by_start[field_start] or 0) + value
        if string.sub(field, 1, 1) == 's' then counts.spent = counts.spent + value
        else counts.reserved = counts.reserved + value end
      end
    end
  end
  counts.taken = counts.spent + counts.reserved + counts.held
  return counts
end

-- Keep an account for a day longer than its windows count.
local function extend_expiry(account, counts)
  local left = math.max(counts.finish - now, 2 * account.length, 0) + DAY_S * 1000
  redis.call('PEXPIRE', account_key(account.name), int(left))
end

local function add_usage_note(note)
  if not note then return end
  local note_key = key('n:' .. note.name)
  for _, pair in ipairs(note.counts) do
    local field, count = pair[1], pair[2]
    redis.call('HINCRBY', note_key, field, count)
  end
  redis.call('EXPIRE', note_key, note.keep)
end
