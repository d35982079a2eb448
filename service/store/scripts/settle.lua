-- Charge what a claim used, and release what it reserved. Settling twice charges once.
-- args: owner, id, note, most_windows_owed, lines ({account, start, reserved, used, limit, length,
-- part}; length and part are 0 unless the window slides), offline: granted from an offline quota,
-- item: {group, name} of work that is charged once, whichever of its claims is settled.

local function parse_line(line)
  return {
    account = line[1], start = line[2], reserved = tonumber(line[3]), used = tonumber(line[4]),
    limit = tonumber(line[5]), length = tonumber(line[6]), part = tonumber(line[7]),
  }
end

local function add_spent(account, start, amount)
  if amount == 0 then return end
  redis.call('HINCRBY', account_key(account), spent_field(start), int(amount))
  redis.call('EXPIRE', account_key(account), 70 * DAY_S, 'NX')
end

-- Amounts taken by how many windows from now they count: 0 is the current one.
local function taken_by_window(line, part_start)
  local taken = {}
  local fields = redis.call('HGETALL', account_key(line.account))
  for i = 1, #fields, 2 do
    local field, value = fields[i], tonumber(fields[i + 1])
    local kind, window = string.sub(field, 1, 1), nil
    if field == HELD_FIELD then
      window = 0
    elseif kind == 's' or kind == 'r' then
      local start = tonumber(string.sub(field, 2))
      if start > part_start then
        window = math.min(math.ceil((start - part_start) / line.length), args.most_windows_owed)
      elseif start >= part_start - line.length then
        window = 0
      end
    end
    if window then taken[window] = (taken[window] or 0) + value end
  end
  return taken
end

-- The use beyond a reservation that the current window has no room for is charged to the next
-- windows, up to the limit of each.
local function charge_debt(line, debt)
  local part_start = now - now % line.part
  local taken = taken_by_window(line, part_start)
  for window = 0, args.most_windows_owed do
    local amount = math.min(debt, math.max(0, line.limit - (taken[window] or 0)))
    if window == args.most_windows_owed then amount = debt end
    add_spent(line.account, int(part_start + window * line.length), amount)
    debt = debt - amount
    if debt <= 0 then return end
  end
end

local function charge(line, window_exists)
  local within = line.used
  if line.part ~= 0 then within = math.min(line.used, line.reserved) end
  if window_exists then add_spent(line.account, line.start, within) end
  if line.used > within then charge_debt(line, line.used - within) end
end

local lines = {}
for i, line in ipairs(args.lines) do lines[i] = parse_line(line) end

-- Release what the claim holds, if it is this owner's.
local function release_claim()
  local stored_lines = redis.call('HGET', key('own:' .. args.owner), args.id)
  if not stored_lines then return end
  redis.call('HDEL', key('own:' .. args.owner), args.id)
  release_lines(cjson.decode(stored_lines))
end

if args.item then
  local once_key, name = key('once:' .. args.item[1]), args.item[2]
  release_claim()
  redis.call('DEL', key('lapsed:' .. args.id))
  if redis.call('HEXISTS', once_key, '*') == 1 then return 0 end
  if redis.call('HSETNX', once_key, name, '1') == 0 then return 0 end
  redis.call('EXPIRE', once_key, WORK_DAYS * DAY_S)
  for _, line in ipairs(lines) do charge(line, true) end
elseif args.offline then
  if not redis.call('SET', key('gone:' .. args.id), '1', 'EX', DAY_S, 'NX') then return 0 end
  for _, line in ipairs(lines) do charge(line, true) end
elseif redis.call('HDEL', key('own:' .. args.owner), args.id) == 1 then
  for _, line in ipairs(lines) do
    local account, field = account_key(line.account), reserved_field(line.start)
    local window_exists = redis.call('HEXISTS', account, field) == 1
    if window_exists then redis.call('HINCRBY', account, field, int(-line.reserved)) end
    charge(line, window_exists)
  end
elseif redis.call('DEL', key('lapsed:' .. args.id)) == 1 then
  for _, line in ipairs(lines) do charge(line, true) end
else
  return 0
end
add_usage_note(args.note)
return 1
