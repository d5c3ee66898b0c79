"""Meta-training: episodes of many tasks, from which a head learns how to read a support set."""
