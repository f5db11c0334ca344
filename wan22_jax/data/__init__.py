"""From files on disk to batches: decode, bucket, cache, load."""
