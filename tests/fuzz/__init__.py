"""Whatever a client may send: no 5xx, no hang, no traceback."""
