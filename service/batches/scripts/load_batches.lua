-- Batches with their counts. args: ids.

local found = {}
for i, id in ipairs(args.ids) do found[i] = load_batch(id) end
return found
