"""What a plan needs of chips, hosts, networks and time, by arithmetic."""
