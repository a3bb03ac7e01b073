import signal

# A shell that runs pytest in the background has it ignore SIGINT, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
