"""Studies that ship: one module per study."""
