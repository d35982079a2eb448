-- Add a batch, unless its tenant has too many open ones.
-- args: id, tenant, input, created, version, status, most. ARGV[3]: its record.

if redis.call('EXISTS', batch_key(args.id)) == 1 then return 1 end
if redis.call('SCARD', tenant_key(args.tenant)) >= args.most then return 0 end
redis.call('HSET', batch_key(args.id), 'record', ARGV[3], 'tenant', args.tenant,
  'input', args.input, 'created', args.created, 'version', args.version, 'status', args.status,
  'sealed', '0')
redis.call('ZADD', open_key, args.created, args.id)
redis.call('SADD', tenant_key(args.tenant), args.id)
redis.call('ZADD', key('batches-of:' .. args.tenant), args.created, args.id)
return 1
