-- End a group of work items: none of it is charged any more. args: group.

local once_key = key('once:' .. args.group)
redis.call('DEL', once_key)
redis.call('HSET', once_key, '*', '1')
redis.call('EXPIRE', once_key, WORK_DAYS * DAY_S)
return 1
