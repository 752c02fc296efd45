"""`perdure up`: a whole cluster on one machine, started, watched, healed and stopped as one."""
