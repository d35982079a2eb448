-- Remove a response with its items. args: id. Returns 1 where it was there.

local container, tenant, first, inputs, outputs, head = unpack(
  redis.call('HMGET', response_key(args.id), 'container', 'tenant', 'first', 'inputs', 'outputs',
    'head'))
if not container then return 0 end
if container == args.id then
  remove_container(container)
  return 1
end
first = tonumber(first)
for number = first, first + tonumber(inputs) + tonumber(outputs) - 1 do
  remove_item(container, tenant, string.format('%d', number))
end
redis.call('DEL', response_key(args.id))
redis.call('SREM', key('m:' .. container), args.id)
local left = math.max(1, redis.call('SCARD', key('m:' .. container)))
add_amounts(container, tenant, left - number_of(container_key(container), 'entries'), -#head)
return 1
