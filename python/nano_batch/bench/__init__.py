"""`nano-batch bench`: nano_batch beside transformers on the present machine, and the pictures.

`command` reads the arguments; `throughput` and `latency` measure a `workload`, each side in a
process of its own (`side` is our end of it, `worker` the other); `roofline` says what the machine
could do. `result` keeps the JSON, `tables` and `pictures` (in one `style`) show it, and `promote`
makes it the README's.
"""
