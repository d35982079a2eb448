"""Load tests of the gateway, alone and beside others."""
