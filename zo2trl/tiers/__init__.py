"""Where bytes live and how they move: files, the journal, layouts, placement and the three tiers."""
