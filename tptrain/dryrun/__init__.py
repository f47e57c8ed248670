"""Know before you pay: what a run would be on a slice that is not there."""
