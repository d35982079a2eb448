-- Return a conversation, or false. args: id.

local tenant, created, metadata, used, newest = unpack(redis.call('HMGET', container_key(args.id),
  'tenant', 'created', 'metadata', 'used', 'newest'))
if not metadata then return false end
return {args.id, tenant, created, metadata, used, newest}
