"""The MoE tab of TensorBoard: traces below the log folder, read without torch, drawn without the internet."""
