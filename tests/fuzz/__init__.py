"""No input of a client causes a 5xx, a hang or a traceback."""
