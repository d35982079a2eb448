-- Remove the items of an id. args: id, item. Returns how many they were.

local tenant = redis.call('HGET', container_key(args.id), 'tenant')
if not tenant then return 0 end
local count = 0
for _, number in ipairs(redis.call('ZRANGE', key('o:' .. args.id), 0, -1)) do
  local item = redis.call('HGET', key('i:' .. args.id), number)
  if string.match(item, '^[^ ]*') == args.item then
    remove_item(args.id, tenant, number)
    count = count + 1
  end
end
return count
