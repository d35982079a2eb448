-- Renew a lease. args: id, owner, lease. Returns the batch, or false where it is not this owner's.

local batch = batch_key(args.id)
if redis.call('HGET', batch, 'owner') ~= args.owner then return false end
redis.call('HSET', batch, 'until', now + args.lease)
return load_batch(args.id)
