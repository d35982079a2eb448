-- Return a part of a container's items. args: id, limit, and where they are given after and
-- ascending.

local from = args.ascending and '-inf' or '+inf'
if args.after then
  local number = redis.call('HGET', key('n:' .. args.id), args.after)
  if not number then return {} end
  from = '(' .. number
end
local numbers
if args.ascending then
  numbers = redis.call('ZRANGEBYSCORE', key('o:' .. args.id), from, '+inf', 'LIMIT', 0, args.limit)
else
  numbers = redis.call('ZREVRANGEBYSCORE', key('o:' .. args.id), from, '-inf', 'LIMIT', 0,
    args.limit)
end
local found = {}
for i, number in ipairs(numbers) do found[i] = redis.call('HGET', key('i:' .. args.id), number) end
return found
