-- Add a response and its items.
-- args: id, tenant, created, seen, inputs, outputs, ids, spare, most_entries, most_bytes, and where
-- it has them conversation and previous. ARGV[3]: its head, then the items' bodies.
-- Returns whether it is kept, and how many entries were evicted.

local container = args.conversation or args.id
local entries, size = 1, #ARGV[3] + size_of_items(4)
if args.conversation then
  if redis.call('HGET', container_key(container), 'tenant') ~= args.tenant then return {0, 0} end
  entries = redis.call('SCARD', key('m:' .. container)) + 1
  size = size + number_of(container_key(container), 'bytes')
end
if exceeds(entries, size) then return {0, 0} end
if not args.conversation then insert_container(container, args.tenant, args.created) end
local first = append(container, args.tenant, 4)
redis.call('HSET', response_key(args.id), 'container', container, 'tenant', args.tenant,
  'created', args.created, 'seen', args.seen, 'first', first, 'inputs', args.inputs,
  'outputs', args.outputs, 'head', ARGV[3])
if args.previous then redis.call('HSET', response_key(args.id), 'previous', args.previous) end
redis.call('SADD', key('m:' .. container), args.id)
-- The first response of a conversation takes the conversation's own place.
add_amounts(container, args.tenant,
  entries - number_of(container_key(container), 'entries'), #ARGV[3])
-- The responses before it are used now. A chain has no loop, because ids are new; it is bounded
-- even so.
local at, steps = args.previous, 1
while at and steps < 100000 do
  local holder, tenant, previous = unpack(
    redis.call('HMGET', response_key(at), 'container', 'tenant', 'previous'))
  if not holder then break end
  use(holder, tenant, steps * 1e-5)
  at, steps = previous, steps + 1
end
return {1, make_room(args.tenant, container)}
