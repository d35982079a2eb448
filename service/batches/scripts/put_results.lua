-- Add results of lines; the first one of a line counts, and a sealed batch takes none.
-- args: id, results ({line, failed, prompt_tokens, completion_tokens,
-- cached_tokens, reasoning_tokens, cost, settles, model (empty for none)}), owner (who has to have
-- leased the batch last, or absent).
-- ARGV[3], ARGV[4], ...: for each result its body and its settlements. Returns the added lines.

local batch, added = batch_key(args.id), {}
if redis.call('HGET', batch, 'sealed') ~= '0' then return added end
if not redis.call('ZSCORE', open_key, args.id) then return added end
if args.owner and redis.call('HGET', batch, 'owner') ~= args.owner then return added end
for i, result in ipairs(args.results) do
  local line = string.format('%d', result.line)
  if redis.call('HSETNX', key('bodies:' .. args.id), line, ARGV[1 + 2 * i]) == 1 then
    if result.settles then redis.call('HSET', key('settle:' .. args.id), line, ARGV[2 + 2 * i]) end
    local kind = result.failed and '1' or '0'
    redis.call('ZADD', key('lines:' .. args.id .. ':' .. kind), line, line)
    redis.call('HINCRBY', batch, result.failed and 'failed' or 'completed', 1)
    for _, name in ipairs({
      'prompt_tokens', 'completion_tokens', 'cached_tokens', 'reasoning_tokens',
    }) do
      redis.call('HINCRBY', batch, name, result[name])
    end
    redis.call('HINCRBYFLOAT', batch, 'cost', result.cost)
    if result.model ~= '' then
      local models = key('models:' .. args.id)
      redis.call('HINCRBY', models, (result.failed and 'failed ' or 'completed ') .. result.model, 1)
      for _, name in ipairs({'prompt_tokens', 'completion_tokens'}) do
        redis.call('HINCRBY', models, name .. ' ' .. result.model, result[name])
      end
      redis.call('HINCRBYFLOAT', models, 'cost ' .. result.model, result.cost)
    end
    added[#added + 1] = result.line
  end
end
return added
