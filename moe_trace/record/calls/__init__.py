"""One recorded call, and the store of many: kept, reduced in batches, copied late, made into samples."""
