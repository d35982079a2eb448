-- Reserve again the open claims that a Redis without its data does not know.
-- args: owner, claims (id, lines of {account, start, amount}).

for _, claim in ipairs(args.claims) do
  local ended = redis.call('EXISTS', key('gone:' .. claim.id), key('lapsed:' .. claim.id)) > 0
  local claims_key, stored_lines = key('own:' .. args.owner), cjson.encode(claim.lines)
  if not ended and redis.call('HSETNX', claims_key, claim.id, stored_lines) == 1 then
    for _, line in ipairs(claim.lines) do
      local account, start, amount = line[1], line[2], line[3]
      redis.call('HINCRBY', account_key(account), reserved_field(start), amount)
      redis.call('EXPIRE', account_key(account), 70 * DAY_S, 'NX')
    end
  end
end
return 1
