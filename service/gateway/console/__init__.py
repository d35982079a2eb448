"""The console: a page that shows what the service does, and the stream of events behind it."""
