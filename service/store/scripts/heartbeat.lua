-- Extend an owner's lease, add its usage notes, and resize its offline quotas.
-- args: owner, number (of this heartbeat), batch (number of its notes), notes, share,
-- quotas (account, held, more).
-- Returns {known, lapsed, quotas = {{account, held, room}}}, or {stale = true} for a heartbeat that
-- arrives after a later one.

release_expired_owner()
local owner_key, quotas_key = key('o:' .. args.owner), key('sl:' .. args.owner)
if tonumber(redis.call('HGET', owner_key, 'beat') or '0') >= args.number then
  return cjson.encode({stale = true})
end
local known = redis.call('ZSCORE', key('owners'), args.owner) ~= false
local lapsed = redis.call('DEL', key('lapsed-owner:' .. args.owner)) == 1
redis.call('ZADD', key('owners'), int(now + args.lease), args.owner)
redis.call('HSET', owner_key, 'beat', args.number)
if #args.notes > 0 and tonumber(redis.call('HGET', owner_key, 'notes') or '0') < args.batch then
  for _, note in ipairs(args.notes) do add_usage_note(note) end
  redis.call('HSET', owner_key, 'notes', args.batch)
end
redis.call('EXPIRE', owner_key, DAY_S)

-- Returns the quota's new size, and what is left of the account for all owners.
local function resize_quota(quota)
  local account = quota.account
  local counts = load_account(account)
  local stored = tonumber(redis.call('HGET', quotas_key, account.name) or '0')
  local held = math.min(stored, quota.held)
  local room = account.limit - (counts.taken - stored)
  -- A claim was refused a moment ago: nobody gets more meanwhile.
  if counts.wanted and now - counts.wanted < HEARTBEAT_GAP_MS then room = 0 end
  local size = math.max(held, math.min(held + quota.more, math.ceil(args.share * room)))
  if size ~= stored then
    redis.call('HINCRBY', account_key(account.name), HELD_FIELD, int(size - stored))
    extend_expiry(account, counts)
  end
  if size > 0 then redis.call('HSET', quotas_key, account.name, int(size))
  else redis.call('HDEL', quotas_key, account.name) end
  return size, room
end

local quotas = {}
for i, quota in ipairs(args.quotas) do
  local size, room = resize_quota(quota)
  quotas[i] = {quota.account.name, int(size), int(room)}
end
return cjson.encode({known = known, lapsed = lapsed, quotas = quotas})
