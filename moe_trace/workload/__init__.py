"""What `moe-trace run` runs: models, inputs and the steps on them."""
