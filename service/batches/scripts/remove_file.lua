-- Remove a file. args: id. Returns 1, or 0 where there is none.

return subtract_file(args.id) and 1 or 0
