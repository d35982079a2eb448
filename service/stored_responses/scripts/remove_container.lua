-- Remove a container with all that is in it. args: id. Returns how many entries it was.

return remove_container(args.id)
