-- The beginning of every script. ARGV[1]: prefix of all names; ARGV[2]: arguments as JSON; what
-- follows are values as bytes.

local PREFIX, args = ARGV[1], cjson.decode(ARGV[2])

-- Tests give the time; otherwise it is the server's. Seconds since 1970.
local now = args.now
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end

local function key(name) return PREFIX .. ':s:' .. name end
local function container_key(id) return key('c:' .. id) end
local function response_key(id) return key('r:' .. id) end
local amount_key, used_key = key('amount'), key('used')
local function tenant_key(tenant) return key('used-of:' .. tenant) end

local function add_amounts(container, tenant, entries, size)
  redis.call('HINCRBY', container_key(container), 'entries', entries)
  redis.call('HINCRBY', container_key(container), 'bytes', size)
  redis.call('HINCRBY', amount_key, 'entries/' .. tenant, entries)
  redis.call('HINCRBY', amount_key, 'bytes/' .. tenant, size)
  redis.call('HINCRBY', amount_key, 'entries', entries)
  redis.call('HINCRBY', amount_key, 'bytes', size)
end

local function number_of(hash, field)
  return tonumber(redis.call('HGET', hash, field) or '0')
end

-- Count a container as used now, or a little earlier: of those that are used at once, the one that
-- is used earliest makes room first.
local function use(container, tenant, earlier)
  local at = string.format('%.6f', now - (earlier or 0))
  redis.call('HSET', container_key(container), 'used', at)
  redis.call('ZADD', used_key, at, container)
  redis.call('ZADD', tenant_key(tenant), at, container)
end

local function insert_container(container, tenant, created)
  redis.call('HSET', container_key(container), 'tenant', tenant, 'created', created,
    'entries', '0', 'bytes', '0', 'newest', '0')
  add_amounts(container, tenant, 1, 0)
end

-- Add items to a container, whose ids are in args.ids and whose bodies are ARGV[from] and on.
-- One whose id another one has gets that of args.spare. Returns the first one's number.
local function append(container, tenant, from)
  local first = number_of(container_key(container), 'newest') + 1
  local size = 0
  for i, id in ipairs(args.ids) do
    local number, body = string.format('%d', first + i - 1), ARGV[from + i - 1]
    if redis.call('HEXISTS', key('n:' .. container), id) == 1 then
      id = args.spare[i]
      args.ids[i] = id
    end
    redis.call('HSET', key('i:' .. container), number, id .. ' ' .. body)
    redis.call('HSET', key('n:' .. container), id, number)
    redis.call('ZADD', key('o:' .. container), number, number)
    size = size + #id + #body
  end
  redis.call('HSET', container_key(container), 'newest',
    string.format('%d', first + #args.ids - 1))
  add_amounts(container, tenant, 0, size)
  use(container, tenant)
  return first
end

-- The bytes of items that are to be added, as `append` counts them.
local function size_of_items(from)
  local size = 0
  for i, id in ipairs(args.ids) do size = size + #id + #ARGV[from + i - 1] end
  return size
end

local function remove_container(container)
  local tenant, entries, size = unpack(redis.call('HMGET', container_key(container),
    'tenant', 'entries', 'bytes'))
  if not tenant then return 0 end
  for _, id in ipairs(redis.call('SMEMBERS', key('m:' .. container))) do
    redis.call('DEL', response_key(id))
  end
  add_amounts(container, tenant, -tonumber(entries), string.format('%d', -tonumber(size)))
  redis.call('DEL', container_key(container), key('i:' .. container), key('n:' .. container),
    key('o:' .. container), key('m:' .. container))
  redis.call('ZREM', used_key, container)
  redis.call('ZREM', tenant_key(tenant), container)
  return tonumber(entries)
end

local function exceeds(entries, size) return entries > args.most_entries or size > args.most_bytes end

-- Remove a tenant's containers that were not used for longest, but for one, until all fits. That
-- one alone must fit. Returns how many entries were removed.
local function make_room(tenant, kept)
  local evicted = 0
  while exceeds(number_of(amount_key, 'entries/' .. tenant),
      number_of(amount_key, 'bytes/' .. tenant)) do
    local oldest = redis.call('ZRANGE', tenant_key(tenant), 0, 1)
    local other = oldest[1] ~= kept and oldest[1] or oldest[2]
    if not other then break end
    evicted = evicted + remove_container(other)
  end
  return evicted
end

-- The items of a container from one number to another, each as its id, a space, and its body.
local function range(container, first, last)
  local found = {}
  for number = first, last do
    local item = redis.call('HGET', key('i:' .. container), string.format('%d', number))
    if item then found[#found + 1] = item end
  end
  return found
end

-- A response for the client; its second value is its size.
local function load_response(id)
  local container, tenant, created, head, previous, seen, first, inputs, outputs = unpack(
    redis.call('HMGET', response_key(id), 'container', 'tenant', 'created', 'head', 'previous',
      'seen', 'first', 'inputs', 'outputs'))
  if not container then return false, 0 end
  first, inputs, outputs = tonumber(first), tonumber(inputs), tonumber(outputs)
  local given = range(container, first, first + inputs - 1)
  local made = range(container, first + inputs, first + inputs + outputs - 1)
  local size = #head
  for _, items in ipairs({given, made}) do
    for _, item in ipairs(items) do size = size + #item - 1 end
  end
  local used = redis.call('HGET', container_key(container), 'used')
  return {id, tenant, created, head, given, made, previous, container, seen, used}, size
end

-- Remove an item by its number.
local function remove_item(container, tenant, number)
  local item = redis.call('HGET', key('i:' .. container), number)
  if not item then return end
  local id = string.match(item, '^[^ ]*')
  redis.call('HDEL', key('i:' .. container), number)
  redis.call('ZREM', key('o:' .. container), number)
  if redis.call('HGET', key('n:' .. container), id) == number then
    redis.call('HDEL', key('n:' .. container), id)
  end
  add_amounts(container, tenant, 0, 1 - #item)
end
