"""From one device to many: processes, sharding, expert parallelism, the optimizer."""
