-- Return a response, or false. args: id.

return (load_response(args.id))
