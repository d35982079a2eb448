-- Release a claim that may or may not have been granted; one that arrives later is refused.
-- args: owner, id.

local stored_lines = redis.call('HGET', key('own:' .. args.owner), args.id)
if stored_lines then
  release_lines(cjson.decode(stored_lines))
  redis.call('HDEL', key('own:' .. args.owner), args.id)
end
redis.call('SET', key('gone:' .. args.id), '1', 'EX', DAY_S)
return 1
