-- Replace a batch whose version is one less. One that has ended loses its plan and its results.
-- args: id, version, status, sealed, ended, planned, lease (most time until the lease ends, or absent).
-- ARGV[3]: its record; ARGV[4]: its plan.

local batch = batch_key(args.id)
if tonumber(redis.call('HGET', batch, 'version') or '-2') ~= args.version - 1 then return 0 end
redis.call('HSET', batch, 'record', ARGV[3], 'version', args.version, 'status', args.status,
  'sealed', args.sealed and '1' or '0')
if args.planned then redis.call('HSET', batch, 'plan', ARGV[4]) end
if args.lease and leased(args.id) then
  local until_s = tonumber(redis.call('HGET', batch, 'until'))
  redis.call('HSET', batch, 'until', math.min(until_s, now + args.lease))
end
if args.ended then
  local tenant, created = unpack(redis.call('HMGET', batch, 'tenant', 'created'))
  redis.call('HDEL', batch, 'plan', 'owner', 'until')
  forget_results(args.id)
  redis.call('ZREM', open_key, args.id)
  redis.call('SREM', tenant_key(tenant), args.id)
  redis.call('ZADD', ended_key, created, args.id)
end
return 1
