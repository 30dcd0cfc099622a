"""What runs in another process: each file stands alone and needs numpy and its own runtime, nothing of spa's (see spa.engines.worker)."""
