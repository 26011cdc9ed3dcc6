"""Studies: sweeps, the runs they make, what those cost, and Ray Tune, which schedules them."""
