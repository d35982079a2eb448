"""This gateway beside other projects' gateways and routers."""
