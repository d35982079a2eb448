-- Remove containers that were not used since a time. args: before, most. Returns how many entries
-- they were.

local count = 0
local old = redis.call('ZRANGEBYSCORE', used_key, '-inf',
  '(' .. string.format('%.6f', args.before), 'LIMIT', 0, args.most)
for _, container in ipairs(old) do count = count + remove_container(container) end
return count
