-- Replace a conversation's metadata. args: id. ARGV[3]: the metadata. Returns 1 where it is there.

local tenant, metadata = unpack(
  redis.call('HMGET', container_key(args.id), 'tenant', 'metadata'))
if not metadata then return 0 end
redis.call('HSET', container_key(args.id), 'metadata', ARGV[3])
add_amounts(args.id, tenant, 0, #ARGV[3] - #metadata)
return 1
