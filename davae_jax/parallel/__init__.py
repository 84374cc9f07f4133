"""Devices and processes: sharding rules, several hosts, the chips that are known."""
