"""What training will see of the records, and what a server will send: `tptrain data inspect`."""
