"""The real shells in virtual time: coordinator, gateway links and worker daemon, as they are, on one asyncio loop whose
clock is the simulator's and whose gRPC is memory. For what the cores cannot see: lost wake-ups, swallowed
cancellations, full mailboxes, tasks that outlive their owner."""
