-- Return a response and those that it goes on from, the newest first. args: tenant, id,
-- most_responses, most_chain_bytes. Before them stand the id that is missing, or an empty text, and
-- whether the chain is cut.

local found, size, at = {}, 0, args.id
while true do
  local response, bytes = load_response(at)
  if not response or response[2] ~= args.tenant then return {at, 0, found} end
  found[#found + 1] = response
  size = size + bytes
  if size > args.most_chain_bytes or #found > args.most_responses then return {'', 1, found} end
  if not response[7] then return {'', 0, found} end
  at = response[7]
end
