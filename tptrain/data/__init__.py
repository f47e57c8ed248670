"""Records to batches.

`sources` reads records, `render` makes (ids, mask), `dataset` tokenises all of them once, `order` says which
comes when, `batches` fills the arrays of a step.

The order is a pure function of (seed, index), and the whole state of the data is one integer, the cursor: the
number of samples used so far. A run saved on eight chips goes on with the next sample on four.
"""
