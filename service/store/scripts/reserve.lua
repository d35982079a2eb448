-- Reserve a claim in all its accounts, or in none.
-- args: owner, id, lines (account, base, per_token), tokens, least.
-- Returns {tokens, amounts, starts}, {refused = {account, wait, busy}}, or {gone = true} for a
-- claim that was undone before it arrived.

release_expired_owner()
if redis.call('EXISTS', key('gone:' .. args.id)) == 1 then return cjson.encode({gone = true}) end

-- The same sums as in `Charge.amount` and `Charge.affordable`.
local function amount(line, tokens)
  return math.ceil(line.base + line.per_token * tokens - 1e-6)
end

local function affordable_tokens(line, room)
  if line.base > room then return -1 end
  if line.per_token <= 0 then return 2 ^ 53 end
  local tokens = math.floor((room - line.base) / line.per_token + 1e-6)
  if amount(line, tokens) <= room then return tokens end
  return tokens - 1
end

-- Milliseconds until the line surely fits (-1: never), and whether only open claims and quotas
-- are in its way.
local function retry_after(line, counts)
  local account, wanted = line.account, amount(line, args.least)
  if wanted > account.limit then return -1, false end
  local missing = counts.taken + wanted - account.limit
  if missing <= counts.held then return 1000, true end
  if account.kind == 'sliding' then
    local starts = {}
    for start in pairs(counts.by_start) do starts[#starts + 1] = start end
    table.sort(starts)
    local needed = missing - counts.held
    for _, start in ipairs(starts) do
      needed = needed - counts.by_start[start]
      if needed <= 0 then return start + account.part + account.length - now, false end
    end
  end
  if account.kind == 'now' or missing <= counts.reserved + counts.held then return 1000, true end
  return counts.finish - now, false
end

local tokens, refusal, counts_by_line = args.tokens, nil, {}
for i, line in ipairs(args.lines) do
  local counts = load_account(line.account)
  counts_by_line[i] = counts
  local fitting = affordable_tokens(line, line.account.limit - counts.taken)
  if fitting < args.least then
    local wait, busy = retry_after(line, counts)
    if counts.held > 0 then
      -- Offline quotas are for when there is enough: the next heartbeats give them back.
      redis.call('HSET', account_key(line.account.name), WANTED_FIELD, int(now))
    end
    if not refusal or (refusal.wait >= 0 and (wait < 0 or wait > refusal.wait)) then
      refusal = {account = line.account.name, wait = wait, busy = busy}
    end
  end
  tokens = math.min(tokens, fitting)
end
if refusal then return cjson.encode({refused = refusal}) end

local stored_lines, amounts, starts = {}, {}, {}
for i, line in ipairs(args.lines) do
  local size, start = int(amount(line, tokens)), int(counts_by_line[i].start)
  local account = line.account.name
  redis.call('HINCRBY', account_key(account), reserved_field(start), size)
  extend_expiry(line.account, counts_by_line[i])
  stored_lines[i] = {account, start, size}
  amounts[i], starts[i] = size, start
end
redis.call('HSET', key('own:' .. args.owner), args.id, cjson.encode(stored_lines))
if redis.call('ZSCORE', key('owners'), args.owner) == false then
  redis.call('ZADD', key('owners'), int(now + args.lease), args.owner)
end
return cjson.encode({tokens = int(tokens), amounts = amounts, starts = starts})
