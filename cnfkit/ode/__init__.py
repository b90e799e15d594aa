"""The continuous side: fields, solvers, and the flows that they make."""
