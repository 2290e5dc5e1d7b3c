"""Labels, data sets, shards and batches; NumPy only."""
