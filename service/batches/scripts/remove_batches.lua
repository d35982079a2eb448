-- Remove batches that have ended and were made before a time. args: before. Returns their number.

local old = redis.call('ZRANGEBYSCORE', ended_key, '-inf', '(' .. args.before, 'LIMIT', 0, 1000)
for _, id in ipairs(old) do
  redis.call('ZREM', key('batches-of:' .. redis.call('HGET', batch_key(id), 'tenant')), id)
  redis.call('ZREM', ended_key, id)
  redis.call('DEL', batch_key(id), key('models:' .. id))
end
return #old
