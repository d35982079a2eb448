-- Add items to a conversation. args: id, ids, spare, most_entries, most_bytes. ARGV[3] and on: the
-- items' bodies. Returns whether they are kept, how many entries were evicted, and the items' ids.

local tenant = redis.call('HGET', container_key(args.id), 'tenant')
if not tenant then return {0, 0} end
local size = number_of(container_key(args.id), 'bytes') + size_of_items(3)
if exceeds(number_of(container_key(args.id), 'entries'), size) then return {0, 0} end
append(args.id, tenant, 3)
return {1, make_room(tenant, args.id), unpack(args.ids)}
