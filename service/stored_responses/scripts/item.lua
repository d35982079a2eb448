-- Return an item, or false. args: id, item.

local number = redis.call('HGET', key('n:' .. args.id), args.item)
return number and redis.call('HGET', key('i:' .. args.id), number)
