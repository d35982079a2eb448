-- Give a lease back. args: id, owner.

local batch = batch_key(args.id)
if redis.call('HGET', batch, 'owner') == args.owner then redis.call('HDEL', batch, 'owner', 'until') end
return 1
