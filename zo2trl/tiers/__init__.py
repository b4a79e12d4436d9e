"""The three tiers of weights, and how bytes move between them: leases, ring, prefetching, staging and writing."""
