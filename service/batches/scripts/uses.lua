-- An open batch that reads a file, or false. args: id.

for _, id in ipairs(redis.call('ZRANGE', open_key, 0, -1)) do
  if redis.call('HGET', batch_key(id), 'input') == args.id then return id end
end
return false
