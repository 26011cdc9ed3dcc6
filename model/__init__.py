"""Models: what a method computes, what it costs, how it decodes. PyTorch only."""
