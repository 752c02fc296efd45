"""`perdure chaos`: faults against a live cluster, real streams compared with an undisturbed run, a report."""
