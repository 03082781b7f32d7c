"""The driver of one attempt: plans, runs builds on the cluster, says how far it is, and leaves one result document."""
