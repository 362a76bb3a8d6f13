"""Where text comes from: documents out of text trees, JSON lines, Parquet, Arrow and Hugging Face data sets."""
