"""Which layer, module or parameter a name means, for nets and files alike; no MindSpore."""
