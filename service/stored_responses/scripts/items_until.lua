-- Return a container's items up to a number. args: id, number, most_size.

local found, size = {}, 0
local numbers = redis.call('ZRANGEBYSCORE', key('o:' .. args.id), '-inf', args.number)
for i, number in ipairs(numbers) do
  found[i] = redis.call('HGET', key('i:' .. args.id), number)
  size = size + #found[i]
  if size > args.most_size then break end
end
return found
