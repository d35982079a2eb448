-- Release everything that an owner holds, at once. args: owner.

release_owner(args.owner)
return 1
