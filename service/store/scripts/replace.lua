-- Replace a record of a table if it still is what was read: compare and set.
-- args: table, id, version, absent (there was no record). ARGV[3]: the value that was read;
-- ARGV[4]: the new one.

local records = key('t:' .. args.table)
local current = redis.call('HGET', records, args.id)
if args.absent then
  if current then return 0 end
elseif current ~= ARGV[3] then
  return 0
end
redis.call('HSET', records, args.id, ARGV[4])
redis.call('SET', key('tv:' .. args.table), args.version)
return 1
