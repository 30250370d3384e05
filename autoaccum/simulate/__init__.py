"""What a GPU's memory would do, without the GPU."""
