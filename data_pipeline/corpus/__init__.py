"""A prepared corpus, on disk or at a URL: shards, their table, the manifest, ranges of tokens read and checked."""
