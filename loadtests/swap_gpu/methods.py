"""The names of what `loadtests.swap_gpu` times, in its tables and in its findings."""

BUS = "copy from pinned memory, same bytes"
INPLACE, WAKE = "inplace, from pinned memory", "sleep level 1: wake"
FILL, MAP = "to shared memory, from disk", "to another engine, by mapping"
SLEEP, START = "sleep level 1: sleep", "engine start"
OF_BUS = "in place, part of the bandwidth from pinned memory"
