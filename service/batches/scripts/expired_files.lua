-- The records of files whose time is over and that no open batch reads. args: at.

local used = {}
for _, id in ipairs(redis.call('ZRANGE', open_key, 0, -1)) do
  used[redis.call('HGET', batch_key(id), 'input') or ''] = true
end
local found = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', expiry_key, '-inf', args.at)) do
  if not used[id] then found[#found + 1] = redis.call('HGET', files_key, id) end
end
return found
