"""Which sample comes when: permutations, windows of shards, mixtures of sources, packing of documents."""
