-- The beginning of every script. ARGV[1]: prefix of all names; ARGV[2]: arguments as JSON; what
-- follows are values as bytes.

local PREFIX, args = ARGV[1], cjson.decode(ARGV[2])

-- Tests give the time; otherwise it is the server's. Seconds since 1970.
local now = args.now
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end

local function key(name) return PREFIX .. ':b:' .. name end
local function batch_key(id) return key('B:' .. id) end
local function tenant_key(tenant) return key('open-of:' .. tenant) end

local files_key, expiry_key, bytes_key = key('files'), key('files-expire'), key('file-bytes')
local open_key, ended_key = key('open'), key('ended')

local COUNTS = {
  'completed', 'failed', 'prompt_tokens', 'completion_tokens', 'cost', 'cached_tokens',
  'reasoning_tokens',
}

-- A batch for the client: its record, its counts, and those of its models.
local function load_batch(id)
  local record = redis.call('HGET', batch_key(id), 'record')
  if not record then return false end
  local found = {record}
  for _, name in ipairs(COUNTS) do
    found[#found + 1] = redis.call('HGET', batch_key(id), name) or '0'
  end
  found[#found + 1] = redis.call('HGETALL', key('models:' .. id))
  return found
end

-- Whether a batch is leased now, and when the lease ends.
local function leased(id)
  local owner, until_s = unpack(redis.call('HMGET', batch_key(id), 'owner', 'until'))
  until_s = tonumber(until_s or '0')
  return owner and owner ~= '' and until_s > now, until_s
end

local function forget_results(id)
  redis.call('DEL', key('bodies:' .. id), key('settle:' .. id))
  redis.call('DEL', key('lines:' .. id .. ':0'), key('lines:' .. id .. ':1'))
end

local function subtract_file(id)
  local known = redis.call('HGET', files_key, id)
  if not known then return false end
  local file = cjson.decode(known)
  redis.call('HINCRBY', bytes_key, file.tenant, string.format('%.0f', -file.size))
  redis.call('HDEL', files_key, id)
  redis.call('ZREM', expiry_key, id)
  redis.call('ZREM', key('files-of:' .. file.tenant), id)
  return true
end
