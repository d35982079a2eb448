-- What is spent and reserved in each account now, and its window. args: accounts.

local balances = {}
for i, account in ipairs(args.accounts) do
  local counts = load_account(account)
  local reserved = counts.reserved + counts.held
  balances[i] = {int(counts.spent), int(reserved), int(counts.start), int(counts.finish)}
end
return cjson.encode(balances)
