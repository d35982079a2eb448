-- The states of the open batches, and when the oldest was made (empty without one).

local statuses = {}
for _, id in ipairs(redis.call('ZRANGE', open_key, 0, -1)) do
  statuses[#statuses + 1] = redis.call('HGET', batch_key(id), 'status')
end
local oldest = redis.call('ZRANGE', open_key, 0, 0, 'WITHSCORES')
return {statuses, oldest[2] or ''}
