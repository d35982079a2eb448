-- The states of the open batches, when the oldest was made (empty without one), and the number of
-- their lines with a result.

local statuses, lines = {}, 0
for _, id in ipairs(redis.call('ZRANGE', open_key, 0, -1)) do
  local status, done, failed =
    unpack(redis.call('HMGET', batch_key(id), 'status', 'completed', 'failed'))
  statuses[#statuses + 1] = status
  lines = lines + (done or 0) + (failed or 0)
end
local oldest = redis.call('ZRANGE', open_key, 0, 0, 'WITHSCORES')
return {statuses, oldest[2] or '', lines}
