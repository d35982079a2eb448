-- Add a conversation with its first items.
-- args: id, tenant, created, ids, spare, most_entries, most_bytes. ARGV[3]: its metadata, then the
-- items' bodies. Returns whether it is kept, and how many entries were evicted.

if exceeds(1, #ARGV[3] + size_of_items(4)) then return {0, 0} end
insert_container(args.id, args.tenant, args.created)
redis.call('HSET', container_key(args.id), 'metadata', ARGV[3])
add_amounts(args.id, args.tenant, 0, #ARGV[3])
append(args.id, args.tenant, 4)
return {1, make_room(args.tenant, args.id)}
