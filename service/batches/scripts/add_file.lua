-- Add a file, or replace the one of this id, where its tenant has room.
-- args: id, tenant, size, created, expires, most (bytes, or absent). ARGV[3]: its record.
-- Returns 1, or 0 where there is no room.

local earlier = redis.call('HGET', files_key, args.id)
local others = tonumber(redis.call('HGET', bytes_key, args.tenant) or '0')
if earlier then others = others - cjson.decode(earlier).size end
if args.most and others + args.size > args.most then return 0 end
subtract_file(args.id)
redis.call('HSET', files_key, args.id, ARGV[3])
redis.call('HINCRBY', bytes_key, args.tenant, string.format('%.0f', args.size))
redis.call('ZADD', expiry_key, args.expires, args.id)
redis.call('ZADD', key('files-of:' .. args.tenant), args.created, args.id)
return 1
