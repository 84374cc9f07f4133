"""Devices and processes: sharding rules, multiple hosts, specifications of chips."""
