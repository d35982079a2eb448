"""`coe doctor`: proves the methods of swaps on this machine, and writes a record."""
