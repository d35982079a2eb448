-- Lease the next open batch that nobody holds: that of the tenant with the fewest leased ones.
-- args: owner, lease, most (a lease that ends later than in so many seconds holds no more), without
-- (tenants that are left out, as keys). Returns the batch, or false.

local held, free = {}, {}
for _, id in ipairs(redis.call('ZRANGE', open_key, 0, -1)) do
  local tenant = redis.call('HGET', batch_key(id), 'tenant')
  local has_owner, until_s = leased(id)
  if has_owner and until_s <= now + args.most then held[tenant] = (held[tenant] or 0) + 1
  elseif not args.without[tenant] then free[#free + 1] = {id, tenant} end
end
local best
for _, one in ipairs(free) do
  local count = held[one[2]] or 0
  if not best or count < best[2] then best = {one[1], count} end
end
if not best then return false end
redis.call('HSET', batch_key(best[1]), 'owner', args.owner, 'until', now + args.lease)
return load_batch(best[1])
