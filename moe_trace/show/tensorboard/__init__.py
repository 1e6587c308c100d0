"""The MoE tab of TensorBoard: traces below the log folder, read without torch and drawn without internet."""
