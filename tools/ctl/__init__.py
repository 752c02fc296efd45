"""`perdure ctl`: look at a running cluster and steer it."""
